"""Faults of every kind against the package: kills, damaged files, senseless command lines.

    python -m tests.faults --minutes 10 [--seed 0]

Kills: `mas run` on two workers gets SIGTERM or SIGKILL at a random moment, up to three times; none
of its processes may be left, and what ends the run must have the same numbers as one never killed.

Damage: a file of the records, the checkpoints or the data is cut, emptied, flipped in a bit,
replaced by noise or by another type of JSON, doubled in a line or deleted; then something reads it.
It must say which file is wrong (of images: which view), or end with the numbers that an undamaged
run has.

Command lines: random options with random values. Each must end by itself or by SIGTERM, without a
traceback, and tell bad input in one line.

Prints what was tried and what failed; the exit status is 1 if anything did.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from mas.__main__ import main as mas

ROOT = Path(__file__).resolve().parents[1]
RUN = ["run", "mas", "--tasks", "sdn", "--preset", "smoke", "--set", "fl.rounds=6",
       "--set", "mas.merge_rounds=3", "--set", "mas.affinity_rounds=2", "--set", "data.size=16",
       "--set", "data.buildings=3", "--set", "data.views=20", "--device", "cpu"]  # fmt: skip
ROOMS = ["render", "--buildings", "3", "--views", "20", "--size", "16"]
VOCABULARY = {
    "commands": ("run plan status reproduce unpack campaign site render prepare demo"
                 " nothing").split(),
    "words": "mas one-by-one hoa tag figure_05_sdnkt figure_5 claims dk sdnkt small smoke".split(),
    "options": ("--tasks --splits --seed --seeds --preset --set --results --data --workers --device"
                " --threads --images-per-second --no-train --dry-run --slurm --dask --figures -p"
                " --timeout --budget --pack --out --root --size --views --buildings --heterogeneity"
                " --skip-broken --domains --table --help").split(),
    "values": ["", "0", "1", "-1", "3", "nan", "inf", "1e9", "99999999999999999999", "x", "é", "[",
               "*", "..", "/dev/null", "/proc", "a" * 300, "fl.lr=nan", "fl.rounds=-1", "fl=1",
               "data.size=x", "=", "a=b=c", "fl.method=os:system", "data.tasks=sys:path", "2s",
               "figures.zip", "out", "rgb", "sdnkterca", "seeds=[", "preset=smoke", "{}", "null"],
}  # fmt: skip


class Campaign:
    """A reference run in a scratch folder, the faults against copies of it, and what came out."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch, self.random = scratch, random.Random(seed)
        self.tried: Counter[str] = Counter()
        self.failed: list[str] = []
        self.sound = scratch / "sound"
        said = quiet([*ROOMS, "--out", str(self.sound / "data")])
        said += quiet([*RUN, *self._places(self.sound)])
        self.expected = numbers(self.sound / "results")
        assert len(self.expected) == 3, said
        self.files = sorted(p.relative_to(self.sound) for p in self.sound.rglob("*") if p.is_file()
                            and p.suffix != ".lock")  # fmt: skip

    def _places(self, folder: Path) -> list[str]:
        return ["--data", str(folder / "data"), "--results", str(folder / "results")]

    def _copy(self, name: str) -> Path:
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.sound, folder)
        return folder

    def _note(self, kind: str, what: str, wrong: str) -> None:
        self.tried[kind] += 1
        if wrong:
            self.failed.append(f"{kind}: {what}: {wrong}")
            print(self.failed[-1], flush=True)

    def kill(self) -> None:
        """A run on two workers that is killed, up to three times, and then left alone."""
        folder = self._copy("killed")
        shutil.rmtree(folder / "results")
        command = [*RUN, *self._places(folder), "--workers", "2"]
        what, wrong = [], ""
        for _ in range(self.random.randint(1, 3)):
            how = self.random.choice([signal.SIGTERM, signal.SIGKILL])
            after = self.random.uniform(0.2, 8.0)
            what.append(f"{how.name} after {after:.1f} s")
            process, mark = started(command)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(after)
            process.send_signal(how)
            err = process.communicate()[1]
            if how == signal.SIGTERM and "Traceback" in err:
                wrong = f"a traceback: {err[-300:]!r}"
            wrong = wrong or self._left(mark)
        process, mark = started(command)
        err = process.communicate()[1]
        if process.returncode:
            wrong = wrong or f"does not go on: {err[-300:]!r}"
        elif numbers(folder / "results") != self.expected:
            wrong = wrong or "ends with other numbers"
        self._note("kills", ", ".join(what), wrong or self._left(mark))

    def _left(self, mark: str) -> str:
        end = time.monotonic() + 20
        while found := marked(mark):
            if time.monotonic() > end:
                for process in found:
                    os.kill(process, signal.SIGKILL)
                return f"{len(found)} processes left after 20 s"
            time.sleep(0.1)
        return ""

    def damage(self) -> None:
        """A damaged file, and a command that reads it."""
        folder = self._copy("damaged")
        reads = self.random.choice(["status", "run", "go on", "go on", "prepare"])
        records, images = [f for f in self.files if f.parts[0] == "results"], self.files
        kinds = {f.suffix for f in self.files}
        images = [f for f in self.files if f.parts[0] == "data"
                  and (reads == "prepare") >= (f.suffix == ".png")]  # fmt: skip
        among = {"status": records, "run": records, "prepare": images}.get(reads, records + images)
        suffix = self.random.choice(sorted(kinds & {f.suffix for f in among}))
        path = folder / self.random.choice([f for f in among if f.suffix == suffix])
        if reads == "go on":  # the branches are to be trained, from the trunk's checkpoint
            for record in folder.glob("results/*/*"):
                if not record.name.startswith("sdn-") and record not in path.parents:
                    shutil.rmtree(record)
        how = self.random.choice(list(DAMAGES))
        DAMAGES[how](path, self.random)
        command = {"status": ["status", "--results", str(folder / "results")],
                   "prepare": ["prepare", "--root", str(folder / "data"), "--size", "16"],
                   }.get(reads, [*RUN, *self._places(folder)])  # fmt: skip
        status, err = self._in_process(command)
        wrong = ""
        if status == 0 and reads != "status" and path.name != "machines.json":
            if reads == "prepare":
                status, err = self._in_process([*RUN, *self._places(folder)])
            found = numbers(folder / "results")
            if status == 0 and {i: found.get(i) for i in self.expected} != self.expected:
                wrong = f"other numbers than before: {err[-400:]!r}"
        if status not in (0, 2):
            wrong = f"exit {status}: {err[-400:]!r}"
        elif status == 2 and not named(path, err):
            wrong = f"does not name the file: {err[-400:]!r}"
        self._note("damaged files", f"{how} {path.relative_to(folder)}, then {reads}", wrong)

    def _in_process(self, command: list[str]) -> tuple[int | str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                return mas(command), err.getvalue()
            except SystemExit as error:
                return error.code or 0, err.getvalue()
            except Exception as error:  # what a user would see as a traceback
                return f"{type(error).__name__}: {error}", err.getvalue()

    def command_line(self) -> None:
        """Random words after a command."""
        draw = self.random
        line = [draw.choice(VOCABULARY["commands"])]
        for _ in range(draw.randint(0, 5)):
            kind = draw.choice(["words", "options", "options"])
            line.append(draw.choice(VOCABULARY[kind]))
            if kind == "options":
                line.append(draw.choice(VOCABULARY[draw.choice(["words", "values", "values"])]))
        folder = self.scratch / "anywhere"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        beside = sorted(self.scratch.iterdir())
        process, mark = started(line, folder)
        wrong = ""
        try:
            err = process.communicate(timeout=15)[1]
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                err = process.communicate(timeout=30)[1]
            except subprocess.TimeoutExpired:
                process.kill()
                err, wrong = process.communicate()[1], "does not end by SIGTERM"
        last = (err.strip().splitlines() or [""])[-1]
        if "Traceback" in err:
            wrong = f"a traceback: {last!r}"
        elif process.returncode not in (0, 1, 2, 130):
            wrong = wrong or f"exit {process.returncode}: {last!r}"
        elif process.returncode == 2 and not re.match("mas[ a-z-]*: ", last):
            wrong = f"bad input is told as {last!r}"
        if sorted(self.scratch.iterdir()) != beside:
            wrong = "writes beside the folder it was called in"
        self._note("command lines", " ".join(map(repr, line)), wrong or self._left(mark))


def started(command: list[str], folder: Path = ROOT) -> tuple[subprocess.Popen, str]:
    """`mas` in a process of its own, and what marks it and all that it starts."""
    mark = f"MAS_FAULT={random.getrandbits(64):x}"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | dict([mark.split("=")]) | {"PYTHONPATH": paths}
    process = subprocess.Popen([sys.executable, "-m", "mas", *command], cwd=folder, text=True,
                               env=environment, stdin=subprocess.DEVNULL, errors="replace",
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    return process, mark


def marked(mark: str) -> list[int]:
    """The living processes with this mark, where /proc tells; elsewhere none."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found


def named(path: Path, err: str) -> bool:
    """Whether one message, with a line for each of several images, names a file or its folder."""
    view = path.name.partition("_domain_")[0]
    told = any(str(p) in err for p in (path, path.parent, path.parent.parent)) or (
        path.suffix == ".png" and f"{view}_domain_" in err
    )
    return told and len(re.findall("^mas: ", err, re.M)) == 1


def quiet(command: list[str]) -> str:
    process, _ = started(command)
    return "".join(process.communicate())


def numbers(results: Path) -> dict[str, tuple]:
    """By trajectory: losses of every round, affinities, test losses. Seconds and joules vary."""
    found = {}
    for config in results.glob("smoke/*/config.json"):
        rounds = pd.read_csv(config.with_name("rounds.csv"))
        kept = rounds.filter(regex="^(round$|train_|val_)")
        affinity, result = config.with_name("affinity.csv"), config.with_name("result.json")
        losses = json.loads(result.read_bytes()) if result.exists() else {}
        found[config.parent.name] = (kept.to_csv(), affinity.exists() and affinity.read_bytes(),
                                     losses.get("test_best"), losses.get("test_last"))  # fmt: skip
    return found


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _double(path: Path, draw: random.Random) -> None:
    lines = path.read_bytes().splitlines(True) or [b"\n"]
    path.write_bytes(b"".join(lines + [draw.choice(lines)]))


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "delete": lambda path, draw: path.unlink(),
    "empty": lambda path, draw: path.write_bytes(b""),
    "cut": lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size or 1)),
    "flip a bit of": _flip,
    "double a line of": _double,
    "noise in": lambda path, draw: path.write_bytes(draw.randbytes(200)),
    "a list in": lambda path, draw: path.write_text("[1, 2]"),
    "a number in": lambda path, draw: path.write_text("7"),
    "a half object in": lambda path, draw: path.write_text('{"tasks": "sdn", "seed": null}'),
}


def faults(seconds: float, seed: int = 0, rounds: int | None = None) -> Campaign:
    """All kinds in turns, at least once, for a time or some rounds: a kill and nine others each."""
    with tempfile.TemporaryDirectory(prefix="mas-faults-") as scratch:
        campaign, done = Campaign(Path(scratch), seed), 0
        end = time.monotonic() + seconds
        while done != rounds and (not done or time.monotonic() < end):
            campaign.kill()
            for _ in range(6):
                campaign.damage()
            for _ in range(3):
                campaign.command_line()
            done += 1
    return campaign


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    campaign = faults(60 * asked.minutes, asked.seed)
    tried = ", ".join(f"{n} {kind}" for kind, n in campaign.tried.items())
    print(f"tried: {tried}; failed: {len(campaign.failed)}")
    return 1 if campaign.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
