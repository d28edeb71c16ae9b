"""Whole scenes with exact labels: layouts, placing in depth, and lighting. `draw_scene` is a pure function of its key.

Eight layouts put the twelve classes where they belong: boats float, cars keep to roads, animals and people stand on
the ground, and the farther a thing is, the smaller and higher it stands. Light falls over everything at the end, so
that colour alone tells little: gain, cast, gradient, cloud shadows, saturation and grain change with each picture.
"""

from dataclasses import dataclass

import numpy as np

from common.chance import numpy_generator
from common.spec import ClassMeta
from datamodules.scenes import stuff, things
from datamodules.scenes.canvas import Canvas, Colour, Dice, noise

META = ClassMeta(
    names=(
        "sky",
        "water",
        "grass",
        "sand",
        "road",
        "tree",
        "building",
        "mountain",
        "car",
        "boat",
        "animal",
        "person",
    ),
    palette=(
        (150, 200, 240),
        (38, 104, 184),
        (128, 186, 72),
        (236, 212, 150),
        (104, 100, 112),
        (26, 100, 60),
        (178, 112, 86),
        (150, 132, 166),
        (222, 44, 52),
        (250, 150, 40),
        (250, 244, 226),
        (206, 64, 178),
    ),
    things=(8, 9, 10, 11),
)


@dataclass
class Scene:
    """A picture in the making and what its parts share."""

    canvas: Canvas
    dice: Dice
    light: stuff.Light
    horizon: float
    grass: Colour
    sand: Colour
    leaf: Colour

    @property
    def width(self) -> float:
        return self.canvas.width

    @property
    def depth(self) -> float:
        """Height of the ground on the picture, in units."""
        return self.canvas.height - self.horizon

    def level(self, value: float) -> np.ndarray:
        """A level line [W]."""
        return np.full_like(self.canvas.x, value)

    def foot(self, share: float) -> float:
        """The height on the picture of a point on the ground; share 0 at the horizon, 1 at the lower rim."""
        return self.horizon + self.depth * share

    def many(self, low: int, high: int) -> int:
        """A number of things, more on a wide picture."""
        return int(self.dice.count(low, high) * self.width / 128.0 + 0.5)

    def leaves(self) -> Colour:
        """The leaf colour of this scene, or of now and then a tree that differs."""
        return self.leaf if self.dice.chance(0.7) else self.dice.colour(stuff.LEAVES, 0.14)


def _backdrop(s: Scene, mountains: float, woods: float) -> None:
    """What stands on the horizon: ridges one behind the other, then a belt of trees, with these probabilities."""
    if s.dice.chance(mountains):
        if s.dice.chance(0.4):
            stuff.mountain(s.canvas, s.dice, s.light, s.horizon + 1, s.horizon * s.dice.uniform(0.6, 0.95), 0.42)
        stuff.mountain(s.canvas, s.dice, s.light, s.horizon + 1, s.horizon * s.dice.uniform(0.7, 1.05), 0.2)
    if s.dice.chance(woods):
        tall = s.dice.uniform(22, 40)
        start, end = 0.0, s.width
        if s.dice.chance(0.4):
            start, end = sorted((s.dice.uniform(-20, s.width), s.width * s.dice.count(0, 1)))
        stuff.wood(s.canvas, s.dice, s.light, s.horizon + 2, tall, s.leaf, start, end)


def _creatures(s: Scene, animals: int, people: int, far: float = 0.2, near: float = 0.95) -> None:
    """Animals and people on the ground between two depths, the far ones first."""
    kinds = ["animal"] * animals + ["person"] * people
    for share, kind in sorted((s.dice.uniform(far, near), kind) for kind in kinds):
        x = s.dice.uniform(0.05, 0.95) * s.width
        if kind == "animal":
            size = (40 + 42 * share) * s.dice.uniform(0.9, 1.2)
            things.animal(s.canvas, s.dice, s.light, x, s.foot(share), size)
        else:
            size = (48 + 52 * share) * s.dice.uniform(0.9, 1.15)
            things.person(s.canvas, s.dice, s.light, x, s.foot(share), size)


