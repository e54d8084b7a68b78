"""Analytic primitives and their exact ray intersections, normals and principal curvatures.

Three kinds carry every scene:

- ``BOX``: lo <= p <= hi in the local frame;
- ``ROUND``: a box whose edges are quarter cylinders and whose corners are eighths of spheres
  (with hi = radius on every axis it is a sphere, on two axes a capsule);
- ``QUADRIC``: A x^2 + B y^2 + C z^2 + D z + E = 0 clipped to lo <= p <= hi, open or with flat
  caps at both ends of one axis: cylinders, cones, ellipsoids, hyperboloids, vaults.

Only +, -, *, / and sqrt touch a pixel: IEEE defines them to the last bit, so every processor
decides every pixel alike. Sines and cosines are Python's, rounded to 1e-9.
"""

import math
from dataclasses import dataclass

import numpy as np

BOX, ROUND, QUADRIC = 0, 1, 2
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Prim:
    """One primitive. local = rotation @ (world - center); lengths in metres."""

    kind: int
    center: tuple
    lo: tuple
    hi: tuple
    label: int = 1
    material: int = 0
    rotation: tuple = IDENTITY  # row-major 3x3, world -> local
    radius: float = 0.0  # ROUND only
    quad: tuple = (0.0, 0.0, 0.0, 0.0, 0.0)  # QUADRIC only: A, B, C, D, E
    cap: int = -1  # QUADRIC only: axis closed by flat caps at lo and hi


def sincos(angle):
    """Sine and cosine of an angle in radians, rounded so that no libm's last bit survives."""
    return round(math.sin(angle), 9), round(math.cos(angle), 9)


def compose(a, b):
    """Row-major 3x3 product a @ b in plain floats."""
    return tuple(
        a[3 * i] * b[j] + a[3 * i + 1] * b[3 + j] + a[3 * i + 2] * b[6 + j]
        for i in range(3)
        for j in range(3)
    )


def turn(axis, angle):
    """World -> local rotation of a body turned by ``angle`` radians about axis 0, 1 or 2."""
    s, c = sincos(angle)
    if axis == 0:
        return (1.0, 0.0, 0.0, 0.0, c, s, 0.0, -s, c)
    if axis == 1:
        return (c, 0.0, -s, 0.0, 1.0, 0.0, s, 0.0, c)
    return (c, s, 0.0, -s, c, 0.0, 0.0, 0.0, 1.0)


def rotate(m, x, y, z):
    """m @ (x, y, z), elementwise over scalars or arrays."""
    if m is IDENTITY:
        return x, y, z
    return (
        m[0] * x + m[1] * y + m[2] * z,
        m[3] * x + m[4] * y + m[5] * z,
        m[6] * x + m[7] * y + m[8] * z,
    )


def unrotate(m, x, y, z):
    """Transpose of m applied to (x, y, z): local -> world."""
    return (
        m[0] * x + m[3] * y + m[6] * z,
        m[1] * x + m[4] * y + m[7] * z,
        m[2] * x + m[5] * y + m[8] * z,
    )


def cylinder(r, ry=None):
    """Coefficients of an upright (elliptic) cylinder of radius r."""
    ry = r if ry is None else ry
    return (1 / (r * r), 1 / (ry * ry), 0.0, 0.0, -1.0)


def cone(r0, z0, r1, z1):
    """Coefficients of the upright cone with radius r0 at height z0 and r1 at z1."""
    k = (r1 - r0) / (z1 - z0)
    m = r0 - k * z0
    return (1.0, 1.0, -k * k, -2 * k * m, -m * m)


def ellipsoid(a, b, c):
    """Coefficients of the ellipsoid with semi-axes a, b, c."""
    return (1 / (a * a), 1 / (b * b), 1 / (c * c), 0.0, -1.0)


def waist(w, r, z):
    """Coefficients of the hyperboloid with radius w at height 0 and r at heights +z and -z."""
    return (1.0, 1.0, -(r * r - w * w) / (z * z), 0.0, -w * w)


