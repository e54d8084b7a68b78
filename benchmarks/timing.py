"""What every benchmark shares: measuring in turns, rows of ratios, a table, JSON."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mas_core.records.cost import device_name
from mas_core.records.store import provenance

cpu = time.process_time  # of this process alone: what else runs on a machine disturbs it little
wall = time.perf_counter  # where several processes or a GPU do the work


@dataclass(frozen=True)
class Row:
    """A subject against a reference: one ratio a repeat, or another figure."""

    subject: str
    reference: str
    quantity: str  # "time" subject / reference, "speed" reference / subject, or another figure
    values: list[float]
    reach: str = ""  # what is aimed at
    note: str = ""
    seconds: dict[str, float] = field(default_factory=dict)  # medians

    def named(self, subject: str, reference: str) -> Row:
        """The same figures under names that a reader understands."""
        return replace(self, subject=subject, reference=reference)

    def to_json(self) -> dict[str, Any]:
        ratios = {f.__name__: round_(f(self.values)) for f in (median, min, max)}
        seconds = {name: round_(s) for name, s in self.seconds.items()}
        return vars(self) | {"values": len(self.values), **ratios, "seconds": seconds}


def round_(number: float) -> float:
    return float(f"{number:.4g}")


def in_turns(
    actions: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = cpu
) -> dict[str, list[float]]:
    """Seconds of every action, A B A B ..., after one run of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            begin = clock()
            action()
            if repeat:
                seconds[name].append(clock() - begin)
    return seconds


def compare(seconds: dict[str, list[float]], subject: str, reference: str, *about: str) -> Row:
    """The row of two actions that took turns, ratios turn by turn; about: quantity, reach, note."""
    inverted = about[0] == "speed"
    values = [b / a if inverted else a / b for a, b in zip(seconds[subject], seconds[reference])]
    medians = {name: median(seconds[name]) for name in (subject, reference)}
    quantity, reach, note = (*about, "", "")[:3]
    return Row(subject, reference, quantity, values, reach, note, medians)


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        reach = f"  [{row['reach']}]" if row["reach"] else ""
        lines.append(f"{row['median']:<8g} ({row['min']:g} to {row['max']:g})  {row['quantity']}: "
                     f"{row['subject']}, against {row['reference']}{reach}")  # fmt: skip
        lines += [" " * 9 + row["note"]] if row["note"] else []
    return "\n".join(lines)


def about(device: str) -> dict[str, Any]:
    """The device's name, the same as a file name, versions and the git revision."""
    name = device_name(device)
    if device == "cpu":
        name = f"{name.rsplit(',', 1)[0]}, {os.cpu_count()} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return {"device": name, "slug": slug, **provenance()}


def main(measure: Callable[[bool, Path], list[Row]]) -> None:
    """The command line of one benchmark, on one thread."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="smallest shapes, one repeat")
    parser.add_argument("--data", type=Path, help="where images are rendered; default: thrown away")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row.to_json() for row in measure(asked.quick, asked.data or Path(scratch))]
    print(table(rows))
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
