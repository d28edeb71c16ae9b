"""How the eight stuff classes of the drawn scenes look: sky, water, grass, sand, road, tree, building, mountain.

Each class has a texture of its own at the scale of 8 to 16 units (clouds, long streaks, upright blades, grain, smooth
asphalt with markings, round leaf clumps, rows of windows, angular facets), while its colours are shared with others.
"""

import numpy as np

from datamodules.scenes.canvas import (
    Canvas,
    Colour,
    Dice,
    Patch,
    box,
    dim,
    mix,
    noise,
    noise1,
    planes,
    polygon,
    relief,
    smooth,
    tones,
    wave,
)

SKY, WATER, GRASS, SAND, ROAD, TREE, BUILDING, MOUNTAIN = range(8)

SKIES = (  # top, bottom, how often
    ((62, 124, 205), (176, 212, 240), 5),
    ((96, 160, 220), (214, 232, 240), 4),
    ((140, 150, 164), (206, 210, 212), 4),
    ((92, 84, 150), (250, 176, 116), 2),
    ((150, 166, 214), (250, 208, 200), 2),
    ((36, 44, 84), (124, 116, 150), 1.5),
    ((168, 182, 170), (232, 226, 198), 1.5),
    ((214, 150, 104), (244, 214, 160), 1),
)
WATERS = ((40, 92, 134), (52, 116, 120), (76, 108, 90), (92, 104, 116), (62, 140, 156), (112, 104, 84), (30, 58, 88))
GRASSES = ((98, 150, 62), (126, 166, 70), (78, 124, 66), (168, 158, 84), (146, 130, 76), (64, 104, 62), (140, 160, 110))
SANDS = ((226, 202, 152), (208, 182, 140), (190, 148, 110), (214, 206, 192), (168, 138, 112), (150, 146, 140))
ROADS = ((98, 98, 104), (74, 78, 86), (128, 124, 120), (144, 126, 112), (60, 62, 72))
LEAVES = ((54, 102, 50), (72, 124, 52), (40, 82, 62), (160, 124, 46), (172, 88, 44), (196, 140, 156), (96, 112, 54))
ROCKS = (
    (122, 116, 122),
    (142, 120, 100),
    (94, 106, 128),
    (112, 92, 84),
    (92, 108, 88),
    (164, 108, 82),
    (150, 150, 156),
)
WALLS = (
    (206, 194, 174),
    (172, 92, 72),
    (150, 156, 168),
    (228, 222, 208),
    (118, 130, 152),
    (194, 160, 106),
    (100, 112, 106),
    (216, 164, 146),
    (92, 86, 92),
)
ROOFS = ((150, 74, 56), (92, 80, 78), (120, 96, 84), (84, 96, 112), (176, 120, 78))


class Light:
    """What all things of a picture share: the colours of the sky and the side that the sun is on."""

    def __init__(self, dice: Dice):
        top, bottom, _ = dice.pick(SKIES, [s[2] for s in SKIES])
        self.top, self.bottom = dice.colour([top], 0.12), dice.colour([bottom], 0.08)
        self.side = dice.sign()

    def far(self, colour: Colour, share: float) -> Colour:
        """The colour seen through air: moved towards the lower sky by `share`."""
        return mix(colour, self.bottom, share)


