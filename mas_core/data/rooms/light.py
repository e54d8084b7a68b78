"""What the picture shows and the labels do not: patterned materials, lamps, shadows, daylight."""

import numpy as np

from .furniture import BRICKS, PLANKS, STRIPES, TILES
from .shapes import intersect


def _hash(ix, iy, salt):
    """Lattice noise in 0..1 from integers."""
    h = (ix * 73856093) ^ (iy * 19349663) ^ (salt * 83492791)
    h = (h ^ (h >> 13)) * 1274126177
    return ((h ^ (h >> 16)) & 1023) * (1.0 / 1023)


def pattern_weight(kind, u, v, scale, pixel):
    """Weight of a material's second colour; fades to its mean where pixels outgrow the pattern."""
    a, b = u / scale, v / scale
    if kind == PLANKS:
        b = b * 0.25
    if kind == BRICKS:
        a, b = a * 0.5, b * 1.5
        a = a + 0.5 * (np.floor(b) - 2 * np.floor(b / 2))
    ia, ib = np.floor(a), np.floor(b)
    fa, fb = a - ia, b - ib
    ia, ib = ia.astype(np.int64), ib.astype(np.int64)
    if kind == STRIPES:
        w, mean = (fa < 0.5) * 1.0, 0.5
    elif kind == TILES:
        w, mean = ((ia + ib) & 1) * 0.8 + ((fa < 0.06) | (fb < 0.06)) * 0.2, 0.42
    elif kind == PLANKS:
        w, mean = 0.75 * _hash(ia, ib, 1) + 0.25 * (fa < 0.08), 0.4
    elif kind == BRICKS:
        w, mean = 0.5 * _hash(ia, ib, 2) + 0.5 * ((fa < 0.06) | (fb < 0.1)), 0.33
    else:
        fa, fb = fa * fa * (3 - 2 * fa), fb * fb * (3 - 2 * fb)
        low = _hash(ia, ib, 3) * (1 - fa) + _hash(ia + 1, ib, 3) * fa
        high = _hash(ia, ib + 1, 3) * (1 - fa) + _hash(ia + 1, ib + 1, 3) * fa
        w, mean = low * (1 - fb) + high * fb, 0.5
    keep = np.clip(2.0 - 3.0 * pixel / scale, 0.0, 1.0)
    return mean + (w - mean) * keep


def _shadow(scene, room_index, point, lamp):
    """1 where the lamp sees a point, 0 where furniture of the room stands between."""
    seg = [lamp[k] - point[k] for k in range(3)]
    length2 = seg[0] * seg[0] + seg[1] * seg[1] + seg[2] * seg[2]
    lit = np.ones(point[0].shape)
    for g in scene.groups:
        if g.room != room_index or not g.shadow:
            continue
        v = [g.center[k] - point[k] for k in range(3)]
        s = np.clip((v[0] * seg[0] + v[1] * seg[1] + v[2] * seg[2]) / length2, 0.0, 1.0)
        e = [v[k] - s * seg[k] for k in range(3)]
        close = e[0] * e[0] + e[1] * e[1] + e[2] * e[2] < g.radius * g.radius
        some = np.flatnonzero(close & (lit > 0))
        if not some.size:
            continue
        o, d = [x[some] for x in point], [x[some] for x in seg]
        dark = np.zeros(some.size, bool)
        for prim in g.prims:
            dark |= intersect(prim, o, d, 1e-3) < 1.0
        lit[some[dark]] = 0.0
    return lit


def illuminate(scene, valid, world, normal, albedo, glow):
    """Linear colours (H, W, 3) of the surfaces at world points under their rooms' lights.

    The room's lamp casts shadows; windows and the ambient term do not. Corners are darker.
    ``glow`` is the share of its own light a surface shows.
    """
    color = np.zeros(world.shape)
    left = valid.copy()
    for index, room in enumerate(scene.rooms):
        x0, y0, x1, y1 = room.rect
        inside = left & (world[..., 0] >= x0 - 0.13) & (world[..., 0] <= x1 + 0.13)
        inside &= (world[..., 1] >= y0 - 0.13) & (world[..., 1] <= y1 + 0.13)
        left &= ~inside
        rows, cols = np.nonzero(inside)
        if not rows.size:
            continue
        p = [world[rows, cols, k] for k in range(3)]
        n = [normal[rows, cols, k] for k in range(3)]
        s = room.style
        corner = 1.0
        for distance in (p[0] - x0, x1 - p[0], p[1] - y0, y1 - p[1], p[2], room.height - p[2]):
            x = np.maximum(distance, 0.0) * 6.0
            corner = corner * (1.0 - 0.3 / (1.0 + x * x))
        to = [room.lamp[k] - p[k] for k in range(3)]
        r2 = to[0] * to[0] + to[1] * to[1] + to[2] * to[2] + 0.01
        cos = (n[0] * to[0] + n[1] * to[1] + n[2] * to[2]) / np.sqrt(r2)
        lamp = np.maximum(cos, 0.0) * _shadow(scene, index, p, room.lamp) * (
            3.0 * s["lamp_power"] / (1.2 + r2)
        )
        day = 0.0
        for center, way, area in room.windows:
            v = [center[k] - p[k] for k in range(3)]
            r2 = v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + 0.25
            out = np.maximum(-(v[0] * way[0] + v[1] * way[1]), 0.0)
            face = np.maximum(n[0] * v[0] + n[1] * v[1] + n[2] * v[2], 0.0)
            day = day + s["window"] * area * out * face / (r2 * r2)
        base = s["ambient"] * (0.8 + 0.2 * n[2]) + 0.1 * s["window"] * len(room.windows)
        base = base * corner
        own = glow[rows, cols]
        for k in range(3):
            light = base + lamp * s["lamp"][k] + day * scene.sky[k]
            a = albedo[rows, cols, k]
            color[rows, cols, k] = a * light * (1 - own) + a * own * 1.1
    return color
