"""Today's rivals: each rule against an example worked by hand or a public implementation."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import in_doubles

from mas.paper import subsets
from mas.paper.experiments import RIVALS
from mas.rivals.cagrad import CAGrad, conflict_averse
from mas.rivals.famo import FAMO, W
from mas.rivals.fedem import FedEM, image_losses, responsibilities
from mas.rivals.pcgrad import ROUND, PCGrad, projected
from mas.rivals.selective import affinity_propagation, grouped, tracked
from mas_core.config import FL, override, stream
from mas_core.fedavg import rule_of
from mas_core.federated import run_round
from mas_core.local import local_update
from mas_core.models import MultiTaskNet, build, forward_tasks
from mas_core.records.store import Store
from mas_core.records.training import train
from mas_core.tasks import task_losses

PLAIN = FL(batch_size=4)


def gradients(n, seed):
    """n random gradients of 30 numbers, some in conflict."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.5, 3, (n, 1)) * rng.normal(size=(n, 30))


# --- FAMO -----------------------------------------------------------------------------------------


def famo(w, **options):
    fl = FL(method="famo", options=tuple(options.items()))
    return FAMO(MultiTaskNet("dk", "tiny", 4), fl, {W: torch.tensor(w)})


def test_famo_weights_follow_the_log_losses_by_hand():
    """z = (1/2, 1/2); log losses fell by log 2 and 0; J^T of that is (log 2 / 4, -log 2 / 4).

    Adam's first step is lr sign(gradient), whatever its size: the task that fell loses weight.
    """
    rule = famo([0.0, 0.0], decay=0.0)
    rule.follow(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]))
    quarter = np.log(2) / 4
    assert rule.w.grad.tolist() == pytest.approx([quarter, -quarter], rel=1e-6)
    assert rule.travelling()[W].tolist() == pytest.approx([-0.025, 0.025], rel=1e-6)


def test_famo_without_a_tasks_labels_steps_for_the_others(batch):
    made, rule = batch("dk"), famo([0.0, 0.0])
    made.mask.zero_()  # no pixel of depth counts
    before = [p.detach().clone() for p in rule.net.encoder.parameters()]
    losses = rule.step(made, torch.optim.SGD(rule.net.parameters(), 0.1))
    assert losses[0] == 0 and losses[1] > 0 and rule.w.isfinite().all()
    after = rule.net.encoder.parameters()
    assert max((p - q).abs().max() for p, q in zip(after, before, strict=True)) > 1e-4


def test_famo_decay_pulls_w_to_zero():
    rule = famo([1.0, -1.0], lr=0.1, decay=0.01)
    rule.follow(torch.ones(2), torch.ones(2))  # nothing fell
    assert rule.w.tolist() == pytest.approx([0.9, -0.9], rel=1e-4)


def test_famo_steps_along_the_weighted_log_losses(batch):
    """One step is SGD on n / sum(z / L) x sum_i z_i log L_i, the factor held constant."""
    w, made, fl = torch.tensor([0.5, -0.2]), batch("dk"), replace(PLAIN, method="famo")
    net, reference = (MultiTaskNet("dk", "tiny", 4, seed=2) for _ in range(2))
    local_update(net, [made], fl, 0.01, state={W: w})
    losses = task_losses(reference.train()(made.image), made)
    z = w.softmax(0)
    (2 / (z / losses.detach()).sum() * (z * losses.log()).sum()).backward()
    sgd = torch.optim.SGD(reference.parameters(), 0.01, weight_decay=fl.weight_decay)
    sgd.step()
    for name, value in reference.state_dict().items():  # statistics: of one forward pass alone
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-4, atol=1e-6)


# --- CAGrad and PCGrad ----------------------------------------------------------------------------


def test_cagrad_of_two_opposed_gradients_by_hand():
    """g = (2, 0), (-1, 0): g_0 = (1/2, 0) and d = g_0 + c |g_0| g_w / |g_w|, c = 0.4.

    <g_w, g_0> + c |g_0| |g_w| over g_w in [-1, 2] is least at -1 (-0.5 + 0.2): w = (0, 1), so
    d = 1/2 - 0.2 and n d = 0.6.
    """
    J = np.array([[2.0, 0.0], [-1.0, 0.0]])
    a = conflict_averse(J @ J.T, 0.4)
    assert a == pytest.approx([1.0, 1.4], abs=1e-4)
    assert a @ J == pytest.approx([0.6, 0.0], abs=1e-4)


