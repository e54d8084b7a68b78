"""Records and results as tables: values by hand, columns as results/README.md lists them."""

import json
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mas
from mas import frames
from mas.paper import experiments
from mas.paper import tables as paper
from mas.run.engine import run
from mas_core.config import FL, Data, Model, UserError
from mas_core.methods import all_in_one, merge_and_split, one_by_one
from mas_core.records import store as store_module
from mas_core.tasks import TASKS

RESULTS = Path(__file__).parents[1] / "results"
MAIN = "sdnkt-s0-2038404922"  # all-in-one of sdnkt, seed 0
KINDS = {"whole": pd.api.types.is_integer_dtype, "real": pd.api.types.is_float_dtype,
         "text": pd.api.types.is_string_dtype, "flag": pd.api.types.is_bool_dtype,
         "list": pd.api.types.is_object_dtype}  # fmt: skip


def listed(section, rows=False):
    """Columns and types that results/README.md gives under a heading, <task> written out or not."""
    text = (RESULTS / "README.md").read_text()
    body = re.search(rf"^### {re.escape(section)}\n(.*?)(?=^##|\Z)", text, re.M | re.S)[1]
    found = {}
    for line in body.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or cells[0] in ("column", "field"):
            continue
        names = [cells[0]]
        while not rows and any("<task>" in name for name in names):
            names = [name.replace("<task>", a, 1) for name in names for a in TASKS]
        found |= dict.fromkeys(names, cells[1])
    return found


def committed(name):
    """All committed files of a name whose tasks are the paper's."""
    return [path for preset in ("small", "medium", "paper")
            for path in (RESULTS / preset).glob(f"*/{name}")]  # fmt: skip


def test_the_schema_lists_every_field_of_config_json():
    kinds = {"data": Data, "model": Model, "fl": FL}
    parts = {f"{name}.{f.name}" for name, kind in kinds.items() for f in fields(kind)}
    own = {"tasks", "seed", "parent", "start_round", "lr_from"}
    assert set(listed("config.json")) == parts | own
    config = json.loads((RESULTS / "small" / MAIN / "config.json").read_text())
    assert set(config) == own | {"data", "model", "fl"}


@pytest.mark.parametrize("name", ["rounds.csv", "affinity.csv"])
def test_the_schema_lists_every_column_of_csv_files(name):
    """Each column is in a row of the schema, and each row is a column of some file."""
    kinds = {"<task>": "[a-z]", "<learner>": "[0-9]+", "<kind>": "[a-z]+"}
    rows = {re.sub("<[a-z]+>", lambda found: kinds[found[0]], row)
            for row in listed(name, rows=True)}  # fmt: skip
    heads = [path.open().readline().strip().split(",") for path in committed(name)]
    assert len(heads) >= 8
    found = {column: {row for row in rows if re.fullmatch(row, column)}
             for head in heads for column in head}  # fmt: skip
    assert all(found.values()), [column for column, row in found.items() if not row]
    of_rules = {"weight_[a-z]", "group_[a-z]", "pi_[0-9]+", "cos_[a-z]_[a-z]"}
    of_rules |= {f"{name}_[a-z]+" for name in ("share", "own", "alpha", "beta")}
    assert set().union(*found.values()) | of_rules == rows | of_rules


def test_the_schema_lists_every_field_of_result_json():
    known = set(listed("result.json"))
    found = [json.loads(path.read_text()) for path in committed("result.json")]
    younger = {"test_best_clients", "test_scores", "devices", "sha256"}
    assert all(known - younger <= set(r) <= known for r in found)


def check_types(table, section):
    for name, kind in listed(section).items():
        assert name not in table or KINDS[kind](table[name]), (name, table[name].dtype)


def test_records_have_the_columns_and_types_of_the_schema():
    table = mas.records("small", RESULTS)
    assert set(table) == set(listed("mas.records")) | set(frames.SETTINGS)
    assert set(frames.SETTINGS) < set(listed("config.json"))
    check_types(table, "mas.records")
    assert len(table) == len(list((RESULTS / "small").glob("*/config.json"))) >= 311
    assert tuple(mas.TASKS) == tuple(frames.LETTERS)
    empty = mas.records("paper", RESULTS)
    assert list(empty) == list(table) and len(empty) == 0
    check_types(empty, "mas.records")


