"""Held-out losses and the best constant's, against plain sums over images and pixels."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mas_core.models import MultiTaskNet
from mas_core.records.evaluate import constant_losses, evaluate
from mas_core.tasks import Batch, Task, TaskTable, cross_entropy, task_losses

CPU = torch.device("cpu")
LETTERS = "sdnkterca"


@pytest.fixture
def net():
    """Nine tasks, with running statistics that are not those of any batch."""
    made = MultiTaskNet(LETTERS, "tiny", 4, seed=1)
    for m in made.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.fill_(0.1)
            m.running_var.fill_(2.0)
    return made.train()


def test_every_image_counts_once_however_batches_fall(net, opened):
    """Without s, whose mean goes over the labelled pixels of a batch."""
    parts = [evaluate(net, opened.evaluation("test", LETTERS, n, CPU)) for n in (1, 3, 64)]
    for a in "dnkterca":
        assert parts[1][a] == pytest.approx(parts[0][a], rel=1e-5)
        assert parts[2][a] == pytest.approx(parts[0][a], rel=1e-5)
    uneven = [len(b) for b in opened.evaluation("test", LETTERS, 3, CPU)]
    assert sum(uneven) == 8 and uneven[-1] < 3  # a mean over batches would be another


def test_losses_of_a_batch_by_running_statistics(net, opened):
    batches = list(opened.evaluation("val", LETTERS, 64, CPU))
    assert len(batches) == 1
    found = evaluate(net, batches)
    reference = copy.deepcopy(net).eval()
    with torch.no_grad():
        expected = task_losses(reference(batches[0].image), batches[0])
    assert list(found) == list(LETTERS)
    assert list(found.values()) == pytest.approx(expected.tolist(), rel=1e-6)
    with torch.no_grad():
        by_batch = task_losses(net.train()(batches[0].image), batches[0])
    assert (by_batch - expected).abs().max() > 1e-3  # statistics matter here


def test_evaluating_changes_no_weight_and_no_statistic(net, opened):
    before = copy.deepcopy(net.state_dict())
    evaluate(net, opened.evaluation("val", LETTERS, 64, CPU))
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_losses_are_named_right_in_whatever_order_a_network_returns_outputs(net, opened):
    class Reversed(torch.nn.Module):
        tasks = LETTERS

        def forward(self, image):
            return dict(reversed(net(image).items()))

    wrapped = Reversed()
    wrapped.eval = net.eval
    batches = list(opened.evaluation("val", LETTERS, 64, CPU))
    assert evaluate(wrapped, batches) == evaluate(net, batches)


def test_nothing_to_evaluate_on(net):
    with pytest.raises(ValueError, match="no images"):
        evaluate(net, [])


def constant_by_hand(data, a, constant, split):
    """Mean loss over all images of predicting one number a channel everywhere."""
    total, images = 0.0, 0
    for batch in data.evaluation(split, a, 64, CPU):
        output = constant.view(1, -1, 1, 1).expand(len(batch), -1, *batch.image.shape[2:])
        total += task_losses({a: output}, batch)[0].item() * len(batch)
        images += len(batch)
    return total / images


@pytest.mark.parametrize("a", "kta")
def test_the_best_constant_is_the_median_of_the_training_pixels(opened, a):
    pixels = torch.cat(
        [b.targets[a].permute(0, 2, 3, 1).flatten(0, 2)
         for b in opened.evaluation("train", a, 64, CPU)]
    )  # fmt: skip
    median = torch.quantile(pixels, 0.5, dim=0, interpolation="lower")
    expected = constant_by_hand(opened, a, median, "test")
    assert constant_losses(opened, a, CPU)[a] == pytest.approx(expected, rel=1e-6)
    best = constant_by_hand(opened, a, median, "train")
    for shift in (-0.05, 0.05):  # no other constant is better where it was fitted
        assert constant_by_hand(opened, a, median + shift, "train") > best


@pytest.mark.parametrize("a", "erc")
def test_masked_tasks_take_the_median_of_valid_pixels(opened, a):
    batches = list(opened.evaluation("train", a, 64, CPU))
    pixels = torch.cat(
        [b.targets[a].permute(0, 2, 3, 1)[b.mask[:, 0] > 0] for b in batches]
    )  # fmt: skip
    assert 0.5 < len(pixels) / (48 * 16 * 16) < 0.95  # some are not valid
    median = torch.quantile(pixels, 0.5, dim=0, interpolation="lower")
    expected = constant_by_hand(opened, a, median, "test")
    assert constant_losses(opened, a, CPU)[a] == pytest.approx(expected, rel=1e-6)


def test_the_best_constant_for_classes_is_their_frequency(opened):
    labels = torch.cat([b.targets["s"].flatten() for b in opened.evaluation("train", "s", 64, CPU)])
    counts = torch.bincount(labels[labels > 0], minlength=18).double()
    p = counts / counts.sum()
    expected = constant_by_hand(opened, "s", p.clamp(min=1e-9).log().float(), "test")
    # Classes that were never seen, 0 among them, count as seen once.
    assert constant_losses(opened, "s", CPU)["s"] == pytest.approx(expected, abs=5e-3)
    uniform = constant_by_hand(opened, "s", torch.zeros(18), "test")
    assert constant_losses(opened, "s", CPU)["s"] < uniform


def test_constants_of_targets_of_any_rank():
    """A vector a sample and a class a sample: medians by channel, class frequencies."""
    x = np.array([[1.0, 5.0], [2.0, 6.0], [9.0, 7.0]], dtype=np.float32)
    values, classes = torch.from_numpy(x), torch.tensor([1, 1, 2])
    table = TaskTable(Task("v", "", "", "uint8", 2, loss=lambda o, t, m: (o - t).abs().mean()),
                      Task("c", "", "", "uint8", 3, loss=cross_entropy, classes=True))  # fmt: skip
    batch = Batch(torch.zeros(3, 4), torch.ones(3, 1), {"v": values, "c": classes}, table)
    data = SimpleNamespace(names=["a"], evaluation=lambda *given: [batch])
    found = constant_losses(data, "vc", CPU)
    assert found["v"] == pytest.approx(np.abs(x - [2.0, 6.0]).mean())
    assert found["c"] == pytest.approx(-(2 * np.log(2 / 4) + np.log(1 / 4)) / 3, rel=1e-5)


def test_constants_of_all_tasks_together_and_from_a_sample(opened):
    together = constant_losses(opened, LETTERS, CPU)
    assert list(together) == list(LETTERS)
    for a in "sdc":
        assert together[a] == pytest.approx(constant_losses(opened, a, CPU)[a], rel=1e-6)
    sampled = constant_losses(opened, "k", CPU, batches_per_client=1)
    assert sampled["k"] != together["k"] and sampled["k"] == pytest.approx(together["k"], rel=0.2)
