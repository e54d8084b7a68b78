"""What the notebooks of the paper's figures and tables share: records, the paper's numbers, text.

Losses are test losses of the model with the least validation loss, summed over tasks for a total;
`total_last` is that of the last round's model. Minutes are device minutes of training: GPU time, or
core time on a CPU. `mean ± std` is over seeds (one seed: no spread).
"""

import re
import zlib
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
from IPython.display import Image, display
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator
from pandas.io.formats.style import Styler
from scipy import stats
from scipy.optimize import isotonic_regression

import mas
from mas import experiments, verdicts
from mas.frames import seeds_on_record
from mas.paper import tables

FAMILIES = ("one-by-one", "all-in-one", "fedprox", "gradnorm", "HOA", "TAG", "MAS", "standalone")
PRINTED_AS = {"One-by-one": "one-by-one", "FedAvg": "all-in-one", "All-in-one": "all-in-one",
              "FedProx": "fedprox", "GradNorm": "gradnorm"}
SHOWN_AS = {"fedprox": "FedProx", "gradnorm": "GradNorm"}  # the others are shown by their own names
# Paul Tol's "muted" colours: nine that colour-blind readers tell apart.
TASK_COLOURS = dict(zip(mas.TASKS, ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77",
                                    "#CC6677", "#882255", "#AA4499")))
HALO = [withStroke(linewidth=2.5, foreground="white")]
VERDICT_TEXT = dict(zip(verdicts.VERDICTS,
                        ("#117733", "#CC3311", "#0077BB", "#66AA55", "#DD8866", "#66AADD", "#444444",
                         "#888888", "#AAAAAA")))
pd.set_option("display.width", 180, "display.max_columns", 40, "display.max_colwidth", None)


def colour(method):
    """The colour of a method in every figure: of its family in mas.mplstyle; wine for today's rivals."""
    return next((f"C{i}" for i, name in enumerate(FAMILIES) if method.startswith(name)), "#882255")


def ordered(methods):
    """Methods from MAS to one-by-one, a family's in their order."""
    methods = sorted(set(methods))
    return [m for family in reversed(FAMILIES) for m in methods if m.startswith(family)]


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
    """The store, and what is on record of an experiment; prints the command that trains the rest.

    seeds None: every seed of which anything is on record, or 0.
    """
    store = mas.open_store(preset, results)
    asked = seeds if seeds is not None else seeds_on_record(preset, results) or [0]
    found = experiments.ask(experiment, store, asked, overrides, train_missing, data, partial=True)
    if seeds is None:
        asked = sorted({seed for *_, seed in found}) or [0]
    missing = [key for seed in asked for key in experiment(store, seed, overrides) if key not in found]
    which = f"; seeds {', '.join(map(str, asked))}" if seeds is None else ""
    print(f"on record: {len(found)} of {len(found) + len(missing)} results{which}")
    if missing:
        names = ", ".join(f"{method} ({tasks}, seed {seed})" for method, tasks, seed in missing[:4])
        print(f"missing: {names}{' and more' if len(missing) > 4 else ''}")
        print(f"to train them: {experiments.reproduce_command(notebook, preset, asked, overrides)}")
    return store, found


RESTARTED = "one-by-one restarted"


def with_control(store, found, overrides={}):
    """`found`, and one-by-one that restarts its schedule when MAS does, where that is on record.

    MAS has a second learning-rate schedule after the split, its rivals have not: this one has.
    """
    sets = dict.fromkeys(tasks for _, tasks, _ in found)
    more = experiments.ask(lambda *given: experiments.controls(*given, task_sets=sets), store,
                           sorted({seed for *_, seed in found}), overrides, partial=True)
    return found | {key: result for key, result in more.items() if key[0] == RESTARTED}


def nearer_found(experiment, preset, seeds, results, data=None, train_missing=False, overrides={}):
    """The store of medium, and what it holds of an experiment whose notebook shows small; else nothing.

    A client takes five times as many steps a round there, near the paper's.
    """
    store = mas.open_store("medium", results)
    asked = seeds_on_record("medium", results) if seeds is None else seeds
    return store, experiments.ask(experiment, store, asked if preset == "small" else [], overrides, partial=True)


