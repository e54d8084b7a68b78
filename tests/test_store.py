"""Records and checkpoints: resumed, killed, shared by two processes, damaged, not to be written."""

import errno
import json
import os
import random
import shutil
import signal
import threading
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import POINTS, SIZE, write_buildings
from safetensors.torch import load_file, save_file

from mas_core.config import UserError
from mas_core.data.taskonomy import prepare
from mas_core.records import store as store_module
from mas_core.records import training
from mas_core.records.store import Store, open_store
from mas_core.records.training import is_done, train

VARY = {"seconds", "joules", "affinity_seconds"}  # what a repeated run may record otherwise
VARY_RESULT = {"sha256", "energy_source", "peak_memory_bytes", "git_dirty", "git_revision"}


def record(store, trajectory):
    """All of a record that must not depend on how it came about."""
    folder = store.folder(trajectory)
    rounds = store.rounds(trajectory)
    affinity = folder / "affinity.csv"
    result = store.result(trajectory) or {}
    return {
        "config": (folder / "config.json").read_text(),
        "rounds": rounds.drop(columns=list(VARY)).to_csv(index=False),
        "affinity": affinity.read_text() if affinity.exists() else None,
        "result": {k: v for k, v in result.items() if k not in VARY_RESULT},
    }


def weights(store, trajectory):
    """Every checkpoint, bit for bit."""
    folder = store.folder(trajectory) / "checkpoints"
    return {
        p.name: {k: t.numpy().tobytes() for k, t in load_file(p).items()}
        for p in sorted(folder.glob("*.safetensors"))
    }


@pytest.fixture(scope="module")
def whole(folder, settings, tmp_path_factory):
    """A trajectory trained in one go: what every other way must give."""
    from mas_core.records.trajectory import Trajectory

    store = Store(tmp_path_factory.mktemp("whole"), "small")
    trajectory = Trajectory("dk", 0, settings.data, settings.model, settings.fl)
    train(trajectory, 4, store, folder)
    return store


def assert_as_whole(store, trajectory, whole):
    assert record(store, trajectory) == record(whole, trajectory)
    found, expected = weights(store, trajectory), weights(whole, trajectory)
    assert expected.keys() <= found.keys()  # a stop on the way keeps its state, too
    for name in expected:
        assert found[name] == expected[name], name


# --- Resumed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(2, 4), (1, 2, 3, 4), (4, 4), (3, 1, 4)])
def test_in_steps_equals_at_once(trajectory, folder, store, whole, stops):
    for until in stops:
        train(trajectory, until, store, folder)
    assert_as_whole(store, trajectory, whole)


def test_asking_again_touches_nothing(trajectory, folder, store):
    train(trajectory, 4, store, folder)
    files = {p: p.stat().st_mtime_ns for p in store.root.rglob("*") if p.suffix != ".lock"}
    for until in (4, 2, 1):
        train(trajectory, until, store, folder)
        again = {p: p.stat().st_mtime_ns for p in store.root.rglob("*") if p.suffix != ".lock"}
        assert {p: t for p, t in again.items() if p.is_file()} == {
            p: t for p, t in files.items() if p.is_file()
        }


