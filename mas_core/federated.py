"""Federated averaging: select clients, train them, average, record; round after round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Trajectory, UserError, stream
from .data.clients import FederatedData, open_data
from .local import Balance, LocalResult, local_update
from .models import MultiTaskNet, restrict_state
from .records.cost import Meter, device_name, peak_memory_bytes, state_bytes
from .records.evaluate import constant_losses, evaluate
from .records.store import State, Store, provenance
from .run.cuda_graph import sgd
from .tasks import Batch

KEPT = 10  # states kept on the way of trajectories that others may start from


class TrainingDiverged(RuntimeError):
    """A loss is not finite; the message names task, client, round and learning rate."""


def weighted_mean(states: Iterable[tuple[State, float]]) -> State:
    """sum_k p_k state_k, the p_k given; streamed, so that one sum and one state are in memory.

    BatchNorm statistics are averaged like weights; integer counters are rounded.
    """
    total: list[Tensor] = []
    for state, p in states:
        kinds = {name: tensor.dtype for name, tensor in state.items()}
        wide = [t if t.is_floating_point() else t.double() for t in state.values()]
        shares = torch._foreach_mul(wide, p)
        if total:
            torch._foreach_add_(total, shares)
        else:
            total = list(shares)
    return {
        name: t if kind.is_floating_point else t.round().to(kind)
        for (name, kind), t in zip(kinds.items(), total, strict=True)
    }


def select_clients(trajectory: Trajectory, num_clients: int, round_: int) -> list[int]:
    """K clients drawn without replacement from the seed's stream of this round, in order."""
    fl = trajectory.fl
    pool = np.arange(num_clients) if fl.clients is None else np.array(fl.clients)
    if fl.clients_per_round > len(pool):
        raise UserError(
            f"clients_per_round={fl.clients_per_round}, but there are {len(pool)} clients"
        )
    rng = stream(trajectory.seed, "select", round_)
    return sorted(int(k) for k in rng.choice(pool, fl.clients_per_round, replace=False))


def run_round(
    net: MultiTaskNet, state: State, trajectory: Trajectory, round_: int, data: FederatedData
) -> tuple[State, dict[str, Any], list[dict[str, Any]]]:
    """One round of FedAvg: phi^{r+1} = sum_k p_k phi^{k,r}, p_k proportional to the data size.

    Returns the new state, the round's row for rounds.csv and its rows for affinity.csv. `net` is
    the one working copy that every client trains in turn.
    """
    fl, tasks = trajectory.fl, net.tasks
    clients = select_clients(trajectory, len(data.names), round_)
    sizes = {k: data.count(k, "train") for k in clients}
    lr = trajectory.lr(round_)
    measure = round_ < fl.measure_rounds and fl.method == "fedavg" and len(tasks) > 1
    results: dict[int, LocalResult] = {}

    def trained() -> Iterator[tuple[State, float]]:
        for k in clients:
            trained_state = load_state(net, state)
            batches = client_batches(trajectory, data, k, round_, state_device(net))
            balance = _balance_of(state, net) if fl.method == "gradnorm" else None
            result = local_update(net, batches, fl, lr, measure, balance)
            for step in result.step_losses.tolist():
                _check_finite(step, tasks, f"client {data.names[k]}", round_, lr)
            results[k] = result
            yield trained_state | _state_of(result.balance), sizes[k] / sum(sizes.values())

    new = weighted_mean(trained())
    p = {k: sizes[k] / sum(sizes.values()) for k in clients}
    losses = sum(results[k].losses * p[k] for k in clients).tolist()
    travelling = state_bytes(new)
    row: dict[str, Any] = {
        "round": round_,
        "clients": " ".join(map(str, clients)),
        "lr": f"{lr:.8g}",
        "samples": sum(r.samples for r in results.values()),
        **{f"train_{a}": f"{x:.6g}" for a, x in zip(tasks, losses, strict=True)},
        "affinity_seconds": f"{sum(r.affinity_seconds for r in results.values()):.3f}",
        "bytes_down": len(clients) * travelling,
        "bytes_up": len(clients) * (travelling + (4 * len(tasks) ** 2 if measure else 0)),
    }
    if fl.method == "gradnorm":
        weights = new["balance.weights"].tolist()
        row |= {f"weight_{a}": f"{w:.6g}" for a, w in zip(tasks, weights, strict=True)}
    affinity_rows = [
        {"round": round_, "client": k, "measurements": results[k].measurements}
        | {
            f"{i}>{j}": "" if i == j else f"{value:.6g}"
            for i, values in zip(tasks, results[k].affinity.tolist(), strict=True)
            for j, value in zip(tasks, values, strict=True)
        }
        for k in (clients if measure else ())
    ]
    return new, row, affinity_rows


