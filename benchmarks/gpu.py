"""Training on a GPU: samples per second and the share of time the GPU is busy.

    python -m benchmarks.gpu            needs PyTorch with CUDA; no notebook packages
    python -m benchmarks.gpu --smoke    the same code at a tiny size on the CPU, to see that it runs

Each case is trained on one batch that lies on the GPU:

    fp32        eager float32, plain strides, unfused SGD (the reference; no TF32)
    eager       fused SGD; bfloat16 and channels_last where images are large
    compiled    the same with encoder and decoders through torch.compile
    graph       eager, the whole step captured in a CUDA graph and replayed
    as trained  `local_update`: eager for large batches, a graph for small ones
    measuring   the same, affinities (Eq. 3) measured on every fifth batch

Before them, the captured step of the small network on eight images of 32 px: tasks, memory layout,
precision, with and without measuring.

A variant that fails on some version of PyTorch is reported and leaves the others alone.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from mas.run.cuda_graph import (
    Capture,
    CapturedSteps,
    GraphedStep,
    capture_graph,
    run_eagerly,
)
from mas_core import models
from mas_core.config import FL
from mas_core.local import local_update
from mas_core.models import MultiTaskNet
from mas_core.records.training import placed
from mas_core.tasks import Batch, task_losses

from .affinity_cost import random_batch
from .timing import Row, about, in_turns, table, wall

LR = 1e-3
CASES = {  # name: tasks, size, output stride, pixels, batch size, steps timed
    "five tasks, full": ("sdnkt", "full", 16, 256, 64, 10),
    "nine tasks, half": ("sdnkterca", "half", 16, 256, 32, 10),
    "five tasks, small": ("sdnkt", "small", 4, 32, 8, 50),
}
LAYOUTS = {"plain": torch.contiguous_format, "channels_last": torch.channels_last}
SMOKE = {"five tasks, tiny": ("sdnkt", "tiny", 4, 32, 2, 2)}
REFERENCE = "fp32"


def captured_steps(device: torch.device, sets: list[str], steps: int) -> list[dict]:
    """Milliseconds of a captured step of small images, for each layout and precision."""
    capture, rows = (capture_graph if device.type == "cuda" else run_eagerly), []
    kinds = product(sets, LAYOUTS, ("float32", "bfloat16"))
    for tasks, layout, precision in kinds:
        batch = _to(random_batch(tasks, 8, 32), device)
        net = MultiTaskNet(tasks, "small", 4).to(device, memory_format=LAYOUTS[layout]).train()
        with patch.object(models, "SMALL", 32 if precision == "float32" else 0):
            step = GraphedStep(net, batch, FL(), measure=len(tasks) > 1, capture=capture)
        step.begin(LR)
        row = {"tasks": tasks, "layout": layout, "precision": precision}
        names = ("milliseconds", "measuring") if len(tasks) > 1 else ("milliseconds",)
        for measured, name in enumerate(names):
            action = _synchronised(partial(_repeat, step, batch, bool(measured)), steps, device)
            action()
            began = wall()
            action()
            row[name] = round(1000 * (wall() - began) / steps, 3)
        rows.append(row)
        print(*row.values(), flush=True)
    return rows


def measure_case(
    name: str, case: tuple, device: torch.device, repeats: int, without: Iterable[str] = ()
) -> tuple[list, dict]:
    """Rows of speed against fp32, and busy shares and failures by variant."""
    tasks, size, stride, pixels, batch_size, steps = case
    batch = _to(random_batch(tasks, batch_size, pixels), device)
    net = MultiTaskNet(tasks, size, stride).to(device).train()
    makers = {REFERENCE: _fp32, "eager": partial(_steps, run_eagerly), "compiled": _compiled,
              "graph": partial(_steps, capture_graph), "as trained": partial(_as_trained, False),
              "measuring": partial(_as_trained, True)}  # fmt: skip
    makers = {variant: make for variant, make in makers.items() if variant not in without}
    if device.type != "cuda":
        makers.pop("graph", None)
    actions: dict[str, Callable[[], None]] = {}
    about_it: dict[str, dict] = {}
    for variant, make in makers.items():
        try:
            train = make(copy.deepcopy(net), batch)
            train(3)
        except Exception as error:  # whatever a version of PyTorch cannot do
            if variant == REFERENCE:
                raise
            about_it[variant] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        actions[variant] = _synchronised(train, steps, device)
    seconds = in_turns(actions, repeats, wall)
    for variant, action in actions.items():
        about_it[variant] = {
            "samples_per_second": round(steps * batch_size / median(seconds[variant]), 1),
            "busy_share": _busy_share(action, device),
        }
    rows = [
        Row(f"{name}: {variant}", REFERENCE, "speed",
            [b / a for a, b in zip(seconds[variant], seconds[REFERENCE], strict=True)],
            note=_note(about_it[variant]))
        for variant in actions
    ]  # fmt: skip
    return [row.to_json() for row in rows], about_it


def _note(figures: dict) -> str:
    busy = figures["busy_share"]
    told = "not measured" if busy is None else f"{busy:.0%}"
    return f"{figures['samples_per_second']:.0f} samples/s; GPU busy: {told}"


def _fp32(net: MultiTaskNet, batch: Batch) -> Callable[[int], None]:
    optimizer = torch.optim.SGD(net.parameters(), LR, momentum=0.9, weight_decay=1e-4)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            task_losses(net(batch.image), batch).sum().backward()
            optimizer.step()

    return train


def _as_trained(measure: bool, net: MultiTaskNet, batch: Batch) -> Callable[[int], None]:
    net, capture = placed(net, batch.image.device, batch.image.shape[-1]), CapturedSteps()
    return lambda steps: _done(
        local_update(net, [batch] * steps, FL(), LR, measure, capture=capture)
    )


def _steps(capture: Capture, net: MultiTaskNet, batch: Batch) -> Callable[[int], None]:
    net = placed(net, batch.image.device, batch.image.shape[-1])
    step = GraphedStep(net, batch, FL(), capture=capture)
    step.begin(LR)

    return partial(_repeat, step, batch, False)


def _repeat(step: GraphedStep, batch: Batch, measured: bool, steps: int) -> None:
    for _ in range(steps):
        step(batch, measured, wall)


def _compiled(net: MultiTaskNet, batch: Batch) -> Callable[[int], None]:
    # Without a GPU only the tracing is tried: generating C++ takes minutes.
    backend = "inductor" if batch.image.is_cuda else "eager"
    for part in (net.encoder, *net.decoders.values()):
        part.compile(backend=backend)
    return _steps(run_eagerly, net, batch)


def _done(result: object) -> None:
    """Drop what a local update returns: losses stay on the device, as between two rounds."""


def _to(batch: Batch, device: torch.device) -> Batch:
    targets = {a: target.to(device) for a, target in batch.targets.items()}
    return Batch(batch.image.to(device), batch.mask.to(device), targets)


def _synchronised(
    train: Callable[[int], None], steps: int, device: torch.device
) -> Callable[[], None]:
    def action() -> None:
        train(steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return action


def _busy_share(action: Callable[[], None], device: torch.device) -> float | None:
    """Share of the span from the first kernel to the last in which a kernel or copy runs."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        action()
    on_gpu = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return covered(on_gpu) if on_gpu else None


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Share of the span of some intervals that at least one of them covers."""
    ordered = sorted(intervals)
    first, reached, total = ordered[0][0], ordered[0][0], 0.0
    for begin, end in ordered:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total / (reached - first) if reached > first else 1.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Samples per second on a GPU.")
    parser.add_argument("--smoke", action="store_true", help="a tiny size on the CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", nargs="*", default=[], help="variants left out: compiled, ...")
    parser.add_argument("--results", type=Path, default=Path("results"))
    asked = parser.parse_args(arguments)
    if not asked.smoke and not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no GPU here; --smoke runs the same code on the CPU")
        return 2
    device = torch.device("cpu" if asked.smoke else "cuda")
    cases, repeats = (SMOKE, 1) if asked.smoke else (CASES, asked.repeats)
    rows, figures = [], {}
    sets, steps = (["dk"], 1) if asked.smoke else (["d", "sdnkt", "sdnkterca"], 60)
    small = captured_steps(device, sets, steps)
    for name, case in cases.items():
        found, figures[name] = measure_case(name, case, device, repeats, asked.without)
        print(table(found), flush=True)
        for variant, figure in figures[name].items():
            if "failed" in figure:
                print(f"{'failed':30} {name}: {variant}: {figure['failed']}")
        rows += found
    if not asked.smoke:
        told = about("cuda")
        path = asked.results / "benchmarks" / f"{told['slug']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {**told, "gpu": rows, "variants": figures, "small": small}
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
