"""Selective Task Group Updates (Jeong and Yoon, ICLR 2025): groups step in turn on each batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from mas_core.affinity import frozen_statistics
from mas_core.config import FL, stream
from mas_core.fedavg import FedAvg
from mas_core.models import MultiTaskNet, State, TaskPass, forward_tasks
from mas_core.tasks import Batch

B, ROUND = "selective.affinity", "selective.round"
Groups = list[list[int]]


class Selective(FedAvg):
    """On each batch, groups of tasks take their steps one after the other, in random order.

    A group's step moves the encoder and the group's decoders. What it does to every task's loss
    is its proximal affinity (`tracked`), of which the running mean B (n, n) decides the groups of
    the next batch (`grouped`); the tasks start alone. m groups cost m steps a batch and one
    forward pass more. B travels and is averaged. BatchNorm's running statistics take the first
    forward pass of a batch alone.

    The option `decay` (0.005) is the weight of a new affinity: 1e-4 in the released code, over
    40,000 batches; a client's chain of batches has about 900 here. The released code adds a
    group's effect to the group that steps next, and leaves out the last one's; here each goes to
    the group that stepped. There a single group steps twice a batch, here once; where affinity
    propagation finds no exemplar, it tries on and keeps the last groups, here every task is alone.
    The order comes from the stream "selective" of the option `seed` and the round.
    """

    options = {"seed": 0, "decay": 0.005}
    measures = False

    def __init__(self, net: MultiTaskNet, fl: FL, state: State) -> None:
        super().__init__(net, fl, state)
        self.B = state[B].double().cpu().numpy()
        self.rng = stream(int(self.option(self.fl, "seed")), "selective", int(state[ROUND]))

    @classmethod
    def start(cls, net: nn.Module, fl: FL) -> State:
        n = len(net.tasks)
        return {B: torch.zeros(n, n), ROUND: torch.zeros((), dtype=torch.int64)}

    def travelling(self) -> State:
        return {B: torch.from_numpy(self.B).float(), ROUND: self.state[ROUND] + 1}

    @classmethod
    def report(cls, state: State, tasks: str) -> dict[str, float]:
        """The number of every task's group."""
        groups = grouped(state[B].double().cpu().numpy())
        return {f"group_{tasks[i]}": k for k, group in enumerate(groups) for i in group}

    def step(
        self,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        measure: Callable[[TaskPass, list[Tensor]], None] | None = None,
    ) -> Tensor:
        groups = grouped(self.B)
        stepped, losses = [], []
        for k in self.rng.permutation(len(groups)):
            optimizer.zero_grad()  # gradients that stay None leave the other decoders alone
            with frozen_statistics(self.net) if losses else nullcontext():
                forward = forward_tasks(self.net, batch)
            forward.losses[groups[k]].sum().backward()
            at_features = [forward.handles[i].grad for i in groups[k]]
            self.encoder_backward(forward, at_features)
            optimizer.step()
            stepped.append(groups[k])
            losses.append(forward.losses.detach())
        with torch.no_grad(), frozen_statistics(self.net):
            losses.append(forward_tasks(self.net, batch).losses)
        seen = torch.stack(losses).double().cpu().numpy()  # (m + 1, n)
        for group, (before, after) in zip(stepped, pairwise(seen), strict=True):
            self.B = tracked(self.B, group, before, after, self.option(self.fl, "decay"))
        return losses[0]


def tracked(
    B: np.ndarray, group: list[int], before: np.ndarray, after: np.ndarray, decay: float
) -> np.ndarray:
    """B (n, n) after a group's step: B[i, j] is task i's affinity onto task j's loss (n,).

    The step's effect on j, (1 - after_j / before_j) / |group|, goes to every i of the group: with
    itself only where it is positive; with a fellow whose effect has the other sign, minus the
    larger of the two. B <- (1 - decay) B + decay x effect.
    """
    change = np.where(before > 0, 1 - after / np.maximum(before, 1e-12), 0.0) / len(group)
    new = B.copy()
    for i in group:
        effect = change.copy()
        for j in group:
            if change[i] * change[j] < 0:
                effect[j] = -max(change[i], change[j])
        own = B[i, i] if change[i] < 0 else (1 - decay) * B[i, i] + decay * change[i]
        new[i] = (1 - decay) * B[i] + decay * effect
        new[i, i] = own
    return new


def grouped(B: np.ndarray) -> Groups:
    """Groups by affinity propagation on (X + X^T) / 2, X[i, j] = B[i, j] / B[j, j]."""
    own = B.diagonal()
    if (own <= 0).any():  # nothing is known yet
        return [[i] for i in range(len(B))]
    X = B / own
    labels = affinity_propagation((X + X.T) / 2)
    return [np.flatnonzero(labels == k).tolist() for k in dict.fromkeys(labels.tolist())]


def affinity_propagation(S: np.ndarray, damping: float = 0.5, iterations: int = 200) -> np.ndarray:
    """The exemplar of every point (n,), from similarities S (n, n) (Frey and Dueck, 2007).

    Messages r(i, k) = s(i, k) - max_{k' != k} (a(i, k') + s(i, k')), and a(i, k) = min(0, r(k, k) +
    sum_{i' not in {i, k}} max(0, r(i', k))), a(k, k) without the min and r(k, k), are damped; k is
    an exemplar where r(k, k) + a(k, k) > 0. As in scikit-learn the preference s(k, k) is the
    median of S, a little noise breaks ties, and last every cluster takes the exemplar
    that is most similar to all of it. Without an exemplar every point is its own.
    """
    n = len(S)
    S = S.copy()
    np.fill_diagonal(S, np.median(S))
    S += 1e-6 * np.abs(S).max() * stream(0, "ties").standard_normal(S.shape)
    R, A, every = np.zeros((n, n)), np.zeros((n, n)), np.arange(n)
    for _ in range(iterations if n > 1 else 0):
        both = A + S
        best = both.argmax(1)
        others = np.repeat(both[every, best][:, None], n, 1)
        both[every, best] = -np.inf
        others[every, best] = both.max(1)
        R = damping * R + (1 - damping) * (S - others)
        positive = np.maximum(R, 0)
        np.fill_diagonal(positive, R.diagonal())
        sums = positive.sum(0) - positive  # of the column, without i
        np.fill_diagonal(positive, 0)
        new = np.minimum(sums, 0)
        np.fill_diagonal(new, positive.sum(0))
        A = damping * A + (1 - damping) * new
    exemplars = np.flatnonzero((A + R).diagonal() > 0)
    if not len(exemplars):
        return every
    for _ in range(2):
        labels = exemplars[S[:, exemplars].argmax(1)]
        labels[exemplars] = exemplars
        clusters = [np.flatnonzero(labels == k) for k in exemplars]
        exemplars = np.array([c[S[np.ix_(c, c)].sum(0).argmax()] for c in clusters])
    return labels
