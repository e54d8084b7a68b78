"""Notebooks that fail, die or hang are told from those that ran."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from matplotlib.figure import Figure
from test_methods import make_record

from mas.__main__ import main
from mas.paper import experiments, reproduce
from mas_core.config import UserError
from mas_core.config import settings as preset_settings
from mas_core.methods import Need
from mas_core.records.store import Store
from mas_core.records.trajectory import Trajectory

ROOT = Path(__file__).resolve().parents[1]
SMOKE = preset_settings("smoke")


def test_notebooks_are_named_by_stem_file_or_path():
    names = ["figure_05_sdnkt", "notebooks/claims.ipynb", "claims"]
    assert experiments.chosen(names) == ["figure_05_sdnkt", "claims"]
    assert experiments.chosen([]) == list(experiments.NOTEBOOKS)
    with pytest.raises(UserError, match="unknown notebook 'figure_5'; allowed: .*table_1_opt"):
        experiments.chosen(["figure_5"])


def test_every_committed_notebook_stands_in_the_table():
    there = {path.stem for path in Path(__file__).parent.parent.glob("notebooks/*.ipynb")}
    assert there <= set(experiments.NOTEBOOKS)


def notebook(*cells):
    """A notebook of code cells, the first its parameters."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    book.cells[0].metadata["tags"] = ["parameters"]
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "3", "language": "python"}
    return book


PARAMETERS = 'preset = "small"  # records\nseeds = [0]\nfigures = "f"\nlr = 0.1\ndata = None'


def test_parameters_are_checked_before_anything_runs(tmp_path):
    path = tmp_path / "one.ipynb"
    nbformat.write(notebook(PARAMETERS), path)
    standard = {"preset": "smoke", "seeds": [1], "train_missing": False}
    given = {"lr": 1, "data": "here"}
    allowed = {"preset": "smoke", "seeds": [1], "lr": 1, "data": "here"}
    assert reproduce.checked(path, standard, given) == allowed
    with pytest.raises(UserError, match="one has no parameter split; allowed: preset, seeds, fig"):
        reproduce.checked(path, standard, {"split": 2})
    for wrong in ({"seeds": 0}, {"preset": 1}, {"lr": "fast"}, {"lr": True}):
        with pytest.raises(UserError, match=f"parameter {next(iter(wrong))}=.*; allowed: "):
            reproduce.checked(path, standard, wrong)


