"""Furniture of the seventeen classes, and the background things between it, out of primitives.

Every builder draws one piece into a ``Kit`` standing at the origin, front towards -y, z up, in
metres, and returns its footprint (width, depth). Class ids are Taskonomy's.
"""

from dataclasses import replace

from .shapes import (
    BOX,
    IDENTITY,
    QUADRIC,
    ROUND,
    Prim,
    compose,
    cone,
    cylinder,
    ellipsoid,
    sincos,
    turn,
    waist,
)

CLASSES = (
    "unlabelled", "background", "bottle", "chair", "couch", "potted plant", "bed", "dining table",
    "toilet", "tv", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
)  # fmt: skip
(
    NONE, BACKGROUND, BOTTLE, CHAIR, COUCH, PLANT, BED, TABLE, TOILET, TV, MICROWAVE, OVEN, TOASTER,
    SINK, FRIDGE, BOOK, CLOCK, VASE,
) = range(18)  # fmt: skip
PLAIN, TILES, STRIPES, PLANKS, BRICKS, NOISE = range(6)
QUARTER = 1.570796327  # radians, a quarter turn


def hsv(h, s, v):
    """Colour (r, g, b) in 0..1 from hue in turns, saturation and value."""
    h = (h % 1.0) * 6
    f = h - int(h)
    p, q, t = v * (1 - s), v * (1 - s * f), v * (1 - s * (1 - f))
    return ((v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q))[int(h) % 6]


def move(prims, x=0.0, y=0.0, z=0.0, yaw=0.0):
    """The same primitives turned by ``yaw`` radians about the vertical, then shifted."""
    s, c = sincos(yaw)
    back = turn(2, yaw)
    out = []
    for p in prims:
        px, py, pz = p.center
        center = (x + c * px - s * py, y + s * px + c * py, z + pz)
        rotation = p.rotation if yaw == 0 else compose(p.rotation, back)
        out.append(replace(p, center=center, rotation=rotation))
    return out


class Kit:
    """Primitives being collected, with the style and the random stream they are drawn from."""

    def __init__(self, rng, style, materials):
        self.rng, self.style, self.materials, self.prims = rng, style, materials, []

    def u(self, lo, hi):
        return lo + (hi - lo) * self.rng.random()

    def chance(self, p):
        return self.rng.random() < p

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def mat(self, color, color2=None, pattern=PLAIN, scale=0.3, glow=0.0):
        """Index of a material: two colours, pattern, its period in metres, own light."""
        return self.materials.setdefault(
            (pattern, tuple(color), tuple(color2 or color), scale, glow), len(self.materials)
        )

    def tint(self, color, by=0.12):
        """A material near ``color``, lighter or darker by up to ``by``."""
        f = 1 + self.u(-by, by)
        return self.mat([min(1.0, c * f) for c in color])

    def sub(self, build, x=0.0, y=0.0, z=0.0, yaw=0.0, **options):
        outer, self.prims = self.prims, []
        result = build(self, **options)
        outer.extend(move(self.prims, x, y, z, yaw))
        self.prims = outer
        return result

    def box(self, x, y, z, w, d, h, mat, label=1, rotation=IDENTITY):
        half = (w / 2, d / 2, h / 2)
        lo = tuple(-v for v in half)
        self.prims.append(Prim(BOX, (x, y, z + h / 2), lo, half, label, mat, rotation))

    def soft(self, x, y, z, w, d, h, r, mat, label=1, rotation=IDENTITY):
        half = (w / 2, d / 2, h / 2)
        r = min(r, min(half))
        lo = tuple(-v for v in half)
        self.prims.append(Prim(ROUND, (x, y, z + h / 2), lo, half, label, mat, rotation, radius=r))

    def quad(self, x, y, z, quad, lo, hi, mat, label=1, cap=-1, rotation=IDENTITY):
        self.prims.append(
            Prim(QUADRIC, (x, y, z), lo, hi, label, mat, rotation, quad=quad, cap=cap)
        )

    def cyl(self, x, y, z, r, h, mat, label=1, ry=None, cap=2, rotation=IDENTITY):
        a, b = r * 1.0001, (ry or r) * 1.0001
        self.quad(
            x, y, z, cylinder(r, ry), (-a, -b, 0.0), (a, b, h), mat, label, cap, rotation
        )

    def taper(self, x, y, z, r0, r1, h, mat, label=1, cap=2, rotation=IDENTITY):
        a = max(r0, r1) * 1.0001
        lo, hi = (-a, -a, 0.0), (a, a, h)
        self.quad(x, y, z, cone(r0, 0.0, r1, h), lo, hi, mat, label, cap, rotation)

    def egg(self, x, y, z, a, b, c, mat, label=1, lo=-1.0, hi=1.0, cap=-1, rotation=IDENTITY):
        """Ellipsoid about (x, y, z); ``lo`` and ``hi`` clip it at these parts of its height."""
        f = 1.0001
        box = (-a * f, -b * f, lo * c * f), (a * f, b * f, hi * c * f)
        self.quad(x, y, z, ellipsoid(a, b, c), *box, mat, label, cap, rotation)

    def neck(self, x, y, z, w, r, lo, hi, mat, label=1, cap=-1):
        """Hyperboloid about (x, y, z): radius w at z, r at z + hi; from z - lo to z + hi."""
        a = r * max(1.0, lo / hi) * 1.0001
        self.quad(
            x, y, z, waist(w, r, hi), (-a, -a, -lo), (a, a, hi), mat, label, cap, IDENTITY
        )


