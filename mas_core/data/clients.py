"""Prepared buildings -> clients -> batches on the device.

`open_data` opens the arrays that `taskonomy.prepare` wrote; one building is one client. Training
opens no PNG: batches are rows of these arrays, decoded on the device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Data, UserError, outside, stream
from ..federated import Clients
from ..tasks import TASKS, Batch, TaskTable, check_tasks, decode_batch, domains_of
from .arrays import Record, Summary, hash_json, open_array, read_json
from .taskonomy import View

SPLITS = ("train", "val", "test")


def split_indices(
    views: Sequence[View], split: str, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Which of a building's views train, validate and test: sorted indices into `views`.

    "points"    80/10/10 by point, drawn from `rng`: all views of a point on one side, and at least
                one point on each side where there are three points
    "released"  the slices of the released code, in order of file names: val the first 100, test
                1000..1999, train all of them. Test images are training images. UserError for a
                building with less than 1001 views.
    """
    if split == "released":
        if len(views) < 1001:
            raise UserError(f"has {len(views)} views; split='released' needs 1001 or more, "
                            "split='points' takes any")  # fmt: skip
        by_name = sorted(range(len(views)), key=lambda i: "point_{}_view_{}_".format(*views[i]))
        chosen = {"train": by_name, "val": by_name[:100], "test": by_name[1000:2000]}
        return {part: np.sort(np.asarray(rows)) for part, rows in chosen.items()}
    of_view = np.asarray([point for point, _ in views], dtype=np.int64)
    points = rng.permutation(np.unique(of_view))
    held = max(1, (len(points) + 5) // 10) if len(points) >= 3 else 0
    sides = {"val": points[:held], "test": points[held : 2 * held], "train": points[2 * held :]}
    return {part: np.flatnonzero(np.isin(of_view, sides[part])) for part in SPLITS}


@dataclass
class FederatedData:
    """The buildings as clients, opened with `open_data`. Yields decoded batches on the device.

    Decoded views are kept on the device if they fit into `cache_bytes`; otherwise batches are
    gathered from the memory maps, one ahead. The batches are the same either way, to the bit.
    """

    names: list[str]  # clients in sorted order
    letters: str  # the tasks whose labels were opened
    size: int  # pixels
    fingerprint: str  # hash of what was opened: views, images and labels, on any machine
    images: str  # hash of views and images alone, equal for all task sets
    views: dict[str, np.ndarray] = field(repr=False)  # split -> (N, 2): client, row in its arrays
    arrays: list[dict[str, Tensor]] = field(repr=False)  # client -> domain -> memory-mapped
    cache_bytes: int
    table: TaskTable = field(default_factory=lambda: TASKS, repr=False)
    # split -> (N,): the client that has a view; None: that of its building.
    owners: dict[str, np.ndarray] | None = field(default=None, repr=False)
    _cache: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def count(self, client: int, split: str) -> int:
        """Number of views of a client in a split."""
        return len(self._rows(client, split))

    def _rows(self, client: int, split: str) -> np.ndarray:
        """A client's rows of `views[split]`, ascending."""
        owners = self.views[split][:, 0] if self.owners is None else self.owners[split]
        return np.flatnonzero(owners == client)

    def epoch(
        self, client: int, letters: str, batch_size: int, rng: np.random.Generator,
        device: torch.device | str,
    ) -> Iterator[Batch]:  # fmt: skip
        """One local epoch over a client's training views, half of them mirrored.

        Order and flips are drawn from `rng` by this call. Batches are full: leftover views are
        skipped this epoch. A client with less than one batch gives one batch of all it has.
        Within a batch, views are in stored order.
        """
        count = self.count(client, "train")
        order, flip = rng.permutation(count), rng.random(count) < 0.5
        full = count - count % batch_size if count >= batch_size else count
        steps = [np.sort(order[i : i + batch_size]) for i in range(0, full, batch_size)]
        own, mirrored = self._rows(client, "train"), len(self.views["train"])
        steps = [own[rows] + mirrored * flip[rows] for rows in steps]
        return self._batches("train", letters, torch.device(device), steps)

    def evaluation(
        self, split: str, letters: str, batch_size: int, device: torch.device | str,
        client: int | None = None,
    ) -> Iterator[Batch]:  # fmt: skip
        """All views of a split in order, of all clients or one; the last batch may be short."""
        rows = np.arange(len(self.views[split])) if client is None else self._rows(client, split)
        steps = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        return self._batches(split, letters, torch.device(device), steps)

    def _batches(
        self, split: str, letters: str, device: torch.device, steps: list[np.ndarray]
    ) -> Iterator[Batch]:
        """Batches of rows of `views[split]`; row N + i is row i mirrored."""
        if not set(letters) <= set(self.letters):
            raise UserError(f"tasks {letters!r} of data opened for {self.letters!r}")
        if self._decoded_bytes() > self.cache_bytes:
            arrays = {domain: self.arrays[0][domain] for domain in domains_of(letters, self.table)}
            largest = max(map(len, steps), default=0)
            # Two in turn, one read while the other fills: fresh memory costs more than the copy.
            buffers = cycle([
                {d: a.new_empty((largest, *a.shape[1:])) for d, a in arrays.items()}
                for _ in range(2)
            ])  # fmt: skip
            loaded = _one_ahead(lambda rows: self._encoded(split, rows, next(buffers)), steps)
            return (self._batch(self._decode(raw, letters, device, flip)) for raw, flip in loaded)
        whole = self._decoded_split(split, device)
        whole = {name: whole[name] for name in ("image", "mask", *letters)}
        indices = (torch.from_numpy(rows).to(device, non_blocking=True) for rows in steps)
        return (self._batch({n: t.index_select(0, i) for n, t in whole.items()}) for i in indices)

    def _encoded(
        self, split: str, rows: np.ndarray, buffers: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Rows as encoded, domain -> (B, size, size[, 3]), and which of them to mirror, (B,).

        They are written to the first B rows of `buffers`, domain by domain.
        """
        views = self.views[split]
        chosen = views[rows % len(views)]
        edges = [0, *(np.flatnonzero(np.diff(chosen[:, 0])) + 1), len(chosen)]  # of clients
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            at, arrays = torch.from_numpy(chosen[begin:end, 1]), self.arrays[chosen[begin, 0]]
            for domain, buffer in buffers.items():
                torch.index_select(arrays[domain], 0, at, out=buffer[begin:end])
        raw = {domain: buffer[: len(rows)] for domain, buffer in buffers.items()}
        return raw, torch.from_numpy(rows >= len(views))

    def _decoded_split(self, split: str, device: torch.device) -> dict[str, Tensor]:
        """All rows of a split (of training, the mirrored ones too) on the device, by tensor."""
        key = (split, str(device))
        if key not in self._cache:
            rows = np.arange(len(self.views[split]) * (2 if split == "train" else 1))
            chunks = np.array_split(rows, math.ceil(len(rows) / 256))
            buffers = {d: a.new_empty((256, *a.shape[1:])) for d, a in self.arrays[0].items()}
            encoded = (self._encoded(split, chunk, buffers) for chunk in chunks)
            parts = [self._decode(raw, self.letters, device, flip) for raw, flip in encoded]
            # Parts are dropped on the way, so that the split is not held twice.
            self._cache[key] = {
                name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])
            }
        return self._cache[key]

    def _decoded_bytes(self) -> int:
        """Bytes of all splits: float32 image, mask, targets (classes int64), training twice."""
        tasks = [self.table[a] for a in self.letters]
        channels = 4 + sum(2 if task.classes else task.channels for task in tasks)
        rows = sum(len(views) for views in self.views.values()) + len(self.views["train"])
        return rows * self.size**2 * channels * 4

    def _decode(
        self, raw: dict[str, Tensor], letters: str, device: torch.device, flip: Tensor
    ) -> dict[str, Tensor]:
        """decode_batch on the device, of arrays whose 16-bit values lie in signed integers.

        All tensors have the plain contiguous strides, so that what is computed from a batch
        does not depend on where it came from, down to the order of sums.
        """
        moved = {}
        for domain, array in raw.items():
            array = array.to(device)
            # PyTorch cannot index every unsigned type everywhere; the bits survive as signed ones.
            moved[domain] = array.to(torch.int32) & 0xFFFF if array.dtype == torch.int16 else array
        batch = decode_batch(
            moved, letters, flip.to(device) if flip.any() else None, self.table
        )
        tensors = {"image": batch.image, "mask": batch.mask, **batch.targets}
        # contiguous() leaves odd strides on sides of length one; view() does not.
        return {name: tensor.contiguous().view(tensor.shape) for name, tensor in tensors.items()}

    def _batch(self, tensors: dict[str, Tensor]) -> Batch:
        return Batch(tensors.pop("image"), tensors.pop("mask"), tensors, self.table)


def _one_ahead(load: Callable[[np.ndarray], Any], steps: list[np.ndarray]) -> Iterator[Any]:
    """load(step) for every step, the next one loading in a thread while one is used."""
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(load, step) for step in steps[:1]]
        for step in steps[1:]:
            ahead.append(pool.submit(load, step))
            yield ahead.pop(0).result()
        yield from (future.result() for future in ahead)


def open_clients(data: Data, folder: str | Path | None, letters: str) -> Clients:
    """The clients' data: prepared buildings, or a source outside the package (`data.source`).

    That is a function called as (data, folder, letters), which returns `federated.Clients`.
    """
    if ":" in data.source:
        clients = outside(data.source, Callable)(data, folder, letters)
        if not getattr(clients, "names", None):
            raise UserError(f"{data.source} returned {clients!r:.60}, no clients with names")
        return clients
    return open_data(data, folder, letters)


def open_data(
    data: Data, folder: str | Path, letters: str, cache_bytes: int = 2 * 2**30
) -> FederatedData:
    """Open the first `data.buildings` prepared buildings (in sorted order) for some tasks.

    folder   what was given to `prepare`, its out folder, or the <size>px folder itself
    letters  the tasks whose labels may be asked for

    Raises UserError for a folder that is missing, empty, not prepared at data.size, damaged, lacks
    a domain or has too few buildings.
    """
    table = outside(data.tasks, TaskTable)
    folder, needed = Path(folder), domains_of(check_tasks(letters, table), table)
    prepared = prepared_folder(folder, data.size)
    found = sorted(read_json(prepared / "summary.json", Summary).buildings)
    if len(found) < data.buildings:
        raise UserError(f"{folder} has {len(found)} buildings; {data.buildings} are asked for")
    names = found[: data.buildings]
    one = partial(_open_building, prepared, data.size, needed, table)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # opening reads every value, to verify it
        buildings = dict(zip(names, pool.map(one, names)))
    content, images = [], []
    places: dict[str, list[tuple[int, int]]] = {split: [] for split in SPLITS}
    for client, (name, (record, _)) in enumerate(buildings.items()):
        try:
            parts = split_indices(record.views, data.split, stream(data.split_seed, "split", name))
        except UserError as error:
            raise UserError(f"building {name} of {folder} {error}") from None
        for split in SPLITS:
            places[split] += [(client, view) for view in parts[split]]
        hashes = {domain: record.content[domain] for domain in needed}
        content.append([name, data.size, record.views, hashes])
        images.append([name, data.size, record.views, hashes[table.image]])
    for split in SPLITS:
        if not places[split]:
            raise UserError(f"{folder} has no {split} views: a building needs 3 points for that")
    return FederatedData(
        names, letters, data.size, hash_json(content), hash_json(images),
        {split: np.array(places[split]) for split in SPLITS},
        [arrays for _, arrays in buildings.values()], cache_bytes, table,
    )  # fmt: skip


def _open_building(
    prepared: Path, size: int, needed: Sequence[str], table: TaskTable, name: str
) -> tuple[Record, dict[str, Tensor]]:
    """What a building holds, and its arrays by domain, 16-bit values as signed integers."""
    record, arrays = read_json(prepared / name / "views.json", Record), {}
    lacking = [domain for domain in needed if domain not in record.content]
    if lacking:
        letters = "".join(a for a, task in table.items() if task.domain in lacking)
        raise UserError(f"building {name} of {prepared} lacks domain {', '.join(lacking)} (tasks "
                        f"{letters}); prepared are: {', '.join(record.content)}; to add domains: "
                        f"mas prepare --root FOLDER_OF_THE_IMAGES --size {size}")  # fmt: skip
    for domain in needed:
        array = open_array(prepared / name, domain, record, size, table.stored[domain])
        signed = array.view(np.int16) if array.dtype.itemsize == 2 else array
        arrays[domain] = torch.from_numpy(signed)
    return record, arrays


def prepared_folder(folder: Path, size: int) -> Path:
    """The <size>px folder of prepared buildings in `folder`; a UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist")
    if not any(folder.iterdir()):
        raise UserError(f"data folder {folder} is empty")
    for candidate in (folder / "prepared" / f"{size}px", folder / f"{size}px", folder):
        if candidate.name == f"{size}px" and (candidate / "summary.json").is_file():
            return candidate
    raise UserError(f"{folder} is not prepared at {size} px; "
                    f"run: mas prepare --root {folder} --size {size}")  # fmt: skip
