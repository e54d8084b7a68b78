"""The rooms: exact geometry, encodings, statistics, determinism and restart."""

import ast
import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mas_core.data.rooms as rooms
from mas_core.data.rooms import (
    DOMAINS,
    encode,
    make_building,
    make_cameras,
    render_rooms,
    render_view,
)
from mas_core.data.rooms import shapes as sh
from mas_core.data.rooms.labels import cast
from mas_core.data.rooms.render import view_counts
from mas_core.data.rooms.scene import Room, Scene, box_corners, draw_style, group, look, stream
from mas_core.data.rooms.shapes import intersect

REAL = Path(__file__).resolve().parents[2] / "shared" / "real_sample"
PLAIN = (0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.3, 0.0)
CHECKS = (1, (0.1, 0.1, 0.1), (0.9, 0.9, 0.9), 0.4, 0.0)
AHEAD = look((0.0, 0.0, 1.2), 0.0, 0.0, 0.6)  # towards +x: right is -y, down is -z


def toy(*prims, material=PLAIN):
    """A scene of these primitives alone, in one large room."""
    style = draw_style(stream(0, "toy"))
    room = Room((-9.0, -9.0, 9.0, 9.0), 3.0, "living", style)
    return Scene([group(list(prims), 0)], [room], [material], (0.8, 0.9, 1.0))


def pixel_rays(camera, size):
    u = ((np.arange(size) + 0.5) / size * 2 - 1) * camera.tan
    return np.broadcast_to(u[None, :], (size, size)), np.broadcast_to(u[:, None], (size, size))


def slab(x, half=50.0, thick=0.1):
    return sh.Prim(sh.BOX, (x + thick / 2, 0, 1.2), (-thick / 2, -half, -half),
                   (thick / 2, half, half))  # fmt: skip


def sphere(r=0.5, x=2.5, kind=sh.QUADRIC):
    if kind == sh.ROUND:
        return sh.Prim(kind, (x, 0.0, 1.2), (-r, -r, -r), (r, r, r), radius=r)
    b = 1.001 * r
    return sh.Prim(kind, (x, 0.0, 1.2), (-b, -b, -b), (b, b, b), quad=sh.ellipsoid(r, r, r))


@pytest.mark.parametrize("kind", [sh.QUADRIC, sh.ROUND])
def test_sphere_has_its_depth_normal_and_curvature(kind):
    r, far, size = 0.5, 2.5, 64
    got = render_view(toy(sphere(r, far, kind)), AHEAD, size)
    u, v = pixel_rays(AHEAD, size)
    a = 1 + u * u + v * v  # |z (u, v, 1) - (0, 0, far)|^2 = r^2
    disc = far * far - a * (far * far - r * r)
    inside = disc > 0
    z = (far - np.sqrt(np.maximum(disc, 0))) / a
    assert inside.sum() > 300
    assert np.array_equal(np.isfinite(got["depth"]), inside)
    assert np.allclose(got["depth"][inside], z[inside], atol=1e-7)
    n = np.stack([z * u, z * v, z - far], -1) / r
    assert np.allclose(got["normal"][inside], n[inside], atol=1e-6)
    assert np.allclose(got["curvature"][inside], 1 / r, atol=1e-5)


def test_plane_has_its_depth_normal_and_no_curvature():
    camera = look((0.0, 0.0, 1.5), 0.4, -0.3, 0.6)  # a floor seen from a pitched camera
    floor = sh.Prim(sh.BOX, (0, 0, -0.05), (-60, -60, -0.05), (60, 60, 0.05))
    got = render_view(toy(floor), camera, 48)
    u, v = pixel_rays(camera, 48)
    drop = -(camera.forward[2] + u * camera.right[2] + v * camera.down[2])
    seen = drop > 0.06
    assert seen.sum() > 1000
    assert np.allclose(got["depth"][seen], 1.5 / drop[seen], rtol=1e-9)
    up = np.array([camera.right[2], camera.down[2], camera.forward[2]])
    assert np.allclose(got["normal"][seen], up, atol=1e-8)
    assert not got["curvature"].any()


