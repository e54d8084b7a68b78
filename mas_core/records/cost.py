"""What training costs: seconds, energy, CO2 equivalents, bytes sent, memory.

Energy that nothing measured is None, never 0 and never a guess; `estimated_kwh` is a separate
figure.
"""

from __future__ import annotations

import contextlib
import platform
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

import torch

JOULES_PER_KWH = 3.6e6
THREAD_WATTS = 10.0  # guess for one busy core of a data-centre CPU with its share of the rest
GPU_WATTS = 300.0  # guess: the power limit of a Tesla V100, the paper's GPU


class Stopwatch:
    """Device seconds of what runs inside `with`; a meter of energy is a subclass."""

    joules: float | None = None  # of all intervals, None where nothing measured them
    how = "not measured: no meter was handed in"  # how joules were obtained

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.seconds = 0.0
        self._lap = (0.0, 0.0)

    def lap(self) -> tuple[float, float | None]:
        """Seconds and joules since the last lap."""
        joules, (seconds_before, joules_before) = self.joules, self._lap
        self._lap = (self.seconds, joules or 0.0)
        return self.seconds - seconds_before, None if joules is None else joules - joules_before

    def __enter__(self) -> Stopwatch:
        self._began = device_clock(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += device_clock(self.device) - self._began


def device_clock(device: torch.device) -> float:
    """Device seconds: the wall clock for a GPU, this process's core seconds on a CPU.

    A GPU's queue is emptied first, so that an interval holds its own work.
    The paper counts GPU hours; core seconds are their counterpart, and other work on a shared
    machine disturbs them little.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return process_time() if device.type == "cpu" else perf_counter()


def estimated_kwh(seconds: float, device_name: str) -> tuple[float, str]:
    """A guess of the energy where nothing measured it, in kWh, and its basis in words.

    Device seconds (see `device_clock`) times one constant power, whatever the load: 10 W for a
    core of a CPU (named with its threads by `device_name`), 300 W for a GPU.
    """
    core = re.search(r", \d+ threads?$", device_name)
    watts, what = (THREAD_WATTS, "CPU core") if core else (GPU_WATTS, "GPU")
    return watts * seconds / JOULES_PER_KWH, f"{watts:g} W, a guess of a data-centre {what}"


def peak_memory_bytes(device: torch.device | str) -> int:
    """Most bytes held at once so far: by tensors on a GPU, else by this process (resident set)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the CPU's model and PyTorch's threads: "AMD EPYC, 2 threads"."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} GPU"
    model = None
    with contextlib.suppress(OSError):
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    name = model[1].strip() if model else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads != 1 else ''}"


@dataclass(frozen=True)
class Cost:
    """What a trajectory, a share of one, or a whole method costs. Sums with `+` and `sum`."""

    seconds: float  # device seconds of training; validation and test excluded, as in the paper
    energy_kwh: float | None  # measured; None unless every part of it was measured
    energy_kwh_estimated: float | None  # a guess of the same, never mixed with what was measured
    energy_source: str  # how the two energies were obtained
    bytes_down: int  # server to clients
    bytes_up: int  # clients to server
    samples: int  # images trained on, repeats counted
    peak_memory_bytes: int  # of the training processes up to then, not of this alone
    devices: tuple[str, ...] = ()  # names of those that trained; seconds of several do not compare

    def __add__(self, other: Cost) -> Cost:
        """Sums, None where a part is None; the higher peak; each source named once."""
        sources = (*self.energy_source.split(" | "), *other.energy_source.split(" | "))
        return Cost(
            self.seconds + other.seconds,
            _sum(self.energy_kwh, other.energy_kwh),
            _sum(self.energy_kwh_estimated, other.energy_kwh_estimated),
            " | ".join(dict.fromkeys(sources)),
            self.bytes_down + other.bytes_down,
            self.bytes_up + other.bytes_up,
            self.samples + other.samples,
            max(self.peak_memory_bytes, other.peak_memory_bytes),
            tuple(sorted({*self.devices, *other.devices})),
        )

    def __radd__(self, zero: int) -> Cost:
        return self if zero == 0 else NotImplemented  # what sum() starts from


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b
