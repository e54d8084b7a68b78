"""Frozen configurations, the presets smoke | small | paper, and named random streams.

A `Trajectory` holds everything that determines a training run; its `id` is a hash of that. The
round at which a run is asked to stop is not part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np


class UserError(ValueError):
    """What was asked for cannot be done; the message says what is wrong and what is allowed."""


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """The random stream of `seed` named by what it is for: stream(0, "select", round)."""
    return np.random.Generator(np.random.PCG64(stream_seed(seed, *names)))


def stream_seed(seed: int, *names: str | int) -> int:
    """The 63-bit integer that seeds `stream(seed, *names)`, for generators that are not NumPy's."""
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


_hints = cache(get_type_hints)  # of a class; thousands of configurations are made to read a record


class Config:
    """Base of the frozen configurations: every field is checked when one is made."""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for f in fields(self):
            value, hint = getattr(self, f.name), hints[f.name]
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise UserError(
                    f"{f.name}={value!r}; allowed: {', '.join(map(str, get_args(hint)))}"
                )
            if hint is float and type(value) is int:
                object.__setattr__(self, f.name, float(value))  # 1 and 1.0 have one id
            elif hint in (int, float) and type(value) is not hint:
                kind = "a whole number" if hint is int else "a number"
                raise UserError(f"{f.name}={value!r} is not {kind}")
            low, high = f.metadata.get("range", (None, None))
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, int | float) or isinstance(number, bool):
                    continue
                if not math.isfinite(number) or (low is not None and not low <= number <= high):
                    raise UserError(f"{f.name}={value!r}; allowed: {low} to {high}")


def bounded(low: float, high: float, default: Any = dataclasses.MISSING) -> Any:
    """A field whose value (or each value, for a tuple) lies in [low, high]."""
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class Data(Config):
    """Which images, and how a building's views are split."""

    source: Literal["rooms", "taskonomy"] = "rooms"  # procedural rooms, or a Taskonomy folder
    size: int = bounded(16, 1024, 64)  # pixels, height and width of the prepared arrays
    buildings: int = bounded(1, 1000, 32)  # number of clients N
    views: int = bounded(1, 100_000, 96)  # rooms only: mean views a building (spread 1:4)
    render_seed: int = bounded(0, 2**31, 0)  # rooms only: which buildings
    heterogeneity: float = bounded(0.0, 1.0, 0.7)  # rooms only: 0 one style, 1 each its own
    split: Literal["points", "released"] = "points"  # disjoint by point, or the released slices
    split_seed: int = bounded(0, 2**31, 0)


@dataclass(frozen=True)
class Model(Config):
    """The network: see models.py for the channels of each size."""

    size: Literal["full", "half", "small", "tiny"] = "full"
    output_stride: int = bounded(2, 16, 16)  # input pixels per pixel of the shared features

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_stride not in (2, 4, 8, 16):
            raise UserError(f"output_stride={self.output_stride}; allowed: 2, 4, 8, 16")


@dataclass(frozen=True)
class FL(Config):
    """Federated training, with the paper's symbols and its defaults."""

    rounds: int = bounded(1, 100_000, 100)  # R, the length of the learning-rate schedule
    clients_per_round: int = bounded(1, 1000, 4)  # K
    local_epochs: int = bounded(1, 1000, 1)  # E
    batch_size: int = bounded(1, 4096, 64)  # B
    lr: float = bounded(0.0, 100.0, 0.1)  # eta
    lr_power: float = bounded(0.0, 10.0, 0.9)  # eta (1 - r/R)^lr_power
    momentum: float = bounded(0.0, 0.9999, 0.9)
    weight_decay: float = bounded(0.0, 1.0, 1e-4)
    method: Literal["fedavg", "fedprox", "gradnorm"] = "fedavg"
    prox_mu: float = bounded(0.0, 1e6, 0.0)  # FedProx: mu/2 |w - w_server|^2
    gradnorm_alpha: float = bounded(0.0, 100.0, 0.0)  # GradNorm: strength of the balancing
    gradnorm_lr: float = bounded(0.0, 100.0, 0.0)  # GradNorm: step of the loss weights
    encoder_grad_scale: Literal["none", "sqrt"] = "none"  # sqrt: encoder gradient / sqrt(n), n > 1
    clients: tuple[int, ...] | None = bounded(0, 1000, None)  # only these (standalone); None: all
    measure_rounds: int = bounded(0, 100_000, 0)  # affinities measured in rounds < this
    affinity_every: int = bounded(1, 100_000, 5)  # rho, batches between two measurements
    evaluate_every: int = bounded(1, 100_000, 5)  # rounds between two validations

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clients is not None and not self.clients:
            raise UserError("clients=(): name at least one client, or None for all")
        if self.clients and len(set(self.clients)) < len(self.clients):
            raise UserError(f"clients={self.clients}: a client is named twice")


