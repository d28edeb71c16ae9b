"""How the four thing classes of the drawn scenes look: car, boat, animal, person.

Each is drawn in a frame of its own: origin at its foot, length 1 = its size in units, y pointing down, often mirrored.
"""

import numpy as np

from datamodules.scenes.canvas import (
    Canvas,
    Colour,
    Dice,
    Patch,
    box,
    dim,
    ellipse,
    mix,
    planes,
    polygon,
    relief,
    tones,
)
from datamodules.scenes.stuff import Light

CAR, BOAT, ANIMAL, PERSON = range(8, 12)

PAINTS = (
    (200, 48, 44),
    (44, 84, 160),
    (226, 226, 222),
    (52, 56, 62),
    (232, 186, 52),
    (70, 130, 90),
    (150, 156, 164),
    (216, 120, 52),
    (120, 70, 120),
    (110, 170, 190),
)
SAILS = (
    (244, 240, 228),
    (232, 224, 200),
    (206, 70, 60),
    (70, 110, 170),
    (236, 190, 80),
    (190, 196, 200),
    (120, 84, 70),
)
COATS = ((238, 232, 220), (92, 66, 50), (52, 46, 46), (168, 120, 78), (150, 144, 138), (210, 180, 140))
SKINS = ((238, 200, 170), (214, 166, 130), (160, 110, 80), (104, 72, 56))
HAIRS = ((50, 38, 34), (96, 66, 44), (190, 150, 90), (150, 146, 142), (130, 60, 40))


def _lit(p: Patch, colour: Colour, light: Light, mirror: float, top: float) -> np.ndarray:
    """The colour, brighter towards the sun's side and the upper end (`top`, negative) of the thing."""
    t = 0.42 + p.x * (0.3 * light.side * mirror) + p.y * (0.34 / top)
    return tones(dim(colour, 0.62), dim(colour, 1.28), t)


def _shadow(p: Patch, half: float, depth: float) -> None:
    dx, dy = p.x * (1.0 / half), (p.y + depth * 0.3) * (1.0 / depth)
    p.shade(np.clip(1.4 - (dx * dx + dy * dy) * 1.4, 0.0, 1.0), 0.66)


def _wheel(p: Patch, cx: float, cy: float, r: float) -> None:
    p.paint(p.cover(ellipse(p, cx, cy, r, r)), (0.09, 0.09, 0.1), CAR)
    p.paint(p.cover(ellipse(p, cx, cy, r * 0.52, r * 0.52)), (0.62, 0.63, 0.66))


def car(canvas: Canvas, dice: Dice, light: Light, x: float, base: float, size: float) -> None:
    """A car of length `size` seen from the side: saloon, estate or van."""
    mirror = dice.sign()
    p = canvas.thing(x, base, size, mirror, (-0.56, -0.5, 0.56, 0.05))
    if p is None:
        return
    paint = dice.colour(PAINTS, 0.14)
    glass = mix((0.16, 0.2, 0.26), light.bottom, dice.uniform(0.1, 0.4))
    skin = _lit(p, paint, light, mirror, -0.45)
    kind = dice.pick(("saloon", "estate", "van"), (5, 3, 2))
    _shadow(p, 0.54, 0.05)
    if kind == "van":
        cabin = ((-0.48, -0.46), (0.26, -0.46), (0.42, -0.25), (-0.48, -0.25))
        panes = (((0.03, -0.42), (0.23, -0.42), (0.35, -0.26), (0.03, -0.26)),)
        p.paint(p.cover(box(p, -0.5, -0.3, 0.5, -0.07, 0.05)), skin, CAR)
    else:
        back, roof = (-0.46, -0.42) if kind == "estate" else (-0.36, -0.22)
        cabin = ((roof, -0.39), (0.12, -0.39), (0.3, -0.22), (back, -0.22))
        panes = (
            ((roof + 0.03, -0.36), (-0.1, -0.36), (-0.1, -0.23), (back + 0.06, -0.23)),
            ((-0.06, -0.36), (0.1, -0.36), (0.23, -0.23), (-0.06, -0.23)),
        )
        p.paint(p.cover(box(p, -0.5, -0.25, 0.5, -0.07, 0.07)), skin, CAR)
    p.paint(p.cover(polygon(p, *cabin)), skin, CAR)
    for pane in panes:
        p.paint(p.cover(polygon(p, *pane)), glass, CAR)
    p.paint(p.cover(box(p, -0.49, -0.125, 0.49, -0.09)), dim(paint, 0.55))
    p.paint(p.cover(box(p, 0.43, -0.2, 0.5, -0.15)), (1.0, 0.95, 0.7), CAR)
    p.paint(p.cover(box(p, -0.5, -0.2, -0.45, -0.15)), (0.75, 0.1, 0.08), CAR)
    p.paint(p.cover(box(p, -0.4, -0.1, 0.4, -0.025)), (0.1, 0.1, 0.11), CAR)
    _wheel(p, -0.3, -0.085, 0.1)
    _wheel(p, 0.3, -0.085, 0.1)


