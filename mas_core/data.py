"""Buildings on disk -> verified, memory-mapped arrays -> clients -> batches on the device.

`prepare` decodes every PNG of a Taskonomy folder once. `open_data` opens what it wrote: one
building is one client. Training reads arrays only and decodes them on the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .config import Data, UserError, stream
from .tasks import (
    DEPTH_DOMAIN,
    DOMAINS,
    INPUT_DOMAIN,
    MAX_DEPTH,
    NUM_CLASSES,
    STORED,
    TASKS,
    Batch,
    check_tasks,
    decode_batch,
    domains_of,
)

SPLITS = ("train", "val", "test")
INVALID_DEPTH = 2**16 - 1
FORMAT = 1  # of the prepared folder; another number prepares anew
LAYOUTS = (
    "<domain>/<building>/*.png, <domain>/taskonomy/<building>/*.png "
    "or <building>_<domain>/<domain>/*.png"
)
_FILE = re.compile(r"point_(\d+)_view_(\d+)_domain_(\w+)\.png")
_ALIASES = {"segmentsemantic": "segment_semantic"}
# What a PNG's header says, (bits, colour type), for each way of storing a domain.
_HEADERS = {"uint8": ((8, 0), (8, 3)), "uint8x3": ((8, 2),), "uint16": ((16, 0),)}
_COLOURS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with alpha", 6: "RGBA"}
CHUNK = 64  # views that are read before they are written, so that few are in memory

View = tuple[int, int]  # point, view


# --- Finding and reading PNGs ---------------------------------------------------------------------


def find_views(
    root: str | Path, domains: Sequence[str] = DOMAINS, buildings: Sequence[str] | None = None
) -> dict[str, dict[View, dict[str, Path]]]:
    """The PNGs below `root`: building -> (point, view) -> domain -> file, all sorted.

    Reads the three layouts of `LAYOUTS`, each domain in its own, and both names of semantic
    segmentation (..._domain_segment_semantic.png, ..._domain_segmentsemantic.png); other files are
    passed over. Raises UserError where two files claim the same view.
    """
    views: dict[str, dict[View, dict[str, Path]]] = {}
    for domain in domains:
        for building, folder in _building_folders(Path(root), domain):
            if buildings is not None and building not in buildings:
                continue
            for name in sorted(os.listdir(folder)):
                match = _FILE.fullmatch(name)
                if match is None or _ALIASES.get(match[3], match[3]) != domain:
                    continue
                view = views.setdefault(building, {}).setdefault((int(match[1]), int(match[2])), {})
                if domain in view:
                    raise UserError(f"{folder / name} and {view[domain]} are the same view")
                view[domain] = folder / name
    return {building: dict(sorted(views[building].items())) for building in sorted(views)}


def _building_folders(root: Path, domain: str) -> Iterator[tuple[str, Path]]:
    base = root / domain
    if base.is_dir():
        downloaded = base / "taskonomy"
        if downloaded.is_dir() and any(p.is_dir() for p in downloaded.iterdir()):
            base = downloaded
        yield from ((p.name, p) for p in sorted(base.iterdir()) if p.is_dir())
    for folder in sorted(root.glob(f"*_{domain}")):
        if (folder / domain).is_dir():
            yield folder.name.removesuffix(f"_{domain}"), folder / domain


def read_png(path: Path, domain: str) -> np.ndarray:
    """One label or image as encoded: (S, S) uint8 or unsigned 16-bit, or (S, S, 3) uint8.

    Raises ValueError where the file is no whole PNG (checksums included), not square, not stored
    with the domain's bit depth and channels, or holds a class id that does not exist.
    """
    data = path.read_bytes()
    if len(data) < 33 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise ValueError("no PNG file")
    width, height, bits, colour = struct.unpack(">IIBB", data[16:26])
    allowed = _HEADERS[STORED[domain]]
    if (bits, colour) not in allowed:
        raise ValueError(f"stored as {_encoding(bits, colour)}, must be {_encoding(*allowed[0])}")
    if width != height:
        raise ValueError(f"{width} x {height} pixels, must be square")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.verify()  # every chunk's checksum; the image must be opened anew afterwards
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            array = np.asarray(image)
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error,
            Image.DecompressionBombError) as error:  # fmt: skip
        raise ValueError(f"broken PNG ({error})") from None
    if STORED[domain] == "uint8" and array.max() >= NUM_CLASSES:
        raise ValueError(f"class id {array.max()}, allowed: 0 to {NUM_CLASSES - 1}")
    # Pillow has given 16-bit gray as signed or as 32-bit; modulo 2^16 all of them are right.
    return array.astype(np.uint16) if STORED[domain] == "uint16" else array


def _encoding(bits: int, colour: int) -> str:
    return f"{bits}-bit {_COLOURS.get(colour, f'colour type {colour}')}"


# --- Resizing -------------------------------------------------------------------------------------


def resize(image: np.ndarray, domain: str, size: int) -> np.ndarray:
    """A square image (S, S[, 3]) at size x size <= S x S, encoded as before.

    Classes: nearest neighbour. Everything else: the mean over the area of each new pixel, exact
    and rounded half up. Depth: over valid pixels alone, and invalid (65535) where less than half
    of the area is valid.
    """
    source = len(image)
    if source == size:
        return image
    if STORED[domain] == "uint8":
        nearest = (2 * np.arange(size) + 1) * source // (2 * size)
        return image[nearest[:, None], nearest]
    area = (source // math.gcd(source, size)) ** 2  # of a new pixel, in the units of _area_sum
    if domain != DEPTH_DOMAIN:
        return ((2 * _area_sum(image, size) + area) // (2 * area)).astype(image.dtype)
    valid = image < MAX_DEPTH
    total, weight = _area_sum(image * valid, size), _area_sum(valid, size)
    mean = (2 * total + weight) // np.maximum(2 * weight, 1)
    return np.where(2 * weight >= area, mean, INVALID_DEPTH).astype(image.dtype)


def _area_sum(image: np.ndarray, size: int) -> np.ndarray:
    """Sums over the areas of the new pixels, each old pixel weighted by its integer overlap."""
    source = len(image)
    if source % size == 0:
        step, channels = source // size, image.shape[2:]
        rows = image.reshape(size, step, source, *channels).sum(1, dtype=np.int64)
        return rows.reshape(size, size, step, *channels).sum(2)
    unit = math.gcd(source, size)
    new, old = np.arange(size)[:, None] * source, np.arange(source) * size
    overlap = np.minimum(new + source, old + size) - np.maximum(new, old)
    # Integers below 2^53: float64 sums are exact in any order, and far faster than integer ones.
    weights = overlap.clip(0).astype(np.float64) / unit
    rows = np.tensordot(weights, image.astype(np.float64), (1, 0))
    return np.tensordot(weights, rows, (1, 1)).swapaxes(0, 1).astype(np.int64)


# --- Preparing: PNGs -> arrays --------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What a prepared folder holds, and what the call that returned this did for it."""

    folder: Path  # <root>/prepared/<size>px
    views: dict[str, int]  # building -> usable views
    skipped: dict[str, list[str]]  # building -> broken or missing files of views left out
    rebuilt: tuple[str, ...]  # buildings that were decoded; the others were up to date