def test_an_interruption_keeps_the_rounds_done(trajectory, folder, store, whole):
    def interrupt(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(trajectory, 4, store, folder, progress=interrupt)
    assert store.rounds_done(trajectory) == 2
    train(trajectory, 4, store, folder)
    assert_as_whole(store, trajectory, whole)


def test_rows_whose_checkpoints_are_not_at_hand_stay(trajectory, folder, store, whole):
    """As in a clone: the rounds are trained again, and an interruption loses nothing on record."""

    def interrupt(done):
        if done == 1:
            raise KeyboardInterrupt

    train(trajectory, 3, store, folder)
    shutil.rmtree(store.folder(trajectory) / "checkpoints")
    before = {p: p.read_bytes() for p in store.folder(trajectory).glob("*.*") if p.is_file()}
    with pytest.raises(KeyboardInterrupt):
        train(trajectory, 4, store, folder, progress=interrupt)
    assert before == {p: p.read_bytes() for p in before} and is_done(trajectory, 3, store)
    again = Store(store.results, "small")
    train(trajectory, 4, again, folder)
    assert_as_whole(again, trajectory, whole)
    rows = (store.folder(trajectory) / "rounds.csv").read_bytes()
    assert rows.startswith(next(b for p, b in before.items() if p.name == "rounds.csv"))


def test_rows_ahead_of_the_checkpoints_do_not_say_which_round_is_best(
    trajectory, folder, half, whole
):
    """All rounds are on record, none of their states: the best one must be kept again."""
    shutil.rmtree(half.folder(trajectory) / "checkpoints")
    train(trajectory, 4, half, folder)
    assert_as_whole(half, trajectory, whole)


def test_rounds_on_record_keep_their_machine_when_they_are_trained_again(trajectory, folder, store):
    """Three rounds of another machine, whose states are not at hand: this one adds the fourth."""
    train(trajectory, 3, store, folder)
    path = store.folder(trajectory) / "machines.json"
    path.write_text('[{"from_round": 0, "device": "another"}]')
    shutil.rmtree(store.folder(trajectory) / "checkpoints")
    train(trajectory, 4, store, folder)
    found = [(m["from_round"], m["device"]) for m in store.machines(trajectory)]
    assert found == [(0, "another"), (3, store.result(trajectory)["device"])]
    assert store.result(trajectory)["devices"] == sorted({device for _, device in found})


def test_a_lock_leaves_what_others_are_writing(trajectory, store):
    store.folder(trajectory).mkdir(parents=True)
    mine, old = (store.folder(trajectory) / f"{name}.part" for name in "ab")
    for path in (mine, old):
        path.write_text("")
    os.utime(old, (0, 0))  # of a process that was killed
    with store.lock(trajectory):
        assert mine.exists() and not old.exists()


def test_gradnorm_resumes_with_its_balance(trajectory, folder, store, settings, tmp_path):
    fl = replace(settings.fl, method="gradnorm", gradnorm_alpha=1.5, gradnorm_lr=0.05)
    balanced = replace(trajectory, fl=fl)
    train(balanced, 1, store, folder)
    train(balanced, 4, store, folder)
    other = Store(tmp_path / "other", "small")
    train(balanced, 4, other, folder)
    assert record(store, balanced) == record(other, balanced)
    assert (
        weights(store, balanced)["last.safetensors"]
        == (weights(other, balanced)["last.safetensors"])
    )


def test_a_branch_is_the_same_with_and_without_its_parents_checkpoints(
    trajectory, folder, store, settings, tmp_path
):
    fl = replace(settings.fl, measure_rounds=0)
    branch = replace(trajectory, tasks="k", fl=fl, parent=trajectory, start_round=3)
    other = Store(tmp_path / "other", "small")
    for s in (store, other):
        train(trajectory, 4, s, folder)
    kept = store.folder(trajectory) / "checkpoints"
    assert 3 in other.checkpoints(trajectory)
    shutil.rmtree(kept)
    for s in (store, other):
        train(branch, 4, s, folder)
    assert record(store, branch) == record(other, branch)
    assert weights(store, branch) == weights(other, branch)
    again, first = weights(store, trajectory), weights(other, trajectory)
    assert "round_0003.safetensors" in again  # for the next branch
    assert again.items() <= first.items()


# --- Killed, and asked for twice at once ----------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has imported everything but trained nothing."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["mas_core.federated"])
    return context


def _train(results, trajectory, folder, kill_after=None, log=None, start=None):
    """Train in this process, which is killed some seconds after its first round began."""
    torch.set_num_threads(1)
    run_round = training.run_round

    def logged(net, state, trajectory, round_, data, *more):
        nonlocal kill_after
        if kill_after is not None:
            threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            kill_after = None
        if log:
            with open(log, "a") as file:
                file.write(f"{round_}\n")
        return run_round(net, state, trajectory, round_, data, *more)

    training.run_round = logged
    if start:
        start.wait()
    train(trajectory, trajectory.fl.rounds, Store(results, "small"), folder)


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up."""


def test_killed_before_any_of_its_files_appears_a_run_ends_the_same(
    trajectory, folder, settings, tmp_path, monkeypatch
):
    """Every state that the disk can be in: one killed run, one resumed, for each."""
    short = replace(trajectory, fl=replace(settings.fl, rounds=2, evaluate_every=1))
    whole, left = Store(tmp_path / "whole", "small"), 0
    train(short, 2, whole, folder)
    replace_file = os.replace

    def killing(at):
        calls = 0

        def counted(*arguments):
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            replace_file(*arguments)

        return counted

    for at in range(1, 100):
        store = Store(tmp_path / str(at), "small")
        with monkeypatch.context() as patch:
            patch.setattr(store_module.os, "replace", killing(at))
            patch.setattr(store_module.os, "unlink", lambda path: None)
            try:
                train(short, 2, store, folder)
                break
            except Killed:
                for part in store.root.rglob("*.part"):
                    os.utime(part, (0, 0))  # an hour later it is nobody's
                    left += 1
        assert store.result(short) is None
        train(short, 2, store, folder)
        assert_as_whole(store, short, whole)
        assert not list(store.root.rglob("*.part"))
    assert at > 10 and left == at - 1  # config, two tables, three checkpoints a round, result


def test_killed_on_the_way_to_a_split_no_affinity_is_missing(
    trajectory, folder, tmp_path, monkeypatch
):
    """Asked to round 2 of 4: whatever file a kill comes before, a record that counts as done at a
    round holds the affinities of all rounds up to there."""
    replace_file, done_early = os.replace, 0
    for at in range(1, 100):
        store, calls = Store(tmp_path / str(at), "small"), 0

        def counted(*arguments):
            nonlocal calls
            calls += 1
            if calls == at:  # noqa: B023
                raise Killed
            replace_file(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(store_module.os, "replace", counted)
            try:
                train(trajectory, 2, store, folder)
                break
            except Killed:
                pass
        for done in (1, 2):
            if is_done(trajectory, done, store):
                done_early += 1
                assert store.affinities(trajectory).rounds.tolist()[:done] == list(range(done))
        train(trajectory, 2, store, folder)
        assert store.affinities(trajectory).rounds.tolist() == [0, 1]
    assert 8 < at < 99 and done_early > 4


def test_killed_at_random_moments_again_and_again_a_run_ends_the_same(
    trajectory, folder, whole, processes, store
):
    rng, kills = random.Random(0), 0
    for _ in range(4):
        arguments = (store.results, trajectory, folder, rng.uniform(0.0, 0.3))
        process = processes.Process(target=_train, args=arguments)
        process.start()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills > 0  # and its lock did not outlive any of them
    train(trajectory, 4, store, folder)
    assert_as_whole(store, trajectory, whole)


def test_two_processes_that_ask_for_one_trajectory_train_it_once(
    trajectory, folder, whole, processes, store, tmp_path
):
    log, start = tmp_path / "log", processes.Barrier(2)
    both = [
        processes.Process(target=_train, args=(store.results, trajectory, folder, None, log, start))
        for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0, 0]
    assert log.read_text().split() == ["0", "1", "2", "3"]
    assert_as_whole(store, trajectory, whole)


# --- Damaged --------------------------------------------------------------------------------------


@pytest.fixture
def half(trajectory, folder, whole, store):
    """A copy of the whole record whose result is not written: it must read its checkpoint."""
    shutil.copytree(whole.root, store.root)
    (store.folder(trajectory) / "result.json").unlink()
    return store


def refused(trajectory, store, folder, says):
    """Training must say one line, and leave every file as it is."""

    def files():
        return {p: p.read_bytes() for p in store.root.rglob("*") if p.is_file()}

    before = files()
    with pytest.raises(UserError, match=says) as error:
        train(trajectory, 4, store, folder)
    assert "\n" not in str(error.value)
    after = files()
    after = {p: b for p, b in after.items() if p.suffix != ".lock"}
    assert after == {p: b for p, b in before.items() if p.suffix != ".lock"}


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1], ids=str)
def test_a_truncated_checkpoint(trajectory, folder, half, keep):
    path = half.checkpoint_path(trajectory, "last")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    refused(trajectory, half, folder, r"last.safetensors cannot be read .*; delete .*checkpoints")


def test_a_checkpoint_of_noise(trajectory, folder, half):
    path = half.checkpoint_path(trajectory, "last")
    path.write_bytes(np.random.default_rng(0).bytes(4096))
    refused(trajectory, half, folder, "cannot be read")


def test_a_truncated_best_checkpoint(trajectory, folder, half):
    path = half.checkpoint_path(trajectory, "best")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="best.safetensors cannot be read"):
        train(trajectory, 4, half, folder)


def rewrite(path, change, **about):
    """Change a checkpoint's tensors and what it says about itself."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() | about
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {k: v for k, v in metadata.items() if v is not None} or None)


