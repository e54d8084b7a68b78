"""Taskonomy's PNGs -> verified arrays: `prepare` opens and decodes every file once.

Whatever lies in one of the three folder layouts is read, procedural rooms included, for any table
of tasks. Pillow reads: torchvision 0.29 gives the same values and is 13 % faster, but does not tell
a PNG's bit depth and crashes the process over a damaged file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm.auto import tqdm

from ..config import UserError
from ..tasks import DOMAINS, MAX_DEPTH, TASKS, TaskTable, domains_of
from .arrays import Record, array_type, hash_json, open_array, path_named, read_json, write_whole

INVALID_DEPTH = 2**16 - 1
FORMAT = 1  # of the prepared folder; another number prepares anew
_FILE = re.compile(r"point_(\d+)_view_(\d+)_domain_(\w+)\.png")
_ALIASES = {"segmentsemantic": "segment_semantic"}
# Pillow's raw modes of the PNGs that hold each type (a mode alone hides the bit depth), in words.
_PNGS = {"uint8": (("L", "P"), "8-bit gray"), "uint8x3": (("RGB",), "8-bit RGB"),
         "uint16": (("I;16B",), "16-bit gray")}  # fmt: skip

View = tuple[int, int]  # point, view
Files = dict[str, Path]  # domain -> PNG


def find_views(
    root: str | Path, building: str, domains: Sequence[str] = DOMAINS
) -> dict[View, Files]:
    """A building's PNGs below `root`: (point, view) -> domain -> file, in order of views.

    Reads the three layouts of `_folders`, each domain in its own, and both names of semantic
    segmentation (..._domain_segment_semantic.png, ..._domain_segmentsemantic.png); other files are
    passed over. Raises UserError where two files claim the same view.
    """
    views: dict[View, Files] = {}
    for domain in domains:
        for folder in (f for name, f in _folders(Path(root), domain) if name == building):
            for name in os.listdir(folder):
                match = _FILE.fullmatch(name)
                if match is None or _ALIASES.get(match[3], match[3]) != domain:
                    continue
                view = int(match[1]), int(match[2])
                if max(view) >= 2**63:
                    raise UserError(f"{folder / name}: a point or view number of 2^63 or more; "
                                    "rename the file, or remove it")  # fmt: skip
                files = views.setdefault(view, {})
                if domain in files:
                    raise UserError(f"{folder / name} and {files[domain]} are the same view")
                files[domain] = folder / name
    return dict(sorted(views.items()))


def _folders(root: Path, domain: str) -> list[tuple[str, Path]]:
    """Buildings and their folders of a domain, in any of the three layouts.

    <domain>/<building>             the released code's
    <domain>/taskonomy/<building>   as the omnidata downloader leaves it
    <building>_<domain>/<domain>    the original archives, extracted

    A hidden folder, or one named taskonomy, is a building where it holds images itself.
    """
    named = [*_subfolders(root / domain), *_subfolders(root / domain / "taskonomy")]
    found = [(folder.name, folder) for folder in named] + [
        (folder.name.removesuffix(f"_{domain}"), folder / domain)
        for folder in _subfolders(root)
        if folder.name.endswith(f"_{domain}") and (folder / domain).is_dir()
    ]
    return [
        (name, folder)
        for name, folder in found
        if not (name.startswith(".") or name == "taskonomy")
        or any(map(_FILE.fullmatch, os.listdir(folder)))
    ]


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _classes(domain: str, table: TaskTable) -> int:
    """How many class ids a domain has; 0 where its values are not class ids."""
    tasks = (task for task in table.values() if task.domain == domain and task.classes)
    return max((task.channels for task in tasks), default=0)


def read_png(path: Path, domain: str, table: TaskTable = TASKS) -> np.ndarray:
    """One label or image as encoded: (S, S) uint8 or unsigned 16-bit, or (S, S, 3) uint8.

    Raises ValueError where the file is no whole PNG (checksums included), not stored with the
    domain's bit depth and channels, not square, or holds a class id that does not exist.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            raw_mode = image.tile[0][3]
            image.verify()  # every chunk's checksum; the image must be opened anew afterwards
        with Image.open(path, formats=["PNG"]) as image:
            array = np.asarray(image)
    except Exception as error:  # Pillow raises errors of many kinds over a broken file
        raise ValueError(f"broken or no PNG ({type(error).__name__})") from None
    raw_modes, in_words = _PNGS[table.stored[domain]]
    classes = _classes(domain, table)
    if raw_mode not in raw_modes:
        raise ValueError(f"pixels stored as {raw_mode}, must be {in_words}")
    if array.shape[0] != array.shape[1]:
        raise ValueError(f"{array.shape[1]} x {array.shape[0]} pixels, must be square")
    if classes and array.max() >= classes:
        raise ValueError(f"class id {array.max()}, allowed: 0 to {classes - 1}")
    # Pillow has given 16-bit gray as signed or as 32-bit; modulo 2^16 all of them are right.
    return array.astype(np.uint16) if table.stored[domain] == "uint16" else array


