"""Taskonomy's PNGs -> verified arrays: `prepare` opens and decodes every file once.

Whatever lies in one of the three folder layouts is read, procedural rooms included.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
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
from ..tasks import DEPTH_DOMAIN, DOMAINS, MAX_DEPTH, NUM_CLASSES, STORED, TASKS

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
        for _, folder in _folders(Path(root), domain, building):
            for name in os.listdir(folder):
                match = _FILE.fullmatch(name)
                if match is None or _ALIASES.get(match[3], match[3]) != domain:
                    continue
                files = views.setdefault((int(match[1]), int(match[2])), {})
                if domain in files:
                    raise UserError(f"{folder / name} and {files[domain]} are the same view")
                files[domain] = folder / name
    return dict(sorted(views.items()))


def _folders(root: Path, domain: str, building: str = "*") -> list[tuple[str, Path]]:
    """Buildings and their folders of a domain, in any of the three layouts.

    <domain>/<building>             the released code's
    <domain>/taskonomy/<building>   as the omnidata downloader leaves it
    <building>_<domain>/<domain>    the original archives, extracted
    """
    named = [*root.glob(f"{domain}/{building}/"), *root.glob(f"{domain}/taskonomy/{building}/")]
    extracted = root.glob(f"{building}_{domain}/{domain}/")
    return [(folder.name, folder) for folder in named if folder.name != "taskonomy"] + [
        (folder.parent.name.removesuffix(f"_{domain}"), folder) for folder in extracted
    ]


def read_png(path: Path, domain: str) -> np.ndarray:
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
    raw_modes, in_words = _PNGS[STORED[domain]]
    if raw_mode not in raw_modes:
        raise ValueError(f"pixels stored as {raw_mode}, must be {in_words}")
    if array.shape[0] != array.shape[1]:
        raise ValueError(f"{array.shape[1]} x {array.shape[0]} pixels, must be square")
    if STORED[domain] == "uint8" and array.max() >= NUM_CLASSES:
        raise ValueError(f"class id {array.max()}, allowed: 0 to {NUM_CLASSES - 1}")
    # Pillow has given 16-bit gray as signed or as 32-bit; modulo 2^16 all of them are right.
    return array.astype(np.uint16) if STORED[domain] == "uint16" else array


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
    area = source**2  # of a new pixel, in the unit of _area_sums
    if domain != DEPTH_DOMAIN:
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
    """What a prepared folder holds, and what the call that returned this did for it."""

    folder: Path  # <root>/prepared/<size>px
    views: dict[str, int]  # building -> usable views
    skipped: dict[str, list[str]]  # building -> broken or missing files of views left out
    rebuilt: tuple[str, ...]  # buildings decoded by this call; the others were up to date


def prepare(
    root: str | Path, size: int, domains: Sequence[str] = DOMAINS, skip_broken: bool = False,
    workers: int | None = None, progress: bool = True, out: str | Path | None = None,
) -> Prepared:  # fmt: skip
    """Verify every PNG of a Taskonomy folder and decode it once, at size x size pixels.

    Writes <out or root/prepared>/<size>px/<building>/<domain>.npy, (N, size, size[, 3]) as encoded
    (uint8 or uint16), views in order of (point, view), views.json beside them and summary.json
    above them. A building whose files have the names, sizes and times they had is left as it is;
    one that is gone from `root` leaves the summary.
    `workers` threads take a building each (None: one a core); the files do not depend on them.

    Raises UserError for a folder without images or without a domain, and one that lists the files
    that are broken or missing, unless `skip_broken`: then their views are left out and counted.
    """
    root, target = Path(root), Path(out or Path(root) / "prepared") / f"{size}px"
    names = _building_names(root, size, domains)
    domains = [domain for domain in DOMAINS if domain in domains]
    target.mkdir(parents=True, exist_ok=True)
    one = partial(_prepare_building, root, target, size, domains, skip_broken)
    with FileLock(target / "prepare.lock"), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        done = tqdm(pool.map(one, names), "prepare", len(names), unit="building",
                    disable=not progress)  # fmt: skip
        faults = {name: found for name, found in zip(names, done, strict=True) if found is not None}
        problems = [problem for found in faults.values() for problem in found]
        if problems:
            listed = problems[:10] + [f"and {len(problems) - 10} more"] * (len(problems) > 10)
            head = f"{len(problems)} files are broken or missing (--skip-broken leaves views out):"
            raise UserError("\n  ".join([head, *listed]))
        records = {path.parent.name: json.loads(path.read_text())
                   for path in sorted(target.glob("[!.]*/views.json"))
                   if path.parent.name in names}  # fmt: skip
        counts = {name: {"views": len(r["views"]), "skipped_views": r["skipped_views"]}
                  for name, r in records.items()}  # fmt: skip
        summary, text = target / "summary.json", json.dumps({"buildings": counts}, indent=1)
        if not summary.exists() or summary.read_text() != text:
            (target / "summary.tmp").write_text(text)
            os.replace(target / "summary.tmp", summary)
    views = {name: len(record["views"]) for name, record in records.items()}
    skipped = {name: record["skipped"] for name, record in records.items() if record["skipped"]}
    return Prepared(target, views, skipped, tuple(faults))


def _building_names(root: Path, size: int, domains: Sequence[str]) -> list[str]:
    """The buildings below `root`; a UserError where it lacks what is asked for."""
    unknown = [domain for domain in domains if domain not in DOMAINS]
    if unknown:
        raise UserError(f"unknown domain {unknown[0]!r}; allowed: {', '.join(DOMAINS)}")
    if size < 1:
        raise UserError(f"size={size}; allowed: 1 or more pixels")
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist")
    found = {domain: {name for name, _ in _folders(root, domain)} for domain in DOMAINS}
    there = [domain for domain in DOMAINS if found[domain]]
    if not there:
        raise UserError(
            f"no Taskonomy images in {root}; looked for folders <domain>/<building>, "
            "<domain>/taskonomy/<building> and <building>_<domain>/<domain>"
        )
    lacking = [domain for domain in domains if domain not in there]
    if lacking:
        letters = "".join(task.letter for task in TASKS.values() if task.domain in lacking)
        raise UserError(
            f"{root} lacks {len(lacking)} domains: {', '.join(lacking)} (tasks {letters}); "
            f"to prepare what is there: --domains {' '.join(there)}"
        )
    return sorted(set().union(*(found[domain] for domain in domains)))


def _prepare_building(
    root: Path, target: Path, size: int, domains: list[str], skip_broken: bool, name: str
) -> list[str] | None:
    """Write a building; what keeps it from being written, or None where it is up to date."""
    folder, temporary = target / name, target / f".{name}.tmp"
    views = find_views(root, name, domains)
    source = {domain: _source(views, domain, size) for domain in domains}
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        record = json.loads((folder / "views.json").read_text())
        for domain in domains:
            open_array(folder, domain, len(record["views"]), size)
        # A folder that holds more domains than are asked for is kept.
        if source.items() <= record["source"].items() and (skip_broken or not record["skipped"]):
            return None
    (target / "summary.json").unlink(missing_ok=True)  # until every building is right
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    kept, problems, content = _write_arrays(temporary, views, size, domains)
    if not kept or (problems and not skip_broken):
        shutil.rmtree(temporary)
        return problems or [f"building {name} has no images"]
    record = {"domains": domains, "source": source, "content": content, "views": kept,
              "skipped": problems, "skipped_views": len(views) - len(kept)}  # fmt: skip
    (temporary / "views.json").write_text(json.dumps(record))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return []


def _source(views: dict[View, Files], domain: str, size: int) -> str:
    """A hash of how a domain's files were found: names, sizes and times."""
    found: list[Any] = [FORMAT, size]
    for path in (files[domain] for files in views.values() if domain in files):
        with contextlib.suppress(OSError):  # a link to nothing: read_png will say so
            status = path.stat()
            found.append((path.name, status.st_size, status.st_mtime_ns))
    return hash_json(found)


