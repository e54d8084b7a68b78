"""Four tiny buildings of random labels, prepared once, and settings that fit them."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from mas_core.config import FL, Data, Mas, Model, Settings, stream
from mas_core.data.clients import open_data
from mas_core.data.taskonomy import prepare
from mas_core.records.store import Store
from mas_core.records.trajectory import Trajectory
from mas_core.tasks import DOMAINS, NUM_CLASSES, TASKS, Batch, decode_batch, domains_of

SIZE = 16  # pixels
POINTS = {"attic": 5, "barn": 7, "cellar": 9, "den": 11}  # two views a point: 6 to 18 to train on
LETTERS = "sdnkterca"


def encoded(domain, rng, size=SIZE):
    """Random labels as encoded, with structure from pixel to pixel and some invalid depth."""
    rows, columns = np.mgrid[:size, :size] / size
    waves = sum(
        rng.normal() * np.sin(rng.normal(0, 6) * rows + rng.normal(0, 6) * columns)
        for _ in range(3)
    )
    wave = (waves - waves.min()) / (np.ptp(waves) + 1e-9)
    if TASKS.stored[domain] == "uint8":
        return (wave * (NUM_CLASSES - 1)).astype(np.uint8)
    if TASKS.stored[domain] == "uint8x3":
        tint = rng.uniform(80, 255, 3)
        return (wave[..., None] * tint).astype(np.uint8)
    values = (wave * rng.uniform(1000, 4000)).astype(np.uint16)
    if domain == "depth_zbuffer":
        values[rng.random((size, size)) < 0.1] = 65535
    return values


def write_buildings(root, points=POINTS, size=SIZE, seed=0):
    """A folder of PNGs in the released layout, two views a point."""
    for building, count in points.items():
        for domain in DOMAINS:
            folder = root / domain / building
            folder.mkdir(parents=True)
            for i in range(2 * count):
                name = f"point_{i // 2}_view_{i % 2}_domain_{domain}.png"
                image = encoded(domain, stream(seed, building, i, domain), size)
                Image.fromarray(image).save(folder / name)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Weights are bit-identical for one number of threads; processes started here inherit it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A prepared data folder of four buildings, all nine tasks, 16 px."""
    root = tmp_path_factory.mktemp("buildings")
    write_buildings(root)
    prepare(root, SIZE, progress=False, workers=1)
    return root


@pytest.fixture(scope="session")
def settings():
    """Four rounds with two of four clients on the tiny network."""
    return Settings(
        Data("taskonomy", size=SIZE, buildings=4),
        Model("tiny", output_stride=4),
        FL(rounds=4, clients_per_round=2, batch_size=4, measure_rounds=4, affinity_every=2,
           evaluate_every=2),
        Mas(merge_rounds=2, affinity_rounds=2, lr_schedule="continue"),
    )  # fmt: skip


@pytest.fixture(scope="session")
def opened(folder, settings):
    """The four clients with all nine tasks."""
    return open_data(settings.data, folder, LETTERS)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results", "small")


@pytest.fixture
def trajectory(settings):
    """Two tasks for four rounds, affinities measured."""
    return Trajectory("dk", 0, settings.data, settings.model, settings.fl)


@pytest.fixture
def batch():
    """Function of letters, images and seed: a decoded batch, a quarter of it flipped."""

    def make(letters, images=4, seed=0, size=SIZE):
        raw = {
            domain: torch.from_numpy(
                np.stack([encoded(domain, stream(seed, i, domain), size) for i in range(images)])
            )
            for domain in domains_of(letters)
        }
        return decode_batch(raw, letters, torch.arange(images) % 4 == 1)

    return make


@pytest.fixture
def doubles():
    """Made in float64, where rounding decides nothing; for networks use `.double()` as well."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def in_doubles(b):
    """A batch in float64."""
    targets = {a: t.double() if t.is_floating_point() else t for a, t in b.targets.items()}
    return Batch(b.image.double(), b.mask.double(), targets, b.table)