def test_cagrad_of_equal_gradients_and_without_radius():
    assert conflict_averse(np.ones((3, 3)), 0.4).sum() == pytest.approx(3 * 1.4)
    J = gradients(4, 0)
    assert conflict_averse(J @ J.T, 0.0) == pytest.approx(np.ones(4))
    assert conflict_averse(np.zeros((2, 2)), 0.4).tolist() == [1, 1]


def test_pcgrad_of_two_conflicting_gradients_by_hand():
    """g = (1, 0), (-1, 1): <g1, g2> = -1, so g1 + g2 / 2 = (1/2, 1/2) and g2 + g1 = (0, 1)."""
    J = np.array([[1.0, 0.0], [-1.0, 1.0]])
    a = projected(J @ J.T, [np.array([0, 1]), np.array([1, 0])])
    assert a.tolist() == [2.0, 1.5] and (a @ J).tolist() == [0.5, 1.5]


def test_pcgrad_depends_on_the_order_and_leaves_agreement_alone():
    J = gradients(3, 1)
    orders = [np.array([0, 1, 2])] * 3, [np.array([2, 1, 0])] * 3
    one, other = (projected(J @ J.T, list(order)) for order in orders)
    assert np.abs(one - other).max() > 1e-3
    assert projected(np.ones((3, 3)), list(orders[0])).tolist() == [1, 1, 1]


