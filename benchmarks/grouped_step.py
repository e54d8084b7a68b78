"""A round's clients side by side (`fl.arithmetic="grouped"`) against the same clients one by one.

Whole rounds of the small preset on rooms, from the same weights, in turns: what they average to is
compared before anything is timed. "Alike" are clients of equal numbers of batches, where all stand
side by side to the end; clients of the preset differ, and the longest ends with few beside it.
"""

from dataclasses import replace
from pathlib import Path

import torch

from mas_core.data.clients import Clients, open_data
from mas_core.federated import client_batches, run_round, select_clients
from mas_core.grouped import train_clients
from mas_core.local import local_update
from mas_core.records.training import build
from mas_core.records.trajectory import Trajectory

from .scenes import prepared
from .timing import Row, compare, in_turns, main


def measure(quick: bool, folder: Path) -> list[Row]:
    preset, rooms = prepared(quick, folder)
    repeats, rows = 1 if quick else 5, []
    for tasks in ("sdnkt",) if quick else ("sdnkt", "d"):
        data = open_data(preset.data, rooms, tasks)
        for measured in (0, preset.fl.rounds)[: len(tasks)]:
            fl = replace(preset.fl, measure_rounds=measured)
            one = Trajectory(tasks, 0, preset.data, preset.model, fl)
            rows.append(_rounds(one, data, repeats, " that measure Eq. 3" if measured else ""))
        rows.append(_alike(one, data, 1 if quick else 12, repeats))
    return rows


def _rounds(one: Trajectory, data: Clients, repeats: int, what: str) -> Row:
    net = build(one).to(memory_format=torch.channels_last).train()
    state = {name: t.clone() for name, t in net.state_dict().items()}
    side = replace(one, fl=replace(one.fl, arithmetic="grouped"))

    def rounds(t: Trajectory) -> list:
        return [run_round(net, state, t, r, data)[1].losses for r in range(2)]

    for a, b in zip(rounds(side), rounds(one), strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-2, atol=1e-3)
    seconds = in_turns({"side by side": lambda: rounds(side), "one by one": lambda: rounds(one)},
                       repeats)  # fmt: skip
    K = one.fl.clients_per_round
    return compare(seconds, "side by side", "one by one", "speed").named(
        f"{one.tasks}: rounds of {K} clients{what}", "the same clients one by one"
    )


def _alike(one: Trajectory, data: Clients, steps: int, repeats: int) -> Row:
    net = build(one).to(memory_format=torch.channels_last).train()
    state = {name: t.clone() for name, t in net.state_dict().items()}
    clients = select_clients(one, len(data.names), 0)
    first = {k: next(client_batches(one, data, k, 0, torch.device("cpu"))) for k in clients}
    batches = {k: [batch] * steps for k, batch in first.items()}
    fl, side = one.fl, replace(one.fl, arithmetic="grouped")

    def together() -> None:
        train_clients(net, state, {k: iter(b) for k, b in batches.items()}, side, 1e-3)

    def alone() -> None:
        for own in batches.values():
            net.load_state_dict(state)
            local_update(net, own, fl, 1e-3)

    seconds = in_turns({"side by side": together, "one by one": alone}, repeats)
    return compare(seconds, "side by side", "one by one", "speed", "aim 1.5").named(
        f"{one.tasks}: {len(clients)} clients of {steps} batches each", "the same one by one"
    )


if __name__ == "__main__":
    main(measure)
