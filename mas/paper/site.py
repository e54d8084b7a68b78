"""The executed notebooks as a static site: `mas site`. Building and reading it take no network."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import zipfile
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from mas_core.config import UserError

from .experiments import NOTEBOOKS
from .reproduce import notebooks_folder
from .verdicts import VERDICTS

STYLE = """
body { max-width: 60rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }
body, td, th { overflow-wrap: break-word; }
pre { overflow-x: auto; font-size: 13px; line-height: 1.35; background: #f6f6f6; padding: .6rem; }
img { max-width: 100%; height: auto; }
img.math { max-width: none; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 14px; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
td { font-variant-numeric: tabular-nums; min-width: 2rem; }
.text_cell_render td, .text_cell_render th { text-align: left; }
thead th { cursor: pointer; }
.jp-InputPrompt, .jp-OutputPrompt, .anchor-link, .prompt { display: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .8rem; }
.card a img { height: 9rem; width: 100%; object-fit: contain; }
"""
SAID = "|".join(map(re.escape, VERDICTS))
SORT = """
document.querySelectorAll("thead th").forEach(th => th.addEventListener("click", () => {
  const table = th.closest("table"), body = table.tBodies[0], at = th.cellIndex;
  if (table.querySelector("[rowspan], thead tr + tr [colspan]")) return;
  const down = th.dataset.down = th.dataset.down === "1" ? "0" : "1";
  const value = row => row.cells[at].innerText.trim();
  const order = (a, b) => a - b || 0;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : order(a, b);
  [...body.rows].sort((a, b) => (down === "1" ? 1 : -1) * compare(value(a), value(b)))
    .forEach(row => body.append(row));
}));
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style></head><body>
{body}
<script>{script}</script></body></html>
"""


def site(out: Path, results: Path, figures: Path, preset: str = "small") -> int:
    """Write index.html, a page a notebook, the figures, the records and what is linked.

    Figures of the preset go to figures/ (PDFs where they were drawn here), the records of every
    folder that a notebook links to into a zip of its name, and linked files into files/; formulas
    are drawn as SVG. Returns the number of pages. Raises UserError where `out` is a folder that
    holds anything but a site, or a notebook has not been executed, or the preset has no records.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    if out.is_dir() and any(out.iterdir()) and not (out / "index.html").is_file():
        raise UserError(f"{out} holds other files than a site; name an empty folder")
    if not any((results / preset).glob("*/*.json")):
        raise UserError(f"no records of preset {preset} in {results}; train them, or name another")
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for packed in out.glob("records-*.zip"):  # of an earlier site here
        packed.unlink()
    copied = [Path(shutil.copy(file, out / "figures"))
              for file in sorted((figures / preset).glob("*.p[nd][gf]"))]  # fmt: skip
    _pack(results / preset, out / f"records-{preset}.zip")
    exporter = HTMLExporter(template_name="basic")
    style, cards = STYLE + HtmlFormatter().get_style_defs(".highlight"), []
    order = {stem: i for i, stem in enumerate(NOTEBOOKS)}
    paths = sorted(notebooks_folder().glob("*.ipynb"), key=lambda p: (order.get(p.stem, 99), p))
    for path in paths:
        book = nbformat.read(path, as_version=4)
        code = [c for c in book.cells if c.cell_type == "code" and c.source.strip()]
        if not all(cell.execution_count for cell in code):
            raise UserError(f"{path} is not executed; run: mas reproduce {path.stem}")
        drawn = [f for f in copied if f.match(f"{path.stem}*.png")]
        cards.append(_card(path.stem, book, drawn))
        body = exporter.from_notebook_node(_static(book))[0]
        body = _localised(body, path.parent, out)
        links = " ".join(f'<a href="figures/{f.stem}.{kind}">{f.stem}.{kind}</a>'
                         for f in drawn for kind in ("png", "pdf")
                         if f.with_suffix(f".{kind}") in copied)  # fmt: skip
        head = '<p><a href="index.html">All notebooks</a></p>'
        text = PAGE.format(title=path.stem, style=style, script=SORT,
                           body=f"{head}\n{body}\n<p>{links}</p>")  # fmt: skip
        (out / f"{path.stem}.html").write_text(text, encoding="utf-8")
    body = (
        "<h1>mas</h1><p>Several federated tasks: merge, measure, split, continue. Numbers come "
        "from procedural rooms unless a notebook says otherwise. Pages are the notebooks as they "
        f"were executed; figures and records to download are of preset {preset}: "
        f'<a href="records-{preset}.zip">JSON and CSV</a>.</p>'
        f'<div class="cards" id="figure-index">{"".join(cards)}</div>'
        + _reading(notebooks_folder().parent, out)
    )
    index = PAGE.format(title="mas", style=STYLE, body=body, script="")
    (out / "index.html").write_text(index, encoding="utf-8")
    return len(paths)


def _card(stem: str, book: Any, drawn: list[Path]) -> str:
    """A notebook on the index: thumbnail, title, question, the verdicts of its largest table."""
    title, *rest = book.cells[0].source.split("\n\n")
    markup = r"\*\*[^*]+:\*\*\s*|\[([^]]+)\]\([^)]+\)|[*`]"
    title, question = (escape(re.sub(markup, r"\1", " ".join(text.split())))
                       for text in (title.lstrip("# "), rest[0] if rest else ""))  # fmt: skip
    most = max(map(_verdicts, book.cells), key=Counter.total, default=Counter()).most_common()
    verdicts = ", ".join(f"{n} &times; {escape(verdict)}" for verdict, n in most)
    image = f'<img src="figures/{drawn[0].name}" alt="">' if drawn else ""
    return (
        f'<div class="card"><a href="{stem}.html">{image}<h3>{title}</h3></a>'
        f"<p>{_formulas(question[:1].upper() + question[1:])}</p><p><i>{verdicts}</i></p></div>\n"
    )


def _verdicts(cell: Any) -> Counter[str]:
    """How often each verdict occurs in a cell's output; of a table, in its column "verdict"."""
    found: Counter[str] = Counter()
    for output in cell.get("outputs", ()):
        text = output.get("text", "") or output.get("data", {}).get("text/html", "")
        column = re.search(r'class="col_heading level0 (col\d+)"[^>]*>verdict<', text)
        if column:
            text = "\n".join(re.findall(rf'class="data row\d+ {column[1]}"[^>]*>([^<]*)', text))
        # As notebooks print claims: by verdict, a line each.
        listed = re.findall(rf"^({SAID}):\n((?:  .*\n?)+)", text, flags=re.M)
        found += Counter({verdict: rows.count("\n  ") + 1 for verdict, rows in listed}
                         if listed else re.findall(SAID, text))  # fmt: skip
    return found


def _static(book: Any) -> Any:
    """A notebook without controls, which need a kernel, and with its formulas as pictures."""
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = _formulas(cell.source)
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return book


def _formulas(text: str) -> str:
    """Markdown or HTML with every $formula$ drawn as an inline SVG: no MathJax, no network."""
    return re.sub(r"\$([^$\n]+)\$", _formula, text)


def _formula(found: re.Match[str]) -> str:
    from matplotlib import rc_context
    from matplotlib.mathtext import math_to_image

    drawn = io.BytesIO()
    with rc_context({"svg.hashsalt": "mas"}):
        depth = math_to_image(found[0], drawn, format="svg", dpi=72)
    data = base64.b64encode(drawn.getvalue()).decode()
    return (f'<img class="math" alt="{escape(found[1])}" style="vertical-align:-{depth:.1f}pt" '
            f'src="data:image/svg+xml;base64,{data}">')  # fmt: skip


def _reading(root: Path, out: Path) -> str:
    """What the README says on how to read a notebook, which every page links to."""
    from nbconvert.filters import markdown2html

    heading, readme = "## How to read a notebook\n", root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    section = text.partition(heading)[2].partition("\n## ")[0]
    html = re.sub(r'id="[^"]+"', lambda found: found[0].lower(), markdown2html(heading + section))
    return _localised(html, root, out) if section else ""


def _localised(html: str, folder: Path, out: Path) -> str:
    """Links of a page in `folder` as links in the site: pages, zips of records, copied files."""

    def local(found: re.Match[str]) -> str:
        target, anchor = Path(os.path.normpath(folder / found[1])), found[2] or ""
        if target.suffix == ".ipynb":
            return f'href="{target.stem}.html{anchor}"'
        if target.name == "README.md" and target.parent == Path(os.path.normpath(folder.parent)):
            return f'href="index.html{anchor}"'
        if target.is_dir():
            packed = out / f"records-{target.name}.zip"
            if not packed.exists():
                _pack(target, packed)
            return f'href="{packed.name}"'
        if target.is_file():
            (out / "files").mkdir(exist_ok=True)
            name = "-".join(target.parts[-2:])
            shutil.copy(target, out / "files" / name)
            return f'href="files/{name}"'
        return found[0]

    return re.sub(r'href="([^"#:]+)(#[^"]*)?"', local, html)


def _pack(folder: Path, file: Path) -> None:
    """The records of a folder as a zip; not checkpoints, nor notebooks run there."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".json", ".csv", ".md") and "checkpoints" not in path.parts:
                packed.write(path, path.relative_to(folder.parent))
