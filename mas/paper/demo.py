"""`mas demo`: the whole method at the smoke preset, printed and drawn."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from mas_core.config import settings
from mas_core.methods import all_in_one, merge_and_split, one_by_one
from mas_core.records.store import open_store
from mas_core.records.study import MethodResult, Study
from mas_core.tasks import TASKS

from ..run.workers import Compute, train_recipes


def demo(results: Path, data: Path | None, compute: Compute) -> None:
    """One-by-one, all-in-one and MAS-2 on sdnkt; prints a table, writes RESULTS/smoke/demo.png."""
    study = Study("sdnkt", settings("smoke", "sdnkt"), 0, open_store("smoke", results))
    recipes = {
        "one-by-one": one_by_one(study),
        "all-in-one": all_in_one(study),
        "MAS-2": merge_and_split(study, 2),
    }
    found = train_recipes(recipes, study.store, study.settings, data, compute)
    constant = study.store.result(study.all_in_one())["test_constant"]
    print(method_table(found.values(), constant))
    groups, mas = " and ".join(found["MAS-2"].groups), study.settings.mas
    print(
        f"\nMAS split {study.tasks} into {groups} by the affinities of the first "
        f"{mas.affinity_rounds} rounds, and continued both from round {mas.merge_rounds}.\n"
        f"Smoke numbers prove the machinery, not the paper: procedural rooms, 32 px, "
        f"{study.rounds} rounds. For the paper's comparison: mas reproduce --preset small"
    )
    path = study.store.root / "demo.png"
    try:
        draw(found, constant, path)
        print(f"Picture: {path}")
    except ModuleNotFoundError as error:  # the core alone is installed
        print(f"No picture: {error}")


def method_table(results: Iterable[MethodResult], constant: dict[str, float] | None = None) -> str:
    """Test losses and cost of methods as text.

    Losses are those of the model with the least validation loss, dimensionless. With `constant`,
    the best constant predictor's losses, each task's skill 1 - loss / constant follows its loss.
    """
    rows = []
    for r in results:
        losses = {a: f"{x:.3f}" for a, x in r.losses.items()}
        if constant:
            losses = {a: f"{x:.3f} ({1 - x / constant[a]:+.2f})" for a, x in r.losses.items()}
        rows.append(
            {"method": r.method, "total loss": f"{r.total:.3f}"}
            | losses
            | {"training s": f"{r.cost.seconds:.0f}", "images": str(r.cost.samples),
               "groups": " ".join(r.groups)}
        )  # fmt: skip
    if constant:
        rows.append({"method": "constant", "total loss": f"{sum(constant.values()):.3f}"}
                    | {a: f"{x:.3f}" for a, x in constant.items()})  # fmt: skip
    note = "test loss a task" + (
        ", skill against the best constant in brackets" if constant else ""
    )
    return pd.DataFrame(rows).fillna("").to_string(index=False) + f"\n({note})"


def draw(results: dict[str, MethodResult], constant: dict[str, float], path: Path) -> None:
    """Skill of every task under every method, and total loss against training time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, (name, r) in enumerate(results.items()):
        skill = [1 - r.losses[a] / constant[a] for a in r.tasks]
        at = [j + 0.27 * (i - 1) for j in range(len(skill))]
        left.bar(at, skill, 0.25, label=name, color=f"C{i}")
        right.scatter(r.cost.seconds, r.total, color=f"C{i}", s=60)
        right.annotate(name, (r.cost.seconds, r.total), (0, 8), ha="center",
                       textcoords="offset points")  # fmt: skip
    names = [TASKS[a].name.replace(" ", "\n") for a in r.tasks]
    left.set_xticks(range(len(r.tasks)), names, fontsize=8)
    left.axhline(0, color="0.4", linewidth=0.8)
    left.set_ylabel("skill: 1 - loss / constant's loss")
    left.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    right.set_xlabel("training time (s, this machine)")
    right.set_ylabel("total test loss")
    right.margins(x=0.4, y=0.2)
    figure.suptitle("mas demo: smoke preset, procedural rooms", fontsize=10)
    figure.savefig(path, dpi=150)