def car_front(canvas: Canvas, dice: Dice, light: Light, x: float, base: float, size: float) -> None:
    """A car of width `size` seen from the front or from behind."""
    p = canvas.thing(x, base, size, 1.0, (-0.56, -0.84, 0.56, 0.06))
    if p is None:
        return
    paint, rear = dice.colour(PAINTS, 0.14), dice.chance(0.5)
    glass = mix((0.16, 0.2, 0.26), light.bottom, dice.uniform(0.1, 0.4))
    skin = _lit(p, paint, light, 1.0, -0.8)
    _shadow(p, 0.58, 0.08)
    p.paint(p.cover(box(p, -0.4, -0.2, 0.4, -0.05)), (0.1, 0.1, 0.11), CAR)
    for cx in (-0.36, 0.36):
        p.paint(p.cover(box(p, cx - 0.09, -0.2, cx + 0.09, 0.0, 0.03)), (0.06, 0.06, 0.07), CAR)
    p.paint(p.cover(box(p, -0.5, -0.5, 0.5, -0.1, 0.09)), skin, CAR)
    p.paint(p.cover(polygon(p, (-0.33, -0.8), (0.33, -0.8), (0.44, -0.45), (-0.44, -0.45))), skin, CAR)
    p.paint(p.cover(polygon(p, (-0.28, -0.74), (0.28, -0.74), (0.37, -0.48), (-0.37, -0.48))), glass, CAR)
    p.paint(p.cover(box(p, -0.26, -0.34, 0.26, -0.26, 0.03)), (0.12, 0.12, 0.13))
    lamp = (0.78, 0.12, 0.1) if rear else (1.0, 0.96, 0.78)
    for cx in (-0.38, 0.38):
        p.paint(p.cover(box(p, cx - 0.08, -0.38, cx + 0.08, -0.28, 0.04)), lamp)
    p.paint(p.cover(box(p, -0.48, -0.2, 0.48, -0.13, 0.03)), dim(paint, 0.5))
    p.paint(p.cover(box(p, -0.12, -0.22, 0.12, -0.15)), (0.88, 0.88, 0.84))


def boat(canvas: Canvas, dice: Dice, light: Light, x: float, base: float, size: float) -> None:
    """A boat with a hull of length `size` afloat at (x, base): with sails, or with a cabin and a funnel."""
    mirror = dice.sign()
    p = canvas.thing(x, base, size, mirror, (-0.58, -1.2, 0.62, 0.14))
    if p is None:
        return
    hull = dice.colour(PAINTS, 0.14)
    dx = np.abs(p.x) * 2.0
    p.shade(np.clip(1.3 - dx, 0.0, 1.0) * np.clip(1.0 - np.abs(p.y - 0.03) * 12.0, 0.0, 1.0), 0.7)
    if dice.chance(0.62):
        cloth = dice.colour(SAILS, 0.08)
        tall = dice.uniform(0.85, 1.15)
        sail = tones(dim(cloth, 0.72), dim(cloth, 1.08), 0.6 + p.x * 0.9 * light.side * mirror - p.y * 0.2)
        sail *= 1.0 - 0.12 * (np.abs(p.y * 6.0 - np.floor(p.y * 6.0) - 0.5) < 0.07)
        p.paint(p.cover(polygon(p, (0.1, -tall), (0.1, -0.17), (-0.42, -0.17))), sail, BOAT)
        if dice.chance(0.8):
            jib = dice.colour(SAILS, 0.08) if dice.chance(0.4) else cloth
            front = tones(dim(jib, 0.66), dim(jib, 1.0), 0.6 - p.y * 0.3 + p.x * 0.2)
            p.paint(p.cover(polygon(p, (0.12, -tall * 0.9), (0.5, -0.19), (0.12, -0.17))), front, BOAT)
        p.paint(p.cover(box(p, 0.085, -tall - 0.02, 0.135, -0.1)), (0.36, 0.28, 0.22), BOAT)
    else:
        house = dice.colour(((240, 238, 230), (210, 180, 140), (150, 80, 60), (180, 190, 200)), 0.1)
        glass = mix((0.16, 0.22, 0.3), light.bottom, 0.25)
        p.paint(p.cover(box(p, -0.34, -0.4, 0.16, -0.12, 0.02)), _lit(p, house, light, mirror, -0.6), BOAT)
        p.paint(p.cover(box(p, -0.38, -0.44, 0.2, -0.38)), dim(house, 0.7), BOAT)
        for cx in (-0.24, -0.09, 0.06):
            p.paint(p.cover(box(p, cx - 0.055, -0.33, cx + 0.055, -0.22, 0.02)), glass)
        if dice.chance(0.6):
            p.paint(p.cover(box(p, -0.2, -0.62, -0.06, -0.4)), _lit(p, dice.colour(PAINTS), light, mirror, -0.6), BOAT)
            p.paint(p.cover(box(p, -0.2, -0.62, -0.06, -0.56)), (0.12, 0.12, 0.13))
    body = polygon(p, (-0.5, -0.19), (0.58, -0.22), (0.38, 0.03), (-0.42, 0.03))
    p.paint(p.cover(body), _lit(p, hull, light, mirror, -0.4), BOAT)
    stripe = mix(dice.colour(PAINTS, 0.1), (1.0, 1.0, 1.0), 0.5)
    p.paint(p.cover(np.maximum(body, np.abs(p.y + 0.145) - 0.028)), stripe)
    p.paint(p.cover(np.maximum(body, -p.y - 0.03)), dim(hull, 0.45))


