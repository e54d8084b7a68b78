"""Rendering procedural rooms, images per second and core, against the first version.

The first version is taken out of the repository's history. It drew emptier rooms (fewer objects,
no curved surfaces), so the ratio understates what became faster. Where there is no history, what
remains is the second reference: writing the nine PNGs of views that are rendered already.
"""

import importlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType

from PIL import Image

from mas_core.data import rooms

from .timing import Row, compare, in_turns, main

HERE = Path(__file__).parents[1]


def measure(quick: bool, folder: Path) -> list[Row]:
    sizes, views, repeats = ((32,), 2, 1) if quick else ((32, 64), 12, 3)
    rows, first = [], _first_version(folder / "first-rooms")
    for size in sizes:
        subject, files = f"rendering and encoding, {size} px", "writing their PNGs alone"
        arrays = _render(rooms, views, size)()
        actions = {subject: _render(rooms, views, size), files: lambda: _write(arrays)}  # noqa: B023
        if first:
            actions["the first version"] = _render(first, views, size)
        seconds = in_turns(actions, repeats)
        note = f"{views / median(seconds[subject]):.1f} images/s and core, nine domains"
        if first:
            rows.append(compare(seconds, subject, "the first version", "speed", "", note))
        rows.append(compare(seconds, subject, files, "time", "", note))
    return rows


def _render(package: ModuleType, views: int, size: int) -> Callable[[], list]:
    def action() -> list:
        scene = package.make_building(0, 0, 0.7)
        cameras = package.make_cameras(scene, views)
        return [package.encode(package.render_view(scene, c, size)) for _, _, c in cameras]

    return action


def _write(views: list) -> None:
    for arrays in views:
        for array in arrays.values():
            Image.fromarray(array).save(io.BytesIO(), format="PNG", compress_level=6)


def _first_version(folder: Path) -> ModuleType | None:
    """The package `rooms` as it was first committed; None where the history does not say."""
    path = "mas_core/rooms"  # where it stood then
    log = ["git", "log", "--diff-filter=A", "--format=%H", "--", f"{path}/render.py"]
    found = subprocess.run(log, cwd=HERE, capture_output=True, text=True).stdout.split()
    if not found:
        return None
    archive = subprocess.run(["git", "archive", found[-1], path], cwd=HERE, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    (folder / path).rename(folder / "first_rooms")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("first_rooms")
    finally:
        sys.path.remove(str(folder))


if __name__ == "__main__":
    main(measure)
