"""Clients of prepared buildings, and what their batches hold."""

import json
import os
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_taskonomy import SIZE, config, encoded, png, quietly, times, write

from mas_core.config import Data, UserError, stream
from mas_core.data.arrays import Record, open_array, read_json
from mas_core.data.clients import open_clients, open_data, split_indices
from mas_core.data.rooms.folder import ensure_rooms
from mas_core.tasks import DOMAINS, Task, TaskTable, decode_batch, domains_of

ALL = "sdnkterca"
NO_CACHE, CACHE = 0, 2**30


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
    train = data.views["train"][data.views["train"][:, 0] == 0, 1]
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
    for client in range(3):
        epochs = [list(data.epoch(client, ALL, 4, stream(0, "b"), device))
                  for data in (decoded, streamed)]  # fmt: skip
        assert len(epochs[0]) == max(1, decoded.count(client, "train") // 4)
        for one, other in zip(*epochs, strict=True):
            assert_equal(one, other)
            for name, tensor in tensors(one).items():
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
    expected = []
    for client, name in enumerate(data.names):
        rows = data.views[split][data.views[split][:, 0] == client, 1]
        expected.append(reference(three, name, [views_of(three, name)[i] for i in rows], ALL))
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
    monkeypatch.setattr(Image, "open", None)
    data = open_data(config(), three, "sd", NO_CACHE)
    for batch in data.epoch(0, "sd", 8, stream(0, "b"), "cpu"):
        batch.image.zero_()
    assert sum(len(batch) for batch in data.evaluation("train", "sd", 8, "cpu")) == 32 + 10 + 2
    assert times(three / "prepared") == before
    assert np.load(three / f"prepared/{SIZE}px/ann/rgb.npy").any()


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_a_client_without_views_of_a_split_gives_no_batches(three, cache_bytes):
    data = open_data(config(), three, "sd", cache_bytes=cache_bytes)
    data.views["val"] = data.views["val"][data.views["val"][:, 0] != 0]
    assert list(data.evaluation("val", "sd", 8, "cpu", client=0)) == []


def test_fingerprint_is_of_the_content_not_of_the_folder(three, tmp_path):
    here = open_data(config(), three, "sd")
    shutil.copytree(three, tmp_path / "copy", ignore=shutil.ignore_patterns("prepared"))
    for path in (tmp_path / "copy").rglob("*.png"):
        os.utime(path, (5, 5))
    quietly(tmp_path / "copy")
    assert open_data(config(), tmp_path / "copy", "sd").fingerprint == here.fingerprint
    other = open_data(config(), tmp_path / "copy", "kt")
    assert other.images == here.images and other.fingerprint != here.fingerprint
    assert open_data(config(2), three, "sd").fingerprint != here.fingerprint


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
    with pytest.raises(UserError, match="building ann of .* has 40 views; split='released' needs"):
        open_data(config(split="released"), three, "sd")
    with pytest.raises(UserError, match="opened for 'sd'"):
        open_data(config(), three, "sd").evaluation("val", "sdn", 4, "cpu")

    root = write(tmp_path / "few", {"b": 3}, domains=["rgb", "depth_zbuffer", "normal"])
    quietly(root, domains=["rgb", "depth_zbuffer", "normal"])
    assert open_data(config(1), root, "dna").letters == "dna"
    with pytest.raises(UserError, match=r"building b .* lacks domain keypoints2d \(tasks k\)"):
        open_data(config(1), root, "dk")
    array = root / f"prepared/{SIZE}px/b/normal.npy"
    array.write_bytes(array.read_bytes()[:-1])
    with pytest.raises(UserError, match="b/normal.npy is damaged .*; mas prepare repairs it"):
        open_data(config(1), root, "dn")
    tiny = write(tmp_path / "tiny", {"b": 2})
    quietly(tiny)
    with pytest.raises(UserError, match="no val views"):
        open_data(config(1), tiny, "sd")


DAMAGES = [b"", b"{", b"[1]", b"3", b'"a"', b"\xff\xfe", b"[" * 9999, None]
FILES = ("b/views.json", "summary.json", "b/rgb.npy")
DAMAGED = [(file, content) for file in FILES for content in DAMAGES]
DAMAGED += [
    ("b/rgb.npy", b"PK\x03\x04"),
    ("b/rgb.npy", b"\x93NUMPY\x01\x00\x10\x00{'a': (1\n" + b" " * 9),
    ("b/views.json", b'{"views": [[1, 99999999999999999999]]}'),
    ("summary.json", b'{"buildings": [1]}'),
]


@pytest.mark.parametrize("file, content", DAMAGED)
def test_a_damaged_file_is_named_and_prepare_mends_it(tmp_path, file, content):
    root = write(tmp_path, {"b": 3}, views=1)
    fingerprint = open_data(config(1), quietly(root).folder, "sd").fingerprint
    path = root / f"prepared/{SIZE}px" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    missing = file == "summary.json" and content is None
    told = "is not prepared at .*; run: mas prep" if missing else f"{file} is damaged .*; mas prep"
    with pytest.raises(UserError, match=rf"\A.*{told}.*\Z"):  # in one line
        open_data(config(1), root, "sd")
    assert quietly(root).rebuilt == (("b",) if file.startswith("b") else ())
    assert open_data(config(1), root, "sd").fingerprint == fingerprint


def test_what_may_not_be_read_is_not_called_damaged(three, monkeypatch):
    folder = three / f"prepared/{SIZE}px/ann"
    record = read_json(folder / "views.json", Record)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "a file")

    monkeypatch.setattr(np.lib.format, "open_memmap", refuse)
    with pytest.raises(PermissionError):
        open_array(folder, "rgb", record, SIZE, "uint8x3")
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(PermissionError):
        read_json(folder / "views.json", Record)