def test_cylinder_has_its_depth_normal_and_curvature():
    r, far, size = 0.4, 2.0, 64
    b = 1.001 * r
    column = sh.Prim(sh.QUADRIC, (far, 0, 0), (-b, -b, 0), (b, b, 9), quad=sh.cylinder(r))
    got = render_view(toy(column), AHEAD, size)
    u, v = pixel_rays(AHEAD, size)
    a = 1 + u * u
    disc = far * far - a * (far * far - r * r)
    inside = disc > 0
    z = (far - np.sqrt(np.maximum(disc, 0))) / a
    inside &= 1.2 - v * z > 0  # the column stands on the ground
    assert inside.sum() > 800
    assert np.allclose(got["depth"][inside], z[inside], atol=1e-7)
    n = np.stack([z * u, 0 * z, z - far], -1) / r
    assert np.allclose(got["normal"][inside], n[inside], atol=1e-6)
    assert np.allclose(got["curvature"][inside], [1 / r, 0], atol=1e-5)


def test_hollow_surfaces_curve_away_from_the_viewer():
    r = 3.0
    inside = sh.Prim(sh.QUADRIC, (0, 0, 0), (-3.1, -3.1, -9), (3.1, 3.1, 9), quad=sh.cylinder(r))
    got = render_view(toy(inside), AHEAD, 16)
    assert np.allclose(got["curvature"], [-1 / r, 0], atol=1e-6)
    assert (got["normal"][..., 2] < 0).all()


def test_rounded_box_is_flat_on_faces_and_bent_on_edges():
    half, r = 0.6, 0.2
    box = sh.Prim(sh.ROUND, (2.5, 0, 1.2), (-half,) * 3, (half,) * 3, radius=r)
    got = render_view(toy(box), AHEAD, 96)
    hit = np.isfinite(got["depth"])
    u, v = pixel_rays(AHEAD, 96)
    p = [got["depth"] * u, got["depth"] * v, got["depth"] - 2.5]
    q = [np.maximum(np.abs(x[hit]) - (half - r), 0) for x in p]  # distance to the inner box = r
    assert np.allclose(q[0] ** 2 + q[1] ** 2 + q[2] ** 2, r * r, atol=1e-6)
    bent = (q[0] > 1e-6).astype(int) + (q[1] > 1e-6) + (q[2] > 1e-6)
    assert set(np.unique(bent)) == {1, 2, 3}
    want = np.stack([(bent >= 2) / r, (bent == 3) / r], -1)
    assert np.allclose(got["curvature"][hit], want, atol=1e-6)


def test_curvature_is_encoded_by_its_saturating_response():
    r = 2.0  # at which the response is 1/sqrt(2); hollow: negative
    inside = sh.Prim(sh.QUADRIC, (0, 0, 0), (-2.1, -2.1, -9), (2.1, 2.1, 9), quad=sh.cylinder(r))
    got = encode(render_view(toy(inside), AHEAD, 32))["principal_curvature"]
    assert (got[..., 0] == round(255 * (0.5175 - 0.36 / math.sqrt(2)))).all()
    assert (got[..., 1] == 127).all()


def test_encodings_of_known_values():
    got = encode(render_view(toy(slab(3.0)), AHEAD, 32))
    assert set(got) == set(DOMAINS)
    assert (got["depth_zbuffer"] == 3 * 512).all()
    assert (got["normal"] == [127, 127, 0]).all()
    assert (got["principal_curvature"][..., :2] == [132, 127]).all()
    for domain, array in got.items():
        deep = domain in ("depth_zbuffer", "keypoints2d", "edge_texture", "edge_occlusion")
        gray = deep or domain == "segment_semantic"
        assert array.dtype == (np.uint16 if deep else np.uint8), domain
        assert array.shape == ((32, 32) if gray else (32, 32, 3)), domain
    sky = encode(render_view(toy(slab(-3.0)), AHEAD, 16))
    assert (sky["depth_zbuffer"] == 65535).all() and not sky["segment_semantic"].any()