def nearer(experiment, tasks, preset, *given):
    """`nearer_found` of a task set, with its control, as `tidy`; or an empty table."""
    store, found = nearer_found(experiment, preset, *given)
    found = {key: result for key, result in found.items() if key[1] == tasks}
    return tidy(with_control(store, found, *given[4:])) if found else pd.DataFrame()


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
        print("several devices: times and energies are of the commonest alone")


def tidy(found):
    """`mas.results` of what is found, a row a result, with costs in units that suit small runs.

    Where several devices trained them, times and energies are those of the commonest alone.
    """
    runs = tables.tidy(found)
    same = runs.devices == runs.devices.mode().get(0)
    return runs.assign(
        minutes=(runs.train_seconds / 60).where(same), search_minutes=(runs.search_seconds / 60).where(same),
        wh=(runs.energy_kwh * 1000).where(same), wh_estimated=(runs.energy_kwh_estimated * 1000).where(same),
        mb=runs.bytes_sent / 1e6)


def with_changes(printed, tasks):
    """A table of the paper with rows for what follows from it: change of each task's loss against
    one-by-one (%), their mean (delta-m), training time over one-by-one's."""
    wide = printed.pivot(index="method", columns="metric", values="mean").astype(float)
    changes = 100 * (1 - wide[list(tasks)] / wide.loc["one-by-one", list(tasks)])
    derived = {f"delta_{a}_percent": changes[a] for a in tasks}
    derived["delta_m_percent"] = changes.mean(axis=1)
    derived["time_ratio"] = wide.time_gpu_hours / wide.time_gpu_hours["one-by-one"]
    rows = [{"method": method, "metric": metric, "mean": f"{value:.2f}", "std": ""}
            for metric, values in derived.items() for method, value in values.items()]
    return pd.concat([printed, pd.DataFrame(rows)], ignore_index=True).fillna("")


def delta_m(found, better, worse, tasks="sdnkt", judge="losses"):
    """delta-m (%) of a method over its control, by seed, where both are on record.

    judge: "losses" of the model with the least validation loss, "losses_last" of the last round's.
    """
    having = [{s for m, t, s in found if (m, t) == (name, tasks)} for name in (better, worse)]
    seeds = sorted(having[0] & having[1])
    pairs = {s: [getattr(found[m, tasks, s], judge) for m in (better, worse)] for s in seeds}
    return pd.Series({s: tables.delta_m(*losses) for s, losses in pairs.items()}, dtype=float)


def mean_std(values, digits=3):
    """Text: mean ± std over seeds, the mean alone for one seed, a dash for none."""
    values = pd.Series(values, dtype=float).dropna()
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}" if len(values) else "-"


def beside(runs, printed, columns, spread=()):
    """Means over seeds beside the paper's numbers; columns: title -> (our column, the paper's metric).

    No metric: ours alone; no column of ours: to be filled in. Titles in `spread` have the standard
    deviation over seeds ("±") beside each mean.
    """
    methods = list(dict.fromkeys([*printed.method, *runs.method]))
    theirs = printed.replace("", np.nan).pivot(index="method", columns="metric", values=["mean", "std"])
    theirs, ours, table = theirs.astype(float), runs.groupby("method"), {}
    for title, (column, metric) in columns.items():
        table[title, "ours"] = ours[column].mean() if column else np.nan
        if title in spread:
            table[title, "±"] = ours[column].std()
        if metric:
            table[title, "paper"] = theirs["mean", metric]
        if metric and title in spread and theirs["std", metric].notna().any():
            table[title, "paper ±"] = theirs["std", metric]
    return pd.DataFrame(table, index=pd.Index(methods, name="method")).astype(float)


