"""Federated averaging: means by hand, FedAvg as centralised training, rounds and their records."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from mas_core import federated
from mas_core.affinity import lookahead_affinity
from mas_core.config import FL, UserError, override, stream
from mas_core.data.clients import open_data
from mas_core.fedavg import weighted_mean
from mas_core.federated import (
    TrainingDiverged,
    client_batches,
    load_state,
    run_round,
    select_clients,
)
from mas_core.local import local_update
from mas_core.models import MultiTaskNet
from mas_core.records import training
from mas_core.records.evaluate import evaluate
from mas_core.records.training import build, is_done, start_state, state_at, train
from mas_core.records.trajectory import Trajectory
from mas_core.tasks import Batch, task_losses

UNTIMED = ["seconds", "joules", "affinity_seconds"]


def last_state(store, trajectory, name="last"):
    """What lies in a checkpoint, by name of tensor."""
    from safetensors.torch import load_file

    return load_file(store.checkpoint_path(trajectory, name))


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- The weighted mean ----------------------------------------------------------------------------


def test_weighted_mean_by_hand():
    states = [
        ({"w": torch.tensor([1.0, -2.0]), "running_mean": torch.tensor([8.0]),
          "batches": torch.tensor(3)}, 0.25),
        ({"w": torch.tensor([5.0, 2.0]), "running_mean": torch.tensor([0.0]),
          "batches": torch.tensor(8)}, 0.75),
    ]  # fmt: skip
    kept = copy.deepcopy(states)
    mean = weighted_mean(iter(states))
    assert mean["w"].tolist() == [4.0, 1.0]
    assert mean["running_mean"].tolist() == [2.0]  # BatchNorm's statistics like weights
    assert mean["batches"].dtype == torch.int64 and mean["batches"].item() == 7  # 6.75 rounded
    for (state, _), (before, _) in zip(states, kept, strict=True):
        assert states_equal(state, before)  # clients' states are not written to


def test_weighted_mean_keeps_large_counters_exact():
    big = 2**40 + 1
    mean = weighted_mean([({"n": torch.tensor(big)}, 0.5), ({"n": torch.tensor(big)}, 0.5)])
    assert mean["n"].item() == big


def test_weighted_mean_of_one_is_itself():
    state = MultiTaskNet("dk", "tiny", 4).state_dict()
    assert states_equal(weighted_mean([(state, 1.0)]), dict(state))


def test_weighted_mean_holds_one_state_at_a_time():
    """The next client may overwrite the state that the last one handed over."""
    working = {"w": torch.zeros(2)}

    def clients():
        for value in (1.0, 2.0, 4.0):
            working["w"].fill_(value)
            yield working, 1 / 4 if value != 2.0 else 1 / 2

    assert weighted_mean(clients())["w"].tolist() == [2.25, 2.25]


# --- One round ------------------------------------------------------------------------------------


def without_batch_norm(net):
    """BatchNorm replaced by GroupNorm: then an image's loss does not depend on its batch."""
    for name, child in net.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(net, name, nn.GroupNorm(1, child.num_features))
        else:
            without_batch_norm(child)
    return net


def test_all_clients_with_one_full_batch_step_are_one_centralised_step(settings, opened):
    """sum_k p_k (theta - lr grad L_k) = theta - lr grad L: the union's loss weighs every image."""
    tasks = "dnkterca"  # without s, whose mean goes over labelled pixels, not images
    fl = replace(settings.fl, clients_per_round=4, batch_size=64, momentum=0.0, measure_rounds=0)
    trajectory = Trajectory(tasks, 5, settings.data, settings.model, fl)
    net = without_batch_norm(build(trajectory))
    state = {k: t.clone() for k, t in net.state_dict().items()}
    new, row = run_round(net, state, trajectory, 0, opened)

    parts = [list(client_batches(trajectory, opened, k, 0, torch.device("cpu"))) for k in range(4)]
    assert [len(p) for p in parts] == [1] * 4
    sizes = [len(p[0]) for p in parts]
    assert sizes == [6, 10, 14, 18] and row.samples == 48
    union = Batch(
        torch.cat([p[0].image for p in parts]),
        torch.cat([p[0].mask for p in parts]),
        {a: torch.cat([p[0].targets[a] for p in parts]) for a in tasks},
    )
    load_state(net, state)
    losses = task_losses(net(union.image), union)
    optimizer = torch.optim.SGD(net.parameters(), trajectory.lr(0), weight_decay=fl.weight_decay)
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    moved = 0.0
    for name, central in net.state_dict().items():
        torch.testing.assert_close(new[name], central, rtol=0, atol=3e-7)
        moved = max(moved, (central - state[name]).abs().max().item())
    assert moved > 1e-2
    assert row.losses.tolist() == pytest.approx(losses.tolist(), rel=1e-5)


