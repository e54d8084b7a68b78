"""Every notebook links to its neighbours, the index and the records that it reads."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

from mas.paper.experiments import NOTEBOOKS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
import links  # noqa: E402


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_links_are_up_to_date_and_lead_somewhere(stem):
    path = ROOT / "notebooks" / f"{stem}.ipynb"
    text = links.written(path).cells[1].source
    committed = nbformat.read(path, as_version=4).cells[1].source
    assert committed == text, f"run: python notebooks/links.py {stem}"
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (path.parent / target).exists(), target


def test_headings_that_are_linked_to_exist():
    readme = (ROOT / "README.md").read_text()
    assert "\n## Figure index\n" in readme and "\n## How to read a notebook\n" in readme


def test_what_a_notebook_reads_is_told_by_its_code():
    code = 'preset = "small"\nx = common.paper("table_1")\npresets = [preset, "medium"]'
    read = links.line("figure_05_sdnkt", code)
    assert "Previous: [figure_04_data](figure_04_data.ipynb) | Next: [figure_06" in read
    assert read.endswith("Records: [results/small](../results/small), "
                         "[results/medium](../results/medium), "
                         "[paper/table_1](../results/paper/table_1.csv)")  # fmt: skip
    assert "Previous" not in links.line("00_tour", code)
    assert links.line("claims", 'preset = "x"\n').endswith("Records: none are read")
    assert "results/" not in links.line("figure_04_data", 'preset = "small"\n')
