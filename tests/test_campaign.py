"""A campaign within its budget; packs that add records and nothing else."""

import io
import json
import shutil
import tarfile
import time
import zipfile
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest

from mas.__main__ import main
from mas.paper import campaign, experiments
from mas.paper.campaign import Evidence, pack, unpack
from mas.run.engine import collect
from mas.run.workers import Compute
from mas_core.config import UserError
from mas_core.methods import Need
from mas_core.records.store import Store
from mas_core.records.training import train

TINY = {
    "data.source": "taskonomy", "data.size": 16, "data.buildings": 4, "fl.batch_size": 4,
    "fl.rounds": 4, "fl.measure_rounds": 4, "mas.merge_rounds": 2, "mas.affinity_rounds": 2,
}  # fmt: skip
PAIR = ("dk",)


def pair(store, seed, overrides):
    """All-in-one and MAS-2 of two tasks: a trunk, then two groups."""
    s = experiments.study(store, "dk", seed, overrides)
    made = {"all-in-one": experiments.methods.all_in_one(s),
            "MAS-2": experiments.methods.merge_and_split(s, 2)}  # fmt: skip
    return {(name, "dk", seed): recipe for name, recipe in made.items()}


def content(root):
    """Every file of records below a folder of results, by its place there."""
    return {p.relative_to(root).as_posix(): p.read_bytes()
            for p in root.glob("*/*/*") if p.suffix in (".json", ".csv")}  # fmt: skip


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """A campaign that had time for everything: its results and its pack."""
    root = tmp_path_factory.mktemp("campaign")
    table = [Evidence(pair, (0,), PAIR, "smoke", TINY)]
    began = time.time()
    code = campaign.campaign(300, root / "pack.tar.gz", root / "results", Compute(2, "cpu"), folder,
                             table)  # fmt: skip
    assert code == 0 and time.time() - began < 200  # it ends when all is done
    return root / "results", root / "pack.tar.gz"


def test_everything_in_time_is_trained_packed_and_unpacked_to_the_byte(packed, tmp_path, capsys):
    results, file = packed
    store = Store(results, "smoke")
    assert len(store.ids()) == 3 and all(store.result(i) for i in store.ids())
    with tarfile.open(file) as archive:
        assert set(archive.getnames()) == set(content(results))  # no checkpoints, no locks
    assert main(["unpack", str(file), "--results", str(tmp_path)]) == 0
    assert "3 added, 0 already there, 0 refused" in capsys.readouterr().out
    assert content(tmp_path) == content(results)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert collect(pair(Store(tmp_path, "smoke"), 0, TINY), Store(tmp_path, "smoke"))[1] == []
    assert unpack(file, tmp_path) == 0
    assert "0 added, 3 already there, 0 refused" in capsys.readouterr().out


def test_a_budget_is_kept_and_so_are_the_rounds_done_in_it(folder, tmp_path, capsys):
    endless = TINY | {"fl.rounds": 100_000, "fl.evaluate_every": 100_000, "fl.measure_rounds": 2}
    table = [Evidence(pair, (0, 1), PAIR, "smoke", endless),
             Evidence(pair, (2,), PAIR, "smoke", endless | {"data.split_seed": 1})]  # fmt: skip
    file, began = tmp_path / "pack.zip", time.time()
    assert campaign.campaign(25, file, tmp_path / "a", Compute(2, "cpu"), folder, table) == 0
    assert time.time() - began < 25
    store = Store(tmp_path / "a", "smoke")
    done = {i: store.rounds_done(store.trajectory(i)) for i in store.ids()
            if (store.folder(i) / "rounds.csv").exists()}  # fmt: skip
    assert {store.trajectory(i).seed for i in done} == {0, 1}  # the first row, nothing of the next
    assert min(done.values()) > 0 and not any(map(store.result, done))
    assert f"{len(done)} trajectories trained, 0 of them complete" in capsys.readouterr().out
    assert unpack(file, tmp_path / "b") == 0
    with_rounds = {n: c for n, c in content(tmp_path / "a").items() if n.split("/")[1] in done}
    assert content(tmp_path / "b") == with_rounds
    for id_, rounds in done.items():  # what is on record goes on where it stopped
        t = store.trajectory(id_)
        rows = (store.folder(t) / "rounds.csv").read_text()
        train(t, rounds + 1, store, folder)
        assert (store.folder(t) / "rounds.csv").read_text().startswith(rows)