@dataclass(frozen=True)
class _Request:
    """What `prepare` was asked for."""

    target: Path
    root: Path
    size: int
    domains: tuple[str, ...]
    skip_broken: bool


def prepare(
    root: str | Path,
    size: int,
    domains: Sequence[str] = DOMAINS,
    buildings: Sequence[str] | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    progress: bool = True,
    out: str | Path | None = None,
) -> Prepared:
    """Verify every PNG of a Taskonomy folder and decode it once, at size x size pixels.

    Writes <out or root/prepared>/<size>px/<building>/<domain>.npy, (N, size, size[, 3]) as encoded
    (uint8 or uint16), views in order of (point, view), views.json beside them and summary.json
    above them. A building whose files have the names, sizes and times they had is left as it is.
    `workers` threads read (None: one a core); what is written does not depend on them.

    Raises UserError for a folder without images or without a domain, and one that lists the files
    that are broken or missing, unless `skip_broken`: then their views are left out and counted.
    """
    root = Path(root)
    target = Path(out or root / "prepared") / f"{size}px"
    domains, names = _check_request(root, size, domains, buildings)
    request = _Request(target, root, size, domains, skip_broken)
    todo = {name: views for name in names if (views := _views_to_do(name, request))}
    if todo or not (target / "summary.json").exists():
        problems, quiet = [], not (progress and todo)
        with (
            _writing(target),
            FileLock(target / "prepare.lock"),
            ThreadPoolExecutor(workers or _cores()) as pool,
            tqdm(total=sum(todo.values()), desc="prepare", unit="view", disable=quiet) as bar,
        ):
            for name in todo:
                if _views_to_do(name, request):  # unless another process has just done it
                    (target / "summary.json").unlink(missing_ok=True)
                    problems += _prepare_building(name, request, pool, bar)
            if problems:
                raise UserError(
                    f"{len(problems)} files are broken or missing (--skip-broken leaves their "
                    "views out):" + "".join(f"\n  {problem}" for problem in problems[:10])
                    + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
                )  # fmt: skip
            _write_summary(target, size)
    records = {name: _read_json(target / name / "views.json") for name in names}
    return Prepared(
        target,
        {name: len(record["views"]) for name, record in records.items()},
        {name: record["skipped"] for name, record in records.items() if record["skipped"]},
        tuple(todo),
    )


