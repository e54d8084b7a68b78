"""Buildings written to disk in Taskonomy's layout, over a pool of processes."""

import json
import os
from collections import Counter
from concurrent.futures import as_completed
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ..processes import local_workers
from .labels import DOMAINS, encode, render_view
from .scene import make_building, make_cameras, stream

RENDERER_VERSION = 5  # part of a folder's identity: raise it whenever a pixel changes
CHUNK = 16  # views a job renders
LIMITS = {"buildings": (1, 1000), "views": (1, 100_000), "size": (16, 1024)}


def view_counts(buildings, views, seed):
    """Views of each building: evenly spaced from 0.4 to 1.6 times the mean, in random order."""
    if buildings == 1:
        return [views]
    counts = [
        max(1, round(views * (0.4 + 1.2 * i / (buildings - 1)))) for i in range(buildings)
    ]
    return [counts[i] for i in stream(seed, "counts").permutation(buildings)]


def building_names(buildings):
    """Names of buildings, which sort like their numbers."""
    digits = max(2, len(str(buildings - 1)))
    return [f"room_{i:0{digits}d}" for i in range(buildings)]


def view_path(root, domain, building, point, view):
    """<root>/<domain>/<building>/point_P_view_V_domain_<domain>.png"""
    return Path(root, domain, building, f"point_{point}_view_{view}_domain_{domain}.png")


@lru_cache(maxsize=4)
def _building(seed, index, heterogeneity, count):
    scene = make_building(seed, index, heterogeneity)
    return scene, make_cameras(scene, count)


def _save(array, path):
    """Write a PNG under another name, then rename: a file that exists is whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        Image.fromarray(array).save(part, format="PNG", compress_level=6)
        os.replace(part, path)
    except OSError as error:  # of a full disk it names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def _render_chunk(root, name, index, first, last, count, size, seed, heterogeneity):
    """Render views first..last of a building, where files are missing: written, skipped."""
    written = 0
    scene, cameras = _building(seed, index, heterogeneity, count)
    for point, view, camera in cameras[first:last]:
        paths = {domain: view_path(root, domain, name, point, view) for domain in DOMAINS}
        if all(path.exists() for path in paths.values()):
            continue
        for domain, array in encode(render_view(scene, camera, size)).items():
            _save(array, paths[domain])
        written += 1
    return written, last - first - written


def read_parameters(root):
    """What ``root``/rooms.json says was rendered there, None without one; ValueError if damaged."""
    record = Path(root, "rooms.json")
    if not record.exists():
        return None
    try:
        found = json.loads(record.read_bytes())
        if not isinstance(found, dict) or not all(
            isinstance(value, int | float) for value in found.values()
        ):
            raise ValueError("no JSON object of numbers")
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError
        raise ValueError(
            f"{record} is damaged ({error}); delete {root}, the same rooms can be rendered anew"
        ) from None
    return found


def _claim(root, parameters):
    """Record what is rendered into ``root``; a folder of anything else is refused."""
    found = read_parameters(root)
    if found is not None:
        if found != parameters:
            other = sorted(k for k in parameters if found.get(k) != parameters[k])
            raise ValueError(
                f"{root} holds rooms rendered with another {', '.join(other)}: "
                "choose an empty folder or the same parameters"
            )
        return
    if any((root / domain).exists() for domain in DOMAINS):
        raise ValueError(f"{root} holds images that were not rendered here: choose an empty folder")
    root.mkdir(parents=True, exist_ok=True)
    part = root / f".rooms.json.{os.getpid()}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(parameters, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, root / "rooms.json")


def render_rooms(
    out, buildings=32, views=96, size=64, seed=0, heterogeneity=0.7, workers=None, progress=True
):
    """Render procedural buildings into ``out`` in Taskonomy's layout and encodings.

    buildings: how many; views: mean number a building (they spread 1:4 about it); size: pixels a
    side; heterogeneity: 0 = every building from one distribution of styles, 1 = each its own;
    workers: processes (None = one a core; 1 = none but this). Files depend on nothing but
    (buildings, views, size, seed, heterogeneity); views already complete are skipped.

    Returns {"views": {building: count}, "written": n, "skipped": n}. Raises ValueError for
    impossible parameters and for a folder that holds anything else.
    """
    given = {"buildings": buildings, "views": views, "size": size}
    for key, (least, most) in LIMITS.items():
        if not least <= given[key] <= most or given[key] != int(given[key]):
            raise ValueError(
                f"{key} must be a whole number from {least} to {most}, not {given[key]}"
            )
    if not 0 <= heterogeneity <= 1:
        raise ValueError(f"heterogeneity must lie in [0, 1], not {heterogeneity}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    root = Path(out)
    _claim(root, {
        "renderer_version": RENDERER_VERSION, "buildings": int(buildings), "views": int(views),
        "size": int(size), "seed": int(seed), "heterogeneity": float(heterogeneity),
    })  # fmt: skip
    names = building_names(buildings)
    counts = view_counts(buildings, views, seed)
    jobs = []
    for i, (name, count) in enumerate(zip(names, counts, strict=True)):
        for domain in DOMAINS:
            (root / domain / name).mkdir(parents=True, exist_ok=True)
        for first in range(0, count, CHUNK):
            last = min(first + CHUNK, count)
            jobs.append((str(root), name, i, first, last, count, size, seed, heterogeneity))

    done = Counter()
    bar = _bar(sum(counts), progress)
    for written, skipped in _results(jobs, workers or os.cpu_count() or 1):
        done.update(written=written, skipped=skipped)
        bar.update(written + skipped)
    bar.close()
    return {
        "views": dict(zip(names, counts, strict=True)),
        "written": done["written"],
        "skipped": done["skipped"],
    }


def _results(jobs, workers):
    if workers == 1 or len(jobs) == 1:
        yield from (_render_chunk(*job) for job in jobs)
        return
    pool = local_workers(min(workers, len(jobs)))
    try:
        for future in as_completed([pool.submit(_render_chunk, *job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _bar(total, progress):
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="view", desc="render", disable=not progress)
