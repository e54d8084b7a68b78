"""A trajectory: everything that determines a training run, and the id that is a hash of it.

The round at which a run is asked to stop is not part of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ..config import FL, Data, Model


@dataclass(frozen=True)
class Trajectory:
    """A set of tasks trained round after round from a start: all that determines the weights.

    Rounds are counted from the very first start: a trajectory that starts from its parent at
    round 30 has 30 as its first round. Its learning rate in round r is `fl.rate(r, lr_from)`.
    """

    tasks: str  # letters, in the order of the tasks table
    seed: int
    data: Data
    model: Model
    fl: FL
    parent: Trajectory | None = None  # whose weights it starts from; None: initial weights
    start_round: int = 0  # the parent's round it starts at
    lr_from: int = 0  # first round of the learning-rate schedule

    def to_json(self) -> dict[str, Any]:
        """Plain data that determines the trajectory; the parent is named by its id."""
        return {
            "tasks": self.tasks,
            "seed": self.seed,
            **{name: {f.name: getattr(part, f.name) for f in fields(part)}
               for name, part in (("data", self.data), ("model", self.model), ("fl", self.fl))},
            "parent": self.parent.id if self.parent else None,
            "start_round": self.start_round,
            "lr_from": self.lr_from,
        }

    @cached_property  # a driver asks for it thousands of times a round
    def id(self) -> str:
        """Tasks, seed and a hash of what differs from the defaults, like sdnkt-s0-4f1c09ab83.

        A field that is added later, with a default that means what was done before, leaves the ids
        of old records alone; the default of an existing field must never change.
        """
        values = self.to_json()
        for part in (self.data, self.model, self.fl):
            name = type(part).__name__.lower()
            values[name] = {
                f.name: values[name][f.name]
                for f in fields(part)
                if getattr(part, f.name) != f.default
            }
        text = json.dumps(values, sort_keys=True)
        return f"{self.tasks}-s{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def lr(self, round_: int) -> float:
        """The learning rate of a round, counted from the start of the schedule."""
        return self.fl.rate(round_, self.lr_from)
