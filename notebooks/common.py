"""What the notebooks of the paper's figures and tables share: records, the paper's numbers, text.

Losses are test losses of the model with the least validation loss, summed over tasks for a total;
`total_last` is that of the last round's model. Minutes are device minutes of training: GPU time, or
core time on a CPU. `mean ± std` is over seeds (one seed: no spread).
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator
from scipy.stats import t as student

import mas_core as mas
from mas_core import experiments

FAMILIES = ("one-by-one", "all-in-one", "fedprox", "gradnorm", "HOA", "TAG", "MAS", "standalone")
PRINTED_AS = {"One-by-one": "one-by-one", "FedAvg": "all-in-one", "All-in-one": "all-in-one",
              "FedProx": "fedprox", "GradNorm": "gradnorm"}
# Paul Tol's "muted" colours: nine that colour-blind readers tell apart.
TASK_COLOURS = dict(zip(mas.TASKS, ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77",
                                    "#CC6677", "#882255", "#AA4499")))
NOISE = 1.0  # per cent of total loss: a smaller effect of one seed is no evidence
HALO = [withStroke(linewidth=2.5, foreground="white")]
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be judged at this scale"
pd.set_option("display.width", 180, "display.max_columns", 40, "display.max_colwidth", None)


def colour(method):
    """The colour of a method in every figure: that of its family in mas.mplstyle."""
    return next(f"C{i}" for i, name in enumerate(FAMILIES) if method.startswith(name))


def paper(name):
    """A table of results/paper with our names of methods; numbers stay text, as printed."""
    folder = Path(__file__).resolve().parent.parent / "results" / "paper"
    return pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False).replace(
        {"method": PRINTED_AS}
    )


def published(name):
    """A table of results/published: what others measured on Taskonomy."""
    return pd.read_csv(Path(__file__).resolve().parent.parent / "results" / "published" / f"{name}.csv")


def load(experiment, notebook, preset, seeds, results, data=None, train_missing=False, overrides={}):
    """The store, and what is on record of an experiment; prints the command that trains the rest."""
    store = mas.open_store(preset, results)
    found = experiments.ask(experiment, store, seeds, overrides, train_missing, data, partial=True)
    missing = [key for seed in seeds for key in experiment(store, seed, overrides) if key not in found]
    print(f"on record: {len(found)} of {len(found) + len(missing)} results")
    if missing:
        options = f" --seeds {' '.join(map(str, seeds))}" if list(seeds) != [0] else ""
        options += "".join(f" --set {key}={value}" for key, value in overrides.items())
        names = ", ".join(f"{method} ({tasks}, seed {seed})" for method, tasks, seed in missing[:4])
        print(f"missing: {names}{' and more' if len(missing) > 4 else ''}")
        print(f"to train them: mas reproduce {notebook} --preset {preset}{options}")
    return store, found


def check(store, results):
    """Assert that results are complete and comparable; print how they were obtained."""
    records = {}
    for r in [r for value in results for r in (value if isinstance(value, list) else [value])]:
        assert set(r.losses) == set(r.tasks) == set("".join(r.groups))
        assert all(np.isfinite(loss) and loss > 0 for loss in r.losses.values())
        assert r.cost.seconds > 0 and r.cost.samples > 0
        for part in r.parts:
            records[part.trajectory.id] = store.result(part.trajectory)
    complete = [record for record in records.values() if record]
    assert len({(record["data"], record["test_images"]) for record in complete}) <= 1
    devices = sorted({record["device"] for record in complete})
    print(f"{len(records)} trajectories, all on the same test images; trained on: {', '.join(devices)}")
    if len(devices) > 1:
        print("several devices: training times are not comparable")


def tidy(found):
    """One row a result (a list has several): method, task set, seed, groups, losses, cost."""
    fixed = ["method", "task_set", "seed", "groups", "total", "total_last", "minutes", "search_minutes",
             "wh", "wh_estimated", "samples", "mb"]
    rows = [
        {"method": method, "task_set": tasks, "seed": seed, "groups": ",".join(r.groups), **r.losses,
         "total": r.total, "total_last": r.total_last, "minutes": r.cost.seconds / 60,
         "search_minutes": r.search_cost.seconds / 60 if r.search_cost else np.nan,
         "wh": np.nan if r.cost.energy_kwh is None else r.cost.energy_kwh * 1000,
         "wh_estimated": r.cost.energy_kwh_estimated * 1000, "samples": r.cost.samples,
         "mb": (r.cost.bytes_up + r.cost.bytes_down) / 1e6}
        for (method, tasks, seed), value in found.items()
        for r in (value if isinstance(value, list) else [value])
    ]
    text = {name: str for name in ("method", "task_set", "groups")}
    return pd.DataFrame(rows, columns=[*fixed, *mas.TASKS]).astype(text)


def mean_std(values, digits=3):
    """Text: mean ± std over seeds, the mean alone for one seed, a dash for none."""
    values = pd.Series(values, dtype=float).dropna()
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}" if len(values) else "-"


def beside(runs, printed, columns):
    """Ours beside the paper's; columns: title -> (our column, the paper's metric, digits)."""
    methods = list(dict.fromkeys([*printed.method, *runs.method]))
    cells = printed[["method", "metric", "mean", "std"]].values
    theirs = {(m, k): f"{mean} ± {std}" if std else mean for m, k, mean, std in cells}
    table = {}
    for title, (ours, metric, digits) in columns.items():
        table[title, "ours"] = [mean_std(runs.loc[runs.method == m, ours], digits) for m in methods]
        if metric:
            table[title, "paper"] = [theirs.get((m, metric), "-") for m in methods]
    return pd.DataFrame(table, index=pd.Index(methods, name="method"))


def series(runs, method, tasks, column="total"):
    """A column by seed, empty where the method is not on record."""
    return runs[(runs.method == method) & (runs.task_set == tasks)].set_index("seed")[column]


def times_faster(runs, better, worse, tasks, preset, results, overrides={}):
    """Training time of `worse` over that of `better`: timed in one run where that is on record.

    Trajectories on record were trained in different hours of a shared machine, whose speed varies;
    `python -m benchmarks method_cost` times one round of all networks in turns, at preset small.
    """
    ratios = {"one-by-one": 1.0}
    files = sorted(Path(results, "benchmarks").glob("*.json"))
    for row in [r for f in files for r in json.loads(f.read_text())["subjects"].get("method_cost", [])]:
        name, _, method = row["subject"].partition(": ")
        if name == tasks:
            ratios.setdefault(method.partition(" ")[0], row["median"])
    if preset == "small" and not overrides and {better, worse} <= set(ratios):
        factor = pd.Series([ratios[worse] / ratios[better]])
        factor.attrs["note"] = "timed in one run"
        return factor
    return series(runs, worse, tasks, "minutes") / series(runs, better, tasks, "minutes")


def judge(*effects, least=0.0):
    """Verdict and effect of a claim from its effect by seed; it holds above `least`.

    A second effect is the same by another judge (the last round's model), both in per cent of total
    loss. One seed: the distance from `least` must exceed NOISE and what the judges differ by.
    Several seeds: the mean must lie beyond the 95 % bound of Student's t, one-sided.
    """
    note = getattr(effects[0], "attrs", {}).get("note", "one seed: no spread")
    effects = [pd.Series(effect, dtype=float).dropna() for effect in effects]
    if effects[0].empty:
        return "not on record", ""
    away = effects[0] - least
    if len(away) > 1:
        bound = student.ppf(0.95, len(away) - 1) * away.std() / np.sqrt(len(away))
        clear = abs(away.mean()) > bound
        effect = f"{mean_std(effects[0], 2)} ({len(away)} seeds)"
    else:
        moved = [max(NOISE, abs(e.mean() - effects[0].mean())) for e in effects[1:]]
        clear = all(abs(away.mean()) >= m for m in moved)
        effect = f"{mean_std(effects[0], 2)} ({note})"
    return OPEN if not clear else HOLDS if away.mean() >= 0 else FAILS, effect


def judged(rows):
    """Claims as a table; rows: (claim, the paper's number, least effect, effects by seed ...)."""
    table = [(claim, *judge(*effects, least=least), str(printed))
             for claim, printed, least, *effects in rows]
    return pd.DataFrame(table, columns=["claim", "verdict", "measured", "paper"])


def say(table):
    """Print claims by verdict."""
    for verdict, group in table.groupby("verdict", sort=False):
        print(f"{verdict}:")
        for claim, _, measured, printed in group.values:
            print(f"  {claim}: {measured or '-'}; paper {printed}")


def our_points(runs):
    """Mean and standard deviation over seeds of time (minutes) and total loss, by method."""
    group = runs.groupby("method", sort=False)
    mean, std = group[["minutes", "total"]].mean(), group[["minutes", "total"]].std()
    return pd.DataFrame({"time": mean.minutes, "loss": mean.total,
                         "time_std": std.minutes, "loss_std": std.total})


def paper_points(printed):
    """The same of a table of the paper; time in GPU hours."""
    wide = printed.pivot(index="method", columns="metric", values=["mean", "std"]).astype(float)
    return pd.DataFrame({"time": wide["mean"].time_gpu_hours, "loss": wide["mean"].total,
                         "time_std": wide["std"].time_gpu_hours, "loss_std": wide["std"].total})


def draw_points(ax, points, title, xlabel):
    """Loss against time with standard deviations; a line joins the splits of a method."""
    for family in FAMILIES:
        p = points[points.index.str.startswith(family)]
        ax.errorbar(p.time, p.loss, p.loss_std, p.time_std, fmt="o-", lw=1, color=colour(family))
    ax.set(title=title, xlabel=xlabel, ylabel="total test loss", xscale="log")
    ax.margins(0.2)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    bars = points.fillna(0)
    label_points(ax, [(p.time, p.loss, p.Index, colour(p.Index)) for p in points.itertuples()],
                 bars=[(p.time, p.loss, p.time_std, p.loss_std) for p in bars.itertuples()])


def label_points(ax, points, sides=(1, -1, 0), bars=()):
    """Write each point's name beside it, where it hides least; points: (x, y, name, colour).

    bars: (x, y, dx, dy), error bars that names shall not hide either.
    """
    directions = [(dx, dy) for dy in (0, 1, -1) for dx in sides if (dx, dy) != (0, 0)]
    ax.figure.canvas.draw()
    size = ax.figure.dpi / 72
    where = [ax.transData.transform((x, y)) for x, y, *_ in points]
    taken = [(x - 5 * size, x + 5 * size, y - 5 * size, y + 5 * size) for x, y in where]
    for x, y, dx, dy in bars:
        (left, low), (right, high) = ax.transData.transform([(x - dx, y - dy), (x + dx, y + dy)])
        px, py = ax.transData.transform((x, y))
        taken += [(left, right, py - 4 * size, py + 4 * size), (px - 4 * size, px + 4 * size, low, high)]
    frame = ax.get_window_extent().extents[[0, 2, 1, 3]]
    for i, ((x, y, name, c), (px, py)) in enumerate(zip(points, where)):
        w, h, best = 6.2 * size * len(name), 11 * size, None
        for far in (9, 20, 32, 45):
            for dx, dy in directions:
                cx, cy = px + dx * (far * size + w / 2), py + dy * (far * size + h / 3)
                box = (cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2)
                over = sum(max(0, min(box[1], t[1]) - max(box[0], t[0]))
                           * max(0, min(box[3], t[3]) - max(box[2], t[2])) for t in taken)
                out = max(0, frame[0] - box[0], box[1] - frame[1], frame[2] - box[2], box[3] - frame[3])
                gaps = [np.hypot(max(box[0] - x, 0, x - box[1]), max(box[2] - y, 0, y - box[3]))
                        for x, y in where]
                astray = gaps[i] - min(gaps)  # how much nearer another point lies
                worse = over + 50 * out + far * size + 100 * astray
                best = (worse, cx, cy, box) if best is None or worse < best[0] else best
        _, cx, cy, box = best
        taken.append(box)
        ax.annotate(name, (x, y), ((cx - px) / size, (cy - py) / size), textcoords="offset points",
                    ha="center", va="center", color=c, fontsize=9, path_effects=HALO,
                    arrowprops={"arrowstyle": "-", "color": c, "lw": 0.6, "shrinkA": 0, "shrinkB": 4})


def label_ends(ax, ends, apart=0.055):
    """Write names right of curves' ends, at least `apart` of the axes' height from one another.

    ends: (x, y, name, colour), once the axes' limits stand.
    """
    (low, high), place = ax.get_ylim(), -1
    for x, y, name, c in sorted(ends, key=lambda end: end[1]):
        place = max((y - low) / (high - low), place + apart)
        ax.annotate(name, (x, y), (1.03, place), textcoords="axes fraction", va="center", color=c,
                    fontsize=9, arrowprops={"arrowstyle": "-", "color": c, "lw": 0.6})


def save(figure, name, preset, figures):
    """Write figures/<preset>/<name>.png and .pdf, without dates, so that equal figures are equal."""
    folder = Path(figures, preset)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "ModDate": None})
