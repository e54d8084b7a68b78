"""What training costs: seconds, energy, CO2 equivalents, bytes sent, memory.

Energy is read from counters through carbontracker's component classes for NVML and RAPL. Its
tracker is not used: it looks up its location over the network, multiplies totals by a guessed
overhead of the data centre and guesses a power where nothing can be read. Here what nothing
measured is None, never 0 and never a guess; `estimated_kwh` is a separate figure.
"""

from __future__ import annotations

import platform
import re
import resource
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import torch

# The ratio of the paper's own columns (supplement Tables 3 to 5), so that the figures compare. The
# paper calls it the United Kingdom's value; it is what carbontracker took in its releases of the
# time where it found no other: the average of the EU-28 in 2017, 294.2060978.
GRAMS_CO2_PER_KWH = 294.21
JOULES_PER_KWH = 3.6e6
SAMPLE_SECONDS = 1.0  # a RAPL counter wraps after minutes under load: it must be read more often
THREAD_WATTS = 10.0  # guess for one busy core of a data-centre CPU with its share of the rest
GPU_WATTS = 300.0  # guess: the power limit of a Tesla V100, the paper's GPU


class Meter:
    """Seconds and joules of what runs inside `with meter:`; one per training process.

    Counters see whole devices: on a shared card or CPU the joules include what others draw; `how`
    says so. One that fails never raises: `joules` is None from then on, and `how` says why. `how`
    begins with "nvml", "rapl", "nvml+rapl" or "not measured". A run on a GPU is measured only if
    that GPU is; its CPU is added where RAPL can be read.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.seconds = 0.0
        self._lap = (0.0, 0.0)
        self._failure: str | None = None
        self._counters: list[_Counters] = []
        try:
            if self.device.type == "cuda":
                self._counters.append(_nvml_counters(self.device))
            self._counters.append(_rapl_counters())
        except Exception as error:  # whatever a meter raises, training goes on
            if not self._counters:
                self._fail(error)

    @property
    def joules(self) -> float | None:
        """Joules of all intervals, or None where nothing, or not everything, was measured."""
        stuck = self.seconds > 0 and any(counters.joules == 0 for counters in self._counters)
        return None if self._failure or stuck else sum(c.joules for c in self._counters)

    @property
    def how(self) -> str:
        if self.joules is None:
            return f"not measured: {self._failure or 'a counter did not move'}"
        names, scopes = zip(*((c.name, c.scope) for c in self._counters))
        unread = " (CPU not measured)" if names == ("nvml",) else ""
        return f"{'+'.join(names)}, {' and '.join(scopes)}{unread}"

    def lap(self) -> tuple[float, float | None]:
        """Seconds and joules since the last lap."""
        joules, (seconds_before, joules_before) = self.joules, self._lap
        self._lap = (self.seconds, joules or 0.0)
        return self.seconds - seconds_before, None if joules is None else joules - joules_before

    def __enter__(self) -> Meter:
        self._read(count=False)
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._began = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += self._now() - self._began
        self._stopped.set()
        self._watcher.join()
        self._read(count=True)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return device_clock(self.device)

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._read(count=True)

    def _read(self, count: bool) -> None:
        if self._failure:
            return
        try:
            for counters in self._counters:
                counters.advance(count)
        except Exception as error:  # whatever a meter raises, training goes on
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or str(error) or "no message"
        self._failure = f"{type(error).__name__}, {reason}"


class _Counters:
    """Joules from counters that only grow, of `unit` joules a count, and wrap at `ranges`."""

    def __init__(
        self, name: str, scope: str, reads: list[Callable[[], int]], unit: float, ranges: list[int]
    ):
        self.name, self.scope, self.joules = name, scope, 0.0
        self._reads, self._unit, self._ranges = reads, unit, ranges
        self._last = [read() for read in reads]

    def advance(self, count: bool) -> None:
        now = [read() for read in self._reads]
        counts = [after - before + (wrap if after < before else 0)
                  for before, after, wrap in zip(self._last, now, self._ranges)]  # fmt: skip
        if min(counts) < 0:
            raise OSError(f"a counter of {self.name} went backwards")
        self._last = now
        self.joules += count * sum(counts) * self._unit


def _nvml_counters(device: torch.device) -> _Counters:
    """The energy counter of this one card (NVIDIA's Volta generation and later).

    The card is found by its UUID: carbontracker takes indices from CUDA_VISIBLE_DEVICES, and all
    cards where that is empty or holds UUIDs. A slice of a card (MIG) has no meter: it raises.
    """
    from carbontracker.components.gpu.nvidia import pynvml

    pynvml.nvmlInit()
    card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    millijoules = partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, card)
    return _Counters("nvml", "whole card", [millijoules], 1e-3, [0])


def _rapl_counters() -> _Counters:
    """The energy counters of all CPU packages and their memory.

    carbontracker finds and reads them; its `power_usage` sleeps for a second a call and gives 0 W
    when a counter wraps, so the differences are taken here.
    """
    from carbontracker.components.cpu import intel

    cpu = intel.IntelCPU(pids=[], devices_by_pid=False)
    if not cpu.available():
        raise OSError("this CPU has no RAPL counters")
    cpu.init()
    if not cpu._rapl_devices:
        raise OSError("RAPL lists no CPU package")
    folders = [Path(intel.RAPL_DIR, name) for name in cpu._rapl_devices]
    ranges = [int((folder / "max_energy_range_uj").read_text()) for folder in folders]
    microjoules = [partial(cpu._read_energy, str(folder)) for folder in folders]
    return _Counters("rapl", "whole CPU packages", microjoules, 1e-6, ranges)


def device_clock(device: torch.device) -> float:
    """Device seconds: the wall clock for a GPU, this process's core seconds on a CPU.

    The paper counts GPU hours; core seconds are their like, and what else runs on a shared machine
    disturbs them little.
    """
    return process_time() if device.type == "cpu" else perf_counter()


def estimated_kwh(seconds: float, device_name: str) -> tuple[float, str]:
    """A guess of the energy where nothing measured it, in kWh, and what it is from, in words.

    Device seconds (see `device_clock`) times one constant power, whatever the load: 10 W for a
    core of a CPU (named with its threads by `device_name`), 300 W for a GPU.
    """
    if re.search(r", \d+ threads?$", device_name):
        watts, what = THREAD_WATTS, "CPU core"
    else:
        watts, what = GPU_WATTS, "GPU"
    return watts * seconds / JOULES_PER_KWH, f"{watts:g} W, a guess of a data-centre {what}"


def co2_grams(kwh: float | None) -> float | None:
    """Grams of CO2 equivalents, energy x 294.21 g/kWh; None where the energy is not known."""
    return None if kwh is None else kwh * GRAMS_CO2_PER_KWH


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
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        model = None
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

    @property
    def co2_grams(self) -> float | None:
        return co2_grams(self.energy_kwh)

    @property
    def co2_grams_estimated(self) -> float | None:
        return co2_grams(self.energy_kwh_estimated)

    def __add__(self, other: Cost) -> Cost:
        """Sums, in which a None makes a None; the higher peak; each source named once."""
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
        )

    def __radd__(self, zero: int) -> Cost:
        return self if zero == 0 else NotImplemented  # what sum() starts from


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b
