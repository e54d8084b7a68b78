"""Train what notebooks ask for, then run them by papermill."""

from __future__ import annotations

import ast
import base64
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mas_core.config import UserError, settings
from mas_core.data.rooms.folder import rooms_folder
from mas_core.records.store import Store, open_store

from ..frames import seeds_on_record
from ..run.engine import EngineError, collect
from ..run.workers import Compute, train_recipes
from .experiments import NOTEBOOKS, Recipes, chosen, recipes_of

CORES = os.cpu_count() or 1
KINDS = {"seeds": list, "overrides": dict}  # of parameters whose default is None


def reproduce(arguments: Namespace, overrides: dict[str, Any], compute: Compute) -> int:
    """Train what the named notebooks miss, run them, print a table; 1 where anything failed."""
    stems, preset = chosen(arguments.notebooks), arguments.preset
    seeds = arguments.seeds or [0]
    base = settings(preset, overrides=overrides)
    folder = notebooks_folder()
    absent = [stem for stem in stems if not (folder / f"{stem}.ipynb").exists()]
    if absent:
        raise UserError(f"no notebook {', '.join(absent)} in {folder}")
    data = arguments.data or (rooms_folder(base.data) if base.data.source == "rooms" else None)
    standard = {
        "preset": preset, "train_missing": False,
        "results": os.path.relpath(arguments.results, folder),
        "figures": os.path.relpath(arguments.figures, folder),
        "data": os.path.relpath(data, folder) if data else None,
    }  # fmt: skip
    if arguments.seeds or not arguments.no_train:
        standard["seeds"] = seeds
    given = _given(arguments.parameter) | ({"overrides": overrides} if overrides else {})
    own = {name: value for name, value in standard.items() if name != "train_missing"}
    parameters = {s: checked(folder / f"{s}.ipynb", standard if NOTEBOOKS[s] or arguments.no_train
                             else own, given) for s in stems}  # fmt: skip
    store, failed = open_store(preset, arguments.results), False

    def recipes() -> Recipes:  # what several notebooks share, once
        return {k[1:]: r for k, r in recipes_of(stems, store, seeds, overrides).items()}

    if not arguments.no_train and collect(recipes(), store)[1]:
        try:
            train_recipes(recipes(), store, base, arguments.data, compute)
        except EngineError as error:
            print(f"mas: {error}", file=sys.stderr)
            failed = True
    slots, missing = min(arguments.workers or 1000, CORES), {}
    for stem in stems:
        own = _literal(_inspected(folder / f"{stem}.ipynb").get("seeds", "None"), None)
        own = parameters[stem].get("seeds") or own or seeds_on_record(preset, store.results) or [0]
        missing[stem] = not_on_record(recipes_of([stem], store, own, overrides), store)
    drawn = {s: p for s, p in parameters.items() if missing[s] != "all"}
    rows = run_notebooks(folder, drawn, store.root / "notebooks",
                         arguments.figures / preset, slots, arguments.timeout)  # fmt: skip
    rows = [row | {"not on record": missing[row["notebook"]]} for row in rows]
    rows += [{"notebook": stem, "status": "no records", "seconds": 0, "figures": 0,
              "not on record": "all"} for stem in stems if stem not in drawn]  # fmt: skip
    print(pd.DataFrame(rows).to_string(index=False))
    return int(failed or any(row["status"] != "ok" for row in rows))


def not_on_record(recipes: Recipes, store: Store) -> str:
    """What a notebook will lack, in words: "" for nothing, "all" where it has nothing to draw."""
    found = collect(recipes, store)[0]
    lacking = [key[2:] for key in recipes if key not in found]
    if len(lacking) == len(recipes):
        return "all" if recipes else ""
    names = ", ".join(f"{method} ({tasks}, seed {seed})" for method, tasks, seed in lacking[:3])
    return names + f" and {len(lacking) - 3} more" * (len(lacking) > 3)


def notebooks_folder() -> Path:
    """notebooks/ here, or beside the package; a UserError where the package came without."""
    places = [Path("notebooks"), Path(__file__).resolve().parents[2] / "notebooks"]
    for place in places:
        if any(place.glob("*.ipynb")):
            return place
    raise UserError("no notebooks/ here or beside the package: run this in a clone of the "
                    "repository")  # fmt: skip


