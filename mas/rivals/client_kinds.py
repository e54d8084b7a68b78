"""Personal networks, one for every kind of client; a kind is the set of tasks that it holds."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mas_core.config import FL, Model, UserError
from mas_core.models import MultiTaskNet, State
from mas_core.tasks import TaskTable

from .label_holders import TOLD, LabelHolders, holders, mean_of, received

# What a client may hold of sdnkt, one or two labels; every kind serves its first task.
CLIENT_KINDS = {1: ("s", "d", "n", "k", "t"), 2: ("sd", "dn", "nk", "kt", "ts")}


class Kinds(nn.Module):
    """A `MultiTaskNet` for each kind of client, all from the same initial weights.

    Asked for its predictions, it gives every task's by the one kind that has the task first: the
    network of k and t predicts k. So a task's loss is that of one network, chosen beforehand.
    """

    def __init__(
        self, letters: str, model: Model, seed: int, table: TaskTable, size: str, labels: int
    ) -> None:
        super().__init__()
        self.tasks, self.table = letters, table
        self.kinds = nn.ModuleDict({
            kind: MultiTaskNet(kind, size, model.output_stride, seed, table)
            for kind in CLIENT_KINDS[labels]
        })  # fmt: skip

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        served = {kind[0]: net for kind, net in self.kinds.items()}
        return {a: served[a].decoders[a](served[a].encoder(image)) for a in self.tasks}


# `model.size` of networks of a size, for clients with one label or two: "...kinds:small_1".
full_1, half_1, small_1, tiny_1 = (
    partial(Kinds, size=size, labels=1) for size in ("full", "half", "small", "tiny")
)
full_2, half_2, small_2, tiny_2 = (
    partial(Kinds, size=size, labels=2) for size in ("full", "half", "small", "tiny")
)


class Personal(LabelHolders):
    """A client trains the network of its kind; the server averages it over the kind's clients.

    `mixed` is what a method does between kinds. A kind without a client in a round stays. For a
    network of `Kinds`. The recorded bytes are those of all kinds; a client needs its own alone.
    """

    @classmethod
    def start(cls, net: nn.Module, fl: FL) -> State:
        if not hasattr(net, "kinds"):
            raise UserError(f"fl.method={fl.method} trains a network for each kind of client; "
                            "set model.size, for example to mas.rivals.client_kinds:small_1")
        return {}

    def part(self, held: str) -> Any:
        own = [net for net in self.net.kinds.values() if net.tasks == held]
        if not own:
            raise UserError(f"a client holds the labels of {held}, for which there is no network; "
                            f"there are: {', '.join(self.net.kinds)}. Set data.source, for example "
                            "to mas.paper.few_labels:labels_1")  # fmt: skip
        return own[0]

    @classmethod
    def average(cls, states: Iterable[tuple[State, float]]) -> State:
        sent, clients = received(states)
        new, here = dict(sent), []
        for kind in sorted({name.split(".")[1] for name in sent if name.startswith("kinds.")}):
            of_kind = holders(clients, kind)
            new[f"{TOLD}share_{kind}"] = torch.tensor(sum(p for _, p in of_kind))
            if of_kind:
                here.append(kind)
                new |= mean_of(of_kind, f"kinds.{kind}.")
        return new | cls.mixed(sent, new, here, clients[0][0])

    @classmethod
    def mixed(cls, sent: State, new: State, here: list[str], options: State) -> State:
        """Entries that change once more, from the states before and after the kinds' own means.

        here     the kinds that trained, sorted
        options  has the method's `numbers`
        """
        return {}
