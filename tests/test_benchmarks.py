"""Every benchmark runs at its smallest size and prints finite figures; no test asserts a time."""

import importlib
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import affinity_agreement, gpu, method_cost, rendering, small_step, timing
from benchmarks.__main__ import NAMES
from benchmarks.__main__ import main as run_all
from benchmarks.affinity_cost import random_batch
from benchmarks.splitting import enumerate_partitions
from mas.paper.experiments import ask, figure_5, rivals
from mas_core.config import FL, settings
from mas_core.local import local_update
from mas_core.models import MultiTaskNet
from mas_core.records.store import open_store
from mas_core.split import best_splits


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_gives_finite_figures(name, images):
    module = importlib.import_module(f"benchmarks.{name}")
    rows = [row.to_json() for row in module.measure(True, images)]
    assert rows
    for row in rows:
        assert row["min"] <= row["median"] <= row["max"]
        assert math.isfinite(row["median"]) and row["reference"] in timing.table([row])


def test_all_together_write_one_file_named_after_the_device(tmp_path, capfd):
    assert run_all(["splitting", "--quick", "--results", str(tmp_path)]) == 0
    (path,) = (tmp_path / "benchmarks").glob("*.json")
    record = json.loads(path.read_text())
    assert path.stem == record["slug"] and record["quick"] and record["torch"] == torch.__version__
    assert {"git_revision", "git_dirty", "device"} <= record.keys()
    assert list(record["subjects"]) == ["splitting"]
    assert record["subjects"]["splitting"][0]["median"] > 0
    assert "best_splits, every x, against" in capfd.readouterr().out


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit):
        run_all(["nonsense"])
    assert "unknown benchmark 'nonsense'; allowed: affinity_cost" in capsys.readouterr().err


def test_actions_take_turns_and_the_first_turn_is_not_counted():
    order, clock = [], iter(range(100))
    actions = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = timing.in_turns(actions, 2, clock=lambda: next(clock))
    assert order == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_ratios_are_taken_turn_by_turn():
    seconds = {"ours": [1.0, 2.0, 4.0], "plain": [2.0, 2.0, 2.0]}
    assert timing.compare(seconds, "ours", "plain", "time").values == [0.5, 1.0, 2.0]
    row = timing.compare(seconds, "ours", "plain", "speed", ">= 2").to_json()
    assert (row["median"], row["min"], row["max"], row["values"]) == (1.0, 0.5, 2.0, 3)
    assert row["seconds"] == {"ours": 2.0, "plain": 2.0}
    assert "1        (0.5 to 2)  speed: ours, against plain  [>= 2]" in timing.table([row])


def test_enumeration_and_best_splits_agree(rng):
    S = rng.normal(size=(6, 6))
    scores = enumerate_partitions(S)
    assert [scores[x] for x in range(1, 7)] == pytest.approx([s.score for s in best_splits(S)])


def test_agreement_of_an_affinity_with_itself_is_complete(rng):
    S = rng.normal(size=(3, 5, 5))
    measured = {"exact": S, "first order": 2 * S, "representation": -S}
    *same, opposite, _, _ = affinity_agreement._agreement("sdnkt", measured)
    assert [row.values for row in same] == [pytest.approx([1, 1, 1])] * 3
    assert opposite.values == pytest.approx([-1, -1, -1])


def test_a_method_pays_for_its_rounds_and_for_the_affinities_it_reads():
    results = ask(figure_5, open_store("small", method_cost.RECORDS), partial=True)
    preset = settings("small")

    def rounds(method):
        counted = method_cost.rounds_trained(results[method, "sdnkt", 0], preset)
        assert all(t.parent is None and t.start_round == 0 for t in counted)
        return {(t.tasks, t.fl.method, t.fl.measure_rounds): n for t, n in counted.items()}

    results |= ask(rivals, open_store("small", method_cost.RECORDS), partial=True)
    assert rounds("FAMO") == {("sdnkt", "famo", 0): 100}
    assert rounds("one-by-one") == {(a, "fedavg", 0): 100 for a in "sdnkt"}
    assert rounds("gradnorm") == {("sdnkt", "gradnorm", 0): 100}
    assert rounds("MAS-2") == {
        ("sdnkt", "fedavg", 1): 10, ("sdnkt", "fedavg", 0): 20,
        ("sdn", "fedavg", 0): 70, ("kt", "fedavg", 0): 70,
    }  # fmt: skip


def test_a_plain_step_moves_the_weights_as_the_federated_step_does():
    net, plain = MultiTaskNet("sdnkt", "tiny", 4), small_step.Plain("sdnkt", "tiny", 4)
    plain.load_state_dict(dict(zip(plain.state_dict(), net.state_dict().values(), strict=True)))
    batches = [random_batch("sdnkt", 4, 32)] * 3
    local_update(net, batches, FL(), 0.01)
    small_step.plain_steps(plain.train(), batches, 0.01)
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_gpu_benchmark_runs_its_code_on_a_cpu(capsys):
    assert gpu.main(["--smoke"]) == 0
    out = capsys.readouterr().out
    for variant in ("fp32", "as trained", "compiled"):
        assert f"five tasks, tiny: {variant}, against fp32" in out
    assert "samples/s" in out and "failed" not in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_benchmark_says_so(capsys, tmp_path):
    assert gpu.main(["--results", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().out and not any(tmp_path.iterdir())


def test_the_busy_share_counts_overlaps_once():
    assert gpu.covered([(0, 2), (1, 3), (8, 10)]) == pytest.approx(0.5)
    assert gpu.covered([(0, 10), (2, 3)]) == 1.0


def test_without_history_rendering_has_its_second_reference(images, monkeypatch):
    monkeypatch.setattr(rendering, "_first_version", lambda folder: None)
    references = [row.reference for row in rendering.measure(True, images)]
    assert references == ["writing their PNGs alone"]
