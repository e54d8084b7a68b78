"""Recipes driven to their end: order, sharing, failures, lost workers, processes."""

import shutil
import threading
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_methods import make_record

from mas import engine
from mas.run import workers
from mas.run.engine import EngineError, choose_device, collect, run, with_ancestors
from mas.run.progress import Progress
from mas_core.config import UserError
from mas_core.data.processes import local_workers
from mas_core.federated import TrainingDiverged
from mas_core.methods import Need, merge_and_split
from mas_core.records.store import Store
from mas_core.records.study import Study
from mas_core.records.training import is_done, train
from mas_core.records.trajectory import Trajectory

VARY = ["seconds", "joules", "affinity_seconds"]


@pytest.fixture
def single(settings):
    """Function of letters: a trajectory that measures nothing."""
    fl = replace(settings.fl, measure_rounds=0)
    return lambda tasks, **how: Trajectory(tasks, 0, settings.data, settings.model, fl, **how)


def recipe(*stages, value="done"):
    """A recipe that needs one list of Needs after the other."""
    for stage in stages:
        yield list(stage)
    return value


class Jobs:
    """Stands for train_job: makes records, keeps what was asked, fails where it is told to."""

    def __init__(self, monkeypatch, seconds=0.0):
        self.asked, self.errors, self.seconds = [], {}, seconds
        self.now = self.most = 0
        self.lock = threading.Lock()
        monkeypatch.setattr(engine, "train_job", self)

    def __call__(self, trajectory, until, results, preset, data_folder, device, threads):
        with self.lock:
            self.asked.append(Need(trajectory, until))
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        try:
            error = self.errors.get(trajectory.tasks)
            if error is not None:
                raise error
            make_record(Store(results, preset), Need(trajectory, until))
        finally:
            with self.lock:
                self.now -= 1


def test_recipes_go_on_when_their_needs_are_on_record(single, store, monkeypatch, tmp_path):
    jobs, (d, k, t) = Jobs(monkeypatch), map(single, "dkt")
    recipes = {
        "two": recipe([Need(d, 4)], [Need(k, 4), Need(t, 2)], value=2),
        "one": recipe([Need(k, 4)], value=1),
        "none": recipe(value=0),
        "empty": recipe([], value=[]),
    }
    assert run(recipes, store, tmp_path) == {"two": 2, "one": 1, "none": 0, "empty": []}
    assert sorted((n.trajectory.tasks, n.until) for n in jobs.asked) == [
        ("d", 4), ("k", 4), ("t", 2)
    ]  # fmt: skip
    assert [n.trajectory.tasks for n in jobs.asked].index("t") == 2  # asked for later
    assert run({"again": recipe([Need(d, 4), Need(t, 2)])}, store, tmp_path) == {"again": "done"}
    assert len(jobs.asked) == 3


def test_a_trajectory_that_several_need_is_trained_once_to_the_furthest(
    single, store, monkeypatch, tmp_path
):
    jobs, d = Jobs(monkeypatch), single("d")
    run({i: recipe([Need(d, u)]) for i, u in enumerate((2, 4, 3))}, store, tmp_path)
    assert jobs.asked == [Need(d, 4)]


def test_parents_come_before_children(single, store, monkeypatch, tmp_path):
    jobs, whole = Jobs(monkeypatch), single("dkt")
    child = replace(single("dk"), parent=whole, start_round=2)
    grandchild = replace(single("d"), parent=child, start_round=3)
    assert with_ancestors(Need(grandchild, 4)) == [
        Need(whole, 2), Need(child, 3), Need(grandchild, 4)
    ]  # fmt: skip
    pool = ThreadPoolExecutor(3)
    run({0: recipe([Need(grandchild, 4)]), 1: recipe([Need(single("t"), 4)])},
        store, tmp_path, executor=pool, slots=3)  # fmt: skip
    order = [n for n in jobs.asked if n.trajectory.tasks != "t"]
    assert order == [Need(whole, 2), Need(child, 3), Need(grandchild, 4)]


