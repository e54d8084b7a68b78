"""The notebooks are committed executed, keep their form, and print what they printed before."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from mas.paper.experiments import NOTEBOOKS

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BOOKS = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
PARAMETERS = {"preset", "seeds", "results", "figures", "data", "train_missing"}


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def is_checked(cell):
    """Whether nbval compares a cell's output with the stored one."""
    return "nbval-check-output" in cell.metadata.get("tags", ()) or (
        "# NBVAL_CHECK_OUTPUT" in cell.source
    )


def test_there_is_a_notebook_for_everything_reproduced():
    assert {path.stem for path in PATHS} == set(NOTEBOOKS)


@BOOKS
def test_a_notebook_is_committed_executed(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]


@BOOKS
def test_a_notebook_keeps_its_form(path):
    book = nbformat.read(path, as_version=4)
    assert book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith("# ")
    tagged = [c for c in book.cells if "parameters" in c.metadata.get("tags", ())]
    assert len(tagged) == 1
    lines = tagged[0].source.splitlines()
    assert len(lines) <= 10 and all("#" in line for line in lines)
    named = {line.split("=")[0].strip() for line in lines}
    assert named >= PARAMETERS
    source = "\n".join(cell.source for cell in code_cells(book))
    assert not re.findall(r"sys\.path|optim\.|optimizer|\.backward\(|import \*", source)
    ast.parse(re.sub(r"^%.*$", "", source, flags=re.M))
    assert any(is_checked(cell) for cell in code_cells(book))
    assert not [cell for cell in book.cells if re.fullmatch("[A-Z]*", cell.source)]  # to be written
    text = path.read_text()
    assert not re.findall(r"(?<![\w./:])/(?:home|root|tmp|work|Users|mnt|usr|opt)/[\w.]", text)


@pytest.fixture
def copies(tmp_path):
    """The notebooks in a folder of their own, beside the records; figures are drawn there, too."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "results").symlink_to(ROOT / "results")
    return tmp_path / "notebooks"


def nbval(folder, *names):
    """pytest with nbval on notebooks, two at a time."""
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env",
               "--nbval-cell-timeout=300", "-n", "2", "--dist", "loadfile", "-q",
               "-p", "no:cacheprovider", *(names or ["."])]  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)


def test_notebooks_print_what_they_printed(copies):
    run = nbval(copies)
    assert run.returncode == 0, run.stdout[-5000:]
    cells = sum(len(code_cells(nbformat.read(path, as_version=4))) for path in PATHS)
    assert f"{cells} passed" in run.stdout


def test_a_wrong_stored_number_fails(copies):
    path = copies / "figure_07_affinities.ipynb"
    book = nbformat.read(path, as_version=4)
    printed = [
        out
        for cell in code_cells(book)
        if is_checked(cell)
        for out in cell.outputs
        if out.output_type == "stream" and re.search(r"\d\.\d", out.text)
    ][0]
    printed.text = re.sub(
        r"(\d\.)(\d)", lambda found: found[1] + str((int(found[2]) + 1) % 10), printed.text, count=1
    )
    nbformat.write(book, path)
    run = nbval(copies, path.name)
    assert run.returncode == 1 and "1 failed" in run.stdout


def test_reproduce_from_nothing(tmp_path):
    """Two notebooks at the smoke preset in an empty folder: rendered, trained, executed, drawn."""
    stems = ["figure_07_affinities", "supplement_figure_3_validation"]
    run = subprocess.run(
        [sys.executable, "-m", "mas", "reproduce", *stems, "--preset", "smoke",
         "--workers", "2", "--device", "cpu"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    for stem in stems:
        row = re.search(rf"{stem} +ok +\d+ +(\d+) *\n", run.stdout + "\n")
        drawn = list((tmp_path / "figures" / "smoke").glob(f"{stem}*"))
        assert row and int(row[1]) == len(drawn) >= 2
        assert {figure.suffix for figure in drawn} == {".png", ".pdf"}
        executed = tmp_path / "results" / "smoke" / "notebooks" / f"{stem}.ipynb"
        cells = code_cells(nbformat.read(executed, as_version=4))
        assert all(cell.execution_count for cell in cells)