@dataclass(frozen=True)
class Mas(Config):
    """What MAS and its relatives decide on top of a trajectory; not part of a trajectory's id."""

    merge_rounds: int = bounded(1, 100_000, 30)  # R0
    affinity_rounds: int = bounded(1, 100_000, 10)  # the split reads affinities of rounds < this
    affinity_at: Literal["mean", "last"] = "mean"  # their mean, or the last of these rounds alone
    lr_schedule: Literal["continue", "restart"] = "restart"  # after the split; released: restart


@dataclass(frozen=True)
class Settings(Config):
    """Everything a method needs besides the tasks and the seed."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    fl: FL = field(default_factory=FL)
    mas: Mas = field(default_factory=Mas)

    def __post_init__(self) -> None:
        allowed = self.data.buildings if self.fl.clients is None else len(self.fl.clients)
        if self.fl.clients_per_round > allowed:
            raise UserError(
                f"clients_per_round={self.fl.clients_per_round}, but there are {allowed} clients"
            )
        if self.fl.clients and max(self.fl.clients) >= self.data.buildings:
            raise UserError(
                f"client {max(self.fl.clients)} does not exist; "
                f"allowed: 0 to {self.data.buildings - 1}"
            )
        if self.data.size % self.model.output_stride:
            raise UserError(
                f"size={self.data.size} is no multiple of output_stride={self.model.output_stride}"
            )


_SMOKE = Settings(
    Data(size=32, buildings=6, views=40),
    Model("tiny", output_stride=4),
    FL(
        rounds=16,
        clients_per_round=2,
        batch_size=8,
        measure_rounds=16,
        affinity_every=4,
        evaluate_every=4,
    ),
    Mas(merge_rounds=4, affinity_rounds=3),
)
_SMALL = Settings(
    Data(size=32, buildings=32, views=96),
    Model("small", output_stride=4),
    FL(batch_size=8, measure_rounds=100),
)
_PAPER = Settings(
    Data("taskonomy", size=256, buildings=32),
    Model("full", output_stride=16),
    FL(measure_rounds=10, evaluate_every=1),
)
PRESETS = {"smoke": _SMOKE, "small": _SMALL, "paper": _PAPER}


def settings(
    preset: str, tasks: str = "sdnkt", overrides: dict[str, Any] | None = None
) -> Settings:
    """The settings of a preset for a task set, with `overrides` such as {"fl.local_epochs": 2}.

    In the paper preset sets of more than five tasks use the half-size network and batches of 32,
    and measure affinities in every round (the paper's Fig. 7).
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    if preset == "paper" and len(tasks) > 5:
        chosen = replace(
            chosen,
            model=replace(chosen.model, size="half"),
            fl=replace(chosen.fl, batch_size=32, measure_rounds=100),
        )
    return override(chosen, overrides or {})


def override(base: Settings, overrides: dict[str, Any]) -> Settings:
    """`base` with some fields changed; values may be text, as a command line gives them."""
    changes: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        part, _, name = key.partition(".")
        parts = [f.name for f in fields(base)]
        if part not in parts or not name:
            raise UserError(f"unknown setting {key!r}; it starts with one of: "
                            + ", ".join(f"{p}." for p in parts))  # fmt: skip
        hints = _hints(type(getattr(base, part)))
        if name not in hints:
            raise UserError(f"unknown setting {key!r}; {part} has: {', '.join(hints)}")
        changes.setdefault(part, {})[name] = _parse(key, value, hints[name])
    return replace(base, **{p: replace(getattr(base, p), **c) for p, c in changes.items()})


def _parse(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type of its field; text is read the way a command line means it."""
    if get_origin(hint) is Literal:
        return value
    if hint not in (int, float):  # clients: 0,3,5 or none
        if value is None or value == "none":
            return None
        items = value.split(",") if isinstance(value, str) else value
        return tuple(_parse(key, item, int) for item in items)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{key}={value!r} is not a number") from None
    if hint is int:
        if number != int(number) if math.isfinite(number) else True:
            raise UserError(f"{key}={value!r} is not a whole number")
        return int(number)
    return number


@dataclass(frozen=True)
class Trajectory:
    """A set of tasks trained round after round from a start: all that determines the weights.

    Rounds are counted from the very first start: a trajectory that starts from its parent at
    round 30 has 30 as its first round. Its learning rate in round r is
    lr (1 - (r - lr_from) / (fl.rounds - lr_from))^lr_power.
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
        """Plain data that determines the trajectory; the parent stands as its id."""
        return {
            "tasks": self.tasks,
            "seed": self.seed,
            "data": dataclasses.asdict(self.data),
            "model": dataclasses.asdict(self.model),
            "fl": dataclasses.asdict(self.fl),
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
        """eta (1 - r/R)^0.9, r counted from the start of the schedule (MAS, section 4.1)."""
        done = (round_ - self.lr_from) / (self.fl.rounds - self.lr_from)
        return self.fl.lr * (1.0 - done) ** self.fl.lr_power
