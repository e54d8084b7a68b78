"""Who should be merged at all? Tasks that fare better alone leave the merged network at the split.

What had been seen when this was written down, in the controls on record of the presets' own
buildings (sdnkt with ten seeds, erckt, nine tasks; medium): whatever groups follow, merging first
costs keypoints and edge textures 2 to 6 % of their test loss on small and 7 to 29 % on medium, and
saves the other tasks 1 to 15 %. A split mends only part of it. Already before R0 the validation
losses of those two are lower alone with every seed; single validations are too noisy to tell.

The rule ("MAS-apart"), written down and frozen then
    Up to R0 every task is trained alone as well. A task leaves if its validation losses alone lie
    more than 2 % below the merged network's: the mean of log(alone / merged) over the validations
    from R0 / 3 to R0 is below -0.02. Tasks that leave go on alone from their own weights; the
    others go on together, in one group, from the merged ones. Both restart their schedule at R0,
    as MAS's groups do. No affinity is read.

Hypotheses, on sdnkt with the four other sets of 32 buildings (`data.render_seed` 1 to 4, two seeds
each), of whose records total losses had been looked at, but not those of single tasks
    1  MAS-apart has a lower total test loss than MAS-2.
    2  It has a lower one than one-by-one restarted at R0, which is trained for as long.
    3  The tasks that leave are those whose test loss merging raises there, too: of the tasks that
       leave, and of those that stay, more than half are better off for it (against MAS-n and
       against one-by-one restarted).

Rule of judgement
    Per cent of total test loss saved, of the model with the least validation loss; the mean over
    the two seeds of each set of buildings, Student's 95 % interval over the four sets; 1 and 2 are
    corrected by Holm's method over the two. 3 is counted over sets, seeds and tasks and has no
    test. The same comparison on the buildings that the rule was made on is shown beside it, and
    proves nothing of the rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mas_core import methods
from mas_core.config import settings
from mas_core.records.store import Store
from mas_core.records.study import Study

WARM_UP = 1 / 3  # share of R0 whose validations are not read
MARGIN = 0.02  # the merged network lags a little before R0 in tasks that gain in the end


def who_to_merge(
    store: Store, seed: int, overrides: dict[str, Any], task_sets: Iterable[str] = ("sdnkt",)
) -> dict[tuple[str, str, int], methods.Recipe]:
    """MAS-apart, and what it is compared with: MAS-2, and one-by-one with the same restart."""
    recipes = {}
    for tasks in task_sets:
        s = Study(tasks, settings(store.preset, tasks, overrides), seed, store)
        restarted = "one-by-one restarted"
        made = {
            restarted: methods.restarted(s, s.tasks, restarted),
            "MAS-2": methods.merge_and_split(s, 2),
            "MAS-apart": mas_apart(s),
        }
        recipes |= {(name, tasks, seed): recipe for name, recipe in made.items()}
    return recipes


def mas_apart(study: Study) -> methods.Recipe:
    """Merged and alone up to R0; then each task goes on alone or merged, as `better_alone` says."""
    R0, trunk = study.split_round, study.all_in_one()
    alone = {a: study.again(a) for a in study.tasks}
    until_R0 = [trunk, *(t.parent for t in alone.values())]
    yield [methods.Need(t, R0) for t in until_R0]
    leaving = [a for a in study.tasks if better_alone(study, a) > MARGIN]
    staying = "".join(a for a in study.tasks if a not in leaving)
    branches = [study.from_all_in_one(staying)] if staying else []
    branches += [alone[a] for a in leaving]
    yield [methods.Need(t, study.rounds) for t in branches]
    parts = [methods.Part(t, 0, R0) for t in until_R0]
    parts += [methods.Part(t, R0, study.rounds) for t in branches]
    return study.result("MAS-apart", [staying] * bool(staying) + leaving, branches, parts)


def better_alone(study: Study, a: str, rounds: int | None = None) -> float:
    """The mean of log(merged / alone) of task a's validation losses from rounds / 3 to `rounds`.

    `rounds` is R0 where none is given. NaN, with which nobody leaves, where none is validated.
    """
    rounds = study.split_round if rounds is None else rounds
    column = f"val_{a}"  # a record that is only planned has none
    merged, alone = (
        study.store.rounds(t).set_index("round").reindex(columns=[column])[column].astype(float)
        for t in (study.all_in_one(), study.again(a).parent)
    )
    advantage = np.log(merged) - np.log(alone)
    done = advantage.index + 1
    return advantage[(done >= WARM_UP * rounds) & (done <= rounds)].mean()
