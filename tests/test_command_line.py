"""What people type: the commands from nothing, bad input, interruption."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mas.__main__ import main
from mas_core.config import settings as preset_settings
from mas_core.records.store import Store
from mas_core.tasks import DOMAINS

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--preset", "smoke", "--set", "data.source=taskonomy", "--set", "data.size=16",
    "--set", "data.buildings=4", "--set", "fl.batch_size=4", "--set", "fl.rounds=4",
    "--set", "mas.merge_rounds=2", "--device", "cpu",
]  # fmt: skip


def files(root):
    """Path, size and time of everything below a folder."""
    return {(p, p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*")}


def refused(capsys, *argv):
    """Run a command that must be refused: what it says is wrong."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert len(messages(err)) == 1 and "Traceback" not in err, err
    return err[err.index("mas: ") :]


def messages(err):
    """The lines of stderr that speak to the user."""
    return re.findall("^mas: .*", err, re.M)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run", "mas", "--tasks", "sdx"], "unknown task 'x' in 'sdx'; the tasks are sdnkterca"),
        (["run", "mas", "--tasks", "sds"], "task 's' is repeated"),
        (["run", "mas", "--tasks", "dk", "--splits", "3"], "splits=3; dk allows 1 to 2"),
        (["run", "mas", "--tasks", "dk", "--splits", "0"], "splits=0; dk allows 1 to 2"),
        (["run", "mas", "--set", "fl.clients_per_round=7"], "clients_per_round=7.*6 clients"),
        (["run", "mas", "--tasks", "d", "--splits", "1"], "tasks=d: one task cannot be split"),
        (["run", "mas", "--set", "fl.rounds=4"], "merge_rounds=4; allowed: 1 to 3"),
        (["plan", "--images-per-second", "-5"], "--images-per-second -5.0; allowed: more than 0"),
        (["reproduce", "figure_04_data", "--timeout", "0"], "--timeout 0; allowed: 1 and more"),
        (["run", "sas"], "unknown method 'sas'; allowed: one-by-one.*mas"),
        (["run", "mas", "--preset", "tiny"], "unknown preset 'tiny'.*smoke, small, medium, paper"),
        (["run", "mas", "--set", "fl.epochs=2"], "unknown setting 'fl.epochs'.*local_epochs"),
        (["run", "mas", "--set", "epochs=2"], "unknown setting 'epochs'.*fl\\."),
        (["run", "mas", "--set", "fl.lr=fast"], "fl.lr='fast'.*valid number"),
        (["run", "mas", "--set", "fl.lr"], "write KEY=VALUE"),
        (["run", "mas", "--set", "fl.rounds=0"], "rounds='0': .*greater"),
        (["run", "mas", "--workers", "0"], "--workers 0; allowed: 1"),
        (["reproduce", "figure_04_data", "--workers", "-1"], "--workers -1; allowed: 1"),
        (["reproduce", "figure_04_data", "--workers", "0"], "--workers 0; allowed: 1"),
        (["prepare", "--root", ".", "--workers", "-1"], "--workers -1; allowed: 1"),
        (["run", "mas", "--device", "abacus"], "unknown device 'abacus'"),
        (["run", "mas", "--preset", "paper"], "Taskonomy is not part of the package.*--data"),
        (["status", "--preset", "tiny"], "unknown preset 'tiny'; allowed: smoke, small, medium"),
        (["plan", "figure_5"], "unknown notebook 'figure_5'; allowed: .*figure_05_sdnkt"),
        (["plan", "--preset", "tiny"], "unknown preset 'tiny'"),
        (["reproduce", "figure_5"], "unknown notebook 'figure_5'; allowed: .*figure_05_sdnkt"),
        (["reproduce", "figure_05_sdnkt", "-p", "lr=1"], "no parameter lr; allowed: preset, seeds"),
        (["reproduce", "figure_05_sdnkt", "-p", "seeds=1"], "seeds=1 .*allowed: list"),
        (["reproduce", "figure_05_sdnkt", "-p", "seeds"], "write NAME=VALUE"),
        (["render", "--out", "out", "--size", "4"], "size must be .* 16 to 1024, not 4"),
        (["run", "mas", "--set", "fl.method=famo"], "fl.method=famo measures no affinities"),
        (["run", "mas", "--set", "data.size=16", "--set", "model.output_stride=16", "--set",
          "fl.batch_size=1"], "batch_size=1 with size=16 .*allowed: batches of 2"),
        (["run", "mas", "--threads", "0"], "--threads 0; allowed: 1"),
        (["reproduce", "figure_04_data", "--dask", ""], "--dask is empty; allowed: the scheduler"),
        (["reproduce", "figure_04_data", "--slurm", ""], "--slurm is empty; allowed: a partition"),
        (["render", "--out", "out", "--heterogeneity", "2"], r"lie in \[0, 1\], not 2"),
        (["prepare", "--root", "nowhere"], "nowhere does not exist"),
        (["run", "mas", "--seed", "-1"], "seed -1; allowed: 0 and more"),
        (["plan", "--seeds", "0", "-1"], "seed -1; allowed: 0 and more"),
        (["plan", "--images-per-second", "nan"], "--images-per-second nan; allowed: more than 0"),
        (["site", "--out", "out", "--preset", "tiny"], "unknown preset 'tiny'; allowed: smoke"),
        (["site", "--out", "out", "--preset", "smoke"], "no records of preset smoke in results"),
        (["run", "fedprox", "--set", "fl.prox_mu=0"], "fedprox without it is all-in-one; allowed"),
        (["run", "gradnorm", "--set", "fl.gradnorm_lr=0"], "fl.gradnorm_lr=0: gradnorm without"),
        (["run", "mas", "--set", "data.tasks=x"], "data.tasks='x': allowed: my_module:my_name"),
        (["run", "all-in-one", "--set", "fl.options=c:0.5"], "fedavg has no 'c'; allowed: none"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    takes_preset = argv[0] in ("run", "plan", "reproduce") and "--preset" not in argv
    preset = ["--preset", "smoke"] if takes_preset else []
    assert re.search(says, refused(capsys, *argv, *preset))
    assert not files(tmp_path)


def test_a_rule_of_ones_own_is_found_where_one_stands(capsys, tmp_path, folder, monkeypatch):
    (tmp_path / "own_rule.py").write_text(
        "from mas_core.fedavg import FedAvg\n\n\nclass Own(FedAvg):\n"
        "    def correct(self):\n        raise ZeroDivisionError\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    said = ["run", "all-in-one", "--tasks", "dk", *TINY, "--data", str(folder),
            "--results", str(tmp_path), "--set", "fl.method=own_rule:Own",
            "--set", "fl.arithmetic=grouped"]  # fmt: skip
    assert main(said) == 1 and "ZeroDivisionError" in capsys.readouterr().err


def test_a_data_folder_that_does_not_serve_is_refused(capsys, tmp_path, folder):
    results, empty, lacking = tmp_path / "results", tmp_path / "empty", tmp_path / "lacking"
    empty.mkdir()
    for domain in set(DOMAINS) - {"normal"}:
        shutil.copytree(folder / domain, lacking / domain)
    run = ["run", "all-in-one", "--tasks", "dn", *TINY, "--results", results, "--data"]
    before = files(tmp_path)
    assert re.search("missing does not exist", refused(capsys, *run, tmp_path / "missing"))
    assert re.search("empty is empty", refused(capsys, *run, empty))
    assert re.search("mas prepare", refused(capsys, *run, lacking))
    assert re.search("normal", refused(capsys, "prepare", "--root", lacking, "--size", 16))
    assert re.search("no Taskonomy images", refused(capsys, "prepare", "--root", empty))
    assert not [p for p in results.rglob("*") if p.suffix in (".csv", ".json", ".safetensors")]
    assert {f[0] for f in files(tmp_path) - before} <= {results, *results.rglob("*")}


def test_results_that_cannot_be_written_are_refused(capsys, tmp_path, folder):
    place = tmp_path / "results"
    place.write_text("a file stands here")
    line = refused(capsys, "run", "all-in-one", "--tasks", "dk", *TINY, "--data", folder,
                   "--results", place)  # fmt: skip
    assert "cannot write" in line and str(place) in line
    assert place.read_text() == "a file stands here"


def test_run_then_status_then_damaged_records(capsys, tmp_path, folder):
    run = ["run", "one-by-one", "--tasks", "dk", *TINY, "--data", folder, "--results", tmp_path]
    run = [str(a) for a in run]
    assert main(run) == 0
    printed = capsys.readouterr().out
    store = Store(tmp_path, "smoke")
    total = sum(sum(store.result(i)["test_best"].values()) for i in store.ids())
    assert re.search(rf"one-by-one\s+{total:.3f}\s.*\bd k\n", printed)
    assert main(["status", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "smoke: 2 trajectories" in printed and "2 complete" in printed
    assert "small: 0 trajectories" in printed
    assert len(re.findall(r"round +4/4  total test loss", printed)) == 2

    before = files(tmp_path)
    assert main(run) == 0
    assert {f for f in files(tmp_path) if f[0].suffix != ".lock"} <= before  # nothing done again

    d = next(tmp_path / "smoke" / i for i in store.ids() if i.startswith("d-"))
    config = json.loads((d / "config.json").read_text())
    config["fl"]["lr"] = 0.2
    (d / "config.json").write_text(json.dumps(config))
    line = refused(capsys, "status", "--results", tmp_path)
    assert "does not match its id" in line and d.name in line
    assert "does not match its id" in refused(capsys, *run)

    k = next(tmp_path / "smoke" / i for i in store.ids() if i.startswith("k-"))
    others = (d / "checkpoints" / "last.safetensors").read_bytes()
    shutil.rmtree(d)
    (k / "result.json").unlink()
    last = k / "checkpoints" / "last.safetensors"
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    rows = (k / "rounds.csv").read_bytes()
    line = refused(capsys, *run)
    assert f"checkpoint {last} cannot be read" in line and "delete" in line
    assert (k / "rounds.csv").read_bytes() == rows and not (k / "result.json").exists()

    last.write_bytes(others)
    assert "holds another network's weights" in refused(capsys, *run)


def test_interrupted_then_continued(tmp_path, folder):
    """Ctrl-C: one line, status 130, the rounds done are kept, the same command goes on."""
    rounds = ["fl.rounds=150", "fl.evaluate_every=150", "fl.measure_rounds=0"]
    extra = [a for value in rounds for a in ("--set", value)]
    command = [sys.executable, "-m", "mas", "run", "all-in-one", "--tasks", "dk", *TINY,
               *extra, "--data", str(folder), "--results", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(path.read_text().count("\n") > 5 for path in tmp_path.glob("*/*/rounds.csv")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert messages(err) == ["mas: interrupted; what was done is kept, the same command continues"]
    assert "Traceback" not in err
    record = next(tmp_path.glob("smoke/*/rounds.csv"))
    kept = record.read_text()
    assert 5 < kept.count("\n") < 151 and not (record.parent / "result.json").exists()
    assert main([*command[3:]]) == 0
    rows = record.read_text()
    assert rows.count("\n") == 151
    done = kept.rsplit("\n", 2)[0]  # the last row may have been ahead of its checkpoint
    assert rows.startswith(done) and (record.parent / "result.json").exists()


def test_render_then_prepare(tmp_path, capsys):
    root = tmp_path / "rooms"
    render = ["render", "--out", str(root), "--buildings", "2", "--views", "4", "--size", "16",
              "--workers", "1"]  # fmt: skip
    assert main(render) == 0
    assert "8 views written, 0 were there" in capsys.readouterr().out
    assert all(len(list((root / domain).rglob("*.png"))) == 8 for domain in DOMAINS)
    assert main(render) == 0
    assert "0 views written, 8 were there" in capsys.readouterr().out
    prepare = ["prepare", "--root", str(root), "--size", "16", "--workers", "1"]
    assert main(prepare) == 0
    before = files(root / "prepared")
    printed = capsys.readouterr().out
    assert printed.startswith("8 views of 2 buildings in") and "2 buildings read anew" in printed
    assert main(prepare) == 0
    assert "0 buildings read anew" in capsys.readouterr().out
    assert files(root / "prepared") == before
    broken = next((root / "rgb").rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:50])
    assert broken.name in refused(capsys, *prepare)
    assert main([*prepare, "--skip-broken"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("7 views of 2 buildings") and "1 files broken or missing" in printed
    for path in (root / "rgb" / "room_01").iterdir():
        path.write_bytes(b"")
    assert main([*prepare, "--skip-broken"]) == 0
    assert capsys.readouterr().out.endswith("left out, without a whole view: room_01\n")
    assert "No module named 'nowhere'" in refused(capsys, *prepare, "--table", "nowhere:TASKS")


def test_demo_from_nothing_and_again(tmp_path):
    """`mas demo` in an empty folder, then once more: the second time it only prints."""
    command = [sys.executable, "-m", "mas", "demo", "--device", "cpu"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    for method in ("one-by-one", "all-in-one", "MAS-2", "constant"):
        assert re.search(rf"^\s*{method}\s+\d+\.\d{{3}}\s", first.stdout, re.M), first.stdout
    groups = re.search(r"MAS split sdnkt into (\w+) and (\w+) by", first.stdout)
    assert sorted(groups[1] + groups[2]) == sorted("sdnkt")
    assert "prove the machinery, not the paper" in first.stdout
    assert (tmp_path / "results" / "smoke" / "demo.png").read_bytes().startswith(b"\x89PNG")
    store = Store(tmp_path / "results", "smoke")
    assert len(store.ids()) == 5 + 1 + 2 and all(store.result(i) for i in store.ids())
    R0 = preset_settings("smoke").mas.merge_rounds
    assert {store.trajectory(i).start_round for i in store.ids() if store.trajectory(i).parent} == {
        R0
    }
    records = {f for f in files(tmp_path) if f[0].suffix in (".csv", ".json", ".safetensors")}
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == first.stdout
    assert {f for f in files(tmp_path) if f[0].suffix in (".csv", ".json", ".safetensors")} == (
        records
    )


def test_a_reader_that_leaves_is_no_error(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "mas", "status", "--results", str(tmp_path)]
    shown = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (shown.returncode, shown.stderr) == (0, "")


@pytest.mark.parametrize("argv", [["--help"], ["status", "--preset", "small"]])
def test_what_only_reads_does_not_wait_for_pytorch(argv):
    code = "import contextlib, sys, mas.__main__ as m\n"
    code += f"with contextlib.suppress(SystemExit): m.main({argv})\nprint('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout.endswith("\nFalse\n"), shown.stderr
    assert shown.stdout.startswith("usage: mas" if argv == ["--help"] else "small: ")
