"""FedHCA2 (Lu et al., 2024): a conflict-averse encoder update and attention between decoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mas_core.config import FL
from mas_core.models import State

from .cagrad import conflict_averse
from .client_kinds import Personal
from .label_holders import OPTION, TOLD, flat, parameters

ADDED, SHARE, SPEED = "fedhca2.added.", "fedhca2.share.", "fedhca2.speed."


class FedHCA2(Personal):
    """theta_i <- theta_i + D_i + alpha_i U for encoders, phi <- phi + D + beta A for decoders.

    "FedHCA2: Towards Hetero-Client Federated Multi-Task Learning" (CVPR 2024), after the released
    code (innovator-zero/FedHCA2). D is a kind's own mean update. U is CAGrad's direction of all
    encoder updates with c = 0.4, over 1 + c^2. A is, tensor by tensor, softmax(q K^T / sqrt(d)) K,
    q the decoder's update, K those of all decoders. alpha (one a kind) and beta (one a layer of a
    decoder) start at 0.1, count as clipped to [0, 1], and follow a client's next update: SGD with
    lr 0.01, momentum 0.9 and weight decay 1e-4 on the gradient -<U, D'>, or -<A, D'>.

    Differences. Every client has a network there and takes part in every round; here every kind
    has one (they give clients of one data set and one set of tasks one mean update, too), and a
    kind without a client waits. Updates are weighted by data size inside a kind. Their output
    heads are not mixed; here those are a decoder's `last` layers. Swin and AdamW there.
    alpha_k and beta_k, the mean over the kind's layers, are reported. The recorded bytes count what
    the server keeps (`followed`), too: twice those of MaT-FL.
    """

    options = {"c": 0.4, "hyper_lr": 0.01, "share": 0.1}
    numbers = ("c", "hyper_lr")

    @classmethod
    def start(cls, net: nn.Module, fl: FL) -> State:
        super().start(net, fl)
        names = parameters(net.state_dict(), "kinds.")
        share = torch.tensor(cls.option(fl, "share"))
        return {SHARE + layer_of(n): share.clone() for n in names if is_mixed(n)}

    @classmethod
    def mixed(cls, sent: State, new: State, here: list[str], options: State) -> State:
        names = [n for kind in here for n in parameters(new, f"kinds.{kind}.") if is_mixed(n)]
        updates = {n: new[n] - sent[n] for n in names}
        c, lr = (float(options[OPTION + name]) for name in ("c", "hyper_lr"))
        learnt = followed(sent, updates, lr)
        shares = {n: t for n, t in sent.items() if n.startswith(SHARE)} | learnt
        added = encoder_direction(updates, here, c) | attended(updates)
        mixed = {n: new[n] + shares[SHARE + layer_of(n)].clamp(0, 1) * added[n] for n in names}
        return mixed | learnt | {ADDED + n: t for n, t in added.items()} | told(shares)


def is_mixed(name: str) -> bool:
    """Whether a parameter is mixed between kinds: those of output layers are not."""
    return ".encoder." in name or name.split(".")[4] != "last"


def layer_of(name: str) -> str:
    """What shares a weight: the encoder of a kind, or one layer of a decoder."""
    kind, _, rest = name.removeprefix("kinds.").partition(".")
    return f"{kind}.encoder" if rest.startswith("encoder.") else f"{kind}.{rest.rpartition('.')[0]}"


def encoder_direction(updates: State, here: list[str], c: float) -> State:
    """U by parameter, for every kind of `here`: sum_i a_i D_i / (N (1 + c^2)), a from CAGrad."""
    heads = [f"kinds.{kind}." for kind in here]
    D = torch.stack([flat(updates, head + "encoder.") for head in heads])  # (N, parameters)
    a = conflict_averse((D @ D.T).cpu().numpy(), c) / (len(here) * (1 + c**2))
    found: State = {}
    for name in parameters(updates, heads[0] + "encoder."):
        rest = name.removeprefix(heads[0])
        U = sum(float(x) * updates[head + rest] for x, head in zip(a, heads, strict=True))
        found |= {head + rest: U.clone() for head in heads}  # each kind keeps its own
    return found


def attended(updates: State) -> State:
    """A by parameter: what each decoder's tensor takes from those of all decoders at its place."""
    places: dict[str, list[str]] = {}
    for name in sorted(updates):
        if ".decoders." in name:
            places.setdefault(name.split(".", 4)[4], []).append(name)
    found: State = {}
    for names in places.values():
        K = torch.stack([updates[n].flatten() for n in names])  # (decoders, d)
        A = attention(K)
        found |= {n: row.view_as(updates[n]) for n, row in zip(names, A, strict=True)}
    return found


def attention(K: Tensor) -> Tensor:
    """softmax(K K^T / sqrt(d)) K for the rows of K (N, d)."""
    return (K @ K.T / K.shape[1] ** 0.5).softmax(1) @ K


def followed(sent: State, updates: State, lr: float) -> State:
    """The learnt shares after what clients' updates (D') say of what was added to their kind.

    They and the speeds of SGD are kept with the server; a kind to which nothing was added yet
    leaves its own alone.
    """
    gradient: dict[str, Tensor] = {}
    for name, update in updates.items():
        if ADDED + name in sent:
            # In fresh memory: a dot product's last bit depends on where a loaded tensor lies.
            product = sent[ADDED + name].double().flatten() @ update.double().flatten()
            gradient[layer_of(name)] = gradient.get(layer_of(name), 0.0) - product
    learnt: State = {}
    for layer, slope in gradient.items():
        share = sent[SHARE + layer]
        clipped = (share < 0) | (share > 1)  # no gradient passes there
        slope = torch.where(clipped, 0.0, slope.to(share)) + 1e-4 * share
        speed = 0.9 * sent.get(SPEED + layer, torch.zeros_like(share)) + slope
        learnt |= {SPEED + layer: speed, SHARE + layer: share - lr * speed}
    return learnt


def told(shares: State) -> State:
    """alpha and the mean beta of every kind, for the record."""
    found: dict[str, list[Tensor]] = {}
    for name, share in sorted(shares.items()):
        if name.startswith(SHARE):
            kind, part, *_ = name.removeprefix(SHARE).split(".")
            symbol = "alpha" if part == "encoder" else "beta"
            found.setdefault(f"{TOLD}{symbol}_{kind}", []).append(share.clamp(0, 1))
    return {name: torch.stack(values).mean() for name, values in found.items()}