def bottle(k, size=1.0):
    r, h = k.u(0.06, 0.085) * size, k.u(0.28, 0.38) * size
    m = k.mat(hsv(k.pick((0.33, 0.1, 0.0, 0.55)), 0.75, k.u(0.3, 0.6)))
    k.cyl(0, 0, 0, r, h * 0.55, m, BOTTLE)
    k.cyl(0, 0, h * 0.15, r * 1.03, h * 0.25, k.mat((0.92, 0.88, 0.75)), BOTTLE, cap=-1)
    k.egg(0, 0, h * 0.55, r, r, h * 0.22, m, BOTTLE, lo=0.0)
    k.cyl(0, 0, h * 0.6, r * 0.36, h * 0.4, m, BOTTLE)
    return 2 * r, 2 * r


def bottles(k):
    for i in range(int(k.u(2, 4.99))):
        k.sub(bottle, 0.17 * i - 0.25, k.u(-0.06, 0.06), size=k.u(1.1, 1.7))
    return 0.7, 0.25


def vase(k, size=1.0):
    r, h = k.u(0.13, 0.19) * size, k.u(0.38, 0.54) * size
    m = k.mat(hsv(k.style["accent"] + k.pick((0.0, 0.5)), k.u(0.3, 0.8), k.u(0.5, 0.9)))
    k.egg(0, 0, h * 0.36, r, r, h * 0.4, m, VASE, lo=-0.9)
    k.neck(0, 0, h * 0.8, r * 0.42, r * 0.72, h * 0.14, h * 0.2, m, VASE)
    k.cyl(0, 0, 0, r * 0.5, h * 0.06, m, VASE)
    return 2 * r, 2 * r


def plant(k, size=1.0):
    r, h = k.u(0.16, 0.22) * size, k.u(0.26, 0.36) * size
    k.taper(0, 0, 0, r * 0.72, r, h, k.mat(k.pick(((0.65, 0.33, 0.2), (0.85, 0.82, 0.78)))), PLANT)
    leaf = hsv(k.u(0.25, 0.38), k.u(0.55, 0.85), k.u(0.35, 0.65))
    dark = [c * 0.6 for c in leaf]
    if k.chance(0.5):
        stem = k.u(0.25, 0.5) * size
        k.cyl(0, 0, h, 0.025, stem, k.mat((0.4, 0.28, 0.15)), PLANT)
        for i in range(4):
            a = k.u(0.2, 0.3) * size
            s, c = sincos(1.57 * i + k.u(0, 1))
            m = k.mat(leaf, dark, NOISE, 0.07)
            up = h + stem + a * (0.4 + 0.3 * (i % 2))
            k.egg(c * a * 0.6, s * a * 0.6, up, a, a, a * 0.8, m, PLANT)
    else:
        for i in range(8):
            tilt = turn(1, k.u(0.2, 0.75))
            length, yaw = k.u(0.3, 0.5) * size, 0.785 * i + k.u(-0.2, 0.2)
            m = k.mat(leaf if i % 2 else dark, dark, STRIPES, 0.05)
            rotation = compose(tilt, turn(2, yaw))
            s, c = sincos(yaw)
            out = length * 0.45
            k.egg(c * out, s * out, h + length * 0.75, 0.025, 0.09 * size, length, m, PLANT,
                  rotation=rotation)  # fmt: skip
    return 0.7 * size, 0.7 * size


