"""Clients of two widths: corners of tensors, the mean where they overlap, the experiment."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mas.paper.two_widths import two_widths
from mas.rivals.two_widths import HELD, TwoWidths, corner, held, narrowed, overlap_mean
from mas.run.cuda_graph import GraphedStep, run_eagerly
from mas_core import models
from mas_core.config import FL, Model, UserError, stream
from mas_core.data.clients import open_data
from mas_core.fedavg import rule_of, weighted_mean
from mas_core.federated import run_round, state_bytes
from mas_core.local import local_update
from mas_core.models import SIZES, MultiTaskNet
from mas_core.records.evaluate import evaluate
from mas_core.records.store import Store
from mas_core.records.training import train

EVERYBODY = FL(batch_size=4, method="two_widths", options=(("every", 1.0),))


def literal(width):
    """A network whose weights count up along every tensor, so that each is told from the others."""
    net = MultiTaskNet("dk", "tiny", 4, width=width).train()
    for tensor in net.state_dict().values():
        values = torch.arange(tensor.numel()).remainder(17) - 8
        tensor.copy_((values / 16).view(tensor.shape))
    return net


def through(layers, x, count):
    """x after the first `count` of some layers."""
    for layer in list(layers)[:count]:
        x = layer(x)
    return x


def test_a_corner_is_cut_and_written_back():
    wide = torch.arange(12.0).view(3, 4)
    part = corner(wide, (2, 2))
    assert part.tolist() == [[0, 1], [4, 5]]
    part.copy_(torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))
    assert wide.tolist() == [[-1, -2, 2, 3], [-3, -4, 6, 7], [8, 9, 10, 11]]
    counter = torch.tensor(5)
    corner(counter, ()).add_(1)
    assert counter == 6


def test_the_encoder_is_narrowed_and_nothing_else():
    size = SIZES["small"].at_width(0.5)
    assert (size.stem, size.blocks, size.features) == ((8, 8), (16, 32, 48), 32)
    assert size == replace(SIZES["small"], stem=(8, 8), blocks=(16, 32, 48), features=32)
    assert SIZES["full"].at_width(1.0) == SIZES["full"]
    assert SIZES["tiny"].at_width(0.3).blocks == (5, 10, 15)  # rounded up
    for width in (0.0, 1.5):
        with pytest.raises(UserError, match=f"width={width}"):
            Model(width=width)


def test_a_narrow_network_has_the_leading_channels(batch):
    """Its forward pass is the wide one's, of tensors cut by hand from the first layers on."""
    wide, image = literal(1.0), batch("dk").image
    narrow = narrowed(wide, 0.5)
    encoder, own = wide.encoder, narrow.encoder
    x = F.conv2d(image, encoder[0].weight[:4], stride=2, padding=1)
    x = F.batch_norm(x, None, None, encoder[1].weight[:4], encoder[1].bias[:4], training=True)
    x = F.conv2d(x.relu(), encoder[3].weight[:8, :4], padding=1)
    x = F.batch_norm(x, None, None, encoder[4].weight[:8], encoder[4].bias[:8], training=True)
    torch.testing.assert_close(through(own, image, 6), x.relu())
    # The strided block: depthwise, pointwise, the 2x2 convolution, the skip.
    x, long, skip = x.relu(), encoder[6].long, encoder[6].skip

    def normal(y, norm, channels):
        weight, bias = norm.weight[:channels], norm.bias[:channels]
        return F.batch_norm(y, None, None, weight, bias, training=True)

    y = F.conv2d(x, long[0][0].weight[:8], padding=1, groups=8)
    y = normal(F.conv2d(y, long[0][1].weight[:8, :8]), long[1], 8).relu()
    y = F.conv2d(y, long[3][0].weight[:8], padding=1, groups=8)
    y = normal(F.conv2d(y, long[3][1].weight[:8, :8]), long[4], 8)
    y = F.conv2d(y, long[5].weight[:8, :8], long[5].bias[:8], stride=2)
    y = y + normal(F.conv2d(x, skip[0].weight[:8, :8], stride=2), skip[1], 8)
    torch.testing.assert_close(through(own, image, 7), y)
    features = own(image)
    assert features.shape[1] == 16
    # A decoder: the inputs of its two first layers are cut, what follows is whole.
    branch = wide.decoders["d"].branch
    z = F.conv2d(features, branch[0][0].weight[:16], padding=1, groups=16)
    z = normal(F.conv2d(z, branch[0][1].weight[:, :16]), branch[1], 8).relu()
    torch.testing.assert_close(through(narrow.decoders["d"].branch, features, 3), z)
    assert narrow.decoders["d"].last[1].weight.equal(wide.decoders["d"].last[1].weight)


