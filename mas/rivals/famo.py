"""FAMO (Liu et al., 2023): loss weights under which all log losses fall at one rate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mas_core.affinity import frozen_statistics
from mas_core.config import FL
from mas_core.fedavg import FedAvg
from mas_core.models import MultiTaskNet, State, TaskPass, forward_tasks
from mas_core.tasks import Batch

W = "famo.w"


class FAMO(FedAvg):
    """A step on sum_i z_i log L_i with z = softmax(w), then w follows the change (Algorithm 1).

    The gradient is that of sum_i a_i L_i, a_i = (z_i / L_i) / sum_j (z_j / L_j). The paper's a_i
    sum to 1, which its Adam does not notice; here they sum to n, so that SGD's learning rate means
    what it means for all-in-one. After the step one more forward pass of the batch gives L', and

        w <- Adam(w, grad = J^T (log L - log L') + decay w),   J = dz/dw,

    with `options` lr (0.025) and decay (0.01). w (n,) travels and is averaged; Adam's moments start
    anew with every client, as the momentum of the weights does. The released code also clips
    the gradient's norm at 1; the paper does not mention it, and it is not done here.
    """

    options = {"lr": 0.025, "decay": 0.01}
    measures = False

    def __init__(self, net: MultiTaskNet, fl: FL, state: State) -> None:
        super().__init__(net, fl, state)
        self.w = state[W].clone()
        self.adam = torch.optim.Adam(
            [self.w], self.option(self.fl, "lr"), weight_decay=self.option(self.fl, "decay")
        )

    @classmethod
    def start(cls, net: nn.Module, fl: FL) -> State:
        return {W: torch.zeros(len(net.tasks), device=next(net.parameters()).device)}

    def travelling(self) -> State:
        return {W: self.w}

    @classmethod
    def report(cls, state: State, tasks: str) -> dict[str, float]:
        return {f"weight_{a}": z for a, z in zip(tasks, state[W].softmax(0).tolist(), strict=True)}

    def step(
        self,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        measure: Callable[[TaskPass, list[Tensor]], None] | None = None,
    ) -> Tensor:
        optimizer.zero_grad()
        forward = forward_tasks(self.net, batch)
        losses = forward.losses.detach()
        # A task without labels in the batch has loss 0, and no share.
        shares = torch.where(losses > 0, self.w.softmax(0) / losses.clamp(min=1e-8), 0.0)
        total = shares.sum().clamp(min=1e-30)
        at_features = forward.backward_decoders(len(shares) * shares / total)
        self.encoder_backward(forward, at_features)
        optimizer.step()
        with torch.no_grad(), frozen_statistics(self.net):
            self.follow(losses, forward_tasks(self.net, batch).losses)
        return losses

    def follow(self, before: Tensor, after: Tensor) -> None:
        """Adam's step of w, from the losses (n,) before and after the network's step."""
        fell = before.clamp(min=1e-8).log() - after.clamp(min=1e-8).log()
        z = self.w.softmax(0)
        self.w.grad = z * (fell - z @ fell)
        self.adam.step()
