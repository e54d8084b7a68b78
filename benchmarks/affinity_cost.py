"""What measuring affinities adds to a training step: Eq. 3, its first order, the representation.

Every subject is a whole training step that also measures; the reference is a step that does not.
The paper's networks at 256 px on random data, small batches: five tasks full, nine tasks half.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from mas_core.affinity import (
    encoder_gradients,
    first_order_affinity,
    lookahead,
    representation_affinity,
)
from mas_core.models import MultiTaskNet, forward_tasks, gradient_at_features
from mas_core.tasks import NUM_CLASSES, TASKS, Batch

from .timing import Row, compare, in_turns, main

LR = 0.01


def measure(quick: bool, folder: Path) -> list[Row]:
    rows = []
    cases = (("sdnkt", "full", 2, "<= 3.3", "3.8"), ("sdnkterca", "half", 2, "<= 4.4", "5.3"))
    for tasks, size, batch_size, reach, released in cases:
        pixels, repeats = (32, 1) if quick else (256, 3)
        net = MultiTaskNet(tasks, "tiny" if quick else size, 16)
        net = net.to(memory_format=torch.channels_last).train()
        batch = random_batch(tasks, batch_size, pixels)
        optimizer = torch.optim.SGD(net.parameters(), LR, momentum=0.9, fused=True)
        actions = {name: _step(net, batch, optimizer, name) for name in
                   ("plain", "exact", "first order", "representation")}  # fmt: skip
        seconds = in_turns(actions, repeats)
        reaches = {"exact": reach, "first order": "<= 1.9", "representation": "<= 1.1"}
        for name, aim in reaches.items():
            row = compare(seconds, name, "plain", "time", aim)
            what = f"{tasks} {size}: a step with {name} affinities"
            note = f"the released code's look-ahead: {released}" if name == "exact" else ""
            rows.append(Row(what, "a plain training step", "time", row.values, aim,
                            f"{pixels} px, batches of {batch_size}; {note}".rstrip("; "),
                            row.seconds))  # fmt: skip
    return rows


def random_batch(tasks: str, batch_size: int, pixels: int) -> Batch:
    """Noise in the shapes and ranges of decoded images and labels."""
    draw = torch.Generator().manual_seed(0)
    shape = (pixels, pixels)
    targets = {
        a: torch.randint(NUM_CLASSES, (batch_size, *shape), generator=draw)
        if a == "s"
        else torch.randn(batch_size, TASKS[a].channels, *shape, generator=draw)
        for a in tasks
    }
    image = torch.rand(batch_size, 3, *shape, generator=draw)
    mask = (torch.rand(batch_size, 1, *shape, generator=draw) < 0.9).float()
    return Batch(image, mask, targets)


def _step(
    net: MultiTaskNet, batch: Batch, optimizer: torch.optim.Optimizer, kind: str
) -> Callable[[], None]:
    """One training step in the order of `local_update`, with one kind of affinities."""

    def step() -> None:
        optimizer.zero_grad()
        forward = forward_tasks(net, batch)
        at_features, losses = forward.backward_decoders(), forward.losses.detach()
        if kind in ("exact", "first order"):
            gradients = encoder_gradients(net, forward, at_features)
            if kind == "exact":
                lookahead(net, batch, losses, gradients, LR)
            else:
                first_order_affinity(losses, gradients, LR)
        else:
            forward.features.backward(gradient_at_features(at_features, 1.0))
            if kind == "representation":
                representation_affinity(losses, at_features, LR)
        optimizer.step()

    return step


if __name__ == "__main__":
    main(measure)