def resize(image: np.ndarray, domain: str, size: int, table: TaskTable = TASKS) -> np.ndarray:
    """A square image (S, S[, 3]) at size x size <= S x S, encoded as before.

    Classes: nearest neighbour. Everything else: the mean over the area of each new pixel, exact
    and rounded half up. The mask's domain (depth): over valid pixels alone, and invalid (65535)
    where less than half of the area is valid.
    """
    source = len(image)
    if source == size:
        return image
    if domain in table.class_maps:
        nearest = (2 * np.arange(size) + 1) * source // (2 * size)
        return image[nearest[:, None], nearest]
    area = source**2  # of a new pixel, in the unit of _area_sums
    if domain != table.mask:
        return ((2 * _area_sums(image, size) + area) // (2 * area)).astype(image.dtype)
    valid = image < MAX_DEPTH
    total, weight = _area_sums(image * valid, size), _area_sums(valid, size)
    mean = (2 * total + weight) // np.maximum(2 * weight, 1)
    return np.where(2 * weight >= area, mean, INVALID_DEPTH).astype(image.dtype)


def _area_sums(image: np.ndarray, size: int) -> np.ndarray:
    """Sums over the areas of the new pixels, (size, size[, 3]) int64; an old pixel counts size^2.

    Differences of the cumulative sum at the new pixels' edges, which may lie inside old pixels.
    """
    whole, part = np.divmod(np.arange(size + 1) * len(image), size)
    part = part.reshape(-1, *[1] * (image.ndim - 1))
    for _ in range(2):  # rows, then columns
        before = np.concatenate([np.zeros_like(image[:1], np.int64), image.cumsum(0, np.int64)])
        at_edges = size * before[whole] + part * image[whole.clip(max=len(image) - 1)]
        image = np.diff(at_edges, axis=0).swapaxes(0, 1)
    return image


@dataclass(frozen=True)
class Prepared:
    """What a prepared folder holds, and what the call that returned this had to do."""

    folder: Path  # <root>/prepared/<size>px
    views: dict[str, int]  # building -> usable views
    skipped: dict[str, list[str]]  # building -> broken or missing files of views left out
    rebuilt: tuple[str, ...]  # buildings decoded by this call; the others were up to date


def prepare(
    root: str | Path, size: int, domains: Sequence[str] | None = None, skip_broken: bool = False,
    workers: int | None = None, progress: bool = True, out: str | Path | None = None,
    table: TaskTable = TASKS,
) -> Prepared:  # fmt: skip
    """Verify every PNG of a Taskonomy folder and decode it once, at size x size pixels.

    Writes <out or root/prepared>/<size>px/<building>/<domain>.npy, (N, size, size[, 3]) as encoded
    (uint8 or uint16), views in order of (point, view), views.json beside them and summary.json
    above them. A building whose files have the names, sizes and times they had, and whose arrays
    are whole, is left as it is; one that is gone from `root` is dropped from the summary.

    domains   None: all of `table`, the tasks that say how each is encoded
    workers   threads, each with a building (None: one a core); the files do not depend on them

    Raises UserError for a folder without images or without a domain, and one that lists the files
    that are broken or missing, unless `skip_broken`: then their views are left out and counted,
    and so is a building without a whole view, while there is another.
    """
    root, target = Path(root), Path(out or Path(root) / "prepared") / f"{size}px"
    known = domains_of("".join(table), table)
    asked = known if domains is None else domains
    names = _building_names(root, size, asked, table)
    domains = [domain for domain in known if domain in asked]
    target.mkdir(parents=True, exist_ok=True)
    parts = target.with_name(f".{target.name}.parts")  # no building's name can collide with it
    one = partial(_prepare_building, root, target, parts, size, domains, skip_broken, table)
    with (FileLock(target / "prepare.lock"), _scratch(parts),
          ThreadPoolExecutor(workers or os.cpu_count()) as pool):  # fmt: skip
        done = list(tqdm(pool.map(one, names), "prepare", len(names), unit="building",
                         disable=not progress))  # fmt: skip
        records = {name: record for name, (record, _) in zip(names, done)}
        skipped = {name: record.skipped for name, record in records.items() if record.skipped}
        records = {name: record for name, record in records.items() if record.views}
        if not records or (skipped and not skip_broken):
            raise _broken(skipped, skip_broken)
        counts = {name: {"views": len(record.views), "skipped_views": record.skipped_views}
                  for name, record in records.items()}  # fmt: skip
        summary, text = target / "summary.json", json.dumps({"buildings": counts}, indent=1)
        if not summary.exists() or summary.read_bytes() != text.encode():
            write_whole(parts / "summary.json", text)
            os.replace(parts / "summary.json", summary)
    views = {name: len(record.views) for name, record in records.items()}
    rebuilt = tuple(name for name, (_, anew) in zip(names, done) if anew and name in records)
    return Prepared(target, views, skipped, rebuilt)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """A folder that is empty at first, whatever a killed process left there; removed at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _broken(skipped: dict[str, list[str]], skip_broken: bool) -> UserError:
    """The first ten faults of a folder's files, and how many there are."""
    faults = [fault for found in skipped.values() for fault in found]
    head = f"{len(faults)} files are broken or missing (--skip-broken leaves views out):"
    if skip_broken:
        head = f"no building has a whole view; {len(faults)} files are broken or missing:"
    more = [f"and {len(faults) - 10} more"] * (len(faults) > 10)
    return UserError("\n  ".join([head, *faults[:10], *more]))


def _building_names(root: Path, size: int, domains: Sequence[str], table: TaskTable) -> list[str]:
    """The buildings below `root`; a UserError where it lacks what is asked for."""
    known = domains_of("".join(table), table)
    unknown = [domain for domain in domains if domain not in known]
    if unknown:
        raise UserError(f"unknown domain {unknown[0]!r}; allowed: {', '.join(known)}")
    if size < 1:
        raise UserError(f"size={size}; allowed: 1 or more pixels")
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist")
    found = {domain: {name for name, _ in _folders(root, domain)} for domain in known}
    there = [domain for domain in known if found[domain]]
    if not there:
        raise UserError(f"no Taskonomy images in {root}; looked for <domain>/<building>, "
                        "<domain>/taskonomy/<building>, <building>_<domain>/<domain>")  # fmt: skip
    lacking = [domain for domain in domains if domain not in there]
    if lacking:
        letters = "".join(task.letter for task in table.values() if task.domain in lacking)
        raise UserError(f"{root} lacks {len(lacking)} domains: {', '.join(lacking)} (tasks "
                        f"{letters}); for what is there: --domains {' '.join(there)}")  # fmt: skip
    return sorted(set().union(*(found[domain] for domain in domains)))


def _prepare_building(
    root: Path, target: Path, parts: Path, size: int, domains: list[str], skip_broken: bool,
    table: TaskTable, name: str,
) -> tuple[Record, bool]:  # fmt: skip
    """Write a building unless it is up to date; its record, and whether it was read anew.

    One without a whole view, or with a broken file and not `skip_broken`, is not written.
    """
    folder, temporary = target / name, parts / name
    views = find_views(root, name, domains)
    source = {domain: _source(views, domain, size, table) for domain in domains}
    with contextlib.suppress(UserError):
        record = read_json(folder / "views.json", Record)
        # A folder that holds more domains than are asked for is kept.
        if source.items() <= record.source.items() and (skip_broken or not record.skipped):
            for domain in domains:
                open_array(folder, domain, record, size, table.stored[domain])
            return record, False
    (target / "summary.json").unlink(missing_ok=True)  # until every building is right
    with path_named(temporary):
        temporary.mkdir()
        kept, faults, content = _write_arrays(temporary, views, size, domains, table)
        if not views:
            faults = [f"building {name} has no images"]
        record = Record(domains=domains, source=source, content=content, views=kept,
                        skipped=faults, skipped_views=len(views) - len(kept))  # fmt: skip
        if kept and (skip_broken or not faults):
            write_whole(temporary / "views.json", json.dumps(record.model_dump()))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        else:
            shutil.rmtree(temporary)
    return record, True


def _source(views: dict[View, Files], domain: str, size: int, table: TaskTable) -> str:
    """A hash of how a domain's files were found: names, sizes, times, and how they are read."""
    found: list[Any] = [FORMAT, size]
    if reading(domain, table) != reading(domain, TASKS):
        found += reading(domain, table)
    for path in (files[domain] for files in views.values() if domain in files):
        with contextlib.suppress(OSError):  # a link to nothing: read_png will say so
            status = path.stat()
            found.append((path.name, status.st_size, status.st_mtime_ns))
    return hash_json(found)


def reading(domain: str, table: TaskTable) -> tuple[str | None, int, bool]:
    """What a table says of a domain: its encoding, its number of classes, whether it is a mask."""
    return table.stored.get(domain), _classes(domain, table), domain == table.mask


def _write_arrays(
    folder: Path, views: dict[View, Files], size: int, domains: list[str], table: TaskTable
) -> tuple[list[View], list[str], dict[str, str]]:
    """One array a domain, view by view: the views kept, what is wrong with the others, hashes."""
    kept: list[View] = []
    problems: list[str] = []
    content = {domain: hashlib.sha256() for domain in domains}
    with contextlib.ExitStack() as stack:
        arrays = {d: stack.enter_context(open(folder / f"{d}.npy", "wb")) for d in domains}
        _write_headers(arrays, len(views), size, table)
        for view, files in views.items():
            images, faults = _read_view(files, size, domains, table)
            problems += faults
            if not faults:
                kept.append(view)
                for domain, image in images.items():
                    arrays[domain].write(image)
                    content[domain].update(image)
        _write_headers(arrays, len(kept), size, table)  # they have room for any number of views
        for file in arrays.values():
            file.flush()
            os.fsync(file.fileno())
    return kept, problems, {domain: digest.hexdigest() for domain, digest in content.items()}


def _read_view(
    files: Files, size: int, domains: list[str], table: TaskTable
) -> tuple[dict[str, bytes], list[str]]:
    """One view's images at the size asked for, as bytes, and what is wrong with its files."""
    images, faults, side = {}, [], None
    for domain in domains:
        if domain not in files:
            faults.append(f"{next(iter(files.values()))}: its {domain} is missing")
            continue
        try:
            image = read_png(files[domain], domain, table)
            if len(image) < size:
                raise ValueError(f"{len(image)} pixels wide, less than the {size} asked for")
            side = side or len(image)
            if len(image) != side:
                raise ValueError(f"{len(image)} pixels wide, unlike the view's other domains")
            images[domain] = resize(image, domain, size, table).tobytes()
        except ValueError as error:
            faults.append(f"{files[domain]}: {error}")
    return images, faults


def _write_headers(arrays: dict[str, BinaryIO], views: int, size: int, table: TaskTable) -> None:
    for domain, file in arrays.items():
        file.seek(0)
        dtype, shape = array_type(table.stored[domain], views, size)
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
