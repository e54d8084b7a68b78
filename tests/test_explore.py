"""What explore_affinities.ipynb draws while its controls move; what it tells without records."""

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import mas

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
import explore  # noqa: E402


@pytest.fixture
def store():
    yield mas.open_store("small", ROOT / "results")
    plt.close("all")


def test_a_view_has_the_split_of_mas_and_its_loss(store):
    study = mas.Study("sdnkt", mas.settings("small", "sdnkt"), 0, store)
    figure, table = explore.view(store, {}, "sdnkt", 0, 30, 2, "Eq. 3", explore.WINDOWS[1])
    best = mas.best_split(study.affinities(10), 2)
    assert table.groups[0] == explore.named(best.groups, "sdnkt")
    assert table["score x 1000"][0] == pytest.approx(1000 * best.score)
    found = mas.experiments.ask(mas.experiments.figure_5, store, partial=True)
    assert table["total test loss"][0] == found["MAS-2", "sdnkt", 0].total
    assert table["total test loss"][0] < table["total test loss"][1] and len(figure.axes) == 3


def test_rounds_read(store):
    _, record = explore.measured(store, "sdnkt", 0, {}, "lookahead")
    of = np.nan_to_num(record.values.mean(1))
    usual = mas.settings("small").mas
    for window, rows, words in zip(explore.WINDOWS, (slice(0, 30), slice(0, 10), slice(20, 30)),
                                   ("0 to 29", "0 to 9", "20 to 29")):  # fmt: skip
        S, said = explore.read(record, usual, window)
        assert np.allclose(S, of[rows].mean(0)) and said == f"mean of rounds {words}"
    S, said = explore.read(record, replace(usual, affinity_rounds=3))
    assert np.allclose(S, of[:3].mean(0)) and said == "mean of rounds 0 to 2"
    S, said = explore.read(record, replace(usual, affinity_rounds=7, affinity_at="last"))
    assert np.allclose(S, of[6]) and said == "round 6"


def test_what_mas_is_told_to_read_is_what_is_drawn(store):
    overrides = {"mas.affinity_at": "last", "mas.affinity_rounds": 7}
    study = mas.Study("sdnkt", mas.settings("small", "sdnkt", overrides), 0, store)
    _, table = explore.view(store, overrides, "sdnkt", 0, 30, 3, "Eq. 3", explore.WINDOWS[1])
    best = mas.best_split(study.affinities(7, 30, "last"), 3)
    assert table.groups[0] == explore.named(best.groups, "sdnkt")
    assert table["score x 1000"][0] == pytest.approx(1000 * best.score)


def test_what_is_missing_is_told_with_its_command(store):
    with pytest.raises(explore.Missing, match="--seed 99 --set fl.affinity=cosine"):
        explore.view(store, {}, "sdnkt", 99, 30, 2, "cosine", explore.WINDOWS[0])
    with pytest.raises(explore.Missing, match="in rounds 0 to 9 alone"):
        explore.view(store, {}, "sdnkt", 0, 60, 2, "cosine", explore.WINDOWS[2])
    _, table = explore.view(store, {}, "sdnkt", 1, 55, 2, "Eq. 3", explore.WINDOWS[0])
    assert table["total test loss"].isna().all()


def test_controls_draw_and_tell(store, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(explore, "display", lambda bundle, raw: shown.append(bundle))
    monkeypatch.setattr(plt, "show", lambda: shown.append("figure"))
    made = explore.controls(store, {}, "sdnkt", 0)
    assert shown[0] == "figure" and shown[1]["text/plain"] == explore.NOTE
    made["seed"].value = 99
    assert "no record: affinities by lookahead of sdnkt, seed 99" in capsys.readouterr().out
    made["seed"].value, made["tasks"].value, made["x"].value = 1, "erckt", 8  # as many as there are
    assert shown[-1] == "figure" and "4 groups" in plt.gcf().axes[1].get_title()
