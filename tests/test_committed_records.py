"""Committed records stay what they were: every id, every file, to the bit."""

import hashlib
from pathlib import Path

import pytest

from mas_core.records.store import Store

RESULTS = Path(__file__).parent.parent / "results"
PINNED = Path(__file__).parent / "committed_records.txt"  # preset, id, digest of its files


def digest(folder: Path) -> str:
    """A hash of a record's files, their names included."""
    text = hashlib.sha256()
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.csv")):
        text.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return text.hexdigest()[:16]


def pinned() -> list[tuple[str, str, str]]:
    return [tuple(line.split()) for line in PINNED.read_text().splitlines()]


def test_every_pinned_record_is_there_unchanged():
    assert len(pinned()) >= 311
    changed = [id_ for preset, id_, was in pinned() if digest(RESULTS / preset / id_) != was]
    assert changed == []


@pytest.mark.parametrize("preset", sorted({preset for preset, _, _ in pinned()}))
def test_every_pinned_id_is_still_the_hash_of_its_configuration(preset):
    store = Store(RESULTS, preset)
    for of, id_, _ in pinned():
        if of == preset:
            assert store.trajectory(id_).id == id_


def pin() -> None:
    """Pin the records that are new: `python -m tests.test_committed_records`."""
    known = {(preset, id_) for preset, id_, _ in pinned()} if PINNED.exists() else set()
    new = [
        f"{path.parent.parent.name} {path.parent.name} {digest(path.parent)}\n"
        for path in sorted(RESULTS.glob("*/*/config.json"))
        if path.parent.parent.name != "smoke"
        and (path.parent.parent.name, path.parent.name) not in known
    ]
    with PINNED.open("a") as file:
        file.writelines(new)


if __name__ == "__main__":
    pin()