def test_a_checkpoint_of_another_shape(trajectory, folder, half):
    def reshape(tensors):
        tensors["encoder.0.weight"] = torch.zeros(9, 3, 3, 3)

    rewrite(half.checkpoint_path(trajectory, "last"), reshape)
    refused(trajectory, half, folder, "holds another network's weights; delete")


def test_a_checkpoint_that_lacks_a_tensor(trajectory, folder, half):
    rewrite(half.checkpoint_path(trajectory, "last"), lambda t: t.pop("encoder.0.weight"))
    refused(trajectory, half, folder, "holds another network's weights")


@pytest.mark.parametrize(
    "about",
    [{"trajectory": "dk-s1-0123456789"}, {"trajectory": None, "round": None, "data": None},
     {"round": None}, {"data": None}],
    ids=["another's", "nothing", "no round", "no data"],
)  # fmt: skip
def test_a_checkpoint_of_something_else(trajectory, folder, half, about):
    rewrite(half.checkpoint_path(trajectory, "last"), lambda t: None, **about)
    refused(trajectory, half, folder, "holds another network's weights")


def test_other_data_than_a_run_began_with(trajectory, half, tmp_path):
    other = tmp_path / "other"
    write_buildings(other, POINTS, SIZE, seed=1)
    prepare(other, SIZE, progress=False, workers=1)
    refused(trajectory, half, other, "trained on data other than those in the data folder now")
    branch = replace(trajectory, tasks="k", parent=trajectory, start_round=4)
    with pytest.raises(UserError, match="trained on data other"):
        train(replace(branch, start_round=3, parent=trajectory), 4, _with_kept(half), other)


