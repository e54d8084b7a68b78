"""One view of a scene: exact metric labels, the picture, and their nine Taskonomy encodings."""

import numpy as np

from .furniture import NONE
from .light import illuminate, pattern_weight
from .shapes import intersect, rotate, surface

DOMAINS = (
    "rgb", "segment_semantic", "depth_zbuffer", "normal", "keypoints2d", "edge_texture",
    "edge_occlusion", "reshading", "principal_curvature",
)  # fmt: skip
DEPTH_PER_M = 512
INVALID_DEPTH = 65535
MAX_DEPTH_M = 15.9  # 2^13 / 512, less a margin
CURVATURE_FLAT = (0.5175, 0.4987)  # the released normalisation's means
CURVATURE_GAIN = (0.36, 0.2)
TEXTURE_GAIN, KEYPOINT_GAIN = 10.0, 2.7
OCCLUSION_BASE, OCCLUSION_GAIN, OCCLUSION_TAIL = 5.0, 1000.0, 120.0
CURVATURE_RADIUS_M = 2.0  # radius at which the response has reached 1/sqrt(2) of its limit


def rays(camera, size):
    """Directions through the pixel centres, (size, size) x 3, scaled to unit z-depth."""
    u = ((np.arange(size) + 0.5) * (2.0 / size) - 1.0) * camera.tan
    r, d, f = camera.right, camera.down, camera.forward
    u, v = u[None, :], u[:, None]
    return tuple(f[k] + u * r[k] + v * d[k] for k in range(3))


def _windows(corners, camera, size):
    """Pixel rectangles (row0, row1, col0, col1) that may see each of the boxes (N, 8, 3).

    Empty for a box behind the camera or outside the picture, all of it for one that reaches
    behind the camera.
    """
    p = [corners[..., k] - camera.position[k] for k in range(3)]
    z, down, right = (
        p[0] * axis[0] + p[1] * axis[1] + p[2] * axis[2]
        for axis in (camera.forward, camera.down, camera.right)
    )
    behind, across = z.max(1) < 0.02, z.min(1) < 0.02
    z = np.maximum(z, 0.02)
    spans = []
    for along in (down, right):
        at = (along / z / camera.tan + 1.0) * (size / 2)
        spans.append(np.where(across, 0, np.clip(at.min(1) - 1, 0, size).astype(int)))
        spans.append(np.where(across, size, np.clip(at.max(1) + 2, 0, size).astype(int)))
    spans[1][behind] = 0
    return np.stack(spans, 1).tolist()


def cast(scene, camera, size):
    """First hits: z-depth in m (inf: none), index into ``scene.prims`` (-1: none), and the rays."""
    d = rays(camera, size)
    depth = np.full((size, size), np.inf)
    hit = np.full((size, size), -1)
    windows = _windows(scene.corners, camera, size)
    start, order = 0, []
    for g in scene.groups:
        away = [g.center[k] - camera.position[k] for k in range(3)]
        reach = away[0] * away[0] + away[1] * away[1] + away[2] * away[2]
        order.append((g.room >= 0, reach, start, g))
        start += len(g.prims)
    for inside, _, start, g in sorted(order, key=lambda entry: entry[:3]):
        if inside:
            ahead = sum((g.center[k] - camera.position[k]) * camera.forward[k] for k in range(3))
            if ahead + g.radius < 0.02:
                continue
        for i, prim in enumerate(g.prims, start):
            r0, r1, c0, c1 = windows[i]
            if r0 >= r1 or c0 >= c1:
                continue
            at = (slice(r0, r1), slice(c0, c1))
            if inside and ahead - g.radius > 0 and not (depth[at] > ahead - g.radius).any():
                continue
            t = intersect(prim, camera.position, [x[at] for x in d])
            near = t < depth[at]
            np.copyto(depth[at], t, where=near)
            np.copyto(hit[at], i, where=near)
    return depth, hit, d


