"""Records of trajectories under results/<preset>/<id>/, and checkpoints beside them.

    config.json      everything that determines the trajectory, and its parent's id
    rounds.csv       one row a round
    affinity.csv     one row a round and client: Eq. 3 averaged over its steps, columns i>j
    machines.json    device, threads and versions of every stretch of rounds
    result.json      test losses, cost, provenance; written last, so its presence means complete
    checkpoints/     safetensors, not in git

Every file appears by rename. Rows may run ahead of the checkpoints, after a kill or in a clone; a
resumed run trains their rounds again and leaves them as they are.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import pandas as pd

from ..config import FL, Data, Model, UserError
from ..data.arrays import hash_json
from .trajectory import Trajectory

if TYPE_CHECKING:
    from ..models import State  # PyTorch is imported where checkpoints are: `mas status` needs none

BESIDE = Path(__file__).resolve().parents[2] / "results"  # in a clone
_REMEDY = "restore it, or delete its folder to train anew"
_FROM_START = "delete {} to train from the start"


@dataclass
class Affinities:
    """Measured affinities of one trajectory; axis 0 goes over rounds, axis 1 over clients."""

    rounds: np.ndarray  # (T,) the rounds measured
    clients: np.ndarray  # (T, K) client ids
    measurements: np.ndarray  # (T, K) how many steps each has measured
    values: np.ndarray  # (T, K, n, n) S[i, j], row updates, column receives; NaN diagonal


class Store:
    """The records of one preset; see `open_store`."""

    def __init__(self, results: Path | str, preset: str) -> None:
        self.results = Path(results)
        self.root = self.results / preset
        self.preset = preset
        self._checked: set[str] = set()

    def folder(self, trajectory: Trajectory | str) -> Path:
        return self.root / (trajectory if isinstance(trajectory, str) else trajectory.id)

    def ids(self) -> list[str]:
        """Ids of all trajectories that have a record."""
        return sorted(path.parent.name for path in self.root.glob("*/config.json"))

    def trajectory(self, id_: str, parent: Trajectory | None = None) -> Trajectory:
        """The configuration of a record; a UserError if it is absent or does not match its id.

        Its parent is read from its own record, unless it is the `parent` given.
        """
        path = self.folder(id_) / "config.json"
        values = _read_json(path)
        if values is None:
            raise UserError(f"no record {id_} in {self.root}")
        try:
            clients, options = values["fl"]["clients"], values["fl"].get("options", ())
            lists = {"clients": clients and tuple(clients), "options": tuple(map(tuple, options))}
            fl = FL(**values["fl"] | lists)  # JSON knows no tuples
            data, model = Data(**values["data"]), Model(**values["model"])
            if values["parent"] != (parent.id if parent else None):
                parent = self.trajectory(values["parent"]) if values["parent"] else None
            parts = {"data": data, "model": model, "fl": fl, "parent": parent}
            trajectory = Trajectory(**values | parts)
        except (KeyError, TypeError, UserError) as error:
            raise UserError(f"{path} is no configuration of a trajectory: {error}") from None
        if trajectory.id != id_:
            raise UserError(f"{path} does not match its id: it describes {trajectory.id}; "
                            "restore the file, or delete the folder to train anew")  # fmt: skip
        return trajectory

    def parent_id(self, id_: str) -> str | None:
        """The id of the record that a record's configuration names as its parent."""
        path = self.folder(id_) / "config.json"
        parent = (_read_json(path) or {}).get("parent", "")
        if parent is not None and not re.fullmatch(r"\w+-s\d+-[0-9a-f]{10}", str(parent)):
            raise UserError(f"{path} is no configuration of a trajectory")
        return parent

    def check(self, trajectory: Trajectory) -> None:
        """A UserError where a record does not match its id, lacks parts or was changed."""
        id_, folder = trajectory.id, self.folder(trajectory)
        begun = [(folder / name).exists() for name in ("config.json", "rounds.csv")]
        if id_ in self._checked or not any(begun):
            return
        if not begun[0]:
            raise UserError(f"{folder} lacks config.json; {_REMEDY}")
        self.trajectory(id_, trajectory.parent)
        result, done = self.result(trajectory), self.rounds_done(trajectory)  # it may just end
        if result is not None and done < trajectory.fl.rounds:
            raise UserError(f"{folder} lacks rounds of a complete record; {_REMEDY}")
        for name, digest in (result or {}).get("sha256", {}).items():
            file = folder / name
            if name != "result" and (not file.exists() or _digest(file) != digest):
                raise UserError(f"{file} is not as it was written; {_REMEDY}")
        last = self.checkpoint_path(trajectory, "last")
        if result is None and last.exists():
            about = self._read_checkpoint(last)[0]
            own = about.get("trajectory") == id_ and "round" in about
            if own and about.get("rows") != self._rows_digest(folder, int(about["round"])):
                raise UserError(f"rounds.csv or affinity.csv in {folder} is not as it was written; "
                                f"{_REMEDY}")  # fmt: skip
        self._checked.add(id_)

    def result(self, trajectory: Trajectory | str) -> dict[str, Any] | None:
        """The contents of result.json, not to be changed; None while it is not complete."""
        path = self.folder(trajectory) / "result.json"
        return _at(path, _result) if path.exists() else None

    def validation_losses(self, trajectory: Trajectory, last: bool = False) -> dict[str, float]:
        """By task, of the model with the lowest sum of them, or of the last round's."""
        best = self.result(trajectory)["best_round"]
        rows, end = self.rounds(trajectory), trajectory.fl.rounds if last else best
        (at,) = np.flatnonzero(rows["round"].to_numpy() == end - 1)
        return {a: float(rows[f"val_{a}"].to_numpy()[at]) for a in trajectory.tasks}

    def rounds(self, trajectory: Trajectory | str) -> pd.DataFrame:
        """rounds.csv as a table with one row a round, empty if there is none."""
        path = self.folder(trajectory) / "rounds.csv"
        return _at(path, _table).copy(deep=False) if path.exists() else pd.DataFrame({"round": []})

    def rounds_done(self, trajectory: Trajectory) -> int:
        """The round after the last recorded one (a trajectory's first round if there is none)."""
        path = self.folder(trajectory) / "rounds.csv"
        if not path.exists():
            return trajectory.start_round
        head, *rows = path.read_bytes().splitlines() or [b""]
        wanted = range(trajectory.start_round, trajectory.start_round + len(rows))
        whole = all(row.count(b",") == head.count(b",") for row in rows)
        if not whole or [row.split(b",")[0] for row in rows] != [b"%d" % r for r in wanted]:
            raise UserError(f"{path} is damaged (not one whole row a round); {_REMEDY}")
        return wanted.stop

    def affinities(self, trajectory: Trajectory | str) -> Affinities:
        """Every measured affinity of a trajectory; a UserError if none was measured."""
        path = self.folder(trajectory) / "affinity.csv"
        if not path.exists():
            raise UserError(f"no affinities in {path.parent}: train it with fl.measure_rounds > 0; "
                            f"if it was, {_REMEDY}")  # fmt: skip
        table = _at(path, _table)
        rounds = table["round"].unique()
        try:
            n = math.isqrt(len(table.columns) - 3)
            values = table.iloc[:, 3:].to_numpy(float).reshape(len(rounds), -1, n, n)
            clients, measurements = (table[name].to_numpy(int).reshape(values.shape[:2])
                                     for name in ("client", "measurements"))  # fmt: skip
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}); {_REMEDY}") from None
        return Affinities(rounds, clients, measurements, values)

    @contextlib.contextmanager
    def lock(self, trajectory: Trajectory) -> Iterator[None]:
        """Lock a trajectory for writing; the operating system frees it when the process dies."""
        folder = self.folder(trajectory)
        with self._writable(folder):
            held = filelock.FileLock(folder / "training.lock").acquire()
        with held:
            for left in folder.rglob("*.part"):  # by a process that was killed, or writes now
                with contextlib.suppress(FileNotFoundError):
                    if left.stat().st_mtime < time.time() - 3600:
                        left.unlink()
            yield

    # Writing; the caller holds the lock.

    def write_config(self, trajectory: Trajectory) -> None:
        text = json.dumps(trajectory.to_json(), indent=1) + "\n"
        self._write(self.folder(trajectory) / "config.json", text)

    def machines(self, trajectory: Trajectory | str) -> list[dict[str, Any]]:
        """Where each stretch of rounds was trained, from machines.json; [] in older records."""
        return _read_json(self.folder(trajectory) / "machines.json", list) or []

    def write_machines(self, trajectory: Trajectory, begin: int, where: dict[str, Any]) -> None:
        """Note that the rounds from `begin` on are trained at `where`."""
        before = [m for m in self.machines(trajectory) if m["from_round"] < begin]
        if not before or {"from_round": before[-1]["from_round"], **where} != before[-1]:
            before.append({"from_round": begin, **where})
        self._write(self.folder(trajectory) / "machines.json", json.dumps(before, indent=1) + "\n")

    def served_by(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory itself, or a complete record that differs only in having measured more.

        Measuring does not change the weights, so nothing is trained again without it.
        """
        if self.result(trajectory) is not None:
            return trajectory
        begin = f"{trajectory.tasks}-s{trajectory.seed}-"
        beside = os.listdir(self.root) if self.root.is_dir() else []  # a glob would be slow
        for id_ in sorted(name for name in beside if name.startswith(begin)):
            if not (self.root / id_ / "result.json").exists():
                continue
            other = self.trajectory(id_, trajectory.parent)
            fl, wanted = other.fl, trajectory.fl
            every = fl.affinity_every if wanted.measure_rounds else wanted.affinity_every
            same = replace(fl, measure_rounds=wanted.measure_rounds, affinity_every=every)
            if fl.measure_rounds >= wanted.measure_rounds and replace(other, fl=same) == trajectory:
                return other
        return trajectory

    def write_file(self, trajectory: Trajectory, name: str, content: bytes) -> None:
        """Write a file of a record from elsewhere, as it is."""
        self._write(self.folder(trajectory) / name, content)

    def write_rows(self, trajectory: Trajectory, name: str, rows: list[dict[str, Any]]) -> None:
        """The rows of rounds.csv or affinity.csv."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write(self.folder(trajectory) / name, text.getvalue())

    def write_result(self, trajectory: Trajectory, result: dict[str, Any]) -> None:
        folder = self.folder(trajectory)
        names = [name for name in ("rounds.csv", "affinity.csv") if (folder / name).exists()]
        own = {key: value for key, value in result.items() if key != "sha256"}
        digests = {name: _digest(folder / name) for name in names} | {"result": hash_json(own)}
        text = json.dumps(own | {"sha256": digests}, indent=1) + "\n"
        self._write(folder / "result.json", text)

    def read_rows(self, trajectory: Trajectory, name: str, until: int) -> list[dict[str, Any]]:
        """The rows of rounds.csv or affinity.csv before round `until`, as text."""
        path = self.folder(trajectory) / name
        if not path.exists():
            return []
        try:
            with path.open(newline="", encoding="utf-8") as file:
                return [row for row in csv.DictReader(file) if int(row["round"]) < until]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); {_REMEDY}") from None

    def checkpoint_path(self, trajectory: Trajectory, name: str) -> Path:
        return self.folder(trajectory) / "checkpoints" / f"{name}.safetensors"

    def checkpoints(self, trajectory: Trajectory) -> dict[int, Path]:
        """Kept states by the number of rounds trained: round_0030 is the state after round 29."""
        folder = self.folder(trajectory) / "checkpoints"
        return {int(p.stem[6:]): p for p in sorted(folder.glob("round_*.safetensors"))}

    def save_checkpoint(
        self, trajectory: Trajectory, name: str, state: State, round_: int, fingerprint: str
    ) -> None:
        """Write a state; its metadata say whose it is, after how many rounds, on which data."""
        from safetensors.torch import save

        tensors = {key: t.detach().cpu().contiguous() for key, t in state.items()}
        about = {"trajectory": trajectory.id, "round": str(round_), "data": fingerprint,
                 "sha256": _digest_of(tensors)}  # fmt: skip
        if name == "last":  # no result vouches for the rows yet
            about["rows"] = self._rows_digest(self.folder(trajectory), round_)
        self._write(self.checkpoint_path(trajectory, name), save(tensors, metadata=about))

    def load_checkpoint(
        self, trajectory: Trajectory, path: Path, like: State, fingerprint: str
    ) -> tuple[State, int]:
        """A state and its number of rounds; a UserError if the file is broken or of another."""
        remedy = _FROM_START.format(path.parent)
        about, state = self._read_checkpoint(path, "pt")
        network = ("encoder.", "decoders.")  # other entries belong to the method
        shapes = {k: t.shape for k, t in state.items() if k.startswith(network)}
        wanted = {k: t.shape for k, t in like.items() if k.startswith(network)}
        known = about.get("trajectory") == trajectory.id and {"round", "data"} <= about.keys()
        if not known or shapes != wanted:
            raise UserError(f"checkpoint {path} holds another network's weights; {remedy}")
        if about["data"] != fingerprint:
            raise UserError(f"{trajectory.id} was trained on data other than those in the data "
                            f"folder now; name their folder with --data, or {remedy}")  # fmt: skip
        if about.get("sha256", digest := _digest_of(state)) != digest:
            raise UserError(f"checkpoint {path} is not as it was written; {remedy}")
        return state, int(about["round"])

    def _read_checkpoint(self, path: Path, framework: str = "") -> tuple[dict[str, str], State]:
        """A checkpoint's metadata, and its tensors where a framework for them is named."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework=framework or "np") as file:
                names = file.keys() if framework else ()
                return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {path} cannot be read ({error}); "
                            f"{_FROM_START.format(path.parent)}") from None  # fmt: skip

    def _rows_digest(self, folder: Path, until: int) -> str:
        """SHA-256 of the rows of rounds.csv and affinity.csv before round `until`."""
        found = hashlib.sha256()
        for path in (folder / "rounds.csv", folder / "affinity.csv"):
            for line in path.read_bytes().splitlines(True) if path.exists() else ():
                number = line.partition(b",")[0]
                if not number.isdigit() or int(number) < until:
                    found.update(line)
        return found.hexdigest()

    @contextlib.contextmanager
    def _writable(self, folder: Path) -> Iterator[None]:
        """Makes a folder; a UserError for what the operating system refuses there."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise UserError(f"cannot write records under {self.results}: {error}") from None

    def _write(self, path: Path, content: str | bytes) -> None:
        with self._writable(path.parent):
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content.encode() if isinstance(content, str) else content)
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)  # gone if the rename was done
                raise


