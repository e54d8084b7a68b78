"""Worker processes that end with the process that started them, and what a user is told."""

import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest

from mas.run import progress as shown
from mas.run import workers
from mas_core.config import UserError, settings
from mas_core.data.rooms.folder import rooms_folder
from mas_core.data.rooms.render import read_parameters
from mas_core.methods import Need
from mas_core.records.store import Store
from mas_core.records.training import train

ROOT = Path(__file__).resolve().parents[1]
ENDLESS = [
    "--preset", "smoke", "--set", "data.source=taskonomy", "--set", "data.size=16",
    "--set", "data.buildings=4", "--set", "fl.batch_size=4", "--set", "fl.rounds=100000",
    "--set", "fl.evaluate_every=100000", "--set", "fl.measure_rounds=0", "--device", "cpu",
]  # fmt: skip


def processes_of(group):
    """Ids of the processes of a process group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(of_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(true, seconds, what):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"no {what} in {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def training(tmp_path, folder):
    """`mas run` on two workers, both of which have begun, in a process group of its own."""
    command = [sys.executable, "-m", "mas", "run", "one-by-one", "--tasks", "dk", *ENDLESS,
               "--workers", "2", "--data", str(folder), "--results", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, cwd=ROOT)  # fmt: skip
    try:
        wait_for(lambda: len(list(tmp_path.glob("*/*/rounds.csv"))) == 2, 120, "two jobs")
        yield process
    finally:
        for left in processes_of(process.pid):
            os.kill(left, signal.SIGKILL)
        process.communicate()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are listed by /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_do_not_outlive_their_driver(training, how):
    assert len(processes_of(training.pid)) >= 3
    training.send_signal(how)
    wait_for(lambda: not processes_of(training.pid), 20, "end of the workers")
    out, err = training.communicate()
    if how == signal.SIGTERM:  # ends like Ctrl-C
        assert training.returncode == 130 and "Traceback" not in err
        assert err.splitlines()[-1] == (
            "mas: interrupted; what was done is kept, the same command continues"
        )


def test_a_script_that_its_workers_would_run_again_is_told_what_to_write(tmp_path):
    script = tmp_path / "study.py"
    text = "from mas_core.data.rooms import render_rooms\n"
    call = f"render_rooms({str(tmp_path / 'rooms')!r}, 2, 30, 16, workers=2, progress=False)\n"
    script.write_text(text + call)
    run = [sys.executable, str(script)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "study.py starts worker processes, which would all run it again: write what it does under "
        'if __name__ == "__main__":'
    )
    assert done.stderr.count("Traceback") == 1 and "BrokenProcessPool" not in done.stderr
    script.write_text(text + f'if __name__ == "__main__":\n    {call}')
    assert subprocess.run(run, timeout=120).returncode == 0


def test_an_empty_address_is_no_address():
    for name in ("dask", "slurm"):
        with pytest.raises(UserError, match=f"--{name} is empty; allowed: "):
            workers.Compute(**{name: " "})


@pytest.fixture
def half_done(store, folder, trajectory):
    """Two of four rounds on record, and a run that has to do the rest and another trajectory."""
    train(trajectory, 2, store, folder)
    rounds = shown.Rounds(store, shown.Progress())
    rounds.progress.running = [Need(trajectory, 4)]
    rounds.progress.begun = {trajectory.id: 1}
    rounds.progress.waiting = [Need(replace(trajectory, seed=1), 3)]
    rounds.progress.failed = 1
    return rounds


def test_rounds_are_counted(half_done):
    assert half_done.count() == (1, 2, 4 + 3)
    assert half_done.text() == (
        "trajectories: 0 done, 1 running, 1 left, 1 failed (dk 2/4)"
    )


def test_a_log_has_a_line_now_and_then(half_done, monkeypatch):
    monkeypatch.setattr(shown, "LINE_SECONDS", 0.4)
    with redirect_stderr(io.StringIO()) as log, shown.shown_progress(half_done.store) as progress:
        vars(progress).update(vars(half_done.progress))
        time.sleep(1.0)
    lines = log.getvalue().splitlines()
    assert len(lines) == 3 and "\r" not in log.getvalue()
    text = "train: 2/7 rounds, trajectories: 0 done, 1 running, 1 left, 1 failed (dk 2/4)"
    assert lines[0] == f"{text}, about 0 min left" and lines[2] == text


def test_a_terminal_has_a_bar_and_what_follows_a_line_of_its_own(half_done):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with redirect_stderr(terminal):
        with shown.shown_progress(half_done.store) as progress:
            vars(progress).update(vars(half_done.progress))
        print("mas: interrupted", file=sys.stderr)
    assert re.search(r"2/7 \[.*0 done, 1 running", terminal.getvalue())
    assert terminal.getvalue().splitlines()[-1] == "mas: interrupted"


def test_children_that_were_there_before_are_left_alone():
    before, after = (multiprocessing.Process(target=time.sleep, args=(60,)) for _ in range(2))
    try:
        before.start()
        others = multiprocessing.active_children()
        after.start()
        workers.end_workers(others)
        after.join(20)
        assert before.is_alive() and after.exitcode not in (None, 0)
    finally:
        before.kill()


def test_nothing_to_do_is_not_shown(tmp_path):
    with redirect_stderr(io.StringIO()) as log, shown.shown_progress(Store(tmp_path, "small")):
        pass
    assert log.getvalue() == ""


def test_images_rendered_otherwise_have_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = settings("smoke", "dk", {"data.buildings": 2, "data.views": 20, "data.size": 16})
    other = replace(chosen.data, heterogeneity=0.0)
    asked = {}

    def run(recipes, store, folder_of, *how, **more):
        asked.update({data: folder_of(data) for data in (chosen.data, other)})

    monkeypatch.setattr(workers, "run", run)
    workers.train_recipes({}, Store(tmp_path, "smoke"), chosen, None, workers.Compute())
    assert asked == {data: rooms_folder(data) for data in (chosen.data, other)}
    assert read_parameters(asked[other])["heterogeneity"] == 0.0
    assert read_parameters(asked[chosen.data])["heterogeneity"] == 0.7
