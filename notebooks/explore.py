"""What explore_affinities.ipynb draws while its controls move: affinities, a split, its network.

Nothing is trained here. What has no record is told with the command that trains it.
"""

from contextlib import suppress
from dataclasses import replace

import common
import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib.patches import FancyArrowPatch

import mas
from mas import experiments, split
from mas_core.config import MEASURES, UserError

NAMES = dict(zip(("Eq. 3", "first order", "representation", "cosine"), MEASURES))
WINDOWS = ("all before R0", "those that MAS reads", "last 10 before R0")
GROUPS = ("#DDCC77", "#88CCEE", "#CC6677", "#44AA99", "#999933", "#AA4499", "#E6E6E6", "#6699CC",
          "#997700")
LOSS = {"total test loss": 3}  # decimals
NOTE = "The controls need a running kernel: open this notebook in Jupyter and run it."


class Missing(LookupError):
    """Something has no record; the message says what, and the command that trains it."""


def named(groups, letters):
    return ",".join("".join(letters[i] for i in group) for group in groups)


def measured(store, tasks, seed, overrides, kind):
    """The study of one measure and its affinities on record; Missing where there are none."""
    study = experiments.measured_by(store, tasks, seed, overrides, kind)
    with suppress(UserError):
        return study, store.affinities(study.all_in_one())
    changed = "" if kind == MEASURES[0] else (
        f" --set fl.affinity={kind} --set fl.measure_rounds={study.settings.fl.measure_rounds}")
    changed += experiments.set_options(overrides)
    raise Missing(f"no record: affinities by {kind} of {tasks}, seed {seed}; to train them:\n"
                  f"mas run all-in-one --tasks {tasks} --preset {store.preset} --seed {seed}{changed}")


def rounds_read(chosen, window=WINDOWS[1]):
    """The rounds that a window reads, as a slice; `chosen` is `Settings.mas`."""
    R0 = chosen.merge_rounds
    end = min(R0, chosen.affinity_rounds) if window == WINDOWS[1] else R0
    begin = {WINDOWS[0]: 0, WINDOWS[1]: end - 1 if chosen.affinity_at == "last" else 0,
             WINDOWS[2]: max(0, R0 - 10)}[window]
    return slice(begin, end)


def read(record, chosen, window=WINDOWS[1]):
    """Mean affinities (n, n) of the rounds that a window reads, and these rounds in words."""
    rows = rounds_read(chosen, window)
    if not len(record.rounds[rows]):
        raise Missing(f"no record: this measure was taken in rounds {record.rounds[0]} to "
                      f"{record.rounds[-1]} alone; choose another R0 or window")
    values, rounds = np.nan_to_num(record.values[rows].mean(axis=(0, 1))), record.rounds[rows]
    single = len(rounds) == 1
    return values, f"round {rounds[0]}" if single else f"mean of rounds {rounds[0]} to {rounds[-1]}"


def total_loss(store, tasks, seed, overrides, groups, R0):
    """Total test loss of groups continued from the merged weights of round R0; NaN: no record.

    The weights are those of the usual run, whatever the measure: measuring changes none.
    """
    study = experiments.study(store, tasks, seed, overrides | {"mas.merge_rounds": R0})
    found = [store.result(study.from_all_in_one(study.letters(group))) for group in groups]
    return sum(sum(r["test_best"].values()) for r in found) if all(found) else np.nan


def heat_map(ax, S, letters, limit, title, digits=1):
    """Affinities x 1000: row updates, column receives; the diagonal is not measured."""
    n = len(S)
    table = pd.DataFrame((1000 * S).round(digits) + 0.0, list(letters), list(letters))  # no "-0.0"
    sns.heatmap(table, mask=np.eye(n) > 0, cmap="PuOr", vmin=-limit, vmax=limit, cbar=False,
                square=True, annot=True, fmt=f".{digits}f",
                annot_kws={"size": 9 if n < 7 else 6}, ax=ax)
    ax.set_facecolor("0.85")
    ax.grid(False)
    ax.set_title(title, fontsize=11)
    ax.tick_params(length=0, rotation=0)


def network(ax, S, letters, groups, limit, title=""):
    """Tasks as nodes, affinities as arrows: width and colour as in the heat map, groups by colour."""
    n = len(S)
    angle = np.pi / 2 - 2 * np.pi * np.arange(n) / n
    at = np.column_stack([np.cos(angle), np.sin(angle)])
    shade = plt.get_cmap("PuOr")
    for i, j in sorted(np.ndindex(n, n), key=lambda edge: abs(S[edge])):
        if i != j:
            size = min(1.0, 1000 * abs(S[i, j]) / limit)
            ax.add_patch(FancyArrowPatch(
                at[i], at[j], connectionstyle="arc3,rad=0.12", shrinkA=14, shrinkB=14,
                arrowstyle="-|>,head_length=5,head_width=2.5", lw=0.3 + 3.2 * size,
                color=shade(0.5 + 0.5 * np.sign(S[i, j]) * size), zorder=1 + size))
    for group, c in zip(groups, GROUPS):
        for i in group:
            ax.plot(*at[i], "o", ms=22, color=c, mec="0.25", zorder=3)
            ax.annotate(letters[i], at[i], ha="center", va="center", fontsize=12, zorder=4)
    ax.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    ax.set_title(title, fontsize=11)
    ax.set_axis_off()


