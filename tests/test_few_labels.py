"""Clients that hold some tasks' labels: masked losses, who averages what, and the rivals."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from mas.paper import few_labels as experiment
from mas.rivals.cagrad import conflict_averse
from mas.rivals.client_kinds import CLIENT_KINDS, tiny_1, tiny_2
from mas.rivals.fedhca2 import ADDED, SHARE, SPEED, FedHCA2, attended, followed
from mas.rivals.label_holders import HELD, OPTION, SENT, TOLD, LabelHolders, update_cosines
from mas.rivals.matfl import MaTFL, mixing_weights
from mas.rivals.update_selection import selected
from mas.run.engine import collect
from mas_core.config import FL, Model, settings
from mas_core.federated import run_round
from mas_core.local import local_update
from mas_core.models import MultiTaskNet, build
from mas_core.records.store import Store
from mas_core.records.study import Study
from mas_core.records.training import train
from mas_core.tasks import TASKS, Batch, task_losses

PLAIN = FL(batch_size=4)
MINE = replace(PLAIN, method="label_holders")


def only(batch, held):
    """The batch with the targets of some tasks alone."""
    return Batch(batch.image, batch.mask, {a: batch.targets[a] for a in held}, batch.table)


def returned(sent, p, held, tasks, options=(), **own):
    """What a client sends back: its weights by name, the tasks that it held, what it was sent."""
    marks = {HELD + a: torch.tensor(a in held) for a in tasks}
    numbers = {OPTION + n: torch.tensor(x, dtype=torch.float64) for n, x in options}
    weights = {n.replace("__", "."): torch.tensor(x) for n, x in own.items()}
    return marks | numbers | {SENT + n: t for n, t in sent.items()} | sent | weights, p


# --- One client -----------------------------------------------------------------------------------


def test_a_step_trains_on_the_tasks_held_and_leaves_the_other_decoder_alone(batch):
    made = only(batch("dk"), "d")
    net, alone = MultiTaskNet("dk", "tiny", 4, seed=1), MultiTaskNet("d", "tiny", 4, seed=1)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    result = local_update(net, [made, made], MINE, 0.01, state=before)
    expected = local_update(alone, [made, made], PLAIN, 0.01)
    assert result.step_losses[:, 0].tolist() == expected.step_losses[:, 0].tolist()
    assert result.step_losses[:, 1].tolist() == [0, 0]
    after, single = net.state_dict(), alone.state_dict()
    assert all(torch.equal(after[n], single[n]) for n in single)
    others = [n for n in after if n not in single]
    assert others and all(torch.equal(after[n], before[n]) for n in others)
    assert {n: bool(t) for n, t in result.travelling.items() if n.startswith(HELD)} == {
        HELD + "d": True, HELD + "k": False,
    }  # fmt: skip


def test_with_every_label_it_is_all_in_one(trajectory, opened, settings):
    def after_two_rounds(method):
        fl = replace(settings.fl, method=method, measure_rounds=0)
        t = replace(trajectory, fl=fl)
        net = build("dk", settings.model, 0)
        state = {n: tensor.clone() for n, tensor in net.state_dict().items()}
        for r in range(2):
            state, made = run_round(net, state, t, r, opened)
        return state, made

    usual, round_ = after_two_rounds("fedavg")
    mine, told = after_two_rounds("label_holders")
    assert told.losses == pytest.approx(round_.losses, rel=1e-6)
    assert told.reported["share_d"] == pytest.approx(1)
    assert np.isnan(told.reported["cos_d_k"])  # all clients hold both
    for name, tensor in usual.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-7)


# --- The server -----------------------------------------------------------------------------------


def test_encoder_over_all_and_a_decoder_over_those_who_trained_it():
    sent = {n: torch.zeros(2) for n in ("encoder.w", *(f"decoders.{a}.w" for a in "dkn"))}
    names = {"encoder__w": [4.0, 0.0], "decoders__d__w": [1.0, 1.0], "decoders__k__w": [9.0, 9.0]}
    other = {"encoder__w": [0.0, 8.0], "decoders__d__w": [5.0, 1.0]}
    third = {"encoder__w": [0.0, 0.0], "decoders__n__w": [0.0, 0.0]}
    new = LabelHolders.average([
        returned(sent, 0.25, "dk", "dkn", **names),
        returned(sent, 0.5, "d", "dkn", **other),
        returned(sent, 0.25, "", "dkn", **third),
    ])  # fmt: skip
    assert new["encoder.w"].tolist() == [1.0, 4.0]  # 0.25 (4, 0) + 0.5 (0, 8)
    assert new["decoders.d.w"].tolist() == pytest.approx([11 / 3, 1.0])  # (1 + 2 x 5) / 3
    assert new["decoders.k.w"].tolist() == [9.0, 9.0]
    assert new["decoders.n.w"].tolist() == [0.0, 0.0]  # nobody
    assert not [n for n in new if n.startswith((HELD, SENT))]
    told = LabelHolders.report(new, "dkn")
    assert {a: told[f"share_{a}"] for a in "dkn"} == {"d": 0.75, "k": 0.25, "n": 0.0}
    assert np.isnan(told["cos_d_n"]) and list(told) == sorted(told)


def test_cosines_of_single_tasks_are_those_of_their_clients_weighted_means():
    """Task 0: 0.25 (4, 0) and 0.25 (0, 4), so (2, 2); task 1: (1, 0); nobody holds task 2."""
    updates = torch.tensor([[4.0, 0.0], [0.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    held = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0]])
    cos = update_cosines(updates, held, torch.tensor([0.25, 0.25, 0.5]))
    assert cos[0, 1] == cos[1, 0] == pytest.approx(np.sqrt(0.5))
    assert cos[2].isnan().all() and cos[:, 2].isnan().all()


def test_clients_that_share_a_task_are_not_compared():
    """Tasks 0 and 1 by {0, 2}: (1, 0), {1, 3}: (3, 4), {0, 1}: (0, 9).

    Only the first two have nothing in common: <D, D'> = 3. The mean updates (p all alike) are
    u_0 = (1/2, 9/2), u_1 = (3/2, 13/2).
    """
    updates = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 9.0]], dtype=torch.float64)
    held = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]])
    cos = update_cosines(updates, held, torch.tensor([0.25, 0.25, 0.25]))
    norms = np.hypot(0.5, 4.5) * np.hypot(1.5, 6.5)
    assert cos[0, 1].item() == pytest.approx(3 / norms)
    assert cos[0, 2].isnan()  # who holds 2 holds 0
    assert cos[2, 3].item() == pytest.approx(3 / 5)


# --- Who holds what -------------------------------------------------------------------------------


def test_who_holds_what_and_how_many_train_a_round(tmp_path):
    assert [experiment.held_by(k, 1) for k in (0, 4, 5, 31)] == ["s", "t", "s", "d"]
    assert [experiment.held_by(k, 2) for k in (0, 4, 5)] == ["sd", "ts", "sd"]
    assert experiment.held_by(7, 5) == "sdnkt"
    s = Study("sdnkt", settings("small"), 0, Store(tmp_path, "small"))
    assert experiment.clients_a_round(s, 5, "sdnkt") == (None, 4)
    assert experiment.clients_a_round(s, 1, "sdnkt") == (None, 20)
    assert experiment.clients_a_round(s, 2, "sdnkt") == (None, 10)
    assert experiment.clients_a_round(s, 1, "s") == ((0, 5, 10, 15, 20, 25, 30), 4)
    pool, K = experiment.clients_a_round(s, 2, "sd")  # ts, sd, dn: 6 + 7 + 7; (6 + 14 + 7) / 20
    assert len(pool) == 20 and K == round(4 * 2 / (27 / 20))
    few = Study("sdnkt", settings("smoke"), 0, Store(tmp_path, "smoke"))
    assert experiment.clients_a_round(few, 1, "t") == ((4,), 1)


def test_a_client_sees_its_labels_alone_and_all_are_tested(opened):
    data = experiment.HeldLabels(opened, 2)
    usual = opened.epoch(1, "sdnkt", 4, np.random.default_rng(0), "cpu")
    for mine, plain in zip(data.epoch(1, "sdnkt", 4, np.random.default_rng(0), "cpu"), usual):
        assert list(mine.targets) == ["d", "n"]
        assert torch.equal(mine.image, plain.image)
        assert torch.equal(mine.targets["n"], plain.targets["n"])
    (first, *_) = data.epoch(1, "nk", 4, np.random.default_rng(0), "cpu")
    assert list(first.targets) == ["n"]
    assert list(next(data.evaluation("test", "sdnkt", 4, "cpu")).targets) == list("sdnkt")
    other = experiment.HeldLabels(opened, 1)
    assert len({data.fingerprint, other.fingerprint, opened.fingerprint}) == 3
    assert data.images == opened.images


# --- Rivals ---------------------------------------------------------------------------------------


def test_the_largest_dimensions_of_an_update_on_a_literal():
    """Of (1, -4, 3, 2) half are kept: -4 and 3, times 10 / 7."""
    update = torch.tensor([[1.0, -4.0], [3.0, 2.0]])
    assert selected(update, 0.5).flatten().tolist() == pytest.approx([0, -40 / 7, 30 / 7, 0])
    assert selected(update, 0.6).abs().sum() == pytest.approx(10)  # three of four
    assert selected(update, 1.0).tolist() == update.tolist()
    assert selected(torch.zeros(3), 0.3).tolist() == [0, 0, 0]


def test_a_client_sends_the_selection_of_its_encoder_update(batch):
    fl = replace(PLAIN, method="update_selection", options=(("keep", 0.2),))
    net = MultiTaskNet("dk", "tiny", 4)
    sent = {n: t.clone() for n, t in net.state_dict().items()}
    result = local_update(net, [batch("dk")], fl, 0.01, state=sent)
    name = "encoder.0.weight"  # 8 x 3 x 3 x 3 = 216
    update, whole = result.travelling[name] - sent[name], net.state_dict()[name] - sent[name]
    assert (update != 0).sum() == 44
    assert update.abs().sum().item() == pytest.approx(whole.abs().sum().item(), rel=1e-3)
    replaced = [n for n in result.travelling if n in sent]
    assert name in replaced and all(n.startswith("encoder.") for n in replaced)
    assert not [n for n in replaced if "running" in n]


@pytest.mark.parametrize(("network", "labels"), [(tiny_1, 1), (tiny_2, 2)])
def test_every_kind_serves_its_first_task(network, labels):
    net = network("sdnkt", Model("tiny", output_stride=4), 3, TASKS).eval()
    assert list(net.kinds) == list(CLIENT_KINDS[labels])
    for own in net.kinds.values():  # the seed's initial weights, as ever
        usual = MultiTaskNet(own.tasks, "tiny", 4, seed=3).state_dict()
        assert all(torch.equal(t, usual[n]) for n, t in own.state_dict().items())
    with torch.no_grad():
        for p in net.kinds[CLIENT_KINDS[labels][3]].parameters():
            p.mul_(1.5)
        image = torch.rand(2, 3, 16, 16)
        found = net(image)
        assert list(found) == list("sdnkt")
        assert torch.equal(found["k"], net.kinds[CLIENT_KINDS[labels][3]](image)["k"])
        assert torch.equal(found["n"], net.kinds[CLIENT_KINDS[labels][2]](image)["n"])
        assert not torch.equal(found["k"], MultiTaskNet("k", "tiny", 4, seed=3).eval()(image)["k"])


def test_personal_networks_train_and_average_by_kind(batch):
    net = tiny_2("sdnkt", Model("tiny", output_stride=4), 0, TASKS)
    fl = replace(PLAIN, method="matfl")
    sent = {n: t.clone() for n, t in net.state_dict().items()}
    made = only(batch("sdnkt"), "st")
    result = local_update(net, [made], fl, 0.01, state=sent)
    assert (result.step_losses[0] > 0).tolist() == [True, False, False, False, True]
    with torch.no_grad():
        usual = MultiTaskNet("st", "tiny", 4).train()
        expected = task_losses(usual(made.image), made)
    assert result.step_losses[0][[0, 4]].tolist() == pytest.approx(expected.tolist())
    changed = {n.split(".")[1] for n, t in net.state_dict().items() if not torch.equal(t, sent[n])}
    assert changed == {"ts"}


def test_mat_fl_weights_by_hand():
    """Mean (1, 1); beyond it (2, 0), (-1, 1), (-1, -1): cosines -1/sqrt 2, -1/sqrt 2 and 0."""
    encoders = torch.tensor([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    near = 1 - np.sqrt(0.5)
    rows = np.array([[2, near, near], [near, 2, 1], [near, 1, 2]])
    assert mixing_weights(encoders, 1.0).numpy() == pytest.approx(rows / rows.sum(1)[:, None])
    assert mixing_weights(encoders, 0.0).tolist() == np.eye(3).tolist()
    assert mixing_weights(encoders[:1], 0.0).tolist() == [[1.0]]


def personal(**own):
    """A server state of two kinds, d and k, and what one client of each returns."""
    sent = {f"kinds.{a}.{n}": torch.zeros(2) for a in "dk"
            for n in ("encoder.w", "encoder.running_mean", f"decoders.{a}.long.w",
                      f"decoders.{a}.last.w")}  # fmt: skip
    return sent, {n.replace("__", "."): torch.tensor(t) for n, t in own.items()}


def test_mat_fl_mixes_encoders_and_leaves_decoders():
    sent, new = personal(
        kinds__d__encoder__w=[4.0, 0.0], kinds__k__encoder__w=[0.0, 0.0],
        kinds__d__encoder__running_mean=[8.0, 0.0], kinds__d__decoders__d__long__w=[3.0, 3.0],
    )  # fmt: skip
    clients = [returned(sent, 0.5, a, "dk", [("threshold", 1.5)],
                        **{n: t.tolist() for n, t in new.items() if f".{a}." in n})
               for a in "dk"]  # fmt: skip
    after = MaTFL.average(clients)  # cosines -1: weights 2.5 and 0.5, so 5/6 and 1/6
    assert after["kinds.d.encoder.w"].tolist() == pytest.approx([20 / 6, 0])
    assert after["kinds.k.encoder.w"].tolist() == pytest.approx([4 / 6, 0])
    assert after["kinds.k.encoder.running_mean"].tolist() == pytest.approx([8 / 6, 0])
    assert after["kinds.d.decoders.d.long.w"].tolist() == [3, 3]
    assert MaTFL.report(after, "dk")["own_d"] == pytest.approx(5 / 6)
    alone = MaTFL.average(clients[1:])  # nobody of kind d: it stays
    assert torch.equal(alone["kinds.d.encoder.w"], sent["kinds.d.encoder.w"])


def test_fedhca2_aggregates_by_hand():
    """Encoders: own update plus 0.1 U. Decoders: plus 0.1 A; the output layer has its own alone."""
    sent, new = personal(
        kinds__d__encoder__w=[2.0, 0.0], kinds__k__encoder__w=[-1.0, 1.0],
        kinds__d__decoders__d__long__w=[1.0, 0.0], kinds__k__decoders__k__long__w=[0.0, 2.0],
        kinds__d__decoders__d__last__w=[7.0, 7.0],
    )  # fmt: skip
    shares = {SHARE + n: torch.tensor(0.1) for n in
              ("d.encoder", "k.encoder", "d.decoders.d.long", "k.decoders.k.long")}  # fmt: skip
    sent |= shares
    options = {OPTION + "c": torch.tensor(0.4), OPTION + "hyper_lr": torch.tensor(0.01)}
    after = FedHCA2.mixed(sent, sent | new, ["d", "k"], options)
    J = np.array([[2.0, 0.0], [-1.0, 1.0]])
    U = conflict_averse(J @ J.T, 0.4) @ J / 2 / (1 + 0.4**2)
    assert after["kinds.d.encoder.w"].numpy() == pytest.approx(J[0] + 0.1 * U, abs=1e-5)
    assert after["kinds.k.encoder.w"].numpy() == pytest.approx(J[1] + 0.1 * U, abs=1e-5)
    e = np.exp([1 / np.sqrt(2), 0.0])
    A = (e / e.sum()) @ np.array([[1.0, 0.0], [0.0, 2.0]])  # of decoder d: q K^T = (1, 0)
    expected = np.array([1.0, 0.0]) + 0.1 * A
    assert after["kinds.d.decoders.d.long.w"].numpy() == pytest.approx(expected, abs=1e-6)
    assert "kinds.d.decoders.d.last.w" not in after  # stays what the kind's mean is
    assert after[ADDED + "kinds.k.encoder.w"].numpy() == pytest.approx(U, abs=1e-5)
    assert after[TOLD + "alpha_d"] == after[TOLD + "beta_k"] == pytest.approx(0.1)


def test_fedhca2_shares_follow_the_next_update_by_hand():
    """Gradient -<U, D'> = -2, with decay 1e-4 x 0.1; then with momentum 0.9."""
    name, layer = "kinds.d.encoder.w", "d.encoder"
    sent = {ADDED + name: torch.tensor([1.0, 0.0]), SHARE + layer: torch.tensor(0.1)}
    update = {name: torch.tensor([2.0, 5.0])}
    learnt = followed(sent, update, 0.01)
    speed = -2 + 1e-5
    assert learnt[SHARE + layer].item() == pytest.approx(0.1 - 0.01 * speed)
    again = followed(sent | learnt, update, 0.01)
    assert again[SPEED + layer].item() == pytest.approx(0.9 * speed - 2 + 1e-4 * 0.12, rel=1e-5)
    outside = sent | {SHARE + layer: torch.tensor(1.5)}  # clipped: decay alone
    assert followed(outside, update, 0.01)[SPEED + layer].item() == pytest.approx(1.5e-4)
    assert followed({SHARE + layer: torch.tensor(0.1)}, update, 0.01) == {}  # the first round


