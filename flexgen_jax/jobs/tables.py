"""Inputs that are not lines of JSON: tables with a header, and lists in brackets.

Each row or item becomes a line of JSON with its number. What the whole file lacks is one error, not
one a row.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from flexgen_jax.jobs.compressed import plain_suffix

TABLES = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
MAX_ARRAY = 1 << 30  # bytes; a list is in memory as a whole

_TEXTS = ("id", "custom_id", "prompt", "continuation", "stop")  # whatever they look like
_NEEDED = ("prompt", "prompt_token_ids", "messages", "body")
_BINARY = {
    b"PK\x03\x04": "a zip archive (.xlsx is one)",
    b"PAR1": "Parquet, whose name must end in .parquet",
    b"\x1f\x8b": "compressed, and its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed, and its name must end in .zst",
}


class NotRowsError(ValueError):
    """A file whose rows cannot be requests; the message says why."""


def check_columns(names: Iterable[str]) -> None:
    """Refuses a table without a column that can be a prompt.

    Raises:
        NotRowsError: what columns there are.
    """
    names = list(names)
    if not any(name in _NEEDED for name in names):
        has = ", ".join(repr(str(name)) for name in names[:20]) or "none"
        raise NotRowsError(
            f"no column is called 'prompt' or 'prompt_token_ids'; its columns are {has}"
        )


def check_text(beginning: bytes) -> None:
    """Refuses what a few bytes show to be no text.

    Raises:
        NotRowsError: what it is instead.
    """
    for magic, what in _BINARY.items():
        if beginning.startswith(magic):
            raise NotRowsError(f"expected JSON lines, and it is {what}")


def table_rows(file: IO[bytes], delimiter: str) -> Iterator[tuple[int, bytes]]:
    """Rows of a table, by the number of the line that each ends on; cells that are empty are left
    out, and numbers, lists and objects are read as JSON except in columns of texts.

    Raises:
        NotRowsError: no header with a prompt, or what is no table.
        UnicodeDecodeError: not UTF-8.
    """
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    csv.field_size_limit(1 << 24)
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        check_columns(header)
        if len(set(header)) < len(header):
            raise NotRowsError("two columns of the header have the same name")
        for row in rows:
            if not row:
                continue
            if len(row) > len(header):
                values: Any = [*row]  # an error of this row
            else:
                values = {n: _value(n, cell) for n, cell in zip(header, row, strict=False) if cell}
            yield rows.line_num, json.dumps(values).encode() + b"\n"
    except csv.Error as error:
        raise NotRowsError(f"line {rows.line_num}: {error}") from error
    except UnicodeDecodeError as error:
        raise NotRowsError(f"near line {rows.line_num + 1}: not UTF-8: {error.reason}") from error
    finally:
        text.detach()


def _value(name: str, cell: str) -> Any:
    if name in _TEXTS:
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return {"true": True, "false": False}.get(cell.lower(), cell)


def is_array(path: Path, beginning: bytes) -> bool:
    """Whether a file holds a list, not lines: by its name and how it begins."""
    begins = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
    if plain_suffix(path) == ".json":
        return begins.startswith(b"[")
    return begins.startswith((b"[\n", b"[\r\n")) or begins == b"["


def array_items(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The items of a JSON list, counted from 1.

    Raises:
        NotRowsError: it is no JSON, or larger than fits in memory at ease.
    """
    data = file.read(MAX_ARRAY + 1)
    if len(data) > MAX_ARRAY:
        raise NotRowsError(
            f"a JSON list of more than {MAX_ARRAY} bytes; make JSON lines of it (jq -c '.[]')"
        )
    try:
        items = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise NotRowsError(f"not a JSON list: {error}") from error
    del data
    if not isinstance(items, list):
        raise NotRowsError("not a JSON list")
    for number, item in enumerate(items, 1):
        yield number, json.dumps(item).encode() + b"\n"