def losses(runs, printed, tasks):
    """Total loss, that of the last round's model, and each task's, ours beside the paper's.

    The number of seeds comes first where methods differ in it.
    """
    columns = {"total": ("total", "total"), "last round": ("total_last", None)}
    table = beside(runs, printed, columns | {a: (a, a) for a in tasks}, spread=["total"])
    seeds = runs.groupby("method").seed.nunique()
    if seeds.nunique() > 1:
        table.insert(0, ("seeds", "ours"), seeds.reindex(table.index).astype("Int64"))
    return table


def changes(runs, printed, tasks):
    """Per cent of loss saved against one-by-one: mean over tasks (delta-m), and each task's.

    printed: a table of the paper that went through `with_changes`.
    """
    columns = {"delta-m": ("delta_m_percent",) * 2, "last round": ("delta_m_last_percent", None)}
    columns |= {f"{a} (%)": (f"delta_{a}_percent",) * 2 for a in tasks}
    return beside(runs, printed, columns, spread=["delta-m"])


def show_nearer(runs, printed, tasks):
    """What `nearer` found, without the paper's numbers: losses; changes against one-by-one, and bytes."""
    lost = losses(runs, printed, tasks)
    saved = changes(runs, printed, tasks)
    sent = beside(runs, printed, {"sent / one-by-one": ("bytes_ratio", None)})
    for table, digits, kind in ((lost, 3, "min"), (saved, 2, "max")):
        table = table[[column for column in table if not column[1].startswith("paper")]].dropna(how="all")
        show(table.join(sent) if kind == "max" else table, digits, best(table, kind), index=True)


def best(table, kind):
    """For `show`: "min" or "max" is best in every column of `beside` that holds no spread or count."""
    return {column: kind for column in table if "±" not in column[1] and column[0] != "seeds"}


def costs(runs, printed, tasks, ratios):
    """What methods cost, ours beside the paper's, as numbers for `show`.

    Time over one-by-one's is the median of repeats timed in one run, with the least and greatest.
    """
    grams = runs.wh_estimated / 1000 * tables.GRAMS_CO2_PER_KWH
    table = beside(runs.assign(grams=grams), printed, {
        "time / one-by-one, one run": (None, "time_ratio"),
        "time (ours min, paper GPU h)": ("minutes", "time_gpu_hours"),
        "of it search": ("search_minutes", None),
        "energy (ours Wh, paper kWh)": ("wh", "energy_kwh"),
        "estimated Wh": ("wh_estimated", None),
        "CO2eq (ours estimated, g)": ("grams", "co2eq_g"),
        "sent (MB)": ("mb", None), "sent / one-by-one": ("bytes_ratio", None),
    })
    timed = pd.DataFrame({m: pd.Series(ratios.get((tasks, m), [np.nan])) for m in table.index}).agg(
        ["median", "min", "max"]).T
    title = "time / one-by-one, one run"
    table[title, "ours"] = timed["median"]
    table.insert(1, (title, "least"), timed["min"])
    table.insert(2, (title, "greatest"), timed["max"])
    return table


def series(runs, method, tasks, column="total"):
    """A column by seed, empty where the method is not on record."""
    return tables.by_seed(runs, method, tasks, column)


def timed(preset, results, overrides={}):
    """Training times over one-by-one's, timed in one run; none but for the small preset as it is.

    One-by-one restarted and MAS-1 take as many of the same steps as one-by-one and all-in-one, and
    MAS-n (every task alone) those of all-in-one up to R0 and of one-by-one from there.
    """
    ratios = tables.time_ratios(results) if preset == "small" and not overrides else {}
    for tasks in {tasks for tasks, method in ratios if method == "all-in-one"}:
        merged, settings = ratios[tasks, "all-in-one"], mas.settings(preset, tasks)
        before = settings.mas.merge_rounds / settings.fl.rounds
        ratios |= {(tasks, RESTARTED): ratios[tasks, "one-by-one"], (tasks, "MAS-1"): merged,
                   (tasks, f"MAS-{len(tasks)}"): [before * time + 1 - before for time in merged]}
    return ratios


