"""MaT-FL (Cai et al., 2023): clients' encoders mixed by how alike they have become."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mas_core.config import FL
from mas_core.models import State

from .client_kinds import Personal
from .label_holders import OPTION, TOLD, cosines_of, flat


class MaTFL(Personal):
    """The encoder of kind i becomes sum_j s_ij theta_j, s_ij from `mixing_weights`.

    "Many-Task Federated Learning: A New Problem Setting and A Simple Baseline" (FedVision at CVPR
    2023), after the soft grouping of the released code (VITA-Group/MaT-FL): it compares what every
    encoder has beyond the mean of all, and mixes weights and BatchNorm's statistics. Decoders
    stay with their owner.

    Differences. Every client has a network there and takes part in every round; here every kind
    has one, averaged over its clients of the round, and kinds without a client are not mixed.
    BatchNorm's statistics do not enter the cosine. The threshold has no default in the released
    command; here it is 1 (the option `threshold`), which an earlier line of that code has.
    own_k is reported: the weight that kind k kept for itself when it was last mixed.
    """

    options = {"threshold": 1.0}
    numbers = ("threshold",)

    @classmethod
    def start(cls, net: nn.Module, fl: FL) -> State:
        super().start(net, fl)
        return {f"{TOLD}own_{kind}": torch.tensor(1.0) for kind in net.kinds}

    @classmethod
    def mixed(cls, sent: State, new: State, here: list[str], options: State) -> State:
        encoders = torch.stack([flat(new, f"kinds.{kind}.encoder.") for kind in here])
        S = mixing_weights(encoders, float(options[OPTION + "threshold"]))
        changed: State = {}
        head = f"kinds.{here[0]}."
        for name in [n for n in new if n.startswith(head + "encoder.")]:
            rest = name.removeprefix(head)
            if new[name].is_floating_point():
                own = torch.stack([new[f"kinds.{kind}.{rest}"].flatten() for kind in here])
                mix = (S.to(own) @ own).unflatten(1, new[name].shape)
                changed |= {f"kinds.{k}.{rest}": t for k, t in zip(here, mix, strict=True)}
        return changed | {f"{TOLD}own_{k}": s for k, s in zip(here, S.diagonal(), strict=True)}


def mixing_weights(encoders: Tensor, threshold: float) -> Tensor:
    """s_ij = max(cos(theta_i - mean, theta_j - mean) + threshold, 0), rows scaled to sum to 1.

    encoders  (N, parameters), the mean is over the N; the cosine of one with itself is 1
    """
    cos = cosines_of(encoders - encoders.mean(0)).fill_diagonal_(1.0)
    S = (cos + threshold).clamp(min=0)
    return S / S.sum(1, keepdim=True)