def test_a_parent_is_not_trained_for_a_child_that_is_on_record(
    single, store, monkeypatch, tmp_path
):
    jobs, whole = Jobs(monkeypatch), single("dk")
    child = replace(single("d"), parent=whole, start_round=2)
    make_record(store, Need(child, 4))
    assert run({0: recipe([Need(child, 4)])}, store, tmp_path) == {0: "done"}
    assert jobs.asked == []


def test_what_takes_longest_is_handed_out_first(single, store, monkeypatch, tmp_path):
    jobs, long = Jobs(monkeypatch), single("n")
    long = replace(long, fl=replace(long.fl, local_epochs=5))
    needs = [Need(single("d"), 4), Need(single("kt"), 4), Need(single("t"), 2), Need(long, 4)]
    run({0: recipe(needs)}, store, tmp_path)
    assert [n.trajectory.tasks for n in jobs.asked] == ["n", "kt", "d", "t"]


def test_no_more_jobs_are_out_than_slots(single, store, monkeypatch, tmp_path):
    jobs = Jobs(monkeypatch, seconds=0.1)
    progress = Progress()
    with ThreadPoolExecutor(6) as pool:
        run({0: recipe([Need(single(a), 4) for a in "sdnkte"])}, store, tmp_path,
            executor=pool, slots=2, progress=progress)  # fmt: skip
    assert len(jobs.asked) == 6 and jobs.most == 2
    assert (progress.done, progress.failed) == (6, 0)
    assert progress.running == [] == progress.waiting


def test_a_failure_is_told_once_and_the_others_finish(single, store, monkeypatch, tmp_path):
    jobs, whole = Jobs(monkeypatch), single("dkt")
    jobs.errors["dkt"] = TrainingDiverged("the loss of task 'd' is nan")
    child = replace(single("d"), parent=whole, start_round=2)
    finished = []

    def independent():
        yield [Need(single("n"), 4)]
        yield [Need(single("e"), 4)]  # needed after the failure
        finished.append("independent")

    recipes = {
        "bad": recipe([Need(whole, 4)]),
        "worse": recipe([Need(whole, 2), Need(single("s"), 4)]),
        "child": recipe([Need(child, 4)]),
        "good": independent(),
    }
    progress = Progress()
    with pytest.raises(EngineError) as error:
        run(recipes, store, tmp_path, progress=progress)
    text = str(error.value)
    # What was foreseen needs no traceback.
    assert text == f"1 trajectory failed:\n  {whole.id}: the loss of task 'd' is nan"
    assert finished == ["independent"] and progress.failed == 1
    assert is_done(single("n"), 4, store) and is_done(single("e"), 4, store)
    assert [n.trajectory.tasks for n in jobs.asked].count("dkt") == 1
    assert "d" not in [n.trajectory.tasks for n in jobs.asked]


def test_two_failures_are_both_told(single, store, monkeypatch, tmp_path):
    jobs = Jobs(monkeypatch)
    jobs.errors |= {"d": RuntimeError("the first"), "k": UserError("the second")}
    recipes = {a: recipe([Need(single(a), 4)]) for a in "dkt"}
    with pytest.raises(EngineError) as error:
        run(recipes, store, tmp_path)
    d, k = single("d").id, single("k").id
    lines = str(error.value).splitlines()
    assert lines[:3] == ["2 trajectories failed:", f"  {d}: RuntimeError, see below",
                         f"  {k}: the second"]  # fmt: skip
    assert lines[4] == f"{d}:" and lines[-1] == "RuntimeError: the first"
    text = str(error.value)
    assert text.count("Traceback") == 1 and "in __call__" in text  # where it was raised
    assert is_done(single("t"), 4, store)


def test_bad_input_stays_one_line(single, store, monkeypatch, tmp_path):
    jobs = Jobs(monkeypatch)
    jobs.errors["d"] = UserError("data folder x does not exist")
    with pytest.raises(UserError, match="^data folder x does not exist$"):
        run({0: recipe([Need(single("d"), 4)])}, store, tmp_path)


