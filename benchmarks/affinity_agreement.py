"""Do the cheap affinities say what Eq. 3 says? Rank correlation, and the splits they lead to.

One all-in-one trajectory of the small preset is trained; in each of its first rounds all three
affinities are measured at the server's weights on the same batches of that round's clients. The
figures are taken on the mean over the rounds so far, as a split is, for every number of rounds.
"""

from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from mas_core.affinity import (
    encoder_gradients,
    first_order_affinity,
    lookahead,
    representation_affinity,
)
from mas_core.data.clients import FederatedData, open_data
from mas_core.federated import client_batches, load_state, run_round, select_clients
from mas_core.models import MultiTaskNet, forward_tasks
from mas_core.records.training import build
from mas_core.records.trajectory import Trajectory
from mas_core.split import Split, best_split, grouping_score, partitions, self_affinity
from mas_core.tasks import Batch

from .scenes import prepared
from .timing import Row, main

KINDS = ("exact", "first order", "representation")


def measure(quick: bool, folder: Path) -> list[Row]:
    rows = []
    for tasks in ("sdnkt",) if quick else ("sdnkt", "sdnkterca"):
        preset, rooms = prepared(quick, folder, tasks)
        trajectory = Trajectory(tasks, 0, preset.data, preset.model, preset.fl)
        data = open_data(preset.data, rooms, tasks)
        rows += _agreement(tasks, _measure_rounds(trajectory, data, 2 if quick else 10))
    return rows


def _measure_rounds(
    trajectory: Trajectory, data: FederatedData, rounds: int, per_client: int = 2
) -> dict[str, np.ndarray]:
    """kind -> (rounds, n, n), each the mean over `per_client` batches of the round's clients."""
    net = build(trajectory).to(memory_format=torch.channels_last)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    measured: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for r in range(rounds):
        load_state(net, state)
        net.train()
        lr, found = trajectory.lr(r), []
        for k in select_clients(trajectory, len(data.names), r):
            batches = client_batches(trajectory, data, k, r, torch.device("cpu"))
            found += [_three(net, batch, lr) for _, batch in zip(range(per_client), batches)]
        for i, kind in enumerate(KINDS):
            measured[kind].append(np.mean([three[i] for three in found], 0))
        state, _ = run_round(net, state, trajectory, r, data)
    return {kind: np.stack(values) for kind, values in measured.items()}


def _three(net: MultiTaskNet, batch: Batch, lr: float) -> list[np.ndarray]:
    forward = forward_tasks(net, batch)
    at_features, losses = forward.backward_decoders(), forward.losses.detach()
    gradients = encoder_gradients(net, forward, at_features)
    net.zero_grad()
    kinds = (
        lookahead(net, batch, losses, gradients, lr),
        first_order_affinity(losses, gradients, lr),
        representation_affinity(losses, at_features, lr),
    )
    return [np.nan_to_num(S.double().numpy()) for S in kinds]  # Eq. 4 replaces the diagonal


def _agreement(tasks: str, measured: dict[str, np.ndarray]) -> list[Row]:
    n, rounds = len(tasks), len(measured["exact"])
    off, numbers = ~np.eye(n, dtype=bool), range(2, min(n, 6))
    counts = np.arange(1, rounds + 1)[:, None, None]
    means = {kind: np.cumsum(S, 0) / counts for kind, S in measured.items()}
    rows = []
    for kind in KINDS[1:]:
        rho, equal, kept = [], [], []
        for cheap, exact in zip(means[kind], means["exact"], strict=True):
            rho.append(float(spearmanr(cheap[off], exact[off]).statistic))
            pairs = [(best_split(cheap, x).groups, best_split(exact, x)) for x in numbers]
            equal.append([groups == best.groups for groups, best in pairs])
            kept.append(float(np.mean([_kept(exact, groups, best) for groups, best in pairs])))
        last = ", ".join(f"x = {x} {'yes' if e else 'no'}" for x, e in zip(numbers, equal[-1]))
        spread = f"over the mean of the first 1 to {rounds} rounds"
        shares = [float(np.mean(e)) for e in equal]
        name = f"{tasks}: {kind} affinities"
        rows += [
            Row(name, "Eq. 3", "rank correlation", rho, note=spread),
            Row(f"{name}: splits", "those of Eq. 3", "share that is equal", shares,
                note=f"{spread}; after {rounds}: {last}"),
            Row(f"{name}: Eq. 3's score of their splits", "the best one", "share kept", kept,
                note=f"{spread}; 1 the best split, 0 the mean over all partitions"),
        ]  # fmt: skip
    return rows


def _kept(exact: np.ndarray, groups: tuple, best: Split) -> float:
    """Where a split's score lies between the mean over all partitions and the best."""
    S = self_affinity(exact)
    everywhere = partitions(len(S), len(groups))
    mean = float(np.mean([grouping_score(S, p) for p in everywhere]))
    return (grouping_score(S, groups) - mean) / (best.score - mean)


if __name__ == "__main__":
    main(measure)
