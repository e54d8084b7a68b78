"""The arithmetic of costs: units, estimates, sums; seconds without a meter."""

import platform
from pathlib import Path

import pytest
import torch

from mas.paper.tables import GRAMS_CO2_PER_KWH
from mas_core.federated import state_bytes
from mas_core.records import cost
from mas_core.records.cost import Cost, Stopwatch, device_name, estimated_kwh


def test_a_stopwatch_knows_seconds_alone(monkeypatch):
    seconds = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(cost, "process_time", lambda: next(seconds))
    watch = Stopwatch("cpu")
    with watch:
        pass
    assert watch.lap() == (2.5, None)
    with watch:
        pass
    assert watch.lap() == (1.0, None) and watch.seconds == 3.5
    assert watch.joules is None and watch.how.startswith("not measured")


# Figures


def test_co2_reproduces_the_papers_columns():
    """(kWh, g) of supplement Tables 3 and 4; kWh are rounded to 0.1 there."""
    for kwh, grams in [(8.4, 2465), (31.0, 9125), (13.7, 4016), (38.3, 11265), (17.4, 5114)]:
        assert abs(grams - GRAMS_CO2_PER_KWH * kwh) <= GRAMS_CO2_PER_KWH * 0.05


def test_estimates_say_from_what():
    assert estimated_kwh(3600.0, "AMD EPYC, 2 threads") == (
        pytest.approx(0.010), "10 W, a guess of a data-centre CPU core"
    )
    assert estimated_kwh(36.0, "NVIDIA H200") == (
        pytest.approx(0.003), "300 W, a guess of a data-centre GPU"
    )


def test_the_cpu_is_named_with_its_threads_and_not_by_its_host():
    name = device_name("cpu")
    threads = torch.get_num_threads()
    assert name.endswith(f", {threads} thread" + "s" * (threads != 1))
    assert len(name.split(",")[0]) > 2
    assert platform.node() not in name
    assert estimated_kwh(3.6e6, name)[0] == pytest.approx(10.0)


def test_state_bytes_counts_parameters_and_statistics():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    convolution, norm = (3 * 4 * 9 + 4) * 4, 4 * 4 * 4 + 8  # float32; one int64 batch count
    assert state_bytes(model.state_dict()) == convolution + norm
    assert state_bytes({}) == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with Linux' /proc")
def test_peak_memory_is_in_bytes():
    status = Path("/proc/self/status").read_text()
    kib = int(status.split("VmHWM:")[1].split()[0])
    assert 0.5 < cost.peak_memory_bytes("cpu") / (kib * 1024) < 4  # a wrong unit is 1024 away


def test_costs_add():
    a = Cost(10.0, 1.0, 3.0, "nvml, whole card", 100, 200, 50, 7)
    b = Cost(2.5, 0.5, 1.0, "nvml, whole card", 10, 20, 5, 9)
    unmeasured = Cost(1.0, None, 0.5, "not measured", 1, 2, 3, 4)
    assert a + b == Cost(12.5, 1.5, 4.0, "nvml, whole card", 110, 220, 55, 9)
    total = sum([a, unmeasured, b])
    assert total.energy_kwh is None  # no sum of parts
    assert total.energy_kwh_estimated == 4.5
    assert total.energy_source == "nvml, whole card | not measured"
    assert (total.seconds, total.bytes_down, total.samples) == (13.5, 111, 58)