def test_a_flipped_bit_is_found_once_a_process_and_prepare_mends_it(three, tmp_path, monkeypatch):
    root = shutil.copytree(three, tmp_path / "copy")
    path = root / f"prepared/{SIZE}px/bob/depth_zbuffer.npy"
    flipped = bytearray(path.read_bytes())
    flipped[-7] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="bob/depth_zbuffer.npy is damaged .its values are not"):
        open_data(config(), root, "d")
    assert open_data(config(1), root, "d").names == ["ann"]
    assert quietly(root).rebuilt == ("bob",)
    expected = open_data(config(), three, "d").fingerprint
    assert open_data(config(), root, "d").fingerprint == expected
    monkeypatch.setattr("mas_core.data.arrays.hashlib", None)
    # Verified before: it is not hashed again.
    record = read_json(path.parent / "views.json", Record)
    assert len(open_array(path.parent, "depth_zbuffer", record, SIZE, "uint16")) == 14


GRAY = TaskTable(  # 8-bit gray values, and five classes, in one encoding
    Task("g", "brightness", "bright", "uint8", 1, divisor=255.0),
    Task("p", "parts", "parts", "uint8", 5, classes=True),
    mask=None,
)


def test_another_table_of_tasks(tmp_path):
    rng = stream(0, "gray")
    stored = {
        "rgb": rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8),
        "bright": rng.integers(0, 256, (3, 32, 32), dtype=np.uint8),
        "parts": rng.integers(0, 5, (3, 32, 32), dtype=np.uint8),
    }
    for domain, images in stored.items():
        (tmp_path / domain / "b").mkdir(parents=True)
        for point, image in enumerate(images):
            Image.fromarray(image).save(png(tmp_path, domain, point))
    quietly(tmp_path, table=GRAY)
    assert quietly(tmp_path, table=GRAY).rebuilt == ()
    data = open_data(config(1, tasks=f"{__name__}:GRAY"), tmp_path, "gp")
    (batch,) = data.evaluation("test", "gp", 4, "cpu")
    row = int(data.views["test"][0, 1])
    assert batch.mask.all() and batch.table is GRAY
    blocks = stored["bright"][row].reshape(16, 2, 16, 2).sum((1, 3), dtype=int)
    gray = torch.from_numpy((blocks + 2) // 4)
    assert torch.equal((batch.targets["g"][0, 0] * 255).round().long(), gray)
    nearest = torch.from_numpy(stored["parts"][row][1::2, 1::2]).long()
    assert torch.equal(batch.targets["p"][0], nearest)
    Image.fromarray(np.full((32, 32), 5, np.uint8)).save(png(tmp_path, "parts", 1))
    with pytest.raises(UserError, match="class id 5, allowed: 0 to 4"):
        quietly(tmp_path, table=GRAY)
    Image.fromarray(stored["parts"][1]).save(png(tmp_path, "parts", 1))
    regression = TaskTable(Task("p", "parts", "parts", "uint8", 1), mask=None)
    assert quietly(tmp_path, domains=["rgb", "parts"], table=regression).rebuilt == ("b",)


def own_source(data, folder, letters):
    return SimpleNamespace(names=["one"], given=(data, folder, letters))


def no_source(data, folder, letters):
    """Does not return its clients."""


def test_a_source_outside_the_package_is_called(three):
    outside = Data(source=f"{__name__}:own_source", size=SIZE)
    assert open_clients(outside, "here", "dn").given == (outside, "here", "dn")
    with pytest.raises(UserError, match="no_source returned None, no clients with names"):
        open_clients(Data(source=f"{__name__}:no_source", size=SIZE), "here", "dn")
    assert ensure_rooms(outside, three) == three
    assert open_clients(config(), three, "sd").names == ["ann", "bob", "cat"]


def test_rooms_are_rendered_and_prepared_once(tmp_path):
    rooms = Data(size=16, buildings=2, views=3, render_seed=5)
    with pytest.raises(UserError, match="not exist.*mas render --out .*rooms --buildings 2 .*16"):
        ensure_rooms(rooms, tmp_path / "rooms", workers=1, progress=False)
    assert not (tmp_path / "rooms").exists()
    (tmp_path / "rooms").mkdir()
    folder = ensure_rooms(rooms, tmp_path / "rooms", workers=1, progress=False)
    before = times(folder)
    data = open_data(rooms, folder, ALL)
    assert len(data.names) == 2 and data.count(0, "train") > 0
    assert ensure_rooms(rooms, folder, progress=False) == folder and times(folder) == before
    with pytest.raises(UserError, match="rendered with seed=5"):
        ensure_rooms(Data(size=16, buildings=2, views=3), folder, progress=False)
    record = folder / "rooms.json"
    text = record.read_text()
    record.write_text(text.replace('"renderer_version": ', '"renderer_version": 1'))
    with pytest.raises(UserError, match="rendered with renderer_version=1"):
        ensure_rooms(rooms, folder, progress=False)
    for damaged in (b"", text[:40].encode(), b"[1]", b'{"size": "16"}', b"\xff{}", b"[" * 9999):
        record.write_bytes(damaged)
        with pytest.raises(UserError, match="rooms.json is damaged .*; delete .*rooms, the same"):
            ensure_rooms(rooms, folder, progress=False)
    record.unlink()
    for place in (folder, folder / "prepared" / "16px"):
        with pytest.raises(UserError, match="has no rooms.json.*data.source=taskonomy"):
            ensure_rooms(rooms, place, progress=False)
    with pytest.raises(UserError, match="--data"):
        ensure_rooms(config(), None)


FEW = TaskTable(Task("l", "luminance", "rgb", "uint8x3", 1))
UNLIKE = TaskTable(Task("l", "classes as numbers", "segment_semantic", "uint8", 1))


def test_rooms_prepared_for_other_tasks_have_all_that_standard_tasks_read(tmp_path):
    rooms = Data(size=16, buildings=2, views=3)
    for table, domains in (("FEW", set(DOMAINS)), ("UNLIKE", set(domains_of("l", UNLIKE)))):
        (tmp_path / table).mkdir()
        own = replace(rooms, tasks=f"{__name__}:{table}")
        folder = ensure_rooms(own, tmp_path / table, workers=1, progress=False)
        record = read_json(next(folder.glob("prepared/16px/*/views.json")), Record)
        assert set(record.domains) == domains
        assert len(open_data(own, folder, "l").names) == 2
    assert open_data(rooms, tmp_path / "FEW", ALL).letters == ALL
    with pytest.raises(UserError, match="lacks domain normal .*; to add domains: mas prepare --r"):
        open_data(rooms, folder, "n")


def test_threads_open_arrays_one_after_the_other(three, monkeypatch):
    """NumPy reads headers by `ast.literal_eval`, which two threads at once break in Python 3.11."""
    inside, most, real = [0], [0], np.lib.format.open_memmap

    def slow(*args, **options):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.005)
        inside[0] -= 1
        return real(*args, **options)

    monkeypatch.setattr(np.lib.format, "open_memmap", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert open_data(config(), three, "dn").names == ["ann", "bob", "cat"]
    assert most[0] == 1
