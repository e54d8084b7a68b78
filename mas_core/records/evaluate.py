"""Per-task losses on held-out views, and those of the best constant predictor beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..federated import Clients
from ..models import MultiTaskNet, autocast
from ..tasks import Batch, Task, task_losses


@torch.no_grad()
def evaluate(
    net: MultiTaskNet, batches: Iterable[Batch], measure: Callable = task_losses
) -> dict[str, float]:
    """Mean loss (or `measure`) of every task over `batches`, weighted by their images.

    A loss that is a mean over labelled pixels (cross_entropy) depends on how images are batched.
    BatchNorm uses its running statistics. The losses stay on the device until the last batch.
    """
    net.eval()
    total, images = None, 0
    for batch in batches:
        with autocast(batch.image):
            outputs = net(batch.image)
        losses = measure({a: outputs[a] for a in net.tasks}, batch) * len(batch)
        total = losses if total is None else total + losses
        images += len(batch)
    if total is None:
        raise ValueError("no images to evaluate on")
    return dict(zip(net.tasks, (total / images).tolist(), strict=True))


def constant_losses(
    data: Clients, tasks: str, device: torch.device, batches_per_client: int = 4
) -> dict[str, float]:
    """Test loss of the best constant prediction: what a task's skill 1 - loss / constant refers to.

    The constant is fitted on each client's first training views, 64 of them unless told otherwise
    (`batches_per_client` batches of 16): the median of each channel over valid pixels, which
    is best under L1, or the logarithm of the class frequencies, which is best under cross-entropy.
    """
    sample: dict[str, list[Tensor]] = {a: [] for a in tasks}
    for client in range(len(data.names)):
        for i, batch in enumerate(data.evaluation("train", tasks, 16, device, client)):
            if i == batches_per_client:
                break
            table = batch.table
            for a in tasks:
                sample[a].append(_valid_values(table[a], batch))
    constants = {a: _constant(table[a], torch.cat(values)) for a, values in sample.items()}
    total, images = torch.zeros(len(tasks), device=device), 0
    for batch in data.evaluation("test", tasks, 64, device):
        sides = {a: batch.targets[a].shape[1 if batch.table[a].classes else 2 :] for a in tasks}
        same = {a: c.view(1, -1, *[1] * len(sides[a])) for a, c in constants.items()}
        outputs = {a: same[a].expand(len(batch), -1, *sides[a]) for a in tasks}
        total += task_losses(outputs, batch) * len(batch)
        images += len(batch)
    return dict(zip(tasks, (total / images).tolist(), strict=True))


def _valid_values(task: Task, batch: Batch) -> Tensor:
    """A task's target pixels that count in its loss: (pixels, channels), or (pixels,) classes."""
    target = batch.targets[task.letter]
    if task.classes:
        return target[target > 0]
    pixels = target.movedim(1, -1)
    return pixels[batch.mask[:, 0] > 0] if task.masked else pixels.flatten(0, -2)


def _constant(task: Task, values: Tensor) -> Tensor:
    """The constant prediction, one number a channel."""
    if task.classes:
        return torch.bincount(values, minlength=task.channels).clamp(min=1).float().log()
    return values.median(0).values[: task.channels]
