"""PCGrad (Yu et al., 2020): encoder gradients lose what conflicts with the others'."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mas_core.config import FL, stream
from mas_core.models import MultiTaskNet, State

from .cagrad import CAGrad

ROUND = "pcgrad.round"


class PCGrad(CAGrad):
    """Every task's gradient loses what conflicts with the others', in random order; then the sum.

    The order comes from the stream "pcgrad" of the option `seed` and the round, whose number
    travels. It is the same for all clients of a round.
    """

    options = {"seed": 0}

    def __init__(self, net: MultiTaskNet, fl: FL, state: State) -> None:
        super().__init__(net, fl, state)
        self.rng = stream(int(self.option(self.fl, "seed")), "pcgrad", int(state[ROUND]))

    @classmethod
    def start(cls, net: nn.Module, fl: FL) -> State:
        return {ROUND: torch.zeros((), dtype=torch.int64)}

    def travelling(self) -> State:
        return {ROUND: self.state[ROUND] + 1}

    def weights(self, G: np.ndarray) -> np.ndarray:
        return projected(G, [self.rng.permutation(len(G)) for _ in G])


def projected(G: np.ndarray, orders: list[np.ndarray]) -> np.ndarray:
    """Weights (n,) of the gradients g_i whose inner products are G (n, n) (Algorithm 1).

    g_i^PC starts as g_i; for each j of orders[i] other than i, where <g_i^PC, g_j> < 0,
    g_i^PC <- g_i^PC - <g_i^PC, g_j> / |g_j|^2 g_j. The weights are those of sum_i g_i^PC.
    """
    parts = np.eye(len(G))  # row i: g_i^PC as a combination of the gradients
    for i, order in enumerate(orders):
        for j in order:
            conflict = parts[i] @ G[:, j]
            if j != i and conflict < 0:
                parts[i, j] -= conflict / G[j, j]
    return parts.sum(0)
