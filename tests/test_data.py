"""Reading Taskonomy folders, preparing them, and what a client's batches hold."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mas_core import data as data_module
from mas_core.config import Data, UserError, stream
from mas_core.data import (
    ensure_rooms,
    find_views,
    open_data,
    prepare,
    read_png,
    resize,
    split_indices,
)
from mas_core.tasks import DOMAINS, NUM_CLASSES, STORED, decode_batch, domains_of

ALL = "sdnkterca"
SIZE = 16
REAL = Path(__file__).resolve().parents[2] / "shared" / "real_sample"
NO_CACHE, CACHE = 0, 2**30


def encoded(domain, building, point, view, size=SIZE):
    """Random values of a domain's encoding, the same for the same view."""
    rng = stream(0, domain, building, point, view)
    if STORED[domain] == "uint8":
        return rng.integers(0, NUM_CLASSES, (size, size), dtype=np.uint8)
    if STORED[domain] == "uint8x3":
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


def config(buildings=3, **more):
    return Data(source="taskonomy", size=SIZE, buildings=buildings, **more)


def arrays(folder, building="b"):
    return {path.stem: np.load(path) for path in (folder / building).glob("*.npy")}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def tensors(batch):
    return {"image": batch.image, "mask": batch.mask, **batch.targets}


