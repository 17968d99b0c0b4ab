"""Between dataclasses and plain JSON, by the types that their fields are annotated with.

Which class is made says the reader's own annotation, never what came.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import reprlib
import types
import typing
from typing import Any


def to_plain(value: Any) -> Any:
    """Dataclasses become objects of their fields, tuples lists, and a mapping's keys texts."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, collections.abc.Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def from_plain(hint: Any, value: Any) -> Any:
    """What :func:`to_plain` made ``value`` of, an instance of ``hint``.

    Raises:
        ValueError: it is none.
    """
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return from_plain(hint, value)
    if kind in (tuple, list) and isinstance(value, list):
        return kind(from_plain(arguments[0], item) for item in value)
    if kind in (dict, collections.abc.Mapping) and isinstance(value, dict):
        of_key, of_item = arguments
        return {_key(of_key, k): from_plain(of_item, item) for k, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _made(hint, value)
    if hint is float and type(value) in (int, float):
        return value
    if hint in (bool, int, str) and type(value) is hint:
        return value
    raise ValueError(f"expected {getattr(hint, '__name__', hint)}, got {reprlib.repr(value)}")


def _made(cls: Any, values: dict[str, Any]) -> Any:
    hints = _fields(cls)
    if values.keys() != hints.keys():
        odd = ", ".join(sorted(values.keys() ^ hints.keys()))
        raise ValueError(f"{cls.__name__} without, or with the unknown, {reprlib.repr(odd)}")
    return cls(**{name: from_plain(hints[name], item) for name, item in values.items()})


def _key(hint: Any, key: str) -> Any:
    return int(key) if hint is int else key


@functools.cache
def _fields(cls: Any) -> dict[str, Any]:
    """Name -> type; what ``__init__`` takes beside the fields is left out."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
