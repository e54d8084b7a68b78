"""GradNorm (Chen et al., 2018): loss weights that balance the gradients of the tasks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mas_core.config import FL
from mas_core.fedavg import FedAvg
from mas_core.models import MultiTaskNet, State
from mas_core.tasks import Batch

WEIGHTS, INITIAL = "balance.weights", "balance.initial_losses"


class GradNorm(FedAvg):
    """The weights w (n,) descend sum_i |G_i - mean(G) r_i^alpha| after every step (their Eq. 2).

    G_i = |grad_z w_i L_i| at the shared representation z; r_i is L_i / L_i(0) over its mean; the
    target is held constant. Then the weights are scaled to sum to n. They travel with the model,
    and so do the first losses L_i(0); alpha and the step are `fl.gradnorm_alpha`, `fl.gradnorm_lr`.
    Tasks without labels in a batch have loss 0 there; means are over the others.
    """

    measures = False

    def __init__(self, net: MultiTaskNet, fl: FL, state: State) -> None:
        super().__init__(net, fl, state)
        self.weights, self.initial = state[WEIGHTS], state.get(INITIAL)

    @classmethod
    def start(cls, net: nn.Module, fl: FL) -> State:
        return {WEIGHTS: torch.ones(len(net.tasks), device=next(net.parameters()).device)}

    def travelling(self) -> State:
        return {WEIGHTS: self.weights, INITIAL: self.initial}

    @classmethod
    def report(cls, state: State, tasks: str) -> dict[str, float]:
        return {f"weight_{a}": w for a, w in zip(tasks, state[WEIGHTS].tolist(), strict=True)}

    def loss_weights(self) -> Tensor:
        return self.weights

    def after(self, batch: Batch, losses: Tensor, at_features: list[Tensor]) -> None:
        initial = losses if self.initial is None else self.initial
        self.initial, labelled = torch.where(initial > 0, initial, losses), losses > 0
        if not labelled.any():
            return
        norms = torch.stack([g.float().norm() for g in at_features])
        ratio = losses / self.initial.clamp(min=1e-30)
        relative = ratio / ratio[labelled].mean()
        target = norms[labelled].mean() * relative ** self.fl.gradnorm_alpha
        slope = torch.sign(norms - target) * norms / self.weights  # dG_i/dw_i = |grad_z L_i|
        weights = (self.weights - self.fl.gradnorm_lr * slope).clamp(min=1e-3)
        self.weights = weights * len(weights) / weights.sum()
