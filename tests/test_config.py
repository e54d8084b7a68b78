"""Configurations: what is refused, what an id depends on, learning rates, random streams."""

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from mas_core.config import (
    FL,
    PRESETS,
    Data,
    Mas,
    Model,
    Settings,
    UserError,
    override,
    settings,
    stream,
    stream_seed,
)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: FL(rounds=0), "rounds=0: should be greater than or equal to 1"),
        (lambda: FL(lr=float("nan")), "lr=nan"),
        (lambda: FL(lr=float("inf")), "lr=inf"),
        (lambda: FL(momentum=1.0), "momentum"),
        (lambda: FL(rounds=2.5), "rounds=2.5: should be a valid integer"),
        (lambda: FL(rounds="many"), "rounds='many': should be a valid integer"),
        (lambda: FL(method="fedsgd"), "method='fedsgd': allowed: fedavg, fedprox, gradnorm"),
        (lambda: FL(clients=()), "at least one"),
        (lambda: FL(clients=(0, 1.5)), "clients.1=1.5: should be a valid integer"),
        (lambda: FL(clients=(True, 2)), "clients.0=True: should be a valid integer"),
        (lambda: FL(clients="ab"), "clients='ab': should be a valid tuple"),
        (lambda: FL(clients=(0, 0)), "a client is named twice"),
        (lambda: FL(affinity_every=0), "affinity_every"),
        (lambda: Data(size=8), "size=8"),
        (lambda: Data(heterogeneity=1.5), "heterogeneity=1.5: should be less than or equal to 1"),
        (lambda: Data("Taskonomy"), "source='Taskonomy': allowed: rooms, taskonomy"),
        (lambda: Model(output_stride=3), "output_stride=3; allowed: 2, 4, 8, 16"),
        (lambda: Model("big"), "size='big': allowed: full, half, small, tiny"),
        (lambda: Mas(lr_schedule="constant"), "lr_schedule"),
        (lambda: Settings(Data(buildings=3), fl=FL(clients_per_round=4)), "there are 3 clients"),
        (lambda: Settings(Data(buildings=3), fl=FL(clients_per_round=1, clients=(3,))), "client 3"),
        (lambda: Settings(Data(size=40)), "size=40 is no multiple of output_stride=16"),
    ],
)
def test_impossible_values_are_refused_by_name(make, says):
    with pytest.raises(UserError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


def test_defaults_are_the_papers():
    fl, mas = FL(), Mas()
    assert (fl.rounds, fl.clients_per_round, fl.local_epochs, fl.batch_size) == (100, 4, 1, 64)
    assert (fl.lr, fl.lr_power, fl.momentum, fl.weight_decay) == (0.1, 0.9, 0.9, 1e-4)
    assert (fl.affinity_every, mas.merge_rounds, mas.affinity_rounds) == (5, 30, 10)
    assert fl.encoder_grad_scale == "none" and mas.affinity_at == "mean"


def test_presets():
    assert list(PRESETS) == ["smoke", "small", "medium", "paper"]
    nine = settings("paper", "sdnkterca")
    assert (nine.model.size, nine.fl.batch_size) == ("half", 32)
    five = settings("paper", "sdnkt")
    assert (five.model.size, five.fl.batch_size, five.data.size) == ("full", 64, 256)
    for preset in ("small", "paper"):
        fl = PRESETS[preset].fl
        assert (fl.rounds, fl.clients_per_round, fl.local_epochs) == (100, 4, 1)
        assert PRESETS[preset].data.buildings == 32


def test_overrides_read_text_as_a_command_line_gives_it():
    texts = {"fl.lr": "0.03", "fl.rounds": "100", "fl.clients": "0,3", "fl.clients_per_round": "2",
             "mas.lr_schedule": "restart", "model.size": "tiny"}  # fmt: skip
    changed = override(PRESETS["small"], texts)
    assert (changed.fl.lr, changed.fl.rounds, changed.fl.clients) == (0.03, 100, (0, 3))
    assert isinstance(changed.fl.rounds, int)
    assert changed.mas.lr_schedule == "restart" and changed.model.size == "tiny"
    assert override(changed, {"fl.clients": "none"}).fl.clients is None
    assert override(changed, {"fl.clients": [1, 2]}).fl.clients == (1, 2)
    assert override(PRESETS["small"], {}) == PRESETS["small"]


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("fl.speed", "1", "unknown setting 'fl.speed'; fl has: rounds"),
        ("speed", "1", "unknown setting 'speed'"),
        ("fl", "1", "unknown setting 'fl'"),
        ("train.rounds", "1", "data., model., fl., mas."),
        ("fl.rounds", "ten", "fl.rounds='ten'.*valid integer"),
        ("fl.rounds", "2.5", "valid integer"),
        ("fl.rounds", "inf", "valid integer"),
        ("fl.rounds", "-1", "greater than or equal to 1"),
        ("fl.lr", "nan", "lr=.nan"),
        ("fl.method", "adam", "method='adam': allowed"),
        ("fl.clients", "0,x", "fl.clients.*valid integer"),
        ("fl.clients", "1,1,2,3", "named twice"),
        ("fl.clients", "", "clients"),
        ("fl.clients_per_round", "99", "clients_per_round=99"),
    ],
)
def test_overrides_that_cannot_be(key, value, says):
    with pytest.raises(UserError, match=says):
        override(PRESETS["small"], {key: value})