def test_what_torchjd_gave():
    """PCGrad's and n times CAGrad's (c = 0.4) weights of the gradients, by torchjd 0.18."""
    two, five = gradients(2, 2), gradients(5, 5)
    assert conflict_averse(two @ two.T, 0.4) == pytest.approx([1.48915, 1.30462], rel=1e-4)
    expected = [1.0, 1.0, 1.0, 1.0, 3.35662]
    assert conflict_averse(five @ five.T, 0.4) == pytest.approx(expected, rel=1e-4)
    orders = [[1, 3, 0, 4, 2], [1, 3, 0, 4, 2], [3, 1, 0, 2, 4], [1, 0, 2, 3, 4], [3, 1, 4, 2, 0]]
    expected = [1.394644, 1.151874, 1.201763, 1.470405, 3.711658]
    assert projected(five @ five.T, list(map(np.array, orders))) == pytest.approx(expected)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_against_torchjd_where_it_is_installed(n):
    torchjd = pytest.importorskip("torchjd.aggregation")
    J = gradients(n, n)
    theirs = torch.from_numpy(J)
    torch.manual_seed(n)
    orders = [torch.randperm(n).numpy() for _ in range(n)]
    torch.manual_seed(n)
    assert projected(J @ J.T, orders) @ J == pytest.approx(torchjd.PCGrad()(theirs).numpy())
    pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")
    ours = conflict_averse(J @ J.T, 0.4) @ J
    expected = n * torchjd.CAGrad(0.4)(theirs).numpy()
    assert np.linalg.norm(ours - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("method", ["cagrad", "pcgrad"])
def test_gradients_in_agreement_are_those_of_all_in_one(batch, method):
    """One task: the combined gradient is its own (times 1 + c); decoders are left alone."""
    options = (("c", 0.0),) if method == "cagrad" else ()
    fl = replace(PLAIN, method=method, options=options)
    net, plain = (MultiTaskNet("d", "tiny", 4, seed=2) for _ in range(2))
    state = {"pcgrad.round": torch.zeros((), dtype=torch.int64)}
    local_update(net, [batch("d")], fl, 0.01, state=state)
    local_update(plain, [batch("d")], PLAIN, 0.01)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_pcgrad_draws_its_orders_from_the_rounds_stream():
    J, rng = gradients(5, 1), stream(0, "pcgrad", 3)
    rule = PCGrad(MultiTaskNet("d", "tiny", 4), PLAIN, {ROUND: torch.tensor(3)})
    for _ in range(2):  # from batch to batch it goes on
        expected = projected(J @ J.T, [rng.permutation(5) for _ in range(5)])
        assert rule.weights(J @ J.T).tolist() == expected.tolist()
    fixed = projected(J @ J.T, [np.arange(5)] * 5)
    assert np.abs(expected - fixed).max() > 1e-3


def test_each_weight_is_that_of_its_own_tasks_gradient(batch):
    """Weights (2, -1/2): the encoder's gradient is 2 g_d - g_k / 2, from backward passes apart."""

    class Fixed(CAGrad):
        def weights(self, G):
            return np.array([2.0, -0.5])

    net, made = MultiTaskNet("dk", "tiny", 4).train(), batch("dk")
    forward = forward_tasks(net, made)
    Fixed(net, PLAIN, {}).encoder_backward(forward, forward.backward_decoders())
    parameters, losses = list(net.encoder.parameters()), task_losses(net(made.image), made)
    g_d, g_k = (torch.autograd.grad(x, parameters, retain_graph=True) for x in losses)
    for p, d, k in zip(parameters, g_d, g_k, strict=True):
        torch.testing.assert_close(p.grad, 2 * d - k / 2, rtol=1e-3, atol=1e-4)
    assert max(float((d - k).abs().max()) for d, k in zip(g_d, g_k)) > 0.1


# --- Selective Task Group Updates -----------------------------------------------------------------


def test_proximal_affinity_by_hand():
    """Group {0, 1} of three tasks: losses 1, 1, 2 become 0.8, 1.4, 1. The effects, halved, are
    0.1, -0.2, 0.25. Tasks 0 and 1 have opposite signs: -max(0.1, -0.2) onto each other; task 1's
    own is negative and left out. With decay 1/2 from zero each is halved."""
    before, after = np.array([1.0, 1.0, 2.0]), np.array([0.8, 1.4, 1.0])
    B = tracked(np.zeros((3, 3)), [0, 1], before, after, 0.5)
    expected = [[0.05, -0.05, 0.125], [-0.05, 0.0, 0.125], [0, 0, 0]]
    np.testing.assert_allclose(B, expected, atol=1e-12)


def test_groups_of_a_planted_matrix():
    B = np.full((5, 5), -0.5)
    B[:3, :3] = B[3:, 3:] = 0.9
    np.fill_diagonal(B, 1)
    assert grouped(B) == [[0, 1, 2], [3, 4]]
    assert grouped(2 * B) == grouped(B)  # columns are over the task's own effect
    B[0, 0] = 0
    assert grouped(B) == [[0], [1], [2], [3], [4]]  # not yet known


def test_affinity_propagation_finds_exemplars():
    """Six points of a line in two heaps: the middle of each is the exemplar, as by scikit-learn."""
    x = np.array([0.0, 1.0, 2.1, 10.0, 11.0, 12.1])
    S = -((x[:, None] - x) ** 2)
    assert affinity_propagation(S).tolist() == [1, 1, 1, 4, 4, 4]


def test_groups_take_a_step_each(batch):
    """At first every task is alone: n steps on a batch, the encoder moved by each of them."""
    fl = replace(PLAIN, method="selective", momentum=0.0, weight_decay=0.0)
    net, reference = (MultiTaskNet("dk", "tiny", 4, seed=2) for _ in range(2))
    zero = torch.zeros((), dtype=torch.int64)
    sent = {"selective.affinity": torch.zeros(2, 2), "selective.round": zero}
    made = batch("dk")
    result = local_update(net, [made], fl, 0.01, state=sent)
    far = []
    for order in ([0, 1], [1, 0]):
        reference.load_state_dict(MultiTaskNet("dk", "tiny", 4, seed=2).state_dict())
        sgd = torch.optim.SGD(reference.train().parameters(), 0.01)
        for i in order:
            sgd.zero_grad()
            task_losses(reference(made.image), made)[i].backward()
            sgd.step()
        pairs = zip(net.parameters(), reference.parameters(), strict=True)
        far.append(max((p - q).abs().max().item() for p, q in pairs))
    assert min(far) < 1e-6 < 1e-5 < max(far)
    B = result.travelling["selective.affinity"]
    assert (B.diagonal() > 0).all() and result.travelling["selective.round"] == 1
    steps = next(v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked"))
    assert steps == 1


# --- FedEM ----------------------------------------------------------------------------------------


def test_responsibilities_by_hand():
    """pi = (1/2, 1/2), losses 0 and log 3: weights 1 and 1/3, so 3/4 and 1/4."""
    q = responsibilities(torch.tensor([0.5, 0.5]), torch.tensor([[0.0], [np.log(3.0)]]))
    assert q.flatten().tolist() == pytest.approx([0.75, 0.25])
    skewed = responsibilities(torch.tensor([0.25, 0.75]), torch.zeros(2, 1))
    assert skewed.flatten().tolist() == pytest.approx([0.25, 0.75])


def test_losses_of_images_average_to_the_batchs(batch):
    made, net = batch("dk", images=3), MultiTaskNet("dk", "tiny", 4).eval()
    outputs = net(made.image)
    each = image_losses(outputs, made)
    assert each.shape == (3, 2)
    torch.testing.assert_close(each.mean(0), task_losses(outputs, made))


def test_two_learners_mix_and_learn(settings, batch):
    model = replace(settings.model, size="mas.rivals.fedem:tiny")
    net, made = build("sd", model, seed=2), batch("sd")
    first = MultiTaskNet("sd", "tiny", 4, seed=2)
    alone = net.learners[0]
    assert all(torch.equal(p, q) for p, q in zip(alone.parameters(), first.parameters()))
    assert not torch.equal(next(alone.parameters()), next(net.learners[1].parameters()))
    net.eval()
    net.pi.copy_(torch.tensor([0.25, 0.75]))
    one, two, both = alone(made.image), net.learners[1](made.image), net(made.image)
    torch.testing.assert_close(both["d"], 0.25 * one["d"] + 0.75 * two["d"])
    shares = 0.25 * one["s"].softmax(1) + 0.75 * two["s"].softmax(1)
    torch.testing.assert_close(both["s"].exp(), shares)
    before = [next(m.parameters()).detach().clone() for m in net.learners]
    rule = FedEM(net.train(), FL(method="fedem"), {})
    assert net.pi.tolist() == [0.5, 0.5]  # a visit starts from equal shares
    rule.step(made, torch.optim.SGD(net.parameters(), 0.1))
    assert all((p != next(m.parameters())).any() for p, m in zip(before, net.learners))
    assert float(net.pi.sum()) == pytest.approx(1) and rule.seen == len(made)


# --- All of them ----------------------------------------------------------------------------------


class Doubles:
    """A source of clients whose training batches are in float64."""

    def __init__(self, source):
        self.names, self.count, self.source = source.names, source.count, source

    def epoch(self, *arguments):
        return map(in_doubles, self.source.epoch(*arguments))


# In the second round: training losses of s, d and k, and how far all weights have moved together.
SECOND_ROUND = {
    "fedavg": (2.91459, 0.786864, 12.6275, 4.90961),
    "fedprox": (2.91418, 0.787048, 12.6276, 4.92208),
    "gradnorm": (2.91445, 0.78697, 12.6275, 4.90681),
    "famo": (2.91384, 0.776947, 12.6585, 6.20765),
    "cagrad": (2.91478, 0.784424, 12.6272, 5.99276),
    "pcgrad": (2.91339, 0.788325, 12.6282, 5.1986),
    "selective": (2.91592, 0.780574, 12.6014, 8.31845),
    "fedem": (2.91688, 0.766407, 12.6753, 10.5709),
    "two_widths": (2.91277, 0.791177, 12.6292, 5.06285),
    "label_holders": (2.91459, 0.786864, 12.6275, 4.90961),  # every label: FedAvg
    "update_selection": (2.91248, 0.787918, 12.6299, 5.8378),
}
NEEDED = {"fedprox": {"prox_mu": 0.5}, "gradnorm": {"gradnorm_alpha": 1.5, "gradnorm_lr": 0.1}}


@pytest.mark.parametrize("method", SECOND_ROUND)
def test_two_rounds_give_the_numbers_that_they_gave(
    method, trajectory, opened, doubles, monkeypatch
):
    """Not worked out but kept: a change of any draw, weight or step shows.

    In float64, losses as well: in float32 rounding decides on which side of a kink a pixel falls.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    fl = replace(trajectory.fl, method=method, lr=0.01, measure_rounds=0, **NEEDED.get(method, {}))
    size = "mas.rivals.fedem:tiny" if method == "fedem" else "tiny"
    t = replace(trajectory, tasks="sdk", fl=fl, model=replace(trajectory.model, size=size))
    torch.set_default_dtype(torch.float32)
    net = build("sdk", t.model).double()  # initial weights as float32 draws them
    torch.set_default_dtype(torch.float64)
    first = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = first | rule_of(fl).start(net, fl)
    for round_ in range(2):
        state, row = run_round(net, state, t, round_, Doubles(opened))
    weights = [name for name, _ in net.named_parameters()]
    moved = sum((state[name] - first[name]).abs().sum().item() for name in weights)
    assert (*row.losses, moved) == pytest.approx(SECOND_ROUND[method], rel=1e-4)


@pytest.mark.parametrize("method", RIVALS.values())
def test_a_rival_resumes_to_the_bit(method, trajectory, folder, store, settings, tmp_path):
    changes = {"fl.method": method, "fl.measure_rounds": 0, "fl.clients_per_round": 1}
    if method == "fedem":
        changes["model.size"] = "mas.rivals.fedem:tiny"
    s = override(settings, changes)
    whole = replace(trajectory, tasks="sd", fl=s.fl, model=s.model)
    for until in (2, 4):
        train(whole, until, store, folder)
    again = Store(tmp_path / "again", "small")
    train(whole, 4, again, folder)
    for name in ("test_last", "test_best"):
        assert store.result(whole)[name] == again.result(whole)[name]


# --- Predictors from trained subsets --------------------------------------------------------------


def test_gains_and_the_subset_mean_by_hand():
    losses = {"d": {"d": 2.0}, "k": {"k": 1.0}, "n": {"n": 4.0}, "dk": {"d": 1.0, "k": 1.1},
              "dn": {"d": 1.5, "n": 4.0}, "dkn": {"d": 1.8, "k": 0.8, "n": 3.0}}  # fmt: skip
    gains = subsets.gains_of(losses)
    assert gains["dk", "d"] == 50 and gains["dk", "k"] == pytest.approx(-10)
    # Onto d: with k 50 and 10, mean 30; with n 25 and 10, mean 17.5.
    assert subsets.subset_mean(gains, "dkn", "d") == pytest.approx((30 + 17.5) / 2)
    assert subsets.task_mean(gains, "dkn", "d") == pytest.approx((50 + 25 + 10) / 3)


def every_group(gain):
    groups = ["".join(g) for x in (2, 3, 4) for g in combinations("dknst", x)]
    return {(g, a): float(gain(g, a)) for g in groups for a in g}


def test_a_ridge_finds_gains_that_add_up():
    """Each other task in the group adds its own number: ridge is exact, a mean is not."""
    adds = dict(zip("dknst", (1.0, -2.0, 3.0, 0.5, -1.0)))
    gains = every_group(lambda g, a: sum(adds[b] for b in g if b != a))
    flat = subsets.ridge_after(lambda *_: 0.0)
    assert subsets.leave_groups_out(gains, flat)[0] > 0.999
    assert subsets.leave_groups_out(gains, subsets.subset_mean)[0] < 0.9
    assert subsets.leave_groups_out(gains, subsets.task_mean)[0] == pytest.approx(0)


def test_a_line_through_affinities_and_no_look_at_hidden_groups():
    gains = every_group(lambda g, a: 7.0 - 2.0 * len(g))
    R2, found = subsets.leave_groups_out(gains, subsets.affinity_line(gains))
    assert R2 == pytest.approx(1) and found == pytest.approx(gains)
    hidden = gains | {("dk", "d"): 1e6}
    assert subsets.leave_groups_out(hidden, subsets.subset_mean)[1]["dk", "d"] < 100
