"""The links of every notebook: previous, next, the index, and the records that it reads.

`python notebooks/links.py [NOTEBOOK ...]` writes them as the cell behind the title;
tests/test_links.py fails where one is stale. The order is that of `experiments.NOTEBOOKS`; what a
notebook reads is told by its own code.
"""

import re
import sys
from pathlib import Path

import nbformat

from mas import experiments

FOLDER = Path(__file__).resolve().parent
INDEX = "[all notebooks](../README.md#figure-index)"
READING = "[how to read one](../README.md#how-to-read-a-notebook)"
RUNS = ("small", "medium", "digits")  # folders of records that are committed


def line(stem, code):
    """The links of a notebook, as Markdown; code: the text of all its code cells."""
    order = list(experiments.NOTEBOOKS)
    at = order.index(stem)
    ways = {"Previous": order[:at][-1:], "Next": order[at + 1 :][:1]}
    found = [f"{way}: [{other}]({other}.ipynb)" for way, (*others,) in ways.items() for other in others]
    read = ", ".join(f"[{name}]({path})" for name, path in records(stem, code).items())
    return f"{' | '.join([*found, INDEX, READING])}\n\nRecords: {read or 'none are read'}"


def records(stem, code):
    """What a notebook reads of results/: name -> link."""
    preset, rest = code.split("\n", 1)  # the first parameter
    named = set(re.findall(r'"(\w+)"', rest + preset * bool(experiments.NOTEBOOKS[stem])))
    named |= {"medium"} if "common.nearer" in code else set()
    found = {f"results/{name}": f"../results/{name}" for name in RUNS if name in named}
    if re.search(r"common\.(timed|times_faster)\(", code):
        found["results/benchmarks"] = "../results/benchmarks"
    if re.search(r'common\.paper\((?!")', code):  # a name put together
        found["results/paper"] = "../results/paper"
    for folder, call in (("paper", r'(?:common\.paper\("|results/paper/)(\w+)'),
                         ("published", r'common\.published\("(\w+)')):
        for name in sorted(set(re.findall(call, code))):
            found[f"{folder}/{name}"] = f"../results/{folder}/{name}.csv"
    return found


def written(path):
    """The notebook with its links; equal to what is there where they are up to date."""
    book = nbformat.read(path, as_version=4)
    code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    cell = book.cells[1]
    if cell.cell_type != "markdown" or "links" not in cell.metadata.get("tags", ()):
        cell = nbformat.v4.new_markdown_cell(metadata={"tags": ["links"]})
        cell["id"] = "links"
        if (book.nbformat, book.nbformat_minor) < (4, 5):
            del cell["id"]
        book.cells.insert(1, cell)
    cell.source = line(path.stem, code)
    return book


if __name__ == "__main__":
    for stem in experiments.chosen(sys.argv[1:]):
        nbformat.write(written(FOLDER / f"{stem}.ipynb"), FOLDER / f"{stem}.ipynb")