def times_faster(runs, better, worse, tasks, least, preset, results, overrides={}):
    """Finding: training time of `worse` over that of `better`, at least `least`.

    Trajectories on record were trained in different hours of a shared machine, whose speed varies.
    Where `python -m benchmarks method_cost` has timed all methods in turns, that is judged.
    """
    ratios = timed(preset, results, overrides)
    if {(tasks, better), (tasks, worse)} <= set(ratios):
        return verdicts.timed(ratios[tasks, worse], least, ratios[tasks, better])
    quotient = series(runs, worse, tasks, "minutes") / series(runs, better, tasks, "minutes")
    return verdicts.paired(quotient, least, margin=None)


def interval(points):
    """Text: an effect by seed as mean and 95 % interval, such as the last round's beside a verdict."""
    return str(replace(verdicts.paired(points, margin=None), seeds=0)) or "-"


def measured(found):
    """Text of a finding: effect, interval, seeds, and what the interval is from if not from seeds."""
    plain = found.basis.startswith("t over") or found.verdict in (verdicts.ONE_SEED, verdicts.ABSENT)
    return f"{found}{'' if plain else f' ({found.basis})'}".strip()


def judged(rows):
    """Claims as a table of numbers for `show`, by verdict; none is corrected for the number of rows,
    so that what is clear alone "seems to hold" (or not to).

    rows: (claim, the paper's number, Finding), or (claim, the paper's number, least effect at which
    it holds, effect by seed) and for a loss in per cent the same by the last round's model.
    """
    table = []
    for claim, printed, *rest in rows:
        least, effect, last = (*rest, None, None)[:3]
        found = rest[0]
        if not isinstance(found, verdicts.Finding):
            found = verdicts.paired(effect, least, None if last is None else verdicts.MARGIN)
        found = verdicts.uncorrected(found)
        last = np.nan if last is None else pd.Series(last, dtype=float).mean()
        table.append((claim, found.verdict, found.effect, found.low, found.high, found.seeds, last,
                      str(printed), found.basis))
    table = pd.DataFrame(table, columns=["claim", "verdict", "effect", "low", "high", "seeds",
                                         "last round's", "paper", "interval from"])
    return table.sort_values("verdict", key=lambda v: v.map(verdicts.VERDICTS.index), kind="stable")


def say(table):
    """Print claims by verdict."""
    for verdict in verdicts.VERDICTS:
        for i, (claim, _, measured, printed) in enumerate(table[table.verdict == verdict].values):
            print(f"{verdict}:\n" * (i == 0) + f"  {claim}: {measured or '-'}; paper {printed}")


def show(table, digits=2, best=None, within=(), index=False):
    """Display a table of numbers: rounded, the best of a column bold, verdicts in their colours.

    digits  decimals of float columns; {column: decimals} where they differ from 2
    best    {column: "min" or "max"}, which of its numbers is best
    within  columns: the best is sought among the rows that agree in them
    Where no HTML is shown (a terminal, a test) the table is plain text.
    """
    if not len(table):
        return print("nothing on record")
    floats = table.select_dtypes("float").columns
    digits = {c: digits.get(c, 2) if isinstance(digits, dict) else digits for c in floats}
    table = table.round(digits).rename(index=SHOWN_AS).replace({"method": SHOWN_AS})
    text = table.to_string(index=index, na_rep="-", formatters={
        c: lambda v, d=d: "-" if np.isnan(v) else f"{v:.{d}f}" for c, d in digits.items()})
    style = Styler(table, uuid=f"{zlib.crc32(text.encode()):08x}", cell_ids=False)
    short = lambda v: f"{v:g}" if isinstance(v, float) else v  # noqa: E731
    style.format(dict.fromkeys(table.select_dtypes(exclude="number"), short))
    style.format({c: f"{{:.{d}f}}" for c, d in digits.items()}, na_rep="-")
    style.format_index(short).format_index(short, axis=1)
    for column in table.select_dtypes(exclude="number"):
        wide = "; min-width: 20em" if table[column].astype(str).str.len().max() > 40 else ""
        props = [{"selector": "", "props": f"text-align: left{wide}"}]
        style.set_table_styles({column: props}, overwrite=False)
        if set(table[column]) <= set(VERDICT_TEXT):
            style.map(lambda v: f"color: {VERDICT_TEXT[v]}; font-weight: bold", subset=[column])
    for column, kind in (best or {}).items():
        groups = table.groupby(list(within), sort=False)[column] if within else table[column]
        least = groups.transform(kind) if within else getattr(groups, kind)()
        bold = np.where(table[column] == least, "font-weight: bold", "")
        style.apply(lambda _, bold=bold: bold, subset=[column])
    html = (style if index else style.hide(axis="index")).to_html()
    html = re.sub(r"\n +(?=<t[dh])", "", html)  # a row a line: fewer bytes in a notebook
    display({"text/html": html, "text/plain": text}, raw=True)