def _write_arrays(
    folder: Path, views: dict[View, Files], size: int, domains: list[str]
) -> tuple[list[View], list[str], dict[str, str]]:
    """One array a domain, view by view: the views kept, what is wrong with the others, hashes."""
    kept: list[View] = []
    problems: list[str] = []
    content = {domain: hashlib.sha256() for domain in domains}
    with contextlib.ExitStack() as stack:
        arrays = {d: stack.enter_context(open(folder / f"{d}.npy", "wb")) for d in domains}
        _write_headers(arrays, len(views), size)
        for view, files in views.items():
            images, faults = _read_view(files, size, domains)
            problems += faults
            if not faults:
                kept.append(view)
                for domain, image in images.items():
                    arrays[domain].write(image)
                    content[domain].update(image)
        _write_headers(arrays, len(kept), size)  # they have room for any number of views
    return kept, problems, {domain: digest.hexdigest() for domain, digest in content.items()}


def _read_view(
    files: Files, size: int, domains: list[str]
) -> tuple[dict[str, bytes], list[str]]:
    """One view's images at the size asked for, as bytes, and what is wrong with its files."""
    images, faults, side = {}, [], None
    for domain in domains:
        if domain not in files:
            faults.append(f"{next(iter(files.values()))}: its {domain} is missing")
            continue
        try:
            image = read_png(files[domain], domain)
            if len(image) < size:
                raise ValueError(f"{len(image)} pixels wide, less than the {size} asked for")
            side = side or len(image)
            if len(image) != side:
                raise ValueError(f"{len(image)} pixels wide, unlike the view's other domains")
            images[domain] = resize(image, domain, size).tobytes()
        except ValueError as error:
            faults.append(f"{files[domain]}: {error}")
    return images, faults


def _write_headers(arrays: dict[str, BinaryIO], views: int, size: int) -> None:
    for domain, file in arrays.items():
        file.seek(0)
        dtype, shape = _array_type(domain, views, size)
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)


def _array_type(domain: str, views: int, size: int) -> tuple[str, tuple[int, ...]]:
    dtype = "<u2" if STORED[domain] == "uint16" else "|u1"
    return dtype, (views, size, size, 3)[: 4 if STORED[domain] == "uint8x3" else 3]


def open_array(folder: Path, domain: str, views: int, size: int) -> np.ndarray:
    """A prepared array, memory-mapped: (views, size, size[, 3]) uint8 or uint16.

    Raises ValueError where the file holds anything else, OSError where it cannot be read.
    """
    # Copy on write: PyTorch wants writable memory, and the file must never change.
    array = np.load(folder / f"{domain}.npy", mmap_mode="c", allow_pickle=False)
    if (array.dtype.str, array.shape) != _array_type(domain, views, size):
        raise ValueError(f"{domain}.npy holds {array.dtype} {array.shape}")
    return array


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
