"""Settings, checked when they are made, the presets, and named random streams."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from dataclasses import field, fields, replace
from importlib import import_module
from typing import Annotated, Any, Literal, get_args, get_type_hints

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass


class UserError(ValueError):
    """What was asked for cannot be done; the message says what is wrong and what is allowed."""


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """The random stream of `seed` named by what it is for: stream(0, "select", round)."""
    return np.random.Generator(np.random.PCG64(stream_seed(seed, *names)))


def stream_seed(seed: int, *names: str | int) -> int:
    """The 63-bit integer that seeds `stream(seed, *names)`, for generators that are not NumPy's."""
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _settings(cls: type) -> type:
    """A frozen dataclass that pydantic checks strictly; what it refuses is a UserError."""
    made = dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))(cls)
    validated, names = made.__init__, [f.name for f in fields(made)]

    @functools.wraps(validated)
    def __init__(self, *args: Any, **values: Any) -> None:
        try:
            validated(self, **dict(zip(names, args)), **values)
        except ValidationError as error:
            raise UserError(_in_a_line(error)) from None

    made.__init__ = __init__
    return made


def _in_a_line(error: ValidationError) -> str:
    """What pydantic found, one setting after the other: name, value, what is allowed."""
    found = []
    for e in error.errors(include_url=False):
        name = ".".join(str(part) for part in e["loc"] if isinstance(part, str | int))
        text = e["msg"].removeprefix("Value error, ").removeprefix("Input ")
        found.append(f"{name}={e['input']!r}: {text}" if name else text)
    return "; ".join(found)


Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Round = Annotated[int, Field(ge=0, le=100_000)]
Strength = Annotated[FiniteFloat, Field(ge=0, le=1e6)]
RULES = {  # fl.method -> what a client or the server does differently; rivals stand outside
    "fedavg": "mas_core.fedavg:FedAvg",
    "fedprox": "mas.rivals.fedprox:FedProx",
    "gradnorm": "mas.rivals.gradnorm:GradNorm",
    "famo": "mas.rivals.famo:FAMO",
    "cagrad": "mas.rivals.cagrad:CAGrad",
    "pcgrad": "mas.rivals.pcgrad:PCGrad",
    "selective": "mas.rivals.selective:Selective",
    "fedem": "mas.rivals.fedem:FedEM",  # with model.size="mas_core.rules.fedem:small", see MOVED
    "two_widths": "mas.rivals.two_widths:TwoWidths",
    "label_holders": "mas.rivals.label_holders:LabelHolders",
    "update_selection": "mas.rivals.update_selection:UpdateSelection",
    "matfl": "mas.rivals.matfl:MaTFL",  # with model.size="mas.rivals.client_kinds:small_1"
    "fedhca2": "mas.rivals.fedhca2:FedHCA2",  # likewise
}
MOVED = {"mas_core.rules.fedem": "mas.rivals.fedem"}  # modules named on record, where they are now
MEASURES = ("lookahead", "first_order", "representation", "cosine")  # see affinity.py


def _one_of(*names: str) -> Any:
    """One of these names, or something outside the package, as "my_module:my_name"."""

    def check(name: str) -> str:
        if name not in names and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
            raise ValueError(f"allowed: {', '.join([*names, 'my_module:my_name'])}")
        return name

    return Annotated[str, AfterValidator(check)]


def outside(name: str, kind: type | None = None) -> Any:
    """What "my_module:my_name" names, imported; a UserError where it cannot be, or is no `kind`."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(MOVED.get(module, module)), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name!r} cannot be imported: {error}") from None
    if kind and not isinstance(found, kind):
        raise UserError(f"{name!r} is {found!r:.60}, no {kind.__name__}")
    return found


@_settings
class Data:
    """Which images, which labels, and how a building's views are split."""

    # Procedural rooms, a Taskonomy folder, or a function (data, folder, letters) -> Clients.
    source: _one_of("rooms", "taskonomy") = "rooms"
    size: Annotated[int, Field(ge=16, le=1024)] = 64  # pixels, height and width
    buildings: Annotated[int, Field(ge=1, le=1000)] = 32  # number of clients N
    views: Count = 96  # rooms only: mean views a building (spread 1:4)
    render_seed: Annotated[int, Field(ge=0, le=2**31)] = 0  # rooms only: which buildings
    heterogeneity: Share = 0.7  # rooms only: 0 one style, 1 each its own
    split: Literal["points", "released"] = "points"  # disjoint by point, or the released slices
    split_seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    tasks: _one_of() = "mas_core.tasks:TASKS"  # the table that the task letters refer to