def _nonzero(d):
    return np.where(np.abs(d) < 1e-12, 1e-12, d)


def _slabs(o, d, lo, hi):
    near, far = None, None
    for k in range(3):
        inv = 1.0 / _nonzero(d[k])
        a, b = (lo[k] - o[k]) * inv, (hi[k] - o[k]) * inv
        first, second = np.minimum(a, b), np.maximum(a, b)
        near = first if near is None else np.maximum(near, first)
        far = second if far is None else np.minimum(far, second)
    return near, far


def _hit_box(prim, o, d, eps):
    near, far = _slabs(o, d, prim.lo, prim.hi)
    return np.where((near <= far) & (near > eps), near, np.inf)


def _hit_round(prim, o, d, eps):
    """First entry into a convex body: the least over its slabs, edge cylinders and corner."""
    t = _hit_box(prim, o, d, eps)
    some = np.isfinite(t)
    if not some.any():
        return t
    r, inner = prim.radius, tuple(h - prim.radius for h in prim.hi)
    start = t[some]
    o = [x[some] if isinstance(x, np.ndarray) and x.ndim else x for x in o]
    d = [np.broadcast_to(x, t.shape)[some] for x in d]
    sign = [np.where(o[k] + start * d[k] < 0, -1.0, 1.0) for k in range(3)]
    oc = [o[k] * sign[k] - inner[k] for k in range(3)]
    dd = [d[k] * sign[k] for k in range(3)]
    beyond = [oc[k] + start * dd[k] > 0 for k in range(3)]
    face = (beyond[0].astype(int) + beyond[1] + beyond[2]) < 2
    best = np.full(start.shape, np.inf)
    for free in (0, 1, 2, None):
        axes = [k for k in range(3) if k != free]
        a, b, c = 0.0, 0.0, -r * r
        for k in axes:
            a, b, c = a + dd[k] * dd[k], b + oc[k] * dd[k], c + oc[k] * oc[k]
        h = b * b - a * c
        root = (-b - np.sqrt(np.maximum(h, 0.0))) / np.maximum(a, 1e-12)
        ok = (h > 0) & (root > eps) & (root < best)
        if free is not None:
            along = oc[free] + root * dd[free]
            ok &= (along <= 0) & (along >= -2 * inner[free])
        best = np.where(ok, root, best)
    t[some] = np.where(face, start, best)
    return t


def _hit_quadric(prim, o, d, eps):
    qa, qb, qc, qd, qe = prim.quad
    ax, ay, az = qa * d[0], qb * d[1], qc * d[2]
    a = ax * d[0] + ay * d[1] + az * d[2]
    b = ax * o[0] + ay * o[1] + az * o[2] + 0.5 * qd * d[2]
    c = qa * o[0] * o[0] + qb * o[1] * o[1] + qc * o[2] * o[2] + qd * o[2] + qe
    h = b * b - a * c
    s = np.sqrt(np.maximum(h, 0.0))
    q = _nonzero(-np.where(b < 0, b - s, b + s))
    best = None
    for t in (q / _nonzero(a), c / q):
        ok = (h >= 0) & (t > eps)
        for k in range(3):
            x = o[k] + t * d[k]
            ok &= (x >= prim.lo[k]) & (x <= prim.hi[k])
        t = np.where(ok, t, np.inf)
        best = t if best is None else np.minimum(best, t)
    if prim.cap >= 0:
        inv = 1.0 / _nonzero(d[prim.cap])
        for level in (prim.lo[prim.cap], prim.hi[prim.cap]):
            t = (level - o[prim.cap]) * inv
            x, y, z = (level if k == prim.cap else o[k] + t * d[k] for k in range(3))
            f = qa * x * x + qb * y * y + qc * z * z + qd * z + qe
            best = np.where((f <= 0) & (t > eps) & (t < best), t, best)
    return best


_HIT = {BOX: _hit_box, ROUND: _hit_round, QUADRIC: _hit_quadric}


