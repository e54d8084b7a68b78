"""One client's local epochs: FedAvg, FedProx and GradNorm differ in a few lines of one loop."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from .affinity import backward_sum, encoder_gradients, lookahead
from .config import FL
from .models import MultiTaskNet, forward_tasks
from .records.cost import device_clock
from .run.cuda_graph import graphed_step, sgd
from .tasks import Batch


@dataclass
class Balance:
    """GradNorm's state, which travels with the model: loss weights and first losses, both (n,)."""

    weights: Tensor
    initial_losses: Tensor | None = None


@dataclass
class LocalResult:
    """What a client reports besides its weights."""

    step_losses: Tensor  # (steps, n) training losses
    samples: int  # images trained on, E epochs together
    affinity: Tensor | None = None  # (n, n) mean over the measured steps
    measurements: int = 0
    affinity_seconds: float = 0.0  # with the encoder's backward pass that training needs anyway
    balance: Balance | None = field(default=None)

    @property
    def losses(self) -> Tensor:
        """Mean training loss of every task, (n,)."""
        return self.step_losses.mean(0)


def local_update(
    net: MultiTaskNet,
    batches: Iterable[Batch],
    fl: FL,
    lr: float,
    measure: bool = False,
    balance: Balance | None = None,
) -> LocalResult:
    """Train `net` in place on a client's batches (all local epochs, one after the other).

    The optimiser starts anew: SGD with momentum and weight decay on sum_i w_i L_i (MAS, Eq. 2 has
    w = 1), plus mu/2 |theta - theta_server|^2 for FedProx (Li et al., 2020). With `measure`, Eq. 3
    is computed on batch 0, rho, 2 rho, ... counted over all local epochs, at the weights before
    that batch's step; the training itself is bit-identical with and without.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("a client has no training images")
    net.train()
    parameters = list(net.parameters())
    server = [p.detach().clone() for p in parameters] if fl.method == "fedprox" else []
    scale = 1.0
    if fl.encoder_grad_scale == "sqrt":  # the released code, for several decoders
        scale = 1.0 / math.sqrt(len(net.tasks))
    graphed = graphed_step(net, first, fl, scale)
    if graphed:
        graphed.begin(lr)
    optimizer = graphed.optimizer if graphed else sgd(parameters, lr, fl)
    losses, affinities, samples, affinity_seconds = [], [], 0, 0.0
    for step, batch in enumerate(chain([first], batches)):
        samples += len(batch)
        measured = measure and step % fl.affinity_every == 0
        if graphed and not measured and batch.image.shape == first.image.shape:
            losses.append(graphed(batch))
            continue
        optimizer.zero_grad()
        forward = forward_tasks(net, batch)
        weights = balance.weights if balance else None
        at_features = forward.backward_decoders(weights)
        if measured:
            begin = _clock(batch)
            before = forward.losses.detach()
            gradients = encoder_gradients(net, forward, at_features, scale)
            affinities.append(lookahead(net, batch, before, gradients, lr))
            affinity_seconds += _clock(batch) - begin
        else:
            forward.features.backward(backward_sum(at_features, scale))
        if server:
            for p, origin in zip(parameters, server, strict=True):
                p.grad.add_(p.detach() - origin, alpha=fl.prox_mu)
        optimizer.step()
        losses.append(forward.losses.detach())
        if balance:
            balance = gradnorm_step(balance, losses[-1], at_features, fl)
    return LocalResult(
        step_losses=torch.stack(losses),
        samples=samples,
        affinity=torch.stack(affinities).mean(0) if affinities else None,
        measurements=len(affinities),
        affinity_seconds=affinity_seconds,
        balance=balance,
    )


def gradnorm_step(balance: Balance, losses: Tensor, at_features: list[Tensor], fl: FL) -> Balance:
    """One update of the loss weights (GradNorm, Chen et al., 2018, Eq. 2 and algorithm 1).

    at_features holds grad_z (w_i L_i) at the shared representation z, with norms G_i. The weights
    descend sum_i |G_i - mean(G) r_i^alpha|, the target held constant, where r_i is
    L_i / L_i(0) over its mean; then they are scaled to sum to n.
    """
    initial = losses if balance.initial_losses is None else balance.initial_losses
    norms = torch.stack([g.float().norm() for g in at_features])
    ratio = losses / initial
    target = norms.mean() * (ratio / ratio.mean()) ** fl.gradnorm_alpha
    slope = torch.sign(norms - target) * norms / balance.weights  # dG_i/dw_i = |grad_z L_i|
    weights = (balance.weights - fl.gradnorm_lr * slope).clamp(min=1e-3)
    return Balance(weights * len(weights) / weights.sum(), initial)


def _clock(batch: Batch) -> float:
    """Device seconds, with the device's queue emptied, so that an interval holds its own work."""
    if batch.image.is_cuda:
        torch.cuda.synchronize(batch.image.device)
    return device_clock(batch.image.device)
