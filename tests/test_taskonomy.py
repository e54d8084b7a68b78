"""Reading Taskonomy folders and preparing them."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mas_core.config import Data, UserError, stream
from mas_core.data.clients import open_data
from mas_core.data.taskonomy import find_views, prepare, read_png, resize
from mas_core.tasks import DOMAINS, NUM_CLASSES, TASKS

SIZE = 16
REAL = Path(__file__).resolve().parents[2] / "shared" / "real_sample"


def encoded(domain, building, point, view, size=SIZE):
    """Random values of a domain's encoding, the same for the same view."""
    rng = stream(0, domain, building, point, view)
    if TASKS.stored[domain] == "uint8":
        return rng.integers(0, NUM_CLASSES, (size, size), dtype=np.uint8)
    if TASKS.stored[domain] == "uint8x3":
        return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    values = rng.integers(0, 12_000, (size, size), dtype=np.uint16)
    values[0, 0] = 65535
    return values


def folder_of(layout, domain, building):
    return {
        "release": Path(domain, building),
        "download": Path(domain, "taskonomy", building),
        "archives": Path(f"{building}_{domain}", domain),
    }[layout]


def write(root, buildings, layout="release", views=2, alias=False, domains=DOMAINS, size=SIZE):
    """A folder of PNGs; `buildings` gives the number of points of each, with `views` views."""
    for building, points in buildings.items():
        for domain in domains:
            folder = root / folder_of(layout, domain, building)
            folder.mkdir(parents=True)
            name = "segmentsemantic" if alias and domain == "segment_semantic" else domain
            for point in range(points):
                for view in range(views):
                    image = Image.fromarray(encoded(domain, building, point, view, size))
                    image.save(folder / f"point_{point}_view_{view}_domain_{name}.png")
    return root


def png(root, domain, point=0, view=0, building="b"):
    name = f"point_{point}_view_{view}_domain_{domain}.png"
    return root / folder_of("release", domain, building) / name


def quietly(root, size=SIZE, **more):
    return prepare(root, size, progress=False, **more)


def arrays(folder, building="b"):
    return {path.stem: np.load(path) for path in (folder / building).glob("*.npy")}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*[!k]")}


def config(buildings=3, **more):
    return Data(source="taskonomy", size=SIZE, buildings=buildings, **more)


# --- Finding, reading, resizing -------------------------------------------------------------------


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("layout", ["release", "download", "archives"])
def test_layouts_and_segmentation_names_give_the_same_arrays(tmp_path, layout, alias):
    root = write(tmp_path, {"b": 2, "b_2": 1}, layout, alias=alias)
    (root / folder_of(layout, "rgb", "b") / "._point_0_view_0_domain_rgb.png").write_text("junk")
    result = quietly(root)
    assert result.views == {"b": 4, "b_2": 2}
    for domain, array in arrays(result.folder).items():
        expected = [encoded(domain, "b", point, view) for point in (0, 1) for view in (0, 1)]
        assert array.dtype == expected[0].dtype
        assert np.array_equal(array, expected), domain


def test_layout_is_found_for_each_domain_by_itself(tmp_path):
    write(tmp_path, {"b": 1}, "archives", domains=DOMAINS[:3])
    write(tmp_path, {"b": 1}, "download", domains=DOMAINS[3:6])
    write(tmp_path, {"b": 1}, "release", domains=DOMAINS[6:])
    views = find_views(tmp_path, "b")
    assert list(views) == [(0, 0), (0, 1)] and set(views[0, 1]) == set(DOMAINS)
    assert find_views(tmp_path, "c") == {}


def test_two_files_for_one_view_are_an_error(tmp_path):
    write(tmp_path, {"b": 1}, "release")
    write(tmp_path, {"b": 1}, "archives", domains=["normal"])
    with pytest.raises(UserError, match="b_normal.*same view"):
        find_views(tmp_path, "b")


