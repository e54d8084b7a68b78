"""A captured training step, with a stand-in that runs it eagerly: no test has a GPU."""

import copy
from types import SimpleNamespace

import pytest
import torch

from mas.run.cuda_graph import CapturedSteps, GraphedStep, run_eagerly
from mas_core.config import FL
from mas_core.local import local_update
from mas_core.models import MultiTaskNet, autocast
from mas_core.records.training import placed

PLAIN = FL(batch_size=4, affinity_every=3)
LR = 0.01


@pytest.fixture
def batches(batch):
    """Seven batches, the sixth one smaller."""
    return [batch("dkt", images=3 if s == 5 else 4, seed=s) for s in range(7)]


@pytest.fixture
def net():
    return MultiTaskNet("dkt", "tiny", 4, seed=2).train()


def assert_same_weights(a, b):
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


@pytest.fixture
def stand_in():
    """Captured steps that run eagerly; `stand_in.built` lists those that were built."""

    def capture(net, batch, fl, scale, measure):
        if not capture.built:
            capture.built.append(GraphedStep(net, batch, fl, scale, measure, run_eagerly))
        return capture.built[0]

    capture.built = []
    return capture


def test_building_a_captured_step_leaves_the_network_as_it_was(net, batches):
    before = copy.deepcopy(net.state_dict())
    GraphedStep(net, batches[0], PLAIN, capture=run_eagerly)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("fl", [PLAIN, FL(momentum=0.0), FL(encoder_grad_scale="sqrt")])
def test_captured_steps_train_to_the_same_bits(net, batches, stand_in, fl, measure):
    other = copy.deepcopy(net)
    for lr in (LR, LR / 2):  # two clients: momentum starts anew, the learning rate changes
        result = local_update(net, batches, fl, lr, measure, capture=stand_in)
    assert len(stand_in.built) == 1
    for lr in (LR, LR / 2):
        expected = local_update(other, batches, fl, lr, measure)
    assert_same_weights(net, other)
    assert torch.equal(result.step_losses, expected.step_losses)
    assert result.samples == expected.samples == 27
    assert result.measurements == expected.measurements
    if measure:
        assert result.measurements == len(range(0, 7, fl.affinity_every))
        assert torch.equal(result.affinity.nan_to_num(), expected.affinity.nan_to_num())
        assert 0 < result.affinity_seconds < 60


@pytest.mark.parametrize("measure", [False, True])
def test_a_replay_that_computes_something_else_is_refused(net, batches, measure):
    def forgetful(step):
        losses = step()
        return lambda: losses, losses  # trains nothing

    with pytest.raises(AssertionError, match="not close"):
        GraphedStep(net, batches[0], PLAIN, measure=measure, capture=forgetful)


def test_a_replay_that_measures_something_else_is_refused(net, batches):
    def blind(step):
        found = step()

        def launch():
            found.copy_(step())
            found[3:] = 0  # the affinities

        return launch, found

    with pytest.raises(AssertionError, match="not close"):
        GraphedStep(net, batches[0], PLAIN, measure=True, capture=blind)


def test_a_capture_that_fails_leaves_the_network_as_it_was(net, batches):
    def failing(step):
        step()
        raise RuntimeError("cannot capture")

    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="cannot capture"):
        GraphedStep(net, batches[0], PLAIN, capture=failing)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("measure", [False, True])
def test_a_network_that_draws_numbers_is_not_captured(net, batches, measure):
    net.encoder.append(torch.nn.Dropout(0.5))
    before, weights = torch.get_rng_state(), copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="draws random numbers"):
        GraphedStep(net, batches[0], PLAIN, measure=measure, capture=run_eagerly)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_on_a_gpu_small_images_keep_float32_and_the_plain_layout(monkeypatch):
    def kept(device, memory_format):
        return memory_format

    net, gpu, cpu = SimpleNamespace(to=kept), torch.device("cuda"), torch.device("cpu")
    assert placed(net, gpu, 64) is torch.contiguous_format
    assert placed(net, gpu, 96) is placed(net, cpu, 32) is torch.channels_last
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: (dtype, enabled))
    for pixels, on_gpu, enabled in ((64, True, False), (96, True, True), (96, False, False)):
        image = SimpleNamespace(is_cuda=on_gpu, shape=(8, 3, pixels, pixels))
        assert autocast(image) == (torch.bfloat16, enabled)


def test_nothing_is_captured_without_a_gpu(net, batches):
    assert CapturedSteps()(net, batches[0], PLAIN, 1.0, False) is None