def assert_equal(left, right):
    assert tensors(left).keys() == tensors(right).keys()
    for name, tensor in tensors(left).items():
        assert tensor.dtype == tensors(right)[name].dtype
        assert torch.equal(tensor, tensors(right)[name]), name


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three prepared buildings of 20, 7 and 3 points, two views each."""
    root = write(tmp_path_factory.mktemp("three"), {"cat": 3, "ann": 20, "bob": 7})
    quietly(root)
    return root


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
    views = find_views(tmp_path)
    assert list(views) == ["b"] and list(views["b"]) == [(0, 0), (0, 1)]
    assert set(views["b"][0, 1]) == set(DOMAINS)


def test_two_files_for_one_view_are_an_error(tmp_path):
    write(tmp_path, {"b": 1}, "release")
    write(tmp_path, {"b": 1}, "archives", domains=["normal"])
    with pytest.raises(UserError, match="b_normal.*same view"):
        find_views(tmp_path)


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
    "broken checksum": ("rgb", break_a_checksum, "broken PNG"),
    "cut short": ("depth_zbuffer", cut, "broken PNG"),
    "empty": ("normal", empty, "no PNG"),
    "missing": ("edge_texture", Path.unlink, "missing"),
    "8-bit depth": ("depth_zbuffer", save(np.zeros((SIZE, SIZE), np.uint8)), "8-bit gray.*16-bit"),
    "16-bit classes": ("segment_semantic", save(np.zeros((SIZE, SIZE), np.uint16)), "be 8-bit"),
    "transparent": ("rgb", save(np.zeros((SIZE, SIZE, 4), np.uint8)), "8-bit RGBA, must be 8-bit"),
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
    expected = rf"^1 files.*\n  .*point_1_view_0_domain_{domain}.*{message}"
    with pytest.raises(UserError, match=expected):
        quietly(root)
    assert list((root / "prepared").rglob("*.npy")) == []
    result = quietly(root, skip_broken=True)
    assert result.views == {"b": 2} and len(result.skipped["b"]) == 1
    for name, array in arrays(result.folder).items():
        assert np.array_equal(array, [encoded(name, "b", point, 0) for point in (0, 2)])
    summary = json.loads((result.folder / "summary.json").read_text())["buildings"]["b"]
    assert (summary["views"], summary["points"], summary["skipped_views"]) == (2, 2, 1)
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
    with pytest.raises(UserError, match="^12 files"):  # nothing would be left
        quietly(root, skip_broken=True)


def test_good_buildings_are_kept_when_another_is_broken(tmp_path):
    root = write(tmp_path, {"a": 3, "b": 3})
    empty(png(root, "rgb"))
    with pytest.raises(UserError, match="1 files"):
        quietly(root)
    with pytest.raises(UserError, match="not prepared"):
        open_data(config(1), root, "sd")
    assert quietly(root, buildings=["a"]).rebuilt == ()
    assert open_data(config(1), root, "sd").names == ["a"]


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
    with pytest.raises(UserError, match="point_2_view_1_domain_rgb.png: missing"):
        quietly(root)
    (first.folder / "a" / "rgb.npy").write_bytes(b"\x93NUMPY")  # cut short by a full disk
    assert quietly(root, skip_broken=True).rebuilt == ("a", "b")


def test_any_number_of_threads_and_any_clock_give_the_same_files(tmp_path):
    root = write(tmp_path, {"b": 40}, views=2)
    for path in root.rglob("*.png"):
        os.utime(path, (1, 1))
    one = quietly(root, workers=1, size=5, out=tmp_path / "one")
    shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns("one"))
    many = quietly(tmp_path / "copy", workers=3, size=5, out=tmp_path / "many")
    for path in one.folder.rglob("*.npy"):
        other = many.folder / path.relative_to(one.folder)
        assert path.read_bytes() == other.read_bytes()


def test_requests_that_cannot_be_met(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        quietly(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no Taskonomy images.*<building>_<domain>"):
        quietly(tmp_path)
    root = write(tmp_path, {"b": 3}, domains=DOMAINS[:-1])
    with pytest.raises(UserError, match="has no building c; it has b"):
        quietly(root, buildings=["b", "c"], domains=DOMAINS[:2])
    with pytest.raises(UserError, match=f"lacks 1 domains: {DOMAINS[-1]}"):
        quietly(root)
    with pytest.raises(UserError, match="unknown domains rbg"):
        quietly(root, domains=["rbg"])
    write(root, {"c": 3}, domains=DOMAINS[-1:])
    with pytest.raises(UserError, match=f"building b has no {DOMAINS[-1]}"):
        quietly(root)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        quietly(root, domains=DOMAINS[:2], buildings=["b"], out=tmp_path / "file")


# --- Splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "points, sizes",
    {3: (1, 1, 1), 10: (8, 1, 1), 14: (12, 1, 1), 15: (11, 2, 2), 100: (80, 10, 10),
     2: (2, 0, 0)}.items(),
)  # fmt: skip
def test_split_by_point(points, sizes):
    views = [(7 * point, view) for point in range(points) for view in range(1 + point % 3)]
    parts = split_indices(views, "points", stream(0, "split", "b"))
    sides = [{views[i][0] for i in parts[part]} for part in ("train", "val", "test")]
    assert tuple(map(len, sides)) == sizes
    assert sides[0] | sides[1] | sides[2] == {point for point, _ in views}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(views)))
    again = split_indices(views, "points", stream(0, "split", "b"))
    assert all(np.array_equal(parts[part], again[part]) for part in parts)


def test_the_split_depends_on_the_seed():
    views = [(point, 0) for point in range(100)]
    parts = [split_indices(views, "points", stream(seed, "split", "b"))["test"] for seed in (0, 1)]
    assert not np.array_equal(*parts)


def test_released_slices_overlap_and_follow_file_names():
    views = [(point, 0) for point in range(2500)]
    parts = split_indices(views, "released", stream(0, "split", "b"))
    assert parts["train"].tolist() == list(range(2500))
    names = sorted(f"point_{point}_view_0_domain_rgb.png" for point in range(2500))
    for part, files in (("val", names[:100]), ("test", names[1000:2000])):
        assert parts[part].tolist() == sorted(int(name.split("_")[1]) for name in files)
    with pytest.raises(UserError, match="1000 views.*1001 or more"):
        split_indices(views[:1000], "released", stream(0, "split", "b"))


# --- Batches --------------------------------------------------------------------------------------


def reference(root, building, views, letters, flip=None):
    """decode_batch of the PNGs' own values."""
    raw = {
        domain: torch.from_numpy(np.stack([encoded(domain, building, *view) for view in views]))
        for domain in domains_of(letters)
    }
    return decode_batch(raw, letters, None if flip is None else torch.from_numpy(flip))


def views_of(root, building):
    return json.loads((root / f"prepared/{SIZE}px/{building}/views.json").read_text())["views"]