def draw_claims(table, noise):
    """A figure of claims (`verdicts.table` with units): effects with intervals, a panel a unit.

    noise: standard deviation of a paired difference (%), for rows of one seed.
    """
    units = {"%": "per cent", "times": "times as long", "share": "share", "x 1000": "affinity x 1000",
             "% of rounds": "R0 (% of rounds)"}
    units = {u: label for u, label in units.items() if (table.unit == u).any()}
    heights = [(table.unit == u).sum() + 1.5 for u in units]
    figure, axes = plt.subplots(len(units), 1, figsize=(11, 0.27 * sum(heights)), height_ratios=heights,
                                squeeze=False)
    for ax, (unit, label) in zip(axes.flat, units.items()):
        part = table[table.unit == unit].reset_index(drop=True)
        for y, r in part.iterrows():
            c = VERDICT_TEXT[r.verdict]
            whole = {"fmt": "o", "color": c, "ms": 5, "mfc": "white" if r.seeds == 1 else None}
            if not np.isnan(r.low):
                ax.plot([r.low, r.high], [y, y], color=c, lw=1.5)
            elif unit == "%" and r.verdict == verdicts.ONE_SEED:
                ax.plot(r.effect + 1.96 * noise * np.array([-1, 1]), [y, y], color=c, lw=1.2, ls=":")
            ax.errorbar(r.effect, y, **whole)
            ax.plot(r.least, y, "|", color="k", ms=9)
            number = pd.to_numeric(r.paper, errors="coerce")
            ax.plot(number, y, "D", color="0.5", mfc="none", ms=4)
            seeds = f", {r.seeds} seeds" if r.seeds > 1 else ""
            ax.annotate(r.verdict + seeds, (1.01, y), xycoords=("axes fraction", "data"), va="center",
                        color=c, fontsize=8)
        names = part.claim.str.replace(r" \([^()]*\)$", "", regex=True)
        ax.set(yticks=range(len(part)), yticklabels=names, xlabel=label, ylim=(len(part) - 0.5, -0.5))
        ax.tick_params(axis="y", labelsize=8, length=0)
        if unit == "%":
            ax.set_xscale("symlog", linthresh=2)
            ax.set_xticks([-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50])
            ax.xaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
            ax.axvline(0, color="0.2", lw=0.8)
        elif unit == "% of rounds":
            ax.axvspan(30, 40, color="0.9", zorder=0)
            ax.set_xlim(0, 100)
    axes[0, 0].set_title("The paper's claims, judged on procedural rooms")
    return figure


def our_points(runs, tasks, ratios={}):
    """Time over one-by-one's and total loss by method: mean or median, and the ends of its bar.

    Times of one run (`timed`), median and range of its repeats, where all methods have them; else
    the records' means and standard deviations over seeds, which differ by the machine's load.
    """
    runs = runs[runs.task_set == tasks]
    runs = runs.assign(time=runs.minutes / runs.seed.map(series(runs, "one-by-one", tasks, "minutes")))
    group = runs.groupby("method", sort=False)
    points = group.agg(time=("time", "mean"), loss=("total", "mean"), loss_std=("total", "std"),
                       seeds=("seed", "nunique"))
    spread = group.time.std()
    points["time_low"], points["time_high"] = points.time - spread, points.time + spread
    if len(points) and all((tasks, m) in ratios for m in points.index):
        repeats = pd.DataFrame({m: ratios[tasks, m] for m in points.index})
        points["time"], points["time_low"], points["time_high"] = (
            repeats.median(), repeats.min(), repeats.max())
    return points