def _edge_tree(s: Scene, low: float = 0.25, high: float = 0.9) -> None:
    """A large tree near the left or right rim."""
    share = s.dice.uniform(low, high)
    x = s.dice.uniform(0.02, 0.25) * s.width
    size = s.dice.uniform(62, 100) * (0.6 + 0.5 * share)
    stuff.tree(s.canvas, s.dice, s.light, x if s.dice.chance(0.5) else s.width - x, s.foot(share), size, s.leaves())


def _boats(s: Scene, number: int, near: float, far: float) -> None:
    for share in sorted(s.dice.uniform(near, far) for _ in range(number)):
        size = (46 + 56 * share) * s.dice.uniform(0.9, 1.15)
        things.boat(s.canvas, s.dice, s.light, s.dice.uniform(0.08, 0.92) * s.width, s.foot(share), size)


def coast(s: Scene) -> None:
    """The sea, a headland, a beach with people, boats."""
    x = s.canvas.x
    if s.dice.chance(0.55):
        reach = s.dice.uniform(0.35, 0.8) * s.width
        rise = np.clip((1.0 - x / reach) * 1.8, 0.0, 1.0)
        rise = rise if s.dice.chance(0.5) else rise[::-1]
        stuff.mountain(s.canvas, s.dice, s.light, s.horizon + 1, s.horizon * s.dice.uniform(0.5, 0.95), 0.25, rise)
    line = stuff.shore(s.dice, x, s.foot(s.dice.uniform(0.35, 0.8)), s.dice.uniform(-40, 40), 6.0)
    stuff.water(s.canvas, s.dice, s.light, s.horizon, s.level(s.horizon), s.level(s.canvas.height + 1))
    _boats(s, s.many(0, s.dice.count(0, 2)), 0.04, 0.3)
    if s.dice.chance(0.86):
        stuff.foam(s.canvas, s.dice, line, s.dice.uniform(2, 4))
        stuff.sand(s.canvas, s.dice, s.light, s.horizon, line, s.sand)
        if s.dice.chance(0.3):
            _edge_tree(s, 0.84, 1.0)
        _creatures(s, 0, s.many(0, 1) if s.dice.chance(0.2) else 0, 0.86, 1.02)
    else:
        _boats(s, 1, 0.5, 0.8)


def lake(s: Scene) -> None:
    """Mountains and woods around a lake, a near shore of grass or sand."""
    _backdrop(s, 0.9, 0.7)
    far = s.foot(s.dice.uniform(0.14, 0.24)) if s.dice.chance(0.4) else s.horizon
    stuff.grass(s.canvas, s.dice, s.light, s.horizon, s.level(s.horizon + 1), s.grass)
    line = stuff.shore(s.dice, s.canvas.x, s.foot(s.dice.uniform(0.5, 0.85)), s.dice.uniform(-26, 26), 5.0)
    stuff.water(s.canvas, s.dice, s.light, s.horizon, s.level(far), s.level(s.canvas.height + 1))
    _boats(s, s.many(0, 1), 0.12, 0.4)
    if s.dice.chance(0.75):
        stuff.grass(s.canvas, s.dice, s.light, s.horizon, line, s.grass)
    else:
        stuff.sand(s.canvas, s.dice, s.light, s.horizon, line, s.sand)
    if s.dice.chance(0.6):
        _edge_tree(s, 0.84, 1.0)
    _creatures(s, s.dice.chance(0.2), s.dice.chance(0.04), 0.88, 1.02)


