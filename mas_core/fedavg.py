"""Federated averaging (McMahan et al., 2017), and what other methods may change of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import FL, RULES, UserError, outside
from .models import MultiTaskNet, State, TaskPass, forward_tasks, gradient_at_features
from .tasks import Batch


def rule_of(fl: FL) -> type[FedAvg]:
    """The rule that `fl.method` names."""
    rule = outside(RULES.get(fl.method, fl.method), type)
    if not issubclass(rule, FedAvg):
        raise UserError(f"fl.method={fl.method!r} is {rule!r}, no subclass of fedavg.FedAvg")
    return rule


def weighted_mean(states: Iterable[tuple[State, float]]) -> State:
    """sum_k p_k state_k, the p_k given; streamed, so that one sum and one state are in memory.

    BatchNorm statistics are averaged like weights; integer counters are rounded.
    """
    total: list[Tensor] = []
    for state, p in states:
        kinds = {name: tensor.dtype for name, tensor in state.items()}
        wide = [t if t.is_floating_point() else t.double() for t in state.values()]
        shares = torch._foreach_mul(wide, p)
        if total:
            torch._foreach_add_(total, shares)
        else:
            total = list(shares)
    return {
        name: t if kind.is_floating_point else t.round().to(kind)
        for (name, kind), t in zip(kinds.items(), total, strict=True)
    }


class FedAvg:
    """One client's training in one round, and the server's averaging; made anew for each client.

    A method overrides what it does differently. `state` is what the server sent; names in it that
    are no weights of the network are the method's own: `start` makes them, `travelling` returns
    them with the client's weights, and the server averages them alike.
    """

    options: dict[str, float] = {}  # what `fl.options` may give, with the defaults
    captured = True  # a captured (run/cuda_graph.py) or grouped (grouped.py) step does the same
    measures = True  # affinities can be measured beside its steps
    unsent = 0  # bytes of the server's state that this client neither receives nor sends

    def __init_subclass__(cls) -> None:
        """What changes a client's step is not captured or grouped, unless it says it can be."""
        if vars(cls).keys() & {"__init__", "network", "travelling", "step", "loss_weights",
                               "encoder_backward", "correct", "after"}:  # fmt: skip
            cls.captured = vars(cls).get("captured", False)

    def __init__(self, net: MultiTaskNet, fl: FL, state: State) -> None:
        self.net, self.fl, self.state = net, fl, state
        # The released code scales the encoder's gradient where there are several decoders.
        self.scale = 1 / math.sqrt(len(net.tasks)) if fl.encoder_grad_scale == "sqrt" else 1.0

    @classmethod
    def option(cls, fl: FL, name: str) -> float:
        """A number of the method: of `fl.options`, or its default."""
        return (cls.options | dict(fl.options))[name]

    @classmethod
    def start(cls, net: nn.Module, fl: FL) -> State:
        """What travels beside the weights before the first round."""
        return {}

    def network(self, client: int | None) -> MultiTaskNet:
        """What this client trains: the working copy of the server's network, or another one.

        client  its index; None if the caller does not give it
        """
        return self.net

    def travelling(self) -> State:
        """What goes back to the server beside the weights."""
        return {}

    @classmethod
    def report(cls, state: State, tasks: str) -> dict[str, float]:
        """Numbers of the server's new state that are recorded with the round, by column."""
        return {}

    @classmethod
    def before_test(cls, net: nn.Module, fl: FL, data: Any) -> None:
        """Change the network, which has the server's state, before it is validated or tested.

        data  `federated.Clients`; the server's state itself stays as it is
        """

    average = staticmethod(weighted_mean)  # the server: (state, p_k) of every client -> state

    def step(
        self,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        measure: Callable[[TaskPass, list[Tensor]], None] | None = None,
    ) -> Tensor:
        """One step on a batch; returns the losses before it, (n,).

        `measure` fills the encoder's gradient in place of `encoder_backward`, and measures.
        """
        optimizer.zero_grad()
        forward = forward_tasks(self.net, batch)
        at_features = forward.backward_decoders(self.loss_weights())
        (measure or self.encoder_backward)(forward, at_features)
        self.correct()
        optimizer.step()
        losses = forward.losses.detach()
        self.after(batch, losses, at_features)
        return losses

    def loss_weights(self) -> Tensor | None:
        """Weights of the losses, (n,); None: all 1 (MAS, Eq. 2)."""
        return None

    def encoder_backward(self, forward: TaskPass, at_features: list[Tensor]) -> None:
        """Fill the encoder's gradient from those of the tasks' losses at the shared features."""
        forward.features.backward(gradient_at_features(at_features, self.scale))

    def correct(self) -> None:
        """Change the gradients before the optimiser's step."""

    def after(self, batch: Batch, losses: Tensor, at_features: list[Tensor]) -> None:
        """Look at what the step did; `losses` are those before it."""