@pytest.mark.parametrize("cache_bytes", [CACHE, NO_CACHE])
def test_epoch_equals_decoding_what_was_drawn(three, cache_bytes):
    data = open_data(config(), three, ALL, cache_bytes)
    assert data.names == ["ann", "bob", "cat"]
    assert [data.count(0, split) for split in ("train", "val", "test")] == [32, 4, 4]
    train = data.indices[0]["train"]
    rng = stream(3, "batches")
    order, flip = rng.permutation(32), rng.random(32) < 0.5
    assert flip.any() and not flip.all()
    batches = list(data.epoch(0, "tsna", 10, stream(3, "batches"), "cpu"))
    assert [len(batch) for batch in batches] == [10, 10, 10]  # two views sit out
    for step, batch in enumerate(batches):
        rows = np.sort(order[10 * step : 10 * step + 10])
        views = [views_of(three, "ann")[i] for i in train[rows]]
        assert list(batch.targets) == list("tsna")
        assert_equal(batch, reference(three, "ann", views, "tsna", flip[rows]))
        plain = reference(three, "ann", views, "tsna")
        for i in np.flatnonzero(flip[rows]):  # mirrored: the x of normals points the other way
            assert torch.equal(batch.image[i], plain.image[i].flip(-1))
            assert torch.equal(batch.targets["n"][i, 0], -plain.targets["n"][i, 0].flip(-1))
            assert torch.equal(batch.targets["n"][i, 1:], plain.targets["n"][i, 1:].flip(-1))


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_batches_are_the_same_with_and_without_a_cache(three, device):
    decoded, streamed = (open_data(config(), three, ALL, size) for size in (CACHE, NO_CACHE))
    fits = sum(array.nbytes for part in decoded.arrays for array in part.values())
    as_encoded = open_data(config(), three, ALL, fits)
    for client in range(3):
        epochs = [list(data.epoch(client, ALL, 4, stream(0, "b"), device))
                  for data in (decoded, as_encoded, streamed)]  # fmt: skip
        assert len(epochs[0]) == max(1, decoded.count(client, "train") // 4)
        for batches in zip(*epochs, strict=True):
            for other in batches[1:]:
                assert_equal(batches[0], other)
                for name, tensor in tensors(batches[0]).items():
                    assert tensor.stride() == tensors(other)[name].stride()


def test_order_and_flips_are_drawn_at_once_and_only_from_the_stream_given(three):
    data = open_data(config(), three, "sd")
    rng = stream(0, "b")
    epoch = data.epoch(0, "sd", 8, rng, "cpu")
    state = rng.bit_generator.state
    torch.manual_seed(1)
    first = list(epoch)
    assert rng.bit_generator.state == state
    for one, two in zip(first, data.epoch(0, "sd", 8, stream(0, "b"), "cpu"), strict=True):
        assert_equal(one, two)
    other = list(data.epoch(0, "sd", 8, stream(1, "b"), "cpu"))
    assert not torch.equal(first[0].image, other[0].image)


@pytest.mark.parametrize("cache_bytes", [CACHE, NO_CACHE])
def test_a_small_client_gives_one_batch_of_all_it_has(three, cache_bytes):
    data = open_data(config(), three, "sd", cache_bytes)
    assert data.count(2, "train") == 2
    (batch,) = data.epoch(2, "sd", 16, stream(0, "b"), "cpu")
    assert len(batch) == 2


@pytest.mark.parametrize("cache_bytes", [CACHE, NO_CACHE])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_evaluation_gives_every_view_in_order_unflipped(three, split, cache_bytes):
    data = open_data(config(), three, ALL, cache_bytes)
    expected = [
        reference(three, name, [views_of(three, name)[i] for i in data.indices[client][split]], ALL)
        for client, name in enumerate(data.names)
    ]
    batches = list(data.evaluation(split, ALL, 5, "cpu"))
    assert [len(batch) for batch in batches[:-1]] == [5] * (len(batches) - 1)
    for name in tensors(batches[0]):
        whole = torch.cat([tensors(batch)[name] for batch in batches])
        assert torch.equal(whole, torch.cat([tensors(batch)[name] for batch in expected]))
    alone = list(data.evaluation(split, ALL, 100, "cpu", client=1))
    assert len(alone) == 1
    assert_equal(alone[0], expected[1])


def test_the_mask_of_65535_and_8192_is_zero(tmp_path):
    root = write(tmp_path, {"b": 3}, views=1)
    depth = np.full((SIZE, SIZE), 8191, np.uint16)
    depth[0, :3] = 65535, 8192, 32768
    for point in range(3):
        Image.fromarray(depth).save(png(root, "depth_zbuffer", point))
    quietly(root)
    for cache_bytes in (CACHE, NO_CACHE):
        (batch,) = open_data(config(1), root, "d", cache_bytes).evaluation("test", "d", 4, "cpu")
        assert batch.mask[0, 0, 0, :4].tolist() == [0, 0, 0, 1] and batch.mask.sum() == 253
        decoded = [(value - 1500) / 1000 for value in (65535, 8192, 32768, 8191)]
        assert batch.targets["d"][0, 0, 0, :4].tolist() == pytest.approx(decoded, rel=1e-6)


def test_training_opens_no_png_and_changes_no_array(three, monkeypatch):
    before = times(three / "prepared")
    monkeypatch.setattr(data_module, "read_png", None)
    monkeypatch.setattr(Image, "open", None)
    data = open_data(config(), three, "sd", NO_CACHE)
    for batch in data.epoch(0, "sd", 8, stream(0, "b"), "cpu"):
        batch.image.zero_()
    assert sum(len(batch) for batch in data.evaluation("train", "sd", 8, "cpu")) == 32 + 10 + 2
    assert times(three / "prepared") == before
    assert np.load(three / f"prepared/{SIZE}px/ann/rgb.npy").any()


def test_fingerprint_is_of_the_content_not_of_the_folder(three, tmp_path):
    here = open_data(config(), three, "sd").fingerprint
    shutil.copytree(three, tmp_path / "copy", ignore=shutil.ignore_patterns("prepared"))
    for path in (tmp_path / "copy").rglob("*.png"):
        os.utime(path, (5, 5))
    quietly(tmp_path / "copy")
    assert open_data(config(), tmp_path / "copy", "kt").fingerprint == here
    assert open_data(config(2), three, "sd").fingerprint != here


# --- Opening --------------------------------------------------------------------------------------


def test_open_takes_the_root_the_out_folder_or_the_size_folder(three):
    for folder in (three, three / "prepared", three / "prepared" / f"{SIZE}px"):
        assert open_data(config(2), folder, "sd").names == ["ann", "bob"]


def test_open_says_what_is_wrong(three, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_data(config(), tmp_path / "nowhere", "sd")
    with pytest.raises(UserError, match="is empty"):
        open_data(config(), tmp_path, "sd")
    with pytest.raises(UserError, match="not prepared at 32 px; run: mas prepare --root .* 32$"):
        open_data(Data(source="taskonomy", size=32, buildings=3), three, "sd")
    with pytest.raises(UserError, match="has 3 buildings; 32 are asked for"):
        open_data(config(32), three, "sd")
    with pytest.raises(UserError, match="unknown task 'x'"):
        open_data(config(), three, "sx")
    with pytest.raises(UserError, match="building ann has 40 views; split='released' needs"):
        open_data(config(split="released"), three, "sd")
    with pytest.raises(UserError, match="opened for 'sd'"):
        open_data(config(), three, "sd").evaluation("val", "sdn", 4, "cpu")

    root = write(tmp_path / "few", {"b": 3}, domains=["rgb", "depth_zbuffer", "normal"])
    quietly(root, domains=["rgb", "depth_zbuffer", "normal"])
    assert open_data(config(1), root, "dna").letters == "dna"
    with pytest.raises(UserError, match=r"lacks domain keypoints2d of building b \(tasks k\)"):
        open_data(config(1), root, "dk")
    array = root / f"prepared/{SIZE}px/b/normal.npy"
    array.write_bytes(array.read_bytes()[:-1])
    with pytest.raises(UserError, match="b is damaged .*mas prepare --root"):
        open_data(config(1), root, "dn")
    tiny = write(tmp_path / "tiny", {"b": 2})
    quietly(tiny)
    with pytest.raises(UserError, match="no val views"):
        open_data(config(1), tiny, "sd")


def test_rooms_are_rendered_and_prepared_once(tmp_path):
    rooms = Data(size=16, buildings=2, views=3, render_seed=5)
    folder = ensure_rooms(rooms, tmp_path / "rooms", workers=1, progress=False)
    before = times(folder)
    data = open_data(rooms, folder, ALL)
    assert len(data.names) == 2 and data.count(0, "train") > 0
    assert ensure_rooms(rooms, folder, progress=False) == folder and times(folder) == before
    with pytest.raises(UserError, match="rendered with seed=5"):
        ensure_rooms(Data(size=16, buildings=2, views=3), folder, progress=False)
    with pytest.raises(UserError, match="--data"):
        ensure_rooms(config(), None)


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
        depth = arrays(result.folder, "hm3d")["depth_zbuffer"][data.indices[0][split]]
        assert batch.image.shape == (1, 3, 64, 64)
        assert torch.equal(batch.mask[0, 0], torch.from_numpy((depth[0] < 8192).astype(np.float32)))
        valid += int(batch.mask.sum())
    assert 0 < valid < 64 * 64  # the sample's depth is at a scale of its own, mostly far
    with pytest.raises(UserError, match="lacks domain.*segment_semantic.*tasks s"):
        open_data(Data(source="taskonomy", size=64, buildings=1), tmp_path, "sd")