def meadow(s: Scene) -> None:
    """Pasture with animals, trees, a house, now and then a sandy track."""
    _backdrop(s, 0.5, 0.7)
    hill = np.minimum(stuff.shore(s.dice, s.canvas.x, s.horizon - 3, s.dice.uniform(-10, 10), 6.0), s.horizon + 1)
    stuff.grass(s.canvas, s.dice, s.light, s.horizon, hill, s.grass)
    if s.dice.chance(0.4):
        x, size = s.dice.uniform(0.15, 0.85) * s.width, s.dice.uniform(44, 66)
        stuff.house(s.canvas, s.dice, s.light, x, s.foot(s.dice.uniform(0.08, 0.3)), size)
    if s.dice.chance(0.25):
        second = stuff.shore(s.dice, s.canvas.x, s.foot(s.dice.uniform(0.25, 0.6)), s.dice.uniform(-24, 24), 6.0)
        if s.dice.chance(0.5):
            stuff.sand(s.canvas, s.dice, s.light, s.horizon, second, s.sand)
        else:
            stuff.grass(s.canvas, s.dice, s.light, s.horizon, second, s.dice.colour(stuff.GRASSES, 0.12))
    for share in sorted(s.dice.uniform(0.05, 0.4) for _ in range(s.many(0, 2))):
        size = s.dice.uniform(48, 72) * (0.7 + share)
        stuff.tree(s.canvas, s.dice, s.light, s.dice.uniform(0, 1) * s.width, s.foot(share), size, s.leaves())
    _creatures(s, s.many(0, s.dice.count(0, 2)), s.dice.chance(0.04))
    if s.dice.chance(0.25):
        _edge_tree(s)


def _houses_in_a_row(s: Scene, base: float, low: float, high: float) -> None:
    at = -s.dice.uniform(0, 14)
    while at < s.width:
        wide = s.dice.uniform(26, 52)
        if s.dice.chance(0.9):
            stuff.building(s.canvas, s.dice, s.light, at, at + wide, base, s.dice.uniform(low, high), 0.06)
        at += wide + (s.dice.uniform(2, 10) if s.dice.chance(0.3) else 0.0)


def street(s: Scene) -> None:
    """A street that crosses the picture before a row of buildings, with traffic and people on a verge."""
    _backdrop(s, 0.25, 0.3)
    ground = s.dice.chance(0.6)
    plain = stuff.grass if ground else stuff.sand
    plain(s.canvas, s.dice, s.light, s.horizon, s.level(s.horizon), s.grass if ground else s.sand)
    _houses_in_a_row(s, s.foot(0.12), 0.5 * s.horizon, 1.05 * s.horizon)
    for _ in range(s.many(0, 2)):
        size = s.dice.uniform(48, 72)
        stuff.tree(s.canvas, s.dice, s.light, s.dice.uniform(0, 1) * s.width, s.foot(0.15), size, s.leaves())
    top = s.foot(s.dice.uniform(0.32, 0.4) if s.dice.chance(0.4) else 0.12)
    bottom = s.foot(s.dice.uniform(0.66, 0.8) if s.dice.chance(0.7) else 1.05)
    stuff.street(s.canvas, s.dice, top, bottom, s.dice.colour(stuff.ROADS, 0.12))
    for lane in sorted(s.dice.pick((0.3, 0.82)) for _ in range(s.many(1, 2))):
        size = s.dice.uniform(64, 84) * (0.85 + 0.35 * lane)
        things.car(s.canvas, s.dice, s.light, s.dice.uniform(0.05, 0.95) * s.width, top + (bottom - top) * lane, size)
    _creatures(s, 0, s.many(0, 1) if s.dice.chance(0.25) else 0, 0.8, 1.0)


def avenue(s: Scene) -> None:
    """A street that runs to the horizon between facades or rows of trees, cars coming and going."""
    vx = s.dice.uniform(0.35, 0.65) * s.width
    ground = s.dice.chance(0.5)
    plain = stuff.grass if ground else stuff.sand
    plain(s.canvas, s.dice, s.light, s.horizon, s.level(s.horizon), s.grass if ground else s.sand)
    foot = s.dice.uniform(0.35, 0.65) * s.width
    half = s.dice.uniform(46, 64)
    for side in (-1.0, 1.0):
        if s.dice.chance(0.75):
            stuff.canyon(s.canvas, s.dice, s.light, vx, s.horizon, side, s.dice.uniform(62, 86), s.dice.uniform(42, 72))
        else:
            for share in (0.08, 0.2, 0.42, 0.8):
                x = vx + side * (10 + 80 * share) * s.dice.uniform(1.0, 1.2)
                stuff.tree(s.canvas, s.dice, s.light, x, s.foot(share), 28 + 76 * share, s.leaves())
    middle, share = stuff.bend(s.canvas, s.horizon, vx, foot, 0.0)
    stuff.road(s.canvas, s.dice, s.horizon, s.horizon, middle, share * half + 0.6, s.dice.colour(stuff.ROADS, 0.12))
    _traffic(s, s.many(0, 2), vx, foot, 0.0, half)
    _creatures(s, 0, s.many(0, 1) if s.dice.chance(0.22) else 0, 0.5, 0.95)