def animal(canvas: Canvas, dice: Dice, light: Light, x: float, base: float, size: float) -> None:
    """A four-legged animal of length about `size`, standing or grazing: sheep, cow or horse."""
    mirror = dice.sign()
    p = canvas.thing(x, base, size, mirror, (-0.6, -0.95, 0.72, 0.06))
    if p is None:
        return
    kind = dice.pick(("sheep", "cow", "horse"), (4, 4, 3))
    coat = dice.colour(COATS, 0.12)
    belly, back, hang = {"sheep": (-0.18, -0.62, 0.0), "cow": (-0.24, -0.66, 0.06), "horse": (-0.36, -0.7, -0.05)}[kind]
    head = dim(coat, 0.45) if kind == "sheep" and dice.chance(0.6) else dim(coat, 0.9)
    grazing = dice.chance(0.4)
    _shadow(p, 0.5, 0.06)
    leg = 0.062 if kind == "sheep" else 0.056
    for cx, shade in ((-0.24, 0.55), (0.32, 0.55), (-0.36, 0.8), (0.22, 0.8)):
        limb = dim(head if kind == "sheep" else coat, shade)
        p.paint(p.cover(box(p, cx - leg, belly - 0.14, cx + leg, 0.0, 0.02)), limb, ANIMAL)
    skin = _lit(p, coat, light, mirror, -0.75)
    middle, half = (belly + back) / 2, (belly - back) / 2
    trunk = box(p, -0.46, back, 0.42, belly, half * (0.95 if kind == "sheep" else 0.62))
    if kind == "sheep":
        wool = relief(dice, p, 0.11, 1.0, light.side)
        trunk = trunk - 0.03 + wool * 0.03
        skin = skin * (1.0 + 0.3 * wool)
    elif kind == "cow":
        other = dice.colour(COATS, 0.12)
        for _ in range(4):
            cx, cy = dice.uniform(-0.42, 0.36), dice.uniform(back, belly)
            spot = p.cover(ellipse(p, cx, cy, dice.uniform(0.1, 0.2), dice.uniform(0.08, 0.16)))
            skin = skin + (planes(dim(other, 0.95)) - skin) * spot
    p.paint(p.cover(trunk), skin, ANIMAL)
    hx, hy = (0.56, -0.14) if grazing else (0.58, middle - (0.34 if kind == "horse" else 0.16))
    thick = 0.1 if kind == "sheep" else 0.115
    p.paint(p.cover(_limb(p, (0.3, middle - 0.04 + hang), (hx - 0.03, hy), 0.17, thick * 0.85)), skin, ANIMAL)
    p.paint(p.cover(ellipse(p, hx, hy, 0.15, thick)), head, ANIMAL)
    p.paint(p.cover(ellipse(p, hx - 0.1, hy - thick, 0.035, 0.075)), dim(head, 0.8), ANIMAL)
    p.paint(p.cover(ellipse(p, hx + 0.04, hy - 0.03, 0.022, 0.022)), (0.05, 0.05, 0.05))
    if kind == "cow":
        p.paint(p.cover(ellipse(p, hx + 0.1, hy + 0.02, 0.06, thick * 0.8)), (0.85, 0.66, 0.6), ANIMAL)
    if kind == "horse":
        p.paint(p.cover(box(p, -0.54, back + 0.06, -0.45, belly + 0.12, 0.04)), dim(coat, 0.5), ANIMAL)


