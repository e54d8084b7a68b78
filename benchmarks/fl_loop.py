"""A trajectory against a bare PyTorch loop that does the same optimiser steps.

The trajectory is `federated.train` of the small preset without affinities: it draws clients, cuts
batches from the prepared arrays, starts every client from the server's state with a new optimiser,
averages, checks and keeps losses, writes rounds.csv and a checkpoint every round. The bare loop
holds the same batches in memory and does zero_grad, forward, loss, backward, step. Validation and
test are no part of training (the paper leaves them out of its costs, too) and have their own row.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from mas_core.config import Settings
from mas_core.data.clients import open_data
from mas_core.federated import client_batches, select_clients
from mas_core.records.store import Store
from mas_core.records.training import build, train
from mas_core.records.trajectory import Trajectory
from mas_core.tasks import task_losses

from .scenes import prepared
from .timing import Row, cpu, main


def measure(quick: bool, folder: Path) -> list[Row]:
    preset, rooms = prepared(quick, folder)
    rows = []
    for tasks in ("sdnkt",) if quick else ("sdnkt", "d"):
        rows += _compare(preset, tasks, rooms, rounds=3 if quick else 10, repeats=1 if quick else 5)
    return rows


def _compare(
    preset: Settings, tasks: str, rooms: Path, rounds: int, repeats: int
) -> list[Row]:
    # One validation, in the last round: the rounds before it hold none, the second to last is full.
    fl = replace(preset.fl, rounds=rounds, evaluate_every=rounds)
    trajectory = Trajectory(tasks, 0, preset.data, preset.model, fl)
    data, batches = open_data(preset.data, rooms, tasks), []
    for r in range(rounds):
        batches.append([])
        for k in select_clients(trajectory, len(data.names), r):
            batches[r] += client_batches(trajectory, data, k, r, torch.device("cpu"))
    in_rounds, whole = [], []
    for repeat in range(repeats + 1):
        begin, at, end = _train(trajectory, rooms)
        bare = bare_loop(trajectory, batches)
        if not repeat:
            continue  # the first turn warms up
        plain = sum(bare[1:-1])  # rounds after the first, before the one that validates
        in_rounds.append((at[-2] - at[1], plain))
        # What happens once (opening, decoding, the test) and at a validation, at the preset's
        # counts of rounds and validations.
        once = at[1] - begin - bare[0] + end - at[-1]
        validation = max(0.0, at[-1] - at[-2] - (at[-2] - at[1]) / (rounds - 2))
        R, each = preset.fl.rounds, plain / (rounds - 2)
        total = once + R * (at[-2] - at[1]) / (rounds - 2)
        total += R // preset.fl.evaluate_every * validation
        whole.append((total, R * each))
    steps = len(batches[1])
    return [
        _row(f"{tasks}: rounds of training, {steps} steps each", in_rounds, "<= 1.05",
             "clients, batches, averaging, records, a checkpoint a round"),
        _row(f"{tasks}: a trajectory of {preset.fl.rounds} rounds with all its parts", whole, "",
             f"from the parts measured: also opening, decoding, the test, and a validation "
             f"every {preset.fl.evaluate_every} rounds"),
    ]  # fmt: skip


def _train(trajectory: Trajectory, rooms: Path) -> tuple[float, list[float], float]:
    """The clock at the start, when 0, 1, ... rounds were done, and at the end."""
    at: list[float] = []
    with tempfile.TemporaryDirectory() as results:
        begin = cpu()
        store, rounds = Store(results, "bench"), trajectory.fl.rounds
        train(trajectory, rounds, store, rooms, progress=lambda done: at.append(cpu()))
        return begin, at, cpu()


def _row(subject: str, pairs: list[tuple[float, float]], reach: str, note: str) -> Row:
    return Row(subject, "a bare loop over the same batches", "time", [a / b for a, b in pairs],
               reach, note, {"subject": pairs[-1][0], "reference": pairs[-1][1]})  # fmt: skip


def bare_loop(trajectory: Trajectory, rounds: list[list]) -> list[float]:
    """Seconds of every round's steps, and of nothing else."""
    net = build(trajectory).to(memory_format=torch.channels_last).train()
    fl, seconds = trajectory.fl, []
    optimizer = torch.optim.SGD(net.parameters(), fl.lr, momentum=fl.momentum,
                                weight_decay=fl.weight_decay, fused=True)  # fmt: skip
    for batches in rounds:
        begin = cpu()
        for batch in batches:
            optimizer.zero_grad()
            task_losses(net(batch.image), batch).sum().backward()
            optimizer.step()
        seconds.append(cpu() - begin)
    return seconds


if __name__ == "__main__":
    main(measure)