def test_attention_is_among_tensors_of_one_place():
    updates = {"kinds.d.decoders.d.long.w": torch.tensor([2.0]),
               "kinds.k.decoders.k.long.w": torch.tensor([2.0]),
               "kinds.k.decoders.k.long.b": torch.tensor([5.0, 6.0]),
               "kinds.k.encoder.w": torch.tensor([1.0])}  # fmt: skip
    found = attended(updates)
    assert {n: t.tolist() for n, t in found.items()} == {
        "kinds.d.decoders.d.long.w": [2.0], "kinds.k.decoders.k.long.w": [2.0],
        "kinds.k.decoders.k.long.b": [5.0, 6.0],
    }  # fmt: skip


# --- The experiment -------------------------------------------------------------------------------


def test_the_recipes_share_the_records_of_full_labels(tmp_path):
    store = Store(tmp_path, "small")
    recipes = experiment.few_labels(store, 0, {})
    names = {"one-by-one", "one-by-one restarted", "all-in-one", "MAS-1", "MAS-2",
             "update selection"}  # fmt: skip
    rest = {"MAS-2 full", "MaT-FL", "FedHCA2"}
    keys = {f"{n} m=5" for n in names} | {f"{n} m={m}" for n in names | rest for m in (1, 2)}
    assert {key[0] for key in recipes} == keys
    assert {k[0] for k in experiment.few_labels(store, 0, {}, (1,))} == {
        f"{n} m=1" for n in names | rest
    }
    s = Study("sdnkt", settings("small"), 0, store)
    needed = {n.trajectory for n in collect(recipes, store)[1]}
    full = {t for t in needed if t.data.source == "rooms" and t.fl.clients is None}
    assert s.all_in_one() in full and s.from_scratch("k") in full
    assert len(full - {t for t in full if t.fl.method == "update_selection"}) == 6  # to R0
    trunk = experiment.training(s, 1)
    assert trunk in needed and trunk.fl.clients_per_round == 20
    branch = experiment.split_off(s, 1, "sd", trunk)
    assert (branch.parent, branch.start_round, branch.lr_from) == (trunk, 30, 30)
    assert branch.fl.clients_per_round == 8 and branch.fl.measure_rounds == 0
    assert len(branch.fl.clients) == 14