def sky(canvas: Canvas, dice: Dice, light: Light, horizon: float) -> None:
    """Gradient, clouds of several kinds, now and then a sun; fills the canvas down to the horizon and beyond."""
    p = canvas.patch(0, 0, canvas.width, canvas.height)
    p.label[:] = SKY
    t = np.minimum(p.y * (1.0 / horizon), 1.0)
    p.rgb[:] = tones(light.top, light.bottom, t)
    upper = canvas.patch(0, 0, canvas.width, horizon + 2)
    if upper is None:
        return
    if dice.chance(0.3):
        radius, cx, cy = dice.uniform(4, 9), dice.uniform(0.1, 0.9) * canvas.width, dice.uniform(0.2, 1.0) * horizon
        dx, dy = upper.x - cx, upper.y - cy
        distance = np.sqrt(dx * dx + dy * dy)
        glow = np.maximum(1.0 - distance * (1.0 / (radius * 5.0)), 0.0)
        upper.paint(glow * glow * 0.55, (1.0, 0.94, 0.78))
        upper.paint(upper.cover(distance - radius), (1.0, 0.97, 0.86))
    if dice.chance(0.85):
        wide = dice.uniform(14, 34)
        flat = wide * dice.uniform(0.3, 0.55)
        shape = noise(dice, upper.y * (1.0 / flat), upper.x * (1.0 / wide)) * 0.62
        shape += noise(dice, upper.y * (2.3 / flat), upper.x * (2.3 / wide)) * 0.38
        soft = dice.pick((2.2, 4.5, 8.0))
        alpha = np.clip((shape - dice.uniform(0.42, 0.62)) * soft, 0.0, 1.0) * dice.uniform(0.55, 0.95)
        bright, dark = mix(light.bottom, (1.0, 1.0, 1.0), dice.uniform(0.3, 0.85)), dim(light.bottom, 0.86)
        upper.paint(alpha, tones(bright, dark, np.clip((shape - 0.55) * 2.5, 0.0, 1.0)))


def mountain(canvas: Canvas, dice: Dice, light: Light, base: float, height: float, far: float, rise=None) -> None:
    """An angular ridge whose facets are lit from one side, with creases and, on high ones, snow.

    `base`, `height`: foot and greatest height in units; `far`: share of air in its colour; `rise` [W]: factor of the
    height along x (a headland).
    """
    x = canvas.x
    zoom = max(0.5, height / 34.0)
    ridge = 0.56 * noise1(dice, x * (1.0 / (30 * zoom)), True) + 0.3 * noise1(dice, x * (1.0 / (13 * zoom)), True)
    ridge += 0.14 * noise1(dice, x * (1.0 / (5.0 * zoom)), True)
    tall = height * (0.25 + 0.95 * ridge)
    if rise is not None:
        tall = tall * rise
    top = base - tall
    p = canvas.patch(0, float(top.min()) - 1, canvas.width, base + 2)
    if p is None:
        return
    alpha = p.cover(top - p.y)
    step = max(1, int(canvas.scale * 1.5 + 0.5))
    padded = np.concatenate([top[:1].repeat(step), top, top[-1:].repeat(step)])
    slope = (padded[2 * step :] - padded[: -2 * step]) * (light.side * canvas.scale / step)
    wobble = noise1(dice, p.y.reshape(-1) * (1.0 / 6.0), True)[:, None] - 0.5
    drift = np.floor((wobble * 10.0 + (p.y - base) * dice.uniform(-0.3, 0.3)) * canvas.scale).astype(np.intp)
    lit = slope[np.clip(np.arange(len(x))[None] + drift, 0, len(x) - 1)]
    crease = np.abs(2.0 * noise(dice, p.y * (1.0 / (8 * zoom)), x * (1.0 / (5.5 * zoom)), True) - 1.0)
    layers = noise(dice, p.y * (1.0 / 1.7), x * (1.0 / 9.0)) - 0.5
    t = 0.54 - np.clip(lit, -1.0, 1.0) * 0.34 - (1.0 - np.minimum(crease * 3.0, 1.0)) * 0.3 + layers * 0.22
    rock = light.far(dice.colour(ROCKS, 0.15), far)
    colour = tones(dim(rock, 0.42), dim(rock, 1.45), t)
    if height > 30 and dice.chance(0.55):
        line = base - height * dice.uniform(0.5, 0.72)
        snow = np.clip((line - p.y) * 0.3 + (t - 0.4) * 2.0 + (crease - 0.5) * 2.0, 0.0, 1.0)
        white = light.far((0.95, 0.96, 1.0), far * 0.6)
        colour += (planes(white) * (0.6 + 0.5 * t) - colour) * snow
    p.paint(alpha, colour, MOUNTAIN)


def _ground(p: Patch, horizon: float, rate: float) -> np.ndarray:
    """Depth coordinate [h]: its rows are denser towards the horizon, as on a plane seen from above."""
    return np.sqrt(np.maximum(p.y.reshape(-1) - horizon, 0.0) + 1.0) * rate


