"""Eq. 3 against a naive deep-copy reference, and what measuring must not touch."""

import copy

import pytest
import torch
from torch import nn

from mas_core.affinity import (
    cosine_affinity,
    encoder_gradients,
    first_order_affinity,
    frozen_statistics,
    lookahead_affinity,
    representation_affinity,
)
from mas_core.models import MultiTaskNet, forward_tasks
from mas_core.tasks import task_losses

LR = 0.1


@pytest.fixture
def net():
    """A network some steps away from its start, so that losses and gradients are uneven."""
    made = MultiTaskNet("sdnkt", "tiny", 4, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return made.train()


def losses_of(net, batch):
    features = net.encoder(batch.image)
    return task_losses({a: net.decoders[a](features) for a in net.tasks}, batch)


def naive(net, batch, lr):
    """Eq. 3 as it stands: for each task a copy of the network, one SGD step on its encoder."""
    n = len(net.tasks)
    S = torch.zeros(n, n)
    for i in range(n):
        after = copy.deepcopy(net).train()
        before = losses_of(after, batch)
        optimizer = torch.optim.SGD(after.encoder.parameters(), lr)
        optimizer.zero_grad()
        before[i].backward()
        optimizer.step()
        with torch.no_grad():
            S[i] = 1 - losses_of(after, batch) / before.detach()
    return S


def test_equals_the_naive_reference(net, batch):
    made = batch("sdnkt", images=6)
    S, expected = lookahead_affinity(net, made, LR), naive(net, made, LR)
    assert S.dtype == torch.float32 and S.shape == (5, 5)
    torch.testing.assert_close(S, expected, rtol=0, atol=3e-6)
    # The tolerance sees what the test is for: other directions, other rows, other batches.
    assert (expected - expected.T).abs().max() > 1e-3
    assert (expected - naive(net, batch("sdnkt", 6, seed=1), LR)).abs().max() > 1e-3


def test_row_updates_and_column_receives(net, batch):
    """With the encoder's step of task i alone made by hand, row i follows and no other."""
    made = batch("sdnkt")
    S = lookahead_affinity(net, made, LR)
    before = losses_of(net, made)
    gradients = torch.autograd.grad(before[3], list(net.encoder.parameters()))
    with torch.no_grad():
        for p, g in zip(net.encoder.parameters(), gradients, strict=True):
            p.sub_(LR * g)
        after = losses_of(net, made)
    torch.testing.assert_close(S[3], 1 - after / before.detach(), rtol=0, atol=3e-6)


def test_a_task_without_labels_in_a_batch_has_no_affinity(net, batch):
    """Its loss is 0 before and after any step, and its own step moves nothing: 0, not NaN."""
    made = batch("sdnkt")
    made.targets["s"].zero_()
    S = lookahead_affinity(net, made, LR)
    assert S[:, 0].tolist() == S[0].tolist() == [0.0] * 5
    assert S.isfinite().all() and (S[1:, 1:] != 0).all()


def test_without_the_diagonal_the_rest_is_equal(net, batch):
    made = batch("sdnkt")
    S = lookahead_affinity(net, made, LR, diagonal=False)
    assert torch.isnan(S.diagonal()).all() and torch.isnan(S).sum() == 5
    off = ~torch.eye(5, dtype=torch.bool)
    assert torch.equal(S[off], lookahead_affinity(net, made, LR)[off])


def test_one_task_has_only_itself(batch):
    single, made = MultiTaskNet("k", "tiny", 4), batch("k")
    S = lookahead_affinity(single, made, LR)
    torch.testing.assert_close(S, naive(single, made, LR), rtol=0, atol=3e-6)
    assert torch.isnan(lookahead_affinity(single, made, LR, diagonal=False)).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_measuring_leaves_everything_bit_identical(net, batch, training, with_gradients):
    made = batch("sdnkt")
    if with_gradients:  # as in the midst of an accumulation
        losses_of(net, batch("sdnkt", seed=5)).sum().backward()
    net.train(training)
    state = copy.deepcopy(net.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    image, rng = made.image.clone(), torch.get_rng_state()
    S = lookahead_affinity(net, made, LR)
    assert all(torch.equal(t, state[k]) for k, t in net.state_dict().items())
    for p, g in zip(net.parameters(), gradients, strict=True):
        assert (p.grad is None) == (g is None) and (g is None or torch.equal(p.grad, g))
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(made.image, image)
    assert all(m.training == training for m in net.modules())
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert torch.equal(lookahead_affinity(net, made, LR), S)  # and can be repeated


def test_every_kind_of_batch_norm_keeps_its_statistics():
    untracked = nn.BatchNorm1d(2, track_running_stats=False)
    instance = nn.InstanceNorm1d(2, momentum=0.3, track_running_stats=True)
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=None), untracked, instance)
    state = copy.deepcopy(model.state_dict())
    with frozen_statistics(model):
        model(torch.randn(5, 2, 3))
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert [m.track_running_stats for m in model] == [True, False, True]
    assert [m.momentum for m in model] == [None, 0.1, 0.3]


def test_a_part_in_another_mode_keeps_it(net, batch):
    net.decoders["d"].eval()
    lookahead_affinity(net, batch("sdnkt"), LR)
    assert net.training and not any(m.training for m in net.decoders["d"].modules())