@pytest.mark.parametrize("channel, weight", [(0, 77), (1, 150), (2, 29), (slice(None), 256)])
def test_texture_edges_measure_the_slope_of_luma(channel, weight):
    labels = render_view(toy(slab(3.0)), AHEAD, 64)
    labels["rgb"] = np.zeros((64, 64, 3), np.uint8)
    labels["rgb"][..., channel] = (3 * np.arange(64))[None, :].repeat(64, 0).reshape(
        (64, 64) + ((1,) if isinstance(channel, slice) else ())
    )
    got = encode(labels)
    sobel = 3 * weight / 256 * 8  # a slope per pixel, times the Sobel kernel's 1 2 1 and span 2
    assert (got["edge_texture"][:, 2:-2] == np.rint(sobel * 10)).all()
    assert not got["keypoints2d"].any()  # a ramp has no corner


def test_occlusion_edges_answer_depth_steps_and_not_texture():
    painted = encode(render_view(toy(slab(4.0), material=CHECKS), AHEAD, 64))
    assert painted["edge_texture"].mean() > 500
    assert np.ptp(painted["edge_occlusion"]) == 0
    tilted = look((0.0, 0.0, 1.2), 0.6, 0.2, 0.6)  # a grazed plane has no edges either
    assert np.ptp(encode(render_view(toy(slab(4.0)), tilted, 64))["edge_occlusion"]) == 0
    step = encode(render_view(toy(slab(4.0), slab(2.0, half=0.5)), AHEAD, 64))["edge_occlusion"]
    edge = round((1 - 0.5 / 2.0 / 0.6) * 32)  # first column of the near slab
    assert step[32, edge - 1 : edge + 1].min() > 300
    assert step[32, 32] < 30 and step[2, 2] < 30
    assert (step > 2 * step[32, 32]).mean() > 0.1  # spread, not a line


