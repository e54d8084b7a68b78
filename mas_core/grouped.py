"""A round's clients trained side by side: their networks as one network of grouped convolutions.

A step of a small network is bound by the number of its operators. G clients of one shape are one
network whose tensors are theirs joined along dimension 0, with G times the groups in every
convolution: the operators of one network for the arithmetic of G, and each client's weights,
statistics, momentum, losses and affinities are its own.

Results equal those of `local.local_update` to rounding. For every G >= 2 they are the same to the
bit, whatever G is, whichever place a client has, and whoever is beside it: so the width of a group
is no part of a trajectory's id. Three things ensure this: a loss is reduced over one network's
values, laid out contiguously; gradients are summed and chosen network by network; and a client
that is left alone (other kernels serve ungrouped convolutions) runs beside a copy of itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .affinity import frozen_statistics
from .config import FL
from .fedavg import rule_of
from .local import LocalResult, sgd
from .models import MultiTaskNet, State, gradient_at_features
from .tasks import (
    Batch,
    TaskTable,
    cross_entropy,
    l1,
    l1_invalid_zero,
    rotation_l1,
    rotation_l1_by_image,
)

WIDTH = 4  # clients in a group at most: more gain little, and memory grows


def can_group(net: nn.Module, fl: FL) -> bool:
    """Whether `fl.arithmetic` asks for groups and this training can be grouped; else: one by one.

    Rules with steps of their own, networks from outside the package, rounds of one client,
    affinities other than Eq. 3 and GPUs (where a captured step does the same service) cannot.
    """
    return (
        fl.arithmetic == "grouped"
        and fl.clients_per_round > 1
        and rule_of(fl).captured
        and fl.affinity == "lookahead"
        and type(net) is MultiTaskNet
        and all(p.requires_grad for p in net.parameters())
        and next(net.parameters()).device.type == "cpu"
    )


@dataclass
class _Client:
    """A client in training; between groups it holds its tensors, by name (`Group.slot`)."""

    batches: Iterator[Batch]
    tensors: dict[str, Tensor]
    batch: Batch | None = None  # the next one
    losses: list[Tensor] = field(default_factory=list)
    affinities: list[Tensor] = field(default_factory=list)
    samples: int = 0
    affinity_seconds: float = 0.0


def train_clients(
    net: MultiTaskNet,
    state: State,
    batches: dict[int, Iterator[Batch]],
    fl: FL,
    lr: float,
    measure: bool = False,
    clock: Callable[[], float] = perf_counter,
) -> dict[int, tuple[State, LocalResult]]:
    """What `local_update` does for each of several clients: its new state, and what it reports.

    batches  a client's batches of all local epochs; clients that stand side by side here are
             grouped, so those with many batches should come first
    """
    rule = rule_of(fl)(net, fl, state)
    kept = _groups.setdefault(net, {})
    clients = {k: _Client(own, state) for k, own in batches.items()}
    for client in clients.values():
        client.batch = next(client.batches, None)
        if client.batch is None:
            raise ValueError("a client has no training images")
    waiting = _of_one_shape(list(clients.values()))
    while waiting:
        together = waiting.pop()
        key = (max(2, len(together)), fl.momentum, fl.weight_decay, rule.scale)
        if key not in kept:
            kept[key] = Group(net, key[0], fl, rule.scale)
        _train(kept[key], together, fl, lr, measure, clock)
        waiting += _of_one_shape(together)
    return {k: (_state(net, state, c), _result(c, rule.travelling())) for k, c in clients.items()}


def _of_one_shape(clients: list[_Client]) -> list[list[_Client]]:
    """Clients that have a next batch, by its shape, in even groups of at most `WIDTH`."""
    shapes: dict[torch.Size, list[_Client]] = {}
    for client in clients:
        if client.batch is not None:
            shapes.setdefault(client.batch.image.shape, []).append(client)
    parts = []
    for same in shapes.values():
        size = -(-len(same) // -(-len(same) // WIDTH))
        parts += [same[i : i + size] for i in range(0, len(same), size)]
    return parts


def _train(
    group: Group, clients: list[_Client], fl: FL, lr: float, measure: bool, clock: Callable
) -> None:
    """Step by step until one of the clients ends, or has a batch of another shape."""
    places = clients + clients[-1:] * (group.G - len(clients))
    for g, client in enumerate(places):
        group.load(g, client.tensors)
    shape = clients[0].batch.image.shape
    while all(c.batch is not None and c.batch.image.shape == shape for c in clients):
        measured = measure and len(clients[0].losses) % fl.affinity_every == 0
        losses, S, seconds = group.step([c.batch for c in places], lr, measured, clock)
        for g, client in enumerate(clients):
            client.losses.append(losses[:, g])
            if measured:
                client.affinities.append(S[g])
                client.affinity_seconds += seconds / len(clients)
            client.samples += len(client.batch)
            client.batch = next(client.batches, None)
    for g, client in enumerate(clients):
        client.tensors = {name: t.clone() for name, t in group.slot[g].items()}


def _state(net: MultiTaskNet, state: State, client: _Client) -> State:
    """A client's weights and statistics; BatchNorm's counters count its steps."""
    own, steps = client.tensors, len(client.losses)
    return {k: own[k] if k in own and state[k].dim() else state[k] + steps
            for k in net.state_dict()}  # fmt: skip


def _result(client: _Client, travelling: State) -> LocalResult:
    return LocalResult(
        step_losses=torch.stack(client.losses),
        samples=client.samples,
        affinity=torch.stack(client.affinities).mean(0) if client.affinities else None,
        measurements=len(client.affinities),
        affinity_seconds=client.affinity_seconds,
        travelling=travelling,
    )


class Group(nn.Module):
    """G networks like `net` as one, with its optimiser. Channels: task, then network, then own.

    All decoders of all networks are one decoder of n G times the groups, up to the last separable
    convolution, whose width is the task's. `slot[g]` has the tensors of network g as views, by
    `net`'s names, and "momentum/" before those of the optimiser.
    """

    def __init__(self, net: MultiTaskNet, G: int, fl: FL, scale: float = 1.0) -> None:
        super().__init__()
        self.tasks, self.table, self.G, self.scale = net.tasks, net.table, G, scale
        n, first = len(net.tasks), net.decoders[net.tasks[0]]
        self.encoder = widen(net.encoder, G)
        self.long, self.branch = widen(first.long, n * G), widen(first.branch, n * G)
        self.last = nn.ModuleDict({a: widen(d.last, G) for a, d in net.decoders.items()})
        self.to(memory_format=torch.channels_last).train()
        self.optimizer = sgd(self.parameters(), 0.0, fl)
        momentum = {p: torch.zeros_like(p) for p in self.parameters()}
        for p, zeros in momentum.items():
            self.optimizer.state[p]["momentum_buffer"] = zeros

        def own(part: nn.Module, name: str, place: int, places: int) -> dict[str, Tensor]:
            tensors = {k: t for k, t in part.state_dict().items() if t.dim()}
            views = {f"{name}.{k}": t.chunk(places)[place] for k, t in tensors.items()}
            return views | {
                f"momentum/{name}.{k}": momentum[p].chunk(places)[place]
                for k, p in part.named_parameters()
            }

        self.slot = [own(self.encoder, "encoder", g, G) for g in range(G)]
        for g, slot in enumerate(self.slot):
            for i, a in enumerate(self.tasks):
                slot |= own(self.long, f"decoders.{a}.long", i * G + g, n * G)
                slot |= own(self.branch, f"decoders.{a}.branch", i * G + g, n * G)
                slot |= own(self.last[a], f"decoders.{a}.last", g, G)

    @torch.no_grad()
    def load(self, g: int, tensors: dict[str, Tensor]) -> None:
        """Put a network in place g; without a momentum it starts anew."""
        slot = self.slot[g]
        torch._foreach_zero_(list(slot.values()))
        known = [k for k in slot if k in tensors]
        torch._foreach_copy_([slot[k] for k in known], [tensors[k] for k in known])

    def step(
        self, batches: list[Batch], lr: float, measured: bool, clock: Callable[[], float]
    ) -> tuple[Tensor, Tensor | None, float]:
        """One step of every network on its batch.

        Returns the losses before it (n, G) and, where measured, affinities (G, n, n) and the
        seconds that they and the encoder's backward pass took.
        """
        n, S, seconds = len(self.tasks), None, 0.0
        for options in self.optimizer.param_groups:
            options["lr"] = lr
        self.optimizer.zero_grad()
        batch = join(batches, self.table)
        z = self.encoder(batch.image)  # (B, G F, h, w)
        handles = torch.cat([z.detach()] * n, 1).requires_grad_()
        losses = group_losses(self.decode(handles), batch, self.G)
        losses.sum().backward()
        at_features = list(handles.grad.chunk(n, 1))
        if measured:
            begin = clock()
            gradients = self.encoder_gradients(z, at_features)
            S = self.lookahead(batch, losses.detach(), gradients, lr)
            seconds = clock() - begin
        else:
            z.backward(gradient_at_features(at_features, self.scale))
        self.optimizer.step()
        return losses.detach(), S, seconds

    def decode(self, features: Tensor) -> dict[str, Tensor]:
        """(B, n G F, h, w) -> letter: (B, G channels, H, W)."""
        n, outputs = len(self.tasks), {}
        short, long = (  # n times (B, H, W, G, c)
            x.permute(0, 2, 3, 1).unflatten(3, (n, self.G, -1)).unbind(3)
            for x in (self.branch(features), self.long(features))
        )
        for i, a in enumerate(self.tasks):
            joined = torch.cat([short[i], long[i]], -1).flatten(3).permute(0, 3, 1, 2)
            outputs[a] = self.last[a](joined)
        return outputs

    def encoder_gradients(self, z: Tensor, at_features: list[Tensor]) -> list[list[Tensor]]:
        """`affinity.encoder_gradients` for every network: per task, a (G ..) tensor a parameter.

        Each network chooses which task it gets by difference: pass j carries, network by
        network, the task with its j-th smallest gradient. The encoder's `.grad` is filled.
        """
        n, parameters = len(at_features), list(self.encoder.parameters())
        own = [g.chunk(self.G, 1) for g in at_features]  # task, network: (B, F, h, w)
        norms = torch.stack([torch.stack([x.contiguous().norm() for x in row]) for row in own])
        order = norms.argsort(dim=0, stable=True).T.tolist()  # network, pass -> task
        passes = []
        for j in range(n - 1):
            chosen = torch.cat([own[order[g][j]][g] for g in range(self.G)], 1)
            passes.append(
                torch.autograd.grad(z, parameters, chosen * self.scale, retain_graph=True)
            )
        z.backward(gradient_at_features(at_features, self.scale))
        rest = [p.grad.clone() for p in parameters]
        for single in passes:
            torch._foreach_sub_(rest, single)
        passes.append(rest)
        return [
            [
                torch.cat([passes[order[g].index(i)][k].chunk(self.G)[g] for g in range(self.G)])
                for k in range(len(parameters))
            ]
            for i in range(n)
        ]

    @torch.no_grad()
    def lookahead(
        self, batch: Batch, losses: Tensor, gradients: list[list[Tensor]], lr: float
    ) -> Tensor:
        """Eq. 3 of every network, (G, n, n), its diagonal NaN; losses (n, G).

        In turn p, decoder j decodes the features of task j + p's step: n - 1 decodings, not n.
        """
        n, stepped = len(losses), []
        names, parameters = zip(*self.encoder.named_parameters())
        S = torch.full((self.G, n, n), torch.nan)
        with frozen_statistics(self):
            for i in range(n):
                weights = torch._foreach_sub(parameters, torch._foreach_mul(gradients[i], lr))
                named = dict(zip(names, weights, strict=True))
                stepped.append(torch.func.functional_call(self.encoder, named, (batch.image,)))
            for turn in range(1, n):
                senders = [(j + turn) % n for j in range(n)]
                features = torch.cat([stepped[i] for i in senders], 1)
                after = group_losses(self.decode(features), batch, self.G)
                change = torch.where(losses > 0, 1 - after / losses, 0.0)
                S[:, senders, range(n)] = change.T
        return S


_groups: WeakKeyDictionary[MultiTaskNet, dict[tuple, Group]] = WeakKeyDictionary()


def widen(module: nn.Module, copies: int) -> nn.Module:
    """`module` for `copies` networks at once: each tensor is theirs, joined along dimension 0."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            part.in_channels *= copies
            part.out_channels *= copies
            part.groups *= copies
            if part.kernel_size == (1, 1):
                # PyTorch loops over the groups of undilated 1x1 convolutions of small batches;
                # dilating one pixel changes nothing but that: half the time.
                part.dilation = (2, 2)
        if isinstance(part, nn.BatchNorm2d):
            part.num_features *= copies
        for name, p in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(_repeat(p.detach(), copies)))
        for name, t in part.named_buffers(recurse=False):
            setattr(part, name, _repeat(t, copies))
        if isinstance(part, nn.Sequential):
            for before, after in zip(list(part), list(part)[1:], strict=False):
                if isinstance(before, nn.BatchNorm2d) and isinstance(after, nn.ReLU):
                    after.inplace = True
    return module