def test_unknown_preset():
    with pytest.raises(UserError, match="unknown preset 'large'; the presets are smoke, small"):
        settings("large")


def test_every_part_of_a_trajectory_is_in_its_id(trajectory):
    """Changing any single field changes the id: otherwise two trainings would share records."""
    ids = {trajectory.id}
    made = 1

    def add(other):
        nonlocal made
        made += 1
        ids.add(other.id)

    other_values = {"source": "rooms", "split": "released", "size": {"data": 32, "model": "small"},
                    "output_stride": 8, "width": 0.5, "method": "fedprox",
                    "encoder_grad_scale": "sqrt",
                    "clients": (0, 1), "tasks": "my_tasks:TABLE", "lr_schedule": "cosine",
                    "affinity": "cosine", "options": (("alpha", 0.5),),
                    "arithmetic": "grouped",
                    "heterogeneity": 0.1, "lr": 0.2, "lr_power": 1.0,
                    "momentum": 0.5, "weight_decay": 0.0}  # fmt: skip
    for part in ("data", "model", "fl"):
        config = getattr(trajectory, part)
        for f in fields(config):
            value = other_values.get(f.name, getattr(config, f.name))
            if isinstance(value, dict):
                value = value[part]
            if value == getattr(config, f.name):
                value += 1
            add(replace(trajectory, **{part: replace(config, **{f.name: value})}))
    add(replace(trajectory, tasks="ds"))
    add(replace(trajectory, seed=1))
    add(replace(trajectory, parent=trajectory))
    add(replace(trajectory, parent=trajectory, start_round=1))
    add(replace(trajectory, parent=trajectory, start_round=1, lr_from=1))
    add(replace(trajectory, parent=replace(trajectory, seed=1), start_round=1))
    assert len(ids) == made and made > 30


def test_id_is_the_same_in_every_process_and_names_tasks_and_seed(trajectory):
    assert trajectory.id.startswith("dk-s0-") and trajectory.id == replace(trajectory).id
    code = (
        "from mas_core.config import *; from mas_core.records.trajectory import Trajectory;"
        "print(Trajectory('dk', 0, Data('taskonomy', size=16, buildings=4), Model('tiny', 4),"
        "FL(rounds=4, clients_per_round=2, batch_size=4, measure_rounds=4, affinity_every=2,"
        "evaluate_every=2)).id, stream_seed(3, 'select', 7))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [trajectory.id, str(stream_seed(3, "select", 7))]


def test_equal_numbers_of_other_kinds_give_one_id(trajectory):
    """--set fl.lr=1 and fl.lr=1.0 are one trajectory."""
    base = Settings(trajectory.data, trajectory.model, trajectory.fl)
    first, second = (override(base, {"fl.lr": text}).fl for text in ("1", 1.0))
    assert replace(trajectory, fl=first).id == replace(trajectory, fl=second).id
    third = replace(trajectory.fl, lr=1)
    assert replace(trajectory, fl=third).id == replace(trajectory, fl=first).id


def test_json_holds_the_whole_configuration(trajectory):
    branch = replace(trajectory, parent=trajectory, start_round=2, lr_from=2)
    text = json.loads(json.dumps(branch.to_json()))
    assert text["parent"] == trajectory.id and text["start_round"] == text["lr_from"] == 2
    assert text["fl"]["rounds"] == 4 and text["data"]["size"] == 16 and text["tasks"] == "dk"


def test_learning_rate_continues_or_restarts(trajectory):
    """eta (1 - r/R)^0.9 with eta = 0.1 and R = 100, worked by hand."""
    fl = FL()
    trunk = replace(trajectory, fl=fl)
    assert trunk.lr(0) == 0.1
    assert trunk.lr(30) == pytest.approx(0.0725418, rel=1e-6)  # 0.1 * 0.7^0.9
    assert trunk.lr(99) == pytest.approx(0.001584893, rel=1e-6)  # 0.1 * 0.01^0.9
    continued = replace(trunk, parent=trunk, start_round=30)
    restarted = replace(continued, lr_from=30)
    assert continued.lr(30) == trunk.lr(30) and continued.lr(65) == trunk.lr(65)
    assert restarted.lr(30) == 0.1  # the split's own 70 rounds
    assert restarted.lr(65) == pytest.approx(0.0535887, rel=1e-6)  # 0.1 * 0.5^0.9


def test_streams_are_named_and_independent():
    draws = {
        tuple(stream(*key).integers(0, 2**62, 2))
        for key in [
            (0, "select", 1), (0, "select", 2), (1, "select", 1), (0, "batches", 1),
            (0, "batches", 1, 2), (0, "batches", 12), (0, "batches", "1", 2), (0, "1", "batches"),
        ]
    }  # fmt: skip
    assert len(draws) == 8
    again = [stream(5, "select", 3).random() for _ in range(2)]
    assert again[0] == again[1]
    assert 0 <= stream_seed(0, "x") < 2**63


def test_configurations_are_frozen_and_checked_when_replaced():
    with pytest.raises(AttributeError):
        FL().rounds = 3
    with pytest.raises(UserError):
        replace(FL(), rounds=0)
    with pytest.raises(UserError, match="speed=1"):
        FL(speed=1)
    assert issubclass(UserError, ValueError)
