"""mas: the reproduction of the paper on top of `mas_core`: experiments, runs, records as tables.

`import mas` gives all names of `mas_core`, and those below. Names are loaded when they are first
used, so that `mas --help` does not wait for PyTorch.
"""

from importlib import import_module

import mas_core

_HOME = {
    "results": "mas.paper.tables",
    "records": "mas.frames",
    "rounds": "mas.frames",
    "affinities": "mas.frames",
}
_MODULES = {
    "clients": "mas_core.data.clients",
    "cost": "mas_core.records.cost",
    "rooms": "mas_core.data.rooms",
    "experiments": "mas.paper.experiments",
    "verdicts": "mas.paper.verdicts",
    "engine": "mas.run.engine",
}
__all__ = sorted({*_HOME, *_MODULES, *mas_core.__all__})


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in mas_core.__all__:
        return getattr(mas_core, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
