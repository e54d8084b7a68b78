"""HeteroFL (Diao et al., ICLR 2021): weak clients train the leading channels of the encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mas_core.config import FL, UserError, stream
from mas_core.fedavg import FedAvg, weighted_mean
from mas_core.models import MultiTaskNet, State, autocast, build

HELD = "two_widths.held."  # + name: 1 for the entries that a client trained, 0 for the others
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# Of a wide network, by width: one that lasts, so that a step on it is captured once.
NARROW: WeakKeyDictionary[MultiTaskNet, dict[float, MultiTaskNet]] = WeakKeyDictionary()


class TwoWidths(FedAvg):
    """Every second client trains a narrow network, whose tensors are corners of the wide one's.

    Clients k with k mod `every` = `every` - 1 are narrow (options: `every` 2, `width` 0.5). Their
    encoder is the package's own at `model.width` = width, and each of its tensors is the leading
    block of the wide one of the same name (`corner`). Their decoders are whole, but for the inputs
    of the first layers. An entry w of the server becomes the mean over the clients that hold it,

        w <- sum_{k holds w} p_k w_k / sum_{k holds w} p_k,

    and stays as it was where no client of the round holds it. The wide network is tested. A narrow
    client measures affinities on the network that it trains, and they count like the others'.
    What a client does not hold is not counted as sent.

    Differences from the paper:
    - p_k is proportional to the client's images, as everywhere here; theirs are equal.
    - Static BatchNorm: in training it normalises by the batch, and before a test the statistics of
      the averaged network are computed from the clients' data (`before_test`). Theirs takes all of
      it after training; here, where every fifth round is validated, `batches` (2) of every
      client's, as cumulative means. Like validation it is counted neither as time nor as bytes.
      Running statistics, which nothing reads, are averaged over wide clients alone: a narrow
      network's channels sum over fewer inputs.
    - No scaler. Theirs divides what a convolution gives by the width; the BatchNorm that follows
      takes a constant factor out again. Only the 2x2 convolution that ends a strided block has
      none behind it, and is not scaled either.
    - No masked loss, as every client has labels of all tasks. Decoders are not narrowed: they are
      small, and which of them a network has differs from split to split.

    With width 1 this is FedAvg with static BatchNorm: what other clients are to be compared with.
    """

    options = {"every": 2, "width": 0.5, "batches": 2}

    def network(self, client: int | None) -> MultiTaskNet:
        if client is None:
            raise UserError("fl.method=two_widths treats clients by their index; "
                            "hand `client` to local_update")  # fmt: skip
        self.captured = True  # the step itself is FedAvg's; clients of one width share a graph
        self.wide, every = self.net, int(self.option(self.fl, "every"))
        if client % every == every - 1:
            width, known = self.option(self.fl, "width"), NARROW.setdefault(self.wide, {})
            known[width] = self.net = narrowed(self.wide, width, known.get(width))
        self.held = held(self.net, self.wide)
        self.unsent = sum(
            int((self.held[HELD + name] == 0).sum()) * tensor.element_size()
            for name, tensor in self.wide.state_dict().items()
        )
        return self.net

    def travelling(self) -> State:
        """Which entries this client holds; those of a narrow one are written back before."""
        if self.net is not self.wide:
            for name, own, part in corners(self.net, self.wide):
                if self.held[HELD + name].any():
                    part.copy_(own)
        return self.held

    @classmethod
    @torch.no_grad()
    def before_test(cls, net: MultiTaskNet, fl: FL, data: Any) -> None:
        """BatchNorm's statistics are those of training batches of all clients that train."""
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        usual = [m.momentum for m in norms]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # the mean over all batches
        net.train()
        device = next(net.parameters()).device
        for k in range(len(data.names)) if fl.clients is None else fl.clients:
            drawn = data.epoch(k, net.tasks, fl.batch_size, stream(0, "statistics", k), device)
            for batch in islice(drawn, int(cls.option(fl, "batches"))):
                with autocast(batch.image):
                    net(batch.image)
        for m, momentum in zip(norms, usual, strict=True):
            m.momentum = momentum

    @staticmethod
    def average(states: Iterable[tuple[State, float]]) -> State:
        return overlap_mean(states)


def corner(wide: Tensor, shape: Iterable[int]) -> Tensor:
    """The leading block of `wide` of that shape, as a view."""
    return wide[tuple(slice(n) for n in shape)]


def corners(narrow: MultiTaskNet, wide: MultiTaskNet) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every tensor of the narrow network, and the block of the wide one that it stands for."""
    whole = wide.state_dict()
    for name, tensor in narrow.state_dict().items():
        yield name, tensor, corner(whole[name], tensor.shape)


def narrowed(wide: MultiTaskNet, width: float, narrow: MultiTaskNet | None = None) -> MultiTaskNet:
    """A network of the same tasks whose encoder has `width` of the channels, weights copied.

    narrow  such a network, to be filled anew; None: one is made
    """
    if narrow is None:
        model = replace(wide.config, width=width * wide.config.width)
        narrow = build(wide.tasks, model, table=wide.table)
        device = next(wide.parameters()).device
        narrow = narrow.to(device, memory_format=torch.channels_last)
    for _, own, part in corners(narrow, wide):
        own.copy_(part)
    return narrow


def held(net: MultiTaskNet, wide: MultiTaskNet) -> State:
    """1 for entries of the wide network that `net` holds, else 0, by HELD + name.

    A network that is narrower than the wide one holds no running statistics.
    """
    masks, own = {}, net.state_dict()
    for name, tensor in wide.state_dict().items():
        kind = tensor.dtype if tensor.is_floating_point() else torch.float64
        masks[HELD + name] = torch.zeros_like(tensor, dtype=kind)
        if net.config.width == wide.config.width or not name.endswith(STATISTICS):
            corner(masks[HELD + name], own[name].shape).fill_(1)
    return masks


def overlap_mean(states: Iterable[tuple[State, float]]) -> State:
    """The mean of every entry over the clients that hold it, with their p_k; see `TwoWidths`.

    A state has, beside every tensor, HELD + its name (`held`); entries that a client does not hold
    are the server's.
    """
    last: State = {}

    def masked() -> Iterator[tuple[State, float]]:
        for state, p in states:
            last.update(state)
            masks = {name: mask for name, mask in state.items() if name.startswith(HELD)}
            names = [name.removeprefix(HELD) for name in masks]
            values = torch._foreach_mul([state[n] for n in names], list(masks.values()))
            yield dict(zip(names, values)) | masks | {HELD: torch.ones(())}, p

    mean, new = weighted_mean(masked()), {}
    everyone = mean.pop(HELD)  # the sum of p_k, rounded as the shares are
    for name in (n for n in mean if not n.startswith(HELD)):
        share = mean[HELD + name] / everyone
        value = torch.where(share > 0, mean[name] / share, last[name])
        kind = last[name].dtype
        new[name] = value if kind.is_floating_point else value.round().to(kind)
    return new
