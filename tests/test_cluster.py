"""Trajectories on Dask workers: real processes, really killed."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from mas import engine
from mas.__main__ import main
from mas_core.config import UserError, override
from mas_core.methods import all_in_one, merge_and_split, one_by_one
from mas_core.records.store import Store
from mas_core.records.study import Study

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")
psutil = pytest.importorskip("psutil")  # with distributed
pytest.importorskip("dask_jobqueue")
from mas.run import cluster  # noqa: E402
from mas.run.progress import Progress  # noqa: E402
from mas.run.workers import Compute, train_recipes  # noqa: E402

DEADLINE = 300  # seconds; reached only where something hangs
R0, ROUNDS = 12, 16
# What depends on when and where something ran.
TIMES = ["seconds", "affinity_seconds", "device_seconds", "joules"]
PLACE = ("sha256", "peak_memory_bytes", "git_revision", "git_dirty")


@pytest.fixture(autouse=True)
def _deadline():
    """End a test that hangs."""

    def stop(*_):
        raise TimeoutError(f"no end after {DEADLINE} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(DEADLINE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def wait_for(true, what):
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end, f"no {what} in {DEADLINE} s"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def study_in(settings):
    """Function of a results folder: MAS on three tasks, rounds enough to be interrupted."""
    fl = replace(settings.fl, rounds=ROUNDS, measure_rounds=2, evaluate_every=ROUNDS)
    settings = replace(settings, fl=fl, mas=replace(settings.mas, merge_rounds=R0))
    return lambda results: Study("dkt", settings, 0, Store(results, "small"))


@pytest.fixture(scope="module")
def undisturbed(study_in, folder, tmp_path_factory):
    """The same method in one process that nothing disturbs."""
    study = study_in(tmp_path_factory.mktemp("undisturbed"))
    return engine.run({"MAS": merge_and_split(study)}, study.store, folder)["MAS"], study.store


@pytest.fixture(scope="module")
def dask_cluster():
    """Two worker processes that a nanny starts again when they die."""
    with distributed.LocalCluster(
        2, threads_per_worker=1, processes=True, dashboard_address=":0", memory_limit=0,
        silence_logs=50,
    ) as local:  # fmt: skip
        yield local


@pytest.fixture
def address(dask_cluster):
    """The scheduler's address, once both workers are there."""
    with distributed.Client(dask_cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=DEADLINE)
    return dask_cluster.scheduler_address


def _train(recipes, study, folder, **where):
    compute = Compute(1, "cpu", **where)
    return train_recipes(recipes, study.store, study.settings, folder, compute)


def assert_equal_records(found, store, reference, reference_store):
    """Everything the records of a MethodResult hold, times and what depends on them apart."""
    assert found.losses == reference.losses and found.losses_last == reference.losses_last
    assert found.groups == reference.groups
    for part in reference.parts:
        t, both = part.trajectory, (store, reference_store)
        rows = [s.rounds(t).drop(columns=TIMES, errors="ignore") for s in both]
        pd.testing.assert_frame_equal(*rows, check_exact=True)
        mine, other = ({k: v for k, v in s.result(t).items() if k not in PLACE} if s.result(t)
                       else None for s in both)  # fmt: skip
        assert mine == other
        folders = [s.folder(t) / "checkpoints" for s in both]
        states = [{p.name: load_file(p) for p in f.glob("*.safetensors")} for f in folders]
        assert states[0].keys() == states[1].keys() and "last.safetensors" in states[0]
        for name, state in states[0].items():
            assert state.keys() == states[1][name].keys()
            assert all(state[k].equal(states[1][name][k]) for k in state)
    trunk = reference.parts[0].trajectory
    affinities = [s.folder(trunk) / "affinity.csv" for s in (store, reference_store)]
    assert affinities[0].read_text() == affinities[1].read_text()