def _traffic(s: Scene, number: int, vx: float, foot: float, curve: float, half: float) -> None:
    """Cars on a road that runs away, in the middle of their lane at their depth."""
    for share in sorted(s.dice.uniform(0.42, 0.85) for _ in range(number)):
        x = vx + (foot - vx) * share + curve * share * (1.0 - share) + s.dice.sign() * half * share * 0.46
        things.car_front(s.canvas, s.dice, s.light, x, s.foot(share), 6.0 + half * share * 0.88)


def country(s: Scene) -> None:
    """A bending road through open land, with trees, a farm, a car."""
    _backdrop(s, 0.6, 0.5)
    ground = s.dice.chance(0.75)
    plain = stuff.grass if ground else stuff.sand
    plain(s.canvas, s.dice, s.light, s.horizon, s.level(s.horizon), s.grass if ground else s.sand)
    vx, foot, curve = s.dice.uniform(0.2, 0.8) * s.width, s.dice.uniform(0.2, 0.8) * s.width, s.dice.uniform(-70, 70)
    half = s.dice.uniform(38, 58)
    middle, share = stuff.bend(s.canvas, s.horizon, vx, foot, curve)
    stuff.road(s.canvas, s.dice, s.horizon, s.horizon, middle, share * half + 0.6, s.dice.colour(stuff.ROADS, 0.12))
    if s.dice.chance(0.35):
        side = s.dice.sign()
        x = vx + side * s.dice.uniform(34, 60)
        stuff.house(s.canvas, s.dice, s.light, x, s.foot(0.14), s.dice.uniform(40, 58))
    for share in sorted(s.dice.uniform(0.05, 0.5) for _ in range(s.many(0, 2))):
        centre = vx + (foot - vx) * share + curve * share * (1.0 - share)
        x = centre + s.dice.sign() * (half * share + 12 + s.dice.uniform(0, 30))
        stuff.tree(s.canvas, s.dice, s.light, x, s.foot(share), s.dice.uniform(44, 66) * (0.7 + share), s.leaves())
    _traffic(s, s.dice.chance(0.75), vx, foot, curve, half)
    if s.dice.chance(0.25):
        _creatures(s, 1, 0, 0.3, 0.9)


def desert(s: Scene) -> None:
    """Dunes and rocks, now and then a road."""
    _backdrop(s, 0.85, 0.0)
    stuff.sand(s.canvas, s.dice, s.light, s.horizon, s.level(s.horizon), s.sand)
    if s.dice.chance(0.35):
        vx, foot, half = s.dice.uniform(0.2, 0.8) * s.width, s.dice.uniform(0.3, 0.7) * s.width, s.dice.uniform(38, 54)
        middle, share = stuff.bend(s.canvas, s.horizon, vx, foot, 0.0)
        stuff.road(s.canvas, s.dice, s.horizon, s.horizon, middle, share * half + 0.6, s.dice.colour(stuff.ROADS, 0.12))
        _traffic(s, 1, vx, foot, 0.0, half)
    _creatures(s, s.many(0, 1), s.dice.chance(0.12))


def harbour(s: Scene) -> None:
    """A town at the water with boats before it."""
    _backdrop(s, 0.4, 0.15)
    quay = s.foot(s.dice.uniform(0.04, 0.14))
    stuff.sand(s.canvas, s.dice, s.light, s.horizon, s.level(s.horizon), s.sand)
    _houses_in_a_row(s, quay, 0.45 * s.horizon, 0.95 * s.horizon)
    stuff.water(s.canvas, s.dice, s.light, s.horizon, s.level(quay), s.level(s.canvas.height + 1))
    _boats(s, s.many(0, 2), 0.2, 0.75)


