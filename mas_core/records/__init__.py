"""Trajectories remembered: what determines one, its record, training it to a round, its cost.

`mas_core.records("small")` is the table of them, a row each (`tables.records`).
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """The folder's name is also the word that a reader looks for the table under."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from .tables import records

        return records(*arguments, **named)


sys.modules[__name__].__class__ = _Callable