def _with_kept(store):
    """The state after round 4 stands in for the one after round 3."""
    for path in store.root.rglob("round_0004.safetensors"):
        shutil.copy(path, path.with_name("round_0003.safetensors"))
    return store


def test_rounds_that_the_checkpoint_has_and_the_table_lacks(trajectory, folder, half):
    path = half.folder(trajectory) / "rounds.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    refused(trajectory, half, folder, "rounds.csv .*is not as it was written; restore")
    path.unlink()
    refused(trajectory, half, folder, "rounds.csv .*is not as it was written; restore")


@pytest.mark.parametrize("lost", [0, 1, "all"], ids=str)
def test_affinities_that_the_checkpoint_has_and_the_table_lacks(trajectory, folder, half, lost):
    path = half.folder(trajectory) / "affinity.csv"
    head, *rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([head, *(r for r in rows if not r.startswith(f"{lost},"))]))
    if lost == "all":
        path.unlink()
    refused(trajectory, half, folder, "affinity.csv in .* is not as it was written; restore")


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_complete_record_that_lacks_rounds(trajectory, folder, whole, store, lines):
    shutil.copytree(whole.root, store.root)
    path = store.folder(trajectory) / "rounds.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    refused(trajectory, store, folder, "lacks rounds of a complete record; restore it, or delete")


def test_a_result_without_losses(trajectory, folder, whole, store):
    shutil.copytree(whole.root, store.root)
    (store.folder(trajectory) / "result.json").write_text("{}")
    refused(trajectory, store, folder, "result.json is damaged .*restore it, or delete")


def test_a_changed_number_in_a_result_is_refused(trajectory, folder, store):
    train(trajectory, 4, store, folder)
    path = store.folder(trajectory) / "result.json"
    result = json.loads(path.read_text())
    result["test_best"]["d"] /= 2
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match="result.json is not as it was written"):
        Store(store.results, store.preset).result(trajectory)
    del result["sha256"]["result"]  # as records were written before
    path.write_text(json.dumps(result))
    assert Store(store.results, store.preset).result(trajectory)["test_best"] == result["test_best"]


@pytest.mark.parametrize(
    "content", [b"[1, 2]", b"7", b'{"test_best": {}}', b"\xff\xfe", b""], ids=repr
)
@pytest.mark.parametrize("name", ["result.json", "config.json"])
def test_files_that_hold_something_else(trajectory, folder, whole, store, name, content):
    shutil.copytree(whole.root, store.root)
    (store.folder(trajectory) / name).write_bytes(content)
    refused(trajectory, store, folder, name)
    with pytest.raises(UserError, match=name):  # and where records are only listed
        [(store.trajectory(id_), store.result(id_)) for id_ in store.ids()]


