"""Training a trajectory to a round: resume, validate, keep checkpoints, test, record."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..config import UserError, outside
from ..data.clients import open_clients
from ..fedavg import rule_of
from ..federated import Clients, Round, check_finite, load_state, run_round
from ..local import sgd
from ..models import MultiTaskNet, State, restrict_state
from ..tasks import task_losses, task_scores
from .cost import Stopwatch, device_clock, device_name, peak_memory_bytes
from .evaluate import constant_losses, evaluate
from .store import Store, provenance
from .trajectory import Trajectory

KEPT = 10  # states kept on the way of trajectories that others may start from


def train(
    trajectory: Trajectory,
    until: int,
    store: Store,
    data_folder: Path,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda round_: None,
    capture: Callable | None = None,
    meter: type[Stopwatch] = Stopwatch,
) -> None:
    """Bring a trajectory to round `until` (all of them: also test it) and record it in `store`.

    Does nothing where the record reaches that far. Otherwise it continues from the last
    checkpoint, bit-identical to a run that was never interrupted, or from its start. `progress` is
    called with the number of rounds done after each round, `capture` is handed to `local_update`,
    and `meter` measures what the rounds cost. Raises TrainingDiverged at a loss that is not finite;
    the rounds before it stay on record.
    """
    R, device = trajectory.fl.rounds, torch.device(device)
    if not trajectory.start_round <= until <= R:
        raise UserError(f"round {until} asked for; allowed: {trajectory.start_round} to {R}")
    with store.lock(trajectory):
        if is_done(trajectory, until, store):
            progress(until)
            return
        run = _resume(trajectory, store, data_folder, meter(device), capture)
        clock = partial(device_clock, device)
        sgd(run.net.parameters(), 0.0, trajectory.fl)  # the first one imports for a second
        progress(run.done)
        for r in range(run.done, until):
            with run.meter:
                run.state, made = run_round(
                    run.net, run.state, trajectory, r, run.data, capture, clock
                )
            _record(run, made, store, last=r + 1 == until)
            progress(r + 1)
        if until == R:
            store.write_result(trajectory, _result(run, store))


@dataclass
class _Run:
    """A trajectory in training: what a round needs and what it has left behind."""

    trajectory: Trajectory
    net: MultiTaskNet
    data: Clients
    state: State
    done: int  # rounds
    had: int  # rounds on record, more than that where checkpoints are not at hand
    meter: Stopwatch
    rows: list[dict[str, Any]]  # of rounds.csv
    affinity_rows: list[dict[str, Any]]
    best: float = field(default=float("inf"))  # the lowest summed validation loss so far


def _resume(
    trajectory: Trajectory, store: Store, data_folder: Path, meter: Stopwatch,
    capture: Callable | None,
) -> _Run:  # fmt: skip
    """The run as its last checkpoint left it, or at its start."""
    device = meter.device
    data = open_clients(trajectory.data, data_folder, trajectory.tasks)
    net = placed(build(trajectory), device, trajectory.data.size)
    last = store.checkpoint_path(trajectory, "last")
    if last.exists():
        state, done = store.load_checkpoint(trajectory, last, net.state_dict(), data.fingerprint)
        state = {name: tensor.to(device) for name, tensor in state.items()}
    else:
        done = trajectory.start_round
        state = start_state(trajectory, net, store, data_folder, capture)
    had = store.rounds_done(trajectory)
    rows = store.read_rows(trajectory, "rounds.csv", had)
    affinity_rows = store.read_rows(trajectory, "affinity.csv", had)
    store.write_config(trajectory)
    where = {"device": device_name(device), "threads": torch.get_num_threads(), **provenance()}
    store.write_machines(trajectory, had, where)
    best = _best(rows[: done - trajectory.start_round], net.tasks)
    return _Run(trajectory, net, data, state, done, had, meter, rows, affinity_rows, best)


def _record(run: _Run, made: Round, store: Store, last: bool) -> None:
    """Validate where it is due, and write what a round has left behind.

    Affinities are written before the rounds, the checkpoint after both: a record never lists a
    round whose affinities it lacks, and a kill costs only what follows the checkpoint. Rows on
    record stay as they are where their rounds are trained again.
    """
    trajectory, tasks, done = run.trajectory, run.net.tasks, made.round + 1
    R, fl, fingerprint = trajectory.fl.rounds, trajectory.fl, run.data.fingerprint
    validated = done % fl.evaluate_every == 0 or done == R
    losses: dict[str, float] = {}
    if validated:
        _load_for_test(run, run.state)
        losses = evaluate(run.net, run.data.evaluation("val", tasks, 64, run.meter.device))
        check_finite(losses.values(), tasks, "validation", made.round, made.lr)
    row = _round_row(made, tasks, run.meter.lap(), losses)
    if validated and _best([row], tasks) < run.best:
        run.best = _best([row], tasks)
        store.save_checkpoint(trajectory, "best", run.state, done, fingerprint)
    if made.round >= run.had:
        run.rows.append(row)
        run.affinity_rows += _affinity_rows(made, tasks)
        if run.affinity_rows:
            store.write_rows(trajectory, "affinity.csv", run.affinity_rows)
        store.write_rows(trajectory, "rounds.csv", run.rows)
    if last or (fl.measure_rounds and _is_kept(done, R)):
        store.save_checkpoint(trajectory, f"round_{done:04d}", run.state, done, fingerprint)
    store.save_checkpoint(trajectory, "last", run.state, done, fingerprint)


def _load_for_test(run: _Run, state: State) -> None:
    """The network as the method tests it."""
    load_state(run.net, state)
    rule_of(run.trajectory.fl).before_test(run.net, run.trajectory.fl, run.data)


def _round_row(
    made: Round, tasks: str, lap: tuple[float, float | None], losses: dict[str, float]
) -> dict[str, Any]:
    """A round as a row of rounds.csv."""
    seconds, joules = lap
    return {
        "round": made.round,
        "clients": " ".join(map(str, made.clients)),
        "lr": f"{made.lr:.8g}",
        "samples": made.samples,
        **{f"train_{a}": f"{x:.6g}" for a, x in zip(tasks, made.losses, strict=True)},
        "affinity_seconds": f"{made.affinity_seconds:.3f}",
        "bytes_down": made.bytes_down,
        "bytes_up": made.bytes_up,
        **{name: f"{x:.6g}" for name, x in made.reported.items()},
        "seconds": f"{seconds:.3f}",
        "joules": "" if joules is None else f"{joules:.1f}",
        **{f"val_{a}": f"{losses[a]:.9g}" if losses else "" for a in tasks},
    }


def _affinity_rows(made: Round, tasks: str) -> list[dict[str, Any]]:
    """A round's affinities as rows of affinity.csv, one a client."""
    if made.affinity is None:
        return []
    return [
        {"round": made.round, "client": k, "measurements": count}
        | {
            f"{i}>{j}": "" if i == j else f"{value:.6g}"
            for i, values in zip(tasks, S.tolist(), strict=True)
            for j, value in zip(tasks, values, strict=True)
        }
        for k, count, S in zip(made.clients, made.measurements, made.affinity, strict=True)
    ]