def _check_request(
    root: Path, size: int, domains: Sequence[str], buildings: Sequence[str] | None
) -> tuple[tuple[str, ...], list[str]]:
    """The domains and buildings to prepare, sorted; a UserError where that cannot be."""
    if size < 1:
        raise UserError(f"size={size}; allowed: 1 or more pixels")
    unknown = [domain for domain in domains if domain not in DOMAINS]
    if unknown or not domains:
        raise UserError(f"unknown domains {', '.join(unknown) or '(none given)'}; "
                        f"allowed: {', '.join(DOMAINS)}")  # fmt: skip
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist")
    found = {domain: {name for name, _ in _building_folders(root, domain)} for domain in DOMAINS}
    names = set().union(*found.values())
    if not names:
        raise UserError(f"no Taskonomy images in {root}; looked for {LAYOUTS}")
    lacking = [domain for domain in domains if not found[domain]]
    if lacking:
        there = [domain for domain in DOMAINS if found[domain]]
        letters = "".join(task.letter for task in TASKS.values() if task.domain in lacking)
        raise UserError(
            f"{root} lacks {len(lacking)} domains: {', '.join(lacking)} (tasks {letters}); "
            f"to prepare what is there: --domains {' '.join(there)}"
        )
    absent = sorted(set(buildings or ()) - names)
    if absent:
        raise UserError(f"{root} has no building {', '.join(absent)}; "
                        f"it has {', '.join(sorted(names))}")  # fmt: skip
    return tuple(d for d in DOMAINS if d in domains), sorted(buildings or names)


def _source(building: str, request: _Request) -> tuple[dict[View, dict[str, Path]], str]:
    """A building's views, and a hash of how its files were found: names, sizes, times."""
    views = find_views(request.root, request.domains, [building]).get(building, {})
    found: list[Any] = [FORMAT, request.size, request.domains]
    for files in views.values():
        for domain, path in files.items():
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((domain, path.name, status.st_size, status.st_mtime_ns))
    return views, _hash(found)


