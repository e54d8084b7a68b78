"""What each notebook asks for: one function per figure or table, from a preset to recipes.

`mas plan`, `mas reproduce` and the notebooks share these, so that a trajectory is trained once.
A recipe's key is (method, task set, seed), the method as `MethodResult.method` names it, with the
varied setting after it where there is one: ("MAS-2 R0=30", "sdnkt", 0).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from mas_core import methods
from mas_core.config import MEASURES, UserError, settings
from mas_core.methods import Recipe
from mas_core.records.store import Store
from mas_core.records.study import Study
from mas_core.tasks import TASK_SETS

from ..run.engine import collect
from ..run.workers import Compute, train_recipes
from .few_labels import few_labels
from .room_types import room_types
from .two_widths import two_widths
from .who_to_merge import who_to_merge

Key = tuple[str, str, int]
Recipes = dict[Key, Recipe]
Experiment = Callable[[Store, int, dict[str, Any]], Recipes]  # store, seed, overrides

LOCAL_EPOCHS = (1, 2, 5, 10)
CLIENTS_PER_ROUND = (2, 4, 6, 8, 16)
DIALS = (0.0, 0.35, 0.7, 1.0)  # data.heterogeneity: how much a building's rooms share a style
LONGER = 5  # local epochs with which whole methods are compared, too
RIVALS = {
    "FAMO": "famo",
    "CAGrad": "cagrad",
    "PCGrad": "pcgrad",
    "selective updates": "selective",
    "FedEM-2": "fedem",
}  # fl.method of each


def study(store: Store, tasks: str, seed: int, overrides: dict[str, Any]) -> Study:
    return Study(tasks, settings(store.preset, tasks, overrides), seed, store)


def figure_5(store: Store, seed: int, overrides: dict[str, Any]) -> Recipes:
    """Every method on sdnkt (Fig. 5, supplement Table 3)."""
    return _comparison(study(store, "sdnkt", seed, overrides), range(2, 5), with_hoa=True)


def figure_6(store: Store, seed: int, overrides: dict[str, Any]) -> Recipes:
    """Every method on erckt and sdnkterca (Fig. 6, supplement Tables 4 and 5)."""
    five, nine = (study(store, tasks, seed, overrides) for tasks in ("erckt", "sdnkterca"))
    return _comparison(five, range(2, 5), with_hoa=True) | _comparison(
        nine, range(2, 6), with_hoa=False
    )


def figure_1(store: Store, seed: int, overrides: dict[str, Any]) -> Recipes:
    """Loss against time on the nine tasks (Fig. 1)."""
    return _comparison(study(store, "sdnkterca", seed, overrides), range(2, 6), with_hoa=False)


def table_1(
    store: Store, seed: int, overrides: dict[str, Any], task_sets: Iterable[str] = TASK_SETS[:2]
) -> Recipes:
    """MAS against all partitions, from scratch and initialised (Table 1, supplement Table 2)."""
    recipes: Recipes = {}
    for tasks in task_sets:
        s = study(store, tasks, seed, overrides)
        for x in (2, 3):
            recipes[f"MAS-{x}", tasks, seed] = methods.merge_and_split(s, x)
            for start in ("scratch", "initialised"):
                recipes[f"{start}-{x}", tasks, seed] = methods.every_partition(
                    s, x, start == "initialised"
                )
    return recipes


def figure_7(store: Store, seed: int, overrides: dict[str, Any]) -> Recipes:
    """Affinities over the rounds of all-in-one training, all nine tasks (Fig. 7)."""
    return _all_in_one(store, ("sdnkterca",), seed, overrides)


def figure_8(
    store: Store, seed: int, overrides: dict[str, Any], task_sets: Iterable[str] = TASK_SETS
) -> Recipes:
    """MAS-2 for R0 = 10 % to 90 % of the rounds (Fig. 8)."""
    recipes: Recipes = {}
    for tasks in task_sets:
        rounds = study(store, tasks, seed, overrides).rounds
        for tenth in range(1, 10):
            R0 = max(1, rounds * tenth // 10)
            s = study(store, tasks, seed, overrides | {"mas.merge_rounds": R0})
            recipes[f"MAS-2 R0={R0}", tasks, seed] = methods.merge_and_split(s, 2)
    return recipes


def figure_9(store: Store, seed: int, overrides: dict[str, Any]) -> Recipes:
    """Every client alone against all-in-one and MAS-2, sdnkt (Fig. 9)."""
    s = study(store, "sdnkt", seed, overrides)
    recipes: Recipes = {
        (f"standalone-{k}", s.tasks, seed): methods.standalone(s, k)
        for k in range(s.settings.data.buildings)
    }
    recipes["all-in-one", s.tasks, seed] = methods.all_in_one(s)
    recipes["MAS-2", s.tasks, seed] = methods.merge_and_split(s, 2)
    return recipes


def figure_10(
    store: Store, seed: int, overrides: dict[str, Any], task_sets: Iterable[str] = TASK_SETS
) -> Recipes:
    """All-in-one for several E and K (Fig. 10, supplement Fig. 5)."""
    recipes: Recipes = {}
    for tasks in task_sets:
        usual = study(store, tasks, seed, overrides).settings
        variants = [("E", "fl.local_epochs", usual.fl.local_epochs, LOCAL_EPOCHS)]
        variants += [("K", "fl.clients_per_round", usual.fl.clients_per_round, CLIENTS_PER_ROUND)]
        for symbol, key, default, values in variants:
            for value in values:
                if symbol == "K" and value > usual.data.buildings:
                    continue
                # The default is the trunk of other figures; the variants measure no affinities.
                changes = {} if value == default else {key: value, "fl.measure_rounds": 0}
                s = study(store, tasks, seed, overrides | changes)
                recipes[f"all-in-one {symbol}={value}", s.tasks, seed] = methods.all_in_one(s)
    return recipes


def longer_rounds(store: Store, seed: int, overrides: dict[str, Any]) -> Recipes:
    """One-by-one, all-in-one, MAS-2 and -3 on sdnkt, E = 1 and 5: is the order that of Fig. 5?"""
    usual = study(store, "sdnkt", seed, overrides)
    recipes: Recipes = {}
    for E in dict.fromkeys((usual.settings.fl.local_epochs, LONGER)):
        s = usual
        if E != usual.settings.fl.local_epochs:
            read = usual.settings.mas.affinity_rounds  # no figure shows those of later rounds
            more = {"fl.local_epochs": E, "fl.measure_rounds": read}
            s = study(store, "sdnkt", seed, overrides | more)
        alone = s if s is usual else s.unmeasured()  # as figure_10 asks for it
        recipes[f"one-by-one E={E}", s.tasks, seed] = methods.one_by_one(s)
        recipes[f"all-in-one E={E}", s.tasks, seed] = methods.all_in_one(alone)
        for x in (2, 3):
            recipes[f"MAS-{x} E={E}", s.tasks, seed] = methods.merge_and_split(s, x)
    return recipes


def table_2(store: Store, seed: int, overrides: dict[str, Any]) -> Recipes:
    """All-in-one and MAS-2 with twice as many clients a round, sdnkt (Table 2: K = 8)."""
    usual = study(store, "sdnkt", seed, overrides)
    K = usual.settings.fl.clients_per_round
    recipes: Recipes = {}
    for k in (K, 2 * K):
        s = study(store, "sdnkt", seed, overrides | {"fl.clients_per_round": k})
        recipes[f"all-in-one K={k}", s.tasks, seed] = methods.all_in_one(s)
        recipes[f"MAS-2 K={k}", s.tasks, seed] = methods.merge_and_split(s, 2)
    return recipes


def supplement_tables_1_2(store: Store, seed: int, overrides: dict[str, Any]) -> Recipes:
    """The splits of TAG and MAS, and the optimal and worst ones (supplement Tables 1 and 2)."""
    recipes = table_1(store, seed, overrides)
    for tasks in TASK_SETS:
        s = study(store, tasks, seed, overrides)
        for x in range(2, 5):
            recipes[f"TAG-{x}", s.tasks, seed] = methods.tag(s, x)
        for x in range(2, 6):
            recipes[f"MAS-{x}", s.tasks, seed] = methods.merge_and_split(s, x)
    return recipes


def supplement_figure_3(store: Store, seed: int, overrides: dict[str, Any]) -> Recipes:
    """Validation loss over the rounds of all-in-one training (supplement Fig. 3)."""
    return _all_in_one(store, TASK_SETS, seed, overrides)


def tour(store: Store, seed: int, overrides: dict[str, Any]) -> Recipes:
    """What `mas demo` trains: one-by-one, all-in-one and MAS-2 on sdnkt."""
    s = study(store, "sdnkt", seed, overrides)
    makers = (methods.one_by_one, methods.all_in_one, methods.merge_and_split)
    names = ("one-by-one", "all-in-one", "MAS-2")
    return {(n, s.tasks, seed): make(s) for n, make in zip(names, makers, strict=True)}


def explore_affinities(
    store: Store, seed: int, overrides: dict[str, Any], tasks: str = "sdnkt"
) -> Recipes:
    """All-in-one training of one task set, for its affinities."""
    return _all_in_one(store, (tasks,), seed, overrides)


def ablation(store: Store, seed: int, overrides: dict[str, Any]) -> Recipes:
    """Learning-rate schedule after the split, and scale of the encoder's gradient, on sdnkt."""
    recipes: Recipes = {}
    for scale in ("none", "sqrt"):
        changed = overrides | {"fl.encoder_grad_scale": scale}
        s = study(store, "sdnkt", seed, changed)
        recipes[f"all-in-one {scale}", s.tasks, seed] = methods.all_in_one(s)
        for schedule in ("continue", "restart"):
            s = study(store, "sdnkt", seed, changed | {"mas.lr_schedule": schedule})
            recipes[f"MAS-2 {scale} {schedule}", s.tasks, seed] = methods.merge_and_split(s, 2)
    return recipes


