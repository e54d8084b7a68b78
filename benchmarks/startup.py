"""Starting up: the command line's help and the first import, against importing PyTorch."""

import subprocess
import sys
from pathlib import Path
from statistics import median

from .timing import Row, compare, in_turns, main, wall

REFERENCE = 'python -c "import torch"'
COMMANDS = {
    "mas --help": ["-m", "mas", "--help"],
    "import mas_core": ["-c", "import mas_core"],
    "import mas_core.federated": ["-c", "import mas_core.federated"],
    REFERENCE: ["-c", "import torch"],
}
REACHES = {"mas --help": "under 1 s"}


def measure(quick: bool, folder: Path) -> list[Row]:
    def start(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    names = ["mas --help", REFERENCE] if quick else list(COMMANDS)
    actions = {name: lambda name=name: start(COMMANDS[name]) for name in names}
    seconds = in_turns(actions, 1 if quick else 3, wall)
    return [
        compare(seconds, name, REFERENCE, "time", REACHES.get(name, ""),
                f"{median(seconds[name]):.2f} s")
        for name in names
        if name != REFERENCE
    ]  # fmt: skip


if __name__ == "__main__":
    main(measure)