@_settings
class Model:
    """The network: see models.py for the channels of each size."""

    # A size of the paper's network, or a function (letters, model, seed, table) -> network.
    size: _one_of("full", "half", "small", "tiny") = "full"
    output_stride: int = 16  # input pixels per pixel of the shared features
    width: Annotated[FiniteFloat, Field(ge=0.1, le=1)] = 1.0  # share of the encoder's channels

    def __post_init__(self) -> None:
        if self.output_stride not in (2, 4, 8, 16):
            raise UserError(f"output_stride={self.output_stride}; allowed: 2, 4, 8, 16")


@_settings
class FL:
    """Federated training, with the paper's symbols and its defaults."""

    rounds: Count = 100  # R, the length of the learning-rate schedule
    clients_per_round: Annotated[int, Field(ge=1, le=1000)] = 4  # K
    local_epochs: Annotated[int, Field(ge=1, le=1000)] = 1  # E
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 64  # B
    lr: Annotated[FiniteFloat, Field(ge=0, le=100)] = 0.1  # eta
    lr_power: Annotated[FiniteFloat, Field(ge=0, le=10)] = 0.9  # eta (1 - r/R)^lr_power
    momentum: Annotated[FiniteFloat, Field(ge=0, le=0.9999)] = 0.9
    weight_decay: Share = 1e-4
    method: _one_of(*RULES) = "fedavg"
    prox_mu: Strength = 0.0  # FedProx: mu/2 |w - w_server|^2
    gradnorm_alpha: Annotated[FiniteFloat, Field(ge=0, le=100)] = 0.0  # strength of the balancing
    gradnorm_lr: Annotated[FiniteFloat, Field(ge=0, le=100)] = 0.0  # step of the loss weights
    encoder_grad_scale: Literal["none", "sqrt"] = "none"  # sqrt: encoder gradient / sqrt(n), n > 1
    # Only these clients (standalone); None: all.
    clients: tuple[Annotated[int, Field(ge=0, le=1000)], ...] | None = None
    measure_rounds: Round = 0  # affinities measured in rounds < this
    affinity_every: Count = 5  # rho, batches between two measurements
    evaluate_every: Count = 5  # rounds between two validations
    lr_schedule: Literal["power", "cosine"] = "power"  # cosine: eta (1 + cos(pi r/R)) / 2
    # What is measured as affinity: Eq. 3, a cheaper variant, or a function like these.
    affinity: _one_of(*MEASURES) = "lookahead"
    options: tuple[tuple[str, FiniteFloat], ...] = ()  # numbers of a method, by name
    # grouped: a round's clients side by side where that can be (grouped.py); equal to rounding.
    arithmetic: Literal["single", "grouped"] = "single"

    def __post_init__(self) -> None:
        if self.clients is not None and not self.clients:
            raise UserError("clients=(): name at least one client, or None for all")
        if self.clients and len(set(self.clients)) < len(self.clients):
            raise UserError(f"clients={self.clients}: a client is named twice")

    def rate(self, round_: int, begin: int = 0) -> float:
        """The learning rate of a round, of a schedule that begins at round `begin`.

        eta (1 - r/R)^0.9 (MAS, section 4.1), or eta (1 + cos(pi r/R)) / 2.
        """
        done = (round_ - begin) / (self.rounds - begin)
        if self.lr_schedule == "cosine":
            return self.lr * (1.0 + math.cos(math.pi * done)) / 2.0
        return self.lr * (1.0 - done) ** self.lr_power


@_settings
class Mas:
    """What MAS decides on top of a trajectory; not part of a trajectory's id."""

    merge_rounds: Count = 30  # R0
    affinity_rounds: Count = 10  # the split reads affinities of rounds < this
    affinity_at: Literal["mean", "last"] = "mean"  # their mean, or the last of these rounds alone
    lr_schedule: Literal["continue", "restart"] = "restart"  # after the split; released: restart