def test_a_row_of_records_by_its_files():
    row = mas.records("small", RESULTS).set_index("id").loc[MAIN]
    store = mas.open_store("small", RESULTS)
    rounds, result = store.rounds(MAIN), store.result(MAIN)
    assert (row.tasks, row.seed, row["fl.measure_rounds"], row.parent) == ("sdnkt", 0, 100, "")
    assert row.complete and row.rounds_done == 100 and row.best_round == result["best_round"]
    assert row.test_best_total == pytest.approx(sum(result["test_best"].values()))
    assert row.test_last_k == result["test_last"]["k"] and np.isnan(row.test_last_e)
    for name in ("samples", "bytes_down", "bytes_up", "seconds", "affinity_seconds"):
        assert row[name] == pytest.approx(rounds[name].sum()), name
    assert np.isnan(row.joules) and row.device == result["device"]


def test_rounds_of_a_record():
    table, raw = mas.rounds(MAIN, RESULTS), pd.read_csv(RESULTS / "small" / MAIN / "rounds.csv")
    assert list(table) == list(raw) and table["round"].tolist() == list(range(100))
    assert table.clients[0] == tuple(map(int, raw.clients[0].split()))
    numbers = raw.columns.drop("clients")
    pd.testing.assert_frame_equal(table[numbers], raw[numbers].astype(table[numbers].dtypes))
    check_types(table, "rounds.csv")


def test_affinities_of_a_record():
    table = mas.affinities(MAIN, RESULTS)
    assert set(table) == set(listed("mas.affinities")) and len(table) == 100 * 4 * 20
    check_types(table, "mas.affinities")
    measured = mas.open_store("small", RESULTS).affinities(MAIN)
    wide = table[table["round"] == 7].pivot_table("affinity", "updates", "receives")
    S = measured.values[7].mean(0)
    assert [wide.loc["d", "k"], wide.loc["k", "d"]] == pytest.approx([S[1, 3], S[3, 1]])
    with pytest.raises(UserError, match="measured no affinities"):
        mas.affinities("a-s0-4ba0439774", RESULTS)