def water(canvas: Canvas, dice: Dice, light: Light, horizon: float, top: np.ndarray, bottom: np.ndarray) -> None:
    """Long level streaks and glints between the lines `top` and `bottom` [W]; a part of its colour is the sky's."""
    p = canvas.patch(0, float(top.min()) - 1, canvas.width, float(bottom.max()) + 1)
    if p is None:
        return
    depth = _ground(p, horizon, dice.uniform(3.2, 4.6))
    streaks = noise(dice, depth, p.x * (1.0 / dice.uniform(9, 14)))
    broad = noise(dice, depth * 0.37, p.x * (1.0 / 26.0))
    own = mix(dice.colour(WATERS, 0.12), light.bottom, dice.uniform(0.15, 0.6))
    t = 0.62 * streaks + 0.38 * broad
    colour = tones(dim(own, 0.62), mix(dim(own, 1.12), light.bottom, 0.3), smooth(t))
    glint = np.clip((streaks - 0.8) * 6.0, 0.0, 1.0) * np.clip((broad - 0.45) * 3.0, 0.0, 1.0)
    colour += (planes(mix(light.bottom, (1.0, 1.0, 1.0), 0.6)) - colour) * (glint * 0.7)
    p.paint(np.minimum(p.cover(top - p.y), p.cover(p.y - bottom)), colour, WATER)


def foam(canvas: Canvas, dice: Dice, line: np.ndarray, width: float) -> None:
    """A pale band of spent waves along the shore line [W], of the water's side."""
    p = canvas.patch(0, float(line.min()) - 3 * width, canvas.width, float(line.max()) + 1)
    if p is None:
        return
    edge = line - width * (0.4 + 1.2 * noise1(dice, canvas.x * 0.14))
    p.paint(np.minimum(p.cover(edge - p.y), p.cover(p.y - line)) * 0.8, (0.95, 0.96, 0.95))


def grass(canvas: Canvas, dice: Dice, light: Light, horizon: float, top: np.ndarray, base: Colour) -> None:
    """Upright blades and broad patches below the line `top` [W], in places with flowers."""
    p = canvas.patch(0, float(top.min()) - 1, canvas.width, canvas.height)
    if p is None:
        return
    depth = _ground(p, min(horizon, float(top.min())), 2.6)
    blades = noise(dice, depth, p.x * (1.0 / 1.5))
    patches = noise(dice, depth * 0.3, p.x * (1.0 / 18.0))
    mown = wave(p.x * 0.0 + (depth * 0.23 + dice.uniform(0, 1))[:, None]) * 0.12 if dice.chance(0.2) else 0.0
    t = 0.66 * blades + 0.34 * patches + mown
    colour = tones(dim(base, 0.55), mix(dim(base, 1.4), (0.9, 0.9, 0.4), 0.12), t)
    if dice.chance(0.22):
        dots = noise(dice, depth * 2.0, p.x * (1.0 / 1.9))
        bloom = dice.colour(((250, 240, 240), (240, 210, 60), (214, 60, 60), (160, 110, 200)), 0.1)
        colour += (planes(bloom) - colour) * np.clip((dots * (0.6 + 0.6 * patches) - 0.78) * 14.0, 0.0, 1.0)
    p.paint(p.cover(top - p.y), colour, GRASS)


def sand(canvas: Canvas, dice: Dice, light: Light, horizon: float, top: np.ndarray, base: Colour) -> None:
    """Grain and pebbles over soft dunes below the line `top` [W]."""
    p = canvas.patch(0, float(top.min()) - 1, canvas.width, canvas.height)
    if p is None:
        return
    depth = _ground(p, horizon, 2.0)
    grain = noise(dice, p.y * (1.0 / 1.15), p.x * (1.0 / 1.15))
    dunes = noise(dice, depth * 0.55, p.x * (1.0 / 21.0))
    ripple = wave(depth[:, None] * 0.9 + dunes * 1.6 + p.x * 0.02)
    t = 0.36 * grain + 0.36 * dunes + 0.16 * ripple
    colour = tones(dim(base, 0.68), dim(base, 1.26), t)
    stones = np.clip((grain - 0.93) * 20.0, 0.0, 1.0) * 0.5
    colour *= 1.0 - stones
    p.paint(p.cover(top - p.y), colour, SAND)


