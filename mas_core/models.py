"""The paper's modified Xception network: a shared encoder and one decoder per task.

One definition serves every size and output stride; `size="full"` and `"half"` at stride 16 have
exactly the released code's parameter counts. `restrict_to` and `merge` move weights unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .config import Model, UserError, outside, stream_seed
from .tasks import TASKS, Batch, TaskTable, sort_tasks, task_losses

State = dict[str, Tensor]  # what travels between server and clients, by name
SMALL = 64  # pixels a side; on a GPU neither bfloat16 nor channels_last pays for such images


@dataclass(frozen=True)
class Size:
    """Channels of a network, from the image to the prediction."""

    stem: tuple[int, int]  # two 3x3 convolutions, the first with stride 2
    blocks: tuple[int, int, int]  # the strided blocks
    residual_blocks: int  # at the last block's channels
    features: int  # what encoder and decoders share
    decoder: tuple[int, int, int, int]
    branch: int  # the decoder's short branch, resized to the output
    kernels: tuple[int, int, int, int, int]  # the decoder's convolutions, the last one included

    def at_width(self, width: float) -> Size:
        """The same with ceil(width x channels) in every layer of the encoder, features included."""

        def part(*channels: int) -> tuple[int, ...]:
            return tuple(math.ceil(width * c) for c in channels)

        return replace(self, stem=part(*self.stem), blocks=part(*self.blocks),
                       features=part(self.features)[0])  # fmt: skip


SIZES = {
    "full": Size((24, 48), (96, 192, 512), 4, 256, (96, 64, 64, 32), 16, (3, 3, 5, 5, 5)),
    "half": Size((24, 48), (64, 128, 360), 4, 256, (96, 64, 64, 32), 16, (3, 3, 5, 5, 5)),
    # For 32 or 64 px on a CPU: 5x5 and wide convolutions at full resolution cost most of a step.
    "small": Size((16, 16), (32, 64, 96), 3, 64, (32, 32, 16, 8), 8, (3, 3, 3, 3, 3)),
    "tiny": Size((8, 16), (16, 32, 48), 1, 32, (16, 16, 8, 8), 8, (3, 3, 3, 3, 3)),
}


class SeparableConv(nn.Sequential):
    """Depthwise k x k then pointwise convolution, without bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, kernel, padding=kernel // 2, groups=inputs, bias=False),
            nn.Conv2d(inputs, outputs, 1, bias=False),
        )


