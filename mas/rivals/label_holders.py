"""FedAvg where clients hold the labels of some tasks only: masked losses, decoders by holder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mas_core.fedavg import FedAvg, weighted_mean
from mas_core.models import State, TaskPass, forward_tasks
from mas_core.tasks import Batch

HELD = "labels.held."  # task letter: 1 where the client had its labels; to the server only
OPTION = "labels.option."  # a number of the method, for the server
SENT = "labels.sent."  # what the server had sent; it costs no traffic, the server knows it
TOLD = "labels.told."  # numbers of the server's state that `report` gives
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
Clients = list[tuple[State, float]]  # what a client returned, and its p_k


class LabelHolders(FedAvg):
    """A client trains on sum_i L_i over the tasks that its batches have targets of.

    The decoders of other tasks are not run. The server averages the encoder over all clients of
    the round, and a decoder over those that hold its task, their p_k scaled to sum to 1; a decoder
    that nobody trained stays. Where every client holds every task this is FedAvg.

    Records count every decoder for every client, though one needs the encoder and the decoders that
    it holds alone.

    It reports share_a, the p_k of the clients that hold a (the recorded training loss of a is
    share_a times their mean, as the others count 0), and cos_a_b: see `update_cosines`.
    """

    measures = False
    numbers: tuple[str, ...] = ()  # options that the server needs
    held = ""

    def part(self, held: str) -> Any:
        """What trains on the tasks held: it has `tasks`, `encoder` and `decoders`."""
        return SimpleNamespace(tasks=held, encoder=self.net.encoder, decoders=self.net.decoders)

    def step(
        self,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        measure: Callable[[TaskPass, list[Tensor]], None] | None = None,
    ) -> Tensor:
        """One step; the losses before it, (n,), are 0 for tasks that are not held."""
        self.held = "".join(a for a in self.net.tasks if a in batch.targets)
        optimizer.zero_grad()  # gradients that stay None leave the other decoders alone
        forward = forward_tasks(self.part(self.held), batch)
        at_features = forward.backward_decoders()
        self.encoder_backward(forward, at_features)
        optimizer.step()
        losses = forward.losses.new_zeros(len(self.net.tasks))
        losses[[self.net.tasks.index(a) for a in self.held]] = forward.losses.detach()
        return losses

    def travelling(self) -> State:
        held = {HELD + a: torch.tensor(a in self.held) for a in self.net.tasks}
        options = {
            OPTION + name: torch.tensor(self.option(self.fl, name), dtype=torch.float64)
            for name in self.numbers
        }
        return held | options | {SENT + name: tensor for name, tensor in self.state.items()}

    @classmethod
    def report(cls, state: State, tasks: str) -> dict[str, float]:
        told = sorted(name for name in state if name.startswith(TOLD))
        return {name.removeprefix(TOLD): float(state[name]) for name in told}

    @classmethod
    def average(cls, states: Iterable[tuple[State, float]]) -> State:
        sent, clients = received(states)
        tasks = sorted(name.removeprefix(HELD) for name in clients[0][0] if name.startswith(HELD))
        new = sent | mean_of(clients, "encoder.")
        for a in tasks:
            of_task = holders(clients, a)
            new[f"{TOLD}share_{a}"] = torch.tensor(sum(p for _, p in of_task))
            if of_task:
                new |= mean_of(of_task, f"decoders.{a}.")
        updates = torch.stack([flat(state) - flat(sent) for state, _ in clients])
        held = torch.tensor([[float(state[HELD + a]) for a in tasks] for state, _ in clients])
        cos = update_cosines(updates, held, torch.tensor([p for _, p in clients]))
        for i, j in combinations(range(len(tasks)), 2):
            new[f"{TOLD}cos_{tasks[i]}_{tasks[j]}"] = cos[i, j].clone()
        return new


def received(states: Iterable[tuple[State, float]]) -> tuple[State, Clients]:
    """What the server had sent, and copies of what the clients returned, with their p_k."""
    sent: State = {}
    clients: Clients = []
    for state, p in states:
        sent = {n.removeprefix(SENT): t for n, t in state.items() if n.startswith(SENT)}
        own = {n: t.detach().clone() for n, t in state.items() if not n.startswith(SENT)}
        clients.append((own, p))
    return sent, clients


def holders(clients: Clients, tasks: str) -> Clients:
    """The clients that hold all of these tasks."""
    return [(state, p) for state, p in clients if all(state[HELD + a] for a in tasks)]


def mean_of(clients: Clients, prefix: str) -> State:
    """The mean of the entries under a prefix, the clients' shares scaled to sum to 1."""
    total = sum(p for _, p in clients)
    return weighted_mean(
        ({n: t for n, t in state.items() if n.startswith(prefix)}, p / total)
        for state, p in clients
    )


def parameters(state: State, prefix: str) -> list[str]:
    """Names of the parameters under a prefix, in one order; BatchNorm's statistics are none."""
    return sorted(n for n in state if n.startswith(prefix) and not n.endswith(STATISTICS))


def flat(state: State, prefix: str = "encoder.") -> Tensor:
    """The parameters under a prefix as one vector, float64."""
    return torch.cat([state[n].double().flatten() for n in parameters(state, prefix)])


def update_cosines(updates: Tensor, held: Tensor, p: Tensor) -> Tensor:
    """(n, n), off the diagonal: how alike the encoder updates of two tasks' clients are.

    updates  (K, parameters), of the clients
    held     (K, n), 1 where the client holds the task
    p        (K,), the clients' weights

    In place of Eq. 3, which needs two losses at one client. cos_ij is the mean of <D_k, D_l> over
    clients k that hold i and l that hold j, weighted by p_k p_l, over |u_i| |u_j|, u_i the weighted
    mean update of those that hold i. Pairs of clients that hold a task in common are left out:
    they are alike whatever i and j are. Where every client holds one task, this is the cosine of
    the angle between u_i and u_j. NaN where there is no pair.
    """
    held, p = held.to(updates), p.to(updates)
    disjoint = (held @ held.T == 0).to(updates)
    weight = (p[:, None] * held) / (p @ held)  # (K, n), columns sum to 1
    inner = weight.T @ (disjoint * (updates @ updates.T)) @ weight
    norms = (weight.T @ updates).norm(dim=1)
    return inner / (weight.T @ disjoint @ weight) / (norms[:, None] * norms)


def cosines_of(vectors: Tensor) -> Tensor:
    """Cosines (N, N) of the angles between the rows of (N, d); 0 with a row of zeros."""
    unit = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return unit @ unit.T