def test_a_round_is_the_mean_of_its_clients_weighted_by_their_images(
    trajectory, folder, settings, monkeypatch
):
    """Each client trained by itself from the server's weights, in copies, and averaged by hand."""
    fl = replace(settings.fl, local_epochs=2)
    trajectory = replace(trajectory, fl=fl)
    data = open_data(trajectory.data, folder, "dk")
    net = build(trajectory)
    state = {k: t.clone() for k, t in net.state_dict().items()}
    before = copy.deepcopy(state)
    new, row = run_round(net, state, trajectory, 1, data)
    assert states_equal(state, before)  # the server's state is an input

    clients = row.clients
    assert clients == select_clients(trajectory, 4, 1) and len(set(clients)) == 2
    sizes = np.array([data.count(k, "train") for k in clients])
    p = sizes / sizes.sum()
    assert p[0] != p[1]
    trained, results = [], []
    for k in clients:
        copy_ = build(trajectory)
        load_state(copy_, before)
        batches = list(client_batches(trajectory, data, k, 1, torch.device("cpu")))
        assert len(batches) == 2 * (data.count(k, "train") // 4)  # two epochs of full batches
        results.append(local_update(copy_, batches, fl, trajectory.lr(1), measure=True))
        trained.append(copy_.state_dict())
    for name, tensor in new.items():
        mean = sum(float(w) * t[name].double() for w, t in zip(p, trained, strict=True))
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-6)
        else:
            assert tensor.item() == round(mean.item())
    losses = sum(float(w) * r.losses for w, r in zip(p, results, strict=True))
    assert row.losses.tolist() == pytest.approx(losses.tolist(), rel=1e-5)
    assert row.samples == sum(r.samples for r in results)
    assert row.lr == pytest.approx(0.1 * 0.75**0.9, rel=1e-6)

    assert row.round == 1 and row.measurements == [r.measurements for r in results]
    for S, result in zip(row.affinity, results, strict=True):
        assert S[0, 1] == pytest.approx(result.affinity[0, 1].item(), rel=1e-4)
        assert S[1, 0] == pytest.approx(result.affinity[1, 0].item(), rel=1e-4)
        assert np.isnan(S.diagonal()).all()


def test_local_epochs_draw_new_batches(trajectory, opened, settings):
    fl = replace(settings.fl, local_epochs=2)
    batches = list(client_batches(replace(trajectory, fl=fl), opened, 3, 0, torch.device("cpu")))
    one = list(client_batches(trajectory, opened, 3, 0, torch.device("cpu")))
    assert len(batches) == 2 * len(one) == 8
    first = [torch.equal(a.image, b.image) for a, b in zip(one, batches[:4], strict=True)]
    second = [torch.equal(a.image, b.image) for a, b in zip(one, batches[4:], strict=True)]
    assert all(first) and not any(second)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"round_": 1}, {"client": 2}], ids=["seed", "round", "client"]
)
def test_batches_differ_by_seed_round_and_client(trajectory, opened, change):
    def first_image(seed=0, round_=0, client=3):
        batches = client_batches(
            replace(trajectory, seed=seed), opened, client, round_, torch.device("cpu")
        )
        return next(batches).image

    assert torch.equal(first_image(), first_image())
    assert not torch.equal(first_image(), first_image(**change))


def test_a_round_leaves_the_callers_generator_alone(trajectory, opened):
    before, net = torch.get_rng_state(), build(trajectory)
    run_round(net, dict(net.state_dict()), trajectory, 0, opened)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_come_from_the_seeds_stream_whatever_the_tasks(trajectory, settings):
    """The order that client 3 draws in round 1 for five images, in each of two epochs."""
    orders = SimpleNamespace(epoch=lambda k, letters, B, rng, device: [rng.permutation(5).tolist()])
    fl = replace(settings.fl, local_epochs=2)
    for tasks in ("dk", "sn"):
        t = replace(trajectory, tasks=tasks, fl=fl)
        drawn = list(client_batches(t, orders, 3, 1, torch.device("cpu")))
        assert drawn == [[4, 0, 2, 1, 3], [4, 0, 3, 2, 1]]