def test_a_byte_of_a_checkpoint_that_flipped(trajectory, folder, half):
    path = half.checkpoint_path(trajectory, "last")
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    refused(trajectory, half, folder, "last.safetensors is not as it was written; delete")


@pytest.mark.parametrize("name", ["rounds.csv", "affinity.csv"])
def test_a_digit_of_a_complete_record_that_changed(trajectory, folder, whole, store, name):
    shutil.copytree(whole.root, store.root)
    path = store.folder(trajectory) / name
    content = bytearray(path.read_bytes())
    content[-3] = ord("1") if content[-3] == ord("2") else ord("2")
    path.write_bytes(content)
    refused(trajectory, store, folder, f"{name} is not as it was written; restore it, or delete")


@pytest.mark.parametrize("name", ["rounds.csv", "affinity.csv"])
def test_a_digit_of_a_record_that_is_not_complete(trajectory, folder, half, name):
    path = half.folder(trajectory) / name
    content = bytearray(path.read_bytes())
    content[-3] = ord("1") if content[-3] == ord("2") else ord("2")
    path.write_bytes(content)
    refused(trajectory, half, folder, f"{name} .*is not as it was written; restore it, or delete")


@pytest.mark.parametrize("damage", [lambda rows: rows + rows[-1:], lambda rows: [*rows, b"\xff\n"]])
def test_rounds_that_stand_twice_or_are_no_text(trajectory, folder, half, damage):
    path = half.folder(trajectory) / "rounds.csv"
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    refused(trajectory, half, folder, "rounds.csv is damaged .*restore it, or delete")


@pytest.mark.parametrize("text", ["", "nothing\n1\n", "round,client\nx,y\n", "\0\n"], ids=repr)
def test_tables_that_are_none(trajectory, whole, store, text):
    shutil.copytree(whole.root, store.root)
    for name, read in (("rounds.csv", store.rounds), ("affinity.csv", store.affinities)):
        (store.folder(trajectory) / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} is damaged .*restore it, or delete"):
            read(trajectory)


def test_a_table_of_affinities_that_was_cut(trajectory, whole, store):
    shutil.copytree(whole.root, store.root)
    path = store.folder(trajectory) / "affinity.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="affinity.csv is damaged .*reshape"):
        store.affinities(trajectory)


