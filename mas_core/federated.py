"""Federated averaging: select clients, train them, average; one round of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from .config import FL, UserError, stream, stream_seed
from .fedavg import rule_of
from .grouped import can_group, train_clients
from .local import LocalResult, local_update
from .models import MultiTaskNet, State
from .tasks import Batch


class TrainingDiverged(RuntimeError):
    """A loss is not finite; the message names task, client, round and learning rate."""


class Training(Protocol):
    """What determines a round of training: a `records.trajectory.Trajectory`, or the like."""

    tasks: str
    seed: int
    fl: FL

    def lr(self, round_: int) -> float: ...


class Clients(Protocol):
    """The clients' data: `data.clients.FederatedData`, or a source from outside the package."""

    names: list[str]  # one a client
    fingerprint: str  # of all that was opened
    images: str  # of the images alone

    def count(self, client: int, split: str) -> int:
        """Number of images of a client in "train", "val" or "test"."""

    def epoch(
        self, client: int, letters: str, batch_size: int, rng: np.random.Generator,
        device: torch.device | str,
    ) -> Iterator[Batch]:  # fmt: skip
        """One local epoch of training batches, their order drawn from `rng`."""

    def evaluation(
        self, split: str, letters: str, batch_size: int, device: torch.device | str,
        client: int | None = None,
    ) -> Iterator[Batch]:  # fmt: skip
        """All images of a split in order, of all clients or one."""


@dataclass
class Round:
    """What one round leaves behind besides the new state; plain numbers and arrays."""

    round: int
    clients: list[int]
    lr: float
    samples: int  # images trained on
    losses: np.ndarray  # (n,) mean training loss a task, weighted like the clients
    affinity: np.ndarray | None  # (K, n, n), a client's mean over its measured steps
    measurements: list[int]  # measured steps of each client
    affinity_seconds: float
    bytes_down: int
    bytes_up: int
    reported: dict[str, float]  # what the method records


def select_clients(training: Training, num_clients: int, round_: int) -> list[int]:
    """K clients drawn without replacement from the seed's stream of this round, in order."""
    fl, K = training.fl, training.fl.clients_per_round
    pool = np.arange(num_clients) if fl.clients is None else np.array(fl.clients)
    if len(pool) < K:
        raise UserError(f"clients_per_round={K}, but there are {len(pool)} clients")
    rng = stream(training.seed, "select", round_)
    return sorted(int(k) for k in rng.choice(pool, K, replace=False))


def run_round(
    net: MultiTaskNet,
    state: State,
    training: Training,
    round_: int,
    data: Clients,
    capture: Callable | None = None,
    clock: Callable[[], float] = perf_counter,
) -> tuple[State, Round]:
    """One round of FedAvg: phi^{r+1} = sum_k p_k phi^{k,r}, p_k proportional to the data size.

    Returns the new state and what the round leaves behind. `net` is the one working copy that
    every client trains in turn; `capture` and `clock` are handed to `local_update`. With
    `fl.arithmetic="grouped"` clients are trained side by side where that can be (`can_group`).
    """
    fl, tasks = training.fl, net.tasks
    rule, clients = rule_of(fl), select_clients(training, len(data.names), round_)
    sizes = {k: data.count(k, "train") for k in clients}
    if empty := [data.names[k] for k in clients if not sizes[k]]:
        raise UserError(f"client {empty[0]} has no training images; name others by fl.clients")
    longest = sorted(clients, key=sizes.get, reverse=True)
    p = {k: sizes[k] / sum(sizes.values()) for k in clients}
    lr, device = training.lr(round_), next(net.parameters()).device
    measure = round_ < fl.measure_rounds and rule.measures and len(tasks) > 1
    results: dict[int, LocalResult] = {}

    def trained() -> Iterator[tuple[State, float]]:
        """Every client's new state, a copy."""
        batches = {k: client_batches(training, data, k, round_, device) for k in longest}
        together = can_group(net, fl) and train_clients(net, state, batches, fl, lr, measure, clock)
        for k in clients:
            if together:
                own, result = together[k]
            else:
                own = load_state(net, state)
                seed, given = stream_seed(training.seed, "dropout", k, round_), batches[k]
                with torch.random.fork_rng([device] * (device.type == "cuda")):
                    torch.manual_seed(seed)
                    result = local_update(net, given, fl, lr, measure, state, capture, clock, k)
            for i, step in enumerate(result.step_losses.tolist()):
                check_finite(step, tasks, f"client {data.names[k]}", round_, lr, i + round_ == 0)
            results[k] = result
            yield {name: t.clone() for name, t in own.items()} | result.travelling, p[k]

    new = rule.average(trained())
    S = np.stack([results[k].affinity.cpu().numpy() for k in clients]) if measure else None
    travelling = len(clients) * state_bytes(new) - sum(r.unsent for r in results.values())
    return new, Round(
        round=round_,
        clients=clients,
        lr=lr,
        samples=sum(r.samples for r in results.values()),
        losses=np.array(sum(results[k].losses * p[k] for k in clients).tolist()),
        affinity=S,
        measurements=[results[k].measurements for k in clients],
        affinity_seconds=sum(r.affinity_seconds for r in results.values()),
        bytes_down=travelling,
        bytes_up=travelling + (4 * len(clients) * len(tasks) ** 2 if measure else 0),
        reported=rule.report(new, tasks),
    )


def client_batches(
    training: Training, data: Clients, client: int, round_: int, device: torch.device
) -> Iterator[Batch]:
    """A client's batches of all local epochs of a round; each epoch has its own random stream."""
    letters, fl = training.tasks, training.fl
    rngs = (stream(training.seed, "batches", client, round_, e) for e in range(fl.local_epochs))
    epochs = (data.epoch(client, letters, fl.batch_size, rng, device) for rng in rngs)
    return chain.from_iterable(epochs)


def load_state(net: MultiTaskNet, state: State) -> State:
    """Copy a server state into the working network; returns the network's own tensors.

    Before every client: a third of the time of load_state_dict, which checks module by module.
    """
    own = net.state_dict()
    torch._foreach_copy_(list(own.values()), [state[name] for name in own])
    return own


def state_bytes(state: State) -> int:
    """Bytes of a state that travels between server and client, as its tensors are stored."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def check_finite(
    losses: Iterable[float], tasks: str, where: str, round_: int, lr: float, initial: bool = False
) -> None:
    """Raise TrainingDiverged where a loss is not finite, a UserError where one is below 0."""
    for a, loss in zip(tasks, losses, strict=True):
        found = f"the loss of task {a!r} is {loss} on {where} in round {round_}"
        if not np.isfinite(loss):
            advice = "before any step; look at its labels and its loss" if initial else (
                f"at learning rate {lr:.4g}; lower fl.lr")
            raise TrainingDiverged(f"{found} {advice}")
        if loss < 0:
            raise UserError(f"{found}; Eq. 3 takes shares of a loss: above 0, or 0 without labels")
