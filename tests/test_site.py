"""The static site: a page a notebook, links that lead somewhere, nothing from elsewhere."""

import re
import shutil
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

**Look for:** [the next](two.ipynb), $S_{i\\to j}$, [records](../results/small),
[numbers](../results/a.csv), [all](../README.md#figure-index)."""
TABLE = """<th id="T_level0_col1" class="col_heading level0 col1" >verdict</th>
<td class="data row0 col1" >holds</td><td class="data row0 col2" >does not hold</td>"""


@pytest.fixture
def books(tmp_path, monkeypatch):
    """A folder of two notebooks, of which the first prints verdicts."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    said = "holds:\n  a: 1\n  b: 2\ndoes not hold:\n  c: 3\n"
    printed = nbformat.v4.new_output("stream", text=said)
    (folder / "common.py").write_text("shared = 1")
    readme = "# mas\n\n## How to read a notebook\n\nSlowly.\n\n## Rest\n"
    (tmp_path / "README.md").write_text(readme)
    for name in ("one", "two"):
        outputs = [printed] if name == "one" else []
        cell = nbformat.v4.new_code_cell("1", execution_count=1, outputs=outputs)
        cells = [nbformat.v4.new_markdown_cell(FIRST), cell, nbformat.v4.new_code_cell("")]
        book = nbformat.v4.new_notebook(cells=cells)
        nbformat.write(book, folder / f"{name}.ipynb")
    monkeypatch.setattr(module, "notebooks_folder", lambda: folder)
    return folder


def test_pages_figures_and_records(books, tmp_path):
    record = tmp_path / "results" / "small" / "d-s0-0123456789"
    (record / "checkpoints").mkdir(parents=True)
    (record / "result.json").write_text("{}")
    (tmp_path / "results" / "a.csv").write_text("1")
    (record / "checkpoints" / "last.json").write_text("{}")
    drawn = tmp_path / "figures" / "small"
    drawn.mkdir(parents=True)
    for kind in ("png", "pdf"):
        (drawn / f"one.{kind}").write_bytes(b"drawn")
    out = tmp_path / "site"
    assert site(out, tmp_path / "results", tmp_path / "figures") == 2
    index = (out / "index.html").read_text()
    assert "Does it hold? See the file." in index and "Slowly." in index and "Rest" not in index
    assert "2 &times; holds, 1 &times; does not hold" in index
    assert index.count("figures/one.png") == 1 and 'id="how-to-read-a-notebook"' in index
    page = (out / "one.html").read_text()
    assert 'href="two.html"' in page and 'href="figures/one.pdf"' in page
    assert 'href="index.html#figure-index"' in page and 'href="records-small.zip"' in page
    assert page.count("data:image/svg+xml;base64,") == 1 and "$S_" not in page
    for text in (index, page):
        linked = set(re.findall(r'(?:href|src)="([^"#:]+)', text)) - {"data"}
        assert linked and all((out / name).is_file() for name in linked)
    assert (out / "files" / "notebooks-common.py").read_text() == "shared = 1"
    with zipfile.ZipFile(out / "records-small.zip") as packed:
        assert packed.namelist() == ["small/d-s0-0123456789/result.json"]
    (record / "result.json").write_text("[]")
    (drawn / "one.pdf").unlink()  # as in a clone
    shutil.rmtree(out)
    assert site(out, tmp_path / "results", tmp_path / "figures") == 2
    assert "one.png" in (page := (out / "one.html").read_text()) and "one.pdf" not in page
    shutil.rmtree(drawn)
    assert site(out, tmp_path / "results", tmp_path / "figures") == 2  # anew, over itself
    with zipfile.ZipFile(out / "records-small.zip") as packed:
        assert packed.read("small/d-s0-0123456789/result.json") == b"[]"
    assert "figures/one.png" not in (out / "index.html").read_text()


def test_what_cannot_be_a_site(books, tmp_path):
    with pytest.raises(UserError, match="holds other files"):
        site(books, tmp_path, tmp_path)
    with pytest.raises(UserError, match="no records of preset small in"):
        site(tmp_path / "site", tmp_path, tmp_path)
    record = tmp_path / "small" / "d-s0-0123456789"
    record.mkdir(parents=True)
    (record / "config.json").write_text("{}")
    book = nbformat.read(books / "two.ipynb", as_version=4)
    book.cells[1].execution_count = None
    nbformat.write(book, books / "two.ipynb")
    with pytest.raises(UserError, match="two.ipynb is not executed"):
        site(tmp_path / "site", tmp_path, tmp_path)


def test_verdicts_are_counted_where_they_are_told():
    def counted(**output):
        return dict(module._verdicts({"outputs": [output]}))

    assert counted(text="a holds\nb holds\nc does not hold\n") == {"holds": 2, "does not hold": 1}
    by_verdict = "2 holds, 1 one seed\nholds:\n  a: 1\n  b: 2\none seed:\n  c: 3\n"
    assert counted(text=by_verdict) == {"holds": 2, "one seed": 1}
    assert counted(data={"text/html": TABLE}) == {"holds": 1}  # the column "verdict" alone


def test_no_page_loads_anything_from_elsewhere(tmp_path):
    out = tmp_path / "site"
    site(out, ROOT / "results", ROOT / "figures")
    for page in sorted(out.glob("*.html")):
        html = page.read_text()
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=.(?:https?:)?//", html)
        assert not re.findall(r"(?i)mathjax|@import|url\(|widget-view", html), page.stem
        for name in set(re.findall(r'(?:href|src)="([^"#:]+)', html)) - {"data"}:
            assert (out / name).is_file(), f"{page.stem} links to {name}"
