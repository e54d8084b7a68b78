"""Plans, counted by hand."""

from dataclasses import replace

import pytest
from test_methods import make_record

from mas.paper import plan
from mas.paper.experiments import NOTEBOOKS
from mas_core.config import Data, Model
from mas_core.config import settings as preset_settings
from mas_core.federated import state_bytes
from mas_core.methods import Need
from mas_core.records.store import Store
from mas_core.records.study import Study
from mas_core.records.training import build
from mas_core.records.trajectory import Trajectory

SMOKE = preset_settings("smoke")


def record(store, trajectory, rounds, seconds=1.0, affinity_seconds=0.0, samples=10):
    """A record that says it trained `rounds` rounds, complete where these are all."""
    first, fl = trajectory.start_round, trajectory.fl
    store.write_config(trajectory)
    store.write_rows(trajectory, "rounds.csv", [
        {"round": r, "samples": samples, "joules": "", "bytes_down": 1, "bytes_up": 1,
         "seconds": seconds, "affinity_seconds": affinity_seconds * (r < fl.measure_rounds)}
        for r in range(first, first + rounds)
    ])  # fmt: skip
    if first + rounds == fl.rounds:
        losses = dict.fromkeys(trajectory.tasks, 1.0)
        store.write_result(
            trajectory, {"test_best": losses, "test_last": losses, "device": "X, 1 thread"}
        )


def test_images_of_a_round():
    data = Data(buildings=2, views=100)  # 40 and 160 views, 32 and 128 of them to train on
    fl = replace(SMOKE.fl, clients_per_round=2, local_epochs=3, batch_size=10)
    mean = plan.images_a_round(Trajectory("dk", 0, data, SMOKE.model, fl))
    assert mean == 2 * 3 * (30 + 120) / 2  # whole batches
    alone = [
        plan.images_a_round(
            Trajectory("dk", 0, data, SMOKE.model, replace(fl, clients=(k,), clients_per_round=1))
        )
        for k in (0, 1)
    ]
    assert sorted(alone) == [3 * 30, 3 * 120]


@pytest.mark.parametrize("model", [Model("tiny", 4), Model("small", 4)])
def test_amounts_of_a_stretch(model):
    t = Trajectory("dks", 0, SMOKE.data, model, replace(SMOKE.fl, measure_rounds=6))
    speed = plan.Speed(a=2.0, b=0.5, extra=3.0)
    rounds, images, sent, seconds = plan._amount(t, 4, 8, None, speed)
    assert (rounds, images) == (4, 4 * plan.images_a_round(t))
    assert sent == 4 * t.fl.clients_per_round * 2 * state_bytes(build(t).state_dict())
    assert seconds == (2.0 + 3 * 0.5) * plan.images_a_round(t) * (4 + 3.0 * 2)
    encoder = plan._state_bytes("d", model, t.data.tasks, "encoder")
    assert encoder == plan._state_bytes("s", model, t.data.tasks, "encoder") > 0
    unmeasured = plan._amount(t, 4, 8, 0, speed)[3]
    assert unmeasured == (2.0 + 3 * 0.5) * plan.images_a_round(t) * 4


def test_a_network_that_is_no_encoder_with_decoders_is_counted_whole():
    one, two = (Trajectory("dk", 0, SMOKE.data, replace(SMOKE.model, size=size), SMOKE.fl)
                for size in ("tiny", "mas.rivals.fedem:tiny"))  # fmt: skip
    speed = plan.Speed(1.0, 0.0, 0.0)
    sent = [plan._amount(t, 0, 1, 0, speed)[2] for t in (one, two)]
    pi = 2 * 2 * 2 * 4  # both ways, clients, learners, bytes
    assert sent[1] == 2 * sent[0] + pi


def test_recipes_are_walked_to_their_end_without_records(store):
    asked = plan.walk(["figure_05_sdnkt"], plan.AssumedStore(store.results, "smoke"),
                           [0], {})  # fmt: skip
    study = Study("sdnkt", SMOKE, 0, store)
    R, R0 = SMOKE.fl.rounds, SMOKE.mas.merge_rounds
    scratch = [*"sdnkt", *(a + b for i, a in enumerate("sdnkt") for b in "sdnkt"[i + 1 :]), "sdnkt"]
    assert {study.from_scratch(g).id for g in scratch} <= set(asked.until)
    trunk = study.all_in_one().id
    assert asked.until[trunk] == R
    groups = [i for i, t in asked.trajectories.items() if t.parent is not None]
    assert {asked.trajectories[i].parent.id for i in groups} == {trunk}
    assert all((trunk, R0) in choice for i in groups for choice in asked.after[i])
    assert len(asked.methods) == 13 and asked.assumed == 9  # HOA, TAG and MAS, three each
    assert not store.results.exists()


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_every_notebook_is_planned_from_nothing(stem, tmp_path):
    """Recipes that decide by what rounds report find nothing there."""
    asked = plan.walk([stem], plan.AssumedStore(tmp_path, "smoke"), [0], {})
    assert bool(asked.trajectories) == bool(NOTEBOOKS[stem])


def test_clients_that_deal_the_rooms_anew_have_the_rooms_images():
    rooms = Trajectory("dk", 0, SMOKE.data, SMOKE.model, SMOKE.fl)
    dealt = replace(rooms, data=replace(SMOKE.data, source="mas.paper.room_types:alpha_1"))
    assert plan.images_a_round(dealt) == plan.images_a_round(rooms)


