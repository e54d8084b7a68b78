"""The static site: a page a notebook, links that lead somewhere, nothing from elsewhere."""

import re
import zipfile
from pathlib import Path

import nbformat
import pytest

from mas.paper import site as module
from mas.paper.site import site
from mas_core.config import UserError

ROOT = Path(__file__).parents[1]
FIRST = """# A title

**The question:** does *it* hold? See [the file](common.py).

**Look for:** [the next](two.ipynb)."""


@pytest.fixture
def books(tmp_path, monkeypatch):
    """A folder of two notebooks, of which the first prints verdicts."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    printed = nbformat.v4.new_output("stream", text="a holds\nb holds\nc does not hold\n")
    for name in ("one", "two"):
        outputs = [printed] if name == "one" else []
        cell = nbformat.v4.new_code_cell("1", execution_count=1, outputs=outputs)
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(FIRST), cell])
        nbformat.write(book, folder / f"{name}.ipynb")
    monkeypatch.setattr(module, "notebooks_folder", lambda: folder)
    return folder


def test_pages_figures_and_records(books, tmp_path):
    record = tmp_path / "results" / "small" / "d-s0-0123456789"
    (record / "checkpoints").mkdir(parents=True)
    (record / "result.json").write_text("{}")
    (record / "checkpoints" / "last.json").write_text("{}")
    drawn = tmp_path / "figures" / "small"
    drawn.mkdir(parents=True)
    for kind in ("png", "pdf"):
        (drawn / f"one.{kind}").write_bytes(b"drawn")
    out = tmp_path / "site"
    assert site(out, tmp_path / "results", tmp_path / "figures") == 2
    index = (out / "index.html").read_text()
    assert "does it hold? See the file." in index
    assert "2 &times; holds, 1 &times; does not hold" in index
    assert index.count("figures/one.png") == 1
    page = (out / "one.html").read_text()
    assert 'href="two.html"' in page and 'href="figures/one.pdf"' in page
    linked = set(re.findall(r'(?:href|src)="([^"#:]+)"', index)) - {"common.py"}
    assert linked and all((out / name).is_file() for name in linked)
    with zipfile.ZipFile(out / "records-small.zip") as packed:
        assert packed.namelist() == ["small/d-s0-0123456789/result.json"]
    assert site(out, tmp_path / "results", tmp_path / "figures") == 2  # anew, over itself


def test_what_cannot_be_a_site(books, tmp_path):
    with pytest.raises(UserError, match="holds other files"):
        site(books, tmp_path, tmp_path)
    book = nbformat.read(books / "two.ipynb", as_version=4)
    book.cells[1].execution_count = None
    nbformat.write(book, books / "two.ipynb")
    with pytest.raises(UserError, match="two.ipynb is not executed"):
        site(tmp_path / "site", tmp_path, tmp_path)


def test_committed_notebooks_load_nothing_from_elsewhere(tmp_path):
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic")
    for stem in ("00_tour", "claims", "explore_affinities"):
        html = exporter.from_filename(str(ROOT / "notebooks" / f"{stem}.ipynb"))[0]
        assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=.https?:", html)
