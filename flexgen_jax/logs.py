"""Structured logs on the standard error: events with fields, as text or as JSON lines.

Everything is logged under ``flexgen_jax`` by the standard library's ``logging``. A program that
uses the Python API sets its own handlers; :func:`set_up` is for the command line.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import sys
from collections.abc import Mapping
from typing import Any, Literal, TextIO

LOGGER = logging.getLogger("flexgen_jax")
LEVELS = ("debug", "info", "warning", "error")

Format = Literal["text", "json"]


def event(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Logs that something happened, for those who have set up logging.

    Args:
        name: What, in a few words that do not change: it is what people search for.
        level: Of ``logging``.
        fields: JSON values. The record has them as ``record.fields``, and its message names them.
    """
    if LOGGER.isEnabledFor(level) and LOGGER.hasHandlers():
        shown = ", ".join(f"{key}={_brief(value)}" for key, value in fields.items())
        text = f"{name}: {shown}" if shown else name
        LOGGER.log(level, "%s", text, extra={"event": name, "fields": fields})


def set_up(level: str, form: Format) -> None:
    """Writes the package's logs to the standard error from now on, and to nothing else.

    Args:
        level: One of ``LEVELS``: the least that is written.
        form: ``"text"``, or ``"json"``: an object a line.
    """
    reset()
    handler = _Stderr()
    handler.setFormatter(_Json() if form == "json" else _Text())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level.upper())
    LOGGER.propagate = False


def say_nothing() -> None:
    """Logs nothing from now on, whoever sets up the root logger: Orbax does, on its first use."""
    reset()
    LOGGER.addHandler(_Nothing())
    LOGGER.propagate = False


def reset() -> None:
    """Undoes :func:`set_up`, and :func:`say_nothing`."""
    for handler in [h for h in LOGGER.handlers if isinstance(h, (_Stderr, _Nothing))]:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(logging.NOTSET)
        LOGGER.propagate = True


def in_json() -> bool:
    """Whether every line on the standard error is to be a JSON object."""
    return any(isinstance(handler.formatter, _Json) for handler in LOGGER.handlers)


class _Nothing(logging.NullHandler):
    """Of :func:`say_nothing`."""


class _Stderr(logging.StreamHandler[TextIO]):
    """To whatever the standard error is when a record comes: a progress bar takes its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override] # an attribute there
        return sys.stderr


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        values: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", "message"),
        }
        fields = getattr(record, "fields", None)
        values |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        try:
            return json.dumps(values, default=str, allow_nan=False)
        except ValueError:  # NaN and infinity are not JSON
            return json.dumps({name: _finite(value) for name, value in values.items()}, default=str)


def _finite(value: Any) -> Any:
    """With texts for numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
