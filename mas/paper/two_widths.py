"""Clients of two widths: does MAS carry over where half of the clients can train half the network?

Written down before anything of this was trained, but for all-in-one's first 30 rounds of seed 0 and
their validation losses, from which it was chosen how BatchNorm's statistics are had (below).

Every second client is weak. What can be done about that, in order of what it asks of them:

    all wide           nobody is weak: the preset's network at all clients
    two widths         weak clients train the leading half of the encoder's channels (HeteroFL, see
                       `TwoWidths`); the wide network is tested
    wide clients only  weak clients are left out: `fl.clients` are the others
    all narrow         everybody trains, and is tested with, a network of half the channels

All four are trained by the same rule and tested with BatchNorm's statistics computed anew (static
BatchNorm), as running ones would come from two clients a round with two widths, from four without.
So the weights of "all wide" are those of the preset's own records, and its losses are others.

Hypotheses, on sdnkt
    1  MAS's gain carries over: with two widths MAS-2 has a lower loss than one-by-one and than
       all-in-one.
    2  It carries over whole: MAS-2's gain over each lies within 1 % of that with all clients wide.
    3  Narrow clients help: with two widths all-in-one and MAS-2 each have a lower loss than with
       wide clients only.
    4  The wide network is worth its cost: with two widths all-in-one and MAS-2 each have a lower
       loss than with all narrow.

Rule of judgement
    Test losses of the model with the least validation loss. An effect is delta-m, the mean over the
    five tasks of the per cent by which a loss lies below the control's, paired by seed, with
    Student's 95 % interval over seeds; the per cent of the total loss saved stands beside it. 1, 3
    and 4 hold for a pair if p, after Holm's correction over the six pairs, is at most 0.05 and the
    mean is above zero. 2 holds if the interval of the difference of the two gains, paired by
    seed, lies within -1 and 1 %. Where delta-m and the total loss disagree in sign, both are told
    and the hypothesis is open. One seed gives no verdict.

What stands beside them without a verdict: MAS-1, which tells a restart's gain from a split's; the
groups that MAS-2 chose; bytes, of which a narrow client is counted with what it holds alone.
"""

from __future__ import annotations

from typing import Any

from mas_core import methods
from mas_core.config import settings
from mas_core.records.store import Store
from mas_core.records.study import Study

TASKS = "sdnkt"
WIDTH = 0.5  # share of the encoder's channels at a weak client
EVERY = 2  # of so many clients the last is weak


def two_widths(
    store: Store, seed: int, overrides: dict[str, Any]
) -> dict[tuple[str, str, int], methods.Recipe]:
    """One-by-one, all-in-one, MAS-1 and MAS-2 on sdnkt, for each of the four kinds of clients."""
    usual = settings(store.preset, TASKS, overrides)
    wide = tuple(k for k in range(usual.data.buildings) if k % EVERY != EVERY - 1)
    # No figure shows affinities of rounds that no split reads.
    short = {"fl.method": "two_widths", "fl.measure_rounds": usual.mas.affinity_rounds}
    same = short | {"fl.options": (("width", 1.0),)}
    kinds = {
        "all wide": same,
        "two widths": short | {"fl.options": (("every", EVERY), ("width", WIDTH))},
        "wide clients only": same | {"fl.clients": wide},
        "all narrow": same | {"model.width": WIDTH},
    }
    recipes = {}
    for kind, changes in kinds.items():
        s = Study(TASKS, settings(store.preset, TASKS, overrides | changes), seed, store)
        made = {
            "one-by-one": methods.one_by_one(s),
            "all-in-one": methods.all_in_one(s),
            "MAS-1": methods.restarted(s, [s.tasks], "MAS-1"),
            "MAS-2": methods.merge_and_split(s, 2),
        }
        recipes |= {(f"{name} {kind}", s.tasks, seed): r for name, r in made.items()}
    return recipes