def _wood(k, scale=0.12):
    w = k.style["wood"]
    return k.mat(w, [c * 0.72 for c in w], PLANKS, scale)


def _fabric(k, hue=None):
    h = k.style["fabric"] if hue is None else hue
    a = hsv(h, k.style["saturation"], k.u(0.45, 0.8))
    b = [min(1.0, c * 1.35 + 0.05) for c in a]
    return k.mat(a, b, k.style["cloth"], k.style["cloth_scale"])


def chair(k):
    f = k.style["scale"]
    w, seat, back = 0.48 * f, 0.46, k.u(0.9, 1.1)
    wood = k.tint(k.style["wood"])
    soft = _fabric(k) if k.chance(0.6) else wood
    for sx in (-1, 1):
        for sy in (-1, 1):
            k.taper(sx * w * 0.42, sy * w * 0.42, 0, 0.02, 0.03, seat, wood, CHAIR)
    k.cyl(0, 0, seat - 0.04, w * 0.56, 0.04, wood, CHAIR)
    k.egg(0, 0, seat, w * 0.56, w * 0.56, 0.09, soft, CHAIR, lo=-0.2)
    lean = turn(0, -0.12)
    low = 0.12 if k.style["round"] > 0.5 else 0.22
    k.cyl(0, w * 0.5, seat + low, w * 0.5, back - seat - low, soft, CHAIR, ry=0.08, rotation=lean)
    for sx in (-1, 1):
        k.cyl(sx * w * 0.36, w * 0.48, seat - 0.05, 0.024, 0.35, wood, CHAIR, rotation=lean)
    return w + 0.05, w + 0.12


def armchair(k):
    return couch(k, width=k.u(0.85, 1.0), label=CHAIR)


def couch(k, width=None, label=COUCH):
    w = width or k.u(1.7, 2.3) * k.style["scale"]
    d, seat = 0.92, 0.42
    m = _fabric(k)
    k.soft(0, 0, 0.08, w - 0.1, d, 0.22, 0.06, m, label)
    k.soft(0, d / 2 - 0.13, 0.15, w - 0.1, 0.26, 0.7, 0.13, m, label, turn(0, -0.1))
    for side in (-1, 1):
        k.soft(side * (w / 2 - 0.12), 0, 0.05, 0.24, d, 0.58, 0.12, m, label)
    n = 1 if w < 1.2 else 2 if w < 2.0 else 3
    step = (w - 0.44) / n
    for i in range(n):
        x = -w / 2 + 0.22 + step * (i + 0.5)
        k.soft(x, -0.1, 0.25, step - 0.01, d - 0.24, 0.12, 0.06, m, label)
        k.egg(x, -0.1, 0.35, step * 0.54, (d - 0.2) * 0.54, seat - 0.27, m, label, lo=0.0)
        k.egg(x, 0.2, seat + 0.2, step * 0.52, 0.16, 0.27, m, label, rotation=turn(0, -0.2))
    accent = _fabric(k, k.style["accent"])
    for side in (-1, 1) if label == COUCH else (0,):
        if k.chance(0.8):
            k.egg(side * (w / 2 - 0.42), 0.02, seat + 0.22, 0.24, 0.1, 0.2, accent, label,
                  rotation=turn(0, -0.35))  # fmt: skip
    return w, d + 0.1