def test_an_interruption_ends_the_run(single, store, monkeypatch, tmp_path):
    jobs = Jobs(monkeypatch)
    jobs.errors["k"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run({a: recipe([Need(single(a), 4)]) for a in "dkt"}, store, tmp_path)
    assert is_done(single("d"), 4, store) and not is_done(single("t"), 4, store)


def test_what_another_process_finishes_meanwhile_counts(single, store, monkeypatch, tmp_path):
    """Between looking at a recipe's needs and handing them out, another driver finished them."""
    jobs, d, seen = Jobs(monkeypatch), single("d"), []

    def looks_once(trajectory, until, store):
        if not seen:
            seen.append(trajectory)
            make_record(store, Need(d, 4))
            return False
        return is_done(trajectory, until, store)

    monkeypatch.setattr(engine, "is_done", looks_once)
    assert run({"mine": recipe([Need(d, 4)], value=5)}, store, tmp_path) == {"mine": 5}
    assert jobs.asked == []


class LosesWorkers(Executor):
    """Every trajectory's first jobs end with their worker, some rounds after they began."""

    class Lost(Exception):
        pass

    def __init__(self, rounds):
        self.rounds, self.submitted = rounds, 0

    def submit(self, fn, trajectory, until, results, preset, folder, device, threads):
        future = Future()
        if self.submitted < len(self.rounds):
            reach = self.rounds[self.submitted]
            if reach:
                train(trajectory, reach, Store(results, preset), folder)
            future.set_exception(self.Lost())
        else:
            future.set_result(fn(trajectory, until, results, preset, folder, device, threads))
        self.submitted += 1
        return future


def test_the_job_of_a_lost_worker_is_handed_out_again_and_resumes(single, store, folder, tmp_path):
    d, executor = single("d"), LosesWorkers([1, 3])
    found = run({0: recipe([Need(d, 4)])}, store, folder, executor=executor,
                resubmit=(LosesWorkers.Lost,))  # fmt: skip
    assert found == {0: "done"} and executor.submitted == 3
    other = Store(tmp_path / "other", "small")
    train(d, 4, other, folder)
    a, b = (load_file(s.checkpoint_path(d, "last")) for s in (store, other))
    assert all((a[k] == b[k]).all() for k in b)


def test_a_job_that_loses_its_worker_without_progress_fails(single, store, folder):
    executor = LosesWorkers([2, 0, 0, 0])
    with pytest.raises(EngineError, match="Lost"):
        run({0: recipe([Need(single("d"), 4)])}, store, folder, executor=executor,
            resubmit=(LosesWorkers.Lost,))  # fmt: skip
    assert executor.submitted == 2


def test_a_lost_worker_is_a_failure_where_it_is_not_expected(single, store, folder):
    with pytest.raises(EngineError, match="Lost"):
        run({0: recipe([Need(single("d"), 4)])}, store, folder, executor=LosesWorkers([1]))


def test_a_killed_worker_is_told_in_one_line(single, store, folder):
    class Broken(Executor):
        def submit(self, *job):
            raise BrokenExecutor("A child process terminated abruptly")

    class Breaks(Executor):
        def submit(self, *job):
            future = Future()
            future.set_exception(BrokenExecutor("A child process terminated abruptly"))
            return future

    for executor in (Broken(), Breaks()):
        with pytest.raises(EngineError) as error:
            run({0: recipe([Need(single("d"), 4)])}, store, folder, executor=executor)
        assert str(error.value) == (
            "a worker process was killed, perhaps for want of memory; what was done is kept, the "
            "same command continues; try fewer --workers"
        )


def test_in_order_of_worth_until_there_is_no_time(single, store, monkeypatch, tmp_path):
    """Without a budget the longest comes first; with one the first recipe's needs do."""
    jobs, clock = Jobs(monkeypatch), [100.0]

    def takes_long(*job):
        clock[0] += 0.4
        jobs(*job[:7])  # without the time to stop

    monkeypatch.setattr(engine, "train_job", takes_long)
    fake = type("Clock", (), {"time": staticmethod(lambda: clock[0]), "sleep": time.sleep})
    monkeypatch.setattr(engine, "time", fake)
    recipes = {a: recipe([Need(single(a), 4)], value=a) for a in ("d", "dkt", "k", "n")}
    late = 100.9  # a third one would end later
    assert run(recipes, store, tmp_path, stop_at=late) == {"d": "d", "dkt": "dkt"}
    assert [n.trajectory.tasks for n in jobs.asked] == ["d", "dkt"]


def test_what_runs_stops_between_two_rounds(single, store, folder, monkeypatch):
    """A round is taken to last as long as the one before; it is on record, with its checkpoint."""
    d, clock = single("d"), [100.0]

    def now():
        clock[0] += 10.0  # asked for once before every round
        return clock[0]

    monkeypatch.setattr(engine, "time", type("Clock", (), {"time": staticmethod(now)}))
    where = (str(store.results), "small", str(folder), "cpu", 1)
    with pytest.raises(engine.OutOfTime, match=f"{d.id} stopped at round 2"):
        engine.train_job(d, 4, *where, stop_at=144.0)  # 110 begun, 120, 130, 140: to 150
    assert store.rounds_done(d) == 2
    engine.train_job(d, 4, *where)
    assert store.result(d) is not None


def test_a_job_leaves_the_number_of_threads_as_it_was(single, store, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "train", lambda *a: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    for threads in (3, None):
        engine.train_job(single("d"), 4, str(store.results), "small", str(folder), "cpu", threads)
    assert seen == [3, before] and torch.get_num_threads() == before


def test_two_processes_give_the_records_of_one(settings, folder, store, tmp_path):
    """MAS-2 on two spawned workers and in this process, one thread each: the same bits.

    An error crosses from there as it does from here.
    """
    settings = replace(settings, fl=replace(settings.fl, rounds=3))
    stores, results = [store, Store(tmp_path / "other", "small")], []
    with local_workers(2) as pool:
        unknown = replace(Study("k", settings, 0, store).all_in_one(), seed=9)
        with pytest.raises(UserError, match="nowhere does not exist"):
            run({0: recipe([Need(unknown, 3)])}, store, tmp_path / "nowhere", executor=pool)
        shutil.rmtree(store.root)
        for s, executor in zip(stores, (pool, None), strict=True):
            recipes = {0: merge_and_split(Study("dkt", settings, 0, s))}
            results.append(
                run(recipes, s, folder, executor=executor, threads=1, slots=2 if executor else 1)[0]
            )
    assert results[0].groups == results[1].groups and results[0].losses == results[1].losses
    ids = stores[0].ids()
    assert ids == stores[1].ids() and len(ids) == 3
    for id_ in ids:
        a, b = (s.rounds(id_).drop(columns=VARY).to_csv() for s in stores)
        assert a == b
        a, b = (load_file(s.folder(id_) / "checkpoints" / "last.safetensors") for s in stores)
        assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_collect_reads_records_alone(single, store, monkeypatch):
    jobs, (d, k) = Jobs(monkeypatch), map(single, "dk")
    make = lambda: {  # noqa: E731
        "later": recipe([Need(d, 4)], [Need(k, 4)], value=1), "k": recipe([Need(k, 4)], value=2)
    }  # fmt: skip
    assert collect(make(), store) == ({}, [Need(d, 4), Need(k, 4)])
    make_record(store, Need(d, 4))
    assert collect(make(), store) == ({}, [Need(k, 4), Need(k, 4)])
    make_record(store, Need(k, 4))
    assert collect(make(), store) == ({"later": 1, "k": 2}, [])
    assert jobs.asked == []


def test_devices_and_threads(monkeypatch):
    monkeypatch.setattr(engine.torch.cuda, "is_available", lambda: False)
    assert choose_device() == "cpu" == choose_device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match="there is no GPU here"):
            choose_device(name)
    for name in ("abacus", "meta"):  # the second holds no numbers
        with pytest.raises(UserError, match=f"unknown device '{name}'"):
            choose_device(name)
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 8)
    assert [workers.default_threads("full", n) for n in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert [workers.default_threads(size) for size in ("tiny", "small", "half")] == [1, 1, 8]
    assert workers.default_threads("full", 1, elsewhere=True) is None