def test_16_bit_is_read_as_unsigned(tmp_path):
    values = np.array([[0, 1], [40_000, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    read = read_png(tmp_path / "x.png", "depth_zbuffer")
    assert read.dtype == np.uint16 and read.tolist() == [[0, 1], [40_000, 65_535]]


def test_images_are_averaged_over_area_exactly_and_rounded_half_up():
    image = np.array([[1, 2, 0, 0], [3, 4, 0, 2], [9, 9, 255, 255], [9, 9, 255, 254]])
    for dtype, domain in ((np.uint8, "rgb"), (np.uint16, "keypoints2d")):
        # means 2.5, 0.5, 9 and 254.75
        assert resize(image.astype(dtype), domain, 2).tolist() == [[3, 1], [9, 255]]
    # 3 -> 2: the middle counts half for either side: (2 * 0 + 9) / 3 and (9 + 2 * 65535) / 3
    row = np.array([[0, 9, 65535]] * 3, np.uint16)
    assert resize(row, "edge_texture", 2).tolist() == [[3, 43693]] * 2
    assert resize(row.T.copy(), "edge_texture", 2).tolist() == [[3, 3], [43693, 43693]]
    colours = np.stack([row, row // 257, row * 0], -1)
    assert np.array_equal(resize(colours, "edge_texture", 2)[..., 0], [[3, 43693]] * 2)


@pytest.mark.parametrize("source", [12, 15])
def test_area_means_equal_those_of_the_image_blown_up(source):
    image = encoded("normal", "b", 0, 0, source)
    large = image.repeat(6, 0).repeat(6, 1).astype(float)
    means = large.reshape(6, source, 6, source, 3).mean((1, 3))
    assert np.array_equal(resize(image, "normal", 6), np.floor(means + 0.5))


def test_classes_are_resized_by_nearest_neighbour():
    classes = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert resize(classes, "segment_semantic", 2).tolist() == [[5, 7], [13, 15]]
    assert resize(classes, "segment_semantic", 1).tolist() == [[10]]
    assert resize(classes[:3, :3], "segment_semantic", 2).tolist() == [[0, 2], [8, 10]]


def test_depth_is_averaged_over_valid_pixels_and_needs_half_of_them():
    none, last = 65535, 8191
    depth = np.array([[100, none, none, 8192], [none, 201, none, 7],
                      [last, last, 5, 6], [last, last, none, 8]], np.uint16)  # fmt: skip
    # half valid: (100 + 201) / 2; a quarter: invalid; whole; three of four: 19 / 3
    assert resize(depth, "depth_zbuffer", 2).tolist() == [[151, none], [last, 6]]


def test_equal_size_changes_nothing():
    for domain in DOMAINS:
        image = encoded(domain, "b", 0, 0)
        assert np.array_equal(resize(image, domain, SIZE), image)


# --- Preparing ------------------------------------------------------------------------------------


def break_a_checksum(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # inside the image data
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def empty(path):
    path.write_bytes(b"")


def save(values):
    return lambda path: Image.fromarray(values).save(path)


BREAKERS = {
    "broken checksum": ("rgb", break_a_checksum, "broken or no PNG"),
    "cut short": ("depth_zbuffer", cut, "broken or no PNG"),
    "empty": ("normal", empty, "broken or no PNG"),
    "missing": ("edge_texture", Path.unlink, "missing"),
    "8-bit depth": ("depth_zbuffer", save(np.zeros((SIZE, SIZE), np.uint8)), "L, must be 16-bit"),
    "16-bit classes": ("segment_semantic", save(np.zeros((SIZE, SIZE), np.uint16)), "be 8-bit"),
    "1-bit classes": ("segment_semantic", save(np.zeros((SIZE, SIZE), bool)), "1, must be 8-bit"),
    "transparent": ("rgb", save(np.zeros((SIZE, SIZE, 4), np.uint8)), "as RGBA, must be 8-bit RGB"),
    "class 18": ("segment_semantic", save(np.full((SIZE, SIZE), 18, np.uint8)), "class id 18"),
    "not square": ("rgb", save(np.zeros((SIZE, 20, 3), np.uint8)), "must be square"),
    "other size": ("normal", save(np.zeros((20, 20, 3), np.uint8)), "unlike the view's other"),
    "too small": ("reshading", save(np.zeros((8, 8, 3), np.uint8)), "less than the 16"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BREAKERS)
def test_a_bad_file_is_named_or_its_view_left_out_and_counted(tmp_path, kind):
    domain, spoil, message = BREAKERS[kind]
    root = write(tmp_path, {"b": 3}, views=1)
    spoil(png(root, domain, point=1))
    expected = rf"^1 files.*\n  .*point_1_view_0.*{domain}.*{message}"
    with pytest.raises(UserError, match=expected):
        quietly(root)
    assert list((root / "prepared").rglob("*.npy")) == []
    result = quietly(root, skip_broken=True)
    assert result.views == {"b": 2} and len(result.skipped["b"]) == 1
    for name, array in arrays(result.folder).items():
        assert np.array_equal(array, [encoded(name, "b", point, 0) for point in (0, 2)])
    summary = json.loads((result.folder / "summary.json").read_text())["buildings"]["b"]
    assert (summary["views"], summary["skipped_views"]) == (2, 1)
    assert quietly(root, skip_broken=True).rebuilt == ()
    with pytest.raises(UserError, match="point_1"):  # what was left out is not forgotten
        quietly(root)


def test_the_error_lists_ten_files_and_the_count(tmp_path):
    root = write(tmp_path, {"b": 12}, views=1)
    for point in range(12):
        empty(png(root, "rgb", point))
    with pytest.raises(UserError, match="^12 files") as error:
        quietly(root)
    assert str(error.value).count("domain_rgb") == 10 and "and 2 more" in str(error.value)
    with pytest.raises(UserError, match="^no building has a whole view; 12 files"):
        quietly(root, skip_broken=True)


def test_a_building_without_a_whole_view_is_left_out(tmp_path):
    root = write(tmp_path, {"a": 3, "b": 2}, views=1)
    for point in range(2):
        empty(png(root, "rgb", point))
    (root / "rgb" / "c").mkdir()
    with pytest.raises(UserError, match="^3 files.*--skip-broken"):
        quietly(root)
    result = quietly(root, skip_broken=True)
    assert result.views == {"a": 3} and set(result.skipped) == {"b", "c"}
    assert len(result.skipped["b"]) == 2 and result.skipped["c"] == ["building c has no images"]
    assert open_data(config(1), root, "sd").names == ["a"]
    assert [path.name for path in result.folder.parent.iterdir()] == [f"{SIZE}px"]


def test_names_of_buildings_are_names_and_nothing_else(tmp_path):
    """`taskonomy` is also a layout's folder; dots hide; brackets are no pattern."""
    names = {"taskonomy": 3, ".b": 4, "b[ab]": 5, "ba": 6, "b*": 3, "b?": 3}
    for layout in ("release", "download", "archives"):
        root = write(tmp_path / layout, names, layout, views=1, domains=DOMAINS[:2])
        (root / "rgb" / ".cache").mkdir(parents=True)  # hidden and without images: no building
        assert quietly(root, domains=DOMAINS[:2]).views == names
        assert quietly(root, domains=DOMAINS[:2]).rebuilt == ()


@pytest.mark.parametrize("number", [2**63 - 1, 2**63, 10**30])
def test_numbers_of_views_fit_into_64_bits(tmp_path, number):
    root = write(tmp_path, {"b": 3}, views=1)
    for domain in DOMAINS:
        path = png(root, domain)
        path.rename(path.with_name(path.name.replace("point_0", f"point_{number}")))
    if number < 2**63:
        quietly(root)
        assert open_data(config(1), root, "d").count(0, "train") == 1
        return
    with pytest.raises(UserError, match=f"b/point_{number}_view_0_domain_rgb.png: .*2.63"):
        quietly(root)


def test_a_full_disk_is_told_with_its_path_and_files_are_synchronised(tmp_path, monkeypatch):
    root = write(tmp_path, {"b": 3})
    synchronised, fsync = [], os.fsync

    def note(descriptor):
        synchronised.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*/b'"):
        quietly(root)
    assert not list((root / "prepared").rglob("*.npy"))
    monkeypatch.setattr(os, "fsync", note)
    quietly(root)
    arrays = [f"{domain}.npy" for domain in DOMAINS]
    assert synchronised == [*arrays, "views.json", "summary.json"]


def test_good_buildings_are_kept_when_another_is_broken(tmp_path):
    root = write(tmp_path, {"a": 3, "b": 3})
    empty(png(root, "rgb"))
    with pytest.raises(UserError, match="1 files"):
        quietly(root)
    with pytest.raises(UserError, match="not prepared"):
        open_data(config(1), root, "sd")
    Image.fromarray(encoded("rgb", "b", 0, 0)).save(png(root, "rgb"))
    assert quietly(root).rebuilt == ("b",)
    assert open_data(config(2), root, "sd").names == ["a", "b"]


def test_rerun_does_nothing_and_a_changed_source_is_noticed(tmp_path):
    root = write(tmp_path, {"a": 3, "b": 3})
    first = quietly(root)
    before = times(first.folder)
    assert first.rebuilt == ("a", "b")
    assert quietly(root).rebuilt == () and times(first.folder) == before
    fingerprint = open_data(config(2), root, "sd").fingerprint

    Image.fromarray(encoded("rgb", "another", 0, 0)).save(png(root, "rgb"))
    assert quietly(root).rebuilt == ("b",)
    assert np.array_equal(arrays(first.folder)["rgb"][0], encoded("rgb", "another", 0, 0))
    kept = {path: time for path, time in before.items() if path.parent.name == "a"}
    assert kept and kept.items() <= times(first.folder).items()
    assert open_data(config(2), root, "sd").fingerprint != fingerprint

    some = {"domains": DOMAINS[:3]}
    assert quietly(root, **some).rebuilt == () and len(arrays(first.folder)) == len(DOMAINS)
    png(root, "rgb", 2, 1).unlink()
    with pytest.raises(UserError, match="b/point_2_view_1_.*: its rgb is missing"):
        quietly(root)
    (first.folder / "a" / "rgb.npy").write_bytes(b"\x93NUMPY")  # cut short by a full disk
    assert quietly(root, skip_broken=True).rebuilt == ("a", "b")
    for domain in DOMAINS:
        shutil.rmtree(root / domain / "a")
    assert quietly(root, skip_broken=True).rebuilt == ()
    assert open_data(config(1), root, "sd").names == ["b"]


def test_any_number_of_threads_and_any_clock_give_the_same_files(tmp_path):
    root = write(tmp_path, {"a": 9, "b": 40, "c": 20}, views=2)
    for path in root.rglob("*.png"):
        os.utime(path, (1, 1))
    one = quietly(root, workers=1, size=5, out=tmp_path / "one")
    shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns("one"))
    many = quietly(tmp_path / "copy", workers=3, size=5, out=tmp_path / "many")
    assert len(list(one.folder.rglob("*.npy"))) == 3 * len(DOMAINS)
    for path in one.folder.rglob("*.npy"):
        other = many.folder / path.relative_to(one.folder)
        assert path.read_bytes() == other.read_bytes()


def test_requests_that_cannot_be_met(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        quietly(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no Taskonomy images.*<building>_<domain>"):
        quietly(tmp_path)
    root = write(tmp_path, {"b": 3}, domains=DOMAINS[:-1])
    with pytest.raises(UserError, match=f"lacks 1 domains: {DOMAINS[-1]}"):
        quietly(root)
    with pytest.raises(UserError, match="unknown domain 'rbg'; allowed: rgb, segment_semantic"):
        quietly(root, domains=["rbg"])
    write(root, {"c": 3}, domains=DOMAINS[-1:])
    with pytest.raises(UserError, match=f"b/point_0_view_0.*{DOMAINS[-1]} is missing"):
        quietly(root)
    (root / "rgb" / "d").mkdir()
    with pytest.raises(UserError, match="\n  building d has no images"):
        quietly(root, domains=DOMAINS[:2])
    (root / "rgb" / "d").rmdir()
    assert quietly(root, domains=DOMAINS[:2]).views == {"b": 6}  # c has nothing of these
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory: .*file"):
        quietly(root, domains=DOMAINS[:2], out=tmp_path / "file")


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real annotated sample")
def test_real_sample(tmp_path):
    there = [domain for domain in DOMAINS if (REAL / domain).is_dir()]
    with pytest.raises(UserError, match="lacks 3 domains: .*principal_curvature.*--domains rgb"):
        quietly(REAL, 64, out=tmp_path)
    result = quietly(REAL, 64, domains=there, out=tmp_path)
    assert len(there) == 6 and result.views == {"hm3d": 3} and result.skipped == {}
    data = open_data(Data(source="taskonomy", size=64, buildings=1), tmp_path, "dntera")
    assert [data.count(0, split) for split in ("train", "val", "test")] == [1, 1, 1]
    valid = 0
    for split in ("train", "val", "test"):
        (batch,) = data.evaluation(split, "dntera", 4, "cpu")
        depth = arrays(result.folder, "hm3d")["depth_zbuffer"][data.views[split][:, 1]]
        assert batch.image.shape == (1, 3, 64, 64)
        assert torch.equal(batch.mask[0, 0], torch.from_numpy((depth[0] < 8192).astype(np.float32)))
        valid += int(batch.mask.sum())
    assert 0 < valid < 64 * 64  # the sample's depth is at a scale of its own, mostly far
    with pytest.raises(UserError, match="lacks domain.*segment_semantic.*tasks s"):
        open_data(Data(source="taskonomy", size=64, buildings=1), tmp_path, "sd")