def _given(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE texts as values: a Python literal where it is one, else the text itself."""
    values: dict[str, Any] = {}
    for text in pairs:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--parameter {text}: write NAME=VALUE")
        values[name] = _literal(value, value)
    return values


def _literal(text: str, otherwise: Any) -> Any:
    """A Python literal (number, list, ...), read without running anything; else `otherwise`."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return otherwise


def checked(path: Path, standard: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The parameters to run a notebook with: the standard ones that it has, and those given.

    A UserError for a parameter given that it lacks, or of another type than its default's.
    """
    has = _inspected(path)
    unknown = [name for name in given if name not in has]
    if unknown:
        raise UserError(f"{path.stem} has no parameter {', '.join(unknown)}; "
                        f"allowed: {', '.join(has) or 'none'}")  # fmt: skip
    values = {name: value for name, value in standard.items() if name in has} | given
    for name, value in values.items():
        default = _literal(has[name], None)
        kind = KINDS.get(name) if default is None else type(default)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind is not None and value is not None and not fits:
            raise UserError(f"parameter {name}={value!r} of {path.stem} is of type "
                            f"{type(value).__name__}; allowed: {kind.__name__}"
                            + (f", as in {default!r}" if default is not None else ""))  # fmt: skip
    return values


def _inspected(path: Path) -> dict[str, str]:
    """The parameters of a notebook and their defaults, as they are written there."""
    import papermill

    return {name: p["default"] for name, p in papermill.inspect_notebook(str(path)).items()}


def run_notebooks(
    folder: Path,
    parameters: dict[str, dict[str, Any]],
    out: Path,
    figures: Path,
    slots: int,
    timeout: float,
) -> list[dict[str, Any]]:
    """Run notebooks by papermill, `slots` processes at a time, into executed copies under `out`.

    Returns one row each: notebook, status, seconds, figures written. The status comes from what
    the copy holds and the process's exit, not from papermill's metadata, which says "completed"
    of a cell whose kernel died.
    """
    out.mkdir(parents=True, exist_ok=True)
    waiting, running, rows = list(parameters), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < slots:
                stem = waiting.pop(0)
                (out / f"{stem}.ipynb").unlink(missing_ok=True)
                process = _start(folder, stem, parameters[stem], out, max(1, CORES // slots))
                running[stem] = (process, time.time())
                print(f"running {stem}", file=sys.stderr)
            time.sleep(0.2)
            for stem, (process, began) in list(running.items()):
                late = process.poll() is None and time.time() - began > timeout
                if late:
                    _stop(process)
                if process.poll() is None:
                    continue
                del running[stem]
                status = "timeout" if late else outcome(out / f"{stem}.ipynb", process.returncode)
                written = sum(p.stat().st_mtime >= began for p in figures.glob(f"{stem}*"))
                seconds = round(time.time() - began)
                rows[stem] = dict(notebook=stem, status=status, seconds=seconds, figures=written)
    finally:
        for process, _ in running.values():
            _stop(process)
    return [rows[stem] for stem in parameters]


def _start(
    folder: Path, stem: str, values: dict[str, Any], out: Path, threads: int
) -> subprocess.Popen:
    """papermill in a process of its own, in the notebooks' folder, paths relative to it.

    Its kernel computes on `threads` threads unless the environment says otherwise: kernels side by
    side that each take all cores wait for one another.
    """
    given = base64.b64encode(json.dumps(values).encode()).decode()  # JSON is YAML
    target = os.path.relpath(out / f"{stem}.ipynb", folder)
    run = ("import os, sys; from mas.paper.kernel import interrupt_without; "
           "interrupt_without(int(sys.argv.pop(1))); "
           "from papermill.__main__ import papermill; papermill()")  # fmt: skip
    command = [sys.executable, "-c", run, str(os.getpid()), f"{stem}.ipynb", target, "-b", given,
               "--kernel", "python3", "--no-progress-bar"]  # fmt: skip
    return subprocess.Popen(
        command, cwd=folder, env={"OMP_NUM_THREADS": str(threads)} | os.environ,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def _stop(process: subprocess.Popen) -> None:
    """Interrupt papermill, so that it ends its kernel; kill it where it does not go."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def outcome(path: Path, returncode: int) -> str:
    """"ok", or what went wrong, by an executed copy itself and the exit status of its run."""
    import nbformat

    if not path.exists():
        return "failed: no executed copy was written"
    notebook = nbformat.read(path, as_version=4)
    cells = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
    errors = [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    if errors:
        text = errors[0].evalue.partition("\n")[0][:100]  # empty after a bare assert
        return f"failed: {errors[0].ename}" + (f": {text}" if text else "")
    if any(cell.execution_count is None for cell in cells):
        return "failed: a cell did not finish; did its kernel die?"
    if returncode != 0:
        return f"failed: papermill ended with status {returncode}; did the kernel die?"
    return "ok"