def controls(
    store: Store, seed: int, overrides: dict[str, Any], task_sets: Iterable[str] = TASK_SETS
) -> Recipes:
    """MAS taken apart: schedule, merge and split, each against its control at equal rounds.

    "restarted" networks start their schedule anew at R0 as MAS's do after the split; "continued"
    ones of MAS do not. MAS-1 is merged and restarted, never split; MAS-n splits every task off.
    Nine tasks are split into two, three and nine.
    """
    recipes: Recipes = {}
    for tasks in task_sets:
        s = study(store, tasks, seed, overrides)
        again = study(store, tasks, seed, overrides | {"mas.lr_schedule": "continue"})
        made = {
            "one-by-one": methods.one_by_one(s),
            "all-in-one": methods.all_in_one(s),
            "one-by-one restarted": methods.restarted(s, list(tasks), "one-by-one restarted"),
            "MAS-1": methods.restarted(s, [tasks], "MAS-1"),
        }
        for x in range(2, len(tasks) + 1) if len(tasks) <= 5 else (2, 3, len(tasks)):
            made[f"MAS-{x}"] = methods.merge_and_split(s, x)
            made[f"MAS-{x} continued"] = methods.merge_and_split(again, x)
        recipes |= {(name, tasks, seed): recipe for name, recipe in made.items()}
    return recipes