def _is_kept(done: int, rounds: int) -> bool:
    return done % max(1, rounds // KEPT) == 0


def is_done(trajectory: Trajectory, until: int, store: Store) -> bool:
    """Whether the record reaches round `until` (the last one: whether it is tested, too)."""
    store.check(trajectory)
    whole, R = store.result(trajectory) is not None, trajectory.fl.rounds
    return whole or until < R and store.rounds_done(trajectory) >= until


def build(trajectory: Trajectory) -> MultiTaskNet:
    """The trajectory's network with its seed's initial weights."""
    table = outside(trajectory.data.tasks)
    return models.build(trajectory.tasks, trajectory.model, trajectory.seed, table)


def placed(net: MultiTaskNet, device: torch.device, pixels: int) -> MultiTaskNet:
    """The network on the device; channels_last unless its images are small and this is a GPU."""
    plain = device.type == "cuda" and pixels <= models.SMALL
    return net.to(device, memory_format=torch.contiguous_format if plain else torch.channels_last)


def start_state(
    trajectory: Trajectory, net: MultiTaskNet, store: Store, data_folder: Path,
    capture: Callable | None = None,
) -> State:  # fmt: skip
    """The state a trajectory starts from: initial weights, or its parent's at the start round."""
    device, own = next(net.parameters()).device, rule_of(trajectory.fl).start(net, trajectory.fl)
    if named := sorted(name for name in own if name.startswith(("encoder.", "decoders."))):
        raise UserError(f"{trajectory.fl.method}: own state {named[0]} is named like a weight")
    if trajectory.parent is None:
        return {name: tensor.clone() for name, tensor in net.state_dict().items()} | own
    parent, begin = trajectory.parent, trajectory.start_round
    whole = state_at(parent, begin, store, data_folder, device, capture)
    state = restrict_state(whole, trajectory.tasks) | own
    if stray := sorted(net.state_dict().keys() - state.keys()):
        raise UserError(f"{stray[0]} of {trajectory.model.size} is no part of encoder or decoders: "
                        "a group cannot go on from merged weights")  # fmt: skip
    return state


def state_at(
    trajectory: Trajectory, round_: int, store: Store, data_folder: Path, device: torch.device,
    capture: Callable | None = None,
) -> State:  # fmt: skip
    """The state after `round_` rounds: a kept one, or trained again from the nearest one before.

    Training is deterministic, so a record whose checkpoints are not at hand can still be branched
    from. The states that its own training would have kept are kept for the next branch; the record
    is left alone.
    """
    data = open_clients(trajectory.data, data_folder, trajectory.tasks)
    net = placed(build(trajectory), device, trajectory.data.size)
    kept = store.checkpoints(trajectory)
    nearest = max((r for r in kept if r <= round_), default=None)
    if nearest is None:
        nearest = trajectory.start_round
        state = start_state(trajectory, net, store, data_folder, capture)
    else:
        state, _ = store.load_checkpoint(
            trajectory, kept[nearest], net.state_dict(), data.fingerprint
        )
        state = {name: tensor.to(device) for name, tensor in state.items()}
    unmeasured = replace(trajectory, fl=replace(trajectory.fl, measure_rounds=0))  # equal weights
    recorded = store.rounds_done(trajectory) > trajectory.start_round
    for r in range(nearest, round_):
        state, _ = run_round(net, state, unmeasured, r, data, capture)
        if recorded and (r + 1 == round_ or _is_kept(r + 1, trajectory.fl.rounds)):
            name = f"round_{r + 1:04d}"
            store.save_checkpoint(trajectory, name, state, r + 1, data.fingerprint)
    return state


def _result(run: _Run, store: Store) -> dict[str, Any]:
    """Test losses of the last round's model and of the one with the least validation loss."""
    trajectory, net, data, device = run.trajectory, run.net, run.data, run.meter.device

    def test(client: int | None = None, measure: Callable = task_losses) -> dict[str, float]:
        found = evaluate(net, data.evaluation("test", net.tasks, 64, device, client), measure)
        if lost := [a for a, x in found.items() if measure is task_losses and not math.isfinite(x)]:
            raise UserError(f"test loss of task {lost[0]} is {found[lost[0]]}: look at its labels")
        return found

    _load_for_test(run, run.state)
    last = test()
    path = store.checkpoint_path(trajectory, "best")
    best_state, best_round = store.load_checkpoint(trajectory, path, run.state, data.fingerprint)
    _load_for_test(run, {name: tensor.to(device) for name, tensor in best_state.items()})
    counts = [data.count(k, "test") for k in range(len(data.names))]
    own = [test(k) if n else dict.fromkeys(net.tasks) for k, n in enumerate(counts)]
    scored = [a for a in net.tasks if net.table[a].score]
    scores = test(measure=task_scores) if scored else {}
    machines = store.machines(trajectory)
    return {
        "trajectory": trajectory.id,
        "rounds": trajectory.fl.rounds,
        "test_last": last,
        "test_best": test(),
        "best_round": best_round,
        "test_best_clients": {a: [x[a] and float(f"{x[a]:.6g}") for x in own] for a in net.tasks},
        **({"test_scores": {a: scores[a] for a in scored}} if scored else {}),
        "test_constant": constant_losses(data, net.tasks, device),
        "test_images": sum(counts),
        "data": data.images,
        "energy_source": run.meter.how,
        "peak_memory_bytes": peak_memory_bytes(device),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **provenance(),
        "devices": sorted({machine["device"] for machine in machines}),
    }


def _best(rows: list[dict[str, Any]], tasks: str) -> float:
    """The lowest summed validation loss so far."""
    sums = [sum(float(r[f"val_{a}"]) for a in tasks) for r in rows if r[f"val_{tasks[0]}"]]
    return min(sums, default=float("inf"))
