"""The form that an answer is to have, in vLLM's names: JSON, a regular expression, a choice."""

from __future__ import annotations

import dataclasses
import json as json_text
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CHOICES = 10_000
# vLLM's older names, which are fields of a line: the name here.
_GUIDED = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar")}
ALIASES = ("response_format", *_GUIDED)
_ANY_OBJECT = '{"type": "object"}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form of an answer; exactly one of these.

    Attributes:
        json: A JSON schema that the answer fits: a mapping, or its text, which is what is kept.
        regex: A regular expression that the whole answer matches, in Rust's syntax.
        choice: Texts, of which the answer is one.
        grammar: A context-free grammar, in the syntax of Lark that ``llguidance`` reads, or GBNF.
        json_object: Any JSON object.
        structural_tag: Text in which JSON may come, between a beginning and an end, as calls of
            tools do: ``{"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}``. What
            follows a trigger, with which each beginning begins, is one of the structures.

    Raises:
        ValueError: none of them, several, or one in a form that it cannot have.
    """

    json: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise ValueError(
                "structured_outputs needs exactly one of json, regex, choice, grammar, json_object "
                f"and structural_tag, got {', '.join(given) or 'none'}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choice(self.choice))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"structured_outputs: {name} must be a text, got {value!r}")
        if self.structural_tag is not None:
            object.__setattr__(self, "structural_tag", _tag(self.structural_tag))
        if self.json_object not in (None, True):
            raise ValueError(
                f"structured_outputs: json_object must be true, got {self.json_object!r}"
            )

    @classmethod
    def of(cls, value: Any) -> StructuredOutputsParams:
        """Of a mapping with its fields, as JSON has it, where null is as good as nothing.

        Raises:
            ValueError: as the class; or unknown fields.
        """
        if isinstance(value, cls):
            return value
        known = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(value, Mapping):
            raise ValueError(
                f"structured_outputs must be an object with one of {', '.join(known)}, got "
                f"{value!r}"
            )
        if unknown := sorted(map(str, set(value) - set(known))):
            raise ValueError(
                f"structured_outputs: unknown field {unknown[0]!r}; known: {', '.join(known)}"
            )
        return cls(**value)

    @property
    def schema(self) -> str | None:
        """The JSON schema as a text, if it is one."""
        return _ANY_OBJECT if self.json_object else self.json


def _schema(value: Any) -> str:
    if not isinstance(value, (str, Mapping, bool)):
        raise ValueError(f"a JSON schema must be an object or its text, got {value!r}")
    try:
        schema = json_text.loads(value) if isinstance(value, str) else value
        text = json_text.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the JSON schema is not JSON: {error}") from error
    if not isinstance(schema, (Mapping, bool)):
        raise ValueError(f"a JSON schema must be an object, got {schema!r}")
    return text


def _tag(value: Any) -> str:
    """As a text, checked."""
    try:
        tag = json_text.loads(value) if isinstance(value, str) else value
        structures, triggers = tag["structures"], tag["triggers"]
        if unknown := set(tag) - {"type", "structures", "triggers"}:
            raise ValueError(f"unknown field {min(unknown)!r}")
        for structure in structures:
            schema = json_text.loads(_schema(structure["schema"]))
            begin, end = structure["begin"], structure["end"]
            if not isinstance(begin, str) or not isinstance(end, str):
                raise ValueError("begin and end must be texts")
            if trigger_of(begin, triggers) is None:
                raise ValueError(f"no trigger begins {begin!r}")
            if unknown := set(structure) - {"begin", "schema", "end"}:
                raise ValueError(f"unknown field {min(unknown)!r}")
            if not isinstance(schema, dict):
                raise ValueError("a schema must be an object")
        if not structures:
            raise ValueError("it has no structures")
        return json_text.dumps(tag, allow_nan=False)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            "structural_tag must be an object with a list of structures, each with begin, schema "
            f"and end, and a list of triggers: {why}"
        ) from error


def trigger_of(begin: str, triggers: Sequence[str]) -> str | None:
    """Which of ``triggers`` it begins with: the longest."""
    return max((t for t in triggers if t and begin.startswith(t)), key=len, default=None)


def _choice(value: Any) -> tuple[str, ...]:
    fits = isinstance(value, (list, tuple)) and 0 < len(value) <= MAX_CHOICES
    if not fits or not all(isinstance(text, str) and text for text in value):
        raise ValueError(
            f"choice must be a list of 1 to {MAX_CHOICES} texts that are not empty, got "
            f"{str(value)[:60]}"
        )
    return tuple(value)


def without_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` of a line with ``structured_outputs`` in the place of its other names.

    Those are OpenAI's ``response_format``, and ``guided_json`` and the like.

    Raises:
        ValueError: several of them, or a ``response_format`` of another kind.
    """
    found = dict(values)
    given = {name: value for name in ALIASES if (value := found.pop(name, None)) is not None}
    if found.get("structured_outputs") is not None:
        given["structured_outputs"] = found["structured_outputs"]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} say both what form an answer has: give one")
    for name, value in given.items():
        if name in _GUIDED:
            found["structured_outputs"] = {_GUIDED[name]: value}
        elif name == "response_format":
            found["structured_outputs"] = _of_response_format(value)
    return found


def _of_response_format(value: Any) -> dict[str, Any] | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        described = value.get("json_schema")
        if not isinstance(described, Mapping) or described.get("schema") is None:
            raise ValueError("response_format: json_schema needs an object with a schema")
        return {"json": described["schema"]}
    if kind == "structural_tag":
        return {"structural_tag": value}
    raise ValueError(
        "response_format must be an object whose type is 'text', 'json_object', 'json_schema' or "
        f"'structural_tag', got {str(value)[:60]}"
    )