def die_at_round_4(kill, trajectory, until, results, preset, *rest):
    """A job whose worker dies in the middle; it leaves the rows of then. The next one lives."""

    def watch():
        store, mark = Store(results, preset), Path(results, "killed")
        while store.rounds_done(trajectory) < 4:
            time.sleep(0.001)
        with contextlib.suppress(FileExistsError), mark.open("x") as file:
            file.write((store.folder(trajectory) / "rounds.csv").read_text())
            file.flush()
            kill()

    threading.Thread(target=watch, daemon=True).start()
    engine.train_job(trajectory, until, results, preset, *rest)


def its_worker_dies(*job):
    die_at_round_4(lambda: os.kill(os.getpid(), signal.SIGKILL), *job)


def its_slurm_job_ends(*job):
    die_at_round_4(lambda: os.killpg(0, signal.SIGKILL), *job)


def waits_at_round_2(trajectory, until, results, *rest):
    """A job that goes on once somebody says so."""
    engine.train_job(trajectory, 2, results, *rest)
    wait_for(Path(results, "go on").exists, "word")
    engine.train_job(trajectory, until, results, *rest)


def assert_resumed(store, trunk):
    """What its killed worker had written of a trajectory is there as it was, times included."""
    rows = (store.results / "killed").read_text().splitlines()
    assert 1 + 4 <= len(rows) < 1 + R0  # a header, and rounds up to the middle
    kept = rows[:-1]  # the last one's checkpoint may not have been written
    now = (store.folder(trunk) / "rounds.csv").read_text().splitlines()
    assert now[: len(kept)] == kept and len(now) == 1 + R0


def test_a_killed_workers_trajectory_is_resumed_and_ends_the_same(
    address, study_in, folder, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine, "train_job", its_worker_dies)
    study = study_in(tmp_path)
    recipes = {"MAS": merge_and_split(study)}
    result = _train(recipes, study, folder, dask=address)["MAS"]
    assert_resumed(study.store, study.all_in_one())
    assert_equal_records(result, study.store, *undisturbed)


def test_progress_shows_counts_the_rounds_of_what_runs_and_an_estimate(
    address, settings, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine, "train_job", waits_at_round_2)
    study, shown = Study("dt", settings, 0, Store(tmp_path, "small")), io.StringIO()
    shown.isatty = lambda: True
    text = r"4/8 \[\d\d:\d\d<\d\d:\d\d,.*trajectories: 0 done, 2 running, 0 left \(d 2/4, t 2/4\)"

    def read():
        wait_for(lambda: re.search(text, shown.getvalue()), "progress")
        (tmp_path / "go on").touch()

    with ThreadPoolExecutor(1) as thread, contextlib.redirect_stderr(shown):
        reading = thread.submit(read)
        _train({"": one_by_one(study)}, study, folder, dask=address)
        reading.result()
    assert re.search(r"8/8 \[.*2 done, 0 running, 0 left", shown.getvalue())


def test_an_error_is_reported_once_and_the_others_go_on(address, settings, folder, tmp_path):
    store = Store(tmp_path, "small")
    wild = {"fl.lr": 100, "fl.weight_decay": 1, "fl.local_epochs": 20}
    bad = Study("k", override(settings, wild), 0, store)
    good = Study("dt", settings, 0, store)
    recipes = {"bad": all_in_one(bad), "good": one_by_one(good)}
    with cluster.dask_workers(address, "cpu", store.results, folder) as (executor, slots, lost):
        progress = Progress()
        with pytest.raises(engine.EngineError) as raised:
            engine.run(recipes, store, folder, "cpu", executor, None, slots, progress, lost)
    text = str(raised.value)
    assert text.count("the loss of task 'k' is") == 1
    assert text.startswith(f"1 trajectory failed:\n  {bad.all_in_one().id}: the loss of task 'k'")
    assert "Traceback" not in text
    assert progress.failed == 1
    for task in "dt":
        assert store.result(good.from_scratch(task)) is not None


def drive(address, study, folder):
    """A driver's whole life."""
    store, recipes = study.store, {"MAS": merge_and_split(study)}
    with cluster.dask_workers(address, "cpu", store.results, folder) as (executor, slots, lost):
        return engine.run(recipes, store, folder, "cpu", executor, None, slots, None, lost)["MAS"]


