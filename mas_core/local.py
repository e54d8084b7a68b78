"""One client's local epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from time import perf_counter

import torch
from torch import Tensor

from .affinity import measured_step
from .config import FL, UserError
from .fedavg import rule_of
from .models import MultiTaskNet, State, TaskPass
from .tasks import TASKS, Batch


@dataclass
class LocalResult:
    """What a client reports besides its weights."""

    step_losses: Tensor  # (steps, n) training losses
    samples: int  # images trained on, E epochs together
    affinity: Tensor | None  # (n, n) mean over the measured steps
    measurements: int
    affinity_seconds: float  # with the encoder's backward pass; of captured steps, all
    travelling: State  # what the method sends beside the weights
    unsent: int = 0  # bytes of the server's state that neither reach this client nor come back

    @property
    def losses(self) -> Tensor:
        """Mean training loss of every task, (n,)."""
        return self.step_losses.mean(0)


def sgd(parameters: Iterable[Tensor], lr: float | Tensor, fl: FL) -> torch.optim.SGD:
    """The optimiser of local training; an lr that is a tensor may change between steps."""
    return torch.optim.SGD(
        parameters, lr, momentum=fl.momentum, weight_decay=fl.weight_decay, fused=True
    )


def local_update(
    net: MultiTaskNet,
    batches: Iterable[Batch],
    fl: FL,
    lr: float,
    measure: bool = False,
    state: State | None = None,
    capture: Callable | None = None,
    clock: Callable[[], float] = perf_counter,
    client: int | None = None,
) -> LocalResult:
    """Train `net` in place on a client's batches (all local epochs, one after the other).

    The optimiser starts anew: SGD with momentum and weight decay on sum_i L_i (MAS, Eq. 2), unless
    `fl.method` does otherwise. With `measure`, affinities (Eq. 3) are measured on batch 0, rho,
    2 rho, ... counted over all local epochs, at the weights before that batch's step; the training
    itself is bit-identical with and without.

    state    what the server sent, with what the method keeps in it
    capture  (net, batch, fl, scale, measure) -> a captured step for such batches, or None
    clock    seconds, the device's queue emptied
    client   its index, for methods that treat clients differently
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("a client has no training images")
    if first.table is TASKS and any(net.table[a] != TASKS.get(a) for a in net.tasks):
        raise UserError("batches have the package's table of tasks; Batch takes yours as its last")
    rule = rule_of(fl)(net, fl, state or {})
    net = rule.network(client).train()
    captured = capture and rule.captured and capture(net, first, fl, rule.scale, measure)
    optimizer = captured.begin(lr) if captured else sgd(net.parameters(), lr, fl)
    losses, affinities, samples, affinity_seconds = [], [], 0, 0.0

    def measuring(forward: TaskPass, at_features: list[Tensor]) -> None:
        nonlocal affinity_seconds
        begin = clock()
        with torch.random.fork_rng([batch.image.device] * batch.image.is_cuda):  # for dropout
            S = measured_step(net, batch, forward, at_features, lr, rule.scale, fl.affinity)
        affinities.append(S)
        affinity_seconds += clock() - begin

    for step, batch in enumerate(chain([first], batches)):
        samples += len(batch)
        measured = measure and step % fl.affinity_every == 0
        if captured and batch.image.shape == first.image.shape:
            before, S, seconds = captured(batch, measured, clock)
            losses.append(before)
            affinities += [S] * measured
            affinity_seconds += seconds
        else:
            losses.append(rule.step(batch, optimizer, measuring if measured else None))
    return LocalResult(
        step_losses=torch.stack(losses),
        samples=samples,
        affinity=torch.stack(affinities).mean(0) if affinities else None,
        measurements=len(affinities),
        affinity_seconds=affinity_seconds,
        travelling=rule.travelling(),
        unsent=rule.unsent,
    )