def paper_points(printed):
    """The same of a table of the paper: three runs, mean and standard deviation."""
    wide = printed.replace("", np.nan).pivot(index="method", columns="metric", values=["mean", "std"])
    wide = wide.astype(float)
    time, std = wide["mean"].time_gpu_hours, wide["std"].time_gpu_hours
    base = time["one-by-one"]
    return pd.DataFrame({"time": time / base, "loss": wide["mean"].total, "loss_std": wide["std"].total,
                         "seeds": 3, "time_low": (time - std) / base, "time_high": (time + std) / base})


def draw_points(ax, points, title):
    """Loss against time with the bars of both; a line joins the splits of a method.

    Hollow: one seed, whose loss has no bar.
    """
    for family in FAMILIES:
        p = points[points.index.str.startswith(family)]
        bars = np.clip([p.time - p.time_low, p.time_high - p.time], 0, None)
        ax.errorbar(p.time, p.loss, p.loss_std, bars, fmt="-", lw=1, color=colour(family))
        for time, loss, seeds in zip(p.time, p.loss, p.seeds):
            ax.plot(time, loss, "o", color=colour(family), mfc=None if seeds > 1 else "white")
    ax.set(title=title, xlabel="training time / one-by-one's (log scale)", ylabel="total test loss",
           xscale="log")
    if points.empty:
        missing(ax)
    ax.margins(0.2)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    bars = points.fillna(0)
    label_points(ax, [(p.time, p.loss, SHOWN_AS.get(p.Index, p.Index.removeprefix("one-by-one ")),
                       colour(p.Index))
                      for p in points.itertuples()],
                 bars=[(p.time, p.loss, (p.time_high - p.time_low) / 2, p.loss_std)
                       for p in bars.itertuples()])


def draw_effects(ax, found, printed, xlabel):
    """Effects with 95 % intervals, a method a row, coloured by method; diamonds are the paper's.

    found: method -> Finding; printed: method -> the paper's number. Hollow dots: one seed. The axis
    is linear to 5 and logarithmic beyond.
    """
    for y, (method, f) in enumerate(found.items()):
        ends = [] if np.isnan(f.low) else [[f.effect - f.low], [f.high - f.effect]]
        ax.errorbar(f.effect, y, xerr=ends or None, fmt="o", color=colour(method),
                    mfc=None if f.seeds > 1 else "white")
        if method in printed:
            ax.plot(printed[method], y, "D", ms=5, color="0.6", mfc="none", zorder=1)
    ax.axvline(0, color="0.2", lw=0.8)
    ax.set(yticks=range(len(found)), yticklabels=[SHOWN_AS.get(m, m) for m in found],
           xlabel=f"{xlabel}; ◇ the paper")
    ax.set_xscale("symlog", linthresh=5)  # the paper's effects are up to ten times as large
    low, high = ax.get_xlim()
    ax.set_xticks([x for x in (-40, -20, -10, -5, -2.5, 0, 2.5, 5, 10) if low <= x <= high])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.invert_yaxis()


def draw_effect(ax, y, points, finding, colour):
    """One row: an effect's seeds as dots and its mean with the interval; one seed: a hollow dot."""
    ax.plot(points, np.full(len(points), y), ".", color=colour, alpha=0.35)
    if finding.seeds == 1:
        ax.plot(finding.effect, y, "o", color=colour, mfc="white")
    elif finding.seeds > 1:
        reach = [[finding.effect - finding.low], [finding.high - finding.effect]]
        ax.errorbar(finding.effect, y, xerr=reach, fmt="o", color=colour, capsize=3)