GRAIN = 8.0
"""Width of the uniform noise of each pixel, of 255."""

LAYOUTS = ((coast, 19), (lake, 18), (meadow, 17), (street, 14), (avenue, 11), (country, 12), (desert, 5), (harbour, 9))


def _illuminate(canvas: Canvas, dice: Dice, horizon: float) -> None:
    """Gain, cast, gradient, cloud shadows on the ground, and saturation of the whole picture, in place."""
    rgb = canvas.rgb
    gain = dice.uniform(0.72, 1.16)
    cast = np.array([gain * dice.uniform(0.88, 1.12) for _ in range(3)], dtype=np.float32).reshape(3, 1, 1)
    across, along = dice.uniform(-0.22, 0.22) / canvas.width, dice.uniform(-0.16, 0.16) / canvas.height
    field = (canvas.x - canvas.width / 2) * across + ((canvas.y - canvas.height / 2) * along)[:, None] + 1.0
    if dice.chance(0.5):
        depth = np.sqrt(np.maximum(canvas.y - horizon, 0.0) + 1.0) * 0.42
        clouds = noise(dice, depth, canvas.x * (1.0 / dice.uniform(30, 50)))
        darker = np.clip((clouds - 0.5) * 5.0, 0.0, 1.0) * dice.uniform(0.25, 0.5)
        ground = np.clip((canvas.y - horizon) * (3.0 / (canvas.height - horizon)), 0.0, 1.0)
        field *= 1.0 - darker * ground[:, None]
    saturation = dice.uniform(0.35, 1.15)
    grey = (rgb[0] * 0.3 + rgb[1] * 0.59 + rgb[2] * 0.11) * (1.0 - saturation)
    rgb *= saturation
    rgb += grey
    rgb *= cast * field


def draw_scene(seed: int, split: str, index: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene: (image uint8 [H,W,3], label uint8 [H,W]), a function of its arguments alone.

    seed: of the data set. split: any name; draws of different splits never meet. index: position in the split.
    height, width: pixels; the scene is composed for the shape and scales with the shorter side.
    """
    image, canvas = _drawn(seed, split, index, height, width)
    return image, canvas.label


def draw_things(seed: int, split: str, index: int, height: int, width: int) -> np.ndarray:
    """The things of a scene one by one: int32 [H,W], a number for the visible part of every car, boat, animal and
    person, 0 for everything else. Arguments as of `draw_scene`."""
    return _drawn(seed, split, index, height, width)[1].instances


def _drawn(seed: int, split: str, index: int, height: int, width: int) -> tuple[np.ndarray, Canvas]:
    dice = Dice(numpy_generator(seed, f"scenes/{split}", index))
    canvas = Canvas(height, width)
    layout = dice.pick([item[0] for item in LAYOUTS], [item[1] for item in LAYOUTS])
    horizon = dice.uniform(0.42, 0.6) * canvas.height
    scene = Scene(
        canvas=canvas,
        dice=dice,
        light=stuff.Light(dice),
        horizon=horizon,
        grass=dice.colour(stuff.GRASSES, 0.12),
        sand=dice.colour(stuff.SANDS, 0.12),
        leaf=dice.colour(stuff.LEAVES, 0.14),
    )
    stuff.sky(canvas, dice, scene.light, horizon)
    layout(scene)
    _illuminate(canvas, dice, horizon)
    grain = numpy_generator(seed, f"scenes/{split}/grain", index).random((height, width), dtype=np.float32)
    grain = grain * GRAIN + (0.5 - GRAIN / 2)
    image = np.empty((height, width, 3), dtype=np.uint8)
    for channel, plane in enumerate(canvas.rgb):
        plane *= 255.0
        plane += grain
        image[..., channel] = np.clip(plane, 0.0, 255.0, out=plane)
    return image, canvas