def test_one_views_points_have_the_same_depth_in_another_view():
    scene = make_building(3, 1)
    size, compared = 128, 0
    for _, _, ca in make_cameras(scene, 40)[:9:3]:
        aside = tuple(ca.position[k] + 0.3 * ca.right[k] + 0.1 * ca.down[k] for k in range(3))
        yaw = np.arctan2(ca.forward[1], ca.forward[0]) + 0.15
        cb = look(aside, float(yaw), -0.05, 0.65, ca.room)
        a, b = render_view(scene, ca, size), render_view(scene, cb, size)
        u, v = pixel_rays(ca, size)
        ok = np.isfinite(a["depth"]) & (np.arange(size * size).reshape(size, size) % 5 == 0)
        world = [
            ca.position[k]
            + a["depth"][ok] * (ca.forward[k] + u[ok] * ca.right[k] + v[ok] * ca.down[k])
            for k in range(3)
        ]
        x, y, z = (
            sum((world[k] - cb.position[k]) * axis[k] for k in range(3))
            for axis in (cb.right, cb.down, cb.forward)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            col = (x / z / cb.tan + 1) * size / 2 - 0.5
            row = (y / z / cb.tan + 1) * size / 2 - 0.5
        keep = (z > 0.1) & (col >= 0) & (row >= 0) & (col < size - 1) & (row < size - 1)
        col, row, z = col[keep], row[keep], z[keep]
        i, j = row.astype(int), col.astype(int)
        # Inverse depth is affine over a plane: interpolate it where four neighbours share one.
        hit = cast(scene, cb, size)[1]
        four = [(i, j), (i, j + 1), (i + 1, j), (i + 1, j + 1)]
        same = hit[i, j] >= 0
        for p in four:
            same &= (hit[p] == hit[i, j]) & (b["normal"][p] == b["normal"][i, j]).all(-1)
        same &= ~b["curvature"][i, j].any(-1)
        w = [1 / b["depth"][p][same] for p in four]
        fi, fj = (row - i)[same], (col - j)[same]
        there = 1 / ((w[0] * (1 - fj) + w[1] * fj) * (1 - fi) + (w[2] * (1 - fj) + w[3] * fj) * fi)
        # The ray to a point meets it, or something before it; never does it see through it.
        ray = [(world[k] - cb.position[k])[keep] for k in range(3)]
        first = np.min([intersect(p, cb.position, ray) for p in scene.prims], axis=0)
        assert first.max() < 1 + 1e-6
        seen = (first > 1 - 1e-6)[same]
        agree = np.abs(z[same] - there)[seen] < 1e-5
        assert agree.mean() > 0.98  # the rest are things thinner than B's pixels
        compared += int(agree.sum())
    assert compared > 1000


@pytest.fixture(scope="module")
def sample():
    """A few views of each of sixteen buildings at 32 px, stacked by domain."""
    views = []
    for index in range(16):
        scene = make_building(0, index)
        cameras = make_cameras(scene, 40)
        views += [encode(render_view(scene, cameras[i][2], 32)) for i in (0, 9, 18, 27, 36)]
    return {domain: np.stack([v[domain] for v in views]).astype(float) for domain in DOMAINS}


@pytest.mark.parametrize(
    "domain, channel, offset, scale",
    [
        ("depth_zbuffer", None, 1500, 1000),
        ("keypoints2d", None, 50, 100),
        ("edge_texture", None, 718, 1070),
        ("edge_occlusion", None, 56.0248, 239.1265),
        ("reshading", 0, 0.4962 * 255, 0.2846 * 255),
        ("principal_curvature", 0, 0.5175 * 255, 0.1373 * 255),
        ("principal_curvature", 1, 0.4987 * 255, 0.0359 * 255),
    ],
)
def test_statistics_are_near_the_normalisation_constants(sample, domain, channel, offset, scale):
    valid = sample["depth_zbuffer"] < 8192
    values = sample[domain] if channel is None else sample[domain][..., channel]
    z = (values[valid] - offset) / scale
    assert abs(z.mean()) < 0.4
    assert 0.5 < z.std() < 1.3


def test_views_show_furniture_and_rooms(sample):
    things = (sample["segment_semantic"] > 1).mean((1, 2))
    assert (things > 0.05).mean() > 0.8
    assert things.mean() > 0.15
    assert len(np.unique(sample["segment_semantic"])) >= 16
    assert (sample["depth_zbuffer"] < 8192).mean() > 0.9
    normal = (sample["normal"][sample["depth_zbuffer"] < 8192] - 127) / 127
    assert np.abs((normal**2).sum(-1) - 1).max() < 0.03
    assert normal[:, 2].max() < 0.65  # towards the camera, up to the field of view's obliqueness


def test_edges_and_keypoints_keep_their_means_from_32_to_256_pixels():
    means = []
    cameras = [(s, make_cameras(s, 20)[3][2]) for s in (make_building(0, i) for i in range(6))]
    for size in (32, 64, 256):
        views = [encode(render_view(s, c, size)) for s, c in cameras]
        means.append(
            [np.mean([v[d] for v in views]) for d in
             ("edge_occlusion", "edge_texture", "keypoints2d", "reshading", "principal_curvature")]
        )  # fmt: skip
    means = np.array(means)
    assert (means.max(0) / means.min(0) < [1.5, 1.5, 2.2, 1.02, 1.02]).all(), means


def normal_agreement(depth, normal):
    """Weight of x and y normals with the sign of minus the slope of inverse depth, less the rest.

    On a plane n . P = h < 0 (facing the camera), so 1/z = n . (u, v, 1) / h, whatever the scale
    of the depth and the lens.
    """
    w = np.where(depth < 65000, 1.0 / np.maximum(depth, 1.0), np.nan)
    n = (normal - 127.0) / 127.0
    out = []
    for axis, slope in ((0, w[1:-1, 2:] - w[1:-1, :-2]), (1, w[2:, 1:-1] - w[:-2, 1:-1])):
        slope = -slope / w[1:-1, 1:-1]
        inner = n[1:-1, 1:-1, axis]
        smooth = np.isfinite(slope) & (np.abs(slope) < 0.2)
        out.append((np.sign(slope[smooth]) * inner[smooth]).sum() / np.abs(inner[smooth]).sum())
    return out


def test_normals_point_right_down_forward_in_the_rooms(sample):
    scores = [normal_agreement(d, n) for d, n in zip(sample["depth_zbuffer"], sample["normal"],
                                                     strict=True)]  # fmt: skip
    assert np.mean(scores, axis=0).min() > 0.5


@pytest.mark.skipif(not REAL.is_dir(), reason="the real annotated sample is not here")
def test_normals_and_reshading_follow_the_real_sample():
    paths = sorted((REAL / "normal").rglob("*.png"))
    assert paths
    for path in paths:
        read = lambda d, p=path: np.array(  # noqa: E731
            Image.open(REAL / d / p.parent.name / p.name.replace("normal", d)), dtype=float
        )
        normal, size = read("normal"), 512
        assert min(normal_agreement(read("depth_zbuffer"), normal)) > 0.5
        assert np.median(normal[..., 2]) < 100  # towards the camera
        # Reshading is brightest where the surface faces the camera, with these signs only.
        u, v = pixel_rays(AHEAD, size)
        n = (normal - 127) / 127
        corr = {
            (sx, sy): np.corrcoef((-(sx * u * n[..., 0] + sy * v * n[..., 1] + n[..., 2])).ravel(),
                                  read("reshading")[..., 0].ravel())[0, 1]
            for sx in (1, -1) for sy in (1, -1)
        }  # fmt: skip
        assert max(corr, key=corr.get) == (1, 1)


def test_view_counts_spread_one_to_four_about_their_mean():
    counts = view_counts(32, 96, 0)
    assert max(counts) / min(counts) == pytest.approx(4, rel=0.05)
    assert np.mean(counts) == pytest.approx(96, rel=0.01)
    assert counts == view_counts(32, 96, 0) != view_counts(32, 96, 1)
    assert view_counts(1, 7, 0) == [7]


def test_cameras_share_points_and_look_about_level():
    poses = [c for i in range(8) for c in make_cameras(make_building(0, i), 60)]
    per_point = np.bincount([p for p, _, _ in poses[:60]])[:-1]  # the last point may be cut short
    assert set(per_point) <= {3, 4} and len(per_point) >= 15
    assert abs(np.mean([c.forward[2] for _, _, c in poses])) < 0.2
    assert all(c.right[2] == 0 for _, _, c in poses)  # no roll
    fov = np.degrees(2 * np.arctan([c.tan for _, _, c in poses]))
    assert 58 < fov.mean() < 64 and fov.std() > 5
    scene = make_building(0, 0)
    assert [c[2] for c in make_cameras(scene, 40)] == [c[2] for c in make_cameras(scene, 60)[:40]]


def test_heterogeneity_moves_the_spread_of_styles_between_buildings():
    def between(heterogeneity):
        """Share of the variance of wall colour and fabric hue that lies between buildings."""
        walls = [
            [[*room.style["wall"], room.style["fabric"]] for room in scene.rooms]
            for scene in (make_building(5, i, heterogeneity) for i in range(24))
        ]
        total = np.var(np.concatenate(walls), axis=0).sum()
        within = np.mean([np.var(w, axis=0).sum() for w in walls])
        return 1 - within / total

    low, mid, high = between(0.0), between(0.7), between(1.0)
    assert low < 0.6 and low < mid < high
    assert high == pytest.approx(1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        make_building(0, 0, 1.5)


def files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*.png"))}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("rooms")
    summary = render_rooms(root, buildings=2, views=5, size=32, seed=4, workers=1, progress=False)
    return root, summary


def test_files_lie_in_taskonomys_layout(rendered):
    root, summary = rendered
    names = files(root)
    assert summary["written"] == sum(summary["views"].values()) and summary["skipped"] == 0
    assert len(names) == 9 * summary["written"]
    assert "depth_zbuffer/room_00/point_0_view_0_domain_depth_zbuffer.png" in names
    modes = {d: Image.open(next((root / d / "room_00").glob("*.png"))).mode for d in DOMAINS}
    assert {modes[d] for d in ("rgb", "normal", "reshading", "principal_curvature")} == {"RGB"}
    assert {modes[d] for d in ("depth_zbuffer", "keypoints2d", "edge_texture", "edge_occlusion")} \
        == {"I;16"}  # fmt: skip
    assert modes["segment_semantic"] == "L"


def test_two_processes_write_the_same_bytes(rendered, tmp_path):
    render_rooms(tmp_path, buildings=2, views=5, size=32, seed=4, workers=2, progress=False)
    assert files(tmp_path) == files(rendered[0])


def test_restart_completes_what_is_missing_and_nothing_else(rendered):
    root, first = rendered
    before = files(root)
    gone = root / "normal" / "room_01" / "point_0_view_0_domain_normal.png"
    gone.unlink()
    kept = root / "rgb" / "room_00" / "point_0_view_0_domain_rgb.png"
    stamp = kept.stat().st_mtime_ns
    again = render_rooms(root, buildings=2, views=5, size=32, seed=4, workers=1, progress=False)
    assert again["written"] == 1 and again["skipped"] == first["written"] - 1
    assert kept.stat().st_mtime_ns == stamp
    assert files(root) == before


def test_other_seeds_other_pixels():
    views = [render_view(s, make_cameras(s, 1)[0][2], 16)["rgb"]
             for s in (make_building(0, 0), make_building(1, 0), make_building(0, 1))]  # fmt: skip
    assert not np.array_equal(views[0], views[1]) and not np.array_equal(views[0], views[2])


def test_folders_of_anything_else_are_refused(rendered, tmp_path):
    root, _ = rendered
    assert json.loads((root / "rooms.json").read_text())["renderer_version"] \
        == rooms.RENDERER_VERSION  # fmt: skip
    with pytest.raises(ValueError, match="another seed, size"):
        render_rooms(root, buildings=2, views=5, size=64, seed=5, progress=False)
    (tmp_path / "rgb").mkdir()
    with pytest.raises(ValueError, match="not rendered here"):
        render_rooms(tmp_path, buildings=1, views=1, size=32, progress=False)
    for wrong in ({"buildings": 0}, {"views": 0}, {"size": 8}, {"workers": 0},
                  {"heterogeneity": -0.1}, {"buildings": 1001}, {"views": 10**12},
                  {"views": math.inf}, {"size": 100_000}, {"size": 16.5}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            render_rooms(tmp_path / "new", **{"buildings": 1, "views": 1, "size": 32, **wrong})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", [b"", b'{"size": 3', b"[]", b"null", b'{"size": "a"}', b"\xff"])
def test_damaged_parameters_are_told(tmp_path, damage):
    (tmp_path / "rooms.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"\A.*rooms.json is damaged .*; delete .*\Z"):
        render_rooms(tmp_path, buildings=1, views=1, size=16, workers=1, progress=False)


def test_a_full_disk_is_told_with_its_path(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left on device: '.*point_0.*png'"):
        render_rooms(tmp_path, buildings=1, views=1, size=16, workers=1, progress=False)


def test_no_arithmetic_that_differs_between_processors():
    """No matrix product, no power, no library function but exact ones decides a pixel."""
    risky = {"dot", "matmul", "einsum", "exp", "log", "sin", "cos", "tan", "tanh", "power", "hypot",
             "arctan2", "sum", "mean", "convolve"}  # fmt: skip
    for path in Path(rooms.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.MatMult | ast.Pow), path.name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert not (node.value.id == "np" and node.attr in risky), (path.name, node.attr)


def test_rooms_need_no_torch():
    code = "import sys, mas_core.data.rooms; sys.exit('torch' in sys.modules)"
    root = Path(rooms.__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_bounding_spheres_hold_what_they_bound():
    for g in make_building(0, 2).groups:
        corners = np.array([c for p in g.prims for c in box_corners(p)])
        assert np.sqrt(((corners - g.center) ** 2).sum(1)).max() <= g.radius + 1e-9
