"""Meters on a fake sysfs and a fake NVML."""

import importlib.metadata
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mas.run import meters
from mas.run.meters import Meter
from mas_core.records import cost

ROOT = Path(__file__).parents[1]


@pytest.fixture
def intel():
    return pytest.importorskip("carbontracker.components.cpu.intel")


@pytest.fixture
def nvidia():
    return pytest.importorskip("carbontracker.components.gpu.nvidia")


@pytest.fixture
def quiet(monkeypatch):
    """Only `start` and `stop` read the counters, so that a test knows how often."""
    monkeypatch.setattr(meters, "SAMPLE_SECONDS", 1000.0)


class Rapl:
    """A powercap folder: domain -> (name, counter in uJ, range in uJ)."""

    def __init__(self, root, domains):
        self.root = root
        for domain, (name, energy, wrap) in domains.items():
            (root / domain).mkdir(parents=True)
            (root / domain / "name").write_text(name + "\n")
            (root / domain / "max_energy_range_uj").write_text(f"{wrap}\n")
            self.set(domain, energy)

    def set(self, domain, energy):
        (self.root / domain / "energy_uj").write_text(f"{energy}\n")


@pytest.fixture
def rapl(tmp_path, monkeypatch, intel, quiet):
    monkeypatch.setattr(intel, "RAPL_DIR", str(tmp_path))
    return Rapl(
        tmp_path,
        {
            "intel-rapl:0": ("package-0", 1_000_000, 262_143_000_000),
            "intel-rapl:0:0": ("core", 5, 262_143_000_000),  # a part of the package
            "intel-rapl:0:1": ("dram", 2_000_000, 65_000_000),
            "intel-rapl:1": ("psys", 7, 262_143_000_000),  # the whole machine, package included
        },
    )


class NoRapl:
    def available(self):
        return False


@pytest.fixture
def no_rapl(monkeypatch, intel):
    monkeypatch.setattr(intel, "IntelCPU", lambda **_: NoRapl())


class FakeNvml:
    """Two cards; `energy` in mJ by UUID, None: not supported."""

    class NVMLError(Exception):
        pass

    def __init__(self):
        self.energy = {"GPU-a": 9_000, "GPU-b": 50_000}

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in ("GPU-a", "GPU-b"):
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, card):
        if self.energy is None:
            raise self.NVMLError("Not Supported")
        return self.energy[card]


@pytest.fixture
def nvml(monkeypatch, nvidia, quiet):
    fake = FakeNvml()
    monkeypatch.setattr(nvidia, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="b")
    )
    return fake


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr(cost, "perf_counter", lambda: time.now)
    monkeypatch.setattr(cost, "process_time", lambda: time.now)
    return time


# The meter on RAPL


def test_rapl_counts_packages_and_memory_of_running_intervals_only(rapl, clock):
    meter = Meter("cpu")
    rapl.set("intel-rapl:0", 3_000_000)  # before training: not counted
    with meter:
        rapl.set("intel-rapl:0", 13_000_000)  # 10 J
        rapl.set("intel-rapl:0:0", 9_000_000)
        rapl.set("intel-rapl:1", 90_000_000)
        clock.now += 4.0
    rapl.set("intel-rapl:0", 50_000_000)  # evaluation: not counted
    clock.now += 100.0
    with meter:
        rapl.set("intel-rapl:0:1", 4_500_000)  # 2.5 J
        rapl.set("intel-rapl:0", 50_250_000)  # 0.25 J
        clock.now += 1.0
    assert meter.joules == pytest.approx(12.75, rel=1e-12)  # no overhead factor, no guess
    assert meter.seconds == 5.0
    assert meter.how == "rapl, whole CPU packages"


def test_rapl_wraps_around(rapl):
    meter = Meter("cpu")
    rapl.set("intel-rapl:0:1", 64_000_000)
    with meter:
        rapl.set("intel-rapl:0:1", 2_000_000)  # 1 J to the range of 65 J, 2 J after it
        rapl.set("intel-rapl:0", 2_000_000)
    assert meter.joules == pytest.approx(3.0 + 1.0, rel=1e-12)