def label_points(ax, points, sides=(1, -1, 0), bars=()):
    """Write each point's name beside it, where it hides least; points: (x, y, name, colour).

    bars: (x, y, dx, dy), error bars that names shall not hide either.
    """
    directions = [(dx, dy) for dy in (0, 1, -1) for dx in sides if (dx, dy) != (0, 0)]
    ax.figure.draw_without_rendering()
    size = ax.figure.dpi / 72
    where = [ax.transData.transform((x, y)) for x, y, *_ in points]
    taken = [(x - 5 * size, x + 5 * size, y - 5 * size, y + 5 * size) for x, y in where]
    for x, y, dx, dy in bars:
        (left, low), (right, high) = ax.transData.transform([(x - dx, y - dy), (x + dx, y + dy)])
        px, py = ax.transData.transform((x, y))
        taken += [(left, right, py - 4 * size, py + 4 * size),
                  (px - 4 * size, px + 4 * size, low - 2 * size, high + 2 * size)]
    frame = ax.get_window_extent().extents[[0, 2, 1, 3]]
    for i, ((x, y, name, c), (px, py)) in enumerate(zip(points, where)):
        w, h, best = 6.6 * size * len(name), 12 * size, None
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
                worse = 4 * over + 50 * out + far * size + 100 * astray
                best = (worse, cx, cy, box) if best is None or worse < best[0] else best
        _, cx, cy, box = best
        taken.append(box)
        ax.annotate(name, (x, y), ((cx - px) / size, (cy - py) / size), textcoords="offset points",
                    ha="center", va="center", color=c, fontsize=9, path_effects=HALO,
                    arrowprops={"arrowstyle": "-", "color": c, "lw": 0.6, "shrinkA": 0, "shrinkB": 4})


def label_ends(ax, ends, apart=0.055):
    """Write names right of curves' ends, at least `apart` of the axes' height from one another.

    ends: (x, y, name, colour), once the axes' limits stand. Names are moved as little as possible:
    least squares in their order.
    """
    (low, high), ends = ax.get_ylim(), sorted(ends, key=lambda end: end[1])
    steps = apart * np.arange(len(ends))
    at = np.array([(y - low) / (high - low) for _, y, *_ in ends])
    for (x, y, name, c), place in zip(ends, isotonic_regression(at - steps).x + steps if ends else ()):
        ax.annotate(name, (x, y), (1.03, place), textcoords="axes fraction", va="center", color=c,
                    fontsize=9, arrowprops={"arrowstyle": "-", "color": c, "lw": 0.6})


