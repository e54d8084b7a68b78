"""Local epochs against plain loops: SGD, FedProx, GradNorm, what is measured on the way."""

import copy
from dataclasses import replace

import pytest
import torch

from mas.rivals.gradnorm import INITIAL, WEIGHTS, GradNorm
from mas_core.affinity import lookahead_affinity
from mas_core.config import FL, MEASURES
from mas_core.local import local_update
from mas_core.models import MultiTaskNet
from mas_core.tasks import task_losses

PLAIN = FL(batch_size=4, affinity_every=3)
LR = 0.01  # a larger one lets rounding grow: L1 and the nine shifts have kinks


@pytest.fixture
def batches(batch):
    """Seven batches of different sizes."""
    return [batch("dkt", images=3 + s % 2, seed=s) for s in range(7)]


def fresh(tasks="dkt"):
    return MultiTaskNet(tasks, "tiny", 4, seed=2)


def states_equal(a, b):
    return all(torch.equal(t, b.state_dict()[k]) for k, t in a.state_dict().items())


def far(a, b):
    """The largest difference of two networks' weights."""
    return max(
        (p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def plain_loop(net, batches, fl, lr, scale=1.0, mu=0.0, weights=None):
    """SGD with everything written out in one loss; the encoder's gradient scaled afterwards."""
    net.train()
    server = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(
        net.parameters(), lr, momentum=fl.momentum, weight_decay=fl.weight_decay
    )
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        each = task_losses(net(batch.image), batch)
        (each if weights is None else each * weights).sum().backward()
        for p in net.encoder.parameters():
            p.grad *= scale
        if mu:
            drift = sum(((p - q) ** 2).sum() for p, q in zip(net.parameters(), server))
            (mu / 2 * drift).backward()
        optimizer.step()
        losses.append(each.detach())
    return torch.stack(losses)


def test_fedavg_is_plain_sgd_on_the_sum_of_the_losses(batches):
    net, reference = fresh(), fresh()
    result = local_update(net, batches, PLAIN, LR)
    losses = plain_loop(reference, batches, PLAIN, LR)
    assert far(net, fresh()) > 1e-2 and far(net, reference) < 2e-6
    torch.testing.assert_close(result.losses, losses.mean(0), rtol=1e-5, atol=1e-6)
    assert result.samples == sum(len(b) for b in batches) == 24
    assert (result.affinity, result.measurements, result.travelling) == (None, 0, {})
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-4, atol=1e-5)
    trained = {int(t) for k, t in net.state_dict().items() if k.endswith("num_batches_tracked")}
    assert trained == {7}


@pytest.mark.parametrize("field, value", [("momentum", 0.0), ("weight_decay", 0.1)])
def test_momentum_and_weight_decay_are_used(batches, field, value):
    fl = replace(PLAIN, **{field: value})
    net, reference, other = fresh(), fresh(), fresh()
    local_update(net, batches, fl, LR)
    plain_loop(reference, batches, fl, LR)
    plain_loop(other, batches, PLAIN, LR)
    assert far(net, reference) < 2e-5 < 1e-3 < far(net, other)


def test_the_optimizer_starts_anew_for_every_client(batches):
    """Momentum of one client must not reach the next."""
    net, reference = fresh(), fresh()
    for part in (batches[:3], batches[3:]):
        local_update(net, part, PLAIN, LR)
        plain_loop(reference, part, PLAIN, LR)
    carried = fresh()
    plain_loop(carried, batches, PLAIN, LR)
    assert far(net, reference) < 2e-5 < 1e-3 < far(net, carried)


def test_encoder_gradient_over_the_root_of_the_number_of_tasks(batches):
    fl = replace(PLAIN, encoder_grad_scale="sqrt", weight_decay=0.0)
    net, reference = fresh(), fresh()
    local_update(net, batches[:3], fl, LR)
    plain_loop(reference, batches[:3], fl, LR, scale=3**-0.5)
    assert far(net, reference) < 5e-5  # a kink may fall on either side; the effect is 1e-3
    unscaled = fresh()
    local_update(unscaled, batches[:3], replace(fl, encoder_grad_scale="none"), LR)
    assert far(net.encoder, unscaled.encoder) > 1e-3
    one, plain = fresh("k"), fresh("k")
    local_update(one, batches[:3], fl, LR)
    local_update(plain, batches[:3], replace(fl, encoder_grad_scale="none"), LR)
    assert states_equal(one, plain)  # a single task has nothing to share


@pytest.mark.parametrize("scale", ["none", "sqrt"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("kind", MEASURES)
def test_training_is_bit_identical_with_and_without_measuring(batches, scale, channels_last, kind):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    fl = replace(PLAIN, encoder_grad_scale=scale, affinity_every=1, affinity=kind)
    measured, plain = (fresh().to(memory_format=layout) for _ in range(2))
    rng = torch.get_rng_state()
    first = local_update(measured, batches, fl, LR, measure=True)
    assert torch.equal(torch.get_rng_state(), rng)
    second = local_update(plain, batches, fl, LR)
    assert states_equal(measured, plain) and torch.equal(first.losses, second.losses)
    assert first.measurements == 7 and second.measurements == 0


@pytest.mark.parametrize("every, steps", [(3, (0, 3, 6)), (5, (0, 5)), (4, (0, 4)), (9, (0,))])
def test_affinity_is_the_plain_mean_over_the_measured_steps(batches, every, steps):
    """Each step's Eq. 3 measured by itself, on the weights a client has at that step."""
    fl = replace(PLAIN, affinity_every=every)
    expected = []
    for step in steps:
        net = fresh()
        if step:
            local_update(net, batches[:step], fl, LR)
        expected.append(lookahead_affinity(net, batches[step], LR, diagonal=False))
    result = local_update(fresh(), batches, fl, LR, measure=True)
    assert result.measurements == len(steps)
    torch.testing.assert_close(
        result.affinity, torch.stack(expected).mean(0), rtol=0, atol=5e-6, equal_nan=True
    )
    if len(steps) > 1:  # the steps differ by more than the tolerance
        assert (expected[0] - expected[1]).nan_to_num().abs().max() > 1e-3
    assert result.affinity_seconds > 0


def test_affinities_below_zero_count(batches):
    """The released code drops them where a client trains several epochs."""
    net = fresh()
    local_update(net, batches, PLAIN, LR)  # settled: a look-ahead of this size now hurts
    fl = replace(PLAIN, affinity_every=1)
    expected = lookahead_affinity(copy.deepcopy(net), batches[0], 3.0, diagonal=False)
    assert (expected < 0).any()
    result = local_update(net, batches[:1], fl, 3.0, measure=True)
    torch.testing.assert_close(result.affinity, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_scaled_encoder_gradients_are_what_the_look_ahead_steps_by(batches):
    fl = replace(PLAIN, encoder_grad_scale="sqrt")
    result = local_update(fresh(), batches[:1], fl, LR, measure=True)
    expected = lookahead_affinity(fresh(), batches[0], LR / 3**0.5, diagonal=False)
    torch.testing.assert_close(result.affinity, expected, rtol=0, atol=5e-6, equal_nan=True)


def test_fedprox_pulls_back_to_the_servers_weights(batches):
    fl = replace(PLAIN, method="fedprox", prox_mu=0.5)
    net, reference, without = fresh(), fresh(), fresh()
    local_update(net, batches, fl, LR)
    plain_loop(reference, batches, fl, LR, mu=0.5)
    plain_loop(without, batches, fl, LR)
    assert far(net, reference) < 2e-5 < 1e-3 < far(net, without)


def test_fedprox_second_step_by_hand(batches):
    """Step 1 has no pull; step 2 adds mu (theta_1 - theta_0) to every parameter's gradient."""
    fl = replace(PLAIN, method="fedprox", prox_mu=2.0, momentum=0.0, weight_decay=0.0)
    start, one, two = fresh(), fresh(), fresh()
    local_update(one, batches[:1], fl, LR)
    local_update(two, batches[:2], fl, LR)
    losses = task_losses(one.train()(batches[1].image), batches[1])
    gradients = torch.autograd.grad(losses.sum(), list(one.parameters()))
    for p0, p1, p2, g in zip(
        start.parameters(), one.parameters(), two.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(p2, p1 - LR * (g + 2.0 * (p1 - p0)), rtol=1e-4, atol=1e-6)


def test_fedprox_with_mu_zero_is_fedavg_bit_for_bit(batches):
    one, other = fresh(), fresh()
    local_update(one, batches, replace(PLAIN, method="fedprox", prox_mu=0.0), LR)
    local_update(other, batches, PLAIN, LR)
    assert states_equal(one, other)


def test_fedprox_leaves_frozen_layers_alone(batches):
    net = fresh()
    net.encoder[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    local_update(net, batches[:2], replace(PLAIN, method="fedprox", prox_mu=0.5), LR)
    frozen = {f"encoder.0.{name}" for name, _ in net.encoder[0].named_parameters()}
    assert frozen and all(torch.equal(net.state_dict()[name], before[name]) for name in frozen)
    after = net.state_dict()
    assert any(not torch.equal(after[n], before[n]) for n in after if n.startswith("decoders.d."))


def test_gradnorm_leaves_out_tasks_without_labels():
    """Only tasks 0 and 2 have labels: r = (1, 1), G = (3, 1), mean 2; slopes +3, -1, step 0.1."""
    fl = FL(method="gradnorm", gradnorm_alpha=1.0, gradnorm_lr=0.1)
    rule = GradNorm(fresh(), fl, {WEIGHTS: torch.ones(3)})
    rule.after(None, torch.tensor([2.0, 0.0, 1.0]), [torch.tensor([x]) for x in (3.0, 0.0, 1.0)])
    torch.testing.assert_close(rule.weights, torch.tensor([0.7, 1.0, 1.1]) * (3 / 2.8))
    assert rule.initial.tolist() == [2.0, 0.0, 1.0]
    rule.after(None, torch.tensor([1.0, 5.0, 1.0]), [torch.tensor([1.0])] * 3)
    assert rule.initial.tolist() == [2.0, 5.0, 1.0]  # task 1's first loss
    weights = rule.weights
    rule.after(None, torch.zeros(3), [torch.tensor([0.0])] * 3)
    assert torch.equal(rule.weights, weights)


def test_gradnorm_step_by_hand():
    """n = 2, alpha = 1: r = (1/2, 1) / (3/4) = (2/3, 4/3); G = (1.2, 2), mean 1.6.

    The targets are 1.07 and 2.13. Task 0 is above its own: slope +1.2/1; task 1 below: slope -2/1.
    (Both were above 0.8 and 1.6.) With step 0.02 the weights become 0.976 and 1.04, then times
    2 / 2.016.
    """
    fl = FL(method="gradnorm", gradnorm_alpha=1.0, gradnorm_lr=0.02)
    sent = {WEIGHTS: torch.ones(2), INITIAL: torch.tensor([4.0, 1.0])}
    at_features = [torch.tensor([0.72, 0.96]), torch.tensor([0.0, -2.0])]
    rule = GradNorm(fresh(), fl, sent)
    rule.after(None, torch.tensor([2.0, 1.0]), at_features)
    back = rule.travelling()
    torch.testing.assert_close(back[WEIGHTS], torch.tensor([0.976, 1.04]) * (2 / 2.016))
    assert torch.equal(back[INITIAL], torch.tensor([4.0, 1.0]))


def test_gradnorm_slope_is_autograds(batch):
    """The same step with the norms' dependence on the weights left to autograd."""
    fl = FL(method="gradnorm", gradnorm_alpha=1.5, gradnorm_lr=0.01)
    net, made = fresh(), batch("dkt")
    weights = torch.tensor([0.7, 1.4, 0.9], requires_grad=True)
    initial = torch.tensor([2.0, 1.0, 0.5])
    features = net.train().encoder(made.image).detach().requires_grad_()
    losses = task_losses({a: net.decoders[a](features) for a in net.tasks}, made)
    plain = [torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in losses]
    norms = torch.stack([(w * g).norm() for w, g in zip(weights, plain)])
    ratio = losses.detach() / initial
    target = norms.detach().mean() * (ratio / ratio.mean()) ** 1.5
    (slope,) = torch.autograd.grad((norms - target).abs().sum(), weights)
    expected = weights.detach() - 0.01 * slope
    expected = expected * 3 / expected.sum()
    at_features = [w.detach() * g for w, g in zip(weights, plain)]
    rule = GradNorm(net, fl, {WEIGHTS: weights.detach(), INITIAL: initial})
    rule.after(made, losses.detach(), at_features)
    torch.testing.assert_close(rule.weights, expected, rtol=1e-5, atol=1e-6)
    assert (rule.weights - weights).abs().max() > 1e-4


def test_gradnorm_weights_stay_positive_and_sum_to_n():
    fl = FL(method="gradnorm", gradnorm_alpha=1.5, gradnorm_lr=100.0)
    rule = GradNorm(fresh(), fl, {WEIGHTS: torch.ones(3)})
    at_features = [torch.full((4,), x) for x in (9.0, 0.1, 0.1)]
    for losses in ([1.0, 1.0, 1.0], [0.1, 2.0, 1.0], [3.0, 0.2, 1.0]):
        rule.after(None, torch.tensor(losses), at_features)
        assert (rule.weights > 0).all()
        assert float(rule.weights.sum()) == pytest.approx(3, rel=1e-6)
    assert torch.equal(rule.initial, torch.ones(3))  # the first losses, kept


def test_gradnorm_trains_on_the_weighted_losses(batches):
    fl = replace(PLAIN, method="gradnorm", gradnorm_alpha=1.5, gradnorm_lr=0.0)
    weights = torch.tensor([0.2, 2.5, 0.3])
    net, reference, unweighted = fresh(), fresh(), fresh()
    result = local_update(net, batches, fl, LR, state={WEIGHTS: weights})
    losses = plain_loop(reference, batches, fl, LR, weights=weights)
    plain_loop(unweighted, batches, fl, LR)
    assert far(net, reference) < 2e-5 < 1e-3 < far(net, unweighted)
    torch.testing.assert_close(result.losses, losses.mean(0), rtol=1e-5, atol=1e-6)  # unweighted
    torch.testing.assert_close(result.travelling[WEIGHTS], weights)
    torch.testing.assert_close(result.travelling[INITIAL], losses[0], rtol=1e-5, atol=1e-6)


def test_a_client_without_images_is_an_error():
    with pytest.raises(ValueError, match="no training images"):
        local_update(fresh(), [], PLAIN, LR)