def test_long_interval_is_read_often_enough_for_many_wraps(rapl, intel, monkeypatch):
    """Every read finds the counter of range 100 J advanced by 60 J: start against stop alone
    would see less than 100 J."""
    reads, enough = [], threading.Event()

    def advancing(self, path):
        reads.append(path)
        if len(reads) > 2 * 10:
            enough.set()
        return 60_000_000 * reads.count(path) % 100_000_000

    for domain in ("intel-rapl:0", "intel-rapl:0:1"):
        (rapl.root / domain / "max_energy_range_uj").write_text("100000000")
    monkeypatch.setattr(intel.IntelCPU, "_read_energy", advancing)
    monkeypatch.setattr(meters, "SAMPLE_SECONDS", 0.001)
    meter = Meter("cpu")
    with meter:
        assert enough.wait(10)
    assert not meter._watcher.is_alive()
    counted = len(reads) - 2 * 2  # two counters; the reads of Meter() and `with` are baselines
    assert counted >= 16
    assert meter.joules == pytest.approx(60.0 * counted, rel=1e-12)


def test_laps_sum_to_the_whole(rapl, clock):
    meter, laps = Meter("cpu"), []
    for step in (1, 2, 3):
        with meter:
            clock.now += step
            rapl.set("intel-rapl:0", 1_000_000 + step**2 * 1_000_000)
            rapl.set("intel-rapl:0:1", 2_000_000 + step)
        laps.append(meter.lap())
    with meter:
        clock.now += 7.0
    laps.append(meter.lap())
    seconds, joules = zip(*laps, strict=True)
    assert seconds == (1.0, 2.0, 3.0, 7.0)
    assert joules == pytest.approx((1.000001, 3.000001, 5.000001, 0.0), abs=1e-9)
    assert meter.joules == pytest.approx(sum(joules), rel=1e-12)


# Where nothing measures


def test_no_rapl_is_none_and_not_a_guessed_power(monkeypatch, intel, tmp_path):
    monkeypatch.setattr(intel, "RAPL_DIR", str(tmp_path / "absent"))
    meter = Meter("cpu")
    with meter:
        pass
    assert meter.joules is None and meter.lap()[1] is None
    assert meter.seconds > 0
    assert meter.how == "not measured: OSError, this CPU has no RAPL counters"


def test_rapl_without_a_package_is_none(monkeypatch, intel, tmp_path):
    Rapl(tmp_path, {"intel-rapl:0": ("psys", 5, 100)})
    monkeypatch.setattr(intel, "RAPL_DIR", str(tmp_path))
    meter = Meter("cpu")
    assert meter.joules is None
    assert "no CPU package" in meter.how