def test_dropout_differs_by_seed_client_and_round(trajectory, opened, settings, monkeypatch):
    real, draws = federated.local_update, []

    def drawing(*arguments):
        draws.append(torch.rand(()).item())
        return real(*arguments)

    monkeypatch.setattr(federated, "local_update", drawing)
    t = replace(trajectory, fl=replace(settings.fl, measure_rounds=0, clients=(0, 1)))
    for each, round_ in ((t, 0), (t, 1), (replace(t, seed=1), 0), (t, 0)):
        net = build(t)
        run_round(net, start_state(t, net, None, None), each, round_, opened)
    assert len(set(draws[:6])) == 6 and draws[6:] == draws[:2]


def test_affinities_are_measured_in_the_first_rounds_by_fedavg_alone(trajectory, opened, settings):
    def measured(round_, **changes):
        t = replace(trajectory, fl=replace(settings.fl, measure_rounds=2, **changes))
        net = build(t)
        state = {k: v.clone() for k, v in net.state_dict().items()}
        if t.fl.method == "gradnorm":
            state["balance.weights"] = torch.ones(2)
        found = run_round(net, state, t, round_, opened)[1].affinity
        return 0 if found is None else len(found)

    assert [measured(r) for r in range(4)] == [2, 2, 0, 0]
    assert measured(0, method="fedprox", prox_mu=0.1) == 0
    assert measured(0, method="gradnorm", gradnorm_lr=0.01) == 0


def test_first_rounds_affinity_is_eq_3_at_the_initial_weights(trajectory, opened, settings):
    t = replace(trajectory, fl=replace(settings.fl, affinity_every=1000))
    net = build(t)
    _, row = run_round(net, dict(build(t).state_dict()), t, 0, opened)
    assert row.measurements == [1, 1]
    for client, found in zip(row.clients, row.affinity, strict=True):
        batch = next(client_batches(t, opened, client, 0, torch.device("cpu")))
        S = lookahead_affinity(build(t), batch, 0.1)
        assert found[0, 1] == pytest.approx(S[0, 1].item(), abs=1e-5)


def test_bytes_of_a_round(trajectory, opened, settings):
    """The whole state, both ways, once a client; affinities, where measured, are 4 n^2 more."""
    net = build(trajectory)
    state = {k: t.clone() for k, t in net.state_dict().items()}
    size = sum(t.numel() * (8 if t.dtype == torch.int64 else 4) for t in state.values())
    _, row = run_round(net, state, trajectory, 0, opened)
    assert (row.bytes_down, row.bytes_up) == (2 * size, 2 * (size + 4 * 2**2))
    plain = replace(trajectory, fl=replace(settings.fl, measure_rounds=0))
    assert run_round(net, state, plain, 0, opened)[1].bytes_up == 2 * size


# --- Selection ------------------------------------------------------------------------------------


def test_clients_come_from_the_seeds_stream(trajectory):
    trajectory = replace(trajectory, fl=FL())
    chosen = [select_clients(trajectory, 32, r) for r in range(50)]
    assert all(len(set(c)) == 4 and c == sorted(c) for c in chosen)
    assert chosen == [select_clients(replace(trajectory, tasks="sn"), 32, r) for r in range(50)]
    assert chosen[3] == sorted(stream(0, "select", 3).choice(32, 4, replace=False).tolist())
    other = [select_clients(replace(trajectory, seed=1), 32, r) for r in range(50)]
    assert sum(a == b for a, b in zip(chosen, other, strict=True)) <= 1
    assert set(sum(chosen, [])) == set(range(32))  # every client has its turn
    counts = np.bincount(sum((select_clients(trajectory, 4, r) for r in range(8)), []), minlength=4)
    assert counts.tolist() == [8] * 4


def test_clients_that_are_named_are_the_only_ones(trajectory, settings):
    fl = replace(settings.fl, clients=(1, 3), clients_per_round=1)
    chosen = {k for r in range(30) for k in select_clients(replace(trajectory, fl=fl), 4, r)}
    assert chosen == {1, 3}
    both = replace(trajectory, fl=replace(fl, clients_per_round=2))
    assert select_clients(both, 4, 0) == [1, 3]