def test_a_killed_driver_is_restarted_and_continues(
    address, study_in, folder, undisturbed, tmp_path
):
    study = study_in(tmp_path)
    store, trunk = study.store, study.all_in_one()
    driver = get_context("spawn").Process(target=drive, args=(address, study, folder))
    driver.start()
    wait_for(lambda: store.rounds_done(trunk) >= 4, "round")
    os.kill(driver.pid, signal.SIGKILL)
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    rows = (store.folder(trunk) / "rounds.csv").read_text()
    assert not any(store.result(id_) for id_ in store.ids())  # there is something left to do
    result = drive(address, study, folder)
    assert (store.folder(trunk) / "rounds.csv").read_text().startswith(rows)
    assert_equal_records(result, store, *undisturbed)


class LosesWorkers(engine.InProcess):
    """Runs a job for some rounds, then says that its worker is gone."""

    def __init__(self, rounds):
        self.rounds, self.submitted = rounds, 0

    def submit(self, fn, trajectory, until, results, preset, *rest):
        self.submitted += 1
        until = min(until, Store(results, preset).rounds_done(trajectory) + self.rounds)
        future = super().submit(fn, trajectory, until, results, preset, *rest)
        if until < trajectory.fl.rounds:
            future = engine.Future()
            future.set_exception(distributed.KilledWorker("job", None, 4))
        return future


def test_a_lost_job_is_handed_out_again_only_if_it_gets_on(settings, folder, tmp_path):
    study = Study("d", settings, 0, Store(tmp_path, "small"))  # four rounds
    lost, gets_on = (distributed.KilledWorker,), LosesWorkers(2)
    recipes = {"d": all_in_one(study)}
    assert engine.run(recipes, study.store, folder, "cpu", gets_on, resubmit=lost)["d"].losses
    assert gets_on.submitted == 2
    study = Study("d", settings, 1, study.store)
    stuck = LosesWorkers(0)
    with pytest.raises(engine.EngineError, match="1 trajectory failed"):
        engine.run({"d": all_in_one(study)}, study.store, folder, "cpu", stuck, resubmit=lost)
    assert stuck.submitted == 1


def test_a_resource_that_no_worker_offers_is_refused(address, tmp_path, folder):
    refused = pytest.raises(UserError, match=r"no worker offers the resource GPU; .*GPU=1; .*cpu")
    with refused, cluster.dask_workers(address, "cuda", tmp_path, folder):
        pass


@pytest.mark.parametrize(
    "change, message",
    [
        ({"device": "cuda:1"}, "allowed: cuda, cpu"),
        ({"data": "elsewhere"}, "does not see .*elsewhere; .* share"),
        ({"address": "absent.json"}, "no scheduler answers, no such file"),
        ({"address": "tcp://127.0.0.1:1"}, "no scheduler answers"),
    ],
)
def test_what_cannot_work_is_refused(address, tmp_path, folder, change, message):
    asked = {"address": address, "device": "cpu", "results": tmp_path, "data": folder} | change
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        with pytest.raises(UserError, match=message), cluster.dask_workers(**asked):
            pass


def test_results_that_workers_do_not_share_are_refused(address, tmp_path, folder, monkeypatch):
    # The same path names another folder on the worker: what the driver writes is not there.
    monkeypatch.setattr(cluster.tempfile, "NamedTemporaryFile", lambda **_: contextlib.nullcontext(
        type("File", (), {"name": str(tmp_path / "not there")})))  # fmt: skip
    refused = pytest.raises(UserError, match="does not see .*not there")
    with refused, cluster.dask_workers(address, "cpu", tmp_path, folder):
        pass


def test_a_scheduler_without_workers_is_refused(tmp_path, folder):
    local = distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0")
    refused = pytest.raises(UserError, match="no worker; start: dask worker .*--nthreads 1$")
    with local, refused, cluster.dask_workers(local.scheduler_address, "cpu", tmp_path, folder):
        pass


STARTED, RELEASE = [], threading.Event()


def wait_for_release(name):
    STARTED.append(name)
    return RELEASE.wait(DEADLINE)


