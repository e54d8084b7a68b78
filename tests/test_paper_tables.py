"""The transcribed numbers of the paper: complete, and consistent up to the paper's own slips."""

import csv
from decimal import Decimal
from pathlib import Path

import pytest

from mas_core.split import partitions

PAPER = Path(__file__).parents[1] / "results" / "paper"
COST = ["total", "time_gpu_hours", "energy_kwh", "co2eq_g"]
ALL_IN_ONE = ["One-by-one", "FedAvg", "FedProx", "GradNorm"]
SPLITTING = [f"{method}-{x}" for method in ("TAG", "MAS") for x in (2, 3, 4)]
HOA = ["HOA-2", "HOA-3", "HOA-4"]
METHODS = {
    "sdnkt": {*ALL_IN_ONE, *SPLITTING, *HOA},
    "erckt": {*ALL_IN_ONE, *SPLITTING, *HOA},
    "sdnkterca": {*ALL_IN_ONE, *SPLITTING, "MAS-5"},
}
TABLES = {"sdnkt": 3, "erckt": 4, "sdnkterca": 5}  # number in the supplement
GRAMS_PER_KWH = Decimal("294.21")


def read(name):
    with open(PAPER / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def results(task_set):
    """{(method, metric): (mean, std)} of the supplement's table of a task set."""
    rows = read(f"supplement_table_{TABLES[task_set]}")
    return {(r["method"], r["metric"]): (Decimal(r["mean"]), Decimal(r["std"])) for r in rows}


def decimals(text):
    return len(text.partition(".")[2])


@pytest.mark.parametrize("task_set", TABLES)
def test_supplement_tables_are_complete(task_set):
    rows = read(f"supplement_table_{TABLES[task_set]}")
    assert {r["task_set"] for r in rows} == {task_set}
    cells = [(r["method"], r["metric"]) for r in rows]
    assert len(cells) == len(set(cells))
    assert set(cells) == {(m, c) for m in METHODS[task_set] for c in [*COST, *task_set]}
    for row in rows:
        two = task_set == "sdnkterca"
        places = {"time_gpu_hours": 1, "energy_kwh": 1, "co2eq_g": 0}
        assert decimals(row["mean"]) == places.get(row["metric"], 2 if two else 3)
        assert decimals(row["std"]) == places.get(row["metric"], 3)


def test_losses_sum_to_the_total():
    """Within half a unit of the last place for every task."""
    off = {}
    for task_set in TABLES:
        table = results(task_set)
        half = Decimal("0.005") if task_set == "sdnkterca" else Decimal("0.0005")
        for method in METHODS[task_set]:
            total, tasks = table[method, "total"][0], sum(table[method, t][0] for t in task_set)
            if abs(total - tasks) > len(task_set) * half:
                off[task_set, method] = (total, tasks)
    assert off == {("erckt", "FedAvg"): (Decimal("1.130"), Decimal("1.107"))}


def test_carbon_is_energy_times_a_constant():
    """Within the rounding of both columns: 0.05 kWh and 0.5 g."""
    off = set()
    for task_set in TABLES:
        table = results(task_set)
        for method in METHODS[task_set]:
            energy, carbon = table[method, "energy_kwh"][0], table[method, "co2eq_g"][0]
            slack = GRAMS_PER_KWH * Decimal("0.05") + Decimal("0.5")
            if abs(carbon - GRAMS_PER_KWH * energy) > slack:
                off.add((task_set, method))
    assert off == {("sdnkterca", "MAS-2")}


def test_figure_5_repeats_supplement_table_3():
    rows, table = read("figure_5_table"), results("sdnkt")
    assert {(r["method"], r["metric"]) for r in rows} == {
        (method, metric) for method in METHODS["sdnkt"] for metric in COST[:3]
    }
    assert len(rows) == 13 * 3
    for row in rows:
        printed = (Decimal(row["mean"]), Decimal(row["std"]))
        assert printed == table[row["method"], row["metric"]]


def test_table_1_repeats_the_totals_of_mas():
    rows = read("table_1")
    kinds = [
        "ours",
        *(f"{a}_{b}" for a in ("scratch", "initialised") for b in ("optimal", "worst")),
    ]
    assert [(r["task_set"], r["splits"], r["kind"]) for r in rows] == [
        (task_set, x, kind) for task_set in ("sdnkt", "erckt") for x in "23" for kind in kinds
    ]
    differ = {}
    for row in rows:
        mean, std = Decimal(row["mean"]), Decimal(row["std"])
        if row["kind"] == "ours":
            total, spread = results(row["task_set"])[f"MAS-{row['splits']}", "total"]
            assert mean == total
            if std != spread:
                differ[row["task_set"], row["splits"]] = (std, spread)
        else:
            ours = next(
                r for r in rows if (r["task_set"], r["splits"]) == (row["task_set"], row["splits"])
            )
            assert mean > Decimal(ours["mean"])
    assert differ == {("sdnkt", "3"): (Decimal("0.008"), Decimal("0.015"))}


def test_table_2():
    totals = {(r["method"], r["clients_per_round"]): r["mean"] for r in read("table_2")}
    assert totals == {("All-in-one", "8"): "0.618", ("MAS-2", "8"): "0.512"}
    assert all(r["std"] == "" and r["metric"] == "total" for r in read("table_2"))


def missing(row):
    """The tasks of a row's task set that its groups lack; the groups hold no others."""
    groups = row["groups"].split(",")
    assert len(groups) == int(row["splits"])
    assert all(len(set(group)) == len(group) for group in groups)
    assert set("".join(groups)) <= set(row["task_set"])
    return set(row["task_set"]) - set("".join(groups))


def test_splits_of_tag_and_mas_cover_their_tasks():
    rows = read("supplement_table_1")
    assert [(r["task_set"], r["method"], r["splits"]) for r in rows] == [
        (task_set, method, x)
        for task_set in TABLES
        for method, counts in (("TAG", "234"), ("MAS", "2345"))
        for x in counts
    ]
    lacking = {(r["task_set"], r["method"], r["splits"]): missing(r) for r in rows}
    assert {key: tasks for key, tasks in lacking.items() if tasks} == {
        ("sdnkterca", "TAG", "3"): {"e"}
    }
    for row in rows:
        if row["method"] == "MAS":  # disjoint
            assert len(row["groups"].replace(",", "")) == len(row["task_set"])


def test_optimal_and_worst_splits_cover_their_tasks():
    rows = read("supplement_table_2")
    assert [(r["task_set"], r["splits"], r["kind"], r["run"]) for r in rows] == [
        (task_set, x, kind, run)
        for task_set in ("sdnkt", "erckt")
        for x in "23"
        for kind in ("optimal", "worst")
        for run in "123"
    ]
    lacking = {(r["task_set"], r["splits"], r["kind"], r["run"]): missing(r) for r in rows}
    assert {key: tasks for key, tasks in lacking.items() if tasks} == {
        ("erckt", "3", "worst", "1"): {"t"},
        ("erckt", "3", "worst", "3"): {"t"},
    }
    assert all(len(r["groups"].replace(",", "")) == 5 - len(missing(r)) for r in rows)


def test_claims():
    rows = read("claims")
    assert len({(r["id"], r["task_set"], r["value"], r["relation"]) for r in rows}) == len(rows)
    assert {r["task_set"] for r in rows} == {"", *TABLES}
    assert {r["relation"] for r in rows} == {"=", "~", ">", ">="}
    assert all(r["unit"] and r["statement"] for r in rows)
    assert all(r["source"].split()[0] in ("paper", "supplement") for r in rows)
    value = {(r["id"], r["task_set"]): Decimal(r["value"]) for r in rows}
    per_run = sum(value["gpu_hours_per_run", task_set] for task_set in TABLES)
    assert value["independent_runs", ""] * per_run == value["gpu_hours", ""] == 27765
    for x, name in ((2, "two"), (3, "three")):
        counted = sum(1 for _ in partitions(5, x))
        assert value[f"partitions_into_{name}_splits", ""] == counted
    assert value["total_loss_mas_2_eight_clients", "sdnkt"] == Decimal("0.512")
    erckt = results("erckt")
    slower = erckt["HOA-4", "time_gpu_hours"][0] / erckt["MAS-4", "time_gpu_hours"][0]
    assert slower > value["hoa_time_over_mas", "erckt"]


def test_readme_lists_every_file_with_its_rows_and_columns():
    listed = {}
    for line in (PAPER / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].endswith(".csv`"):
            listed[cells[0].strip("`")] = (int(cells[2]), cells[3].split(", "))
    found = {}
    for path in PAPER.glob("*.csv"):
        rows = read(path.stem)
        found[path.name] = (len(rows), list(rows[0]))
    assert listed == found