def client_batches(
    trajectory: Trajectory, data: FederatedData, client: int, round_: int, device: torch.device
) -> Iterator[Batch]:
    """A client's batches of all local epochs of a round; each epoch has its own random stream."""
    fl = trajectory.fl
    return chain.from_iterable(
        data.epoch(
            client,
            trajectory.tasks,
            fl.batch_size,
            stream(trajectory.seed, "batches", client, round_, epoch),
            device,
        )
        for epoch in range(fl.local_epochs)
    )


def train(
    trajectory: Trajectory,
    until: int,
    store: Store,
    data_folder: Path,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda round_: None,
) -> None:
    """Bring a trajectory to round `until` (all of them: also test it) and record it in `store`.

    Does nothing where the record reaches that far. Otherwise it continues from the last
    checkpoint, bit-identical to a run that was never interrupted, or from its start. `progress`
    is called with the number of rounds done after each round. Raises TrainingDiverged at a loss
    that is not finite; the rounds before it stay on record.
    """
    R, device = trajectory.fl.rounds, torch.device(device)
    if not trajectory.start_round <= until <= R:
        raise UserError(f"round {until} asked for; allowed: {trajectory.start_round} to {R}")
    with store.lock(trajectory):
        if is_done(trajectory, until, store):
            progress(until)
            return
        data = open_data(trajectory.data, data_folder, trajectory.tasks)
        net = build(trajectory).to(device, memory_format=torch.channels_last)
        last = store.checkpoint_path(trajectory, "last")
        if last.exists():
            state, done = store.load_checkpoint(
                trajectory, last, net.state_dict(), data.fingerprint
            )
            state = {name: tensor.to(device) for name, tensor in state.items()}
        else:
            state, done = start_state(trajectory, net, store, data_folder), trajectory.start_round
        rows = store.read_rows(trajectory, "rounds.csv", done)
        affinity_rows = store.read_rows(trajectory, "affinity.csv", done)
        if len(rows) < done - trajectory.start_round:
            raise UserError(
                f"{store.folder(trajectory)} lacks rounds that its checkpoint has; "
                "restore rounds.csv, or delete the folder to train anew"
            )
        due = min(done, trajectory.fl.measure_rounds) - trajectory.start_round
        measures = trajectory.fl.method == "fedavg" and len(net.tasks) > 1
        if measures and len(affinity_rows) < due * trajectory.fl.clients_per_round:
            raise UserError(
                f"{store.folder(trajectory)} lacks affinities of rounds that its checkpoint has; "
                "restore affinity.csv, or delete the folder to train anew"
            )
        store.write_config(trajectory)
        best = _best(rows, net.tasks)
        meter = Meter(device)
        sgd(net.parameters(), 0.0, trajectory.fl)  # the first one imports for a second: no training
        progress(done)
        for r in range(done, until):
            with meter:
                state, row, measured = run_round(net, state, trajectory, r, data)
            seconds, joules = meter.lap()
            row |= {
                "seconds": f"{seconds:.3f}",
                "joules": "" if joules is None else f"{joules:.1f}",
            }
            validated = (r + 1) % trajectory.fl.evaluate_every == 0 or r + 1 == R
            losses: dict[str, Any] = dict.fromkeys(net.tasks, "")
            if validated:
                load_state(net, state)
                losses = evaluate(net, data.evaluation("val", net.tasks, 64, device))
                _check_finite(losses.values(), net.tasks, "validation", r, trajectory.lr(r))
            row |= {f"val_{a}": f"{x:.9g}" if validated else "" for a, x in losses.items()}
            rows.append(row)
            if validated and _best([row], net.tasks) < best:
                best = _best([row], net.tasks)
                store.save_checkpoint(trajectory, "best", state, r + 1, data.fingerprint)
            affinity_rows += measured
            store.write_rounds(trajectory, rows)
            if affinity_rows:
                store.write_affinities(trajectory, affinity_rows)
            on_the_way = trajectory.fl.measure_rounds and (r + 1) % max(1, R // KEPT) == 0
            if r + 1 == until or on_the_way:
                kept = f"round_{r + 1:04d}"
                store.save_checkpoint(trajectory, kept, state, r + 1, data.fingerprint)
            store.save_checkpoint(trajectory, "last", state, r + 1, data.fingerprint)
            progress(r + 1)
        if until == R:
            store.write_result(trajectory, _result(trajectory, net, state, store, data, meter))


def is_done(trajectory: Trajectory, until: int, store: Store) -> bool:
    """Whether the record reaches round `until` (the last one: whether it is tested, too)."""
    store.check(trajectory)
    if store.result(trajectory) is not None:
        return True
    return until < trajectory.fl.rounds and store.rounds_done(trajectory) >= until


def build(trajectory: Trajectory) -> MultiTaskNet:
    """The trajectory's network with its seed's initial weights."""
    model = trajectory.model
    return MultiTaskNet(trajectory.tasks, model.size, model.output_stride, trajectory.seed)


def start_state(
    trajectory: Trajectory, net: MultiTaskNet, store: Store, data_folder: Path
) -> State:
    """The state a trajectory starts from: initial weights, or its parent's at the start round."""
    device = state_device(net)
    if trajectory.parent is None:
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        if trajectory.fl.method == "gradnorm":
            state["balance.weights"] = torch.ones(len(net.tasks), device=device)
        return state
    whole = state_at(trajectory.parent, trajectory.start_round, store, data_folder, device)
    return restrict_state(whole, trajectory.tasks)


def state_at(
    trajectory: Trajectory, round_: int, store: Store, data_folder: Path, device: torch.device
) -> State:
    """The state after `round_` rounds: a kept one, or trained again from the nearest one before.

    Training is deterministic, so a record whose checkpoints are not at hand can still be branched
    from; its files are left alone.
    """
    data = open_data(trajectory.data, data_folder, trajectory.tasks)
    net = build(trajectory).to(device, memory_format=torch.channels_last)
    kept = store.checkpoints(trajectory)
    nearest = max((r for r in kept if r <= round_), default=None)
    if nearest is None:
        state, nearest = start_state(trajectory, net, store, data_folder), trajectory.start_round
    else:
        state, _ = store.load_checkpoint(
            trajectory, kept[nearest], net.state_dict(), data.fingerprint
        )
        state = {name: tensor.to(device) for name, tensor in state.items()}
    for r in range(nearest, round_):
        state, _, _ = run_round(net, state, trajectory, r, data)
    return state


def load_state(net: MultiTaskNet, state: State) -> State:
    """Copy a server state into the working network; returns the network's own tensors.

    Before every client: a third of the time of load_state_dict, which checks module by module.
    """
    own = net.state_dict()
    torch._foreach_copy_(list(own.values()), [state[name] for name in own])
    return own


def state_device(net: MultiTaskNet) -> torch.device:
    return next(net.parameters()).device


def _result(
    trajectory: Trajectory,
    net: MultiTaskNet,
    state: State,
    store: Store,
    data: FederatedData,
    meter: Meter,
) -> dict[str, Any]:
    """Test losses of the last round's model and of the one with the least validation loss."""
    device = state_device(net)
    load_state(net, state)
    last = evaluate(net, data.evaluation("test", net.tasks, 64, device))
    path = store.checkpoint_path(trajectory, "best")
    best_state, best_round = store.load_checkpoint(trajectory, path, state, data.fingerprint)
    load_state(net, {name: tensor.to(device) for name, tensor in best_state.items()})
    best = evaluate(net, data.evaluation("test", net.tasks, 64, device))
    of_clients = [
        evaluate(net, data.evaluation("test", net.tasks, 64, device, k))
        if data.count(k, "test")
        else dict.fromkeys(net.tasks)
        for k in range(len(data.names))
    ]
    return {
        "trajectory": trajectory.id,
        "rounds": trajectory.fl.rounds,
        "test_last": last,
        "test_best": best,
        "best_round": best_round,
        "test_best_clients": {
            a: [x[a] and float(f"{x[a]:.6g}") for x in of_clients] for a in net.tasks
        },
        "test_constant": constant_losses(data, net.tasks, device),
        "test_images": sum(data.count(k, "test") for k in range(len(data.names))),
        "data": data.images,
        "energy_source": meter.how,
        "peak_memory_bytes": peak_memory_bytes(device),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **provenance(),
    }


def _best(rows: list[dict[str, Any]], tasks: str) -> float:
    """The lowest summed validation loss so far."""
    sums = [sum(float(r[f"val_{a}"]) for a in tasks) for r in rows if r[f"val_{tasks[0]}"]]
    return min(sums, default=float("inf"))


def _check_finite(losses: Iterable[float], tasks: str, where: str, round_: int, lr: float) -> None:
    for a, loss in zip(tasks, losses, strict=True):
        if not np.isfinite(loss):
            raise TrainingDiverged(
                f"the loss of task {a!r} is {loss} on {where} in round {round_} "
                f"at learning rate {lr:.4g}; lower fl.lr"
            )


def _balance_of(state: State, net: MultiTaskNet) -> Balance:
    return Balance(state["balance.weights"], state.get("balance.initial_losses"))


def _state_of(balance: Balance | None) -> State:
    if balance is None:
        return {}
    return {"balance.weights": balance.weights, "balance.initial_losses": balance.initial_losses}