def test_unreadable_rapl_is_none(rapl, intel, monkeypatch):
    def refuse(self, path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(intel.IntelCPU, "_read_energy", refuse)
    meter = Meter("cpu")
    with meter:
        pass
    assert meter.joules is None
    assert meter.how == "not measured: PermissionError, Permission denied"


def test_a_reader_that_fails_on_the_way_makes_none_and_training_goes_on(rapl):
    meter = Meter("cpu")
    with meter:
        rapl.set("intel-rapl:0", 8_000_000)
        rapl.set("intel-rapl:0:1", 8_000_000)
    assert meter.joules == pytest.approx(13.0) and meter.lap()[1] is not None
    with meter:
        (rapl.root / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.joules is None and meter.lap()[1] is None
    assert meter.how == "not measured: FileNotFoundError, No such file or directory"
    rapl.set("intel-rapl:0", 9_000_000)
    before = meter.seconds
    with meter:
        pass
    assert meter.seconds > before
    assert meter.joules is None  # a part was lost


def test_a_reader_that_fails_in_the_watching_thread_makes_none(rapl, intel, monkeypatch):
    failed = threading.Event()

    def read(self, path):
        if threading.current_thread() is not threading.main_thread():
            failed.set()
            raise RuntimeError("the meter broke")
        return 1

    monkeypatch.setattr(intel.IntelCPU, "_read_energy", read)
    monkeypatch.setattr(meters, "SAMPLE_SECONDS", 0.001)
    with Meter("cpu") as meter:
        assert failed.wait(10)
    assert meter.joules is None
    assert meter.how == "not measured: RuntimeError, the meter broke"


def test_one_counter_that_stands_still_makes_none(rapl):
    meter = Meter("cpu")
    with meter:
        rapl.set("intel-rapl:0", 1_000_000)
    assert meter.joules is None and meter.lap()[1] is None
    assert meter.how == "not measured: a counter did not move"


def test_without_carbontracker(monkeypatch):
    for name in ("carbontracker", "carbontracker.components.cpu", "carbontracker.components.gpu"):
        monkeypatch.setitem(sys.modules, name, None)
    for device in ("cpu", "cuda"):
        meter = Meter(device)
        assert meter.joules is None
        assert "carbontracker" in meter.how


def test_other_devices_do_not_stop_training(no_rapl):
    with Meter("mps") as meter:
        pass
    assert meter.joules is None


# The meter on NVML


def test_nvml_counts_the_one_card_whatever_is_visible(nvml, no_rapl, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # carbontracker would take both cards
    meter = Meter("cuda")
    with meter:
        nvml.energy = {"GPU-a": 20_000, "GPU-b": 53_500}
    nvml.energy = {"GPU-a": 20_000, "GPU-b": 60_000}
    assert meter.joules == pytest.approx(3.5, rel=1e-12)
    assert meter.how == "nvml, whole card (CPU not measured)"


def test_nvml_and_rapl_add(nvml, rapl):
    meter = Meter("cuda")
    with meter:
        nvml.energy = {"GPU-b": 53_500}
        rapl.set("intel-rapl:0", 3_000_000)
        rapl.set("intel-rapl:0:1", 2_000_001)
    assert meter.joules == pytest.approx(5.500001, rel=1e-12)
    assert meter.how == "nvml+rapl, whole card and whole CPU packages"


@pytest.mark.parametrize("uuid, why", [("b", "Not Supported"), ("MIG-slice", "Not Found")])
def test_a_gpu_that_cannot_be_read_is_none_even_where_its_cpu_can(
    nvml, rapl, monkeypatch, uuid, why
):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid)
    )
    nvml.energy = None
    meter = Meter("cuda")
    with meter:
        rapl.set("intel-rapl:0", 3_000_000)
        rapl.set("intel-rapl:0:1", 3_000_000)
    assert meter.joules is None
    assert meter.how == f"not measured: NVMLError, {why}"


def test_a_counter_that_goes_backwards_is_none(nvml, no_rapl):
    meter = Meter("cuda")
    with meter:
        nvml.energy = {"GPU-b": 10}  # the driver was loaded again
    assert meter.joules is None
    assert meter.how == "not measured: OSError, a counter of nvml went backwards"


# The library relied on


def test_carbontracker_is_the_pinned_one_and_has_what_is_used(intel, nvidia):
    assert importlib.metadata.version("carbontracker") == "2.4.7"
    assert intel.RAPL_DIR == "/sys/class/powercap/"
    for name in ("available", "init", "_read_energy"):
        assert callable(getattr(intel.IntelCPU, name))
    for name in vars(FakeNvml):
        if not name.startswith("_"):
            assert callable(getattr(nvidia.pynvml, name)), name


NETWORK = """
import sys
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event.startswith("socket.") else None)
from carbontracker.components.cpu import intel
from mas.run.meters import Meter
from pathlib import Path
intel.RAPL_DIR = sys.argv[1]
meter = Meter("cpu")
with meter:
    Path(sys.argv[1], "intel-rapl:0/energy_uj").write_text("5000000")
    Path(sys.argv[1], "intel-rapl:0:1/energy_uj").write_text("3000000")
Meter("cuda") # finds no GPU, or one
assert abs(meter.joules - 5.0) < 1e-9, meter.how
assert not seen, seen
import socket
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
assert "socket.connect" in seen  # the hook sees what it is to see
"""


def test_nothing_touches_the_network(rapl):
    run = subprocess.run(
        [sys.executable, "-c", NETWORK, str(rapl.root)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


ABSENT = """
import sys
for name in ("carbontracker", "pynvml"):
    sys.modules[name] = None
from mas.run.meters import Meter
with Meter("cpu") as meter:
    pass
assert meter.joules is None and meter.seconds > 0
assert "carbontracker" in meter.how, meter.how
"""


def test_imports_and_runs_without_carbontracker():
    run = subprocess.run(
        [sys.executable, "-c", ABSENT], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
