"""Buildings: plans, styles, furnished rooms, lights and camera poses, all drawn from a seed.

World coordinates in metres, z up. A building is a rectangle cut into two to four rooms joined by
doorways; outer walls have windows, through which the sky is seen (no depth).
"""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from . import furniture as f
from .furniture import BRICKS, NOISE, PLAIN, PLANKS, STRIPES, TILES, Kit, hsv
from .shapes import BOX, IDENTITY, QUADRIC, Prim, cylinder, sincos, unrotate

VAULTED = 0.35  # styles above this have vaulted ceilings
WALL = 0.06  # half a wall's thickness: every room builds its own side
SIDES = (  # direction into the room, and the yaw that turns a piece's back to the wall
    ((0, 1), 3.141592654), ((-1, 0), 4.71238898), ((0, -1), 0.0), ((1, 0), 1.570796327),
)  # fmt: skip


def stream(*names):
    """Random stream named by what it is for; equal names give equal draws everywhere."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


@dataclass
class Group:
    """A piece of furniture: primitives, bounding sphere, the room it stands in."""

    prims: list
    room: int
    center: tuple
    radius: float
    shadow: bool = True


@dataclass
class Room:
    """Inner rectangle (x0, y0, x1, y1), ceiling height, kind, style, lamp and window lights."""

    rect: tuple
    height: float
    kind: str
    style: dict
    openings: list = field(default_factory=lambda: [[], [], [], []])  # per side: (u0, u1, z0, z1)
    lamp: tuple = (0.0, 0.0, 2.0)
    windows: list = field(default_factory=list)  # (center, inward direction, area)
    taken: list = field(default_factory=list)  # footprints (x0, y0, x1, y1) of what stands there
    clear: list = field(default_factory=list)  # and of what stays free before doorways
    hung: list = field(default_factory=lambda: [[], [], [], []])


@dataclass
class Scene:
    """What a ray can meet (``groups``; the first is the building's shell), rooms, materials."""

    groups: list
    rooms: list
    materials: list
    sky: tuple
    seed: int = 0
    index: int = 0

    @cached_property
    def prims(self):
        """All primitives, group after group."""
        return [p for g in self.groups for p in g.prims]

    @cached_property
    def corners(self):
        """World corners of every primitive's box, (prims, 8, 3)."""
        return np.array([box_corners(p) for p in self.prims])


@dataclass(frozen=True)
class Camera:
    """Pinhole camera: position, unit axes right/down/forward in world coordinates, tan(fov/2)."""

    position: tuple
    right: tuple
    down: tuple
    forward: tuple
    tan: float
    room: int = 0


def draw_style(rng):
    """One draw from the common distribution of styles."""
    u = lambda a, b: a + (b - a) * rng.random()  # noqa: E731
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    hue = u(0, 1)
    warm = u(0, 1)
    wood = u(0.25, 0.85)
    stone = u(0.5, 0.9)
    steel = u(0.55, 0.95)
    return {
        "wall": hsv(hue, u(0.02, 0.45), u(0.55, 0.95)),
        "wall2": u(0.75, 0.97),
        "wall_pattern": pick((PLAIN, PLAIN, PLAIN, STRIPES, BRICKS, NOISE)),
        "wall_scale": u(0.2, 0.5),
        "floor_pattern": pick((PLANKS, PLANKS, TILES, TILES, NOISE, PLAIN)),
        "floor_scale": u(0.15, 0.6),
        "floor": hsv(u(0.02, 0.14), u(0.05, 0.6), u(0.35, 0.85)),
        "ceiling": u(0.8, 0.97),
        "wood": (wood, wood * u(0.6, 0.85), wood * u(0.3, 0.65)),
        "fabric": u(0, 1),
        "saturation": u(0.1, 0.75),
        "cloth": pick((PLAIN, PLAIN, STRIPES, TILES, NOISE)),
        "cloth_scale": u(0.08, 0.3),
        "accent": u(0, 1),
        "stone": (stone, stone * 0.97, stone * 0.92),
        "appliance": (steel, steel, steel * u(0.9, 1.05)),
        "round": u(0, 1),
        "scale": u(0.88, 1.15),
        "lamp": (1.0, 0.95 - 0.2 * warm, 0.9 - 0.45 * warm),
        "lamp_power": u(0.5, 1.3),
        "window": u(0.3, 1.2),
        "window_size": u(0.7, 1.5),
        "ambient": u(0.16, 0.34),
        "height": u(2.4, 3.1),
        "vault": u(0, 1),
        "cove": u(0, 1),
        "columns": u(0, 1),
        "corner": u(0, 1),
        "clutter": u(0.4, 1.0),
        "living": u(0.1, 1.6), "kitchen": u(0.1, 1), "bedroom": u(0.1, 1.3), "bath": u(0.1, 0.8),
        "dining": u(0.1, 0.8), "study": u(0.1, 0.8),
    }  # fmt: skip


def blend_style(own, rng, heterogeneity):
    """A room's style: each trait the building's own with this probability, else drawn anew."""
    fresh = draw_style(rng)
    return {key: own[key] if rng.random() < heterogeneity else fresh[key] for key in fresh}


KINDS = ("living", "kitchen", "bedroom", "bath", "dining", "study")
PROGRAM = {  # what a room is furnished with: against a wall, hung on it, standing free
    "living": (
        (f.couch, f.tv_stand, f.armchair, f.bookcase, f.floor_lamp, f.plant, f.sideboard, f.couch),
        (f.clock, f.picture, f.wall_shelf),
        (f.low_table, f.pouf, f.vase),
    ),
    "kitchen": (
        (f.counter, f.oven, f.refrigerator, f.counter, f.plant, f.chair),
        (f.clock, f.picture),
        (f.table,),
    ),
    "bedroom": (
        (f.bed, f.wardrobe, f.bookcase, f.tv_stand, f.plant, f.armchair, f.grandfather_clock),
        (f.clock, f.picture, f.wall_shelf),
        (f.pouf, f.vase),
    ),
    "bath": (
        (f.toilet, f.pedestal_sink, f.plant, f.pedestal_sink, f.wardrobe, f.vase),
        (f.clock, f.wall_shelf),
        (f.pouf,),
    ),
    "dining": (
        (f.sideboard, f.grandfather_clock, f.plant, f.bookcase, f.refrigerator, f.floor_lamp),
        (f.clock, f.picture),
        (f.table, f.vase),
    ),
    "study": (
        (f.desk, f.bookcase, f.bookcase, f.armchair, f.couch, f.grandfather_clock, f.plant),
        (f.clock, f.wall_shelf, f.picture),
        (f.desk, f.pouf),
    ),
}


def _plan(rng):
    """Rectangles of two to four rooms."""
    width, depth = 8.0 + 3.5 * rng.random(), 4.6 + 5.0 * rng.random()
    cut = width * (0.4 + 0.2 * rng.random())
    rects = []
    for x0, x1 in ((0.0, cut), (cut, width)):
        if depth > 7.0 or (x1 - x0) * depth > 32:
            y = depth * (0.4 + 0.2 * rng.random())
            rects += [(x0, 0.0, x1, y), (x0, y, x1, depth)]
        else:
            rects.append((x0, 0.0, x1, depth))
    return rects


def _open_walls(rooms, rng):
    """Doorways where rooms adjoin, windows in outer walls (coordinates along the wall)."""
    for i, a in enumerate(rooms):
        ax0, ay0, ax1, ay1 = a.rect
        for side, (line, u0, u1) in enumerate(
            ((ay0, ax0, ax1), (ax1, ay0, ay1), (ay1, ax0, ax1), (ax0, ay0, ay1))
        ):
            shared = False
            for j, b in enumerate(rooms):
                across = (b.rect[3], b.rect[0], b.rect[1], b.rect[2])[side]
                if i == j or abs(across - line) > 4 * WALL:
                    continue
                lo = max(u0, b.rect[side % 2])
                hi = min(u1, b.rect[2 + side % 2])
                shared = shared or hi - lo > 0.2
                if j > i and hi - lo > 1.4:
                    half = min(0.45 + 0.4 * rng.random(), (hi - lo) / 2 - 0.2)
                    mid = lo + half + 0.1 + (hi - lo - 2 * half - 0.2) * rng.random()
                    gap = (mid - half, mid + half, 0.0, 2.0 + 0.2 * rng.random())
                    a.openings[side].append(gap)
                    b.openings[(side + 2) % 4].append(gap)
            if not shared and rng.random() < 0.6:
                half = min(a.style["window_size"] / 2, (u1 - u0) / 2 - 0.4)
                mid = u0 + half + 0.3 + (u1 - u0 - 2 * half - 0.6) * rng.random()
                z0 = 0.85 + 0.3 * rng.random()
                z1 = min(a.height - 0.25, z0 + 0.9 + 0.5 * rng.random())
                a.openings[side].append((mid - half, mid + half, z0, z1))


def _slab(prims, lo, hi, material):
    center = tuple((p + q) / 2 for p, q in zip(lo, hi, strict=True))
    half = tuple((q - p) / 2 for p, q in zip(lo, hi, strict=True))
    prims.append(Prim(BOX, center, tuple(-h for h in half), half, f.BACKGROUND, material))


def _shell(room, top, kit, rng):
    """Floor, walls with their openings, ceiling or vault, baseboards, coves, window bars."""
    s, prims = room.style, kit.prims
    x0, y0, x1, y1 = room.rect
    dark = [c * s["wall2"] for c in s["wall"]]
    wall = kit.mat(s["wall"], dark, s["wall_pattern"], s["wall_scale"])
    trim = kit.mat((0.9, 0.89, 0.86))
    white = kit.mat((s["ceiling"],) * 3)
    floor = kit.mat(s["floor"], [c * 0.7 for c in s["floor"]], s["floor_pattern"], s["floor_scale"])
    t = WALL
    _slab(prims, (x0 - t, y0 - t, -0.1), (x1 + t, y1 + t, 0.0), floor)
    short = min(x1 - x0, y1 - y0)
    if s["vault"] > VAULTED:  # one barrel, or several side by side
        along = 0 if x1 - x0 > y1 - y0 else 1
        lo_edge, short = (y0, x0)[along], (y1 - y0, x1 - x0)[along]
        number = 1 if s["vault"] > 0.85 else max(2, round(short / 1.7))
        half = short / number / 2
        rise, reach = min(half, top - room.height - 0.05), (x1 - x0, y1 - y0)[along] / 2
        quad = [0.0, 0.0, 1 / (rise * rise), 0.0, -1.0]
        quad[1 - along] = 1 / (half * half)
        lo, hi = [-half * 1.001] * 3, [half * 1.001, half * 1.001, rise * 1.001]
        lo[along], hi[along], lo[2] = -reach - t, reach + t, -0.01
        for i in range(number):
            center = [(x0 + x1) / 2, (y0 + y1) / 2, room.height]
            center[1 - along] = lo_edge + (2 * i + 1) * half
            prims.append(Prim(QUADRIC, tuple(center), tuple(lo), tuple(hi), f.BACKGROUND, white,
                              IDENTITY, 0.0, tuple(quad)))  # fmt: skip
    else:
        _slab(prims, (x0 - t, y0 - t, room.height), (x1 + t, y1 + t, room.height + 0.1), white)
    _round_corners(room, top, wall, prims)
    for side in range(4):
        lengthwise = side % 2  # 0: along x, 1: along y
        a0, a1 = (x0 - t, x1 + t) if lengthwise == 0 else (y0 - t, y1 + t)
        line = (y0, x1, y1, x0)[side]
        sign = (-1, 1, 1, -1)[side]

        def piece(u0, u1, z0, z1, near, far, mat):
            n0, n1 = sorted((line + sign * near, line + sign * far))  # noqa: B023
            if lengthwise == 0:  # noqa: B023
                _slab(prims, (u0, n0, z0), (u1, n1, z1), mat)
            else:
                _slab(prims, (n0, u0, z0), (n1, u1, z1), mat)

        at = a0
        for u0, u1, z0, z1 in sorted(room.openings[side]):
            piece(at, u0, 0, top, 0, t, wall)
            piece(u0 - 0.01, u1 + 0.01, z1, top, 0, t, wall)
            frame, lip = 0.07, 0.008  # the frame stands a little proud of the reveal
            for v0, v1, w0, w1 in (
                (u0 - frame, u0 + lip, z0, z1), (u1 - lip, u1 + frame, z0, z1),
                (u0 - frame, u1 + frame, z1 - lip, z1 + frame),
            ):  # fmt: skip
                piece(v0, v1, w0, w1, -0.025, t, trim)
            if z0 > 0:
                piece(u0 - 0.01, u1 + 0.01, 0, z0, 0, t, wall)
                piece(u0 - frame, u1 + frame, z0 - frame, z0 + lip, -0.1, t, trim)
                mid = (u0 + u1) / 2
                piece(mid - 0.03, mid + 0.03, z0, z1, 0.01, t, trim)
                x, y = ((mid, line), (line, mid))[lengthwise]
                area = (u1 - u0) * (z1 - z0)
                room.windows.append(((x, y, (z0 + z1) / 2), SIDES[side][0], area))
            elif rng.random() < 0.2:
                _door_leaf(room, side, (u0, u1, z1), kit)
            at = u1
        piece(at, a1, 0, top, 0, t, wall)
        edges = [a0] + [v for o in sorted(room.openings[side]) if o[2] == 0 for v in o[:2]] + [a1]
        for u0, u1 in zip(edges[::2], edges[1::2], strict=True):
            piece(u0, u1, 0, 0.1, -0.02, 0, trim)
        if s["cove"] > 0.35 and s["vault"] <= VAULTED:
            r = 0.2 + 0.5 * (s["cove"] - 0.35)
            quad, lo, hi = [1 / (r * r)] * 3 + [0.0, -1.0], [0.0] * 3, [0.0, 0.0, r]
            k, n = lengthwise, 1 - lengthwise
            quad[k], lo[k], hi[k] = 0.0, -(a1 - a0) / 2, (a1 - a0) / 2
            lo[n], hi[n] = (0.0, r * 1.001) if sign > 0 else (-r * 1.001, 0.0)
            center = [0.0, 0.0, room.height - r]
            center[k], center[n] = (a0 + a1) / 2, line - sign * r
            prims.append(Prim(QUADRIC, tuple(center), tuple(lo), tuple(hi), f.BACKGROUND, white,
                              IDENTITY, 0.0, tuple(quad)))  # fmt: skip


def _round_corners(room, top, wall, prims):
    """Hollow quarter cylinders in the room's corners, where no opening is near."""
    x0, y0, x1, y1 = room.rect
    r = 0.25 + 0.5 * room.style["corner"]
    if room.style["corner"] < 0.35:
        return
    for x, y, sides in ((x0, y0, (0, 3)), (x1, y0, (0, 1)), (x1, y1, (2, 1)), (x0, y1, (2, 3))):
        at = (x, y)
        if any(
            o[0] - r - 0.1 < at[k] < o[1] + r + 0.1
            for k, side in enumerate(sides)
            for o in room.openings[side]
        ):
            continue
        sx, sy = (1 if x == x0 else -1), (1 if y == y0 else -1)
        lo = (-r * 1.001 if sx > 0 else 0.0, -r * 1.001 if sy > 0 else 0.0, 0.0)
        hi = (0.0 if sx > 0 else r * 1.001, 0.0 if sy > 0 else r * 1.001, top)
        center = (x + sx * r, y + sy * r, 0.0)
        prims.append(Prim(QUADRIC, center, lo, hi, f.BACKGROUND, wall, IDENTITY, 0.0, cylinder(r)))


def _door_leaf(room, side, opening, kit):
    """A door standing ajar, swung into the room from one jamb."""
    u0, u1, top = opening
    w, d, half = u1 - u0, kit.mat((0.88, 0.86, 0.82)), (u1 - u0) / 2

    def leaf(k):
        k.box(half, 0, 0.01, w, 0.045, top - 0.03, d)
        for z in (0.15, top * 0.55):
            k.box(half, 0, z, w * 0.7, 0.06, top * 0.36, k.tint((0.8, 0.78, 0.74)))
        for y in (-0.07, 0.07):
            k.egg(w - 0.08, y, 1.0, 0.035, 0.035, 0.035, k.mat((0.75, 0.65, 0.3)))

    line = (room.rect[1], room.rect[2], room.rect[3], room.rect[0])[side]
    x, y = ((u0, line), (line, u0), (u1, line), (line, u1))[side]
    kit.sub(leaf, x, y, 0.0, SIDES[side][1] + 3.141592654 + kit.u(1.2, 1.9))
    (ix, iy), aside = SIDES[side][0], 0.35
    room.taken.append(
        (min(x, x + ix * w) - aside * abs(iy), min(y, y + iy * w) - aside * abs(ix),
         max(x, x + ix * w) + aside * abs(iy), max(y, y + iy * w) + aside * abs(ix))
    )  # fmt: skip


def box_corners(p):
    """The eight world corners of a primitive's local box."""
    out = []
    for i in range(8):
        local = [(p.lo, p.hi)[(i >> k) & 1][k] for k in range(3)]
        world = unrotate(p.rotation, *local)
        out.append(tuple(a + b for a, b in zip(world, p.center, strict=True)))
    return out


def _free(room, rect, margin=0.04):
    x0, y0, x1, y1 = room.rect
    if rect[0] < x0 or rect[1] < y0 or rect[2] > x1 or rect[3] > y1:
        return False
    u0, v0, u1, v1 = rect[0] - margin, rect[1] - margin, rect[2] + margin, rect[3] + margin
    return all(
        u1 <= a or u0 >= c or v1 <= b or v0 >= d for a, b, c, d in room.taken + room.clear
    )


def group(prims, room, shadow=True):
    """A piece of furniture standing in room number ``room``; -1 for the shell of a building."""
    corners = np.array([c for p in prims for c in box_corners(p)])
    lo, hi = corners.min(0), corners.max(0)
    x, y, z = ((hi - lo) / 2).tolist()
    center = tuple(((lo + hi) / 2).tolist())
    return Group(prims, room, center, math.sqrt(x * x + y * y + z * z), shadow)


def _place(scene, index, kit, build, free=False):
    """Stand a piece against a wall (or free in the room) where there is space; else drop it."""
    room = scene.rooms[index]
    kit.prims = []
    w, d = build(kit)
    x0, y0, x1, y1 = room.rect
    for _ in range(20):
        if free:
            yaw = kit.pick((0.0, 1.570796327)) if kit.chance(0.7) else kit.u(0, 3)
            r = max(w, d) / 2
            x, y = kit.u(x0 + 0.7 + r, x1 - 0.7 - r), kit.u(y0 + 0.7 + r, y1 - 0.7 - r)
            rect = (x - r, y - r, x + r, y + r)
            margin = 0.25
        else:
            side = int(kit.rng.integers(4))
            yaw, along = SIDES[side][1], side % 2
            lo, hi = ((x0, x1), (y0, y1))[along]
            if hi - lo < w + 0.1:
                continue
            u = kit.u(lo + w / 2 + 0.03, hi - w / 2 - 0.03)
            off = d / 2 + 0.03
            x, y = ((u, y0 + off), (x1 - off, u), (u, y1 - off), (x0 + off, u))[side]
            hw, hd = (w / 2, d / 2) if along == 0 else (d / 2, w / 2)
            rect, margin = (x - hw, y - hd, x + hw, y + hd), 0.04
        if _free(room, rect, margin):
            room.taken.append(rect)
            scene.groups.append(group(f.move(kit.prims, x, y, 0.0, yaw), index))
            return rect
    return None


def _hang(scene, index, kit, build):
    """Hang a piece on a wall, clear of openings and of what hangs there."""
    room = scene.rooms[index]
    kit.prims = []
    w, d = build(kit)
    x0, y0, x1, y1 = room.rect
    for _ in range(10):
        side = int(kit.rng.integers(4))
        lo, hi = ((x0, x1), (y0, y1))[side % 2]
        if hi - lo < w + 0.4:
            continue
        u = kit.u(lo + w / 2 + 0.1, hi - w / 2 - 0.1)
        blocked = [o[:2] for o in room.openings[side]] + room.hung[side]
        if any(u - w / 2 < b + 0.15 and u + w / 2 > a - 0.15 for a, b in blocked):
            continue
        room.hung[side].append((u - w / 2, u + w / 2))
        off, z = d / 2 + 0.005, kit.u(1.35, 1.7)
        x, y = ((u, y0 + off), (x1 - off, u), (u, y1 - off), (x0 + off, u))[side]
        scene.groups.append(group(f.move(kit.prims, x, y, z, SIDES[side][1]), index))
        return


def _furnish(scene, index, kit):
    room, s = scene.rooms[index], scene.rooms[index].style
    x0, y0, x1, y1 = room.rect
    for side, gaps in enumerate(room.openings):  # doorways and what is before windows stay clear
        for u0, u1, z0, _ in gaps:
            deep = 0.9 if z0 == 0 else 0.0
            room.clear.append(
                ((u0, y0, u1, y0 + deep), (x1 - deep, u0, x1, u1),
                 (u0, y1 - deep, u1, y1), (x0, u0, x0 + deep, u1))[side]
            )  # fmt: skip
    walls, hung, middle = PROGRAM[room.kind]
    area = (x1 - x0) * (y1 - y0)
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    for build in walls[:2]:
        _place(scene, index, kit, build)
    if kit.chance(0.8) and area > 9:
        rect = _place(scene, index, kit, middle[0], free=True)
        if rect and middle[0] is f.table:
            _chairs(scene, index, kit, rect)
    for build in walls[2:]:
        if kit.chance(s["clutter"]):
            _place(scene, index, kit, build)
    for _ in range(int(area * s["clutter"] / 1.6)):
        _place(scene, index, kit, kit.pick(walls))
    for build in middle[1:]:
        if kit.chance(0.6):
            _place(scene, index, kit, partial(build, size=1.6) if build is f.vase else build, True)
    if s["columns"] > 0.5:
        for _ in range(2):
            _place(scene, index, kit, partial(f.column, h=room.height + 0.3), kit.chance(0.4))
    for build in hung:
        if kit.chance(0.6):
            _hang(scene, index, kit, build)
    if kit.chance(0.6) and area > 8:
        kit.prims = []
        w, d = min(2.4, (x1 - x0) * 0.5), min(1.7, (y1 - y0) * 0.5)
        a, b = hsv(s["accent"], 0.5, 0.65), hsv(s["fabric"], 0.5, 0.45)
        kit.box(cx, cy, 0, w, d, 0.012, kit.mat(a, b, s["cloth"], 0.2))
        scene.groups.append(group(kit.prims, index, shadow=False))
    kit.prims = []
    drop = kit.u(0.35, 0.7)
    z = room.height - drop
    glow = kit.mat(s["lamp"], None, PLAIN, 0.3, 1.0)
    kit.cyl(cx, cy, z, 0.012, drop + 0.9, kit.mat((0.2, 0.2, 0.2)))
    if s["round"] > 0.5:
        kit.egg(cx, cy, z, 0.2, 0.2, 0.2 * kit.u(0.7, 1.0), glow)
    else:
        kit.taper(cx, cy, z - 0.1, 0.28, 0.1, 0.24, glow, cap=-1)
    room.lamp = (cx, cy, z - 0.3)
    scene.groups.append(group(kit.prims, index, shadow=False))


def _chairs(scene, index, kit, rect):
    """Chairs about a table, each facing it."""
    room = scene.rooms[index]
    x0, y0, x1, y1 = rect
    x0r, y0r, x1r, y1r = room.rect
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    gap = 0.12
    for x, y, yaw in (
        (cx, y1 - gap, 0.0), (x0 + gap, cy, 1.570796327),
        (cx, y0 + gap, 3.141592654), (x1 - gap, cy, 4.71238898),
    ):  # fmt: skip
        within = x0r + 0.3 < x < x1r - 0.3 and y0r + 0.3 < y < y1r - 0.3
        if kit.chance(0.85) and within:
            kit.prims = []
            f.chair(kit)
            prims = f.move(kit.prims, x, y, 0.0, yaw + kit.u(-0.2, 0.2))
            scene.groups.append(group(prims, index))
            room.taken.append((x - 0.3, y - 0.3, x + 0.3, y + 0.3))


def make_building(seed, index, heterogeneity=0.7):
    """Building ``index`` of the collection drawn from ``seed``.

    heterogeneity in [0, 1]: the probability with which each trait of each room is the building's
    own rather than a new draw from the distribution common to all buildings.
    """
    if not 0 <= heterogeneity <= 1:
        raise ValueError(f"heterogeneity must lie in [0, 1], not {heterogeneity}")
    own = draw_style(stream(seed, "style", index))
    rng = stream(seed, "building", index)
    materials, rooms = {}, []
    for rect in _plan(rng):
        style = blend_style(own, rng, heterogeneity)
        kinds = [kind for kind in KINDS if all(kind != room.kind for room in rooms)]
        left = rng.random() * sum(style[kind] for kind in kinds)
        for kind in kinds:
            left -= style[kind]
            if left < 0:
                break
        inner = (rect[0] + WALL, rect[1] + WALL, rect[2] - WALL, rect[3] - WALL)
        rooms.append(Room(inner, style["height"], kind, style))
    sky = (0.75 + 0.2 * rng.random(), 0.85 + 0.1 * rng.random(), 1.0)
    scene = Scene([], rooms, [], sky, seed, index)
    _open_walls(rooms, rng)
    top = max(room.height for room in rooms) + 1.2
    for room in rooms:
        kit = Kit(rng, room.style, materials)
        _shell(room, top, kit, rng)
        scene.groups.append(group(kit.prims, -1, shadow=False))
    for i, room in enumerate(rooms):
        _furnish(scene, i, Kit(rng, room.style, materials))
    scene.materials = list(materials)
    return scene


def look(position, yaw, pitch, tan, room=0):
    """Camera at ``position`` heading ``yaw`` from +x towards +y, ``pitch`` upwards, no roll."""
    (sy, cy), (sp, cp) = sincos(yaw), sincos(pitch)
    return Camera(
        position, (sy, -cy, 0.0), (cy * sp, sy * sp, -cp), (cy * cp, sy * cp, sp), tan, room
    )


def _spot(room, rng):
    """Where to stand: the freest of a dozen spots, rather towards the walls than in the middle."""
    x0, y0, x1, y1 = room.rect
    best, spot = None, None
    for _ in range(12):
        x = x0 + 0.35 + (x1 - x0 - 0.7) * rng.random()
        y = y0 + 0.35 + (y1 - y0 - 0.7) * rng.random()
        gap = min((max(a - x, x - c, b - y, y - d) for a, b, c, d in room.taken), default=1.0)
        edge = max(abs(x - (x0 + x1) / 2) / (x1 - x0), abs(y - (y0 + y1) / 2) / (y1 - y0))
        score = min(gap, 0.4) + 0.4 * edge + 0.15 * rng.random()
        if best is None or score > best:
            best, spot = score, (x, y)
    return spot


def _blocked(room, x, y, yaw):
    """Whether something or a wall stands right before a camera."""
    s, c = sincos(yaw)
    for ahead in (0.35, 0.7, 1.1):
        px, py = x + ahead * c, y + ahead * s
        if not (room.rect[0] < px < room.rect[2] and room.rect[1] < py < room.rect[3]):
            return True
        if ahead < 1 and any(a < px < c2 and b < py < d for a, b, c2, d in room.taken):
            return True
    return False


def make_cameras(scene, count):
    """``count`` poses as a list of (point, view, Camera).

    A point stands free in a room at 0.95 to 1.55 m; its views look towards pieces of furniture,
    large ones rather (one in eight anywhere), with pitch about 0 and fields of view about 61
    degrees. A pose depends on its point and view alone.
    """
    out, point = [], 0
    while len(out) < count:
        rng = stream(scene.seed, "camera", scene.index, point)
        room_index = point % len(scene.rooms)
        room = scene.rooms[room_index]
        x, y = _spot(room, rng)
        height = 0.95 + 0.6 * rng.random()
        goals = []
        for g in scene.groups:
            near = max(abs(g.center[0] - x), abs(g.center[1] - y)) < 0.9
            if g.room == room_index and not near and any(p.label > 1 for p in g.prims):
                goals.append(g)
        for view in range(max(1, min(count // 10, 3 + point % 2))):
            for _ in range(8):
                yaw, rise = round(6.283185307 * rng.random(), 6), 0.0
                aim, which, jitter = rng.random(), rng.random(), rng.random() - 0.5
                if goals and aim > 1 / 8:
                    left = which * sum(g.radius for g in goals)
                    for g in goals:
                        left -= g.radius
                        if left <= 0:
                            break
                    dx, dy = g.center[0] - x, g.center[1] - y
                    yaw = round(math.atan2(dy, dx) + 0.5 * jitter, 6)
                    rise = (g.center[2] - height) / math.sqrt(dx * dx + dy * dy)
                if not _blocked(room, x, y, yaw):
                    break
            pitch = 0.3 * (rng.random() + rng.random() + rng.random() - 1.5) - 0.03
            pitch = round(pitch + 0.4 * max(-0.6, min(0.3, rise)), 6)
            fov = 0.8 + 0.53 * rng.random()  # radians: 46 to 76 degrees
            s, c = sincos(fov / 2)
            camera = look((x, y, height), yaw, pitch, round(s / c, 9), room_index)
            if len(out) < count:
                out.append((point, view, camera))
        point += 1
    return out
