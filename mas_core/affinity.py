"""Affinities between tasks: how much a step for task i lowers the loss of task j (MAS, Eq. 3).

Everywhere S[i, j]: row i updates the shared encoder, column j receives. The diagonal, which Eq. 4
replaces before a split (`split.self_affinity`), is NaN unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .config import UserError, outside
from .models import MultiTaskNet, TaskPass, autocast, forward_tasks, gradient_at_features
from .tasks import Batch, task_losses

Gradient = list[Tensor]  # one tensor per parameter of the encoder


def lookahead_affinity(
    model: MultiTaskNet, batch: Batch, lr: float, diagonal: bool = True
) -> Tensor:
    """Affinity of every task onto every other, measured on one batch.

    S[i, j] = 1 - L_j(X, theta_s - lr grad_s L_i, theta_j) / L_j(X, theta_s, theta_j)  (MAS, Eq. 3)

    The look-ahead step is plain SGD: no momentum, no weight decay. BatchNorm uses the batch's
    statistics, as in training. Returns (n, n) float32, dimensionless, on the model's device. The
    model, its gradients and BatchNorm statistics included, is left bit-identical.
    """
    modes = [(m, m.training) for m in model.modules()]
    kept = [p.grad for p in model.parameters()]
    model.train()
    model.zero_grad()  # else the kept gradients would be added to in place
    with frozen_statistics(model):
        step = forward_tasks(model, batch)
        at_features = step.backward_decoders()
        gradients = encoder_gradients(model, step, at_features)
        S = lookahead(model, batch, step.losses.detach(), gradients, lr, diagonal)
    for m, training in modes:
        m.training = training
    for p, gradient in zip(model.parameters(), kept, strict=True):
        p.grad = gradient
    return S


def first_order_affinity(losses: Tensor, gradients: list[Gradient], lr: float) -> Tensor:
    """The first term of Eq. 3's expansion in lr: S[i, j] = lr <grad_s L_i, grad_s L_j> / L_j.

    losses     (n,) before the step
    gradients  per task, the gradient on the encoder's parameters, scaled as the training's are
    """
    flat = torch.stack([torch.cat([t.flatten() for t in g]) for g in gradients])  # (n, parameters)
    return torch.where(losses > 0, lr * (flat @ flat.T) / losses, 0.0)  # 0: no labels


def representation_affinity(losses: Tensor, at_features: list[Tensor], lr: float) -> Tensor:
    """The same inner products at the encoder's output: lr <dL_i/dz, dL_j/dz> / L_j.

    Training computes dL_i/dz (B, C, h, w) anyway, so this costs n^2 inner products.
    """
    return first_order_affinity(losses, [[g.float()] for g in at_features], lr)


def cosine_affinity(losses: Tensor, gradients: list[Gradient], lr: float) -> Tensor:
    """Cosine of the angle between the tasks' gradients on the encoder; symmetric, in [-1, 1]."""
    flat = torch.stack([torch.cat([t.flatten() for t in g]) for g in gradients])
    unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit @ unit.T


def measured_step(
    model: MultiTaskNet,
    batch: Batch,
    step: TaskPass,
    at_features: list[Tensor],
    lr: float,
    scale: float = 1.0,
    kind: str = "lookahead",
) -> Tensor:
    """Affinities (n, n) measured beside a training step; fills that step's encoder gradient.

    step, at_features  the step's forward pass, and what `backward_decoders` returned
    kind               "lookahead" (Eq. 3), "first_order", "representation", "cosine", or a function
                       outside the package, called as (losses, gradients, lr)

    The diagonal is NaN. The training gradient is that of a step without measuring, to the bit.
    """
    losses = step.losses.detach()
    if kind == "representation":
        step.features.backward(gradient_at_features(at_features, scale))
        S = representation_affinity(losses, at_features, lr)
    else:
        gradients = encoder_gradients(model, step, at_features, scale)
        if kind == "lookahead":
            return lookahead(model, batch, losses, gradients, lr)
        S = (_CHEAPER.get(kind) or outside(kind, Callable))(losses.clone(), gradients, lr)
        if not isinstance(S, Tensor) or S.shape != (len(losses), len(losses)):
            raise UserError(f"{kind} returned {S!r:.60}, no tensor ({len(losses)}, {len(losses)})")
    return S.detach().clone().fill_diagonal_(torch.nan)


def encoder_gradients(
    model: MultiTaskNet, step: TaskPass, at_features: list[Tensor], scale: float = 1.0
) -> list[Gradient]:
    """Gradient of every task's loss on the encoder, from n backward passes through the encoder.

    Fills the encoder's `.grad` with the training gradient exactly as a step without measuring
    would: one backward pass carries the sum, n - 1 carry a task each, and the task with the
    largest gradient is the difference, where rounding matters least. A GPU makes n + 1 passes: to
    know that task, it would have to be waited for.
    """
    parameters, last = [p for p in model.encoder.parameters() if p.requires_grad], None
    if not step.features.is_cuda:
        last = int(torch.stack([g.float().norm() for g in at_features]).argmax())
    singles = [
        None if i == last
        else torch.autograd.grad(step.features, parameters, g * scale, retain_graph=True)
        for i, g in enumerate(at_features)
    ]  # fmt: skip
    for p in parameters:
        p.grad = None
    step.features.backward(gradient_at_features(at_features, scale))
    if last is not None:
        rest = [p.grad.clone() for p in parameters]
        for single in filter(None, singles):
            torch._foreach_sub_(rest, single)
        singles[last] = rest
    return singles


@torch.no_grad()
def lookahead(
    model: MultiTaskNet,
    batch: Batch,
    losses: Tensor,
    gradients: list[Gradient],
    lr: float,
    diagonal: bool = False,
) -> Tensor:
    """Eq. 3 from the losses (n,) before the step and the encoder gradients of every task."""
    trained = {k: p for k, p in model.encoder.named_parameters() if p.requires_grad}
    names, parameters = zip(*trained.items())
    rows, nan = [], losses.new_full((1,), torch.nan)
    with frozen_statistics(model), autocast(batch.image):
        for i in range(len(losses)):
            stepped = torch._foreach_sub(parameters, torch._foreach_mul(gradients[i], lr))
            weights = dict(zip(names, stepped, strict=True))
            features = torch.func.functional_call(model.encoder, weights, (batch.image,))
            receivers = [a for j, a in enumerate(model.tasks) if diagonal or j != i]
            outputs = {a: model.decoders[a](features) for a in receivers}
            after = task_losses(outputs, batch) if outputs else nan[:0]
            rows.append(after if diagonal else torch.cat([after[:i], nan, after[i:]]))
    # A batch without a labelled pixel has loss 0 before and after: no affinity.
    S = torch.where(losses > 0, 1 - torch.stack(rows) / losses, 0.0)
    return S if diagonal else S.fill_diagonal_(torch.nan)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, as in training; its running statistics do not change."""
    normalising = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    tracking = [(m, m.momentum) for m in normalising if m.track_running_stats]
    for m, _ in tracking:
        m.track_running_stats, m.momentum = False, 0.0  # the second for InstanceNorm
    try:
        yield
    finally:
        for m, momentum in tracking:
            m.track_running_stats, m.momentum = True, momentum


_CHEAPER = {"first_order": first_order_affinity, "cosine": cosine_affinity}