def _views_to_do(building: str, request: _Request) -> int:
    """Number of views of a building that is not prepared as its files are now; 0 if it is."""
    record: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        record = _read_json(request.target / building / "views.json")
    if set(request.domains) < set(record.get("domains", ())):  # more than asked for is kept
        request = replace(request, domains=tuple(record["domains"]))
    views, source = _source(building, request)
    if record.get("source") == source and (request.skip_broken or not record["skipped"]):
        with contextlib.suppress(OSError, ValueError):
            for domain in request.domains:
                _open_array(request.target / building, domain, len(record["views"]), request.size)
            return 0
    return max(1, len(views))


def _prepare_building(
    building: str, request: _Request, pool: ThreadPoolExecutor, bar: tqdm
) -> list[str]:
    """Write one building; what is wrong with its files, where that keeps it from being written."""
    views, source = _source(building, request)
    size, domains = request.size, request.domains
    folders = {d: files[d].parent for files in views.values() for d in files}
    lacking = [domain for domain in domains if domain not in folders]
    if lacking:
        return [f"building {building} has no {', '.join(lacking)}"]
    temporary, final = request.target / f".{building}.tmp", request.target / building
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    read = partial(_read_view, size=size, folders=folders)
    problems: list[str] = []
    kept: list[View] = []
    content = {domain: hashlib.sha256() for domain in domains}
    with contextlib.ExitStack() as stack:
        files = {d: stack.enter_context(open(temporary / f"{d}.npy", "wb")) for d in domains}
        for domain, file in files.items():
            _write_header(file, domain, len(views), size)
        for first in range(0, len(views), CHUNK):
            chunk = list(views.items())[first : first + CHUNK]
            for (view, _), (images, faults) in zip(chunk, pool.map(read, chunk), strict=True):
                bar.update()
                problems += faults
                if faults:
                    continue
                kept.append(view)
                for domain in domains:
                    files[domain].write(images[domain])
                    content[domain].update(images[domain])
        for domain, file in files.items():
            file.seek(0)  # the header has room for any number of views
            _write_header(file, domain, len(kept), size)
    if problems and not (request.skip_broken and kept):
        shutil.rmtree(temporary)
        return problems
    record = {
        "building": building,
        "size": size,
        "domains": domains,
        "source": source,
        "content": {domain: digest.hexdigest() for domain, digest in content.items()},
        "skipped": problems,
        "skipped_views": len(views) - len(kept),
        "views": kept,
    }
    (temporary / "views.json").write_text(json.dumps(record))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    return []


def _read_view(
    item: tuple[View, dict[str, Path]], size: int, folders: dict[str, Path]
) -> tuple[dict[str, bytes], list[str]]:
    """One view's arrays at the size asked for, as bytes, and what is wrong with its files."""
    (point, view), paths = item
    images, faults, side = {}, [], None
    for domain, folder in folders.items():
        path = paths.get(domain, folder / f"point_{point}_view_{view}_domain_{domain}.png")
        try:
            image = read_png(path, domain)
            if len(image) < size:
                raise ValueError(f"{len(image)} pixels wide, less than the {size} asked for")
            side = side or len(image)
            if len(image) != side:
                raise ValueError(f"{len(image)} pixels wide, unlike the view's other domains")
            images[domain] = resize(image, domain, size).tobytes()
        except FileNotFoundError:
            faults.append(f"{path}: missing")
        except (OSError, ValueError) as error:
            faults.append(f"{path}: {error}")
    return images, faults


def _array_type(domain: str) -> tuple[np.dtype, tuple[int, ...]]:
    stored = STORED[domain]
    return np.dtype("<u2" if stored == "uint16" else "u1"), (3,) if stored == "uint8x3" else ()


