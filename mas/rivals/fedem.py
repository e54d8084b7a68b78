"""FedEM (Marfoq et al., 2021): clients share several networks and mix them in their own way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mas_core.config import FL, Model, UserError, stream_seed
from mas_core.fedavg import FedAvg
from mas_core.models import MultiTaskNet, State, TaskPass, autocast
from mas_core.tasks import Batch, TaskTable, task_losses


class Learners(nn.Module):
    """Networks whose predictions are mixed by pi (M,): h(x) = sum_m pi_m h_m(x).

    Of classes the probabilities are mixed. The first learner starts from the weights that
    `MultiTaskNet` would have; all of them, and pi, travel as the network's own state.
    """

    def __init__(self, letters: str, model: Model, seed: int, table: TaskTable, size: str) -> None:
        super().__init__()
        self.learners = nn.ModuleList(
            MultiTaskNet(letters, size, model.output_stride, s, table)
            for s in (seed, stream_seed(seed, "fedem"))
        )
        self.tasks, self.table = self.learners[0].tasks, table
        self.register_buffer("pi", torch.full((len(self.learners),), 1 / len(self.learners)))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        outputs = [net(image) for net in self.learners]
        return {a: self._mixed(a, torch.stack([out[a] for out in outputs])) for a in self.tasks}

    def _mixed(self, a: str, outputs: Tensor) -> Tensor:  # (M, B, C, H, W) -> (B, C, H, W)
        pi = self.pi.view(-1, 1, 1, 1, 1)
        if self.table[a].classes:
            return (outputs.log_softmax(2) + pi.log()).logsumexp(0)
        return (pi * outputs).sum(0)


# `model.size` of two learners of a size, by the name on record: "mas_core.rules.fedem:small".
full, half, small, tiny = (partial(Learners, size=s) for s in ("full", "half", "small", "tiny"))


class FedEM(FedAvg):
    """Expectation and maximisation (Algorithm 1) on every batch, for a network of `Learners`.

    E: q_m(b) proportional to pi_m exp(-sum_i L_i(h_m(x_b), y_b)), for every image b.
    M: pi is the mean of q over the images of this visit so far; learner m steps on the
    mean over b of q_m(b) sum_i L_i(b), times M, so that the learning rate means what it
    means for all-in-one. Two networks train and travel: twice the cost of all-in-one.

    Their E step passes over all images before the M step; here the batch's own forward pass
    serves. They keep pi with the client; here every visit starts from equal shares, and the mean
    over the round's clients is what is tested. (Started from that mean, seed 0 of sdnkt gave one
    learner everything by round 50, and with it twice the learning rate.)
    """

    measures = False
    seen = 0  # images of this visit

    def __init__(self, net: nn.Module, fl: FL, state: State) -> None:
        super().__init__(net, fl, state)
        net.pi.fill_(1 / len(net.pi))

    @classmethod
    def start(cls, net: nn.Module, fl: FL) -> State:
        if not hasattr(net, "pi"):
            raise UserError("fl.method=fedem trains two networks; "
                            "set model.size, for example to mas_core.rules.fedem:small")
        return {}

    @classmethod
    def report(cls, state: State, tasks: str) -> dict[str, float]:
        return {f"pi_{m}": p for m, p in enumerate(state["pi"].tolist())}

    def step(
        self,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        measure: Callable[[TaskPass, list[Tensor]], None] | None = None,
    ) -> Tensor:
        optimizer.zero_grad()
        with autocast(batch.image):
            outputs = [net(batch.image) for net in self.net.learners]
        losses = torch.stack([image_losses(out, batch) for out in outputs])  # (M, B, n)
        q = responsibilities(self.net.pi, losses.detach().sum(2))
        (len(q) * (q * losses.sum(2)).sum(0).mean()).backward()
        optimizer.step()
        total = self.net.pi * self.seen + q.sum(1)
        self.seen += len(batch)
        self.net.pi.copy_(total / self.seen)
        return (q[:, :, None] * losses.detach()).sum(0).mean(0)


def image_losses(outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    """The loss of every image alone: (B, n)."""
    return torch.stack(
        [
            task_losses(
                {a: out[b : b + 1] for a, out in outputs.items()},
                Batch(
                    batch.image[b : b + 1],
                    batch.mask[b : b + 1],
                    {a: target[b : b + 1] for a, target in batch.targets.items()},
                    batch.table,
                ),
            )
            for b in range(len(batch))
        ]
    )


def responsibilities(pi: Tensor, losses: Tensor) -> Tensor:
    """q (M, B) from pi (M,) and losses (M, B): softmax over m of log pi_m - loss_m."""
    return (pi.log()[:, None] - losses).softmax(0)