def road(canvas: Canvas, dice: Dice, horizon: float, end: float, middle: np.ndarray, half: np.ndarray, base: Colour):
    """A road that runs away from the viewer: `middle` and `half` [H] are its centre and half width at each row."""
    p = canvas.patch(0, end - 1, canvas.width, canvas.height)
    if p is None:
        return
    rows = slice(len(canvas.y) - len(p.y), None)
    middle, half = middle[rows, None], half[rows, None]
    grain = noise(dice, p.y * 0.9, p.x * 0.8) * 0.35 + noise(dice, p.y * 0.1, p.x * 0.06) * 0.65
    off = np.abs(p.x - middle)
    alpha = p.cover(off - half) * p.cover(end - p.y)
    p.paint(alpha, tones(dim(base, 0.84), dim(base, 1.14), grain), ROAD)
    paint = dice.colour(((236, 234, 226), (240, 208, 96)), 0.06)
    far = 60.0 / np.maximum(p.y - horizon, 0.5)
    dash = (wave(far * dice.uniform(0.5, 0.9)) > 0.45).astype(np.float32)
    p.paint(alpha * p.cover(off - half * 0.035) * dash * 0.9, paint)
    if dice.chance(0.7):
        p.paint(p.cover(np.abs(off - half * 0.9) - half * 0.025) * alpha * 0.85, paint)


def street(canvas: Canvas, dice: Dice, top: float, bottom: float, base: Colour) -> None:
    """A road that crosses the picture from side to side between two heights, with a kerb and a dashed line."""
    p = canvas.patch(0, top - 1, canvas.width, bottom + 1)
    if p is None:
        return
    grain = noise(dice, p.y * 0.9, p.x * 0.8) * 0.35 + noise(dice, p.y * 0.2, p.x * 0.04) * 0.65
    alpha = np.minimum(p.cover(top - p.y), p.cover(p.y - bottom)) + p.x * 0.0
    p.paint(alpha, tones(dim(base, 0.84), dim(base, 1.14), grain), ROAD)
    tall = bottom - top
    p.paint(p.cover(np.abs(p.y - top - 0.8) - 0.8) + p.x * 0.0, dim(mix(base, (0.8, 0.8, 0.78), 0.6), 1.05))
    paint = dice.colour(((236, 234, 226), (240, 208, 96)), 0.06)
    dash = np.clip((wave(p.x * (1.0 / 26.0) + dice.uniform(0, 1)) - 0.42) * 12.0, 0.0, 1.0)
    p.paint(p.cover(np.abs(p.y - top - tall * dice.uniform(0.5, 0.66)) - tall * 0.03) * dash * 0.9, paint)


def foliage(p: Patch, dice: Dice, light: Light, alpha: np.ndarray, base: Colour, shade: np.ndarray) -> None:
    """Round clumps of leaves, lit from above, over the window; `shade` is added to their brightness."""
    clumps = relief(dice, p, 4.4, 1.1, light.side)
    leaves = relief(dice, p, 2.1, 1.0, light.side)
    t = 0.48 + clumps * 0.42 + leaves * 0.2 + shade
    p.paint(alpha, tones(dim(base, 0.4), mix(dim(base, 1.5), (1.0, 0.95, 0.6), 0.08), np.clip(t, 0.0, 1.15)), TREE)


