"""What the notebooks share: which records they read, how they judge, which times they compare."""

import json
import sys
from math import nan
from pathlib import Path

import pandas as pd
import pytest

from mas.paper import experiments, verdicts

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
import common  # noqa: E402


def test_seeds_are_those_on_record_unless_named(capsys):
    def figure_5(seeds):
        _, found = common.load(experiments.figure_5, "figure_05", "small", seeds, ROOT / "results")
        return sorted({seed for *_, seed in found}), capsys.readouterr().out

    assert figure_5([0, 1])[0] == [0, 1]
    seeds, text = figure_5(None)
    assert seeds[:3] == [0, 1, 2] and f"seeds {', '.join(map(str, seeds))}" in text
    seeds, text = figure_5([0, 99])
    assert seeds == [0] and "mas reproduce figure_05 --preset small --seeds 0 99" in text


def test_nothing_on_record_is_told(tmp_path, capsys):
    (tmp_path / "small").mkdir()
    _, found = common.load(experiments.figure_7, "figure_07", "small", None, tmp_path)
    assert found == {} and capsys.readouterr().out.splitlines() == [
        "on record: 0 of 1 results; seeds 0", "missing: all-in-one (sdnkterca, seed 0)",
        "to train them: mas reproduce figure_07 --preset small",
    ]  # fmt: skip


def test_rows_are_judged_by_the_verdicts():
    better, last = pd.Series([1.5, 2.0, 2.5]), pd.Series([1.0, 2.0, 6.0])
    near = pd.Series([-0.2, 0.1, 0.4])
    table = common.judged([
        ("a loss", "4.0", 0, better, last), ("a close loss", "", 0, near, near),
        ("a share", "", 0, near), ("one seed", "", 0, better[:1], last[:1]),
        ("a finding", 7, verdicts.timed([2.0, 2.1, 1.9], 1.75)), ("none", "", 0, better[:0]),
    ])  # fmt: skip
    table = table.set_index("claim")
    assert table.index.tolist() == [
        "a loss", "a finding", "a close loss", "a share", "one seed", "none",
    ]  # fmt: skip
    assert table.verdict.tolist() == [
        "seems to hold", "seems to hold", "seems equivalent within 1 %", verdicts.OPEN,
        verdicts.ONE_SEED, verdicts.ABSENT,
    ]  # fmt: skip
    numbers = table[["effect", "low", "high", "last round's"]]
    assert numbers.loc["a loss"].tolist() == pytest.approx([2.0, 0.758, 3.242, 3.0], abs=1e-3)
    timed = numbers.loc["a finding", ["effect", "low", "high"]].tolist()
    assert timed == pytest.approx([1.9983, 1.7647, 2.2629], abs=1e-4)
    assert numbers.loc["one seed"].tolist() == pytest.approx([1.5, nan, nan, 1.0], nan_ok=True)
    assert numbers.loc["none"].isna().all()
    assert table.seeds.tolist() == [3, 0, 3, 3, 1, 0]
    assert table.paper.tolist() == ["4.0", "7", "", "", "", ""]


def test_claims_are_printed_by_verdict(capsys):
    rows = [("b", "one seed", "1.00", ""), ("a", "holds", "2.00 [0.73, 3.27]", "2"),
            ("c", "not on record", "", "3")]  # fmt: skip
    common.say(pd.DataFrame(rows, columns=["claim", "verdict", "measured", "paper"]))
    assert capsys.readouterr().out.splitlines() == [
        "holds:", "  a: 2.00 [0.73, 3.27]; paper 2",
        "one seed:", "  b: 1.00; paper ",
        "not on record:", "  c: -; paper 3",
    ]  # fmt: skip


def test_times_of_one_run_come_before_those_of_the_records(tmp_path):
    runs = pd.DataFrame({"method": ["one-by-one", "MAS-2"], "task_set": "dk", "seed": 0,
                         "minutes": [6.0, 2.0]})  # fmt: skip

    def faster(preset="small", overrides=None, worse="one-by-one"):
        given = 1.75, preset, tmp_path, overrides or {}
        return common.times_faster(runs, "MAS-2", worse, "dk", *given)

    assert faster().effect == 3.0 and faster().verdict == verdicts.ONE_SEED  # the records
    timed = [{"subject": f"dk: {m} (d k)", "values": 3, "median": x, "min": x / 1.01,
              "max": x * 1.01}
             for m, x in (("MAS-2", 0.5), ("HOA-2", 4))]  # fmt: skip
    (tmp_path / "benchmarks").mkdir()
    record = tmp_path / "benchmarks" / "machine.json"
    record.write_text(json.dumps({"subjects": {"method_cost": timed}}))
    assert faster().effect == pytest.approx(2.0) and faster().verdict == verdicts.HOLDS
    assert faster(worse="HOA-2").effect == pytest.approx(8.0)
    assert faster(preset="smoke").effect == faster(overrides={"fl.lr": 1}).effect == 3.0
    assert faster(worse="all-in-one").verdict == verdicts.ABSENT


def test_changes_of_the_papers_numbers():
    table = common.with_changes(common.paper("supplement_table_3"), "sdnkt")
    value = table.set_index(["method", "metric"])["mean"].astype(float)
    assert value["MAS-2", "delta_d_percent"] == round(100 * (1 - 0.231 / 0.261), 2)
    each = [value["MAS-2", f"delta_{a}_percent"] for a in "sdnkt"]
    assert value["MAS-2", "delta_m_percent"] == pytest.approx(sum(each) / 5, abs=0.006)
    assert value["MAS-2", "time_ratio"] == round(8.8 / 16.9, 2)
    assert value["one-by-one", "delta_m_percent"] == 0


def test_a_table_is_shown_with_numbers_verdicts_and_what_is_best(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(common, "display", lambda bundle, raw: shown.append(bundle))
    table = pd.DataFrame({"set": ["a", "a", "b"], "loss": [1.2345, 1.2344, None], "n": [1, 2, 3],
                          "verdict": [verdicts.HOLDS, verdicts.OPEN, verdicts.HOLDS]})  # fmt: skip
    common.show(table, {"loss": 3}, best={"loss": "min"}, within=["set"])
    common.show(table, {"loss": 4}, best={"loss": "min"}, within=["set"])
    lines = shown[0]["text/plain"].splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["set", "loss", "n"], ["a", "1.234", "1"], ["a", "1.234", "2"], ["b", "-", "3"],
    ]  # fmt: skip
    html = [bundle["text/html"] for bundle in shown]
    bold = [part.partition("}")[0].count("row") for part in html[1].split("font-weight: bold")]
    assert "1.234</td>" in html[0] and ">-</td>" in html[0] and ">holds</td>" in html[0]
    assert common.VERDICT_TEXT[verdicts.HOLDS] in html[0] and len(bold) == 4  # best, two verdicts
    common.show(table[:0])
    assert capsys.readouterr().out == "nothing on record\n" and len(shown) == 2
