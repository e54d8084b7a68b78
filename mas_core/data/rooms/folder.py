"""Where rooms lie: found, or rendered and prepared when they are asked for."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from ...config import Data, UserError, outside
from ...tasks import TASKS, TaskTable, domains_of
from ..clients import prepared_folder
from ..taskonomy import prepare, reading
from .render import RENDERER_VERSION, read_parameters, render_rooms


def rooms_folder(data: Data) -> Path:
    """Where rooms lie that are given no folder: data/rooms-<what determines them>."""
    name = (f"rooms-{data.buildings}x{data.views}-{data.size}px-seed{data.render_seed}"
            f"-het{data.heterogeneity:g}-v{RENDERER_VERSION}")  # fmt: skip
    return Path("data") / name


def ensure_rooms(
    data: Data, folder: str | Path | None, workers: int | None = None, progress: bool = True
) -> Path:
    """The folder to open: for procedural rooms rendered and prepared first, where they are not.

    Without a folder rooms go to `rooms_folder`; one that is named is there already, empty or with
    rooms. Taskonomy needs a folder; a source outside the package takes it as it is given.

    Raises UserError where the folder is missing, holds other rooms than `data` says, of another
    renderer, or other images.
    """
    if data.source == "taskonomy" and folder is None:
        raise UserError("Taskonomy is not part of the package: name its folder with "
                        "--data DIR, or train on rooms (data.source=rooms)")  # fmt: skip
    if data.source != "rooms":
        return Path(folder or ".")
    rooms = rooms_folder(data) if folder is None else Path(folder)
    asked = {"buildings": data.buildings, "views": data.views, "size": data.size,
             "seed": data.render_seed, "heterogeneity": data.heterogeneity}  # fmt: skip
    try:
        found = _rooms_there(rooms, asked, named=folder is not None)
        with contextlib.suppress(UserError):
            prepared_folder(rooms, data.size)
            return rooms
        render_rooms(rooms, **asked | {"size": found.get("size", data.size)}, workers=workers,
                     progress=progress)  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None
    own = outside(data.tasks, TaskTable)
    alike = all(reading(d, own) == reading(d, TASKS) for d in domains_of("".join(own), own))
    table = TASKS if alike else own  # all that rooms hold, so that other tasks find theirs, too
    prepare(rooms, data.size, workers=workers, progress=progress, table=table)
    return rooms


def _rooms_there(rooms: Path, asked: dict[str, Any], named: bool) -> dict[str, Any]:
    """What rooms.json says of a folder, {} where none are rendered; UserError for other rooms."""
    found = read_parameters(rooms)
    if found is None:
        if rooms.is_dir() and any(rooms.iterdir()):
            raise UserError(
                f"{rooms} has no rooms.json that says which rooms it holds; name the folder they "
                "were rendered into, or set data.source=taskonomy"
            )
        if named and not rooms.is_dir():
            asked = " ".join(f"--{key} {value}" for key, value in asked.items())
            raise UserError(f"data folder {rooms} does not exist; to have rooms there: "
                            f"mas render --out {rooms} {asked}")  # fmt: skip
        return {}
    # Rooms of another size serve: they are resized when they are prepared.
    wanted = asked | {"size": found.get("size"), "renderer_version": RENDERER_VERSION}
    other = [f"{key}={found.get(key)}" for key in wanted if found.get(key) != wanted[key]]
    if other:
        raise UserError(f"{rooms} holds rooms rendered with {', '.join(other)}, not as configured; "
                        "name another folder or change the settings")  # fmt: skip
    return found