def render_view(scene, camera, size):
    """Everything exact about one view, as a dict of (size, size[, channels]) arrays.

    depth (z-depth, m, inf where nothing is hit), normal (3: camera frame x right, y down,
    z forward, unit, towards the camera), curvature (2: 1/m, larger magnitude first, positive where
    the surface bulges towards the camera), label (class id), reshading (0..1), rgb (uint8).
    """
    depth, hit, d = cast(scene, camera, size)
    normal = np.zeros((size, size, 3))
    curvature = np.zeros((size, size, 2))
    label = np.full((size, size), NONE, np.uint8)
    shade = np.zeros((size, size))
    sky, world, world_normal, albedo = (np.zeros((size, size, 3)) for _ in range(4))
    glow = np.zeros((size, size))
    length = np.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])

    flat_hit = hit.ravel()
    order = np.argsort(flat_hit, kind="stable")
    bounds = np.flatnonzero(np.diff(flat_hit[order])) + 1
    for at in np.split(order, bounds):
        i = flat_hit[at[0]]
        rows, cols = at // size, at % size
        dd = [x[rows, cols] for x in d]
        if i < 0:
            up = np.clip(dd[2] / length[rows, cols], 0.0, 1.0)
            for k in range(3):
                sky[rows, cols, k] = scene.sky[k] * (1.0 - 0.35 * up * (1 - 0.5 * (k == 2)))
            continue
        prim, t = scene.prims[i], depth[rows, cols]
        point = [camera.position[k] + t * dd[k] for k in range(3)]
        n, k12, local = surface(prim, point, dd)
        facing = -(n[0] * dd[0] + n[1] * dd[1] + n[2] * dd[2]) / length[rows, cols]
        dist = t * length[rows, cols]
        label[rows, cols] = prim.label
        shade[rows, cols] = np.minimum(1.0, 1.4 * facing / (1.0 + dist * dist / 9.0))
        for k, axis in enumerate((camera.right, camera.down, camera.forward)):
            normal[rows, cols, k] = n[0] * axis[0] + n[1] * axis[1] + n[2] * axis[2]
        for k in range(2):
            curvature[rows, cols, k] = k12[k]
        pattern, first, second, scale, own = scene.materials[prim.material]
        w = 0.0
        if pattern:
            flat = [np.abs(x) for x in rotate(prim.rotation, *n)]
            side = (flat[0] > flat[1]) & (flat[0] > flat[2])
            top = (flat[2] >= flat[0]) & (flat[2] >= flat[1])
            u = np.where(side, local[1], local[0])
            v = np.where(top, local[1], local[2])
            pixel = t * (2 * camera.tan / size) / np.maximum(facing, 0.2)
            w = pattern_weight(pattern, u, v, scale, pixel)
        for k in range(3):
            c = first[k] + w * (second[k] - first[k])
            albedo[rows, cols, k] = c * c
            world[rows, cols, k] = point[k]
            world_normal[rows, cols, k] = n[k]
        glow[rows, cols] = own

    color = sky + illuminate(scene, hit >= 0, world, world_normal, albedo, glow)
    rgb = np.rint(255.0 * np.sqrt(np.clip(color, 0.0, 1.0))).astype(np.uint8)
    return {
        "depth": depth, "normal": normal, "curvature": curvature, "label": label,
        "reshading": shade, "rgb": rgb,
    }  # fmt: skip


def _spread(x, radius, times):
    """Box blur by shifted sums in a fixed order; edges are repeated."""
    if radius < 1:
        return x
    for _ in range(times):
        for axis in (0, 1):
            pad = [(0, 0), (0, 0)]
            pad[axis] = (radius, radius)
            y = np.pad(x, pad, mode="edge")
            n, total = x.shape[axis], 0.0
            for k in range(2 * radius + 1):
                total = total + (y[k : k + n] if axis == 0 else y[:, k : k + n])
            x = total / (2 * radius + 1)
    return x


def _differences(x, step):
    y = np.pad(x, step, mode="edge")
    h, w = x.shape
    at = lambda r, c: y[step + r : step + r + h, step + c : step + c + w]  # noqa: E731
    s = step
    dx = at(-s, s) + 2 * at(0, s) + at(s, s) - at(-s, -s) - 2 * at(0, -s) - at(s, -s)
    dy = at(s, -s) + 2 * at(s, 0) + at(s, s) - at(-s, -s) - 2 * at(-s, 0) - at(-s, s)
    return dx, dy


