"""The executed notebooks as a static site: `mas site`. Building and reading it take no network."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from mas_core.config import UserError

from .reproduce import notebooks_folder
from .verdicts import VERDICTS

STYLE = """
body { max-width: 60rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }
pre { overflow-x: auto; font-size: 13px; line-height: 1.35; background: #f6f6f6; padding: .6rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 14px; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; }
.jp-InputPrompt, .jp-OutputPrompt, .anchor-link, .prompt { display: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .8rem; }
.card img { height: 9rem; width: 100%; object-fit: contain; }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style></head><body>
{body}
</body></html>
"""


def site(out: Path, results: Path, figures: Path, preset: str = "small") -> int:
    """Write index.html, a page a notebook, the figures (PNG, PDF) and the records as a zip.

    Returns the number of pages. Raises UserError where `out` is a folder that holds anything but
    a site, or a notebook has not been executed.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    if out.is_dir() and any(out.iterdir()) and not (out / "index.html").is_file():
        raise UserError(f"{out} holds other files than a site; name an empty folder")
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for file in sorted((figures / preset).glob("*.p[nd][gf]")):
        shutil.copy(file, out / "figures")
    exporter = HTMLExporter(template_name="basic")
    style, cards = STYLE + HtmlFormatter().get_style_defs(".highlight"), []
    paths = sorted(notebooks_folder().glob("*.ipynb"))
    for path in paths:
        book = nbformat.read(path, as_version=4)
        if not all(c.execution_count for c in book.cells if c.cell_type == "code"):
            raise UserError(f"{path} is not executed; run: mas reproduce {path.stem}")
        body = exporter.from_notebook_node(book)[0]
        body = re.sub(r'href="(\w+)\.ipynb"', r'href="\1.html"', body)
        drawn = [f for f in sorted((out / "figures").glob(f"{path.stem}*.png"))]
        links = " ".join(f'<a href="figures/{f.stem}.{kind}">{f.stem}.{kind}</a>'
                         for f in drawn for kind in ("png", "pdf"))  # fmt: skip
        head = '<p><a href="index.html">All notebooks</a></p>'
        text = PAGE.format(title=path.stem, style=style, body=f"{head}\n{body}\n<p>{links}</p>")
        (out / f"{path.stem}.html").write_text(text, encoding="utf-8")
        cards.append(_card(path.stem, book, drawn))
    _pack(results, preset, out / f"records-{preset}.zip")
    body = (
        "<h1>mas</h1><p>Several federated tasks: merge, measure, split, continue. Numbers come "
        f"from procedural rooms unless a notebook says otherwise, at preset {preset}. "
        f'<a href="records-{preset}.zip">The records</a> (JSON and CSV).</p>'
        f'<div class="cards">{"".join(cards)}</div>'
    )
    index = PAGE.format(title="mas", style=STYLE, body=body)
    (out / "index.html").write_text(index, encoding="utf-8")
    return len(paths)


def _card(stem: str, book: Any, drawn: list[Path]) -> str:
    """A notebook on the index: thumbnail, title, question, the verdicts of its largest table."""
    title, *rest = book.cells[0].source.split("\n\n")
    markup = r"\*\*[^*]+:\*\*\s*|\[([^]]+)\]\([^)]+\)|[*$`]"
    question = re.sub(markup, r"\1", rest[0] if rest else "")
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    said = [Counter(re.findall("|".join(map(re.escape, VERDICTS)),
                               o.get("text", "") or o.get("data", {}).get("text/html", "")))
            for o in outputs]  # fmt: skip
    most = max(said, key=Counter.total, default=Counter()).most_common()
    verdicts = ", ".join(f"{n} &times; {escape(verdict)}" for verdict, n in most)
    image = f'<img src="figures/{drawn[0].name}" alt="">' if drawn else ""
    return (
        f'<div class="card"><a href="{stem}.html">{image}<h3>{escape(title.lstrip("# "))}</h3></a>'
        f"<p>{escape(' '.join(question.split()))}</p><p><i>{verdicts}</i></p></div>\n"
    )


def _pack(results: Path, preset: str, file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted((results / preset).rglob("*")):
            if path.suffix in (".json", ".csv") and "checkpoints" not in path.parts:
                packed.write(path, path.relative_to(results))
