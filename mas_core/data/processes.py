"""Worker processes on this machine, and how they end with the one that started them."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path

from ..config import UserError


def local_workers(workers: int) -> ProcessPoolExecutor:
    """Processes on this machine, each a fresh interpreter (CUDA allows no fork).

    They leave Ctrl-C to the process that started them, which tells the user once, and end when it
    dies, however it dies. A UserError in a script that each of them would run again.
    """
    main = sys.modules["__main__"]
    script = Path(getattr(main, "__file__", None) or "")
    if main.__spec__ is None and script.is_file():  # a fresh interpreter imports the script first
        text = script.read_text(errors="replace")
        if not re.search(r"__name__|current_process|parent_process", text):
            raise UserError(f"{script.name} starts worker processes, which would all run it again: "
                            'write what it does under if __name__ == "__main__":')  # fmt: skip
    return ProcessPoolExecutor(workers, get_context("spawn"), _begin)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)  # in the middle of whatever it does, as by a kill
