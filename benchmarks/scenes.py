"""The images that benchmarks train on: rendered once a run, into a folder that is thrown away."""

from pathlib import Path

from mas_core.config import Settings, settings
from mas_core.data.rooms.folder import ensure_rooms

QUICK = {"data.buildings": 2, "data.views": 20}


def prepared(quick: bool, folder: Path, tasks: str = "sdnkt") -> tuple[Settings, Path]:
    """The small preset (quick: smoke with two buildings) without affinities, and its images."""
    chosen = settings("smoke" if quick else "small", tasks,
                      {"fl.measure_rounds": 0} | (QUICK if quick else {}))  # fmt: skip
    rooms = folder / f"rooms-{chosen.data.buildings}"
    rooms.mkdir(exist_ok=True)
    return chosen, ensure_rooms(chosen.data, rooms, 1 if quick else None, progress=False)