def tree(canvas: Canvas, dice: Dice, light: Light, x: float, base: float, size: float, leaf: Colour) -> None:
    """One tree of height `size` with its foot at (x, base): a round crown on a trunk, or a conifer."""
    conifer = dice.chance(0.3)
    reach = 0.42 * size if conifer else 0.5 * size
    p = canvas.patch(x - reach * 1.3, base - size * 1.02, x + reach * 1.3, base + size * 0.05)
    if p is None:
        return
    ground = (p.x - x) * (1.0 / (reach * 1.1)), (p.y - base) * (1.0 / (size * 0.05))
    p.shade(np.clip(1.4 - ground[0] * ground[0] - ground[1] * ground[1], 0.0, 1.0), 0.6)
    bark = dim(dice.colour(((110, 84, 62), (96, 86, 80), (140, 124, 110)), 0.15), 0.9)
    width = max(2.4, size * 0.075)
    trunk = np.maximum(np.abs(p.x - x) - width, np.abs(p.y - base + size * 0.25) - size * 0.25)
    p.paint(p.cover(trunk), tones(bark, dim(bark, 0.6), (p.x - x) * (0.4 * -light.side / width) + 0.5), TREE)
    if conifer:
        fall = p.y - (base - size)
        tier = size * dice.uniform(0.17, 0.24)
        saw = fall * (1.0 / tier) - np.floor(fall * (1.0 / tier))
        outline = np.abs(p.x - x) - fall * (reach / (size * 0.9)) * (0.72 + 0.36 * saw)
        distance = np.maximum(outline * 0.85, fall - size * 0.9)
        shade = (0.5 - saw) * 0.3 - (p.x - x) * (0.22 / reach) * -light.side
    else:
        distance, middle = None, base - size * 0.58
        for n in range(dice.count(5, 7)):
            r = size * dice.uniform(0.2, 0.27) if n else size * 0.33
            dx = dice.uniform(-0.26, 0.26) * size if n else 0.0
            dy = dice.uniform(-0.14, 0.18) * size if n else 0.0
            ax, ay = p.x - (x + dx), p.y - (middle + dy)
            blob = np.sqrt(ax * ax + ay * ay) - r
            distance = blob if distance is None else np.minimum(distance, blob)
        shade = (middle - p.y) * (0.5 / size) + (p.x - x) * (0.35 / size) * light.side
    foliage(p, dice, light, p.cover(distance), leaf, shade)


def wood(
    canvas: Canvas, dice: Dice, light: Light, base: float, height: float, leaf: Colour, start: float, end: float
) -> None:
    """A row of many trees, crown beside crown, whose feet stand on `base`, from x = start to end."""
    p = canvas.patch(start - height, base - height * 1.5, end + height, base + 1)
    if p is None:
        return
    x = p.x.reshape(-1)
    top, shade = np.full_like(x, base), np.zeros_like(x)
    conifers, at = dice.chance(0.35), start
    while at < end:
        r = height * dice.uniform(0.3, 0.55)
        tall = height * dice.uniform(0.65, 1.1)
        off = np.abs(x - at) * (1.0 / r)
        rise = 1.0 - off if conifers else np.sqrt(np.maximum(1.0 - off * off, 0.0)) * 0.6 + 0.4
        crown = np.where(off < 1.0, base - tall * rise, base)
        np.copyto(shade, dice.uniform(-0.14, 0.14), where=crown < top)
        np.minimum(top, crown, out=top)
        at += r * dice.uniform(0.7, 1.5)
    low = (p.y - base + height * 0.5) * (-0.5 / height)
    foliage(p, dice, light, np.minimum(p.cover(top - p.y), p.cover(p.y - base)), leaf, low + shade)


