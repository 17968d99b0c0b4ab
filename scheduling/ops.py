"""The instruction set: what a schedule is made of, and its text form, which parses back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class LoadWeights:
    """``slot = weights[layer]``, for use from ``step`` on."""

    step: int
    layer: int

    def __str__(self) -> str:
        return f"LoadWeights(step={self.step}, layer={self.layer})"


@dataclasses.dataclass(frozen=True, slots=True)
class FreeWeights:
    """``release(slot of weights[layer])``"""

    layer: int

    def __str__(self) -> str:
        return f"FreeWeights(layer={self.layer})"


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """What an op of one step, layer and batch has."""

    step: int
    layer: int
    batch: int

    def __str__(self) -> str:
        return f"{type(self).__name__}(step={self.step}, layer={self.layer}, batch={self.batch})"


class LoadCache(Cell):
    """``device_cache = cache[layer][batch]``, as ``step`` - 1 left it."""

    __slots__ = ()


class StoreCache(Cell):
    """``cache[layer][batch] = device_cache``, with the keys and values of ``step``."""

    __slots__ = ()


class LoadHidden(Cell):
    """``device_hidden = hidden[batch]``, the input of ``layer`` (tokens, for the first)."""

    __slots__ = ()


class StoreHidden(Cell):
    """``hidden[batch] = device_hidden``, the output of ``layer`` (tokens, of the last)."""

    __slots__ = ()


class Project(Cell):
    """``query, new_keys_and_values = before_attention(weights, device_hidden)``

    Of a step of one new token per row; of rows that begin, the Compute does it.
    """

    __slots__ = ()


class Attend(Cell):
    """``attended = attention(query, new_keys_and_values, cache)``, beside what the device does"""

    __slots__ = ()


class Compute(Cell):
    """``device_hidden, device_cache = layer(weights, device_hidden, device_cache)``

    Behind a Project and an Attend of the same step, layer and batch: what is left of it.
    """

    __slots__ = ()


@dataclasses.dataclass(frozen=True, slots=True)
class LoadChosen:
    """``slot = weights[layer]``, of the experts that any token of ``batches`` has chosen"""

    step: int
    layer: int
    batches: tuple[int, ...]

    def __str__(self) -> str:
        return _of_batches(self)


@dataclasses.dataclass(frozen=True, slots=True)
class ComputeExperts:
    """``device_hidden[batches] += experts(weights, those tokens of batches that chose them)``"""

    step: int
    layer: int
    batches: tuple[int, ...]

    def __str__(self) -> str:
        return _of_batches(self)


def _of_batches(op: LoadChosen | ComputeExperts) -> str:
    batches = ", ".join(map(str, op.batches))
    return f"{type(op).__name__}(step={op.step}, layer={op.layer}, batches=[{batches}])"


@dataclasses.dataclass(frozen=True, slots=True)
class Barrier:
    """wait until everything above is done, or everything of one stage"""

    stage: int | None = None

    def __str__(self) -> str:
        return "Barrier()" if self.stage is None else f"Barrier(stage={self.stage})"


Op = (
    LoadWeights
    | FreeWeights
    | LoadCache
    | StoreCache
    | LoadHidden
    | StoreHidden
    | Project
    | Attend
    | Compute
    | LoadChosen
    | ComputeExperts
    | Barrier
)
PARTS = (Project, Attend)
OF_BATCHES = (LoadChosen, ComputeExperts)

_KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    kind.__name__: (kind, fields)
    for kind, fields in (
        (LoadWeights, ("step", "layer")),
        (FreeWeights, ("layer",)),
        (LoadCache, ("step", "layer", "batch")),
        (StoreCache, ("step", "layer", "batch")),
        (LoadHidden, ("step", "layer", "batch")),
        (StoreHidden, ("step", "layer", "batch")),
        (Project, ("step", "layer", "batch")),
        (Attend, ("step", "layer", "batch")),
        (Compute, ("step", "layer", "batch")),
        (LoadChosen, ("step", "layer", "batches")),
        (ComputeExperts, ("step", "layer", "batches")),
        (Barrier, ("stage",)),
    )
}
_CALL = re.compile(r"(\w+)\s*\((.*)\)")
_FIELD = re.compile(r"(\w+)\s*=\s*(-?[0-9]+|\[[0-9, ]*\])")
_COMMA = re.compile(r",(?![^\[]*\])")  # not within brackets


def parse_op(text: str) -> Op:
    """Reads what ``str(op)`` wrote.

    Raises:
        ValueError: what was expected, and what came.
    """
    call = _CALL.fullmatch(text.strip())
    if call is None or call[1] not in _KINDS:
        raise ValueError(f"expected an op ({', '.join(_KINDS)}) with its fields, got {text!r}")
    kind, fields = _KINDS[call[1]]
    parts = _COMMA.split(call[2]) if call[2].strip() else []
    found = [_FIELD.fullmatch(part.strip()) for part in parts]
    values = {field[1]: _value(field[2]) for field in found if field is not None}
    optional = kind is Barrier and not parts
    lists = [name for name, value in values.items() if isinstance(value, tuple)]
    if (
        len(values) != len(parts)
        or (tuple(values) != fields and not optional)
        or lists != [name for name in fields if name == "batches"]
    ):
        forms = (f"{n}={'[<numbers>]' if n == 'batches' else '<number>'}" for n in fields)
        wanted = f"{call[1]}({', '.join(forms)})"
        either = "Barrier() or " if kind is Barrier else ""
        raise ValueError(f"expected {either}{wanted}, got {text!r}")
    made: Op = kind(**values)
    return made


def _value(text: str) -> int | tuple[int, ...]:
    if not text.startswith("["):
        return int(text)
    return tuple(int(number) for number in text[1:-1].split(",") if number.strip())


def format_schedule(ops: Iterable[Op]) -> str:
    """One op a line."""
    return "".join(f"{op}\n" for op in ops)


def parse_schedule(text: str) -> list[Op]:
    """The inverse of :func:`format_schedule`; blank lines and ``#`` comments are passed over.

    Raises:
        ValueError: names the line.
    """
    ops = []
    for number, line in enumerate(text.splitlines(), 1):
        code = line.partition("#")[0].strip()
        if code:
            try:
                ops.append(parse_op(code))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return ops