def bed(k):
    w, d = k.u(1.3, 1.8), 2.05
    m = _fabric(k)
    white = k.mat((0.93, 0.92, 0.9))
    k.box(0, 0, 0.08, w, d, 0.2, _wood(k), BED)
    k.soft(0, -0.02, 0.25, w - 0.04, d - 0.08, 0.3, 0.1, white, BED)
    box = (-w * 0.53, -d * 0.36, 0.0), (w * 0.53, d * 0.36, 0.4)
    crown = (1 / (0.28 * w * w), 0.0, 1 / 0.16, 0.0, -1.0)  # a blanket arched over the bed
    k.quad(0, -0.29, 0.26, crown, *box, m, BED, cap=1)
    if k.style["round"] > 0.5:
        k.soft(0, d / 2 + 0.02, 0.1, w + 0.06, 0.16, 1.0, 0.08, m, BED)
    else:
        k.box(0, d / 2 + 0.02, 0.0, w + 0.06, 0.07, 1.05, _wood(k), BED)
    for side in (-1, 1):
        pillow = (w * 0.23, 0.24, 0.12)
        k.egg(side * w * 0.24, d / 2 - 0.28, 0.58, *pillow, white, BED, rotation=turn(0, -0.25))
    return w + 0.1, d + 0.2


def table(k, w=None, d=0.9, h=0.75, dressed=True):
    wood = _wood(k)
    w = w or k.u(1.2, 1.8)
    if k.style["round"] > 0.55 and dressed:
        w = d = k.u(1.05, 1.35)
        k.cyl(0, 0, h - 0.06, w / 2, 0.06, wood, TABLE)
        k.neck(0, 0, 0.35, 0.07, 0.24, 0.35, h - 0.41, wood, TABLE)
    else:
        k.box(0, 0, h - 0.07, w, d, 0.07, wood, TABLE)
        for sx in (-1, 1):
            for sy in (-1, 1):
                x, y = sx * (w / 2 - 0.08), sy * (d / 2 - 0.08)
                k.taper(x, y, 0, 0.035, 0.055, h - 0.07, wood, TABLE)
    for x in (-0.3 * w, 0.0, 0.3 * w) if dressed else (0.0,):
        if k.chance(0.75):
            k.sub(k.pick((bottle, bottle, vase, books_pile, vase)), x, k.u(-0.2, 0.2), h, k.u(0, 3))
    return w, d


def desk(k):
    size = table(k, w=k.u(1.1, 1.5), d=0.65, dressed=False)
    k.sub(books_row, -0.1, 0.15, 0.75, width=0.5)
    if k.chance(0.6):
        k.sub(tv, 0.1, 0.1, 0.75, size=0.6)
    return size


def low_table(k):
    return table(k, w=k.u(0.9, 1.2), d=0.6, h=0.42, dressed=False)


def books_pile(k):
    z = 0.0
    for _ in range(int(k.u(2, 5.99))):
        h = k.u(0.04, 0.07)
        m = k.mat(hsv(k.u(0, 1), 0.7, k.u(0.35, 0.8)))
        k.box(0, 0, z, k.u(0.2, 0.26), k.u(0.28, 0.34), h, m, BOOK, turn(2, k.u(-0.3, 0.3)))
        z += h
    return 0.35, 0.35


def books_row(k, width=0.8):
    x = -width / 2
    while x < width / 2 - 0.06:
        w = k.u(0.05, 0.1)
        m = k.mat(hsv(k.u(0, 1), 0.7, k.u(0.3, 0.8)))
        k.box(x + w / 2, k.u(-0.02, 0.02), 0, w - 0.006, 0.2, k.u(0.22, 0.32), m, BOOK)
        x += w
    return width, 0.22


