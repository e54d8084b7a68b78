"""Records as tables: one row for each trajectory, each round or each affinity.

Plain readers of JSON and CSV that need neither PyTorch nor a network; `results/README.md` says what
every column means. Rounds count from 0. What a record lacks is NaN, or NA in whole numbers.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mas_core.config import FL, PRESETS, Data, Model, UserError
from mas_core.records.store import BESIDE, results_folder

LETTERS = "sdnkterca"  # the nine tasks, in the order of tasks.py (which imports PyTorch)
PARTS = {"data": Data, "model": Model, "fl": FL}  # of config.json, named like the settings

# Columns of `records` and their types. Int64 is pandas' whole number that may be NA.
RECORDS: dict[str, str] = {
    "id": "str", "tasks": "str", "seed": "int64", "parent": "str", "start_round": "int64",
    "lr_from": "int64", "complete": "bool", "rounds_done": "int64",
    **{f"test_best_{a}": "float64" for a in LETTERS}, "test_best_total": "float64",
    **{f"test_last_{a}": "float64" for a in LETTERS}, "test_last_total": "float64",
    **{f"test_constant_{a}": "float64" for a in LETTERS}, "best_round": "Int64",
    "test_images": "Int64", "samples": "int64", "seconds": "float64", "affinity_seconds": "float64",
    "joules": "float64", "bytes_down": "int64", "bytes_up": "int64", "peak_memory_bytes": "Int64",
    "device": "str", "threads": "Int64", "energy_source": "str", "images_hash": "str",
    "git_revision": "str",
}  # fmt: skip
SETTINGS = tuple(f"{part}.{f.name}" for part, kind in PARTS.items() for f in fields(kind))
AFFINITIES = {
    "round": "int64", "client": "int64", "measurements": "int64", "updates": "str",
    "receives": "str", "affinity": "float64",
}  # fmt: skip


def existing_folder(results: Path | str | None = None) -> Path:
    """The folder that records are read from; a UserError if `results_folder` is no folder."""
    folder = results_folder(results)
    if not folder.is_dir():
        nor = f", nor is {BESIDE}" if results is None else ""
        raise UserError(f"no records: {folder.absolute()} is no folder{nor}; "
                        "name one with results=...")  # fmt: skip
    return folder


def preset_folder(preset: str, results: Path | str | None = None) -> Path:
    """The folder of a preset's records, which need not exist yet; a UserError for other names."""
    root = existing_folder(results) / preset
    if preset not in PRESETS and not root.is_dir():
        raise UserError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    return root


def record_folder(id_: str, results: Path | str | None = None) -> Path:
    """The folder of a record, of whatever preset; a UserError that says where it looked."""
    root = existing_folder(results)
    found = [p / id_ for p in sorted(root.glob("*")) if (p / id_ / "config.json").exists()]
    if not found:
        raise UserError(f"no record {id_} in any preset of {root.absolute()}")
    return found[0]


def seeds_on_record(preset: str = "small", results: Path | str | None = None) -> list[int]:
    """The seeds that any trajectory of a preset was trained with; [] where there are none yet."""
    names = [path.name for path in (results_folder(results) / preset).glob("*-s*-*")]
    return sorted({int(found[1]) for name in names if (found := re.search(r"-s(\d+)-", name))})


def records(preset: str = "small", results: Path | str | None = None) -> pd.DataFrame:
    """All trajectories of a preset, a row each: what determined them, losses, sums of cost."""
    root = preset_folder(preset, results)
    rows = [_record(path.parent) for path in sorted(root.glob("*/config.json"))]
    known = {*RECORDS, *SETTINGS}
    own = dict.fromkeys(name for row in rows for name in row if name not in known)
    table = pd.DataFrame(rows, columns=[*RECORDS, *SETTINGS, *own])
    return table.astype({name: kind for name, kind in RECORDS.items()})