def label_curves(ax, curves, colours):
    """Write each name on its own curve, where other curves and the names before it are farthest.

    curves: a column each, x as index, once the axes' limits stand.
    """
    height, width = np.ptp(ax.get_ylim()), np.ptp(ax.get_xlim())
    placed = []
    for name, y in curves.items():
        gap = curves.drop(columns=name).sub(y, axis=0).abs().min(axis=1) / height
        score = gap.clip(upper=0.08)
        for x0, y0 in placed:
            apart = np.maximum(np.abs(y.index - x0) / width, (y - y0).abs() / height)
            score = np.minimum(score, apart)
        x = score.iloc[len(y) // 30 : len(y) - len(y) // 30].idxmax()
        placed.append((x, y[x]))
        ax.text(x, y[x], name, color=colours[name], ha="center", va="center", fontweight="bold",
                fontsize=10, path_effects=HALO)


def draw_curve(ax, curves, style, colour, label):
    """The mean of curves (a row a seed) with a band of noise; hollow points: one seed.

    Several seeds: the 95 % interval after each seed's own level is taken away (Cousineau, 2005). One
    seed of five places or more: its parabola, plus and minus twice the scatter about it.
    """
    n, places = curves.shape
    if not n:
        return
    x, mean = curves.columns.to_numpy(float), curves.mean()
    ax.plot(x, mean, style, color=colour, mfc=None if n > 1 else "white", label=label)
    middle, reach = mean, None
    if n > 1:
        own = curves.sub(curves.mean(axis=1), axis=0)
        reach = stats.t.ppf(0.975, n - 1) * own.std() / np.sqrt(n)
    elif places >= 5:
        middle = np.polyval(np.polyfit(x, mean, 2), x)
        reach = 2 * np.sqrt(((mean - middle) ** 2).sum() / (places - 3))
    if reach is not None:
        ax.fill_between(x, middle - reach, middle + reach, color=colour, alpha=0.15, lw=0)


def draw_place(ax, found, colour):
    """A finding of a place on the x axis (`verdicts.vertex`): a triangle with its interval."""
    if np.isnan(found.effect):
        return
    y = ax.get_xaxis_transform()
    if not np.isnan(found.low):
        ax.plot([found.low, found.high], [0.03, 0.03], color=colour, transform=y)
    ax.plot(found.effect, 0.03, "^", color=colour, mfc=None if found.seeds > 1 else "white", transform=y,
            label="vertex of a parabola")


def counts(texts):
    """Text: the distinct texts, the most frequent first, with how often each: "sdn,kt (3)"."""
    return "  ".join(f"{text} ({n})" for text, n in pd.Series(texts).value_counts().items())


def draw_validation(top, bottom, curves):
    """Validation losses over rounds: above the sum, a thin line a seed and their mean, a dot where a
    seed's is least; below each task's mean over its first.

    curves: a table a seed, rounds as index, a column a task.
    """
    for total in [curve.sum(axis=1) for curve in curves]:
        top.plot(total, color="C1", lw=0.8, alpha=0.5)
        top.plot(total.idxmin(), total.min(), "o", ms=5, mfc="white", color="C1")
    if curves:
        mean = sum(curves) / len(curves)
        relative = mean / mean.iloc[0]
        top.plot(mean.sum(axis=1), color="C1", lw=2.2)
        for a in relative:
            bottom.plot(relative[a], color=TASK_COLOURS[a], lw=1.4)
        label_ends(bottom, [(relative.index[-1], y, a, TASK_COLOURS[a]) for a, y in relative.iloc[-1].items()])


def missing(ax, text="not on record", y=0.95):
    """Say at the right of a panel what is not on record; y is a share of its height."""
    ax.text(0.97, y, text, transform=ax.transAxes, ha="right", va="top", color="0.4")


def value_axis(ax, values, label, lacking=(), symbol=""):
    """A logarithmic x axis whose ticks are the values of a setting; says which are not on record."""
    ax.set(xscale="log", xlabel=label, xlim=(values[0] / 1.25, values[-1] * 1.25))
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.minorticks_off()
    if len(lacking):
        missing(ax, f"{symbol} = {', '.join(f'{value:g}' for value in lacking)}\nnot on record")


def place(preset):
    """Where numbers come from, for a title: "procedural rooms (small)"."""
    rooms = mas.settings(preset, "sdnkt").data.source == "rooms"
    return f"{'procedural rooms' if rooms else 'Taskonomy'} ({preset})"


def save(figure, name, preset, figures):
    """Write figures/<preset>/<name>.png and .pdf, without dates, so that equal figures are equal.

    What is shown is the file, in as few colours as show the same: images of rooms keep all.
    """
    if not any(ax.has_data() for ax in figure.axes):
        print(f"nothing to draw: {name} is left as it is")
        return
    folder = Path(figures, preset)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = folder / f"{name}.png"
    figure.savefig(drawn, dpi=1.5 * figure.dpi, metadata={"Software": None})
    figure.set_layout_engine("none")  # as it is laid out by now
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "ModDate": None})
    full, how = PIL.Image.open(drawn).convert("RGB"), PIL.Image.Quantize
    for colours, method, most in ((64, how.MAXCOVERAGE, 0.3), (128, how.MAXCOVERAGE, 0.3), (256, how.MEDIANCUT, 1)):
        shown = full.quantize(colours, method, dither=PIL.Image.Dither.NONE)
        if np.abs(np.asarray(full, int) - np.asarray(shown.convert("RGB"), int)).mean() < most:
            break
    else:
        shown = full
    shown.save(drawn, optimize=True)
    plt.close(figure)
    display(Image(drawn, width=round(full.width / 1.5)))