def _write_header(file: io.BufferedWriter, domain: str, views: int, size: int) -> None:
    dtype, channels = _array_type(domain)
    shape = (views, size, size, *channels)
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _open_array(folder: Path, domain: str, views: int, size: int) -> np.ndarray:
    dtype, channels = _array_type(domain)
    # Copy on write: PyTorch wants writable memory, and the file must never change.
    array = np.load(folder / f"{domain}.npy", mmap_mode="c", allow_pickle=False)
    if array.dtype != dtype or array.shape != (views, size, size, *channels):
        raise ValueError(f"{domain}.npy holds {array.dtype} {array.shape}")
    return array


def _cores() -> int:
    """Of this machine, as far as this process may use them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_summary(target: Path, size: int) -> None:
    records = [_read_json(path) for path in sorted(target.glob("[!.]*/views.json"))]
    buildings = {
        record["building"]: {
            "views": len(record["views"]),
            "points": len({point for point, _ in record["views"]}),
            "skipped_views": record["skipped_views"],
            "domains": record["domains"],
        }
        for record in records
    }
    temporary = target / "summary.json.tmp"
    temporary.write_text(json.dumps({"size": size, "buildings": buildings}, indent=1) + "\n")
    os.replace(temporary, target / "summary.json")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Make `folder`; a UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}") from error


# --- Clients and batches --------------------------------------------------------------------------


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


@dataclass(frozen=True)
class _Plan:
    """Which rows of a split make which batch, and which of them are mirrored."""

    split: str
    letters: str
    device: torch.device
    steps: list[np.ndarray]  # sorted rows of each batch
    flips: list[np.ndarray] | None = None  # bool, for each of them


@dataclass
class FederatedData:
    """The buildings as clients, opened with `open_data`. Yields decoded batches on the device.

    What fits into `cache_bytes` lies on the device: decoded, or else as encoded. What does not is
    read from the memory maps, one batch ahead. The batches are the same in all three cases.
    """

    names: list[str]  # clients in sorted order
    letters: str  # the tasks whose labels were opened
    size: int  # pixels
    fingerprint: str  # hash of views and prepared arrays of these buildings, on any machine
    indices: list[dict[str, np.ndarray]] = field(repr=False)  # client -> split -> its views
    arrays: list[dict[str, Tensor]] = field(repr=False)  # client -> domain -> memory-mapped
    cache_bytes: int
    _cache: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    def count(self, client: int, split: str) -> int:
        """Number of views of a client in a split."""
        return len(self.indices[client][split])

    def split_counts(self) -> dict[str, dict[str, int]]:
        """Client name -> split -> number of views: for the record."""
        return {
            name: {split: self.count(client, split) for split in SPLITS}
            for client, name in enumerate(self.names)
        }

    def epoch(
        self,
        client: int,
        letters: str,
        batch_size: int,
        rng: np.random.Generator,
        device: torch.device | str,
    ) -> Iterator[Batch]:
        """One local epoch over a client's training views, half of them mirrored.

        Order and flips are drawn from `rng` by this call. Batches are full: the views that are left
        over sit this epoch out. A client with less than one batch gives one batch of all it has.
        Within a batch views stand in stored order.
        """
        count = self.count(client, "train")
        order, flip = rng.permutation(count), rng.random(count) < 0.5
        full = count - count % batch_size if count >= batch_size else count
        start = self._starts("train")[client]
        steps = [np.sort(order[i : i + batch_size]) for i in range(0, full, batch_size)]
        flips = [flip[rows] for rows in steps]
        steps = [start + rows for rows in steps]
        return self._batches(_Plan("train", letters, torch.device(device), steps, flips))

    def evaluation(
        self,
        split: str,
        letters: str,
        batch_size: int,
        device: torch.device | str,
        client: int | None = None,
    ) -> Iterator[Batch]:
        """All views of a split in order, of all clients or one; the last batch may be short.

        The tensors may be views of a cache: not to be changed in place.
        """
        starts = self._starts(split)
        first, last = (0, starts[-1]) if client is None else starts[client : client + 2]
        steps = [np.arange(i, min(i + batch_size, last)) for i in range(first, last, batch_size)]
        return self._batches(_Plan(split, letters, torch.device(device), steps))

    def _starts(self, split: str) -> np.ndarray:
        """Rows of a split are numbered through all clients; client i starts at the i-th."""
        return np.cumsum([0, *(len(views[split]) for views in self.indices)])

    def _batches(self, plan: _Plan) -> Iterator[Batch]:
        if not set(plan.letters) <= set(self.letters):
            raise UserError(f"tasks {plan.letters!r} of data opened for {self.letters!r}")
        fits = self._decoded_bytes() <= self.cache_bytes
        return self._cached_batches(plan) if fits else self._decoded_batches(plan)

    def _cached_batches(self, plan: _Plan) -> Iterator[Batch]:
        """Rows of the decoded split; its mirrored copy, for training, follows behind it."""
        if not plan.steps:
            return
        whole = self._cached_split(plan.split, plan.device)
        whole = {name: whole[name] for name in ("image", "mask", *plan.letters)}
        if plan.flips is None:  # rows that follow one another
            for rows in plan.steps:
                yield _batch({name: t[rows[0] : rows[-1] + 1] for name, t in whole.items()})
            return
        total = self._starts(plan.split)[-1]
        chosen = [rows + total * flip for rows, flip in zip(plan.steps, plan.flips, strict=True)]
        index = torch.from_numpy(np.concatenate(chosen)).to(plan.device)  # one transfer an epoch
        for step in index.split([len(rows) for rows in plan.steps]):
            yield _batch({name: tensor.index_select(0, step) for name, tensor in whole.items()})

    def _decoded_batches(self, plan: _Plan) -> Iterator[Batch]:
        """Rows as encoded, decoded batch by batch."""
        arrays = self._resident(plan.device)
        load = partial(self._raw, plan.split, domains_of(plan.letters), arrays)
        if arrays is self.arrays:
            loaded = _one_ahead(load, plan.steps, pin=plan.device.type == "cuda")
        else:
            loaded = map(load, plan.steps)
        for step, raw in enumerate(loaded):
            flip = None if plan.flips is None else torch.from_numpy(plan.flips[step])
            yield _batch(_decode(raw, plan.letters, plan.device, flip))

    def _resident(self, device: torch.device) -> list[dict[str, Tensor]]:
        """The encoded arrays, on the device where they fit there."""
        size = sum(array.nbytes for arrays in self.arrays for array in arrays.values())
        if device.type == "cpu" or size > self.cache_bytes:
            return self.arrays
        key = ("encoded", str(device))
        if key not in self._cache:
            self._cache[key] = [{d: a.to(device) for d, a in arrays.items()}
                                for arrays in self.arrays]  # fmt: skip
        return self._cache[key]

    def _raw(
        self, split: str, domains: Sequence[str], arrays: list[dict[str, Tensor]], rows: np.ndarray
    ) -> dict[str, Tensor]:
        """Some sorted rows of a split, encoded: domain -> (B, size, size[, 3]), where they lie."""
        starts = self._starts(split)
        clients = np.searchsorted(starts, rows, side="right") - 1
        pieces: dict[str, list[Tensor]] = {domain: [] for domain in domains}
        for client in np.unique(clients):
            views = self.indices[client][split][rows[clients == client] - starts[client]]
            index = torch.from_numpy(views).to(arrays[client][domains[0]].device)
            for domain in domains:
                pieces[domain].append(arrays[client][domain].index_select(0, index))
        return {d: torch.cat(parts) if len(parts) > 1 else parts[0] for d, parts in pieces.items()}

    def _decoded_bytes(self) -> int:
        """Of all splits: float32 image, mask and targets (classes int64), training ones twice."""
        channels = 4 + sum(2 if a == "s" else TASKS[a].channels for a in self.letters)
        rows = sum(self._starts(split)[-1] * (2 if split == "train" else 1) for split in SPLITS)
        return int(rows) * self.size**2 * channels * 4

    def _cached_split(self, split: str, device: torch.device) -> dict[str, Tensor]:
        """The decoded split on the device by tensor's name, a mirrored copy behind training's."""
        key = (split, str(device))
        if key not in self._cache:
            whole: dict[str, Tensor] = {}
            starts, copies = self._starts(split), 2 if split == "train" else 1
            for first, last in zip(starts[:-1], starts[1:], strict=True):
                if first == last:
                    continue
                rows = np.arange(first, last)
                raw = self._raw(split, domains_of(self.letters), self.arrays, rows)
                for copy in range(copies):
                    flip = torch.ones(len(rows), dtype=torch.bool) if copy else None
                    behind = copy * starts[-1]
                    for name, part in _decode(raw, self.letters, device, flip).items():
                        shape = (int(starts[-1]) * copies, *part.shape[1:])
                        into = whole[name] if name in whole else part.new_empty(shape)
                        into[behind + first : behind + last] = part
                        whole[name] = into
            self._cache[key] = whole
        return self._cache[key]


def _decode(
    raw: dict[str, Tensor], letters: str, device: torch.device, flip: Tensor | None
) -> dict[str, Tensor]:
    """decode_batch on the device, of arrays whose 16-bit values lie in signed integers, by name.

    All tensors have the plain contiguous strides, so that what is computed from a batch does not
    depend on where it came from, down to the order of sums.
    """
    moved = {}
    for domain, array in raw.items():
        array = array.to(device, non_blocking=True)
        # PyTorch cannot index every unsigned type everywhere; the bits survive as signed ones.
        moved[domain] = array.to(torch.int32) & 0xFFFF if array.dtype == torch.int16 else array
    batch = decode_batch(moved, letters, None if flip is None else flip.to(device))
    tensors = {"image": batch.image, "mask": batch.mask, **batch.targets}
    # contiguous() leaves odd strides on sides of length one; view() does not.
    return {name: tensor.contiguous().view(tensor.shape) for name, tensor in tensors.items()}


def _batch(tensors: dict[str, Tensor]) -> Batch:
    return Batch(tensors.pop("image"), tensors.pop("mask"), tensors)


def _one_ahead(
    load: Callable[[np.ndarray], dict[str, Tensor]], steps: Iterable[np.ndarray], pin: bool
) -> Iterator[dict[str, Tensor]]:
    """load(step) for every step, the next one loading in a thread while one is used."""

    def loaded(step: np.ndarray) -> dict[str, Tensor]:
        raw = load(step)
        return {d: array.pin_memory() for d, array in raw.items()} if pin else raw

    with ThreadPoolExecutor(1) as pool:
        pending = None
        for step in steps:
            following = pool.submit(loaded, step)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def open_data(
    data: Data, folder: str | Path, letters: str, cache_bytes: int = 2 * 2**30
) -> FederatedData:
    """Open the first `data.buildings` prepared buildings (in sorted order) for some tasks.

    folder   what was given to `prepare`, its out folder, or the <size>px folder itself
    letters  the tasks whose labels may be asked for

    Raises UserError for a folder that is missing, empty, not prepared at data.size, damaged, lacks
    a domain or has too few buildings.
    """
    folder, needed = Path(folder), domains_of(check_tasks(letters))
    prepared = _prepared(folder, data.size)
    names = sorted(_read_json(prepared / "summary.json")["buildings"])[: data.buildings]
    if len(names) < data.buildings:
        raise UserError(f"{folder} has {len(names)} buildings; {data.buildings} are asked for")
    arrays, indices, content = [], [], []
    for name in names:
        try:
            record = _read_json(prepared / name / "views.json")
            lacking = [domain for domain in needed if domain not in record["domains"]]
            if lacking:
                tasks = "".join(a for a in letters if TASKS[a].domain in lacking)
                raise UserError(
                    f"{folder} lacks domain {', '.join(lacking)} of building {name}"
                    + (f" (tasks {tasks})" if tasks else "")
                    + f"; prepared are: {', '.join(record['domains'])}"
                )
            count = len(record["views"])
            opened = {d: _open_array(prepared / name, d, count, data.size) for d in needed}
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{prepared / name} is damaged ({error}); to repair it run: "
                            + _prepare_command(folder, data.size)) from None  # fmt: skip
        arrays.append({d: torch.from_numpy(a.view(np.int16) if a.dtype.itemsize == 2 else a)
                       for d, a in opened.items()})  # fmt: skip
        views = [(point, view) for point, view in record["views"]]
        try:
            indices.append(split_indices(views, data.split, stream(data.split_seed, "split", name)))
        except UserError as error:
            raise UserError(f"building {name} {error}") from None
        content.append([name, data.size, views, record["content"]])
    for split in SPLITS:
        if not any(len(parts[split]) for parts in indices):
            raise UserError(f"{folder} has no {split} views: a building is split from 3 points on")
    return FederatedData(names, letters, data.size, _hash(content), indices, arrays, cache_bytes)


def _prepared(folder: Path, size: int) -> Path:
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist")
    if not any(folder.iterdir()):
        raise UserError(f"data folder {folder} is empty")
    for candidate in (folder / "prepared" / f"{size}px", folder / f"{size}px", folder):
        if candidate.name == f"{size}px" and (candidate / "summary.json").is_file():
            return candidate
    raise UserError(f"{folder} is not prepared at {size} px; run: {_prepare_command(folder, size)}")


def _prepare_command(folder: Path, size: int) -> str:
    return f"mas prepare --root {shlex.quote(str(folder))} --size {size}"


def rooms_folder(data: Data) -> Path:
    """Where rooms lie that are given no folder: data/rooms-<what determines them>."""
    from .rooms import RENDERER_VERSION

    name = (f"rooms-{data.buildings}x{data.views}-{data.size}px-seed{data.render_seed}"
            f"-het{data.heterogeneity:g}-v{RENDERER_VERSION}")  # fmt: skip
    return Path("data") / name


def ensure_rooms(
    data: Data, folder: str | Path | None, workers: int | None = None, progress: bool = True
) -> Path:
    """The folder to open: for procedural rooms rendered and prepared first, where they are not.

    Without a folder rooms go to `rooms_folder`. Taskonomy needs a folder.
    """
    if data.source == "taskonomy":
        if folder is None:
            raise UserError("Taskonomy is not part of the package: name its folder with "
                            "--data DIR, or train on rooms (data.source=rooms)")  # fmt: skip
        return Path(folder)
    from .rooms import render_rooms

    rooms = Path(folder) if folder is not None else rooms_folder(data)
    asked = {"buildings": data.buildings, "views": data.views, "seed": data.render_seed,
             "heterogeneity": data.heterogeneity}  # fmt: skip
    record = rooms / "rooms.json"
    rendered = _read_json(record) if record.exists() else {}
    other = [f"{k}={rendered.get(k)}" for k in asked if rendered and rendered.get(k) != asked[k]]
    if other:
        raise UserError(f"{rooms} holds rooms rendered with {', '.join(other)}, not as configured; "
                        "name another folder or change the settings")  # fmt: skip
    with contextlib.suppress(UserError):
        _prepared(rooms, data.size)
        return rooms
    with _writing(rooms):
        # A folder of the user's own images without a record is taken as it is.
        if rendered or not find_views(rooms, (INPUT_DOMAIN,)):
            size = rendered.get("size", data.size)
            render_rooms(rooms, size=size, workers=workers, progress=progress, **asked)
    prepare(rooms, data.size, workers=workers, progress=progress)
    return rooms