def groups_restarted(
    store: Store, seed: int, overrides: dict[str, Any], task_sets: Iterable[str] = TASK_SETS
) -> Recipes:
    """TAG and HOA, and the groups they choose with MAS's second schedule, restarted at R0.

    What their search trains is as ever. HOA is left out on nine tasks, as in the paper.
    """
    recipes: Recipes = {}
    for tasks in task_sets:
        s = study(store, tasks, seed, overrides)
        few = len(tasks) <= 5
        for x in (2, 3, 4) if few else (2, 3):
            for method in (methods.tag, methods.hoa) if few else (methods.tag,):
                name = f"{method.__name__.upper()}-{x}"
                recipes[name, tasks, seed] = method(s, x)
                again = f"{name} restarted"
                recipes[again, tasks, seed] = groups_again(s, method(s, x), again)
    return recipes


def groups_again(study: Study, recipe: Recipe, name: str) -> Recipe:
    """The groups that a recipe chooses, trained from scratch with a restart at R0."""
    found = yield from recipe
    return (yield from methods.restarted(study, found.groups, name))


def every_split(
    store: Store, seed: int, overrides: dict[str, Any], task_sets: Iterable[str] = TASK_SETS[:2]
) -> Recipes:
    """All partitions into two and three groups, initialised: what a random split would give."""
    recipes: Recipes = {}
    for tasks in task_sets:
        s = study(store, tasks, seed, overrides)
        for x in (2, 3):
            recipes[f"initialised-{x}", tasks, seed] = methods.every_partition(s, x, True)
    return recipes