def test_more_clients_a_round_than_there_are(trajectory, settings):
    fl = replace(settings.fl, clients_per_round=5)
    with pytest.raises(UserError, match="clients_per_round=5, but there are 4 clients"):
        select_clients(replace(trajectory, fl=fl), 4, 0)
    with pytest.raises(UserError, match="clients_per_round=5, but there are 4 clients"):
        override(settings, {"fl.clients_per_round": 5})


# --- Trajectories ---------------------------------------------------------------------------------


def test_a_trajectory_by_hand(trajectory, folder, opened, store):
    """train() is run_round after run_round, validated, tested, and recorded."""
    shown = []
    train(trajectory, 4, store, folder, progress=shown.append)
    assert shown == [0, 1, 2, 3, 4]
    net = build(trajectory).to(memory_format=torch.channels_last)
    data = open_data(trajectory.data, folder, "dk")
    state = {k: t.clone() for k, t in net.state_dict().items()}
    validations, states, rows = {}, {}, []
    for r in range(4):
        state, row = run_round(net, state, trajectory, r, data)
        rows.append(row)
        states[r + 1] = {k: t.clone() for k, t in state.items()}
        if r in (1, 3):
            load_state(net, state)
            validations[r] = evaluate(net, data.evaluation("val", "dk", 64, "cpu"))
    assert states_equal(state, last_state(store, trajectory))

    table = store.rounds(trajectory)
    assert table["round"].tolist() == [0, 1, 2, 3] and store.rounds_done(trajectory) == 4
    assert table["clients"].tolist() == [" ".join(map(str, r.clients)) for r in rows]
    for a in "dk":
        found = [r.losses["dk".index(a)] for r in rows]
        assert table[f"train_{a}"].tolist() == pytest.approx(found, rel=1e-5)
        assert table[f"val_{a}"].isna().tolist() == [True, False, True, False]
        for r, losses in validations.items():
            assert table[f"val_{a}"][r] == pytest.approx(losses[a], rel=1e-8)
    assert (table["seconds"] > 0).all() and (table["affinity_seconds"] > 0).all()
    assert (table["affinity_seconds"] < table["seconds"]).all()

    result = store.result(trajectory)
    best = min(validations, key=lambda r: sum(validations[r].values())) + 1
    assert result["best_round"] == best and result["rounds"] == 4
    for key, at in (("test_last", 4), ("test_best", best)):
        load_state(net, states[at])
        expected = evaluate(net, data.evaluation("test", "dk", 64, "cpu"))
        assert result[key] == pytest.approx(expected, rel=1e-6)
    assert result["test_images"] == 8 and result["data"] == data.images
    load_state(net, states[best])
    for k in range(4):  # each building's own test views, with the same model
        own = evaluate(net, data.evaluation("test", "dk", 64, "cpu", k))
        assert [result["test_best_clients"][a][k] for a in "dk"] == pytest.approx(
            [own["d"], own["k"]], rel=1e-5
        )
    assert json.loads((store.folder(trajectory) / "config.json").read_text()) == json.loads(
        json.dumps(trajectory.to_json())
    )


def test_affinities_of_a_trajectory(trajectory, folder, store):
    train(trajectory, 3, store, folder)
    found = store.affinities(trajectory)
    table = pd.read_csv(store.folder(trajectory) / "affinity.csv")
    assert found.rounds.tolist() == [0, 1, 2] and found.values.shape == (3, 2, 2, 2)
    assert found.clients.tolist() == [select_clients(trajectory, 4, r) for r in range(3)]
    assert (
        found.values[1, 0, 0, 1] == table["d>k"][2]
        and found.values[2, 1, 1, 0] == (table["k>d"][5])
    )
    assert np.isnan(found.values[..., 0, 0]).all() and np.isfinite(found.values[..., 0, 1]).all()


def test_measuring_leaves_a_trajectory_bit_identical(trajectory, folder, store, settings):
    plain = replace(trajectory, fl=replace(settings.fl, measure_rounds=0))
    for t in (trajectory, plain):
        train(t, 4, store, folder)
    assert trajectory.id != plain.id
    assert states_equal(last_state(store, trajectory), last_state(store, plain))
    assert store.result(trajectory)["test_best"] == store.result(plain)["test_best"]


