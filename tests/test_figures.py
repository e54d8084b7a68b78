"""What the notebooks' figures share: tables of numbers, names at curves, bands of noise."""

import sys
from math import nan
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
import common  # noqa: E402


def test_beside_keeps_numbers():
    runs = pd.DataFrame({"method": ["MAS-2", "MAS-2", "one-by-one"], "total": [1.0, 2.0, 3.0]})
    printed = pd.DataFrame({"method": ["one-by-one", "HOA-2"], "metric": "total",
                            "mean": ["0.60", "0.65"], "std": ["0.03", ""]})  # fmt: skip
    table = common.beside(runs, printed, {"total": ("total", "total")}, spread=["total"])
    assert table.index.tolist() == ["one-by-one", "HOA-2", "MAS-2"]
    assert table["total", "ours"].tolist() == pytest.approx([3.0, nan, 1.5], nan_ok=True)
    assert table["total", "±"]["MAS-2"] == pytest.approx(0.5**0.5)
    assert table["total", "paper"].tolist() == pytest.approx([0.6, 0.65, nan], nan_ok=True)
    assert table["total", "paper ±"]["one-by-one"] == 0.03


def test_names_at_ends_are_moved_as_little_as_possible():
    _, ax = plt.subplots()
    ax.set_ylim(0, 1)
    common.label_ends(ax, [(1, 0.5, "a", "k"), (1, 0.5, "b", "k"), (1, 0.9, "c", "k")], apart=0.1)
    places = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert places == pytest.approx({"a": 0.45, "b": 0.55, "c": 0.9})
    plt.close(ax.figure)


def test_a_name_stands_on_its_own_curve():
    x = np.arange(100)
    curves = pd.DataFrame({"a": 1.0 + 0 * x, "b": np.where(x < 50, 1.0, 3.0)}, index=x)
    _, ax = plt.subplots()
    ax.plot(curves)
    common.label_curves(ax, curves, {"a": "k", "b": "k"})
    for text in ax.texts:
        x0, y0 = text.get_position()
        assert x0 >= 50 and y0 == curves[text.get_text()][x0]
    plt.close(ax.figure)


def test_noise_of_a_curve_of_several_seeds_forgets_their_level():
    x = [10.0, 20.0, 30.0]
    curves = pd.DataFrame([[1.0, 2.0, 4.0], [11.0, 12.0, 14.0], [21.0, 22.0, 24.0]], columns=x)
    _, ax = plt.subplots()
    common.draw_curve(ax, curves, "o-", "k", "same shape")
    (band,) = ax.collections
    y = band.get_paths()[0].vertices[:, 1]
    assert y.min() == pytest.approx(11.0) and y.max() == pytest.approx(14.0)  # no width at all
    plt.close(ax.figure)