def test_what_is_shared_is_counted_once(tmp_path):
    """MAS-2 for nine R0: one trunk, and two groups for every R0."""
    asked = plan.walk(["figure_08_merge_rounds"], plan.AssumedStore(tmp_path, "smoke"),
                           [0], {})  # fmt: skip
    R = SMOKE.fl.rounds
    starts = sorted({max(1, R * tenth // 10) for tenth in range(1, 10)})
    distinct = sum(asked.until[i] - asked.trajectories[i].start_round for i in asked.until)
    alone = sum(part.end - part.begin for method in asked.methods for part in method)
    task_sets = 3
    assert alone == task_sets * sum(R0 + 2 * (R - R0) for R0 in starts)
    assert distinct == task_sets * (starts[-1] + sum(2 * (R - R0) for R0 in starts))


def test_a_plan_says_what_is_on_record(tmp_path):
    store = Store(tmp_path, "smoke")
    trunk = Study("sdnkt", SMOKE, 0, store).all_in_one()
    text = plan.plan(["explore_affinities"], "smoke", [0], {}, tmp_path)
    assert "1 trajectories, 0 on record" in text and "no record of this preset" in text
    half = SMOKE.fl.rounds // 2
    record(store, trunk, half)
    rows = _rows(plan.plan(["explore_affinities"], "smoke", [0], {}, tmp_path))
    assert rows["rounds"] == [SMOKE.fl.rounds, SMOKE.fl.rounds, SMOKE.fl.rounds - half]
    record(store, trunk, SMOKE.fl.rounds)
    text = plan.plan(["explore_affinities"], "smoke", [0], {}, tmp_path)
    assert "1 trajectories, 1 on record" in text and "X, 1 thread, 1 trajectories" in text
    assert _rows(text)["rounds"] == [SMOKE.fl.rounds, SMOKE.fl.rounds, 0]


def test_a_recipe_that_is_partly_on_record_is_planned(tmp_path):
    """What is on record was trained on images; what is made up joins it in a method."""
    store, study = Store(tmp_path, "smoke"), Study("sdnkt", SMOKE, 0, Store(tmp_path, "smoke"))
    for t in (study.all_in_one(), study.from_scratch("d")):
        make_record(store, Need(t, SMOKE.fl.rounds))
        store.write_result(t, store.result(t) | {"data": "a hash of images"})
    text = plan.plan(["figure_05_sdnkt", "00_tour"], "smoke", [0], {}, tmp_path)
    assert "trajectories, 2 on record" in text


def _rows(text):
    """The numbers of a plan's table by the name of their row."""
    names = ("rounds", "training images (M)", "core or GPU hours")
    lines = {n: line[len(n) :] for line in text.splitlines() for n in names if line.startswith(n)}
    return {n: [float(v.replace(",", "")) for v in line.split()] for n, line in lines.items()}


def test_hours_follow_the_recorded_speed(tmp_path):
    store, R = Store(tmp_path, "smoke"), SMOKE.fl.rounds
    for tasks, seconds in (("d", 5.0), ("dk", 7.0), ("dkt", 9.0)):  # of 10 images: 0.3 + 0.2 n
        fl = replace(SMOKE.fl, measure_rounds=R if tasks == "dkt" else 0)
        t = Trajectory(tasks, 0, SMOKE.data, SMOKE.model, fl)
        record(store, t, R, seconds + 4.5 * (tasks == "dkt"), affinity_seconds=4.5)
    speed = plan.recorded_speed(store)
    assert (speed.a, speed.b, speed.extra) == pytest.approx((0.3, 0.2, 0.5))
    text = plan.plan(["explore_affinities"], "smoke", [0], {}, tmp_path)
    trunk = Study("sdnkt", SMOKE, 0, store).all_in_one()
    measured = min(R, SMOKE.fl.measure_rounds)
    seconds = plan.images_a_round(trunk) * 1.3 * (R + 0.5 * measured)
    assert _rows(text)["core or GPU hours"][1] == pytest.approx(seconds / 3600, abs=0.005)
    text = plan.plan(["explore_affinities"], "smoke", [0], {}, tmp_path, 0.01)
    seconds = plan.images_a_round(trunk) * 100 * (R + 0.5 * measured)
    assert _rows(text)["core or GPU hours"][1] == pytest.approx(seconds / 3600, abs=0.005)


def test_a_schedule_respects_what_must_come_first():
    """A trunk of ten hours; two groups from its third round of ten; one decided by its end."""
    work = {"trunk": 10.0, "left": 7.0, "right": 7.0, "late": 5.0}
    span = {"trunk": (0, 10), "left": (3, 10), "right": (3, 10), "late": (0, 10)}
    branch, decided = {frozenset({("trunk", 3)})}, {frozenset({("trunk", 10)})}
    after = {"trunk": {frozenset()}, "left": branch, "right": branch, "late": decided}
    assert plan.schedule(work, span, after, 1)[0] == 29
    assert plan.schedule(work, span, after, 2)[0] == 17  # 3 idle, left + right, or late
    total, chain = plan.schedule(work, span, after, 4)
    assert (total, chain) == (15, ["trunk", "late"])
    after["late"] = decided | {frozenset()}  # another recipe asks for it at once
    assert plan.schedule(work, span, after, 4)[0] == 10