def test_a_budget_that_ends_while_rooms_are_rendered_still_packs(tmp_path, capsys, monkeypatch):
    def ended(*_, stop_at, **__):
        time.sleep(max(0.0, stop_at - time.time()) + 0.1)
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(campaign, "train_recipes", ended)
    table, file = [Evidence(pair, (0,), PAIR, "smoke", TINY)], tmp_path / "pack.zip"
    assert campaign.campaign(6, file, tmp_path / "a", Compute(1, "cpu"), None, table) == 0
    assert file.exists() and "0 trajectories trained" in capsys.readouterr().out


def test_the_data_given_are_of_the_first_buildings_alone(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(campaign, "train_recipes", lambda *a, **_: asked.append(a[2:4]))
    table = [Evidence(pair, (0,), PAIR, "smoke", TINY | {"data.render_seed": r}) for r in (0, 1)]
    assert not campaign.campaign(60, tmp_path / "p.zip", tmp_path, Compute(1), folder, table)
    assert [(s.data.render_seed, at) for s, at in asked] == [(0, folder), (1, None)]


def tampered(file, out, change):
    """A copy of a pack whose members went through `change`, name and bytes to the same."""
    with tarfile.open(file) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]
    with tarfile.open(out, "w:gz") as archive:
        for name, data in filter(None, (change(*member) for member in members)):
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return out


