"""Energy of training, read from the counters of GPU and CPU while rounds run.

They are read through carbontracker's component classes for NVML and RAPL. Its tracker is not used:
it looks up its location over the network, multiplies totals by a guessed overhead of the data
centre and guesses a power where nothing can be read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mas_core.records.cost import Stopwatch

SAMPLE_SECONDS = 1.0  # a RAPL counter wraps after minutes under load: it must be read more often


class Meter(Stopwatch):
    """Seconds and joules of what runs inside `with meter:`; one per training process.

    Counters see whole devices: on a shared card or CPU the joules include what others draw; `how`
    says so. A counter that fails never raises: `joules` is None from then on, and `how` says why.
    `how` begins with "nvml", "rapl", "nvml+rapl" or "not measured". A run on a GPU is measured only
    if that GPU is; its CPU is added where RAPL can be read.
    """

    def __init__(self, device: torch.device | str):
        super().__init__(device)
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

    def __enter__(self) -> Meter:
        self._read(count=False)
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._stopped.set()
        self._watcher.join()
        self._read(count=True)

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