def rivals(
    store: Store, seed: int, overrides: dict[str, Any], task_sets: Iterable[str] = TASK_SETS
) -> Recipes:
    """Today's rivals, all tasks in one network, beside all-in-one, its restart and MAS-2."""
    recipes: Recipes = {}
    for tasks in task_sets:
        s = study(store, tasks, seed, overrides)
        made = {"all-in-one": methods.all_in_one(s), "fedprox": methods.fedprox(s),
                "gradnorm": methods.gradnorm(s), "MAS-1": methods.restarted(s, [tasks], "MAS-1"),
                "MAS-2": methods.merge_and_split(s, 2)}  # fmt: skip
        for name, method in RIVALS.items():
            drawn = (("seed", float(seed)),) * (method in ("pcgrad", "selective"))
            learners = f"mas_core.rules.fedem:{s.settings.model.size}"
            network = {"model.size": learners} if method == "fedem" else {}
            own = study(store, tasks, seed, overrides | network)
            own = own.unmeasured(method=method, options=drawn)
            made[name] = methods.train_groups(name, own, [tasks])
        recipes |= {(name, tasks, seed): recipe for name, recipe in made.items()}
    return recipes


def first_rounds(study: Study) -> Recipe:
    """All-in-one for as long as a split reads its affinities, which its record holds; no result."""
    methods.check_measured(study)
    yield [methods.Need(study.all_in_one(), study.settings.mas.affinity_rounds)]
    return []


def affinity_measures(
    store: Store, seed: int, overrides: dict[str, Any], task_sets: Iterable[str] = TASK_SETS[:2]
) -> Recipes:
    """Every initialised split, and the first affinities by each measure, to choose among them.

    Written down before any but Eq. 3 was measured. Expected: on sdnkt Eq. 3 chooses splits of lower
    loss than a random one; first order and representation choose splits within 0.5 % of Eq. 3's;
    the cosine, which forgets how large losses and gradients are, chooses worse ones. Judged by the
    per cent of total test loss saved against the mean over all partitions into as many groups,
    mean of x = 2 and 3, paired by seed, 95 % intervals of Student's t.
    """
    recipes = every_split(store, seed, overrides, task_sets)
    for tasks in task_sets:
        for kind in MEASURES:
            s = measured_by(store, tasks, seed, overrides, kind)
            recipes[f"affinities {kind}", tasks, seed] = first_rounds(s)
    return recipes


def measured_by(
    store: Store, tasks: str, seed: int, overrides: dict[str, Any], kind: str
) -> Study:
    """A study whose affinities are of another measure; those of Eq. 3 are the usual ones."""
    usual = study(store, tasks, seed, overrides)
    if kind == usual.settings.fl.affinity:
        return usual
    short = {"fl.affinity": kind, "fl.measure_rounds": usual.settings.mas.affinity_rounds}
    return study(store, tasks, seed, overrides | short)


def proxies(
    store: Store, seed: int, overrides: dict[str, Any], task_sets: Iterable[str] = TASK_SETS[:2]
) -> Recipes:
    """Every initialised split, and the first affinities of the tiny network, to choose among them.

    Written down before the tiny network's affinities were measured. Expected: its splits save
    within 0.5 % of what those of the network's own affinities do against a random split. Judged as
    `affinity_measures` is.
    """
    recipes = every_split(store, seed, overrides, task_sets)
    for tasks in task_sets:
        recipes["affinities own", tasks, seed] = first_rounds(
            study(store, tasks, seed, overrides))  # fmt: skip
        recipes["affinities tiny", tasks, seed] = first_rounds(
            measured_on(store, tasks, seed, overrides, "tiny"))  # fmt: skip
    return recipes


def measured_on(store: Store, tasks: str, seed: int, overrides: dict[str, Any], size: str) -> Study:
    """A study whose affinities are of a network of another size; "own": the usual one."""
    usual = study(store, tasks, seed, overrides)
    if size == "own":
        return usual
    short = {"model.size": size, "fl.measure_rounds": usual.settings.mas.affinity_rounds}
    return study(store, tasks, seed, overrides | short)


