"""Prepared arrays on disk: what the files of a building hold, checked whenever they are opened.

    <size>px/summary.json              the buildings
    <size>px/<building>/views.json     the rows' points and views, and hashes of the values
    <size>px/<building>/<domain>.npy   (N, size, size[, 3]), as encoded in the PNGs
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config import UserError

# Files that prepare writes anew; any other OSError, such as missing permission, is shown as it is.
MISPLACED = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
Number = Annotated[int, Field(ge=0, lt=2**63)]


class Record(BaseModel):
    """views.json: what the arrays beside it hold."""

    model_config = ConfigDict(strict=True)

    domains: list[str]
    source: dict[str, str]  # domain -> hash of how its files were found
    content: dict[str, str]  # domain -> SHA-256 of the array's values
    views: list[tuple[Number, Number]]  # (point, view) of every row
    skipped: list[str]  # broken or missing files of the views left out
    skipped_views: int


class Summary(BaseModel):
    """summary.json: the prepared buildings; it is there when all of them are right."""

    buildings: dict[str, dict[str, int]]  # name -> "views", "skipped_views"


Json = TypeVar("Json", Record, Summary)


def read_json(path: Path, kind: type[Json]) -> Json:
    """views.json or summary.json; a UserError where the file is damaged or missing."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except MISPLACED as error:
        reason = error.strerror
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = ".".join(map(str, first["loc"])) + ": " * bool(first["loc"]) + first["msg"]
    raise UserError(f"{path} is damaged ({reason}); mas prepare writes it anew")


_whole: set[tuple[int, int, int, int, str]] = set()  # arrays verified by this process
_one_header = threading.Lock()  # NumPy parses headers by `ast`, which Python 3.11 does not share


def open_array(folder: Path, domain: str, record: Record, size: int, stored: str) -> np.ndarray:
    """A prepared array, memory-mapped: (views, size, size[, 3]) uint8 or uint16.

    Each process hashes its values once and compares them with the record, 2 GB a second and core:
    0.2 s for a building of 270 views at 256 px with all nine tasks (CRC-32: 0.06 s, but folders
    have the SHA-256 that fingerprints are made of).

    Raises UserError where the file is missing or holds anything else.
    """
    path = folder / f"{domain}.npy"
    try:
        # Copy on write: PyTorch wants writable memory, and the file must never change.
        with _one_header:
            array = np.lib.format.open_memmap(path, mode="c")
        found = array.dtype.str, array.shape
        if found != array_type(stored, len(record.views), size):
            raise ValueError(f"holds {array.dtype} {array.shape}")
        status = path.stat()
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
               record.content[domain])  # fmt: skip
        if key not in _whole and hashlib.sha256(array).hexdigest() != key[-1]:
            raise ValueError("its values are not those that were written")
        _whole.add(key)
        return array
    except MISPLACED as error:
        reason = error.strerror
    except OSError:
        raise
    except Exception as error:  # NumPy raises errors of many kinds over a broken header
        reason = str(error).split("\n")[0]
    raise UserError(f"{path} is damaged ({reason}); mas prepare repairs it")


def array_type(stored: str, views: int, size: int) -> tuple[str, tuple[int, ...]]:
    """Type and shape of an array whose PNGs hold `stored`: uint8, uint16 or uint8x3."""
    dtype = "<u2" if stored == "uint16" else "|u1"
    return dtype, (views, size, size, 3)[: 4 if stored == "uint8x3" else 3]


def write_whole(path: Path, text: str) -> None:
    """Write a file that is on the disk when this returns, to be renamed."""
    with path_named(path), open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def path_named(path: Path) -> Iterator[None]:
    """A full disk raises an OSError that names no file; here it names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