class Block(nn.Module):
    """Two separable convolutions beside a skip; strided: a 2x2 convolution ends the long branch."""

    def __init__(self, inputs: int, outputs: int, stride: int, first_relu: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReLU()] if first_relu else []
        layers += [SeparableConv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [SeparableConv(outputs, outputs), nn.BatchNorm2d(outputs)]
        if stride == 2:
            layers.append(nn.Conv2d(outputs, outputs, 2, stride=2))
        self.long = nn.Sequential(*layers)
        self.skip: nn.Module = nn.Identity()
        if stride == 2 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.long(x) + self.skip(x)


class Encoder(nn.Sequential):
    """Image (B, 3, H, W) -> shared features (B, features, H / stride, W / stride)."""

    def __init__(self, size: Size, output_stride: int) -> None:
        narrow, wide = size.stem
        layers: list[nn.Module] = [
            nn.Conv2d(3, narrow, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            nn.Conv2d(narrow, wide, 3, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
        ]
        channels, stride = wide, 2
        for i, outputs in enumerate(size.blocks):
            step = 2 if stride < output_stride else 1
            layers.append(Block(channels, outputs, step, first_relu=i > 0))
            channels, stride = outputs, stride * step
        layers += [Block(channels, channels, 1, True) for _ in range(size.residual_blocks)]
        layers += [nn.ReLU(), SeparableConv(channels, size.features)]
        layers += [nn.BatchNorm2d(size.features), nn.ReLU()]
        super().__init__(*layers)


class Decoder(nn.Module):
    """Shared features (B, features, h, w) -> one task's prediction (B, outputs, H, W).

    Four convolutions, each followed by a 2x2 deconvolution (only the last log2(stride) of the
    deconvolutions, where the output stride is below 16), joined by a short branch that is resized
    to the output, before a last separable convolution.
    """

    def __init__(self, size: Size, output_stride: int, outputs: int) -> None:
        super().__init__()
        widths = size.decoder
        # The third deconvolution narrows to the last width; the others keep theirs.
        ups = (widths[0], widths[1], widths[3], widths[3])
        layers: list[nn.Module] = []
        channels = size.features
        for i in range(4):
            layers += [SeparableConv(channels, widths[i], size.kernels[i])]
            layers += [nn.BatchNorm2d(widths[i]), nn.ReLU()]
            channels = widths[i]
            if 2 ** (4 - i) <= output_stride:
                layers.append(nn.ConvTranspose2d(channels, ups[i], 2, stride=2))
                layers += [nn.BatchNorm2d(ups[i]), nn.ReLU()]
                channels = ups[i]
        self.long = nn.Sequential(*layers)
        self.branch = nn.Sequential(
            SeparableConv(size.features, size.branch),
            nn.BatchNorm2d(size.branch),
            nn.ReLU(),
            nn.Upsample(scale_factor=output_stride, mode="nearest"),
        )
        self.last = SeparableConv(size.branch + channels, outputs, size.kernels[4])

    def forward(self, features: Tensor) -> Tensor:
        return self.last(torch.cat([self.branch(features), self.long(features)], 1))


class MultiTaskNet(nn.Module):
    """Shared `encoder` and `decoders[letter]`: phi = {theta_s} and {theta_i} (MAS, section 3.3).

    The initial weights of each part come from their own random stream of `seed`, so networks of
    different task sets with one seed start from the same encoder and the same decoders.
    """

    def __init__(
        self,
        tasks: str,
        size: str = "full",
        output_stride: int = 16,
        seed: int = 0,
        table: TaskTable = TASKS,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = Model(size, output_stride, width)
        self.table = table
        self.tasks = sort_tasks(tasks, table)
        widths = SIZES[size].at_width(width)
        self.encoder = _seeded(seed, "encoder", lambda: Encoder(widths, output_stride))
        self.decoders = nn.ModuleDict({
            a: _seeded(seed, a, lambda a=a: Decoder(widths, output_stride, table[a].channels))
            for a in self.tasks
        })  # fmt: skip

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> letter: (B, channels, H, W), in the order of `tasks`."""
        features = self.encoder(image)
        return {a: decoder(features) for a, decoder in self.decoders.items()}

    def restrict_to(self, tasks: str) -> MultiTaskNet:
        """A new network with this encoder and the decoders of `tasks`, weights copied exactly."""
        absent = sorted(set(tasks) - set(self.tasks))
        if absent:
            raise UserError(f"task {absent[0]!r} is not in this network of {self.tasks!r}")
        part = build(tasks, self.config, table=self.table)
        part.load_state_dict(restrict_state(self.state_dict(), part.tasks))
        return part


def build(tasks: str, model: Model, seed: int = 0, table: TaskTable = TASKS) -> MultiTaskNet:
    """The network of `model` for some tasks, with the initial weights of `seed`.

    `model.size` may name a function outside the package, called as (tasks, model, seed, table). Its
    network has `tasks`, `table`, an `encoder` (with one tensor as its output, and weights that are
    trained), `decoders[letter]`, and draws its weights from `seed`.
    """
    if ":" in model.size:
        net = outside(model.size, Callable)(sort_tasks(tasks, table), model, seed, table)
        if not isinstance(net, nn.Module):
            raise UserError(f"{model.size} returned {net!r:.60}, no network")
        return net
    return MultiTaskNet(tasks, model.size, model.output_stride, seed, table, model.width)


def merge(nets: list[MultiTaskNet]) -> MultiTaskNet:
    """One network with the encoder the `nets` share and all their decoders, weights copied exactly.

    Networks built from one seed share their encoder until they are trained; networks whose
    encoders differ cannot be merged exactly, which is an error.
    """
    whole = build("".join(net.tasks for net in nets), nets[0].config, table=nets[0].table)
    first = nets[0].encoder.state_dict()
    for net in nets[1:]:
        same = net.config == whole.config and all(
            torch.equal(tensor, first[name]) for name, tensor in net.encoder.state_dict().items()
        )
        if not same:
            raise UserError(f"the encoders of {nets[0].tasks!r} and {net.tasks!r} differ")
    whole.load_state_dict({k: t for net in nets for k, t in net.state_dict().items()})
    return whole


def restrict_state(state: dict[str, Tensor], tasks: str) -> dict[str, Tensor]:
    """The entries of a state that a network of `tasks` has."""
    keep = ("encoder.", *(f"decoders.{a}." for a in tasks))
    return {name: tensor for name, tensor in state.items() if name.startswith(keep)}


def _seeded(seed: int, part: str, build):
    """Build a module with PyTorch's default initialisation, drawn from the part's own stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "init", part))
        return build()


@dataclass
class TaskPass:
    """One forward pass in which every decoder has its own handle on the shared features."""

    features: Tensor  # (B, features, h, w), still joined to the encoder
    handles: list[Tensor]  # the features, one handle a task, cut off from the encoder
    losses: Tensor  # (n,), joined to decoders and handles

    def backward_decoders(self, weights: Tensor | None = None) -> list[Tensor]:
        """Fill the decoders' gradients; return the gradient of each task's loss at the features.

        With `weights` (n,) the losses are weighted first.
        """
        (self.losses if weights is None else self.losses * weights).sum().backward()
        return [handle.grad for handle in self.handles]


def gradient_at_features(at_features: list[Tensor], scale: float = 1.0) -> Tensor:
    """What the encoder's backward pass starts from: the tasks' gradients, summed and scaled."""
    total = at_features[0]
    for g in at_features[1:]:
        total = total + g
    return total if scale == 1.0 else total * scale


def autocast(image: Tensor) -> torch.autocast:
    """bfloat16 matrix arithmetic on a GPU, float32 where images are too small to gain by it."""
    return torch.autocast("cuda", torch.bfloat16, image.is_cuda and image.shape[-1] > SMALL)


def forward_tasks(net: MultiTaskNet, batch: Batch) -> TaskPass:
    """Run `net` on a batch, its matrix arithmetic by `autocast`; losses are float32."""
    with autocast(batch.image):
        features = net.encoder(batch.image)
        handles = [features.detach().requires_grad_() for _ in net.tasks]
        outputs = {a: net.decoders[a](z) for a, z in zip(net.tasks, handles, strict=True)}
    return TaskPass(features, handles, task_losses(outputs, batch))
