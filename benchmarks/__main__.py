"""Run every benchmark, each in a fresh interpreter, and write results/benchmarks/<device>.json.

With names only those are run; the others keep their figures and their revision.

python -m benchmarks [NAME ...] [--quick] [--results DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from .timing import about

NAMES = (
    "affinity_cost", "small_step", "grouped_step", "evaluation", "splitting", "rendering",
    "affinity_agreement", "fl_loop", "method_cost", "rival_cost", "data_loading", "startup",
    "workers", "peers",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="smallest shapes, one repeat")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--data", type=Path, help="where images are rendered; default: thrown away")
    asked = parser.parse_args(arguments)
    unknown = set(asked.names) - set(NAMES)
    if unknown:
        parser.error(f"unknown benchmark {min(unknown)!r}; allowed: {', '.join(NAMES)}")
    told, found, failed = about("cpu"), {}, []
    path = asked.results / "benchmarks" / f"{told['slug']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() and asked.names else {}
    if known.get("quick") == asked.quick:  # some are run again, the others keep their revision
        found = known["subjects"]
        revisions = known.get("revisions") or dict.fromkeys(found, known["git_revision"])
    else:
        revisions = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in asked.names or NAMES:
            print(f"\n{name}", flush=True)
            rows = Path(scratch, f"{name}.json")
            command = [sys.executable, "-m", f"benchmarks.{name}", "--json", rows,
                       "--data", asked.data or scratch, *["--quick"] * asked.quick]  # fmt: skip
            if subprocess.run(command).returncode:
                failed.append(name)
            else:
                found[name] = json.loads(rows.read_text())
                revisions[name] = told["git_revision"]
            record = {**told, "quick": asked.quick, "revisions": revisions, "subjects": found}
            path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