def heterogeneity(
    store: Store, seed: int, overrides: dict[str, Any], dials: Iterable[float] = DIALS
) -> Recipes:
    """How much buildings differ in style, against what merging and splitting gain, on sdnkt.

    Written down before any but the preset's 0.7 was trained. Expected: the more buildings differ,
    the less is gained by MAS-2 over one-by-one, and the less certain is its split (the score of the
    best split over that of the next). Judged by delta-m, paired by seed, 95 % intervals of
    Student's t; a trend by the difference between the dial's ends.
    """
    recipes: Recipes = {}
    if settings(store.preset, "sdnkt", overrides).data.source != "rooms":
        return recipes
    for dial in dials:
        s = study(store, "sdnkt", seed, overrides | {"data.heterogeneity": float(dial)})
        made = {"one-by-one": methods.one_by_one(s), "all-in-one": methods.all_in_one(s),
                "MAS-1": methods.restarted(s, [s.tasks], "MAS-1"),
                "MAS-2": methods.merge_and_split(s, 2)}  # fmt: skip
        recipes |= {(f"{name} dial={dial:g}", s.tasks, seed): r for name, r in made.items()}
    return recipes


def when_to_split(
    store: Store, seed: int, overrides: dict[str, Any], task_sets: Iterable[str] = TASK_SETS[:2]
) -> Recipes:
    """All-in-one and MAS-2 split at four R0: E = 1, 2, 5, schedules that restart and continue.

    Written down before any but E = 1 with a restart was trained. Rules that choose R0 from what the
    server has seen (notebooks/when_to_split.py) keep their thresholds; they are judged by their
    regret, the per cent of total test loss above the best R0's of the same regime, against a fixed
    R0 of 30 and 40. Expected: the best R0 moves with E, yet no rule beats a fixed 40.
    """
    recipes: Recipes = {}
    for tasks in task_sets:
        usual = study(store, tasks, seed, overrides)
        for E in (1, 2, 5):
            more = {"fl.local_epochs": E, **({} if E == 1 else {"fl.arithmetic": "grouped"})}
            merged = methods.all_in_one(study(store, tasks, seed, overrides | more))
            recipes[f"all-in-one E={E}", tasks, seed] = merged
            for schedule in ("restart", "continue"):
                for tenths in (2, 4, 6, 8):
                    R0 = max(1, usual.rounds * tenths // 10)
                    here = {"mas.lr_schedule": schedule, "mas.merge_rounds": R0, **more}
                    s = study(store, tasks, seed, overrides | here)
                    name = f"MAS-2 E={E} {schedule} R0={R0}"
                    recipes[name, tasks, seed] = methods.merge_and_split(s, 2)
    return recipes


def published_taskonomy(store: Store, seed: int, overrides: dict[str, Any]) -> Recipes:
    """What stands beside others' Taskonomy numbers: all-in-one, single tasks and pairs of sdnkt."""
    recipes = _all_in_one(store, ("sdnkt",), seed, overrides)
    for size, name in ((1, "one-by-one"), (2, "all-in-one")):
        for group in map("".join, combinations("sdnkt", size)):
            alone = study(store, group, seed, overrides).unmeasured()
            recipes[name, group, seed] = methods.all_in_one(alone)
    return recipes


def _comparison(s: Study, splits: range, with_hoa: bool) -> Recipes:
    recipes: Recipes = {
        ("one-by-one", s.tasks, s.seed): methods.one_by_one(s),
        ("all-in-one", s.tasks, s.seed): methods.all_in_one(s),
        ("fedprox", s.tasks, s.seed): methods.fedprox(s),
        ("gradnorm", s.tasks, s.seed): methods.gradnorm(s),
    }
    for x in range(2, 5):
        recipes[f"TAG-{x}", s.tasks, s.seed] = methods.tag(s, x)
        if with_hoa:
            recipes[f"HOA-{x}", s.tasks, s.seed] = methods.hoa(s, x)
    for x in splits:
        recipes[f"MAS-{x}", s.tasks, s.seed] = methods.merge_and_split(s, x)
    return recipes


def _all_in_one(
    store: Store, task_sets: Iterable[str], seed: int, overrides: dict[str, Any]
) -> Recipes:
    return {
        ("all-in-one", tasks, seed): methods.all_in_one(study(store, tasks, seed, overrides))
        for tasks in task_sets
    }


NOTEBOOKS: dict[str, tuple[Experiment, ...]] = {
    "00_tour": (tour,),
    "explore_affinities": (explore_affinities,),
    "figure_01_overview": (figure_1,),
    "figure_04_data": (),
    "figure_05_sdnkt": (figure_5,),
    "figure_06_erckt_sdnkterca": (figure_6,),
    "table_1_optimal_worst": (table_1,),
    "figure_07_affinities": (figure_7,),
    "figure_08_merge_rounds": (figure_8,),
    "figure_09_standalone": (figure_9,),
    "figure_10_local_epochs_clients": (figure_10, longer_rounds),
    "table_2_more_clients": (table_2,),
    "supplement_tables_1_2_splits": (supplement_tables_1_2,),
    "supplement_figure_3_validation": (supplement_figure_3,),
    "ablation_schedule_gradient": (ablation,),
    "what_makes_it_work": (controls, every_split, groups_restarted),
    "who_to_merge": (who_to_merge, controls),
    "rivals": (rivals, every_split, table_1),
    "affinity_measures": (affinity_measures,),
    "open_questions": (when_to_split, heterogeneity, proxies, room_types),
    "few_labels": (few_labels,),
    "two_widths": (two_widths,),
    "digits": (),
    "your_own_tasks": (),
    "published_taskonomy": (published_taskonomy, figure_7),
    "claims": (figure_5, figure_6, figure_7, figure_8, figure_9, figure_10, table_1,
               table_2),
}  # fmt: skip


def chosen(names: Sequence[str]) -> list[str]:
    """Notebook names, with or without folder and .ipynb, as stems; none: all of them."""
    stems = [Path(name).name.removesuffix(".ipynb") for name in names]
    for name, stem in zip(names, stems):
        if stem not in NOTEBOOKS:
            raise UserError(f"unknown notebook {name!r}; allowed: {', '.join(NOTEBOOKS)}")
    return list(dict.fromkeys(stems)) or list(NOTEBOOKS)


def recipes_of(
    stems: Iterable[str], store: Store, seeds: Iterable[int], overrides: dict[str, Any]
) -> dict[Any, Any]:
    """Every recipe that notebooks ask for, by (notebook, experiment, the recipe's key)."""
    return {
        (stem, experiment.__name__, *key): recipe
        for stem in stems
        for experiment in NOTEBOOKS[stem]
        for seed in seeds
        for key, recipe in experiment(store, seed, overrides).items()
    }


def reproduce_command(
    notebook: str, preset: str, seeds: Iterable[int], overrides: dict[str, Any]
) -> str:
    """What to type to train what a notebook asks for."""
    seeds = " ".join(map(str, seeds))
    text = f"mas reproduce {notebook} --preset {preset}" + f" --seeds {seeds}" * (seeds != "0")
    return text + set_options(overrides)


def set_options(overrides: dict[str, Any]) -> str:
    """Overrides as a command line gives them: " --set fl.local_epochs=2"."""

    def text(value: Any) -> str:
        if isinstance(value, tuple | list):
            return ",".join(":".join(map(str, v)) if isinstance(v, tuple | list) else str(v)
                            for v in value)  # fmt: skip
        return "none" if value is None else str(value)

    return "".join(f" --set {shlex.quote(f'{k}={text(v)}')}" for k, v in overrides.items())


class Missing(LookupError):
    """Some trajectories are not on record; the message is the command that trains them."""


def ask(
    experiment: Experiment,
    store: Store,
    seeds: Iterable[int] = (0,),
    overrides: dict[str, Any] | None = None,
    train_missing: bool = False,
    data_folder: str | None = None,
    partial: bool = False,
    command: str | None = None,
) -> dict[Key, Any]:
    """What every recipe of an experiment returned, by key, for all seeds.

    Trains what is missing only with `train_missing`. Otherwise raises Missing, which names the
    command, or with `partial` leaves out the recipes whose trajectories are not all on record.
    """
    recipes: Recipes = {}
    seeds = list(seeds)
    if not seeds and not partial:
        raise UserError("seeds=[]; name at least one")
    for seed in seeds:
        recipes |= experiment(store, seed, overrides or {})
    if train_missing:
        base = settings(store.preset, overrides=overrides)
        return train_recipes(recipes, store, base, data_folder, Compute())
    results, missing = collect(recipes, store)
    if missing and not partial:
        names = [stem for stem, asked in NOTEBOOKS.items() if experiment in asked]
        tell = command or "ask(..., train_missing=True)"
        if names and not command:
            tell = reproduce_command(names[0], store.preset, seeds, overrides or {})
        count = len({need.trajectory.id for need in missing})
        raise Missing(f"at least {count} trajectories are not on record; train them with: {tell}")
    return results