def building(canvas: Canvas, dice: Dice, light: Light, left: float, right: float, base: float, tall: float, far: float):
    """A block seen from the front: rows of windows, a cornice, sometimes a door; `far` is the share of air."""
    p = canvas.patch(left - 0.5, base - tall - 1, right + 0.5, base + 1)
    if p is None:
        return
    wall = light.far(dice.colour(WALLS, 0.14), far)
    wide = right - left
    lit = (p.x - left) * (1.0 / wide) - 0.5
    t = 0.5 + lit * 0.35 * light.side + (base - p.y) * (0.2 / tall) - 0.1
    if dice.chance(0.4):
        t = t - (wave(p.y * 0.5) > 0.8) * 0.14
    alpha = p.cover(box(p, left, base - tall, right, base))
    p.paint(alpha, tones(dim(wall, 0.74), dim(wall, 1.22), t), BUILDING)
    columns = max(2, int(wide / dice.uniform(6.5, 10.0)))
    pitch, storey = wide / columns, dice.uniform(8.0, 11.5)
    broad, high = pitch * dice.uniform(0.22, 0.36), storey * dice.uniform(0.24, 0.34)
    across = (p.x - left) * (1.0 / pitch)
    down = (p.y - (base - tall) - storey * 0.25) * (1.0 / storey)
    nx, ny = np.floor(across), np.floor(down)
    dx, dy = np.abs(across - nx - 0.5) * pitch, np.abs(down - ny - 0.5) * storey
    inside = ((ny >= 0) & (p.y < base - storey * 0.35)).astype(np.float32)
    rows = np.clip(ny, 0, 63).astype(np.intp).reshape(-1)
    lights = dice.rng.random((64, columns + 1), dtype=np.float32)[rows][:, np.clip(nx, 0, columns).astype(np.intp)[0]]
    night = dice.pick((0.04, 0.12, 0.5))
    glass = mix(dice.colour(((46, 60, 82), (80, 110, 140), (40, 40, 46), (150, 180, 196)), 0.1), light.bottom, 0.15)
    lamp = (lights < night).astype(np.float32)
    panes = tones(dim(glass, 0.8), dim(glass, 1.25), lights)
    panes += (planes((0.98, 0.86, 0.52)) - panes) * lamp
    frame = mix(wall, (1.0, 1.0, 1.0), 0.4) if dice.chance(0.6) else dim(wall, 0.7)
    p.paint(p.cover(dx - broad - 0.7) * p.cover(dy - high - 0.7) * inside * alpha, frame)
    p.paint(p.cover(dx - broad) * p.cover(dy - high) * inside * alpha, panes)
    p.paint(p.cover(np.abs(p.y - (base - tall) - 0.8) - 0.8) * alpha, dim(wall, dice.pick((0.6, 1.25))))
    if tall > 24 and dice.chance(0.7):
        door = left + wide * dice.uniform(0.25, 0.75)
        p.paint(p.cover(box(p, door - 2.6, base - 8, door + 2.6, base)), dim(dice.colour(ROOFS, 0.2), 0.7))


def house(canvas: Canvas, dice: Dice, light: Light, x: float, base: float, size: float) -> None:
    """A gabled house of height `size` (roof included) standing at (x, base)."""
    p = canvas.local(x, base, size, dice.sign(), (-0.85, -1.1, 0.85, 0.06))
    if p is None:
        return
    wall, roof = dice.colour(WALLS, 0.14), dice.colour(ROOFS, 0.16)
    p.shade(p.cover(box(p, -0.8, -0.03, 0.8, 0.06)), 0.6)
    p.paint(p.cover(box(p, 0.3, -1.05, 0.44, -0.6)), dim(roof, 0.75), BUILDING)
    p.paint(p.cover(polygon(p, (-0.24, -1.0), (0.56, -1.0), (0.8, -0.5), (-0.7, -0.5))), dim(roof, 0.62), BUILDING)
    face = np.minimum(box(p, -0.7, -0.56, 0.7, 0.0), polygon(p, (-0.24, -0.95), (0.16, -0.5), (-0.64, -0.5)))
    t = 0.5 + p.x * 0.25 + (wave(p.y * 14.0) > 0.8) * -0.18
    p.paint(p.cover(face), tones(dim(wall, 0.78), dim(wall, 1.2), t), BUILDING)
    slab = polygon(p, (-0.24, -1.0), (0.56, -1.0), (0.8, -0.5), (0.14, -0.5))
    tiles = 0.5 + 0.3 * wave(p.y * 12.0) - 0.2 * wave(p.x * 11.0 + np.floor(p.y * 12.0) * 0.5)
    p.paint(p.cover(slab), tones(dim(roof, 0.7), dim(roof, 1.25), tiles), BUILDING)
    rim = np.abs(np.abs(p.x + 0.24) * 1.12 - (p.y + 1.02)) - 0.05
    p.paint(p.cover(np.maximum(rim, np.maximum(p.y + 0.46, -1.0 - p.y))), dim(roof, 0.62), BUILDING)
    glass = mix(dice.colour(((46, 60, 82), (90, 120, 150), (240, 214, 130)), 0.1), light.bottom, 0.1)
    for cx, cy in ((-0.47, -0.3), (0.3, -0.3), (0.55, -0.3), (-0.24, -0.68)):
        p.paint(p.cover(box(p, cx - 0.09, cy - 0.11, cx + 0.09, cy + 0.11)), mix(wall, (1.0, 1.0, 1.0), 0.6))
        p.paint(p.cover(box(p, cx - 0.065, cy - 0.085, cx + 0.065, cy + 0.085)), glass)
    p.paint(p.cover(box(p, -0.23, -0.36, -0.03, 0.0)), dim(roof, 0.55))