def test_the_split_reads_the_cosines_on_record():
    table = {"round": [0, 1, 2], "cos_d_k": [0.5, np.nan, 9], "cos_d_s": [0.1, 0.3, 9],
             "cos_k_s": [np.nan, np.nan, 9]}  # fmt: skip
    store = SimpleNamespace(rounds=lambda t: pd.DataFrame(table))
    S = experiment.cosines(store, SimpleNamespace(tasks="sdk"), 2)
    assert S.tolist() == [[0, pytest.approx(0.2), 0], [pytest.approx(0.2), 0, 0.5], [0, 0.5, 0]]


@pytest.mark.parametrize("method", ["label_holders", "update_selection", "matfl", "fedhca2"])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(method, folder, tmp_path, settings):
    found = []
    for results, stops in (("whole", [4]), ("stopped", [1, 3, 4])):
        store = Store(tmp_path / results, "small")
        s = Study("sdnkt", settings, 0, store)
        trajectory = experiment.training(s, 2, method=method)
        for until in stops:
            train(trajectory, until, store, folder)
        rows = store.rounds(trajectory).drop(columns=["seconds", "joules"])
        state = load_file(store.checkpoint_path(trajectory, "last"))
        found.append((state, rows, store.result(trajectory)["test_best"]))
    (one, rows, tested), (other, same_rows, same_tested) = found
    assert one.keys() == other.keys() and rows.equals(same_rows) and len(rows) == 4
    assert tested == same_tested and all(np.isfinite(list(tested.values())))
    for name, tensor in one.items():
        assert torch.equal(tensor.nan_to_num(-1), other[name].nan_to_num(-1)), name