def bookcase(k):
    w, n, wood = k.u(0.8, 1.2), k.pick((2, 3, 4, 5)), _wood(k)
    h = n * 0.4 + 0.06
    k.box(0, 0.15, 0, w, 0.03, h, wood)
    for side in (-1, 1):
        k.box(side * w / 2, 0, 0, 0.04, 0.32, h, wood)
    for i in range(n + 1):
        k.box(0, 0, 0.02 + i * 0.4, w, 0.32, 0.035, wood)
        if i < n and k.chance(0.9):
            k.sub(books_row, 0, -0.01, 0.055 + i * 0.4, width=w - 0.06)
    if h < 1.8:
        k.sub(k.pick((vase, clock_stand, plant)), k.u(-0.2, 0.2), 0, h, size=0.8)
    return w + 0.04, 0.36


def toilet(k):
    w = k.mat((0.95, 0.95, 0.93))
    k.taper(0, 0.02, 0, 0.14, 0.12, 0.25, w, TOILET)
    k.egg(0, -0.05, 0.42, 0.23, 0.3, 0.26, w, TOILET, hi=0.0)
    k.cyl(0, -0.05, 0.41, 0.24, 0.05, w, TOILET, ry=0.31)
    k.soft(0, 0.3, 0.38, 0.46, 0.22, 0.42, 0.06, w, TOILET)
    if k.chance(0.5):
        k.cyl(0, 0.17, 0.68, 0.22, 0.04, w, TOILET, ry=0.28, rotation=turn(0, 1.45))
    return 0.5, 0.85


def tv(k, size=1.0):
    w, h = 1.25 * size, 0.72 * size
    k.box(0, 0, 0.06, w, 0.06, h, k.mat((0.04, 0.04, 0.045)), TV)
    glow = 0.35 if k.chance(0.5) else 0.0
    screen = hsv(k.u(0.5, 0.7), 0.5, 0.5 if glow else 0.12)
    k.box(0, -0.025, 0.1, w - 0.08, 0.03, h - 0.08, k.mat(screen, None, PLAIN, 0.3, glow), TV)
    k.box(0, 0, 0, w * 0.35, 0.22, 0.03, k.mat((0.06, 0.06, 0.06)), TV)
    k.cyl(0, 0, 0.0, 0.03, 0.1, k.mat((0.06, 0.06, 0.06)), TV)
    return w, 0.25


def tv_stand(k):
    w, h = k.u(1.4, 1.9), 0.48
    k.box(0, 0, 0.05, w, 0.42, h - 0.05, _wood(k))
    k.sub(tv, 0, 0, h, size=k.u(0.85, 1.15))
    if k.chance(0.5):
        k.sub(vase, w / 2 - 0.15, 0, h, size=0.7)
    return w, 0.45


def microwave(k):
    c = k.tint(k.style["appliance"])
    k.soft(0, 0, 0, 0.56, 0.4, 0.34, 0.025, c, MICROWAVE)
    k.box(-0.07, -0.2, 0.05, 0.36, 0.02, 0.24, k.mat((0.05, 0.06, 0.07)), MICROWAVE)
    k.box(0.2, -0.2, 0.04, 0.1, 0.014, 0.26, k.mat((0.25, 0.25, 0.27)), MICROWAVE)
    k.cyl(0.125, -0.23, 0.06, 0.012, 0.22, k.mat((0.75, 0.75, 0.75)), MICROWAVE)
    return 0.56, 0.42


def toaster(k):
    m = k.mat(k.pick(((0.8, 0.8, 0.82), hsv(k.style["accent"], 0.7, 0.75))))
    k.soft(0, 0, 0, 0.42, 0.26, 0.3, 0.09, m, TOASTER)
    for y in (-0.045, 0.045):
        k.box(0, y, 0.292, 0.27, 0.03, 0.012, k.mat((0.05, 0.05, 0.05)), TOASTER)
    k.soft(0.2, 0, 0.12, 0.05, 0.07, 0.03, 0.014, k.mat((0.1, 0.1, 0.1)), TOASTER)
    return 0.4, 0.25