def occlusion(depth):
    """Graded response to depth discontinuities, of the size of Taskonomy's edge_occlusion.

    Inverse depth is affine in the image over any plane, so its second differences vanish there;
    relative to the inverse depth itself they measure a step whatever its distance. The response
    saturates with the step's size and is spread over about a twentieth of the image.
    """
    size = depth.shape[0]
    step = max(1, size // 64)
    w = 1.0 / np.minimum(depth, 25.0)
    p = np.pad(w, step, mode="reflect", reflect_type="odd")  # goes on straight
    c = p[step:-step, step:-step]
    bend = 0.0
    for a, b in (
        (p[step:-step, 2 * step :], p[step:-step, : -2 * step]),
        (p[2 * step :, step:-step], p[: -2 * step, step:-step]),
    ):
        # A step shows on both its sides; the nearer side holds the larger inverse depth.
        e = np.abs(a + b - 2 * c) / np.maximum(c, np.maximum(a, b))
        bend = bend + e * e
    g = bend / (bend + 0.05)
    narrow = _spread(g, max(1, size // 48), 2)
    wide = _spread(narrow, max(1, size // 16), 2)
    return narrow, wide


def encode(labels):
    """Taskonomy's files of one view: {domain: uint8 (H, W[, 3]) or uint16 (H, W)}.

    Principal curvature: with x = k * 2 m, channel i holds m_i + g_i x / sqrt(1 + x^2), where m are
    the released normalisation's means (a flat surface) and g = (0.36, 0.2); the third channel is
    constant. The response is averaged over a window that falls to half at a tenth of the image, as
    an estimate from a mesh is averaged over a neighbourhood: where three pixels of four are exactly
    flat, L1 is least for a network that always says flat.
    """
    rgb, depth = labels["rgb"], labels["depth"]
    size = depth.shape[0]
    valid = depth < MAX_DEPTH_M
    metres = np.where(valid, depth, 0.0)
    z = np.where(valid, np.rint(metres * DEPTH_PER_M), INVALID_DEPTH).astype(np.uint16)
    normal = np.clip(np.rint(127.0 * (labels["normal"] + 1.0)), 0, 255).astype(np.uint8)
    shade = np.clip(np.rint(255.0 * labels["reshading"]), 0, 255).astype(np.uint8)
    curved = np.full((size, size, 3), 127, np.uint8)
    for k in range(2):
        x = labels["curvature"][..., k] * CURVATURE_RADIUS_M
        response = _spread(x / np.sqrt(1.0 + x * x), max(1, size // 10), 2)
        y = CURVATURE_FLAT[k] + CURVATURE_GAIN[k] * response
        curved[..., k] = np.clip(np.rint(255.0 * y), 0, 255)

    red, green, blue = (rgb[..., k].astype(np.int64) for k in range(3))
    luma = (77 * red + 150 * green + 29 * blue) / 256.0
    step = max(1, size // 64)
    dx, dy = _differences(_spread(luma, step // 2, 1), step)
    gain = 0.75 if size < 64 else 1.0
    texture = np.sqrt(dx * dx + dy * dy) * (gain * TEXTURE_GAIN)
    xx, yy, xy = (_spread(a, max(1, size // 48), 1) for a in (dx * dx, dy * dy, dx * dy))
    least = (xx + yy - np.sqrt((xx - yy) * (xx - yy) + 4 * xy * xy)) / 2
    corners = np.sqrt(np.maximum(least, 0.0)) * (gain * KEYPOINT_GAIN)
    narrow, wide = occlusion(depth)
    occlusion_gain = OCCLUSION_GAIN * (0.6 if size < 64 else 1.0)
    edges = OCCLUSION_BASE + occlusion_gain * narrow + OCCLUSION_TAIL * wide

    def short(x):
        return np.minimum(np.rint(x), 65535).astype(np.uint16)

    return {
        "rgb": rgb,
        "segment_semantic": labels["label"],
        "depth_zbuffer": z,
        "normal": normal,
        "keypoints2d": short(corners),
        "edge_texture": short(texture),
        "edge_occlusion": short(edges),
        "reshading": np.repeat(shade[..., None], 3, 2),
        "principal_curvature": curved,
    }