def _repeat(tensor: Tensor, copies: int) -> Tensor:
    return tensor.repeat(copies, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor.clone()


def join(batches: list[Batch], table: TaskTable) -> Batch:
    """The batches of G networks as one: images side by side as channels, classes (B, H, W, G)."""
    targets = {
        a: torch.stack([b.targets[a] for b in batches], 3) if table[a].classes
        else torch.cat([b.targets[a] for b in batches], 1).contiguous()
        for a in batches[0].targets
    }  # fmt: skip
    image = torch.cat([b.image for b in batches], 1)
    mask = torch.cat([b.mask for b in batches], 1).contiguous()
    return Batch(image.contiguous(memory_format=torch.channels_last), mask, targets, table)


def group_losses(outputs: dict[str, Tensor], batch: Batch, G: int) -> Tensor:
    """`tasks.task_losses` of every network: (n, G)."""
    return torch.stack([_losses(a, output, batch, G) for a, output in outputs.items()])


def _losses(a: str, output: Tensor, batch: Batch, G: int) -> Tensor:
    """One task's loss of every network, (G,): the table's own, or several networks at once."""
    loss, target, mask = batch.table[a].loss, batch.targets[a], batch.mask
    B, _, H, W = output.shape
    if loss is cross_entropy:
        logits = output.permute(0, 2, 3, 1).reshape(target.numel(), -1)
        each = F.cross_entropy(logits, target.flatten(), ignore_index=0, reduction="none")
        labelled = (target > 0).view(-1, G).sum(0).clamp(min=1)
        return each.view(-1, G).T.contiguous().sum(1) / labelled
    output = output.contiguous()
    if loss is rotation_l1:
        images = (x.view(B * G, -1, H, W) for x in (output, target, mask))
        return rotation_l1_by_image(*images).view(B, G).T.contiguous().mean(1)
    if loss in (l1, l1_invalid_zero):
        error = (output - target).abs().view(B, G, -1, H, W)
        if loss is l1_invalid_zero:
            error = error * mask[:, :, None]
        return error.transpose(0, 1).flatten(1).mean(1)
    targets = target.unbind(3) if batch.table[a].classes else target.chunk(G, 1)
    own = zip(output.chunk(G, 1), targets, mask.chunk(G, 1), strict=True)
    return torch.stack([loss(*(x.contiguous() for x in one)) for one in own])
