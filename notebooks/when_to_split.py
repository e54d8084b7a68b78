"""When to split: rules that choose R0 from what the server has seen so far.

Each rule reads rounds 0 to r - 1 of the merged training and says whether to split after r rounds.
The thresholds were written down before the regimes of `experiments.when_to_split` were trained, and
are frozen. `mas_auto` is MAS with such a rule in the place of a fixed R0.

    A  the smoothed affinity between groups has fallen below 0.7 of its peak
    B  the last three validations lowered the loss by less than 25 % of its whole fall
    C  the split is the same for 90 % of resampled clients at three checks in a row
    D  the smoothed fall of the training loss is below 0.3 of what it was at the start

A warning that splitting now is worse than staying merged. Written down before MAS-2 was compared
with all-in-one at any R0 on record, by someone who knew the table of regrets above: all-in-one lies
1.0 to 6.4 % above the best R0, and a restart after 80 of 100 rounds 1.9 to 4.4 %.

Hypotheses
    1  A restart raises the learning rate again. It costs where the rounds left are too few for the
       raised rate to settle, so a threshold on the rounds left tells where.
    2  Without a restart the split costs nothing worth a warning: rules never warn there.
    3  How many rounds are too few depends on how fast the merged training settled: a rule that
       reads B has fewer errors than one that reads the clock.

Candidates, each with one threshold; all warn of a restart alone
    left      the share of rounds left, (R - r) / R, is below it
    settled   the same, and B and D both see the loss level off
    pace      the rounds left are below so many times the rounds that the merged training took
              until B first saw its validation loss level off (r where B has not yet)

Rule of judgement
    A point is a regime (tasks, E, schedule) and an R0. It is positive where the total test loss of
    MAS-2 lies above that of all-in-one of the same seed, by more than 0 %, and by more than 1 %
    (less is within the noise of a seed). Thresholds are chosen by leave-one-trunk-out: for the
    points of a trunk (tasks, E; both schedules share it) the threshold with the fewest errors on
    all other trunks, the lowest of equals. Hits, misses and false alarms are told as counts. A
    candidate is of use if it has fewer errors, misses and false alarms together, than never
    warning, at the margin of 1 %; of several the one with the fewest errors is taken, in the order
    above where equal, with the threshold that all trunks give. R0 of a trunk depend on one another
    and trunks are few, so no p value is given.

Written after that (`open_questions.ipynb` has the counts): no candidate is of use at 1 %, where
hardly any point is positive. `worse_than_merged` is "left" with the threshold that all trunks give,
the same at both margins. It is a hint, not a finding, and `mas_auto` hands it on as such.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd

from mas import methods
from mas_core.config import stream
from mas_core.methods import Need
from mas_core.records.study import MethodResult, Study
from mas_core.split import best_split

EVERY = 5  # rounds between two looks
SMOOTH = 10  # rounds that are averaged


class Seen:
    """What a server has seen of a merged training: losses and affinities by round."""

    def __init__(self, rounds, affinities, tasks, first, splits=2):
        self.train = rounds[[f"train_{a}" for a in tasks]].sum(axis=1).to_numpy()
        validated = rounds[rounds[f"val_{tasks[0]}"].notna()]
        self.val_rounds = validated["round"].to_numpy() + 1
        self.val = validated[[f"val_{a}" for a in tasks]].sum(axis=1).to_numpy()
        self.S = affinities.values  # (T, K, n, n)
        self.first, self.splits = first, splits

    def groups(self, values):
        """The split by affinities (..., n, n), averaged over all but the last two axes."""
        S = values.reshape(-1, *values.shape[-2:]).mean(0)
        np.fill_diagonal(S, 0.0)
        return best_split(S, self.splits).groups


def rule_a(seen, r):
    groups = seen.groups(seen.S[: seen.first])
    where = {t: i for i, g in enumerate(groups) for t in g}
    n = seen.S.shape[-1]
    across = [(i, j) for i in range(n) for j in range(n) if where[i] != where[j]]
    mean = np.mean([seen.S[:r, :, i, j].mean(1) for i, j in across], 0)
    if len(mean) < SMOOTH:
        return False
    smooth = np.convolve(mean, np.full(SMOOTH, 1 / SMOOTH), "valid")
    return bool(smooth[-1] < 0.7 * smooth.max())


def rule_b(seen, r):
    val = seen.val[seen.val_rounds <= r]
    return len(val) >= 4 and bool(val[-4] - val[-1] < 0.25 * (val[0] - val[-1]))


def rule_c(seen, r):
    return r >= seen.first + 2 * EVERY and all(_stable(seen, at) for at in (r - 2 * EVERY, r - EVERY, r))


def _stable(seen, r, draws=100):
    """Whether 90 % of resamples of (round, client) give the split of all of them."""
    S = seen.S[:r].reshape(-1, *seen.S.shape[-2:])
    usual, rng = seen.groups(S), stream(0, "resample", r)
    same = [seen.groups(S[rng.integers(len(S), size=len(S))]) == usual for _ in range(draws)]
    return np.mean(same) >= 0.9


def rule_d(seen, r):
    if r < 2 * SMOOTH:
        return False

    def fall(end):
        return seen.train[end - 2 * SMOOTH : end - SMOOTH].mean() - seen.train[end - SMOOTH : end].mean()

    return bool(fall(r) < 0.3 * fall(2 * SMOOTH))


RULES = {"A": rule_a, "B": rule_b, "C": rule_c, "D": rule_d}


def left(seen, r, R):
    """The share of rounds that a split after r of R rounds leaves."""
    return (R - r) / R


def settled(seen, r, R):
    """The share left where B and D see the loss level off, else infinite."""
    return left(seen, r, R) if rule_b(seen, r) and rule_d(seen, r) else np.inf


def pace(seen, r, R):
    """Rounds left over the rounds until B first saw the loss level off."""
    return (R - r) / next((at for at in range(EVERY, r, EVERY) if rule_b(seen, at)), r)


# A restart is warned of where this lies below a threshold; each with the thresholds tried.
CANDIDATES = {"left": (left, np.arange(0, 1, 0.05)), "settled": (settled, np.arange(0, 1, 0.05)),
              "pace": (pace, np.arange(0, 5, 0.25))}  # fmt: skip
FEW = 0.15  # share of rounds left below which a restart is warned of


def worse_than_merged(seen, r, R, schedule):
    """Whether to warn that a split after r of R rounds is worse than staying merged.

    schedule: of the learning rate after the split, "restart" or "continue".
    """
    return schedule == "restart" and left(seen, r, R) < FEW


def alarms(points, candidate, threshold):
    """Which points a candidate with a threshold warns of."""
    return (points["schedule"] == "restart") & (points[candidate] < threshold)


def threshold(points, candidate, margin):
    """The threshold of fewest errors at a margin in per cent of loss, the lowest of equals."""
    tried = CANDIDATES[candidate][1]
    worse = points["worse"] > margin
    errors = [(alarms(points, candidate, at) != worse).sum() for at in tried]
    return float(tried[np.argmin(errors)])


def judged(points, margin):
    """Counts of each candidate, thresholds chosen on all other trunks, below those of no warning.

    points: a row a regime and R0 with its trunk, schedule, `worse` (per cent of test loss above
    all-in-one's), and what each candidate reads.
    """
    rows, worse = [], points["worse"] > margin
    for name in ("never", *CANDIDATES):
        warned, chosen = pd.Series(False, points.index), float("nan")
        if name in CANDIDATES:
            chosen = threshold(points, name, margin)
            for _, own in points.groupby("trunk"):
                at = threshold(points.drop(own.index), name, margin)
                warned[own.index] = alarms(own, name, at)
        hits, misses, false = (warned & worse).sum(), (~warned & worse).sum(), (warned & ~worse).sum()
        rows.append({"worse by more than (%)": margin, "warning": name, "hits": hits, "misses": misses,
                     "false alarms": false, "errors": misses + false, "points": len(points),
                     "threshold of all": chosen})  # fmt: skip
    return pd.DataFrame(rows)


def seen_by(study, splits=2):
    """What is on record of a study's merged training."""
    trunk = study.all_in_one()
    return Seen(study.store.rounds(trunk), study.store.affinities(trunk), study.tasks,
                study.settings.mas.affinity_rounds, splits)  # fmt: skip


def looks(study):
    """The rounds after which a rule is asked: from the last affinity that a split reads."""
    return range(max(EVERY, study.settings.mas.affinity_rounds), study.rounds, EVERY)


def chosen_round(study, rule, splits=2):
    """The first round at which a rule wants to split; the last look where it never does."""
    seen = seen_by(study, splits)
    return next((r for r in looks(study) if RULES[rule](seen, r)), max(looks(study)))


@dataclass(frozen=True)
class Chosen(MethodResult):
    """What MAS with a rule returns: R0, and a warning where staying merged is likely better."""

    merge_rounds: int
    warning: str  # "" where there is none


def mas_auto(study, rule="B", splits=2):
    """MAS-x whose R0 a rule chooses while the merged network trains; a recipe like the package's."""
    for r in looks(study):
        yield [Need(study.all_in_one(), r)]
        seen = seen_by(study, splits)
        if RULES[rule](seen, r):
            break
    mas, R, warning = study.settings.mas, study.rounds, ""
    if worse_than_merged(seen, r, R, mas.lr_schedule):
        warning = (f"a split after {r} of {R} rounds restarts the learning rate for the last {R - r}: "
                   "staying merged is likely better; set mas.lr_schedule=continue, or split earlier")
    chosen = replace(study.settings, mas=replace(mas, merge_rounds=r))
    fixed = Study(study.tasks, chosen, study.seed, study.store)
    result = yield from methods.merge_and_split(fixed, splits)
    made = {f.name: getattr(result, f.name) for f in fields(result)} | {"method": f"MAS-auto-{splits}"}
    return Chosen(**made, merge_rounds=r, warning=warning)


def loss_at(curve, R0):
    """Total loss at R0, linear between the R0 of a curve (R0 -> loss) and flat beyond its ends."""
    at = sorted(curve)
    return float(np.interp(R0, at, [curve[r] for r in at]))


def regret(curve, R0):
    """Per cent of loss above the least of the curve."""
    return 100 * (loss_at(curve, R0) / min(curve.values()) - 1)