def rounds(id_: str, results: Path | str | None = None) -> pd.DataFrame:
    """The rounds of a trajectory, a row each; `clients` is a tuple of client ids."""
    folder = record_folder(id_, results)
    rows = _read(folder / "rounds.csv", _rows) if (folder / "rounds.csv").exists() else []
    table = pd.DataFrame(rows, columns=None if rows else ["round"])
    whole = {"round", "samples", "bytes_down", "bytes_up"} & set(table)
    real = [name for name in table if name not in whole and name != "clients"]
    if "clients" in table:
        table["clients"] = [tuple(map(int, text.split())) for text in table["clients"]]
    table[real] = table[real].replace("", "nan").astype(float)
    return table.astype(dict.fromkeys(whole, "int64"))


def affinities(id_: str, results: Path | str | None = None) -> pd.DataFrame:
    """Measured affinities of a trajectory: a row a round, client and ordered pair of tasks.

    A step for the task in `updates` changes the shared encoder; the affinity is Eq. 3 onto the task
    in `receives`, the mean over the `measurements` of that client and round.
    """
    path = record_folder(id_, results) / "affinity.csv"
    if not path.exists():
        raise UserError(f"{id_} measured no affinities; its record has no affinity.csv")
    wide = _read(path, pd.read_csv)
    pairs = [name for name in wide if ">" in name and name[0] != name[2:]]
    long = wide.melt(["round", "client", "measurements"], pairs, "pair", "affinity")
    long["updates"], long["receives"] = long["pair"].str[0], long["pair"].str[2]
    long = long.sort_values(["round", "client"], kind="stable", ignore_index=True)
    return long[list(AFFINITIES)].astype(AFFINITIES)


def _record(folder: Path) -> dict[str, Any]:
    config = _read(folder / "config.json", json.load)
    path = folder / "result.json"
    result = _read(path, json.load) if path.exists() else {}
    rows = _read(folder / "rounds.csv", _rows) if (folder / "rounds.csv").exists() else []
    try:
        return _row(folder.name, config, result, rows)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, error) from None


def _row(
    id_: str, config: dict[str, Any], result: dict[str, Any], rows: list[dict[str, str]]
) -> dict[str, Any]:
    def total(column: str, of: Callable[[str], Any]) -> Any:
        return sum(of(row[column]) for row in rows)

    row = {name: config[name] for name in ("tasks", "seed", "start_round", "lr_from")}
    row |= {"id": id_, "parent": config["parent"] or "", "complete": bool(result)}
    for part, kind in PARTS.items():  # a field younger than the record has its default
        row |= {f"{part}.{f.name}": config[part].get(f.name, f.default) for f in fields(kind)}
    if config["fl"]["clients"] is not None:
        row["fl.clients"] = tuple(config["fl"]["clients"])
    row["rounds_done"] = config["start_round"] + len(rows)
    for judge in ("test_best", "test_last", "test_constant"):
        row |= {f"{judge}_{a}": loss for a, loss in result.get(judge, {}).items()}
    for judge in ("test_best", "test_last"):
        row[f"{judge}_total"] = sum(result[judge].values()) if result else np.nan
    row |= {name: total(name, int) for name in ("samples", "bytes_down", "bytes_up")}
    row |= {name: total(name, float) for name in ("seconds", "affinity_seconds")}
    measured = bool(rows) and all(r["joules"] for r in rows)
    row["joules"] = total("joules", float) if measured else np.nan
    for name in ("best_round", "test_images", "peak_memory_bytes", "threads"):
        row[name] = result.get(name, pd.NA)
    for name in ("device", "energy_source", "git_revision"):
        row[name] = result.get(name) or ""
    row["images_hash"] = result.get("data") or ""
    return row


def _read(path: Path, reader: Callable[[Any], Any]) -> Any:
    """What `reader` makes of a file; a UserError that names the file if it cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return reader(file)
    except (ValueError, OSError) as error:  # bytes that are no text are ValueErrors, too
        raise _damaged(path, error) from None


def _rows(file: Iterable[str]) -> list[dict[str, str]]:
    reader = csv.reader(file)
    header = next(reader, ["round"])
    return [dict(zip(header, cells, strict=True)) for cells in reader]


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error}); restore it, or delete the record to train anew")
