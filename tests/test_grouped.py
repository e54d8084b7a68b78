"""Clients side by side: the plain step to rounding, bits that do not depend on the neighbours."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import in_doubles
from torch import nn

from mas_core.config import FL, PRESETS, Model
from mas_core.federated import run_round
from mas_core.grouped import can_group, train_clients
from mas_core.local import local_update
from mas_core.models import build
from mas_core.records.store import Store
from mas_core.records.training import build as build_net
from mas_core.records.training import train
from mas_core.tasks import TASKS, TaskTable

FOUR = FL(batch_size=4, affinity_every=2, arithmetic="grouped")


def state_of(net):
    return {name: t.clone() for name, t in net.state_dict().items()}


def network(tasks, size="tiny"):
    return build(tasks, Model(size, 4), seed=3).to(memory_format=torch.channels_last)


def equal(a, b):
    """Whether two clients' outcomes are the same to the bit."""
    (state, found), (other, wanted) = a, b
    assert state.keys() == other.keys()
    same = [torch.equal(state[k], other[k]) for k in state]
    same.append(torch.equal(found.step_losses, wanted.step_losses))
    if found.affinity is not None and wanted.affinity is not None:
        same.append(torch.equal(found.affinity.nan_to_num(), wanted.affinity.nan_to_num()))
    return all(same)


@pytest.mark.parametrize("tasks, size, scale", [
    ("d", "tiny", "none"), ("sdnkt", "tiny", "none"), ("sdnkt", "tiny", "sqrt"),
    ("sdnkterca", "tiny", "none"), ("sdnkt", "small", "none"), ("d", "small", "none"),
])  # fmt: skip
def test_clients_side_by_side_are_clients_one_by_one(tasks, size, scale, batch, doubles):
    """Weights, statistics, counters, losses and affinities, of clients of different lengths.

    In float64, since float32's rounding grows from step to step, in either arithmetic. One client's
    first batch has no labels of s: no loss, no gradient, and no affinity onto it.
    """
    net, measure = network(tasks, size).double(), len(tasks) > 1
    fl = replace(FOUR, encoder_grad_scale=scale)
    state = state_of(net)
    batches = {k: [in_doubles(batch(tasks, seed=10 * k + t)) for t in range(n)]
               for k, n in enumerate((4, 3, 1))}  # fmt: skip
    if "s" in tasks:
        batches[1][0].targets["s"].zero_()
    found = train_clients(net, state, {k: iter(b) for k, b in batches.items()}, fl, 0.05, measure)
    for k, own in batches.items():
        net.load_state_dict(state)
        wanted = local_update(net, own, fl, 0.05, measure)
        trained, result = found[k]
        assert trained.keys() == net.state_dict().keys()
        for name, tensor in net.state_dict().items():
            torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-6)
        moved = max((trained[name] - state[name]).abs().max() for name, _ in net.named_parameters())
        assert moved > 3e-3
        torch.testing.assert_close(result.step_losses, wanted.step_losses, rtol=0, atol=3e-6)
        assert (result.samples, result.measurements) == (wanted.samples, wanted.measurements)
        if measure:
            torch.testing.assert_close(
                result.affinity, wanted.affinity, rtol=0, atol=1e-6, equal_nan=True
            )
            assert result.affinity.nan_to_num().abs().max() > 1e-4
            assert result.affinity_seconds > 0


def test_one_step_in_float32(batch):
    net = network("sdnkt", "small")
    state, own = state_of(net), {k: [batch("sdnkt", seed=k)] for k in range(3)}
    found = train_clients(net, state, {k: iter(b) for k, b in own.items()}, FOUR, 0.01, True)
    for k, (trained, result) in found.items():
        net.load_state_dict(state)
        wanted = local_update(net, own[k], FOUR, 0.01, True)
        torch.testing.assert_close(result.step_losses, wanted.step_losses, rtol=1e-5, atol=0)
        for name, tensor in net.state_dict().items():
            torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-5)


def test_bits_depend_neither_on_place_nor_on_neighbours_nor_on_measuring(batch):
    """The same client in groups of four, three and two, in any place, and with itself alone."""
    net = network("sdnkt")
    state = state_of(net)
    batches = {k: [batch("sdnkt", seed=10 * k + t) for t in range(n)]
               for k, n in enumerate((4, 2, 3, 3, 1))}  # fmt: skip

    def trained(clients, measure):
        chosen = {k: iter(batches[k]) for k in clients}
        return train_clients(net, state, chosen, FOUR, 0.01, measure)

    wanted = trained((0, 1, 2, 3), True)
    assert not equal(wanted[2], wanted[3])
    for clients, measure in (((3, 2, 1, 0), False), ((2, 0, 1), True), ((3, 1), True), ((2,), True),
                             ((0, 1, 2, 3, 4), False)):  # fmt: skip
        for k, found in trained(clients, measure).items():
            assert k == 4 or equal(found, wanted[k])