def intersect(prim, origin, direction, eps=1e-6):
    """Least t > eps at which origin + t * direction meets ``prim``; inf where it does not.

    ``origin`` and ``direction`` are three arrays (or scalars) of world coordinates; directions
    need not be of unit length.
    """
    m, c = prim.rotation, prim.center
    o = rotate(m, origin[0] - c[0], origin[1] - c[1], origin[2] - c[2])
    return _HIT[prim.kind](prim, o, rotate(m, *direction), eps)


def surface(prim, point, direction):
    """Geometry of ``prim`` at world points on it, seen along ``direction``.

    Returns (normal, curvature, local): the unit world normal that faces the viewer (three
    arrays), the two principal curvatures in 1/m, larger magnitude first and positive where the
    surface bulges towards the viewer, and the local coordinates (three arrays).
    """
    m, c = prim.rotation, prim.center
    p = rotate(m, point[0] - c[0], point[1] - c[1], point[2] - c[2])
    zero = np.zeros_like(p[0])
    if prim.kind == BOX:
        gap = [np.minimum(np.abs(p[k] - prim.lo[k]), np.abs(p[k] - prim.hi[k])) for k in range(3)]
        axis = np.where(gap[0] <= np.minimum(gap[1], gap[2]), 0, np.where(gap[1] <= gap[2], 1, 2))
        mid = [(prim.lo[k] + prim.hi[k]) / 2 for k in range(3)]
        n = [np.where(axis == k, np.where(p[k] > mid[k], 1.0, -1.0), 0.0) for k in range(3)]
        k1, k2 = zero, zero
    elif prim.kind == ROUND:
        over = [np.maximum(np.abs(p[k]) - (prim.hi[k] - prim.radius), 0.0) for k in range(3)]
        bent = [over[k] > 1e-9 for k in range(3)]
        count = bent[0].astype(int) + bent[1] + bent[2]
        n = [np.where(p[k] < 0, -over[k], over[k]) for k in range(3)]
        k1 = np.where(count >= 2, 1 / prim.radius, 0.0)
        k2 = np.where(count == 3, 1 / prim.radius, 0.0)
    else:
        a, b, cc, dd, e = prim.quad
        g = [a * p[0], b * p[1], cc * p[2] + 0.5 * dd]
        g2 = np.maximum(g[0] * g[0] + g[1] * g[1] + g[2] * g[2], 1e-24)
        length = np.sqrt(g2)
        hess = a * g[0] * g[0] + b * g[1] * g[1] + cc * g[2] * g[2]
        mean = (g2 * (a + b + cc) - hess) / (2 * g2 * length)
        gauss = (g[0] * g[0] * b * cc + g[1] * g[1] * a * cc + g[2] * g[2] * a * b) / (g2 * g2)
        s = np.sqrt(np.maximum(mean * mean - gauss, 0.0))
        k1, k2, n = mean + s, mean - s, g
        if prim.cap >= 0:
            k = prim.cap
            top, bottom = np.abs(p[k] - prim.hi[k]) < 1e-7, np.abs(p[k] - prim.lo[k]) < 1e-7
            flat = top | bottom
            out = np.where(top, 1.0, -1.0)
            n = [np.where(flat, out if j == k else 0.0, n[j]) for j in range(3)]
            k1, k2 = np.where(flat, 0.0, k1), np.where(flat, 0.0, k2)
    n = unrotate(m, *n)
    length = np.sqrt(np.maximum(n[0] * n[0] + n[1] * n[1] + n[2] * n[2], 1e-24))
    away = n[0] * direction[0] + n[1] * direction[1] + n[2] * direction[2] > 0
    flip = np.where(away, -1.0, 1.0)
    n = tuple(x * (flip / length) for x in n)
    k1, k2 = k1 * flip, k2 * flip
    swap = np.abs(k2) > np.abs(k1)
    return n, (np.where(swap, k2, k1), np.where(swap, k1, k2)), p
