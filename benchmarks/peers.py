"""Rounds of the same work by this package, by other simulators and by a bare loop.

Same clients, network, batches and optimiser steps: `run_round` here; Flower's simulation, its
ClientApp that of flower/ on one Ray actor; pfl-research's FederatedAveraging on its
SimulatedBackend (weights alone are averaged there, not BatchNorm's statistics); a bare PyTorch loop
over the same batches in memory. All in turns within Flower's ServerApp, by wall time, after a turn
that is not counted. What happens before Flower's first message is its start. Peers that are not
installed are left out: pip install -e ".[peers]".
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mas_core.data.clients import open_data
from mas_core.federated import client_batches, run_round, select_clients
from mas_core.records.store import Store
from mas_core.records.study import Study
from mas_core.records.training import build
from mas_core.records.trajectory import Trajectory
from mas_core.tasks import Batch, task_losses

from .fl_loop import bare_loop
from .scenes import prepared
from .timing import Row, compare, in_turns, main, wall

BARE, OURS, FLOWER, PFL = "a bare loop", "run_round", "Flower's simulation", "pfl-research"
ROUND = 1  # the one that is timed, again and again


def measure(quick: bool, folder: Path) -> list[Row]:
    settings, rooms = prepared(quick, folder)
    preset = "smoke" if quick else "small"
    study = Study("sdnkt", settings, 0, Store(folder / "none", preset))
    trajectory = study.all_in_one()
    data = open_data(trajectory.data, rooms, trajectory.tasks)
    clients = select_clients(trajectory, len(data.names), ROUND)
    cpu = torch.device("cpu")
    batches = {k: list(client_batches(trajectory, data, k, ROUND, cpu)) for k in clients}
    net = build(trajectory).to(memory_format=torch.channels_last)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    actions: dict[str, Callable[[], object]] = {
        BARE: lambda: bare_loop(trajectory, [[b for own in batches.values() for b in own]]),
        OURS: lambda: run_round(net, state, trajectory, ROUND, data),
    }
    if find_spec("pfl"):
        actions[PFL] = pfl_round(trajectory, batches)
    repeats, started = 1 if quick else 7, 0.0
    if find_spec("flwr") and find_spec("ray"):
        seconds, started = beside_flower(trajectory, preset, settings, rooms, state,
                                         actions, repeats)  # fmt: skip
    else:
        seconds = in_turns(actions, repeats, wall)
    steps = sum(map(len, batches.values()))
    rows = []
    for name in (n for n in seconds if n != BARE):
        note = f"{started:.0f} s of start apart" if name == FLOWER else ""
        rows.append(compare(seconds, name, BARE, "time", "", note).named(
            f"{trajectory.tasks}: a round of {len(clients)} clients, {steps} steps, by {name}",
            "the same batches in a bare loop"))  # fmt: skip
    return rows


def beside_flower(
    trajectory: Trajectory, preset: str, settings: Any, rooms: Path, state: dict[str, torch.Tensor],
    actions: dict[str, Callable[[], object]], repeats: int,
) -> tuple[dict[str, list[float]], float]:  # fmt: skip
    """Seconds of every action and of Flower's round, and those of Flower's start."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "flower"))
    import mas_flower
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    run = mas_flower.DEFAULTS | {"preset": preset, "data": str(rooms.resolve()),
                                 "set": words(settings)}  # fmt: skip
    found: dict[str, list[float]] = {}
    begin, app = time.perf_counter(), ServerApp()
    at_first = begin

    @app.main()
    def server(grid: Any, context: Any) -> None:
        nonlocal at_first
        nodes = mas_flower.nodes_of(grid, trajectory.data.buildings)
        at_first = time.perf_counter()

        def flower() -> None:
            mas_flower.one_round(grid, nodes, run, trajectory, ROUND, state)

        torch.set_num_threads(1)
        found.update(in_turns(actions | {FLOWER: flower}, repeats, wall))

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                 "init_args": {"num_cpus": 1, "num_gpus": 0}}  # fmt: skip
    run_simulation(app, mas_flower.client, trajectory.data.buildings, backend_config=resources)
    if not found:
        raise RuntimeError("Flower's simulation ended without a figure; its log stands above")
    return found, at_first - begin


def words(settings: Any) -> str:
    """Settings that differ from their preset's, as mas_flower's "set" takes them."""
    from .scenes import QUICK

    changed = {"fl.measure_rounds": settings.fl.measure_rounds}
    for key in QUICK:
        changed[key] = getattr(settings.data, key.partition(".")[2])
    return " ".join(f"{key}={value}" for key, value in changed.items())


def pfl_round(trajectory: Trajectory, batches: dict[int, list[Batch]]) -> Callable[[], object]:
    """A round of pfl-research's federated averaging over the same clients and batches."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    fl, letters = trajectory.fl, trajectory.tasks

    class Losses(torch.nn.Module):
        """The network as pfl wants it: a loss of what a user's dataset is unpacked into."""

        def __init__(self) -> None:
            super().__init__()
            self.net = build(trajectory).to(memory_format=torch.channels_last)

        def loss(self, image: torch.Tensor, mask: torch.Tensor, *targets: torch.Tensor) -> Any:
            self.net.train()
            batch = Batch(image, mask, dict(zip(letters, targets, strict=True)))
            return task_losses(self.net(image), batch).sum()

        def metrics(self, *_: Any) -> dict[str, float]:
            return {}

    def user(k: int) -> Dataset:
        columns = [[b.image for b in batches[k]], [b.mask for b in batches[k]]]
        columns += [[b.targets[a] for b in batches[k]] for a in letters]
        return Dataset([torch.cat(column) for column in columns], user_id=str(k))

    users, ids = {k: user(k) for k in batches}, sorted(batches)
    order = iter(lambda: ids[next(counter) % len(ids)], None)
    counter = iter(range(10**9))
    cohort = FederatedDataset(users.__getitem__, lambda: next(order))
    losses = Losses()
    model = PyTorchModel(
        losses,
        lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=fl.momentum,
                                               weight_decay=fl.weight_decay, fused=True),
        torch.optim.SGD(losses.parameters(), 1.0),
    )  # fmt: skip
    backend, loop = SimulatedBackend(cohort, cohort), asyncio.new_event_loop()

    def one_round() -> None:
        asyncio.set_event_loop(loop)  # Flower's server is a thread, which has none
        np.random.seed(0)
        asked = NNAlgorithmParams(2, evaluation_frequency=9, train_cohort_size=len(ids),
                                  val_cohort_size=0)  # fmt: skip
        algorithm = FederatedAveraging()
        algorithm._current_central_iteration = 1  # the first one, 0, is always evaluated
        train = NNTrainHyperParams(local_batch_size=fl.batch_size, local_num_epochs=fl.local_epochs,
                                   local_learning_rate=trajectory.lr(ROUND))  # fmt: skip
        algorithm.run(asked, backend, model, train, NNEvalHyperParams(None),
                      send_metrics_to_platform=False)  # fmt: skip

    return one_round


if __name__ == "__main__":
    main(measure)