def test_the_overlap_is_averaged_by_hand():
    """Server 8 everywhere; whole clients (p 0.25, 0.25) and a narrow one (0.5) of the first row."""
    ones, first = torch.ones(2, 2), torch.tensor([[1.0, 1.0], [0.0, 0.0]])

    def state(rows, mask, counter, counted):
        return {"w": torch.tensor(rows), "n": torch.tensor(counter), HELD + "w": mask,
                HELD + "n": torch.tensor(counted, dtype=torch.float64)}  # fmt: skip

    a = state([[4.0, 0.0], [4.0, 0.0]], ones, 3, 1.0), 0.25
    b = state([[0.0, 4.0], [0.0, 2.0]], ones, 6, 1.0), 0.25
    narrow = state([[2.0, 2.0], [8.0, 8.0]], first, 90, 0.0), 0.5
    new = overlap_mean([a, b, narrow])
    assert set(new) == {"w", "n"}
    # First row: 0.25 x 4 + 0.25 x 0 + 0.5 x 2, and 0 + 1 + 1; second: (0.25 x 4) / 0.5, 0.5 / 0.5.
    assert new["w"].tolist() == [[2.0, 2.0], [2.0, 1.0]]
    assert new["n"] == 4 and new["n"].dtype == torch.int64  # (0.25 x 3 + 0.25 x 6) / 0.5, to even
    alone = overlap_mean([(narrow[0], 1.0)])
    assert alone["w"].tolist() == [[2.0, 2.0], [8.0, 8.0]] and alone["n"] == 90


def test_a_mean_over_clients_that_hold_everything_is_fedavg_s():
    nets = [MultiTaskNet("dk", "tiny", 4, seed=s) for s in range(3)]
    shares = (0.3, 0.6, 0.1)
    masks = held(nets[0], nets[0])
    mean = overlap_mean((n.state_dict() | masks, p) for n, p in zip(nets, shares, strict=True))
    wanted = weighted_mean((n.state_dict(), p) for n, p in zip(nets, shares, strict=True))
    assert list(mean) == list(wanted)
    assert all(mean[name].equal(wanted[name]) for name in wanted)


def test_what_a_narrow_client_holds():
    wide = MultiTaskNet("dk", "tiny", 4)
    masks = held(narrowed(wide, 0.5), wide)
    assert masks[HELD + "encoder.0.weight"].sum((1, 2, 3)).tolist() == [27] * 4 + [0] * 4
    assert masks[HELD + "encoder.3.weight"].sum() == 8 * 4 * 9  # of 16 x 8 x 9
    assert masks[HELD + "decoders.d.last.1.weight"].eq(1).all()
    assert not masks[HELD + "decoders.d.branch.1.running_mean"].any()
    assert not masks[HELD + "encoder.1.num_batches_tracked"]
    assert all(mask.eq(1).all() for mask in held(wide, wide).values())


