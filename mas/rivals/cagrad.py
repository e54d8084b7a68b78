"""CAGrad (Liu et al., 2021): an encoder gradient that lets no task's loss fall too slowly."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from mas_core.affinity import encoder_gradients
from mas_core.fedavg import FedAvg
from mas_core.models import TaskPass


class CAGrad(FedAvg):
    """The encoder steps along sum_i a_i g_i, g_i its gradient of loss i; a is from `weights`.

    Decoders keep the gradients of their own losses. a sums the gradients where the methods'
    papers take means. Where all tasks agree, PCGrad's is the gradient of all-in-one and CAGrad's
    1 + c times that: its encoder takes longer steps, by up to that factor.
    """

    options = {"c": 0.4}
    measures = False

    def encoder_backward(self, forward: TaskPass, at_features: list[Tensor]) -> None:
        gradients = encoder_gradients(self.net, forward, at_features, self.scale)
        flat = torch.stack([torch.cat([t.flatten() for t in g]) for g in gradients])
        a = self.weights((flat @ flat.T).double().cpu().numpy())
        trained = [p for p in self.net.encoder.parameters() if p.requires_grad]
        for p, of_tasks in zip(trained, zip(*gradients), strict=True):
            p.grad = sum(float(x) * g for x, g in zip(a, of_tasks, strict=True))

    def weights(self, G: np.ndarray) -> np.ndarray:
        """a (n,) from the inner products G (n, n) of the tasks' gradients."""
        return conflict_averse(G, self.option(self.fl, "c"))


def conflict_averse(G: np.ndarray, c: float) -> np.ndarray:
    """Weights (n,) of the gradients g_i whose inner products are G (n, n).

    The direction d maximises min_i <g_i, d> within |d - g_0| <= c |g_0|, g_0 the mean. Its dual is
    min_w <g_w, g_0> + c |g_0| |g_w| over g_w = sum_i w_i g_i, w >= 0 of sum 1, and
    d = g_0 + c |g_0| g_w / |g_w| (Algorithm 1); the weights are those of n d. The released code
    divides d by 1 + c^2 as well.
    """
    n = len(G)
    if not G.any():
        return np.ones(n)
    G = G / np.trace(G)
    mean = np.full(n, 1 / n)
    radius = c * np.sqrt(mean @ G @ mean)

    def norm(w: np.ndarray) -> float:
        return np.sqrt(max(w @ G @ w, 1e-16))

    w = minimize(
        lambda w: w @ G @ mean + radius * norm(w),
        mean,
        jac=lambda w: G @ mean + radius * (G @ w) / norm(w),
        bounds=[(0, 1)] * n,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12},
    ).x
    return n * (mean + radius * w / norm(w))
