"""Predictors of what a task gains in a group, from the groups that were trained.

`gains` holds per cent of a task's loss saved against training alone, by (group, task), for groups
of two tasks and more; both are letters. A predictor is a function of the gains it may look at,
a group and one of its tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Gains = Mapping[tuple[str, str], float]
Predictor = Callable[[Gains, str, str], float]
ALPHAS = np.logspace(-6, 2, 20)  # strengths of ridge among which ETAP chooses


def gains_of(losses: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, str], float]:
    """Gains from the losses by task of every group trained, single tasks among them."""
    return {
        (group, a): 100 * (1 - loss / losses[a][a])
        for group, of_tasks in losses.items()
        if len(group) > 1
        for a, loss in of_tasks.items()
    }


def task_mean(gains: Gains, group: str, task: str) -> float:
    """The task's mean gain over all groups: what a predictor has to beat."""
    return float(np.mean([g for (_, a), g in gains.items() if a == task]))


def subset_mean(gains: Gains, group: str, task: str) -> float:
    """Mean over the group's other tasks j of T[j, task] (Li et al., KDD 2023).

    T[j, task] is the task's mean gain over all groups that hold j.
    """
    T = [[g for (other, a), g in gains.items() if a == task and j in other] for j in group]
    return float(np.mean([np.mean(t) for j, t in zip(group, T) if j != task and t]))


def affinity_line(score: Gains) -> Predictor:
    """A straight line, fitted for each task, from a group's affinity onto the task to its gain."""

    def predict(gains: Gains, group: str, task: str) -> float:
        x, y = np.array([(score[key], g) for key, g in gains.items() if key[1] == task]).T
        slope = np.cov(x, y, ddof=0)[0, 1] / max(x.var(), 1e-12)
        return float(y.mean() + slope * (score[group, task] - x.mean()))

    return predict


def ridge_after(base: Predictor) -> Predictor:
    """`base`, and a ridge of what it leaves on which tasks are in the group.

    The last stage of ETAP (Ayman et al., ICLR 2026); alpha is that of the least leave-one-out error
    among `ALPHAS` (theirs: five folds). Their second stage, splines, wants more groups than five
    tasks have.
    """

    def predict(gains: Gains, group: str, task: str) -> float:
        keys = [key for key in gains if key[1] == task]
        others = sorted({a for _, a in gains} - {task})
        X = np.array([[a in g for a in others] for g, _ in keys], float)
        left = np.array([gains[key] - base(gains, *key) for key in keys])
        x = np.array([a in group for a in others], float) - X.mean(0)
        X, y = X - X.mean(0), left - left.mean()
        fits = []
        for alpha in ALPHAS:
            to_weights = np.linalg.solve(X.T @ X + alpha * np.eye(len(others)), X.T)
            leverage = np.clip(1 / len(y) + np.einsum("ij,ji->i", X, to_weights), 0, 1 - 1e-9)
            error = (y - X @ to_weights @ y) / (1 - leverage)
            fits.append((float(error @ error), alpha, to_weights @ y))
        return base(gains, group, task) + left.mean() + float(x @ min(fits, key=lambda f: f[:2])[2])

    return predict


def leave_groups_out(
    gains: Gains, predict: Predictor
) -> tuple[float, dict[tuple[str, str], float]]:
    """R2 and predictions where each group in turn is hidden with the gains of all its tasks.

    R2 = 1 - sum (gain - predicted)^2 / sum (gain - task's mean over the other groups)^2.
    """
    found, means = {}, {}
    for group in dict.fromkeys(g for g, _ in gains):
        seen = {key: g for key, g in gains.items() if key[0] != group}
        for a in group:
            found[group, a] = predict(seen, group, a)
            means[group, a] = task_mean(seen, group, a)

    def squares(values: Gains) -> float:
        return sum((g - values[key]) ** 2 for key, g in gains.items())

    return 1 - squares(found) / squares(means), found
