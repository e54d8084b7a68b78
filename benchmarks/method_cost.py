"""Training time of every method against one-by-one, in one run.

Records are made whenever a machine is free, and a shared machine's speed drifts: times of records
made on different days compare badly. Here one round of every network that the methods train, the
same clients and images for all, is timed in turns. A method costs the sum of its rounds, counted as
`records.study.part_cost` counts them: MAS and TAG pay for affinities in the
rounds they read, only there.
What a method trains, and the groups it chose, come from the records of the small preset, seed 0.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mas.paper.experiments import Key, ask, figure_5, figure_6
from mas_core.config import Settings
from mas_core.data.clients import open_data
from mas_core.federated import run_round
from mas_core.records.store import Store, open_store
from mas_core.records.study import MethodResult
from mas_core.records.training import build, start_state
from mas_core.records.trajectory import Trajectory

from .scenes import prepared
from .timing import Row, in_turns, main

RECORDS = Path(__file__).parent.parent / "results"
OF_A_METHOD = ("method", "prox_mu", "gradnorm_alpha", "gradnorm_lr", "options")


def measure(quick: bool, folder: Path) -> list[Row]:
    preset, rooms = prepared(quick, folder)
    store = open_store("small", RECORDS)
    recorded = ask(figure_5, store, partial=True)
    if quick:
        recorded = {key: r for key, r in recorded.items() if key[0] in ("one-by-one", "MAS-2")}
    else:
        recorded |= ask(figure_6, store, partial=True)
    return timed(recorded, preset, store, rooms, 1 if quick else 3)


def timed(
    recorded: dict[Key, MethodResult], preset: Settings, store: Store, rooms: Path, repeats: int
) -> list[Row]:
    """Every result but one-by-one's against that of its task set, which has to be among them."""
    rounds = {key: rounds_trained(result, preset) for key, result in recorded.items()}
    data, actions = open_data(preset.data, rooms, "sdnkterca"), {}
    for trajectory in dict.fromkeys(t for counted in rounds.values() for t in counted):
        net = build(trajectory).to(memory_format=torch.channels_last)
        state = start_state(trajectory, net, store, rooms)
        actions[trajectory] = partial(run_round, net, state, trajectory, 0, data)
    seconds = in_turns(actions, repeats)
    cost = {
        key: [sum(n * s for n, s in zip(counted.values(), turn, strict=True))
              for turn in zip(*(seconds[t] for t in counted), strict=True)]
        for key, counted in rounds.items()
    }  # fmt: skip
    rows = []
    for key, result in recorded.items():
        alone = cost["one-by-one", *key[1:]]
        if key[0] != "one-by-one":
            subject = f"{result.tasks}: {key[0]} ({' '.join(result.groups)})"
            ratios = [a / b for a, b in zip(cost[key], alone, strict=True)]
            rows.append(Row(subject, "one-by-one", "time", ratios))
    return rows


def rounds_trained(result: MethodResult, preset: Settings) -> Counter[Trajectory]:
    """How many rounds a method pays for, by a trajectory whose round 0 costs as much as each."""
    counted: Counter[Trajectory] = Counter()
    for part in result.parts:
        t = part.trajectory
        same = {k: getattr(t.fl, k) for k in OF_A_METHOD}
        fl = replace(preset.fl, measure_rounds=0, **same)
        model = t.model if ":" in t.model.size else preset.model  # a network of the method's own
        plain = Trajectory(t.tasks, 0, preset.data, model, fl)
        measuring = replace(plain, fl=replace(fl, measure_rounds=1))
        measured = max(0, min(part.affinity_rounds, part.end) - part.begin)
        counted += Counter({measuring: measured, plain: part.end - part.begin - measured})
    return counted


if __name__ == "__main__":
    main(measure)
