"""mas_core: merge federated tasks into one, measure their affinities, split, continue.

The method of MAS: Towards Resource-Efficient Federated Multiple-Task Learning (ICCV 2023), with the
data and the records it needs. Names are loaded when they are first used.
"""

from importlib import import_module

_HOME = {
    "best_split": "split",
    "best_splits": "split",
    "self_affinity": "split",
    "lookahead_affinity": "affinity",
    "MultiTaskNet": "models",
    "merge": "models",
    "open_store": "records.store",
    "open_data": "data.clients",
    "settings": "config",
    "UserError": "config",
    "Study": "records.study",
    "TASKS": "tasks",
    "TASK_SETS": "tasks",
}
_MODULES = ("affinity", "config", "federated", "local", "methods", "models", "split", "tasks")
__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
