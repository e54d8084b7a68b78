"""Sets of tasks as bit masks, and the partition whose parts' values sum highest, exactly.

Task t is bit 1 << t. Dynamic programming over all subsets finds the best partition of n tasks into
k parts in about k 3^(n-1) / 2 additions.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Group = tuple[int, ...]  # a set of tasks outside of here, sorted


def partition_table(values: np.ndarray, x: int) -> np.ndarray:
    """best[k, mask]: highest sum of values over partitions of `mask` into exactly k groups.

    (x + 1, 2^n), -inf where there is none. The lowest task left always opens the next group, so
    besides the full set only sets without task 0 are ever left over, and only those are filled.
    """
    full = len(values) - 1
    best = np.full((x + 1, full + 1), -np.inf)
    best[0, 0] = 0
    best[1, 1:] = values[1:]
    masks = np.append(np.arange(2, full, 2), full)
    size = members_of(full.bit_length())[masks].sum(1)
    for p in range(2, full.bit_length() + 1):
        of_size = masks[size == p]
        left = subsets(of_size & (of_size - 1))  # (sets, 2^(p-1)): all but the group just opened
        opened = values[of_size[:, None] ^ left]
        for k in range(2, min(p, x) + 1):
            best[k, of_size] = (opened + best[k - 1][left]).max(1)
    return best


def best_partition(values: np.ndarray, best: np.ndarray, x: int, tie: float) -> list[int]:
    """The lexicographically first of the best partitions of all tasks into x groups, as masks."""
    chosen: list[int] = []
    mask, reached = len(values) - 1, 0.0
    for k in range(x, 0, -1):
        left = subsets(np.array([mask & (mask - 1)]))[0]  # all but the group just opened
        totals = reached + values[mask ^ left] + best[k - 1][left]
        enough = min(best[x, -1] - tie, totals.max())
        chosen.append(min((mask ^ left[totals >= enough]).tolist(), key=tasks_in))
        reached += values[chosen[-1]]
        mask ^= chosen[-1]
    return chosen


def members_of(n: int) -> np.ndarray:
    """Whether task t is in mask m; (2^n, n) bool."""
    return np.arange(1 << n)[:, None] >> np.arange(n) & 1 == 1


def subsets(masks: np.ndarray) -> np.ndarray:
    """All subsets of masks that have p tasks each, the empty one first; (len(masks), 2^p)."""
    found = np.zeros((len(masks), 1), dtype=np.int64)
    rest = masks.copy()
    while rest.any():
        lowest = rest & -rest
        found = np.concatenate([found, found | lowest[:, None]], axis=1)
        rest ^= lowest
    return found


def mask_of(group: Iterable[int]) -> int:
    return sum(1 << task for task in group)


def tasks_in(mask: int) -> Group:
    return tuple(task for task in range(int(mask).bit_length()) if mask >> task & 1)
