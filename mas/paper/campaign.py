"""As much of the evidence as fits into a budget of time: `mas campaign`, and `mas unpack`.

A machine that is at hand for minutes trains what is missing, in order of worth, and packs records
into one file; unpacking adds them to those that are there. Checkpoints stay where they are.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import shutil
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from mas_core.config import PRESETS, UserError, settings
from mas_core.records.store import Store, open_store
from mas_core.records.trajectory import Trajectory
from mas_core.tasks import TASK_SETS

from ..run.engine import EngineError, collect
from ..run.workers import Compute, end_workers, train_recipes
from . import experiments as x

WRITTEN = (".json", ".csv")  # what a record is made of, besides its checkpoints
MEMBER = re.compile(r"(\w+)/(\w+-s\d+-[0-9a-f]{10})/(\w+\.(?:json|csv))", re.ASCII)
MEMBER_BYTES = 2**26  # a record's largest file holds some hundred kilobytes


@dataclass(frozen=True)
class Evidence:
    """One row of what should be on record: an experiment with its seeds."""

    experiment: x.Experiment
    seeds: Sequence[int]
    tasks: Sequence[str] = ("sdnkt",)  # of the experiment's task sets
    preset: str = "small"
    overrides: dict[str, Any] = field(default_factory=dict)
    without: str = "-"  # a method family left out, such as HOA

    def recipes(self, store: Store) -> x.Recipes:
        changes = tuple(self.overrides.items())
        return {
            (*key, changes): recipe
            for seed in self.seeds
            for key, recipe in self.experiment(store, seed, self.overrides).items()
            if key[1] in self.tasks and not key[0].startswith(self.without)
        }


def _medium(seeds: int, hoa: int) -> tuple[Evidence, ...]:
    return (
        Evidence(x.controls, range(seeds), preset="medium"),
        Evidence(x.figure_5, range(seeds), preset="medium", without="HOA"),
        Evidence(x.figure_5, range(hoa), preset="medium"),
    )


NINE, CONTINUE = ("sdnkterca",), {"mas.lr_schedule": "continue"}
# In order of worth: what each row decides comes before what sharpens it.
TABLE: tuple[Evidence, ...] = (
    Evidence(x.controls, range(10)),
    Evidence(x.controls, range(5), ("erckt",)),
    Evidence(x.controls, range(3), NINE),
    Evidence(x.figure_5, range(10)),
    Evidence(x.figure_6, range(5), ("erckt",)),
    Evidence(x.figure_6, range(3), NINE),
    Evidence(x.groups_restarted, range(10)),
    Evidence(x.groups_restarted, range(5), ("erckt",)),
    Evidence(x.groups_restarted, range(3), NINE),
    Evidence(x.table_1, range(3), ("sdnkt", "erckt")),
    Evidence(x.figure_8, range(3), ("sdnkt", "erckt")),
    Evidence(x.figure_8, range(3), ("sdnkt", "erckt"), overrides=CONTINUE),
    *(Evidence(x.controls, range(2), overrides={"data.render_seed": r}) for r in range(1, 5)),
    *_medium(3, 1),
    Evidence(x.controls, range(2), ("erckt",), "medium"),
    Evidence(x.figure_10, range(1), NINE),
    *(Evidence(x.who_to_merge, range(2), overrides={"data.render_seed": r}) for r in range(1, 5)),
    Evidence(x.who_to_merge, range(10)),
    Evidence(x.two_widths, range(5)),
    Evidence(x.few_labels, range(5)),
    Evidence(x.rivals, range(5), TASK_SETS),
    Evidence(x.when_to_split, range(1), TASK_SETS[:2]),
    Evidence(x.heterogeneity, range(5)),
    Evidence(x.room_types, range(5)),
    Evidence(x.affinity_measures, range(5), TASK_SETS[:2]),
    Evidence(x.controls, range(10), ("erckt", *NINE)),
    Evidence(x.figure_6, range(10), ("erckt",)),
    Evidence(x.figure_6, range(5), NINE),
    Evidence(x.table_1, range(5), ("sdnkt", "erckt")),
    Evidence(x.figure_8, range(5), ("sdnkt", "erckt")),
    *_medium(5, 3),
)


def seconds_of(text: str) -> float:
    """A budget such as 540s, 9m or 2h; seconds if there is no unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not found or not float(found[1]):
        raise UserError(f"--budget {text}; allowed: a time such as 540s, 9m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def campaign(
    budget: float,
    pack_into: Path,
    results: Path,
    compute: Compute,
    data: Path | None = None,
    table: Sequence[Evidence] = TABLE,
) -> int:
    """Train what the table lacks for `budget` seconds, then pack it; 1 where anything failed.

    `data` has the images of the table's first row; rooms that other rows ask for are rendered.
    A twentieth of the budget, at least five seconds, is kept for the end. No round is begun that
    would reach into it; what still runs in its second half is ended, at the cost of that round.
    """
    began = time.time()
    if not pack_into.name.endswith((".tar.gz", ".zip")):
        raise UserError(f"--pack {pack_into}; allowed: a name that ends in .tar.gz or .zip")
    if not pack_into.absolute().parent.is_dir():
        raise UserError(f"--pack {pack_into}: there is no folder {pack_into.absolute().parent}")
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data}: there is no such folder")
    reserve = max(5.0, budget / 20)
    stop_at, failed = began + budget - reserve, False
    others = multiprocessing.active_children()
    last_call = threading.Timer(budget - reserve / 2, end_workers, [others])
    last_call.daemon = True
    last_call.start()
    first = settings(table[0].preset, overrides=table[0].overrides).data
    try:
        for preset, store, rows in _stages(table, results):
            base = settings(preset, overrides=rows[0].overrides)
            if time.time() >= stop_at or not collect(_all(rows, store), store)[1]:
                continue
            folder = data if base.data == first else None  # other buildings have their own
            try:
                train_recipes(_all(rows, store), store, base, folder, compute, stop_at=stop_at)
            except (EngineError, UserError, BrokenExecutor) as error:
                if time.time() < stop_at:  # later it is a process ended for want of time
                    print(f"mas: {error}", file=sys.stderr)
                    failed = True
    finally:
        last_call.cancel()
    stores = {preset: open_store(preset, results) for preset in {row.preset for row in table}}
    made = {p: sorted(_trained_since(began, store)) for p, store in stores.items()}
    pack(pack_into, {stores[p]: ids for p, ids in made.items()})
    complete = sum(stores[p].result(i) is not None for p, ids in made.items() for i in ids)
    print(f"{sum(map(len, made.values()))} trajectories trained, {complete} of them complete; "
          f"packed into {pack_into}, {pack_into.stat().st_size / 2**20:.1f} MiB")  # fmt: skip
    return int(failed)


