"""A training step of the small preset against the same network written plainly, channels_last.

The plain network is nn.Conv2d, nn.BatchNorm2d and nn.ReLU in the same widths, one decoder after the
other, every loss as its definition says (the rotation loss by autograd through all nine shifts),
one backward pass and torch.optim.SGD. It takes over the weights of the project's network, and that
both compute the same losses is checked before anything is timed.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_core.config import settings
from mas_core.local import local_update
from mas_core.models import SIZES, MultiTaskNet
from mas_core.tasks import TASKS, Batch

from .affinity_cost import random_batch
from .timing import Row, compare, in_turns, main


def measure(quick: bool, folder: Path) -> list[Row]:
    preset, steps = settings("smoke" if quick else "small"), 2 if quick else 10
    model, fl = preset.model, preset.fl
    rows = []
    for tasks in ("sdnkt", "d") if quick else ("sdnkt", "sdnkterca", "d"):
        net = MultiTaskNet(tasks, model.size, model.output_stride)
        net = net.to(memory_format=torch.channels_last).train()
        plain = Plain(tasks, model.size, model.output_stride)
        plain.load_state_dict(dict(zip(plain.state_dict(), net.state_dict().values(), strict=True)))
        plain = plain.to(memory_format=torch.channels_last).train()
        batch = random_batch(tasks, fl.batch_size, preset.data.size)
        ours = local_update(net, [batch], fl, fl.lr).step_losses[0]
        torch.testing.assert_close(plain_steps(plain, [batch], fl.lr), ours, rtol=1e-4, atol=1e-5)
        seconds = in_turns(
            {
                "ours": lambda: local_update(net, [batch] * steps, fl, 1e-3),  # noqa: B023
                "plain": lambda: plain_steps(plain, [batch] * steps, 1e-3),  # noqa: B023
            },
            1 if quick else 5,
        )
        row = compare(seconds, "ours", "plain", "speed")
        note = (f"{1000 * row.seconds['ours'] / steps:.1f} ms a step of {fl.batch_size} images, "
                f"{preset.data.size} px")  # fmt: skip
        rows.append(Row(f"{tasks}: a training step", "the network written plainly, channels_last",
                        "speed", row.values, "aim 2" if tasks == "sdnkt" else "", note,
                        row.seconds))  # fmt: skip
    return rows


def separable(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, kernel, padding=kernel // 2, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
    )


def normed(layer: nn.Module, channels: int) -> list[nn.Module]:
    return [layer, nn.BatchNorm2d(channels), nn.ReLU()]


class PlainBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, first: bool) -> None:
        super().__init__()
        layers = [] if first else [nn.ReLU()]
        layers += normed(separable(inputs, outputs, 3), outputs)
        layers += normed(separable(outputs, outputs, 3), outputs)[:2]
        layers += [nn.Conv2d(outputs, outputs, 2, stride=2)] if stride == 2 else []
        self.long, self.skip = nn.Sequential(*layers), nn.Sequential()
        if inputs != outputs or stride == 2:
            skip = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.skip = nn.Sequential(*normed(skip, outputs)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return self.long(x) + self.skip(x)


class PlainDecoder(nn.Module):
    def __init__(self, name: str, stride: int, outputs: int) -> None:
        super().__init__()
        size = SIZES[name]
        inputs, layers, a = size.features, [], size.decoder
        for i, (width, up) in enumerate(zip(a, (a[0], a[1], a[3], a[3]), strict=True)):
            layers += normed(separable(inputs, width, size.kernels[i]), width)
            inputs = width
            if 16 >> i <= stride:
                layers += normed(nn.ConvTranspose2d(width, up, 2, stride=2), up)
                inputs = up
        self.long = nn.Sequential(*layers)
        self.branch = nn.Sequential(
            *normed(separable(size.features, size.branch, 3), size.branch),
            nn.Upsample(scale_factor=stride),
        )
        self.last = separable(inputs + size.branch, outputs, size.kernels[4])

    def forward(self, z: Tensor) -> Tensor:
        return self.last(torch.cat([self.branch(z), self.long(z)], 1))


class Plain(nn.Module):
    def __init__(self, tasks: str, name: str, stride: int) -> None:
        super().__init__()
        size = SIZES[name]
        narrow, inputs = size.stem
        layers = normed(nn.Conv2d(3, narrow, 3, stride=2, padding=1, bias=False), narrow)
        layers += normed(nn.Conv2d(narrow, inputs, 3, padding=1, bias=False), inputs)
        at = 2
        for i, width in enumerate(size.blocks):
            layers.append(PlainBlock(inputs, width, 2 if at < stride else 1, first=i == 0))
            inputs, at = width, min(2 * at, stride)
        layers += [PlainBlock(inputs, inputs, 1, False) for _ in range(size.residual_blocks)]
        layers += [nn.ReLU(), *normed(separable(inputs, size.features, 3), size.features)]
        self.encoder = nn.Sequential(*layers)
        self.decoders = nn.ModuleDict(
            {a: PlainDecoder(name, stride, TASKS[a].channels) for a in tasks}
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        z = self.encoder(image)
        return {a: decoder(z) for a, decoder in self.decoders.items()}


def plain_losses(outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    losses = []
    for a, output in outputs.items():
        target, mask = batch.targets[a], batch.mask
        if a == "s":
            total = F.cross_entropy(output, target, ignore_index=0, reduction="sum")
            losses.append(total / (target > 0).sum().clamp(min=1))
        elif a in "dn":
            losses.append(_nine_shifts(output, target, mask))
        elif a in "erc":
            losses.append(((output - target).abs() * mask).mean())
        else:
            losses.append(F.l1_loss(output, target))
    return torch.stack(losses)


def _nine_shifts(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    height, width = output.shape[-2] - 2, output.shape[-1] - 2
    target, mask = target[..., 1:-1, 1:-1], mask[..., 1:-1, 1:-1]
    errors = [
        ((output[..., y : y + height, x : x + width] - target).abs() * mask).mean(1).sum((1, 2))
        for y in range(3)
        for x in range(3)
    ]
    per_image = torch.stack(errors).min(0).values / mask.sum((1, 2, 3)).clamp(min=1)
    return per_image.mean()


def plain_steps(net: Plain, batches: list[Batch], lr: float) -> Tensor:
    """Train on `batches`; returns the losses of the last, (n,)."""
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    for batch in batches:
        optimizer.zero_grad()
        losses = plain_losses(net(batch.image), batch)
        losses.sum().backward()
        optimizer.step()
    return losses.detach()


if __name__ == "__main__":
    main(measure)
