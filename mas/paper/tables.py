"""Results of the paper's experiments as one table: a row a method, task set and seed.

`results("small")` reads what is on record and trains nothing. Losses are test losses of the model
with the least validation loss, by task letter; `total_last` is that of the last round's model.
What an effect says about a claim is told by `verdicts`, from columns of this table by seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mas_core.records.store import Store, open_store
from mas_core.records.study import MethodResult
from mas_core.tasks import TASKS

from ..frames import preset_folder, seeds_on_record
from .experiments import NOTEBOOKS, Experiment, Key, ask

# The ratio of the paper's own columns (supplement Tables 3 to 5), so that the figures compare. The
# paper calls it the United Kingdom's value; it is what carbontracker took in its releases of the
# time where it found no other: the average of the EU-28 in 2017, 294.2060978.
GRAMS_CO2_PER_KWH = 294.21
# Columns of `results` and their types.
RESULTS: dict[str, str] = {
    "method": "str", "task_set": "str", "seed": "int64", "groups": "str", "total": "float64",
    "total_last": "float64", **dict.fromkeys(TASKS, "float64"), "delta_m_percent": "float64",
    "delta_m_last_percent": "float64", **{f"delta_{a}_percent": "float64" for a in TASKS},
    "train_seconds": "float64", "search_seconds": "float64", "time_ratio": "float64",
    "energy_kwh": "float64", "energy_kwh_estimated": "float64", "samples": "int64",
    "bytes_sent": "int64", "bytes_ratio": "float64", "peak_memory_bytes": "int64",
    "devices": "str",
}  # fmt: skip


def results(
    preset: str = "small",
    seeds: Iterable[int] | None = None,
    results: Path | str | None = None,
    experiments: Iterable[Experiment] | None = None,
) -> pd.DataFrame:
    """Every result on record, a row each, with all columns of RESULTS.

    seeds        None: all that the records hold
    results      None: the folder results/ here, or that of the clone
    experiments  None: all that a notebook asks for
    """
    folder = preset_folder(preset, results).parent
    if experiments is None:
        experiments = dict.fromkeys(e for several in NOTEBOOKS.values() for e in several)
    seeds = seeds_on_record(preset, folder) if seeds is None else list(seeds)
    store, found = open_store(preset, folder), {}
    for experiment in experiments:
        for (method, tasks, seed), value in ask(experiment, store, seeds, partial=True).items():
            known = found.get((method, tasks, seed))
            if known is not None and _trained(known) != _trained(value):  # by another arithmetic
                method = f"{method} ({experiment.__name__})"
            found[method, tasks, seed] = value
    return tidy(found, time_ratios(folder) if preset == "small" else {})


def tidy(
    found: Mapping[Key, Any], ratios: Mapping[Any, Sequence[float]] | None = None
) -> pd.DataFrame:
    """What an experiment returned, as rows of RESULTS; a list of results has a row each.

    delta-m is against one-by-one of the same task set and seed, and of the same E and K where a
    method's name gives them ("MAS-2 E=5"); `ratios` as `time_ratios` gives them.
    """
    rows = []
    for (method, tasks, seed), value in found.items():
        base = found.get((baseline(method), tasks, seed))
        ratio = (ratios or {}).get((tasks, method), [np.nan])
        for r in value if isinstance(value, list) else [value]:
            rows.append(_row(method, r, base) | {"time_ratio": float(np.median(ratio))})
    own = dict.fromkeys(name for row in rows for name in row if name not in RESULTS)
    return pd.DataFrame(rows, columns=[*RESULTS, *own]).astype(RESULTS)


def _trained(value: Any) -> list[str]:
    """The ids of the trajectories behind a result, or a list of them."""
    results = value if isinstance(value, list) else [value]
    return sorted({part.trajectory.id for r in results for part in r.parts})


def _row(method: str, r: MethodResult, base: MethodResult | None) -> dict[str, Any]:
    sent = r.cost.bytes_up + r.cost.bytes_down
    row = {"method": method, "task_set": r.tasks, "seed": r.seed, "groups": ",".join(r.groups),
           "total": r.total, "total_last": r.total_last, **r.losses,
           "train_seconds": r.cost.seconds,
           "search_seconds": r.search_cost.seconds if r.search_cost else np.nan,
           "energy_kwh": r.cost.energy_kwh, "energy_kwh_estimated": r.cost.energy_kwh_estimated,
           "samples": r.cost.samples, "bytes_sent": sent,
           "peak_memory_bytes": r.cost.peak_memory_bytes,
           "devices": "; ".join(r.cost.devices)}  # fmt: skip
    if base is not None:
        changes = task_changes(r.losses, base.losses)
        row |= {f"delta_{a}_percent": change for a, change in changes.items()}
        row["delta_m_percent"] = delta_m(r.losses, base.losses)
        row["delta_m_last_percent"] = delta_m(r.losses_last, base.losses_last)
        row["bytes_ratio"] = sent / (base.cost.bytes_up + base.cost.bytes_down)
    return row


def baseline(method: str) -> str:
    """The one-by-one that a method is compared with: of the same setting where one varies."""
    varied = re.search(r" (?:(?:[EKm]|dial|alpha)=[\d.]+|all wide|two widths|wide clients only"
                       r"|all narrow)( \(\w+\))?", method)  # fmt: skip
    return "one-by-one" + (varied[0] if varied else "")


def task_changes(losses: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """Per cent by which each task's loss lies below its loss in `base`: positive is better."""
    return {a: 100 * (base[a] - loss) / base[a] for a, loss in losses.items()}