def canyon(canvas: Canvas, dice: Dice, light: Light, vx: float, horizon: float, side: float, near: float, tall: float):
    """A row of facades along one side of a street that runs to the vanishing point (vx, horizon).

    `near`: distance from vx, in units, at which the wall reaches a depth of 1; `tall`: its height at that depth.
    """
    left, right = (0.0, vx - 3.0) if side < 0 else (vx + 3.0, canvas.width)
    p = canvas.patch(left, 0, right, canvas.height)
    if p is None:
        return
    off = np.maximum(np.abs(p.x - vx), 0.5)
    scale = off * (1.0 / near)
    along = 14.0 / scale  # distance along the street, constant blocks in it
    block = dice.uniform(7.0, 11.0)
    number = np.floor(along * (1.0 / block)).astype(np.intp)[0]
    number = np.minimum(number - number.min(), 7)
    blocks = int(number.max()) + 1
    height = np.array([dice.uniform(0.55, 1.1) for _ in range(blocks)], dtype=np.float32)[number]
    walls = np.array([dice.colour(WALLS, 0.14) for _ in range(blocks)], dtype=np.float32)[number].T[:, None]
    rise = (horizon - p.y) / scale  # height above the eye at unit depth
    foot = near * 0.36
    top = tall * height
    alpha = p.cover((rise - top) * scale) * p.cover((-foot - rise) * scale)
    t = 0.78 + 0.3 * side * -light.side + (wave(rise * 0.3) - 0.5) * 0.1
    colour = walls * t
    across, up = along * (1.0 / (block * dice.pick((0.25, 0.34)))), (rise + foot) * (1.0 / dice.uniform(9.0, 12.0))
    dx, dy = np.abs(across - np.floor(across) - 0.5), np.abs(up - np.floor(up) - 0.5)
    panes = np.clip((0.28 - dx) * 14.0, 0.0, 1.0) * np.clip((0.3 - dy) * 14.0, 0.0, 1.0) * (top - rise > 2.0)
    glass = mix(dice.colour(((46, 60, 82), (80, 110, 140), (40, 40, 46)), 0.1), light.bottom, 0.2)
    colour += (planes(glass) - colour) * panes
    colour += (planes(light.bottom) - colour) * (0.45 / (1.0 + scale * 5.0))
    p.paint(alpha, colour, BUILDING)


def shore(dice: Dice, x: np.ndarray, level: float, tilt: float, rough: float) -> np.ndarray:
    """A line [W] around `level`, falling by `tilt` units across the picture, with bays of about `rough` units."""
    span = float(x[-1])
    bays = (noise1(dice, x * (1.0 / 42.0)) - 0.5) * (2 * rough) + (noise1(dice, x * 0.1) - 0.5) * (rough * 0.5)
    return level + tilt * (x * (1.0 / span) - 0.5) + bays


def bend(canvas: Canvas, horizon: float, vx: float, foot: float, curve: float) -> tuple[np.ndarray, np.ndarray]:
    """Centre [H] of a road from (vx, horizon) to `foot` at the lower rim, and the share 0..1 of its full width."""
    share = np.clip((canvas.y - horizon) * (1.0 / max(1.0, canvas.height - horizon)), 0.0, 1.0)
    middle = vx + (foot - vx) * share + curve * share * (1.0 - share)
    return middle, share