def test_only_a_notebook_that_ran_to_its_end_is_ok(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cells = {
        "good": "import os; from pathlib import Path\n"
        "Path(f'{figures}/good.png').write_text(f'{seeds} {os.environ[\"OMP_NUM_THREADS\"]}')",
        "wrong": "1 / 0",
        "dead": "import os; os._exit(0)",
        "endless": "import time; time.sleep(1000)",
    }
    folder, figures = tmp_path / "notebooks", tmp_path / "figures"
    folder.mkdir(), figures.mkdir()
    for stem, cell in cells.items():
        nbformat.write(notebook(PARAMETERS, "preset", cell), folder / f"{stem}.ipynb")
    values = {"seeds": [3, 4], "figures": "../figures"}
    rows = []
    for stems, timeout in ((("good", "wrong", "dead"), 120), (("endless",), 6)):
        given = dict.fromkeys(stems, values)
        rows += reproduce.run_notebooks(folder, given, tmp_path / "out", figures, 3, timeout)
    status = {row["notebook"]: row["status"] for row in rows}
    assert list(status) == list(cells)
    assert status["good"] == "ok" and status["endless"] == "timeout"
    assert status["wrong"] == "failed: ZeroDivisionError: division by zero"
    assert status["dead"].startswith("failed: ") and "kernel die" in status["dead"]
    assert [row["figures"] for row in rows] == [1, 0, 0, 0]
    threads = max(1, (os.cpu_count() or 1) // 3)  # three kernels share the cores
    assert (figures / "good.png").read_text() == f"[3, 4] {threads}"
    assert str(tmp_path) not in (tmp_path / "out" / "good.ipynb").read_text()


def marked(marker):
    """Processes that have not ended with a marker in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ended = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not ended and marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are listed by /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_kernel_outlives_the_command(tmp_path, how):
    (tmp_path / "notebooks").mkdir()
    cell = "from pathlib import Path; Path('begun').touch(); import time; time.sleep(1000)"
    nbformat.write(notebook(PARAMETERS, cell), tmp_path / "notebooks" / "figure_04_data.ipynb")
    marker = f"MAS_TEST={tmp_path}"
    command = [sys.executable, "-m", "mas", "reproduce", "figure_04_data", "--no-train"]
    environment = os.environ | {"MAS_TEST": str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "notebooks" / "begun").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        assert len(marked(marker)) == 3  # the command, papermill, the kernel
        process.send_signal(how)
        end = time.monotonic() + 60
        while marked(marker):
            assert time.monotonic() < end, f"left: {marked(marker)}"
            time.sleep(0.1)
        assert process.wait() == (130 if how == signal.SIGTERM else -signal.SIGKILL)
    finally:
        for left in marked(marker):
            os.kill(left, signal.SIGKILL)
        process.communicate()


def test_an_error_without_a_message_is_told_by_its_name(tmp_path):
    book = notebook("assert False")
    book.cells[0].outputs = [nbformat.v4.new_output("error", ename="AssertionError", evalue="")]
    nbformat.write(book, tmp_path / "bare.ipynb")
    assert reproduce.outcome(tmp_path / "bare.ipynb", 1) == "failed: AssertionError"


def test_parameters_are_literals_or_text_and_never_run():
    given = ["a=[0, 1]", "b=None", "c={[]: 1}", "d=print(1)", "e=two words"]
    values = {"a": [0, 1], "b": None, "c": "{[]: 1}", "d": "print(1)", "e": "two words"}
    assert reproduce._given(given) == values


@pytest.fixture
def one_alone(monkeypatch):
    """An experiment of one recipe that needs the record of `one_alone`'s trajectory."""
    fl = replace(SMOKE.fl, measure_rounds=0)
    trajectory = Trajectory("d", 0, SMOKE.data, SMOKE.model, fl)

    def experiment(store, seed, overrides):
        def needs(of_seed):
            yield [Need(replace(trajectory, seed=of_seed), fl.rounds)]

        return {("there", "d", seed): needs(seed), ("absent", "d", seed): needs(seed + 7)}

    monkeypatch.setitem(experiments.NOTEBOOKS, "figure_05_sdnkt", (experiment,))
    return trajectory


def test_a_notebook_without_records_leaves_its_figures_alone(
    tmp_path, one_alone, monkeypatch, capsys
):
    ran = []

    def run_notebooks(folder, parameters, *rest):
        ran.extend(parameters)
        return [dict(notebook=stem, status="ok", seconds=1, figures=2) for stem in parameters]

    monkeypatch.setattr(reproduce, "run_notebooks", run_notebooks)
    command = ["reproduce", "figure_05_sdnkt", "figure_04_data", "--no-train", "--seeds", "0",
               "--preset", "smoke", "--results", str(tmp_path)]  # fmt: skip
    assert main(command) == 1
    assert ran == ["figure_04_data"]  # which needs no records
    table = capsys.readouterr().out
    assert re.search(r"figure_05_sdnkt +no records +0 +0 +all", table)
    make_record(Store(tmp_path, "smoke"), Need(one_alone, SMOKE.fl.rounds))
    assert main(command) == 0
    assert ran[1:] == ["figure_05_sdnkt", "figure_04_data"]
    assert re.search(r"figure_05_sdnkt +ok +1 +2 +absent \(d, seed 0\)", capsys.readouterr().out)


def test_an_empty_figure_is_not_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "notebooks")
    import common

    good = tmp_path / "small" / "figure.png"
    good.parent.mkdir()
    good.write_text("drawn before")
    figure = Figure()
    axes = figure.subplots(1, 2)
    common.save(figure, "figure", "small", tmp_path)
    assert good.read_text() == "drawn before" and list(good.parent.iterdir()) == [good]
    assert capsys.readouterr().out == "nothing to draw: figure is left as it is\n"
    axes[1].plot([1, 2])
    common.save(figure, "figure", "small", tmp_path)
    assert good.read_bytes().startswith(b"\x89PNG")


def test_no_train_draws_what_is_on_record(tmp_path, monkeypatch, capsys):
    trained, given = [], []

    def run_notebooks(folder, parameters, *rest):
        given.append(parameters["figure_05_sdnkt"].get("seeds"))
        return [dict(notebook="figure_05_sdnkt", status="ok")]

    monkeypatch.setattr(reproduce, "not_on_record", lambda *a: "")

    monkeypatch.setattr(reproduce, "train_recipes", lambda *a: trained.append(a))
    monkeypatch.setattr(reproduce, "run_notebooks", run_notebooks)
    command = ["reproduce", "figure_05_sdnkt", "--results", str(tmp_path)]
    assert main([*command, "--no-train"]) == 0 and not trained
    assert main([*command, "--no-train", "--seeds", "1"]) == 0 and not trained
    assert main(command) == 0 and len(trained) == 1
    assert given == [None, [1], [0]]  # None: those that the notebook names
    assert "ok" in capsys.readouterr().out
