"""Train what notebooks ask for, then run them by papermill; and which notebook asks for what."""

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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import UserError, settings
from ..data.clients import rooms_folder
from ..records.store import Store, open_store
from ..records.study import Study
from ..run.engine import EngineError, collect, threads_per_worker
from . import experiments as x

NOTEBOOKS: dict[str, tuple[x.Experiment, ...]] = {
    "00_tour": (x.tour,),
    "explore_affinities": (x.explore_affinities,),
    "figure_01_overview": (x.figure_1,),
    "figure_04_data": (),
    "figure_05_sdnkt": (x.figure_5,),
    "figure_06_erckt_sdnkterca": (x.figure_6,),
    "figure_07_affinities": (x.figure_7,),
    "figure_08_merge_rounds": (x.figure_8,),
    "figure_09_standalone": (x.figure_9,),
    "figure_10_local_epochs_clients": (x.figure_10, x.longer_rounds),
    "table_1_optimal_worst": (x.table_1,),
    "table_2_more_clients": (x.table_2,),
    "supplement_tables_1_2_splits": (x.supplement_tables_1_2,),
    "supplement_figure_3_validation": (x.supplement_figure_3,),
    "ablation_schedule_gradient": (x.ablation,),
    "what_makes_it_work": (x.controls, x.every_split),
    "your_own_tasks": (),
    "published_taskonomy": (x.published_taskonomy, x.figure_7),
    "claims": (x.figure_5, x.figure_6, x.figure_7, x.figure_8, x.figure_9, x.figure_10, x.table_1,
               x.table_2),
}  # fmt: skip


def chosen(names: Sequence[str]) -> list[str]:
    """Notebook names, with or without folder and .ipynb, as stems; none: all of them."""
    stems = [Path(name).name.removesuffix(".ipynb") for name in names]
    for name, stem in zip(names, stems):
        if stem not in NOTEBOOKS:
            raise UserError(f"unknown notebook {name!r}; allowed: {', '.join(NOTEBOOKS)}")
    return list(dict.fromkeys(stems)) or list(NOTEBOOKS)


def recipes_of(
    stems: Iterable[str], store: Store, seeds: Iterable[int], overrides: dict[str, Any]
) -> dict[Any, Any]:
    """Every recipe that notebooks ask for, by (notebook, experiment, the recipe's key)."""
    return {
        (stem, experiment.__name__, *key): recipe
        for stem in stems
        for experiment in NOTEBOOKS[stem]
        for seed in seeds
        for key, recipe in experiment(store, seed, overrides).items()
    }


def reproduce(arguments: Namespace, overrides: dict[str, Any]) -> int:
    """Train what the named notebooks miss, run them, print a table; 1 where anything failed."""
    from ..run.workers import train_recipes

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
    parameters = {s: checked(folder / f"{s}.ipynb", standard, given) for s in stems}
    store, failed = open_store(preset, arguments.results), False

    def recipes() -> dict[Any, Any]:  # what several notebooks share, once
        return {k[1:]: r for k, r in recipes_of(stems, store, seeds, overrides).items()}

    if not arguments.no_train and collect(recipes(), store)[1]:
        try:
            train_recipes(
                recipes(), Study("sdnkt", base, 0, store), arguments.data, arguments.workers or 1,
                arguments.device, arguments.dask, arguments.slurm,
            )  # fmt: skip
        except EngineError as error:
            print(f"mas: {error}", file=sys.stderr)
            failed = True
    slots = min(arguments.workers or 1000, os.cpu_count() or 1)
    rows = run_notebooks(folder, parameters, store.root / "notebooks",
                         arguments.figures / preset, slots, arguments.timeout)  # fmt: skip
    print(pd.DataFrame(rows).to_string(index=False))
    return int(failed or any(row["status"] != "ok" for row in rows))


def notebooks_folder() -> Path:
    """notebooks/ here, or beside the package; a UserError where the package came without."""
    places = [Path("notebooks"), Path(__file__).resolve().parents[2] / "notebooks"]
    for place in places:
        if any(place.glob("*.ipynb")):
            return place
    raise UserError("no notebooks/ here nor beside the package: run this in a clone of the "
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
    import papermill

    has = {name: p["default"] for name, p in papermill.inspect_notebook(str(path)).items()}
    unknown = [name for name in given if name not in has]
    if unknown:
        raise UserError(f"{path.stem} has no parameter {', '.join(unknown)}; "
                        f"allowed: {', '.join(has) or 'none'}")  # fmt: skip
    values = {name: value for name, value in standard.items() if name in has} | given
    for name, value in values.items():
        default = _literal(has[name], None)
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        if default is not None and value is not None and not fits:
            raise UserError(f"parameter {name}={value!r} of {path.stem} is of type "
                            f"{type(value).__name__}; allowed: {type(default).__name__}, "
                            f"as in {default!r}")  # fmt: skip
    return values


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
                process = _start(folder, stem, parameters[stem], out, threads_per_worker(slots))
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
    command = [sys.executable, "-m", "papermill", f"{stem}.ipynb", target, "-b", given,
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