def test_batch_norm_uses_the_batch_in_whatever_mode_the_model_is(net, batch):
    made = batch("sdnkt")
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean += 3.0  # statistics that would give other losses
    S = lookahead_affinity(net.train(), made, LR)
    assert torch.equal(lookahead_affinity(net.eval(), made, LR), S)


@pytest.mark.parametrize("largest", range(5))
@pytest.mark.parametrize("scale", [1.0, 5**-0.5])
def test_the_difference_is_right_whichever_task_is_the_largest(net, batch, largest, scale):
    """One gradient is the sum less the others; weights make each task that one in turn."""
    made = batch("sdnkt")
    weights = torch.full((5,), 0.5)
    weights[largest] = 50.0
    step = forward_tasks(net, made)
    at_features = step.backward_decoders(weights)
    norms = [float(g.norm()) for g in at_features]
    assert norms.index(max(norms)) == largest
    found = encoder_gradients(net, step, at_features, scale)
    filled = [p.grad.clone() for p in net.encoder.parameters()]

    weighted = losses_of(net, made) * weights * scale
    parameters = list(net.encoder.parameters())
    total = torch.autograd.grad(weighted.sum(), parameters, retain_graph=True)
    size = torch.cat([g.flatten() for g in total]).norm()
    for a, b in zip(filled, total, strict=True):
        assert (a - b).norm() < 1e-5 * size
    for i in range(5):
        expected = torch.autograd.grad(weighted[i], parameters, retain_graph=True)
        flat = torch.cat([g.flatten() for g in expected])
        error = torch.cat([g.flatten() for g in found[i]]) - flat
        assert error.norm() < (1e-5 if i != largest else 1e-4) * flat.norm()


def test_a_gpu_makes_a_pass_for_every_task_and_finds_the_same(net, batch, monkeypatch):
    images = batch("sdnkt", images=4)

    def found():
        net.zero_grad()
        step = forward_tasks(net, images)
        gradients = encoder_gradients(net, step, step.backward_decoders())
        return [*gradients, [p.grad.clone() for p in net.encoder.parameters()]]

    usual = found()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for a, b in zip(usual, found(), strict=True):
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_first_order_affinity_is_the_limit_of_eq_3(net, batch):
    made = batch("sdnkt")
    step = forward_tasks(net, made)
    gradients = encoder_gradients(net, step, step.backward_decoders())
    losses = step.losses.detach()
    errors, sizes = [], []
    for lr in (0.002, 0.001, 0.0005):
        first = first_order_affinity(losses, gradients, lr)
        exact = lookahead_affinity(net, made, lr)
        errors.append(float((exact - first).norm()))
        sizes.append(float(exact.norm()))
    # The remainder falls faster than the affinity itself, which halves with lr.
    assert errors[1] < 0.4 * errors[0] and errors[2] < 0.4 * errors[1]
    assert errors[2] < 0.05 * sizes[2]


def test_first_order_affinity_by_hand():
    losses = torch.tensor([2.0, 4.0])
    gradients = [
        [torch.tensor([[1.0, 0.0]]), torch.tensor([2.0])],
        [torch.tensor([[3.0, 5.0]]), torch.tensor([-1.0])],
    ]
    # Inner products: 5, 1, 35; column j is divided by L_j.
    expected = torch.tensor([[0.1 * 5 / 2, 0.1 * 1 / 4], [0.1 * 1 / 2, 0.1 * 35 / 4]])
    torch.testing.assert_close(first_order_affinity(losses, gradients, 0.1), expected)
    unlabelled = first_order_affinity(torch.tensor([2.0, 0.0]), gradients, 0.1)
    torch.testing.assert_close(unlabelled, expected * torch.tensor([1.0, 0.0]))


def test_cosine_affinity_by_hand():
    """g = (1, 0, 2), (3, 5, -1): inner products 5, 1, 35, so cos = 1 / sqrt(5 x 35)."""
    gradients = [
        [torch.tensor([[1.0, 0.0]]), torch.tensor([2.0])],
        [torch.tensor([[3.0, 5.0]]), torch.tensor([-1.0])],
    ]
    S, cos = cosine_affinity(torch.tensor([2.0, 4.0]), gradients, 0.1), 175**-0.5
    torch.testing.assert_close(S, torch.tensor([[1.0, cos], [cos, 1.0]]))


def test_representation_affinity_by_hand():
    losses = torch.tensor([2.0, 4.0])
    at_features = [torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, -1.0]]]])]
    expected = torch.tensor([[0.5 * 5 / 2, 0.5 * 1 / 4], [0.5 * 1 / 2, 0.5 * 10 / 4]])
    torch.testing.assert_close(representation_affinity(losses, at_features, 0.5), expected)


def test_representation_affinity_is_a_step_on_the_features(net, batch):
    """lr <dL_i/dz, dL_j/dz> / L_j is how L_j falls when z, not theta_s, takes task i's step."""
    made, lr = batch("sdnkt"), 1e-2
    step = forward_tasks(net, made)
    at_features = step.backward_decoders()
    S = representation_affinity(step.losses.detach(), at_features, lr)
    with torch.no_grad():
        stepped = step.features - lr * at_features[2]
        after = task_losses({a: net.decoders[a](stepped) for a in net.tasks}, made)
    measured = 1 - after / step.losses.detach()
    assert (measured - S[2]).abs().max() < 0.1 * S[2].abs().max()
