"""What a user hands in from outside: a rule, a table of tasks, a network, a source of data."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mas.run import engine
from mas_core.config import FL, RULES, UserError, override
from mas_core.data.clients import open_data
from mas_core.fedavg import FedAvg, rule_of
from mas_core.federated import TrainingDiverged, run_round
from mas_core.methods import all_in_one, hoa, merge_and_split, restarted
from mas_core.records.study import Study
from mas_core.records.training import build, train
from mas_core.tasks import Task, TaskTable

MODULE = '''
from dataclasses import replace

import torch
from mas_core.data.clients import open_data
from mas_core.models import MultiTaskNet
from mas_core.fedavg import FedAvg, weighted_mean
from mas_core.tasks import Batch, Task, TaskTable, cross_entropy, l1


class Weighted(FedAvg):
    """Losses weighted by the option `first`; the steps taken travel, the server halves them."""

    options = {"first": 1.0}

    @classmethod
    def start(cls, net, fl):
        return {"mine.steps": torch.zeros(())}

    def travelling(self):
        return {"mine.steps": self.state["mine.steps"] + self.taken}

    @classmethod
    def report(cls, state, tasks):
        return {"steps": float(state["mine.steps"])}

    @staticmethod
    def average(states):
        mean = weighted_mean(states)
        return mean | {"mine.steps": mean["mine.steps"] / 2}

    taken = 0

    def loss_weights(self):
        return torch.tensor([self.option(self.fl, "first"), 1.0])

    def after(self, batch, losses, at_features):
        self.taken += 1


TABLE = TaskTable(
    Task("b", "the image itself", "rgb", "uint8x3", 3, divisor=255.0),
    Task("y", "what is where", "segment_semantic", "uint8", 18, loss=cross_entropy, classes=True),
    Task("z", "what is where, again", "segment_semantic", "uint8", 18, loss=cross_entropy,
         classes=True),
    mask=None,
)


def narrow(letters, model, seed, table):
    return MultiTaskNet(letters, "tiny", model.output_stride, seed, table)


def frozen(letters, model, seed, table):
    """Its first convolution keeps its weights; half of the features are dropped out."""
    net = narrow(letters, model, seed, table)
    net.encoder[0].requires_grad_(False)
    net.encoder = torch.nn.Sequential(net.encoder, torch.nn.Dropout(0.5))
    return net


def fewer_channels(letters, model, seed, table):
    small = TaskTable(*(replace(task, channels=2) for task in table.values()))
    net = MultiTaskNet(letters, "tiny", model.output_stride, seed, small)
    net.table = table
    return net


def beside(letters, model, seed, table):
    net = narrow(letters, model, seed, table)
    net.scale = torch.nn.Parameter(torch.ones(()))
    return net


def no_network(letters, model, seed, table):
    pass


class Late(FedAvg):
    """Its server has all clients at once, as a median would."""

    @classmethod
    def average(cls, states):
        states = list(states)
        name = max(n for n in states[0][0] if n.startswith("decoders.s."))
        a, b = (state[name] for state, _ in states)
        assert not torch.equal(a, b)
        return weighted_mean(states)


class LikeAWeight(FedAvg):
    @classmethod
    def start(cls, net, fl):
        return {"encoder.mine": torch.zeros(())}


def no_matrix(losses, gradients, lr):
    return losses


def less(output, target, mask):
    return l1(output, target, mask) - 1000


def undefined(output, target, mask):
    return l1(output, target, mask) * torch.nan


NEGATIVE, NAN = (TaskTable(*(Task(a, "", "rgb", "uint8x3", 3, loss=loss) for a in "xy"))
                 for loss in (less, undefined))
number = 1
opened = []


class WithoutTable:
    """Rooms whose batches forget the own table."""

    def __init__(self, rooms):
        self.rooms = rooms

    def __getattr__(self, name):
        return getattr(self.rooms, name)

    def epoch(self, *given):
        for batch in self.rooms.epoch(*given):
            yield Batch(batch.image, batch.mask, batch.targets)


def forgetful(data, folder, letters):
    return WithoutTable(open_data(data, folder, letters))


def source(data, folder, letters):
    opened.append(letters)
    return open_data(data, folder, letters)
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "my_study.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_study", None)


def rows(store, trajectory):
    return store.rounds(trajectory)


def test_a_rule(outside, trajectory, folder, store, settings):
    fl = replace(settings.fl, method="my_study:Weighted", clients_per_round=1, clients=(1,),
                 measure_rounds=0)  # fmt: skip
    mine = replace(trajectory, fl=fl)
    plain = replace(trajectory, fl=replace(fl, method="fedavg"))
    uneven = replace(trajectory, fl=replace(fl, options=(("first", 3.0),)))
    for t in (mine, plain, uneven):
        train(t, 3, store, folder)  # interrupted: what travels is in the checkpoint
        train(t, 4, store, folder)
    # Client 1 takes two steps a round: 2/2, (1 + 2)/2, (1.5 + 2)/2, ...
    assert rows(store, mine)["steps"].tolist() == [1.0, 1.5, 1.75, 1.875]
    assert store.result(mine)["test_last"] == store.result(plain)["test_last"]
    assert store.result(uneven)["test_last"] != store.result(plain)["test_last"]
    assert len({mine.id, plain.id, uneven.id}) == 3
    assert store.trajectory(uneven.id) == uneven


def test_what_changes_a_step_is_neither_captured_nor_grouped():
    changed = ("step", "loss_weights", "encoder_backward", "correct", "after", "network",
               "travelling", "__init__")  # fmt: skip
    for name in changed:
        assert FedAvg.captured and not type("Own", (FedAvg,), {name: None}).captured
    assert type("Own", (FedAvg,), {"average": None}).captured  # the server's part alone
    assert type("Own", (FedAvg,), {"correct": None, "captured": True}).captured
    own = [rule_of(FL(method=name)) for name in RULES if name != "fedavg"]
    assert len(own) == 12 and not any(rule.captured for rule in own)


def test_a_branch_begins_the_state_of_its_rule_anew(outside, settings, folder, store):
    fl = replace(settings.fl, method="my_study:Weighted", options=(("first", 2.0),))
    study = Study("sd", replace(settings, fl=fl), 0, store)
    recipes = {"split": merge_and_split(study, 2), "whole": restarted(study, ["sd"], "MAS-1")}
    found = engine.run(recipes, store, folder)
    branch, R0 = found["whole"].parts[-1].trajectory, settings.mas.merge_rounds
    train(branch.parent, settings.fl.rounds, store, folder)
    steps, before = (rows(store, t)["steps"].tolist() for t in (branch, branch.parent))
    assert len(steps) == settings.fl.rounds - R0
    assert steps[0] == pytest.approx(before[R0] - before[R0 - 1] / 2, abs=1e-3)
    assert found["split"].groups == ("s", "d")
    with pytest.raises(UserError, match="my_study:Weighted has no 'last'; allowed: first"):
        Study("sd", replace(settings, fl=replace(fl, options=(("last", 2.0),))), 0, store)
    with pytest.raises(UserError, match="has no 'first' twice; allowed: first"):
        Study("sd", replace(settings, fl=replace(fl, options=(("first", 2.0),) * 2)), 0, store)


def test_hoa_of_own_tasks_in_their_tables_order(outside, settings, folder, store):
    study = Study("zyb", override(settings, {"data.tasks": "my_study:TABLE"}), 0, store)
    found = engine.run({"hoa": hoa(study, 2)}, store, folder)["hoa"]
    assert sorted("".join(sorted(set("".join(found.groups))))) == ["b", "y", "z"]
    assert all(list(g) == sorted(g) for g in found.groups)


def test_tasks_a_network_and_a_source_of_data(outside, settings, folder, store):
    changes = {"data.tasks": "my_study:TABLE", "data.source": "my_study:source",
               "model.size": "my_study:narrow"}  # fmt: skip
    study = Study("zyb", override(settings, changes), 0, store)
    recipes = {"all": all_in_one(study), "mas": merge_and_split(study, 2)}
    found = engine.run(recipes, store, folder)
    assert found["all"].groups == ("zyb",) and study.all_in_one().tasks == "byz"
    # Two copies of one task learn alike, an uneven share of nothing: the split keeps them together.
    assert sorted("".join(found["mas"].groups)) == ["b", "y", "z"]
    losses = found["all"].losses
    assert losses["y"] != losses["z"] and losses["y"] == pytest.approx(losses["z"], rel=0.5)
    constant = store.result(study.all_in_one())["test_constant"]
    assert constant["y"] == constant["z"] > 0 and torch.isfinite(torch.tensor(constant["b"]))
    assert sys.modules["my_study"].opened[0] == "byz"
    assert store.trajectory(study.all_in_one().id) == study.all_in_one()


@pytest.mark.parametrize("name", ["no_such_module:Rule", "my_study:NoSuchRule"])
def test_what_cannot_be_imported_is_named(outside, trajectory, folder, store, settings, name):
    t = replace(trajectory, fl=replace(settings.fl, method=name))
    with pytest.raises(UserError, match=f"'{name}' cannot be imported"):
        train(t, 1, store, folder)


def test_frozen_layers_stay_and_dropout_is_the_seeds(outside, trajectory, folder, store):
    t = replace(trajectory, model=replace(trajectory.model, size="my_study:frozen"))
    initial = build(t).encoder[0][0].weight
    fl = replace(t.fl, measure_rounds=0)
    again = replace(t, fl=replace(fl, evaluate_every=3))  # another record of the same training
    for each, until in ((t, 4), (replace(t, fl=fl), 4), (again, 2), (again, 4)):
        torch.manual_seed(until)  # what else draws from PyTorch's own stream is no matter
        train(each, until, store, folder)
    measured, plain, stopped = (store.result(x)["test_last"] for x in (t, replace(t, fl=fl), again))
    assert measured == plain == stopped
    state = load_file(store.checkpoint_path(t, "last"))
    assert torch.allclose(state["encoder.0.0.weight"], initial, rtol=1e-6)  # averaged, no more
    S = store.affinities(t).values
    assert np.isfinite(S[..., 0, 1]).all() and (S[..., 0, 1] != 0).all()
    train(replace(t, fl=replace(fl, method="cagrad")), 1, store, folder)


WRONG = {
    "model.size=my_study:fewer_channels": "task 's' with 18 channels: outputs .*, 2, 16, 16. and",
    "model.size=my_study:no_network": "my_study:no_network returned None, no network",
    "model.size=my_study:number": "'my_study:number' is 1, no Callable",
    "fl.affinity=my_study:no_matrix": r"no_matrix returned tensor.*, no tensor \(2, 2\)",
    "fl.method=my_study:narrow": "'my_study:narrow' is <function narrow.*, no type",
    "fl.method=my_study:TaskTable": "TaskTable.* no subclass of fedavg.FedAvg",
    "data.tasks=my_study:number": "'my_study:number' is 1, no TaskTable",
    "fl.method=my_study:LikeAWeight": "own state encoder.mine is named like a weight",
}


@pytest.mark.parametrize("setting", WRONG)
def test_what_is_of_the_wrong_kind_is_named(outside, settings, folder, store, setting):
    with pytest.raises(UserError, match=WRONG[setting]):
        study = Study("sd", override(settings, dict([setting.split("=")])), 0, store)
        train(study.all_in_one(), 1, store, folder)


def test_losses_below_zero_and_undefined_ones_are_refused(outside, settings, folder, store):
    def first_round(table):
        study = Study("xy", override(settings, {"data.tasks": f"my_study:{table}"}), 0, store)
        train(study.all_in_one(), 1, store, folder)

    with pytest.raises(UserError, match=r"task 'x' is -9.*; Eq. 3 takes shares of a loss"):
        first_round("NEGATIVE")
    with pytest.raises(TrainingDiverged, match="'x' is nan .* before any step; look at its labels"):
        first_round("NAN")


def test_an_average_that_collects_its_clients_gets_each_ones_weights(
    outside, settings, folder, store
):
    def losses(method):
        t = Study("sd", override(settings, {"fl.method": method}), 0, store).all_in_one()
        train(t, 2, store, folder)
        return rows(store, t)[["train_s", "train_d"]]

    assert losses("my_study:Late").equals(losses("fedavg"))


def test_batches_of_the_packages_table_are_refused_where_there_is_another(
    outside, settings, folder, store
):
    changed = {"data.tasks": "my_study:NEGATIVE", "data.source": "my_study:forgetful"}
    with pytest.raises(UserError, match="batches have the package's table of tasks"):
        train(Study("xy", override(settings, changed), 0, store).all_in_one(), 1, store, folder)


@pytest.mark.parametrize("seed", ["0", 0.5, True])
def test_a_seed_is_a_whole_number(settings, store, seed):
    with pytest.raises(UserError, match="allowed: a whole number"):
        Study("sd", settings, seed, store)


def test_weights_beside_encoder_and_decoders_cannot_be_split(outside, settings, folder, store):
    study = Study("sd", override(settings, {"model.size": "my_study:beside"}), 0, store)
    train(study.all_in_one(), 2, store, folder)
    with pytest.raises(UserError, match="scale of my_study:beside is no part of encoder"):
        train(study.from_all_in_one("s"), 3, store, folder)


def test_task_letters():
    tasks = {a: Task(a, "", "rgb", "uint8x3", 3) for a in ("x", "é", "7", "/", ",", ">", "xy", "")}
    assert list(TaskTable(tasks["x"], tasks["é"], tasks["7"])) == ["x", "é", "7"]
    for a in ("/", ",", ">", "xy", ""):
        with pytest.raises(UserError, match=f"task letters 'x', '{a}'; allowed: one letter"):
            TaskTable(tasks["x"], tasks[a])
    with pytest.raises(UserError, match="task letters 'x', 'x'; allowed: .* all unlike"):
        TaskTable(tasks["x"], tasks["x"])


def test_a_client_without_training_images_is_named(outside, trajectory, folder, store):
    data = open_data(trajectory.data, folder, trajectory.tasks)
    data.views["train"] = data.views["train"][data.views["train"][:, 0] != 1]
    net = build(trajectory)
    fl = replace(trajectory.fl, clients=(1,), clients_per_round=1)
    with pytest.raises(UserError, match=f"client {data.names[1]} has no training images"):
        run_round(net, net.state_dict(), replace(trajectory, fl=fl), 0, data)