def delta_m(losses: Mapping[str, float], base: Mapping[str, float]) -> float:
    """Mean relative change over tasks, in per cent, positive where `losses` are better.

    delta_m = 100 / n sum_i (L_i,base - L_i) / L_i,base   (Maninis et al., 2019, with the sign of
    losses). Every task counts the same, whereas tasks with large losses dominate a total.
    """
    return float(np.mean(list(task_changes(losses, base).values())))


def saved(
    table: pd.DataFrame, worse: str, better: str, tasks: str, column: str = "total"
) -> pd.Series:
    """Per cent of `column` that a method saves against another, for every seed of both."""
    a, b = (by_seed(table, method, tasks, column) for method in (worse, better))
    return (100 * (1 - b / a)).dropna()


def by_seed(table: pd.DataFrame, method: str, tasks: str, column: str = "total") -> pd.Series:
    """A column by seed, empty where the method is not on record."""
    part = table[(table.method == method) & (table.task_set == tasks)]
    return part.set_index("seed")[column]


def time_ratios(folder: Path | str) -> dict[tuple[str, str], list[float]]:
    """Training time over one-by-one's by (task set, method), every repeat, of the small preset.

    Trajectories on record were trained in different hours of shared machines, whose speed varies.
    `python -m benchmarks method_cost` times a round of all networks in turns; where several
    machines did, the first file by name counts. Its records hold the median, least and greatest of
    a ratio: all repeats where there were three.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for file in sorted(Path(folder, "benchmarks").glob("*.json")):
        subjects = json.loads(file.read_text()).get("subjects", {})  # a GPU's file has none
        for row in (*subjects.get("method_cost", []), *subjects.get("rival_cost", [])):
            tasks, _, method = row["subject"].partition(": ")
            kept = {1: ("median",), 2: ("min", "max")}.get(row["values"], ("min", "median", "max"))
            values = [row[name] for name in kept]
            found.setdefault((tasks, method.rpartition(" (")[0]), values)
            found.setdefault((tasks, "one-by-one"), [1.0] * len(values))
    return found


def client_losses(store: Store, result: MethodResult) -> pd.DataFrame | None:
    """A method's test losses on every client's own test views: (clients, tasks).

    A task in several groups has those of the group that serves it. NaN for a client without test
    views; None where a record is older than these losses.
    """
    finals = [part.trajectory for part in result.parts if part.end == part.trajectory.fl.rounds]
    records = [store.result(t) for t in finals if set(t.tasks) in map(set, result.groups)]
    columns = {}
    for a in result.tasks:
        (serving, *_) = [r for r in records if r and r["test_best"].get(a) == result.losses[a]]
        if "test_best_clients" not in serving:
            return None
        columns[a] = serving["test_best_clients"][a]
    return pd.DataFrame(columns, dtype=float).rename_axis("client")