def test_seeds_change_everything(trajectory, folder, store):
    train(trajectory, 2, store, folder)
    other = replace(trajectory, seed=1)
    train(other, 2, store, folder)
    a, b = last_state(store, trajectory), last_state(store, other)
    assert not any(torch.equal(a[k], b[k]) for k in a if k.endswith("weight"))


def test_a_branch_starts_from_its_parents_weights(trajectory, folder, store, settings):
    """Round 2's first client trains the restricted parent; its learning rate continues."""
    fl = replace(settings.fl, measure_rounds=0)
    branch = replace(trajectory, tasks="k", fl=fl, parent=trajectory, start_round=2)
    train(trajectory, 2, store, folder)
    train(branch, 4, store, folder)
    parent = last_state(store, trajectory, "round_0002")
    assert len(parent) > len(last_state(store, branch))
    net = build(branch).to(memory_format=torch.channels_last)
    state = {k: parent[k] for k in net.state_dict()}
    data = open_data(branch.data, folder, "k")
    for r in (2, 3):
        state, row = run_round(net, state, branch, r, data)
    assert states_equal(state, last_state(store, branch))
    rows = store.rounds(branch)
    assert rows["round"].tolist() == [2, 3]
    assert rows["lr"].tolist() == pytest.approx([0.1 * 0.5**0.9, 0.1 * 0.25**0.9])
    restarted = replace(branch, lr_from=2)
    train(restarted, 4, store, folder)
    assert store.rounds(restarted)["lr"].tolist() == pytest.approx([0.1, 0.1 * 0.5**0.9])
    # Clients are those of the same rounds of the parent's seed.
    assert rows["clients"].tolist() == [
        " ".join(map(str, select_clients(trajectory, 4, r))) for r in (2, 3)
    ]


def test_a_branch_of_a_parent_without_a_record_trains_it_first(trajectory, folder, store, tmp_path):
    branch = replace(trajectory, tasks="k", parent=trajectory, start_round=2)
    train(branch, 4, store, folder)
    from mas_core.records.store import Store

    other = Store(tmp_path / "other", "small")
    train(trajectory, 4, other, folder)
    train(branch, 4, other, folder)
    assert states_equal(last_state(store, branch), last_state(other, branch))
    assert not store.folder(trajectory).exists()


def test_state_at_any_round(trajectory, folder, store):
    """Kept or trained again from the nearest kept one: the same bits, and no files touched."""
    train(trajectory, 4, store, folder)
    files = {p: p.stat().st_mtime_ns for p in store.folder(trajectory).rglob("*")}
    net = build(trajectory).to(memory_format=torch.channels_last)
    data = open_data(trajectory.data, folder, "dk")
    state = start_state(trajectory, net, store, folder)
    for r in range(5):
        found = state_at(trajectory, r, store, folder, torch.device("cpu"))
        assert states_equal(found, state), r
        if r < 4:
            state, _ = run_round(net, state, trajectory, r, data)
    assert {p: p.stat().st_mtime_ns for p in store.folder(trajectory).rglob("*")} == files


def test_rounds_that_cannot_be_asked_for(trajectory, folder, store):
    with pytest.raises(UserError, match="round 5 asked for; allowed: 0 to 4"):
        train(trajectory, 5, store, folder)
    branch = replace(trajectory, tasks="k", parent=trajectory, start_round=2)
    with pytest.raises(UserError, match="round 1 asked for; allowed: 2 to 4"):
        train(branch, 1, store, folder)
    assert not store.root.exists()


def test_done_means_recorded_and_at_the_end_tested(trajectory, folder, store):
    assert not is_done(trajectory, 1, store) and is_done(trajectory, 0, store)
    train(trajectory, 2, store, folder)
    assert is_done(trajectory, 2, store) and not is_done(trajectory, 3, store)
    train(trajectory, 4, store, folder)
    (store.folder(trajectory) / "result.json").unlink()
    assert is_done(trajectory, 3, store) and not is_done(trajectory, 4, store)
    train(trajectory, 4, store, folder)
    assert is_done(trajectory, 4, store) and store.rounds_done(trajectory) == 4


# --- Methods' states and broken runs --------------------------------------------------------------