def oven(k):
    c, dark = k.tint(k.style["appliance"]), k.mat((0.06, 0.06, 0.07))
    k.box(0, 0, 0, 0.66, 0.62, 0.92, c, OVEN)
    k.box(0, -0.31, 0.2, 0.52, 0.02, 0.38, dark, OVEN)
    k.cyl(-0.27, -0.36, 0.66, 0.02, 0.54, k.mat((0.8, 0.8, 0.8)), OVEN, rotation=turn(1, QUARTER))
    for x in (-0.22, -0.075, 0.075, 0.22):
        k.cyl(x, -0.3, 0.8, 0.032, 0.05, dark, OVEN, rotation=turn(0, QUARTER))
    for x in (-0.16, 0.16):
        for y in (-0.14, 0.14):
            k.cyl(x, y, 0.92, 0.11, 0.02, dark, OVEN)
    return 0.68, 0.66


def refrigerator(k):
    c, h = k.tint(k.style["appliance"]), k.u(1.7, 1.95)
    split = h * k.pick((0.35, 0.65))
    r = 0.02 + 0.05 * k.style["round"]
    k.soft(0, 0, 0.03, 0.76, 0.68, split - 0.04, r, c, FRIDGE)
    k.soft(0, 0, split, 0.76, 0.68, h - split, r, c, FRIDGE)
    for z in (split - 0.42, split + 0.08):
        k.cyl(0.3, -0.38, z, 0.02, 0.32, k.mat((0.45, 0.45, 0.47)), FRIDGE)
    return 0.78, 0.74


def faucet(k):
    m = k.mat((0.78, 0.78, 0.8))
    k.cyl(0, 0, 0, 0.022, 0.24, m, SINK)
    k.soft(0, -0.09, 0.22, 0.04, 0.2, 0.04, 0.02, m, SINK)


def basin(k):
    w = k.mat((0.95, 0.95, 0.94))
    k.egg(0, 0, 0.17, 0.29, 0.23, 0.17, w, SINK, lo=-0.98, hi=0.0)
    k.cyl(0, 0, 0.14, 0.3, 0.035, w, SINK, ry=0.24, cap=-1)
    k.cyl(0, 0, 0.0, 0.12, 0.03, w, SINK)
    k.sub(faucet, 0, 0.28, 0.1)
    return 0.6, 0.5


def pedestal_sink(k):
    w = k.mat((0.95, 0.95, 0.94))
    k.neck(0, 0.05, 0.4, 0.09, 0.13, 0.4, 0.32, w, SINK)
    k.egg(0, 0, 0.88, 0.32, 0.26, 0.22, w, SINK, hi=0.0)
    k.cyl(0, 0, 0.86, 0.33, 0.04, w, SINK, ry=0.27, cap=-1)
    k.sub(faucet, 0, 0.24, 0.86)
    if k.chance(0.6):
        k.box(0, 0.3, 1.25, 0.6, 0.03, 0.7, k.mat((0.7, 0.78, 0.82)))
    return 0.68, 0.6


def counter(k):
    w, h = k.u(1.6, 2.4), 0.9
    front = _fabric(k) if k.chance(0.3) else _wood(k, 0.4)
    k.box(0, 0.02, 0, w, 0.58, h - 0.05, front)
    k.box(0, 0, h - 0.05, w + 0.03, 0.64, 0.05, k.tint(k.style["stone"]))
    n = 3 if w > 1.9 else 2
    for i in range(2 * n):
        k.box(-w / 2 + w * (i + 0.5) / (2 * n), -0.28, 0.6, 0.1, 0.03, 0.02, k.mat((0.7, 0.7, 0.7)))
    first = int(k.u(0, 3))
    for i in range(n):
        thing = (basin, microwave, toaster)[(first + i) % 3]
        k.sub(thing if k.chance(0.85) else bottles, -w / 2 + w * (i + 0.5) / n, 0.0, h)
    return w + 0.04, 0.66


def clock(k, size=None):
    r = size or k.u(0.17, 0.28)
    up = turn(0, QUARTER)
    k.cyl(0, 0, 0, r, 0.05, k.mat(hsv(k.style["accent"], 0.7, 0.35)), CLOCK, rotation=up)
    k.cyl(0, 0, 0, r * 0.86, 0.056, k.mat((0.95, 0.94, 0.9)), CLOCK, rotation=up)
    black = k.mat((0.05, 0.05, 0.05))
    for angle, length in ((k.u(0, 6.28), 0.5), (k.u(0, 6.28), 0.72)):
        s, c = sincos(angle)
        k.box(s * r * length / 2, -0.058, c * r * length / 2 - r * length / 2,
              r * 0.09, 0.012, r * length, black, CLOCK, turn(1, angle))  # fmt: skip
    return 2 * r, 0.06