def edit(store, trajectory, change):
    path = store.folder(trajectory) / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["fl"].update(lr=0.2),
        lambda v: v.update(seed=1),
        lambda v: v.update(tasks="ds"),
        lambda v: v.update(start_round=1),
        lambda v: v["data"].update(split_seed=1),
    ],
    ids=["lr", "seed", "tasks", "start", "data"],
)
def test_an_edited_configuration_does_not_match_its_id(trajectory, folder, half, change):
    edit(half, trajectory, change)
    with pytest.raises(UserError, match="config.json does not match its id: it describes d"):
        half.trajectory(trajectory.id)
    refused(trajectory, Store(half.results, "small"), folder, "does not match its id")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"tasks": "dk"}', '{"tasks": "dk", "fl": 3}'],
)
def test_a_configuration_that_is_none(trajectory, half, text):
    (half.folder(trajectory) / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        half.trajectory(trajectory.id)


def test_unknown_keys_and_impossible_values_in_a_configuration(trajectory, half):
    edit(half, trajectory, lambda v: v["fl"].update(speed=1))
    with pytest.raises(UserError, match="speed"):
        half.trajectory(trajectory.id)
    edit(half, trajectory, lambda v: (v["fl"].pop("speed"), v["fl"].update(rounds=0)))
    with pytest.raises(UserError, match="rounds=0"):
        half.trajectory(trajectory.id)


def test_a_result_that_is_no_json(trajectory, folder, half):
    (half.folder(trajectory) / "result.json").write_text('{"test_best": ')
    with pytest.raises(UserError, match="result.json is not valid JSON"):
        half.result(trajectory)


@pytest.mark.parametrize("place", ["results", "small", "id", "lock"])
def test_results_that_cannot_be_written(trajectory, folder, tmp_path, place):
    """A file stands where a folder must be, or a folder where a file must be."""
    store = Store(tmp_path / "results", "small")
    path = {
        "results": store.results,
        "small": store.root,
        "id": store.folder(trajectory),
        "lock": store.folder(trajectory) / "training.lock",
    }[place]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if place == "lock" else path.write_text("in the way")
    with pytest.raises(UserError, match=f"cannot write records under {store.results}") as error:
        train(trajectory, 4, store, folder)
    assert "\n" not in str(error.value)
    assert place == "lock" or path.read_text() == "in the way"


def test_a_full_disk_is_said_in_one_line_and_gone_on_from(
    trajectory, folder, whole, store, monkeypatch
):
    train(trajectory, 2, store, folder)
    monkeypatch.setattr(store_module.os, "replace", _no_space)
    with pytest.raises(UserError, match="cannot write records under .*No space left"):
        train(trajectory, 4, store, folder)
    assert not list(store.root.rglob("*.part"))
    monkeypatch.undo()
    train(trajectory, 4, store, folder)
    assert_as_whole(store, trajectory, whole)


def _no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- Read -----------------------------------------------------------------------------------------


def test_what_a_store_holds(trajectory, folder, whole, store, settings):
    assert whole.ids() == [trajectory.id] and whole.trajectory(trajectory.id) == trajectory
    assert store.ids() == [] and store.result(trajectory) is None
    assert store.rounds(trajectory).empty and store.rounds_done(trajectory) == 0
    with pytest.raises(UserError, match="no record"):
        store.trajectory(trajectory.id)
    with pytest.raises(UserError, match="no affinities .* fl.measure_rounds > 0"):
        store.affinities(trajectory)
    fl = replace(settings.fl, measure_rounds=0, clients=(0, 1), clients_per_round=1)
    child = replace(trajectory, tasks="d", fl=fl, parent=trajectory, start_round=2, lr_from=2)
    train(child, 3, store, folder)
    with pytest.raises(UserError, match="no record"):
        store.trajectory(child.id)  # its parent is not here
    train(trajectory, 2, store, folder)
    assert store.trajectory(child.id) == child and store.rounds_done(child) == 3
    assert store.ids() == sorted([trajectory.id, child.id])


def test_open_store_makes_no_folder(tmp_path):
    store = open_store("smoke", tmp_path / "results")
    assert store.root == tmp_path / "results" / "smoke" and not store.results.exists()


def test_records_are_small_text_and_checkpoints_no_pickles(trajectory, whole):
    folder = whole.folder(trajectory)
    names = {p.name for p in folder.iterdir()} - {"training.lock"}
    files = {"config.json", "rounds.csv", "affinity.csv", "machines.json", "result.json"}
    assert names == files | {"checkpoints"}
    assert {p.suffix for p in (folder / "checkpoints").iterdir()} == {".safetensors"}
    kept = {p.stem for p in (folder / "checkpoints").iterdir()} - {"last", "best"}
    assert kept == {f"round_{r:04}" for r in (1, 2, 3, 4)}
    for name in names - {"checkpoints"}:
        content = (folder / name).read_bytes()
        assert content.endswith(b"\n") and b"\r" not in content and len(content) < 5000
    result = json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)
    assert {"test_last", "test_best", "best_round", "device", "threads", "torch", "git_revision",
            "git_dirty", "energy_source"} <= result.keys()  # fmt: skip
    assert str(Path.home()) not in (folder / "result.json").read_text()


def test_affinities_are_read_back(tmp_path, trajectory):
    store = Store(tmp_path, "small")
    rows = [
        {"round": r, "client": k, "measurements": 2, "d>d": "", "d>k": f"{r}.{k}",
         "k>d": f"-{r}.{k}", "k>k": ""}
        for r in (0, 1, 2) for k in (1, 3)
    ]  # fmt: skip
    store.write_rows(trajectory, "affinity.csv", rows)
    found = store.affinities(trajectory)
    assert found.rounds.tolist() == [0, 1, 2] and found.clients.tolist() == [[1, 3]] * 3
    assert found.values[2, 1, 0, 1] == 2.3 and found.values[1, 0, 1, 0] == -1.1
    assert pd.isna(found.values[0, 0, 0, 0])