def _stages(
    table: Sequence[Evidence], results: Path
) -> Iterator[tuple[str, Store, list[Evidence]]]:
    """Neighbouring rows on the same buildings, which are trained side by side."""

    def buildings(row: Evidence) -> tuple:
        return row.preset, settings(row.preset, overrides=row.overrides).data

    for (preset, _), rows in groupby(table, key=buildings):
        yield preset, open_store(preset, results), list(rows)


def _all(rows: Iterable[Evidence], store: Store) -> x.Recipes:
    return {key: recipe for row in rows for key, recipe in row.recipes(store).items()}


def _trained_since(began: float, store: Store) -> set[str]:
    """Ids of records with a round of which anything was written since then."""
    written = [path for end in WRITTEN for path in store.root.glob(f"*-s*-*/*{end}")]
    return {path.parent.name for path in written
            if path.stat().st_mtime >= began - 1
            and (path.parent / "rounds.csv").exists()}  # fmt: skip


def pack(file: Path, records: dict[Store, Iterable[str]]) -> None:
    """Write records, with those they start from, without checkpoints, into a .tar.gz or .zip."""
    members: dict[str, bytes] = {}
    for store, ids in records.items():
        for id_ in sorted({i for name in ids for i in _lineage(store.trajectory(name))}):
            for path in sorted(p for p in store.folder(id_).iterdir() if p.suffix in WRITTEN):
                members[f"{store.preset}/{id_}/{path.name}"] = path.read_bytes()
    temporary = file.with_name(f".{file.name}.part")
    if file.suffix == ".zip":
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(temporary, "w:gz") as archive:
            for name, content in members.items():
                about = tarfile.TarInfo(name)
                about.size, about.mode = len(content), 0o644
                archive.addfile(about, io.BytesIO(content))
    os.replace(temporary, file)


