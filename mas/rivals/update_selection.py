"""Clients send the largest dimensions of their encoder updates, enlarged to the same L1 norm."""

from __future__ import annotations

import math

from torch import Tensor

from mas_core.models import State

from .label_holders import LabelHolders, parameters


class UpdateSelection(LabelHolders):
    """Of every tensor's update the share `keep` with the largest magnitude is kept and rescaled.

    Written from the description of FedDEA (Wei et al., "Towards Unified Modeling in Federated
    Multi-Task Learning via Subspace Decoupling", arXiv 2505.24185), whose abstract says that
    dimensions relevant to a task are identified by the strength of the local updates, and rescaled.
    The paper's text was not at hand: this is not FedDEA, and `keep` (0.3) is a choice of our own.
    The rest, BatchNorm's statistics and decoders included, is averaged as in `LabelHolders`.
    """

    options = {"keep": 0.3}

    def travelling(self) -> State:
        keep, own = self.option(self.fl, "keep"), self.net.state_dict()
        kept = {
            name: self.state[name] + selected(own[name] - self.state[name], keep)
            for name in parameters(own, "encoder.")
        }
        return super().travelling() | kept


def selected(update: Tensor, keep: float) -> Tensor:
    """The ceil(keep x size) entries of largest magnitude, scaled to the L1 norm of all of them."""
    size = update.abs().flatten()
    largest = size.topk(math.ceil(keep * len(size))).indices
    only = update.new_zeros(len(size))
    only[largest] = update.flatten()[largest]
    scale = size.sum() / only.abs().sum().clamp(min=1e-30)
    return (only * scale).view_as(update)