def test_gradnorm_weights_travel_with_the_model(trajectory, folder, store, settings):
    fl = replace(
        settings.fl, method="gradnorm", gradnorm_alpha=1.5, gradnorm_lr=0.05, measure_rounds=0
    )
    whole = replace(trajectory, fl=fl)
    train(whole, 4, store, folder)
    rows = store.rounds(whole)
    weights = rows[["weight_d", "weight_k"]].to_numpy()
    assert (weights > 0).all() and weights.sum(1) == pytest.approx([2.0] * 4, rel=1e-4)
    assert (np.abs(np.diff(weights[:, 0])) > 1e-5).all() and abs(weights[0, 0] - 1) > 1e-5
    state = last_state(store, whole)
    assert state["balance.weights"].tolist() == pytest.approx(weights[-1].tolist(), rel=1e-4)
    assert not store.checkpoint_path(whole, "x").with_name("affinity.csv").exists()
    # The first losses, each client's own, were averaged in round 0 and kept.
    assert (state["balance.initial_losses"] > 0).all()
    half = state_at(whole, 1, store, folder, torch.device("cpu"))
    torch.testing.assert_close(half["balance.initial_losses"], state["balance.initial_losses"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_task_client_round_and_rate(
    trajectory, folder, store, monkeypatch, bad
):
    real, calls = federated.local_update, []

    def poisoned(net, *arguments):
        calls.append(1)
        if len(calls) == 6:  # round 2's second client
            with torch.no_grad():
                net.decoders["k"].last[1].weight.fill_(bad)
        return real(net, *arguments)

    monkeypatch.setattr(federated, "local_update", poisoned)
    client = select_clients(trajectory, 4, 2)[1]
    name = ["attic", "barn", "cellar", "den"][client]
    with pytest.raises(TrainingDiverged) as error:
        train(trajectory, 4, store, folder)
    text = str(error.value)
    assert "task 'k'" in text and f"client {name}" in text and "round 2" in text
    assert f"{trajectory.lr(2):.4g}" in text and "\n" not in text
    assert store.rounds(trajectory)["round"].tolist() == [0, 1]
    assert store.result(trajectory) is None
    assert all(t.isfinite().all() for t in last_state(store, trajectory).values())
    # The rounds before it can be gone on from.
    monkeypatch.setattr(federated, "local_update", real)
    train(trajectory, 4, store, folder)
    assert store.result(trajectory)["test_last"]


def test_a_learning_rate_that_is_too_large_diverges_in_words(trajectory, folder, store, settings):
    fl = replace(settings.fl, lr=100.0, momentum=0.99, measure_rounds=0, local_epochs=8)
    with pytest.raises(TrainingDiverged, match="round . at learning rate .*lower fl.lr"):
        train(replace(trajectory, fl=fl), 4, store, folder)


def test_a_validation_loss_that_is_not_finite_stops_too(trajectory, folder, store, monkeypatch):
    """Weights can break in a client's last step, after its last training loss."""
    real = training.evaluate

    def broken(net, batches):
        return real(net, batches) | {"k": float("nan")}

    monkeypatch.setattr(training, "evaluate", broken)
    with pytest.raises(TrainingDiverged, match="'k' is nan on validation in round 1"):
        train(trajectory, 4, store, folder)
    assert store.rounds(trajectory)["round"].tolist() == [0]


def test_standalone_clients_train_on_their_own_images_alone(trajectory, folder, store, settings):
    fl = replace(settings.fl, clients=(2,), clients_per_round=1, measure_rounds=0)
    alone = replace(trajectory, fl=fl)
    train(alone, 2, store, folder)
    assert store.rounds(alone)["clients"].astype(str).tolist() == ["2", "2"]
    assert store.rounds(alone)["samples"].tolist() == [12, 12]  # 14 views, batches of 4


def test_two_runs_are_bit_identical(trajectory, folder, store, tmp_path):
    from mas_core.records.store import Store

    stores = [store, Store(tmp_path / "again", "small")]
    for s in stores:
        torch.manual_seed(len(s.preset))  # the global generator has no say
        train(trajectory, 4, s, folder)
    tables = [s.rounds(trajectory).drop(columns=UNTIMED) for s in stores]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert states_equal(*(last_state(s, trajectory) for s in stores))