def _lineage(t: Trajectory) -> list[str]:
    return [t.id, *(_lineage(t.parent) if t.parent else [])]


def unpack(file: Path, results: Path) -> int:
    """Add packed records to those under `results`; 1 where any of them was refused.

    Nothing is written where the file holds anything but records. A record that does not match its
    id or lacks rounds is refused; one that reaches no further than the record here is left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in _members(file):
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        told = {"added": 0, "already there": 0, "refused": 0}
        for preset in sorted(p.name for p in Path(folder).iterdir()):
            packed, here = Store(folder, preset), open_store(preset, results)
            for id_ in sorted(p.name for p in packed.root.iterdir()):
                try:
                    told[_add(_read(id_, packed, here), packed, here)] += 1
                except UserError as error:
                    told["refused"] += 1
                    why = str(error).replace(folder, str(file)).partition("; restore it")[0]
                    print(f"mas: refused {id_}: {why}", file=sys.stderr)
    print(f"{file}: " + ", ".join(f"{count} {what}" for what, count in told.items()))
    return int(told["refused"] > 0)


def _members(file: Path) -> list[tuple[str, bytes]]:
    """Names and contents of a pack, read into memory; a UserError for anything but records."""
    found = []
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    _check_member(file, entry.filename, entry.file_size)
                    found.append((entry.filename, archive.read(entry)))
        else:
            with tarfile.open(file) as archive:
                for member in archive:
                    _check_member(file, member.name, member.size, member.isreg())
                    with closing(archive.extractfile(member)) as content:
                        found.append((member.name, content.read()))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        why = str(error).splitlines()[0] if str(error) else "it ends early"
        raise UserError(f"{file} cannot be read ({why}); get it again") from None
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise UserError(f"{file} holds a file twice; nothing was unpacked")
    return found


def _check_member(file: Path, name: str, size: int, regular: bool = True) -> None:
    known = MEMBER.fullmatch(name)
    if not known or known[1] not in PRESETS or not regular or size > MEMBER_BYTES:
        raise UserError(f"{file} holds {name!r}, no file of a record; nothing was unpacked")


def _read(id_: str, packed: Store, here: Store, above: tuple[str, ...] = ()) -> Trajectory:
    """A packed trajectory that matches its id; its parent from the pack, or from what is here."""
    parent = packed.parent_id(id_)
    if parent in (id_, *above):
        raise UserError(f"{packed.folder(id_) / 'config.json'} starts from itself")
    if parent is not None:
        inside = packed.folder(parent).is_dir()
        parent = (_read(parent, packed, here, (id_, *above)) if inside
                  else here.trajectory(parent))  # fmt: skip
    t = packed.trajectory(id_, parent)
    packed.check(t)
    rounds = packed.rounds(t)["round"].tolist()
    if rounds != list(range(t.start_round, t.start_round + len(rounds))):
        raise UserError(f"{packed.folder(t) / 'rounds.csv'} lacks rounds or repeats them")
    return t


def _add(t: Trajectory, packed: Store, here: Store) -> str:
    """Take over a record that reaches further than the one here; says what was done."""
    with here.lock(t):
        ours, theirs = ((s.result(t) is not None, s.rounds_done(t)) for s in (here, packed))
        states = here.folder(t) / "checkpoints"
        if theirs <= ours or (states.is_dir() and not theirs[0]):  # those can be continued
            return "already there"
        shutil.rmtree(states, ignore_errors=True)  # of another, shorter run
        order = {"rounds.csv": 1, "result.json": 2}  # last: they say how far a record reaches
        for path in sorted(packed.folder(t).iterdir(), key=lambda p: order.get(p.name, 0)):
            here.write_file(t, path.name, path.read_bytes())
    return "added"