def test_batches_of_another_size_part_a_group_and_change_no_bits(batch):
    """A client with less than one batch, and one whose last batch is short."""
    net = network("dk")
    state = state_of(net)
    batches = {0: [batch("dk", seed=t) for t in range(3)], 1: [batch("dk", 3, seed=7)],
               2: [batch("dk", seed=8), batch("dk", 2, seed=9)]}  # fmt: skip
    together = train_clients(net, state, {k: iter(b) for k, b in batches.items()}, FOUR, 0.01, True)
    for k, own in batches.items():
        alone = train_clients(net, state, {k: iter(own)}, FOUR, 0.01, True)[k]
        assert equal(together[k], alone)
        net.load_state_dict(state)
        plain = local_update(net, own, FOUR, 0.01, True)
        assert together[k][1].samples == plain.samples == sum(map(len, own))
        torch.testing.assert_close(together[k][1].step_losses, plain.step_losses, rtol=1e-4, atol=0)


def test_a_loss_from_outside_is_called_network_by_network(batch):
    table = TaskTable(
        replace(TASKS["s"], loss=lambda o, t, m: F.cross_entropy(o, t) / 2),
        replace(TASKS["t"], loss=lambda o, t, m: (o - t).square().mean()),
    )
    net = build("st", Model("tiny", 4), table=table).to(memory_format=torch.channels_last)
    state = state_of(net)
    batches = [replace(batch("st", seed=k), table=table) for k in range(2)]
    found = train_clients(net, state, {k: iter([b]) for k, b in enumerate(batches)}, FOUR, 0.01)
    for k, one in enumerate(batches):
        net.load_state_dict(state)
        wanted = local_update(net, [one], FOUR, 0.01)
        torch.testing.assert_close(found[k][1].step_losses, wanted.step_losses, rtol=1e-5, atol=0)


def test_what_cannot_be_grouped_is_trained_one_by_one(trajectory, opened):
    """Other rules, rounds of one client, other affinities, networks that are not the paper's."""
    grouped = replace(trajectory.fl, arithmetic="grouped")
    net = build_net(trajectory)
    assert can_group(net, grouped) and not can_group(net, trajectory.fl)
    assert not can_group(nn.Sequential(nn.Linear(2, 2)), grouped)
    for change in ({"method": "fedprox", "prox_mu": 0.1}, {"clients_per_round": 1},
                   {"affinity": "cosine"}):  # fmt: skip
        fl = replace(trajectory.fl, **change)
        assert not can_group(net, replace(fl, arithmetic="grouped"))
        rounds = [run_round(net, start(trajectory), replace(trajectory, fl=f), 0, opened)[0]
                  for f in (fl, replace(fl, arithmetic="grouped"))]  # fmt: skip
        assert all(torch.equal(rounds[0][k], rounds[1][k]) for k in rounds[0])
    with pytest.raises(ValueError, match="no training images"):
        train_clients(net, start(trajectory), {0: iter([])}, grouped, 0.1)


def start(trajectory):
    return state_of(build_net(trajectory))


def test_a_grouped_trajectory_resumes_to_the_bit(trajectory, folder, tmp_path):
    """Stopped after every round, its record is that of one that ran through; near the single one.

    Two local epochs, affinities, clients of different lengths (the fixture's: 6 to 18 images).
    """
    fl = replace(trajectory.fl, local_epochs=2, clients_per_round=3, arithmetic="grouped", lr=0.01)
    grouped, single = (replace(trajectory, fl=replace(fl, arithmetic=a))
                       for a in ("grouped", "single"))  # fmt: skip
    whole, parts, other = (Store(tmp_path / name, "smoke") for name in "abc")
    train(grouped, 4, whole, folder)
    for until in range(1, 5):
        train(grouped, until, parts, folder)
    train(single, 4, other, folder)
    for name in ("rounds.csv", "affinity.csv"):
        a, b = (pd.read_csv(s.folder(grouped) / name) for s in (whole, parts))
        untimed = a.columns.difference(["seconds", "joules", "affinity_seconds"])
        pd.testing.assert_frame_equal(a[untimed], b[untimed], check_exact=True)
    results = [s.result(grouped)["test_last"] for s in (whole, parts)]
    assert results[0] == results[1]
    assert results[0] == pytest.approx(other.result(single)["test_last"], rel=1e-3)
    near, far = whole.rounds(grouped), other.rounds(single)
    assert near["clients"].tolist() == far["clients"].tolist()
    assert near["train_d"].tolist() == pytest.approx(far["train_d"].tolist(), rel=1e-3)
    assert near["train_d"].tolist() != far["train_d"].tolist()  # other arithmetic
    assert (near["affinity_seconds"] > 0).all()


def test_only_what_is_grouped_has_another_id(trajectory):
    assert replace(trajectory, fl=replace(trajectory.fl, arithmetic="single")).id == trajectory.id
    grouped = replace(trajectory, fl=replace(trajectory.fl, arithmetic="grouped"))
    assert grouped.id != trajectory.id
    assert {p: s.fl.arithmetic for p, s in PRESETS.items()} == {
        "smoke": "single", "small": "single", "medium": "grouped", "paper": "single"
    }  # fmt: skip
