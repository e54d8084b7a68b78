"""The nine dense vision tasks in one table: letter, Taskonomy domain, decoding, channels, loss.

Another table of tasks can stand in its place (`Data.tasks`): every function here takes one.

Encodings and losses are those of the released code (which takes them from Standley et al., 2020):
`decode` turns what lies on disk into what a network predicts, `loss` compares the two.

Which pixels count is one mask for all tasks, the valid depth: s ignores class 0 instead; d and n
average over valid pixels; e, r and c zero invalid pixels but average over all; k, t, a use all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import UserError

NUM_CLASSES = 18  # segmentation ids 0..17, 0 = unlabelled
MAX_DEPTH = 2**13  # raw depth (1/512 m) at and above this is invalid: sky, windows
DEPTH_DOMAIN = "depth_zbuffer"  # also gives the mask of every task
TASK_SETS = ("sdnkt", "erckt", "sdnkterca")


def cross_entropy(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over labelled pixels; 0 where a batch has none (a mean over nothing would be NaN)."""
    total = F.cross_entropy(output, target, ignore_index=0, reduction="sum")
    return total / (target > 0).sum().clamp(min=1)


def _masked_l1(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """|output - target| over valid pixels, mean per image: (B, C, H, W) -> (B,)."""
    error = ((output - target).abs() * mask).mean(1).sum((1, 2))
    return error / mask.sum((1, 2, 3)).clamp(min=1)


def rotation_l1(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Masked L1, for each image the least over nine shifts of the output by at most one pixel."""
    return rotation_l1_by_image(output, target, mask).mean()


def rotation_l1_by_image(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The same for each image, (B, C, H, W) -> (B,).

    The best shift is found without autograd; then the target is moved under the output, so that
    the backward pass is that of one masked L1. Value and gradient are those of the minimum.
    """
    height, width = output.shape[-2:]
    output = output.contiguous()  # a network's channels_last makes the shifted windows slow
    target, mask = (x[..., 1:-1, 1:-1].contiguous() for x in (target, mask))
    with torch.no_grad():
        valid = mask.sum((1, 2, 3)).clamp(min=1)
        errors = [
            (output[..., y : y + height - 2, x : x + width - 2] - target)
            .abs_().mul_(mask).mean(1).sum((1, 2)) / valid
            for y in range(3)
            for x in range(3)
        ]  # fmt: skip
        best = torch.stack(errors).argmin(0)  # (9, B) -> (B,)
        y, x = best // 3, best % 3
        rows = torch.arange(len(output), device=output.device)

        def shifted(image: Tensor) -> Tensor:  # (B, C, H - 2, W - 2) -> (B, C, H, W)
            windows = F.pad(image, (2, 2, 2, 2)).unfold(2, height, 1).unfold(3, width, 1)
            return windows[rows, :, 2 - y, 2 - x]

        target, mask = shifted(target), shifted(mask)
    return _masked_l1(output, target, mask)


def l1_invalid_zero(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return ((output - target).abs() * mask).mean()


def l1(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return (output - target).abs().mean()


@dataclass(frozen=True)
class Task:
    """One task. Encoded value v on disk, target (v / divisor - mean) / std, channel by channel."""

    letter: str
    name: str
    domain: str  # Taskonomy's folder and file name
    stored: str  # "uint8x3", "uint8" or "uint16": channels and depth of the PNG
    channels: int  # the network's output channels
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    divisor: float = 1.0
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = l1
    flip_signs: tuple[float, ...] | None = None  # signs of the channels under a horizontal flip
    masked: bool = False  # only pixels of valid depth count
    classes: bool = False  # the stored values are class ids, 0 = unlabelled; `channels` classes
    score: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # tested beside the loss

    def decode(self, raw: Tensor) -> Tensor:
        """Encoded (B, H, W[, 3]) -> target (B, C, H, W) float32; of classes (B, H, W) int64."""
        if self.classes:
            return raw.long()
        value = raw.unsqueeze(-1) if raw.dim() == 3 else raw
        # Reshading is a gray image stored as RGB; curvature uses the first two channels of three.
        if value.shape[-1] > self.channels > 1:
            value = value[..., : self.channels]
        value = _float_image(value)
        if value.shape[1] > self.channels:
            value = value.mean(1, keepdim=True)
        mean, std = (value.new_tensor(x).view(-1, 1, 1) for x in (self.mean, self.std))
        return value.div_(self.divisor).sub_(mean).div_(std)


def _float_image(raw: Tensor) -> Tensor:
    """(B, H, W, C) of any type -> (B, C, H, W) float32, contiguous."""
    return raw.permute(0, 3, 1, 2).contiguous().to(torch.float32, copy=True)


class TaskTable(dict[str, Task]):
    """Tasks by letter, in the order that they have everywhere, and what all of them share."""

    def __init__(
        self, *tasks: Task, image: str = "rgb", mask: str | None = DEPTH_DOMAIN
    ) -> None:
        super().__init__({task.letter: task for task in tasks})
        if not all(len(a) == 1 and a.isalnum() for a in self) or len(self) < len(tasks):
            found = ", ".join(repr(task.letter) for task in tasks)
            raise UserError(f"task letters {found}; allowed: one letter or digit each, all unlike")
        self.image = image  # the domain of the input, 8 bits, three channels
        self.mask = mask  # the domain whose values from 2^13 on are invalid; None: all are valid
        stored = {image: "uint8x3"} | ({mask: "uint16"} if mask else {})
        self.stored = stored | {t.domain: t.stored for t in tasks}  # domain -> its encoding
        self.class_maps = {t.domain for t in tasks if t.classes}


TASKS = TaskTable(
    Task("s", "semantic segmentation", "segment_semantic", "uint8", NUM_CLASSES,
         loss=cross_entropy, classes=True),
    Task("d", "depth", DEPTH_DOMAIN, "uint16", 1, (1500.0,), (1000.0,), loss=rotation_l1,
         masked=True),
    Task("n", "surface normals", "normal", "uint8x3", 3, (0.5,), (0.5,), 255.0,
         loss=rotation_l1, flip_signs=(-1.0, 1.0, 1.0), masked=True),
    Task("k", "keypoints", "keypoints2d", "uint16", 1, (50.0,), (100.0,)),
    Task("t", "edge texture", "edge_texture", "uint16", 1, (718.0,), (1070.0,)),
    Task("e", "edge occlusion", "edge_occlusion", "uint16", 1, (56.0248,), (239.1265,),
         loss=l1_invalid_zero, masked=True),
    Task("r", "reshading", "reshading", "uint8x3", 1, (0.4962,), (0.2846,), 255.0,
         loss=l1_invalid_zero, masked=True),
    Task("c", "principal curvature", "principal_curvature", "uint8x3", 2, (0.5175, 0.4987),
         (0.1373, 0.0359), 255.0, loss=l1_invalid_zero, masked=True),
    Task("a", "auto-encoder", "rgb", "uint8x3", 3, divisor=255.0),
)  # fmt: skip

DOMAINS = (TASKS.image, *(t.domain for t in TASKS.values() if t.domain != TASKS.image))


def check_tasks(letters: str, table: TaskTable = TASKS) -> str:
    """`letters` itself when each is a known task and none is repeated; a UserError otherwise."""
    allowed = "".join(table)
    unknown = sorted(set(letters) - set(table))
    if unknown:
        raise UserError(f"unknown task {unknown[0]!r} in {letters!r}; the tasks are {allowed}")
    twice = sorted({letter for letter in letters if letters.count(letter) > 1})
    if twice:
        raise UserError(f"task {twice[0]!r} is repeated in {letters!r}")
    if not letters:
        raise UserError(f"no task given; the tasks are {allowed}")
    return letters


def sort_tasks(letters: str, table: TaskTable = TASKS) -> str:
    """The same tasks in the table's order, so that a set of tasks has one name."""
    check_tasks(letters, table)
    return "".join(letter for letter in table if letter in letters)


def domains_of(letters: str, table: TaskTable = TASKS) -> tuple[str, ...]:
    """The domains that training `letters` reads: image, depth (for the mask), labels."""
    needed = {table.image, table.mask, *(table[letter].domain for letter in letters)}
    order = (table.image, *(t.domain for t in table.values()), table.mask)
    return tuple(domain for domain in dict.fromkeys(order) if domain and domain in needed)


@dataclass
class Batch:
    """A decoded batch on the device: image (B, 3, H, W), mask (B, 1, H, W), targets by letter."""

    image: Tensor
    mask: Tensor
    targets: dict[str, Tensor]
    table: TaskTable = field(default_factory=lambda: TASKS)

    def __len__(self) -> int:
        return len(self.image)


def decode_batch(
    raw: dict[str, Tensor], letters: str, flip: Tensor | None = None, table: TaskTable = TASKS
) -> Batch:
    """Decode encoded arrays on the device that holds them, and flip some of the images.

    raw     domain -> (B, H, W) or (B, H, W, 3), as stored (uint8, uint16)
    flip    (B,) bool: which images to mirror left to right; the x component of normals changes sign
    """
    if flip is not None:  # as encoded, a fifth of the bytes of what is decoded
        raw = {d: torch.where(flip.view(-1, *[1] * (a.dim() - 1)), a.flip(2), a)
               for d, a in raw.items()}  # fmt: skip
    image = _float_image(raw[table.image]).div_(255.0)
    if table.mask is None:
        mask = torch.ones_like(image[:, :1])
    else:  # uint16 has few operators in PyTorch; every 16-bit value is exact in float32.
        mask = (raw[table.mask].float() < MAX_DEPTH).float().unsqueeze(1)
    targets = {letter: table[letter].decode(raw[table[letter].domain]) for letter in letters}
    for letter, target in targets.items():
        if flip is not None and table[letter].flip_signs is not None:
            signs = target.new_tensor(table[letter].flip_signs)
            target *= torch.where(flip[:, None], signs, 1.0)[..., None, None]
    return Batch(image, mask, targets, table)


def task_losses(outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    """Loss of every task on one batch, in the order of `outputs`: (n,) float32, dimensionless."""
    for a, out in outputs.items():  # else two shapes would be broadcast to one, silently
        task, target = batch.table[a], batch.targets[a].shape
        wanted = (len(batch), *out.shape[2:]) if task.classes else out.shape
        if out.shape[:2] != (len(batch), task.channels) or target != wanted:
            raise UserError(f"task {a!r} with {task.channels} channels: outputs {tuple(out.shape)} "
                            f"and labels {tuple(target)} disagree")  # fmt: skip
    losses = [batch.table[a].loss(out.float(), batch.targets[a], batch.mask)
              for a, out in outputs.items()]  # fmt: skip
    return torch.stack(losses)


def task_scores(outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    """`Task.score` of every task on one batch, in the order of `outputs`: (n,), NaN without one."""
    scores = [batch.table[a].score for a in outputs]
    return torch.stack([
        score(out.float(), batch.targets[a], batch.mask) if score else out.new_tensor(torch.nan)
        for score, (a, out) in zip(scores, outputs.items())
    ])  # fmt: skip