def clock_stand(k, size=1.0):
    k.sub(clock, 0, 0, 0.2 * size, size=0.2 * size)
    return 0.4, 0.1


def grandfather_clock(k):
    wood = _wood(k)
    k.box(0, 0, 0, 0.5, 0.3, 0.5, wood, CLOCK)
    k.box(0, 0.02, 0.5, 0.36, 0.24, 0.85, wood, CLOCK)
    k.box(0, 0, 1.35, 0.52, 0.3, 0.55, wood, CLOCK)
    k.sub(clock, 0, -0.16, 1.62, size=0.21)
    return 0.54, 0.34


def floor_lamp(k):
    h, m = k.u(1.4, 1.7), k.mat((0.25, 0.22, 0.2))
    k.taper(0, 0, 0, 0.17, 0.03, 0.06, m)
    k.cyl(0, 0, 0.05, 0.016, h - 0.2, m)
    shade = k.mat(k.style["lamp"], None, PLAIN, 0.3, 0.8)
    if k.style["round"] > 0.5:
        k.egg(0, 0, h, 0.2, 0.2, 0.2, shade)
    else:
        k.taper(0, 0, h - 0.16, 0.25, 0.14, 0.32, shade, cap=-1)
    return 0.5, 0.5


def column(k, h=2.6):
    r, m = k.u(0.16, 0.26), k.tint(k.style["stone"])
    k.box(0, 0, 0, 2.5 * r, 2.5 * r, 0.1, m)
    k.soft(0, 0, 0.1, 2.5 * r, 2.5 * r, 0.14, 0.07, m)
    k.cyl(0, 0, 0.2, r, h - 0.2, m, cap=-1)
    k.taper(0, 0, h - 0.3, r, 1.35 * r, 0.3, m, cap=-1)
    return 2.6 * r, 2.6 * r


def wardrobe(k):
    w, h, wood = k.u(0.9, 1.4), k.u(1.6, 2.1), _wood(k, 0.25)
    k.box(0, 0, 0, w, 0.55, h, wood)
    for side in (-1, 1):
        k.box(side * w / 4, -0.27, 0.1, w / 2 - 0.05, 0.04, h - 0.15, wood)
        k.egg(side * 0.06, -0.31, h / 2, 0.03, 0.03, 0.03, k.mat((0.75, 0.65, 0.3)))
    return w, 0.6


def pouf(k):
    r = k.u(0.26, 0.36)
    k.egg(0, 0, 0.22, r, r, 0.22, _fabric(k, k.style["accent"]))
    return 2 * r, 2 * r


def sideboard(k):
    w, h = k.u(1.0, 1.6), 0.78
    k.soft(0, 0, 0.06, w, 0.42, h - 0.06, 0.05, _wood(k))
    for x in (-0.32 * w, 0.0, 0.32 * w):
        k.sub(k.pick((vase, plant, clock_stand, books_pile, bottles)), x, 0, h)
    return w, 0.45


def picture(k):
    w, h = k.u(0.5, 1.1), k.u(0.4, 0.8)
    k.box(0, 0.01, 0, w, 0.03, h, k.tint(k.style["wood"]))
    a, b = hsv(k.u(0, 1), 0.6, 0.7), hsv(k.u(0, 1), 0.5, 0.5)
    k.box(0, -0.005, 0.05, w - 0.1, 0.015, h - 0.1, k.mat(a, b, NOISE, 0.15))
    return w, 0.05


def wall_shelf(k):
    w = k.u(0.7, 1.1)
    k.box(0, 0, 0, w, 0.24, 0.04, _wood(k))
    k.sub(books_row, -w * 0.15, 0, 0.04, width=w * 0.6)
    k.sub(k.pick((vase, clock_stand)), w * 0.35, 0, 0.04, size=0.7)
    return w, 0.26