def results_folder(results: Path | str | None = None) -> Path:
    """The folder given, else results/ here, else the one beside the package in a clone."""
    places = [Path(results)] if results is not None else [Path("results"), BESIDE]
    return next((place for place in places if place.is_dir()), places[0])


def open_store(preset: str = "small", results: Path | str | None = None) -> Store:
    """The records of a preset in `results_folder`, which need not exist yet."""
    return Store(results_folder(results), preset)


@cache
def provenance() -> dict[str, Any]:
    """Versions and git revision of what is running; null where they cannot be told."""
    import torch

    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.check_output(
                ["git", *arguments], cwd=root, stderr=subprocess.DEVNULL, text=True, timeout=20
            ).strip()
        except (OSError, subprocess.SubprocessError):
            return None

    changes = git("status", "--porcelain", "--", "mas", "mas_core")
    version = None
    with contextlib.suppress(metadata.PackageNotFoundError):
        version = metadata.version("mas-core")
    return {
        "mas_core": version,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "git_revision": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_of(state: State) -> str:
    """SHA-256 of the values in order of their names: 10 ms for the full network on one core."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(state[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def _read_json(path: Path, kind: type = dict) -> Any:
    """The contents, None where there is no file; a UserError where they are no `kind`."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"{path} is not valid JSON: {error}; {_REMEDY}") from None
    if not isinstance(values, kind):
        raise UserError(f"{path} is damaged (no JSON {kind.__name__}); {_REMEDY}")
    return values


_known = lru_cache(maxsize=8192)(lambda path, read, *changed: read(path))


def _at(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a file; again only once the file has changed."""
    return _known(path, read, (about := path.stat()).st_mtime_ns, about.st_size)


def _result(path: Path) -> dict[str, Any]:
    result, letters = _read_json(path), path.parent.name.partition("-")[0]
    losses = [result.get(key) for key in ("test_best", "test_last")]
    if any(not isinstance(x, dict) or sorted(x) != sorted(letters) for x in losses):
        raise UserError(f"{path} is damaged (lacks losses of its tasks); {_REMEDY}")
    own = {key: value for key, value in result.items() if key != "sha256"}
    if result.get("sha256", {}).get("result", digest := hash_json(own)) != digest:
        raise UserError(f"{path} is not as it was written; {_REMEDY}")
    return result


def _table(path: Path) -> pd.DataFrame:
    """A CSV file with a column "round"; its values are shared, write into none."""
    try:
        table = pd.read_csv(path)
        if not pd.api.types.is_integer_dtype(table.get("round")):
            raise ValueError("no column of rounds")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {_REMEDY}") from None
    return table