@pytest.mark.parametrize("visible", [0, 1, 8])
def test_a_gpu_worker_must_see_one_gpu_and_gets_one_job_at_a_time(
    tmp_path, folder, monkeypatch, visible
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)  # the worker is a thread
    with distributed.LocalCluster(
        1, threads_per_worker=2, processes=False, dashboard_address=":0", resources={"GPU": 1}
    ) as local:
        opened = cluster.dask_workers(local.scheduler_address, "cuda", tmp_path, folder)
        if visible != 1:
            with pytest.raises(UserError, match=f"sees {visible}.*CUDA_VISIBLE_DEVICES"), opened:
                pass
            return
        with opened as (executor, slots, _):
            assert slots() == 1
            jobs = [executor.submit(wait_for_release, name) for name in "ab"]
            state = local.workers[0].state
            wait_for(lambda: STARTED and len(state.tasks) == 2, "two jobs")
            assert state.available_resources == {"GPU": 0} and len(STARTED) == 1
            RELEASE.set()
            assert all(job.result(DEADLINE) for job in jobs) and len(STARTED) == 2


def test_the_job_script_asks_slurm_for_one_gpu_and_dask_for_one_job(capsys):
    assert main(["reproduce", "--slurm", "volta", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert re.search(r"^#SBATCH -p volta$", script, re.M)
    assert re.search(r"^#SBATCH --gres=gpu:1$", script, re.M)
    assert re.search(r"^#SBATCH -n 1$", script, re.M)
    (command,) = [line for line in script.splitlines() if "dask_worker" in line]
    assert "--nthreads 1 " in command and command.endswith("--resources GPU=1")
    assert "--nworkers" not in command  # one worker a job
    assert "gpu" not in cluster.slurm_job_script("volta", "cpu").lower()


def test_the_job_script_takes_the_sites_settings(capsys):
    site = {"jobqueue.slurm.account": "lab", "jobqueue.slurm.walltime": "20:00:00",
            "jobqueue.slurm.job-extra-directives": ["--qos=long"]}  # fmt: skip
    with dask.config.set(site):
        script = cluster.slurm_job_script("volta")
    for line in ("-A lab", "-t 20:00:00", "--qos=long", "--gres=gpu:1"):
        assert f"#SBATCH {line}\n" in script


def test_a_dry_run_needs_a_partition(capsys):
    assert main(["reproduce", "--dry-run"]) == 2
    assert "--slurm PARTITION" in capsys.readouterr().err


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """sbatch and scancel that run a job here, in a process group of its own; the jobs' ids."""
    folder = tmp_path / "bin"
    folder.mkdir()
    jobs = folder / "jobs"
    jobs.touch()
    texts = {
        # Like Slurm it keeps a copy of the script, which its caller deletes.
        "sbatch": f'#!/bin/sh\ncp "$1" {folder}/$$.sh\nsetsid sh {folder}/$$.sh >/dev/null 2>&1 &\n'
                  f"echo $! | tee -a {jobs}\n",
        "scancel": '#!/bin/sh\nkill -KILL -- "-$1"\n',
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # a job unpickles this module
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    yield lambda: [int(line) for line in jobs.read_text().split()]
    for job in jobs.read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(job), signal.SIGKILL)


def test_a_slurm_job_that_ends_is_submitted_again(
    slurm, study_in, folder, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine, "train_job", its_slurm_job_ends)
    study = study_in(tmp_path / "results")
    recipes = {"MAS": merge_and_split(study)}
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "100ms"}):
        result = _train(recipes, study, folder, slurm="any")["MAS"]
    assert len(slurm()) == 2
    assert_resumed(study.store, study.all_in_one())
    assert_equal_records(result, study.store, *undisturbed)
    wait_for(lambda: all(map(has_ended, slurm())), "end of the jobs")


def has_ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_dask_is_imported_only_where_it_is_asked_for():
    code = ("import sys, mas.run.cluster, mas.__main__; "
            "assert not {'dask', 'distributed'} & sys.modules.keys()")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
