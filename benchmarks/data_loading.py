"""Images per second into training, all nine domains at 256 px, against opening PNGs.

The reference is a DataLoader of two persistent workers that open and decode the nine PNGs of every
view. The project's reader is measured as it trains on data that does not fit into memory (rows of
memory-mapped arrays, one batch ahead) and on data that does (decoded once). "To a GPU" counts what
the host does: labels become float targets on the GPU, for which the device "meta" stands, that
computes nothing. "On the CPU" both sides end with float targets in this process; from memory maps
that is bound by the conversion of 18 channels to floats, which both sides do.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mas_core.config import Data, stream
from mas_core.data.clients import FederatedData, open_data
from mas_core.data.rooms.folder import ensure_rooms
from mas_core.data.taskonomy import find_views
from mas_core.tasks import DOMAINS, Batch, decode_batch

from .timing import Row, compare, in_turns, main, wall

TASKS = "sdnkterca"


class Pngs(Dataset):
    """Views of a building, each opened as nine PNGs."""

    def __init__(self, files: list[dict[str, Path]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        arrays = {domain: np.array(Image.open(path)) for domain, path in self.files[index].items()}
        return {
            domain: torch.from_numpy(a.astype(np.int32) if a.dtype == np.uint16 else a)
            for domain, a in arrays.items()
        }


def measure(quick: bool, folder: Path) -> list[Row]:
    size, views, batch_size, epochs = (32, 12, 4, 1) if quick else (256, 160, 32, 3)
    config = Data(size=size, buildings=1, views=views)
    rooms = folder / f"rooms-1-{size}px"
    rooms.mkdir(exist_ok=True)
    ensure_rooms(config, rooms, 1 if quick else None, progress=False)
    mapped = open_data(config, rooms, TASKS, cache_bytes=0)
    cached = open_data(config, rooms, TASKS)
    images = mapped.count(0, "train") // batch_size * batch_size * epochs
    files = list(find_views(rooms, mapped.names[0], DOMAINS).values())
    loader = DataLoader(Pngs((files * epochs * 2)[:images]), batch_size, shuffle=True,
                        num_workers=2, persistent_workers=True)  # fmt: skip

    def epochs_of(data: FederatedData, device: str) -> Iterator[Batch]:
        for epoch in range(epochs):
            yield from data.epoch(0, TASKS, batch_size, stream(0, "epoch", epoch), device)

    host, decoded = "a DataLoader of 2 workers opening PNGs", "the same DataLoader, decoded here"
    subjects = {
        "to a GPU: memory-mapped arrays": (mapped, "meta", host),
        "on the CPU: memory-mapped arrays": (mapped, "cpu", decoded),
        "on the CPU: arrays decoded once": (cached, "cpu", decoded),
    }
    actions = {
        name: lambda data=data, device=device: _consume(epochs_of(data, device))
        for name, (data, device, _) in subjects.items()
    }
    actions[host] = lambda: _consume(loader)
    actions[decoded] = lambda: _consume(decode_batch(raw, TASKS) for raw in loader)
    seconds = in_turns(actions, 1 if quick else 3, wall)
    rows = []
    for subject, (_, _, reference) in subjects.items():
        per_second = images / np.median(seconds[subject])
        reach = "" if subject == "on the CPU: memory-mapped arrays" else ">= 10"
        note = f"{per_second:.0f} images/s of {size} px, nine domains, batches of {batch_size}"
        rows.append(compare(seconds, subject, reference, "speed", reach, note))
    return rows


def _consume(batches: Iterable) -> None:
    for _ in batches:
        pass


if __name__ == "__main__":
    main(measure)