@_settings
class Tag:
    """What TAG decides."""

    affinity_rounds: Count | None = None  # its grouping reads rounds < this; None: all it trained


@_settings
class Choice:
    """Which losses choose HOA's groups, and the group of a task that is in several (TAG, HOA)."""

    by: Literal["validation", "test"] = "validation"  # the paper: test


@_settings
class Settings:
    """Everything a method needs besides the tasks and the seed."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    fl: FL = field(default_factory=FL)
    mas: Mas = field(default_factory=Mas)
    tag: Tag = field(default_factory=Tag)
    choice: Choice = field(default_factory=Choice)

    def __post_init__(self) -> None:
        fl = self.fl
        needed = {"fedprox": fl.prox_mu, "gradnorm": fl.gradnorm_alpha * fl.gradnorm_lr}
        if not needed.get(fl.method, 1):
            numbers = {"fedprox": "prox_mu"}.get(fl.method, "gradnorm_alpha and fl.gradnorm_lr")
            raise UserError(f"method={fl.method} needs fl.{numbers} above 0")
        N, size, stride = self.data.buildings, self.data.size, self.model.output_stride
        there, K = len(fl.clients or range(N)), fl.clients_per_round
        if there < K:
            raise UserError(f"clients_per_round={K}, but there are {there} clients")
        if fl.clients and max(fl.clients) >= N:
            raise UserError(f"client {max(fl.clients)} does not exist; allowed: 0 to {N - 1}")
        if size == stride and fl.batch_size == 1:
            raise UserError(f"batch_size=1 with size={size} and output_stride={stride}: one "
                            "feature pixel a batch has no variance; allowed: batches of 2 and "
                            "more")  # fmt: skip
        if size % stride:
            raise UserError(f"size={size} is no multiple of output_stride={stride}")


_SMOKE = Settings(
    Data(size=32, buildings=6, views=40),
    Model("tiny", output_stride=4),
    FL(rounds=16, clients_per_round=2, batch_size=8, measure_rounds=16, affinity_every=4,
       evaluate_every=4),
    Mas(merge_rounds=4, affinity_rounds=3),
)  # fmt: skip
_SMALL = Settings(Data(size=32, buildings=32, views=96), Model("small", output_stride=4),
                  FL(batch_size=8, measure_rounds=100))  # fmt: skip
_MEDIUM = replace(_SMALL, data=replace(_SMALL.data, views=480),
                  fl=replace(_SMALL.fl, arithmetic="grouped"))  # fmt: skip
_PAPER = Settings(
    Data("taskonomy", size=256, buildings=32),
    Model("full", output_stride=16),
    FL(measure_rounds=10, evaluate_every=1),
)
PRESETS = {"smoke": _SMOKE, "small": _SMALL, "medium": _MEDIUM, "paper": _PAPER}


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
    """`base` with some fields changed; values may be text, as a command line gives them.

    Write several numbers as 0,3,5, options as alpha:0.5,beta:2, and no value as none.
    """
    changes: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        part, _, name = key.partition(".")
        parts = [f.name for f in fields(base)]
        if part not in parts or not name:
            raise UserError(f"unknown setting {key!r}; it starts with one of: "
                            + ", ".join(f"{p}." for p in parts))  # fmt: skip
        hints = get_type_hints(type(getattr(base, part)), include_extras=True)
        if name not in hints:
            raise UserError(f"unknown setting {key!r}; {part} has: {', '.join(hints)}")
        changes.setdefault(part, {})[name] = _read(key, value, hints[name])
    return replace(base, **{p: replace(getattr(base, p), **c) for p, c in changes.items()})


def _read(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type of its field; text is read the way a command line means it."""
    if value == "none" and type(None) in get_args(hint):
        value = None
    elif isinstance(value, str) and "tuple" in str(hint):
        value = [item.split(":") if ":" in item else item for item in value.split(",") if item]
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reasons = (e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise UserError(f"{key}={value!r}: {', or '.join(dict.fromkeys(reasons))}") from None
