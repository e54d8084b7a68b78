"""What a user hands in from outside: a rule, a table of tasks, a network, a source of data."""

import sys
from dataclasses import replace

import pytest
import torch

from mas.run import engine
from mas_core.config import FL, RULES, UserError, override
from mas_core.fedavg import FedAvg, rule_of
from mas_core.methods import all_in_one, hoa, merge_and_split, restarted
from mas_core.records.study import Study
from mas_core.records.training import train

MODULE = '''
import torch
from mas_core.data.clients import open_data
from mas_core.models import MultiTaskNet
from mas_core.fedavg import FedAvg, weighted_mean
from mas_core.tasks import Task, TaskTable, cross_entropy, l1


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


opened = []


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