def test_where_records_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(mas.records("small")) >= 311 and len(mas.rounds(MAIN)) == 100  # beside the package
    assert mas.open_store("small").results == RESULTS
    (tmp_path / "results" / "small").mkdir(parents=True)
    assert len(mas.records("small")) == 0  # here
    with pytest.raises(UserError, match=f"no record {MAIN} in any preset of .*results"):
        mas.rounds(MAIN)
    for module in (store_module, frames):
        monkeypatch.setattr(module, "BESIDE", tmp_path / "nothing")
    for read in (mas.records, mas.results):
        with pytest.raises(UserError, match="typo is no folder; name one"):
            read("small", results=tmp_path / "typo")
        with pytest.raises(UserError, match="unknown preset 'smal'; the presets are smoke, small"):
            read("smal", results=tmp_path / "results")
    assert frames.seeds_on_record("small", tmp_path / "typo") == []
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="elsewhere.*results is no folder, nor is .*nothing"):
        mas.records("small")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"), ("config.json", b"[]"), ("config.json", b"\xff"),
        ("result.json", b'{"test_best": 3}'), ("rounds.csv", b"round,samples\n0\n"),
        ("rounds.csv", b"round\nx\n"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_named(tmp_path, name, content):
    folder = tmp_path / "small" / MAIN
    folder.mkdir(parents=True)
    for path in (RESULTS / "small" / MAIN).glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert len(mas.records("small", tmp_path)) == 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{MAIN}.* is damaged .*; restore it, or delete"):
        mas.records("small", tmp_path)


def test_records_are_read_fast_and_without_pytorch():
    code = f"""
import sys, time
import mas
from mas import frames
began = time.process_time()
assert len(mas.records("small", {str(RESULTS)!r})) >= 311
assert mas.rounds({MAIN!r}, {str(RESULTS)!r}) is not None
assert "torch" not in sys.modules
print(time.process_time() - began)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count = len(list((RESULTS / "small").glob("*/config.json")))
    assert float(done.stdout) < 2 * max(1, count / 311)  # about 0.3 s; core seconds


def test_results_have_the_columns_and_types_of_the_schema():
    began = time.process_time()
    table = mas.results("small", [0], RESULTS, [experiments.figure_5, experiments.table_1])
    assert time.process_time() - began < 10
    assert set(table) == set(listed("mas.results"))
    check_types(table, "mas.results")
    assert not table.duplicated(["method", "task_set", "seed", "groups"]).any()
    assert (table.method == "scratch-2").sum() == 30  # fifteen partitions of two task sets
    none = mas.results("small", [], RESULTS)
    assert list(none) == list(table)
    check_types(none, "mas.results")


def test_the_committed_numbers():
    """Means of seeds 0 to 2 on sdnkt, of seed 0 on nine tasks."""
    five = mas.results("small", [0, 1, 2], RESULTS, [experiments.figure_5])
    means = five.groupby("method").delta_m_percent.mean().round(2)
    assert means[["one-by-one", "all-in-one", "MAS-2", "HOA-4"]].tolist() == [0, -1.75, 2.14, 2.43]
    nine = mas.results("small", [0], RESULTS, [experiments.figure_1])
    assert nine.set_index("method").delta_m_percent.round(2)["MAS-2"] == 0.03
    sent = five.groupby("method").bytes_ratio.mean()
    assert sent["MAS-2"] == pytest.approx(0.38, abs=0.005)
    assert sent["HOA-4"] == pytest.approx(3.12, abs=0.005)
    assert five.groupby("method").time_ratio.first()["MAS-2"] == 0.5321


def test_one_name_is_never_two_results():
    """Another experiment trains the same setting by another arithmetic."""
    asked = [experiments.figure_10, experiments.when_to_split]
    table = mas.results("small", [0], RESULTS, asked).set_index(["method", "task_set"])
    assert table.index.is_unique
    one, other = (table.total[name, "sdnkt"] for name in
                  ("all-in-one E=5", "all-in-one E=5 (when_to_split)"))  # fmt: skip
    assert (round(one, 5), round(other, 5)) == (1.51155, 1.53144)


def test_delta_m_by_hand():
    base, losses = {"d": 0.5, "k": 2.0}, {"d": 0.4, "k": 2.1}
    assert paper.task_changes(losses, base) == pytest.approx({"d": 20, "k": -5})
    assert paper.delta_m(losses, base) == pytest.approx(7.5)
    assert paper.delta_m(base, base) == 0
    assert paper.baseline("MAS-2 E=5") == "one-by-one E=5"
    assert paper.baseline("all-in-one K=16") == "one-by-one K=16"
    assert paper.baseline("MAS-2 full m=1") == "one-by-one m=1"
    assert paper.baseline("MAS-2 alpha=0.1") == "one-by-one alpha=0.1"
    assert paper.baseline("all-in-one wide clients only") == "one-by-one wide clients only"
    assert paper.baseline("MAS-2 E=5 (a)") == "one-by-one E=5 (a)"
    assert paper.baseline("MAS-2 R0=30") == paper.baseline("TAG-2") == "one-by-one"


def test_effects_by_seed():
    table = pd.DataFrame({"method": ["A", "A", "B", "B"], "task_set": "dk", "seed": [0, 1, 1, 2],
                          "total": [2.0, 4.0, 3.0, 1.0]})  # fmt: skip
    assert paper.saved(table, "A", "B", "dk").to_dict() == {1: 25.0}
    assert paper.by_seed(table, "B", "dk").to_dict() == {1: 3.0, 2: 1.0}
    assert paper.by_seed(table, "C", "dk").empty and paper.saved(table, "A", "B", "sdnkt").empty


def test_times_of_one_run(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    timed = [{"subject": "dk: MAS-2 (d k)", "values": 3, "median": 0.5, "min": 0.4, "max": 0.7}]
    record = {"subjects": {"method_cost": timed}}
    (tmp_path / "benchmarks" / "machine.json").write_text(json.dumps(record))
    (tmp_path / "benchmarks" / "gpu.json").write_text('{"gpu": []}')  # by benchmarks.gpu
    assert paper.time_ratios(tmp_path) == {
        ("dk", "MAS-2"): [0.4, 0.5, 0.7], ("dk", "one-by-one"): [1, 1, 1],
    }  # fmt: skip
    assert paper.time_ratios(tmp_path / "none") == {}


def test_losses_of_a_method_by_client(settings, folder, store):
    study = mas.Study("dk", settings, 0, store)
    recipes = {"MAS-2": merge_and_split(study, 2), "all-in-one": all_in_one(study),
               "one-by-one": one_by_one(study)}  # fmt: skip
    found = run(recipes, store, folder)
    for name, result in found.items():
        losses = paper.client_losses(store, result)
        assert list(losses) == ["d", "k"] and len(losses) == settings.data.buildings
        finals = [p.trajectory for p in result.parts if p.end == 4]
        for a in "dk":
            (t,) = [t for t in finals if a in t.tasks and t.tasks in result.groups]
            assert losses[a].tolist() == store.result(t)["test_best_clients"][a], name
    alone = found["one-by-one"].parts[0].trajectory
    result = store.result(alone)
    del result["test_best_clients"]
    store.write_result(alone, result)
    assert paper.client_losses(store, found["one-by-one"]) is None
