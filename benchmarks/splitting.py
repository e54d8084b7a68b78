"""The optimal split against enumerating all partitions.

The enumeration is written plainly but well: the value of every group is computed once, partitions
are built task by task with their number of groups, and the best of each number is kept. Sixteen
tasks have 10,480,142,147 partitions; that reference is extrapolated from the time a partition took.

TAG and HOA choose groups that may share tasks. Their published searches try all sets of x groups
out of the 2^n - 1; here that is written with NumPy, a set of groups at a time, and extrapolated
from the first 20,000 sets where there are more.
"""

from itertools import combinations, islice
from math import comb
from pathlib import Path
from statistics import median

import numpy as np

from mas_core.split import best_split, best_splits, hoa_groups, self_affinity, tag_groups

from .timing import Row, in_turns, main

PARTITIONS = {6: 203, 9: 21_147, 16: 10_480_142_147}  # Bell numbers


def measure(quick: bool, folder: Path) -> list[Row]:
    small, repeats = (6, 1) if quick else (9, 5)
    S = np.random.default_rng(0).normal(size=(16, 16))
    few = S[:small, :small]
    one = best_split(few, 3).score
    if abs(enumerate_partitions(few)[3] - one) > 1e-9 * abs(one):
        raise RuntimeError("enumeration and best_split disagree")
    every, every_one = f"{small} tasks: best_splits, every x", f"{small} tasks: best_split, each x"
    seconds = in_turns(
        {
            every: lambda: best_splits(few),
            every_one: lambda: [best_split(few, x) for x in range(1, small + 1)],
            "enumerating": lambda: enumerate_partitions(few),
        },
        repeats,
    )
    counted = f"enumerating {PARTITIONS[small]} partitions"
    rows = []
    for name, reach in ((every, "under 10 ms"), (every_one, "")):
        ratios = [b / a for a, b in zip(seconds[name], seconds["enumerating"], strict=True)]
        milliseconds = 1000 * median(seconds[name])
        rows.append(Row(name, counted, "speed", ratios, reach, f"{milliseconds:.2g} ms",
                        {"subject": milliseconds / 1000,
                         "reference": median(seconds["enumerating"])}))  # fmt: skip
    rows += [_overlapping(few, kind, 2 if quick else 3, repeats) for kind in ("TAG", "HOA")]
    if quick:
        return rows
    estimate = median(seconds["enumerating"]) / PARTITIONS[small] * PARTITIONS[16]
    taken = in_turns({"sixteen": lambda: best_splits(S)}, 2)["sixteen"]
    note = f"{median(taken):.2g} s; the reference is extrapolated from {small} tasks"
    rows.append(Row("16 tasks: best_splits, every x", f"enumerating {PARTITIONS[16]} partitions",
                    "speed", [estimate / s for s in taken], "under 5 s", note,
                    {"subject": median(taken), "reference": estimate}))  # fmt: skip
    return rows


def _overlapping(S: np.ndarray, kind: str, x: int, repeats: int) -> Row:
    """TAG's or HOA's best groups against trying every set of x groups."""
    n, single = len(S), np.full(len(S), 1e-6)
    gain = S if kind == "TAG" else -S
    served = np.full((2**n - 1, n), -np.inf)  # what a task has from a group that contains it
    for row, mask in enumerate(range(1, 2**n)):
        tasks = [t for t in range(n) if mask >> t & 1]
        for t in tasks:
            others = [o for o in tasks if o != t]
            onto = gain[others, t] if kind == "TAG" else gain[t, others]
            served[row, t] = onto.mean() if others else (single[t] if kind == "TAG" else -single[t])
    count, limit = comb(len(served), x), 20_000

    def enumerate_some() -> float:
        return max(float(served[list(rows)].max(0).sum())
                   for rows in islice(combinations(range(len(served)), x), limit))  # fmt: skip

    def ours() -> float:
        found = tag_groups(S, x) if kind == "TAG" else hoa_groups(single, S, x)
        rows = [sum(1 << t for t in group) - 1 for group in found.groups]
        return float(served[rows].max(0).sum())

    best, tried = ours(), enumerate_some()
    if best < tried - 1e-9 or (count <= limit and abs(best - tried) > 1e-9):
        raise RuntimeError(f"{kind}: enumeration and {kind.lower()}_groups disagree")
    seconds = in_turns({"ours": ours, "some": enumerate_some}, repeats)
    whole = [s * max(1.0, count / limit) for s in seconds["some"]]
    note = f"{1000 * median(seconds['ours']):.2g} ms; enumerating {median(whole):.3g} s"
    note += ", extrapolated" * (count > limit)
    return Row(f"{n} tasks, {x} groups: {kind.lower()}_groups", f"trying {count} sets of groups",
               "speed", [b / a for a, b in zip(seconds["ours"], whole, strict=True)], "", note,
               {"subject": median(seconds["ours"]), "reference": median(whole)})  # fmt: skip


def enumerate_partitions(S: np.ndarray) -> dict[int, float]:
    """Best score of a partition of n tasks into x groups, for every x, by trying all."""
    S = self_affinity(S)
    n = len(S)
    value = {1 << t: float(S[t, t]) for t in range(n)}
    for mask in range(1, 1 << n):
        tasks = [t for t in range(n) if mask >> t & 1]
        if len(tasks) > 1:
            block = S[np.ix_(tasks, tasks)]
            value[mask] = float(block.sum() - block.trace()) / (len(tasks) - 1)
    best: dict[int, float] = {}
    groups: list[int] = []

    def place(task: int) -> None:
        if task == n:
            score = sum(value[group] for group in groups)
            if score > best.get(len(groups), float("-inf")):
                best[len(groups)] = score
            return
        for i in range(len(groups)):
            groups[i] |= 1 << task
            place(task + 1)
            groups[i] ^= 1 << task
        groups.append(1 << task)
        place(task + 1)
        groups.pop()

    place(0)
    return best


if __name__ == "__main__":
    main(measure)