def start(trajectory, **changes):
    """The trajectory with changes to its training, a network of it, and the first state."""
    t = replace(trajectory, fl=replace(trajectory.fl, **changes))
    net = models.build(t.tasks, t.model, t.seed).to(memory_format=torch.channels_last)
    return t, net, {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_at_full_width_a_round_is_fedavg_s(trajectory, opened):
    """Every client trains a copy and writes it back: state, losses, affinities, to the bit."""
    plain = run_round(*start(trajectory)[1:], trajectory, 0, opened)
    t, net, state = start(trajectory, method="two_widths", options=(("every", 1), ("width", 1)))
    new, made = run_round(net, state, t, 0, opened)
    assert list(new) == list(plain[0])
    assert all(new[name].equal(plain[0][name]) for name in new)
    assert made.losses.tolist() == plain[1].losses.tolist()
    assert made.affinity.tobytes() == plain[1].affinity.tobytes()
    assert (made.bytes_up, made.bytes_down) == (plain[1].bytes_up, plain[1].bytes_down)


def test_a_round_of_a_wide_and_a_narrow_client(trajectory, opened):
    """What both hold is averaged, the rest is the wide client's; clients 0 and 1 are drawn."""
    t, net, state = start(trajectory, method="two_widths", clients=(0, 1))
    new, made = run_round(net, state, t, 0, opened)
    alone = {}
    for k in (0, 1):
        one, net, state = start(trajectory, method="two_widths", clients=(k,), clients_per_round=1)
        alone[k], bytes_ = run_round(net, state, one, 0, opened)
        alone[k, "bytes"] = bytes_.bytes_down
    sizes = [opened.count(k, "train") for k in (0, 1)]
    p = [n / sum(sizes) for n in sizes]
    name = "encoder.3.weight"  # (16, 8, 3, 3)
    both = p[0] * alone[0][name][:8, :4] + p[1] * alone[1][name][:8, :4]
    torch.testing.assert_close(new[name][:8, :4], both)
    torch.testing.assert_close(new[name][8:], alone[0][name][8:])
    torch.testing.assert_close(new[name][:, 4:], alone[0][name][:, 4:])
    assert alone[1][name][8:].equal(state[name][8:])  # nobody trained them
    assert not alone[1][name][:8, :4].equal(state[name][:8, :4])
    for statistic in ("encoder.1.running_mean", "decoders.d.branch.1.running_var"):
        assert alone[1][statistic].equal(state[statistic])
        torch.testing.assert_close(new[statistic], alone[0][statistic])
    # Bytes: the wide client's are the state's, the narrow one's those of its weights alone.
    narrow = narrowed(net, 0.5)
    assert alone[0, "bytes"] == state_bytes(state)
    assert alone[1, "bytes"] == 4 * sum(w.numel() for w in narrow.parameters())
    assert made.bytes_down == alone[0, "bytes"] + alone[1, "bytes"]
    assert made.affinity.shape == (2, 2, 2)


def test_a_narrow_client_steps_like_a_network_that_was_narrow_all_along(batch):
    made = [batch("dk", seed=s) for s in (0, 1)]
    wide = MultiTaskNet("dk", "tiny", 4, seed=2).to(memory_format=torch.channels_last)
    alone = narrowed(wide, 0.5)
    result = local_update(wide, made, EVERYBODY, 0.05, measure=True, client=3)
    wanted = local_update(alone, made, replace(EVERYBODY, method="fedavg"), 0.05, measure=True)
    assert result.step_losses.equal(wanted.step_losses)
    assert result.affinity.nan_to_num().equal(wanted.affinity.nan_to_num())
    for name, tensor in alone.named_parameters():
        assert corner(wide.state_dict()[name], tensor.shape).equal(tensor)


def test_steps_of_both_widths_are_captured_once_and_train_the_same(trajectory, opened):
    """Two rounds with a stand-in that runs captured steps eagerly, and two without."""
    built = {}

    def capture(net, batch, fl, scale, measure):
        if (net, measure) not in built:
            built[net, measure] = GraphedStep(net, batch, fl, scale, measure, run_eagerly)
        return built[net, measure]

    def two_rounds(capture):
        t, net, state = start(trajectory, method="two_widths", clients=(0, 1))
        for r in (0, 1):
            state, made = run_round(net, state, t, r, opened, capture)
        return state, made

    (new, made), (plain, wanted) = two_rounds(capture), two_rounds(None)
    assert sorted(net.config.width for net, _ in built) == [0.5, 1.0]
    assert all(new[name].equal(plain[name]) for name in plain)
    assert made.affinity.tobytes() == wanted.affinity.tobytes()


def test_a_client_that_is_not_named_is_an_error(batch):
    with pytest.raises(UserError, match="hand `client` to local_update"):
        local_update(MultiTaskNet("dk", "tiny", 4), [batch("dk")], EVERYBODY, 0.05)


def test_an_interrupted_run_ends_the_same(trajectory, folder, tmp_path):
    """All that travels is the network's state: no name of the method's own is in a checkpoint."""
    t, net, _ = start(trajectory, method="two_widths")
    print_of_data = open_data(t.data, folder, t.tasks).fingerprint
    stores = [Store(tmp_path / name, "small") for name in ("whole", "parts")]
    train(t, 4, stores[0], folder)
    for until in (1, 3, 4):
        train(t, until, stores[1], folder)
    states = [
        s.load_checkpoint(t, s.checkpoint_path(t, "last"), net.state_dict(), print_of_data)[0]
        for s in stores
    ]
    assert set(states[0]) == set(net.state_dict())
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert stores[0].result(t)["test_best"] == stores[1].result(t)["test_best"]
    assert t.id != trajectory.id


def test_statistics_before_a_test_are_means_over_batches_of_all_clients(trajectory, opened):
    changes = {"clients": (0, 2), "options": (("batches", 1),)}
    t, net, state = start(trajectory, method="two_widths", **changes)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    rule_of(t.fl).before_test(net, t.fl, opened)
    means, variances = [], []
    for k in (0, 2):
        batch = next(opened.epoch(k, "dk", t.fl.batch_size, stream(0, "statistics", k), "cpu"))
        x = F.conv2d(batch.image, net.encoder[0].weight, stride=2, padding=1)
        means.append(x.mean((0, 2, 3)))
        variances.append(x.var((0, 2, 3)))
    norm = net.encoder[1]
    torch.testing.assert_close(norm.running_mean, sum(means) / 2)
    torch.testing.assert_close(norm.running_var, sum(variances) / 2)
    assert norm.num_batches_tracked == 2 and norm.momentum == 0.1
    assert all(p.equal(kept[name]) for name, p in net.named_parameters())


def test_a_test_uses_them_and_the_state_does_not_keep_them(trajectory, folder, store):
    """With width 1 the weights are FedAvg's to the bit, and the losses are not."""
    t = replace(trajectory, fl=replace(trajectory.fl, method="two_widths", options=(("width", 1),)))
    for each in (trajectory, t):
        train(each, 4, store, folder)
    data = open_data(t.data, folder, t.tasks)
    states = []
    for each in (trajectory, t):
        like = models.build(each.tasks, each.model).state_dict()
        path = store.checkpoint_path(each, "last")
        states.append(store.load_checkpoint(each, path, like, data.fingerprint)[0])
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    net = models.build(t.tasks, t.model)
    net.load_state_dict(states[1])
    rule_of(t.fl).before_test(net, t.fl, data)
    losses = evaluate(net, data.evaluation("test", t.tasks, 64, "cpu"))
    found = store.result(t)["test_last"]
    assert found == pytest.approx(losses, rel=1e-6)
    assert found["d"] != pytest.approx(store.result(trajectory)["test_last"]["d"], rel=1e-3)


def test_the_experiment_s_trajectories():
    """Four methods for each kind of clients, all of one rule; kinds differ in one thing."""
    store = Store("results", "smoke")
    recipes = two_widths(store, 0, {})
    kinds = ("all wide", "two widths", "wide clients only", "all narrow")
    names = ("one-by-one", "all-in-one", "MAS-1", "MAS-2")
    assert set(recipes) == {(f"{n} {k}", "sdnkt", 0) for n in names for k in kinds}
    first = {key: next(recipe) for key, recipe in recipes.items()}
    trunk = {kind: first[f"MAS-2 {kind}", "sdnkt", 0][0].trajectory for kind in kinds}
    assert len({t.id for t in trunk.values()}) == 4
    assert trunk["wide clients only"].fl.clients == (0, 2, 4)
    assert trunk["all narrow"].model.width == 0.5
    assert {t.fl.method for t in trunk.values()} == {"two_widths"}
    narrow = {kind: TwoWidths.option(t.fl, "width") for kind, t in trunk.items()}
    assert narrow == dict.fromkeys(kinds, 1) | {"two widths": 0.5}
    for kind in kinds:
        assert first[f"all-in-one {kind}", "sdnkt", 0][0].trajectory == trunk[kind]
