"""The optimal split against enumerating all partitions.

The enumeration is written plainly but well: the value of every group is computed once, partitions
are built task by task with their number of groups, and the best of each number is kept. Sixteen
tasks have 10,480,142,147 partitions; that reference is extrapolated from the time a partition took.
"""

from pathlib import Path
from statistics import median

import numpy as np

from mas_core.split import best_split, best_splits, self_affinity

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
    if quick:
        return rows
    estimate = median(seconds["enumerating"]) / PARTITIONS[small] * PARTITIONS[16]
    taken = in_turns({"sixteen": lambda: best_splits(S)}, 2)["sixteen"]
    note = f"{median(taken):.2g} s; the reference is extrapolated from {small} tasks"
    rows.append(Row("16 tasks: best_splits, every x", f"enumerating {PARTITIONS[16]} partitions",
                    "speed", [estimate / s for s in taken], "under 5 s", note,
                    {"subject": median(taken), "reference": estimate}))  # fmt: skip
    return rows


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