def scores(ax, table, x):
    """The score of the best split and of the runner-up for every number of groups; x stands out."""
    for row in table.itertuples():
        strong = 1 if row.x == x else 0.35
        for aside, score, name, c in ((-0.19, row.score, row.split, "C6"),
                                      (0.19, row.next, row.runner_up, "0.55")):
            ax.barh(row.x + aside, score, 0.34, color=c, alpha=strong)
            ax.annotate(f" {name}", (max(score, 0), row.x + aside), va="center", fontsize=9,
                        alpha=max(strong, 0.6))
    ax.set(yticks=table.x, ylabel="number of groups x", xlabel="score x 1000",
           xlim=(min(0, table.next.min()), 1.75 * table.score.max()))
    ax.set_title("best split (orange), runner-up (gray)", fontsize=11)
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()


def over_rounds(ax, rounds, read, taken, alone, so_far, kept=6):
    """The split of each round alone (dots) and of all up to it (line); a row a split, `taken` on top.

    read  the rounds that the split was taken from, a slice
    """
    often = pd.Series(so_far * 2 + alone).value_counts().index  # the line counts double
    rows = [taken, *(name for name in often if name != taken)][:kept]
    place = {name: i for i, name in enumerate(rows)}
    ax.axvspan(rounds[read][0] - 0.5, rounds[read][-1] + 0.5, color="0.92", zorder=0)
    ax.scatter(rounds, [place.get(name, len(rows)) for name in alone], s=12, color="C2",
               label="this round alone")
    line = [place.get(name, len(rows)) for name in so_far]
    ax.plot(rounds, line, color="C6", drawstyle="steps-mid", label="all rounds so far")
    ax.xaxis.get_major_locator().set_params(integer=True)
    other = ["any other"] if len(often) > len(rows) else []
    ax.set_yticks(range(len(rows) + len(other)), rows + other)
    ax.set_ylim(len(rows) + len(other) - 0.5, -0.5)


def splits(S, letters):
    """The best split and its runner-up for x = 2 to n - 1: names, and scores x 1000."""
    best, rows = mas.best_splits(S), []
    for x in range(2, len(letters)):
        second = split.runner_up(S, x)
        rows.append({"x": x, "split": named(best[x - 1].groups, letters),
                     "score": 1000 * best[x - 1].score, "runner_up": named(second.groups, letters),
                     "next": 1000 * second.score})
    return pd.DataFrame(rows)


def view(store, overrides, tasks, seed, R0, x, measure, window):
    """A picture of one choice of everything: heat map, network of the groups, splits with scores.

    Returns the figure and a table of the split and the runner-up with their test losses, where
    they are on record. Raises Missing.
    """
    study, record = measured(store, tasks, seed, overrides, NAMES[measure])
    S, rounds = read(record, replace(study.settings.mas, merge_rounds=R0), window)
    letters = study.letters(range(len(S)))
    limit = 1000 * np.percentile(np.abs(S[~np.eye(len(S), dtype=bool)]), 97)
    x = min(x, len(S) - 1)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), width_ratios=(1, 1, 1.1))
    heat_map(axes[0], S, letters, limit, "affinity x 1000")
    axes[0].set(xlabel="receives, j", ylabel="updates, i")
    pair = mas.best_split(S, x), split.runner_up(S, x)
    network(axes[1], S, letters, pair[0].groups, limit, f"{x} groups: {named(pair[0].groups, letters)}")
    scores(axes[2], splits(S, letters), x)
    figure.suptitle(f"{tasks}, seed {seed}, {measure}, {rounds}", x=0.01, ha="left", fontsize=11)
    table = pd.DataFrame([{
        "": name, "groups": named(s.groups, letters), "score x 1000": 1000 * s.score,
        "R0": R0, "total test loss": total_loss(store, tasks, seed, overrides, s.groups, R0)}
        for name, s in zip(("best split", "runner-up"), pair)])
    return figure, table


def controls(store, overrides, tasks, seed, x=2):
    """Show `view` under controls for all that it takes, and return them; without a kernel, NOTE."""
    usual = mas.settings(store.preset, tasks, overrides)

    def draw(**chosen):
        try:
            _, table = view(store, overrides, **chosen)
        except Missing as missing:
            print(missing)
            return
        plt.show()
        common.show(table, LOSS)
        if table.iloc[:, -1].isna().any():
            print(f"-: no record of these groups from round {chosen['R0']}; "
                  "mas reproduce figure_08_merge_rounds trains more of them")

    made = {
        "tasks": widgets.Dropdown(options=list(dict.fromkeys([*mas.TASK_SETS, tasks])), value=tasks),
        "seed": widgets.BoundedIntText(seed, min=0, max=999),
        "R0": widgets.IntSlider(usual.mas.merge_rounds, 1, usual.fl.rounds - 1,
                                continuous_update=False),
        "x": widgets.IntSlider(x, 2, 8, continuous_update=False),
        "measure": widgets.Dropdown(options=list(NAMES)),
        "window": widgets.Dropdown(options=WINDOWS),
    }
    for name, control in made.items():
        control.description = {"window": "rounds read"}.get(name, name)
    box = widgets.VBox([widgets.HBox(list(made.values())[:3]), widgets.HBox(list(made.values())[3:]),
                        widgets.interactive_output(draw, made)])
    display(box._repr_mimebundle_() | {"text/plain": NOTE}, raw=True)
    return made