def test_what_does_not_match_its_id_is_refused_and_the_rest_added(packed, tmp_path, capsys):
    def other_rate(name, data):
        if name.split("/")[1].startswith("d-") and name.endswith("config.json"):
            values = json.loads(data)
            values["fl"]["lr"] = 0.5
            return name, json.dumps(values).encode()
        return name, data

    def lacks_a_round(name, data):
        if name.split("/")[1].startswith("d-") and name.endswith("rounds.csv"):
            lines = data.decode().splitlines(True)
            return name, "".join([*lines[:-1], lines[1]]).encode()  # one row twice
        return name, data

    def not_json(name, data):
        broken = name.split("/")[1].startswith("d-") and name.endswith("config.json")
        return name, b"[1]" if broken else data

    def a_better_loss(name, data):
        if name.split("/")[1].startswith("d-") and name.endswith("result.json"):
            result = json.loads(data)
            result["test_best"]["d"] /= 2
            return name, json.dumps(result).encode()
        return name, data

    for i, change in enumerate((other_rate, lacks_a_round, not_json, a_better_loss)):
        file = tampered(packed[1], tmp_path / f"{i}.tar.gz", change)
        assert main(["unpack", str(file), "--results", str(tmp_path / f"{i}")]) == 1
        told = capsys.readouterr()
        assert "2 added, 0 already there, 1 refused" in told.out
        assert told.err.count("mas: refused d-s0-") == 1 and "Traceback" not in told.err
        assert len(Store(tmp_path / f"{i}", "smoke").ids()) == 2


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "/tmp/evil.json", "smoke/../../evil.json", "smoke/d-s0-0123456789/../x.json",
     "smoke/d-s0-0123456789/checkpoints/last.safetensors", "smoke/d-s0-0123456789/a.py",
     "tiny/d-s0-0123456789/config.json", "smoke/d-s0-0123456789/x.json\n"],
)  # fmt: skip
def test_nothing_but_records_is_unpacked(packed, tmp_path, capsys, name):
    results = tmp_path / "deep" / "results"
    results.mkdir(parents=True)
    tars = tampered(packed[1], tmp_path / "evil.tar.gz", lambda n, data: (n, data))
    with tarfile.open(packed[1]) as good, tarfile.open(tars, "w:gz") as archive:
        for member in good:
            archive.addfile(member, good.extractfile(member))
        archive.addfile(tarfile.TarInfo(name))
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(name, "{}")
    before = sorted(tmp_path.rglob("*"))
    for file in (tars, tmp_path / "evil.zip"):
        assert main(["unpack", str(file), "--results", str(results)]) == 2
        assert "no file of a record; nothing was unpacked" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_links_and_broken_files_are_refused(packed, tmp_path, capsys):
    link = tarfile.TarInfo("smoke/d-s0-0123456789/config.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    with tarfile.open(tmp_path / "link.tar.gz", "w:gz") as archive:
        archive.addfile(link)
    (tmp_path / "cut.tar.gz").write_bytes(packed[1].read_bytes()[:500])
    (tmp_path / "text.zip").write_text("no archive")
    for name in ("link.tar.gz", "cut.tar.gz", "text.zip", "absent.zip"):
        assert main(["unpack", str(tmp_path / name), "--results", str(tmp_path / "r")]) == 2
        err = capsys.readouterr().err
        assert err.startswith("mas: ") and name in err and err.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_a_record_that_reaches_further_is_left_alone(folder, packed, tmp_path):
    """Complete against partial, in both directions; partial with checkpoints can be continued."""
    whole = Store(packed[0], "smoke")
    trunk = next(whole.trajectory(i) for i in whole.ids() if i.startswith("dk-"))
    partial = Store(tmp_path / "partial", "smoke")
    train(trunk, 2, partial, folder)
    pack(tmp_path / "partial.zip", {partial: [trunk.id]})

    shutil.copytree(packed[0], tmp_path / "whole")
    before = content(tmp_path / "whole")
    assert unpack(tmp_path / "partial.zip", tmp_path / "whole") == 0
    assert content(tmp_path / "whole") == before

    further = Store(tmp_path / "further", "smoke")
    train(trunk, 1, further, folder)
    rows = content(tmp_path / "further")
    assert unpack(tmp_path / "partial.zip", tmp_path / "further") == 0
    assert content(tmp_path / "further") == rows  # its checkpoint continues it
    assert further.checkpoint_path(trunk, "last").exists()
    assert unpack(packed[1], tmp_path / "further") == 0
    assert content(tmp_path / "further") == content(packed[0])
    assert not further.checkpoint_path(trunk, "last").exists()  # of another run


def test_a_branch_finds_its_parent_in_the_pack_or_here(packed, tmp_path):
    only = tampered(packed[1], tmp_path / "branches.tar.gz",
                    lambda n, data: None if n.split("/")[1].startswith("dk-") else (n, data))
    assert unpack(only, tmp_path / "alone") == 1  # their parent is nowhere
    assert not Store(tmp_path / "alone", "smoke").ids()
    assert unpack(packed[1], tmp_path / "here") == 0
    for id_ in Store(tmp_path / "here", "smoke").ids():
        if not id_.startswith("dk-"):
            shutil.rmtree(tmp_path / "here" / "smoke" / id_)
    assert unpack(only, tmp_path / "here") == 0
    assert content(tmp_path / "here") == content(packed[0])


def test_what_says_how_far_a_record_reaches_is_unpacked_last(packed, tmp_path, monkeypatch):
    written, write = {}, Store.write_file
    monkeypatch.setattr(Store, "write_file", lambda store, t, name, data: (
        written.setdefault(t.id, []).append(name), write(store, t, name, data)))  # fmt: skip
    assert unpack(packed[1], tmp_path / "here") == 0
    assert written and all(names[-2:] == ["rounds.csv", "result.json"]
                           for names in written.values() if "result.json" in names)  # fmt: skip
    assert any("affinity.csv" in names for names in written.values())


def test_budgets():
    assert [campaign.seconds_of(t) for t in ("540s", "9m", "0.5h", "20")] == [540, 540, 1800, 20]
    for wrong in ("soon", "0s", "-3s", "5 s", "1d"):
        with pytest.raises(UserError, match="allowed: a time such as 540s"):
            campaign.seconds_of(wrong)


def test_a_pack_must_be_writable_before_anything_is_trained(tmp_path, capsys):
    for name, says in (("p.rar", "ends in .tar.gz or .zip"), ("no/p.zip", "there is no folder")):
        command = ["campaign", "--budget", "9s", "--pack", str(tmp_path / name)]
        assert main(command) == 2 and says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_table_asks_for_what_the_evidence_needs_and_no_recipe_twice(tmp_path):
    store = Store(tmp_path, "small")
    first = campaign.TABLE[0].recipes(store)
    assert {key[2] for key in first} == set(range(10)) and {key[1] for key in first} == {"sdnkt"}
    assert {"MAS-1", "one-by-one restarted", "MAS-2 continued"} <= {key[0] for key in first}
    medium = [row for row in campaign.TABLE if row.preset == "medium"]
    assert not any(key[0].startswith("HOA") for key in medium[1].recipes(Store(tmp_path, "medium")))
    seeds = {r.overrides.get("data.render_seed") for r in campaign.TABLE}
    assert seeds == {None, 1, 2, 3, 4}
    for row in campaign.TABLE:
        assert row.recipes(Store(tmp_path, row.preset)), row  # names task sets that it has
    stages = list(campaign._stages(campaign.TABLE, tmp_path))
    keys = campaign._all(stages[0][2], store)
    assert len(keys) == len({(*k[:3], k[3]) for k in keys}) and len(stages) < len(campaign.TABLE)
    needs = collect(campaign.TABLE[0].recipes(store), store)[1]
    assert Need(replace(needs[0].trajectory), needs[0].until) == needs[0]