def _limb(p: Patch, start: tuple[float, float], end: tuple[float, float], thick: float, thin: float) -> np.ndarray:
    """Distance to a rounded stroke from start to end whose half width runs from `thick` to `thin`."""
    ax, ay = end[0] - start[0], end[1] - start[1]
    dx, dy = p.x - start[0], p.y - start[1]
    along = np.clip((dx * ax + dy * ay) * (1.0 / (ax * ax + ay * ay)), 0.0, 1.0)
    dx, dy = dx - along * ax, dy - along * ay
    return np.sqrt(dx * dx + dy * dy) - (thick + (thin - thick) * along)


def person(canvas: Canvas, dice: Dice, light: Light, x: float, base: float, size: float) -> None:
    """A person of height `size` standing or walking, in a jacket and trousers or in a long coat."""
    mirror = dice.sign()
    p = canvas.thing(x, base, size, mirror, (-0.34, -1.04, 0.34, 0.04))
    if p is None:
        return
    skin, hair = dice.colour(SKINS, 0.1), dice.colour(HAIRS, 0.12)
    top, low = dice.colour(PAINTS, 0.14), dim(dice.colour(PAINTS, 0.14), 0.7)
    _shadow(p, 0.26, 0.035)
    stride = dice.uniform(0.02, 0.12)
    shade = _lit(p, top, light, mirror, -0.9)
    if dice.chance(0.3):
        stride = -0.03
        p.paint(p.cover(box(p, -0.11, -0.2, -0.01, 0.0)), dim(low, 0.8), PERSON)
        p.paint(p.cover(box(p, 0.01, -0.2, 0.11, 0.0)), low, PERSON)
        p.paint(p.cover(polygon(p, (-0.12, -0.6), (0.12, -0.6), (0.21, -0.16), (-0.21, -0.16))), shade, PERSON)
    else:
        back = ((-0.14, -0.44), (0.02, -0.44), (-0.04 - stride, 0.0), (-0.15 - stride, 0.0))
        front = ((-0.03, -0.44), (0.14, -0.44), (0.15 + stride, 0.0), (0.04 + stride, 0.0))
        p.paint(p.cover(polygon(p, *back)), dim(low, 0.75), PERSON)
        p.paint(p.cover(polygon(p, *front)), _lit(p, low, light, mirror, -0.9), PERSON)
    swing = dice.uniform(0.0, 0.06)
    for cx in (-0.1 - stride, 0.1 + stride):
        p.paint(p.cover(box(p, cx - 0.05, -0.045, cx + 0.08, 0.0, 0.02)), (0.14, 0.11, 0.1), PERSON)
    p.paint(p.cover(_limb(p, (-0.14, -0.7), (-0.2 - swing, -0.42), 0.06, 0.045)), dim(top, 0.7), PERSON)
    p.paint(p.cover(box(p, -0.17, -0.78, 0.17, -0.38, 0.06)), shade, PERSON)
    p.paint(p.cover(_limb(p, (0.14, -0.7), (0.19 + swing, -0.42), 0.06, 0.045)), dim(top, 0.84), PERSON)
    for cx in (-0.2 - swing, 0.19 + swing):
        p.paint(p.cover(ellipse(p, cx, -0.4, 0.04, 0.04)), skin, PERSON)
    p.paint(p.cover(ellipse(p, 0.0, -0.89, 0.125, 0.135)), hair, PERSON)
    p.paint(p.cover(ellipse(p, 0.025, -0.87, 0.1, 0.11)), skin, PERSON)
    p.paint(p.cover(ellipse(p, 0.07, -0.88, 0.015, 0.018)), (0.08, 0.06, 0.06))
    if dice.chance(0.3):
        cap = np.maximum(ellipse(p, 0.0, -0.9, 0.135, 0.14), p.y + 0.91)
        p.paint(p.cover(cap), dice.colour(PAINTS, 0.12), PERSON)
