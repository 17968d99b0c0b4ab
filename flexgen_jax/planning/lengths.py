"""How many new tokens requests turn out to have: ``max_tokens`` is a limit, not a forecast.

Where nothing is known of them, every request is taken to run to its limit.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexgen_jax.arguments import expect, shown
from storage.json_text import parse_json

MOST_KEPT = 4096
_LONGEST_LINE = 64 << 20
# Multiples of it fill the circle evenly, however many there are.
_GOLDEN = 0.6180339887498949
_EXPECTED = (
    "expected a number of new tokens (1 or more), or a record of a job's output with token_ids, "
    "outputs or a response"
)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A sample of the new tokens of requests, which says how long others will be.

    Args:
        sample: In any order; of a large one an even part is kept.

    Raises:
        ValueError: it is empty, or has what is no number of new tokens.
    """

    sample: tuple[int, ...]

    def __post_init__(self) -> None:
        for value in self.sample:
            if not _is_length(value):
                raise ValueError(
                    f"lengths must be whole numbers of new tokens, 1 or more; got {shown(value)}"
                )
        if not self.sample:
            raise ValueError("lengths must have one number of new tokens at least; got none")
        object.__setattr__(self, "sample", _thinned(Counter(self.sample)))

    @classmethod
    def of(cls, lengths: Lengths | str | os.PathLike[str] | Iterable[int]) -> Lengths:
        """What :meth:`read` makes of a path, and the class of numbers.

        Raises:
            ValueError: as those do.
        """
        if isinstance(lengths, Lengths):
            return lengths
        if isinstance(lengths, (str, os.PathLike)):
            return cls.read(Path(lengths))
        expect("lengths", lengths, Iterable, "numbers of tokens, or a path")
        return cls(tuple(lengths))

    @classmethod
    def read(cls, path: Path) -> Lengths:
        """Of a file with a number in each line, or of the output of a job.

        Records of errors are passed over. Where a record says only how many tokens several
        completions have together, each counts as one of the mean length.

        Raises:
            ValueError: it cannot be read, or has something else; the message says where.
        """
        found: Counter[int] = Counter()
        try:
            with path.open("rb") as file:
                for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
                    if line.strip():
                        found.update(_lengths_in(line, f"{path}, line {number}"))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        if not found:
            raise ValueError(
                f"{path} has no lengths: expected a number of new tokens a line, or the output of "
                "a job with one answer at least"
            )
        return cls(_thinned(found))

    def expected(self, limit: int) -> float:
        """The mean of those that end at ``limit``."""
        return float(self._within(limit).mean())

    def longest_of(self, count: int, limit: int) -> float:
        """The longest of ``count`` of them, on average."""
        values = self._within(limit)
        # That all are among the first k of n has probability (k / n) ** count.
        below = (np.arange(len(values) + 1) / len(values)) ** count
        return float(np.diff(below) @ values)

    def of_each(self, limits: Sequence[int]) -> list[int]:
        """A length for each request, always the same ones: even in any stretch of them."""
        places = ((np.arange(len(limits)) + 0.5) * _GOLDEN % 1 * len(self.sample)).astype(int)
        return np.minimum(np.asarray(self.sample)[places], np.asarray(limits, int)).tolist()

    @property
    def alike(self) -> bool:
        """Whether all are the same."""
        return self.sample[0] == self.sample[-1]

    def _within(self, limit: int) -> np.ndarray:
        return np.minimum(np.asarray(self.sample), limit)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _thinned(counts: Mapping[int, int]) -> tuple[int, ...]:
    """In order; of very many the middles of equal parts."""
    values = np.asarray(sorted(counts))
    ends = np.cumsum([counts[value] for value in values.tolist()])
    total = int(ends[-1])
    kept = min(total, MOST_KEPT)
    middles = (np.arange(kept) + 0.5) * total / kept
    return tuple(values[np.searchsorted(ends, middles)].tolist())


def _lengths_in(line: bytes, where: str) -> Iterator[int]:
    try:
        value = parse_json(line)
    except ValueError:
        text = line.decode("utf-8", "replace").strip()
        raise ValueError(f"{where}: {_EXPECTED}; got {shown(text)}") from None
    found = _lengths_of(value) if isinstance(value, dict) else [value]
    for length in found:
        if not _is_length(length):
            raise ValueError(f"{where}: {_EXPECTED}; got {shown(value)}")
        yield length


def _lengths_of(record: Mapping[str, Any]) -> list[Any]:
    """What a record of a job's output says; None for what it does not say."""
    if record.get("error") is not None:
        return []
    if "outputs" in record:
        return [_count(output) for output in _list(record["outputs"])]
    if "response" not in record:
        return [_count(record)]
    body = _dict(_dict(record["response"]).get("body"))
    choices = _list(body.get("choices"))
    counts = [_count(choice) for choice in choices]
    if None not in counts:
        return counts
    together: Any = _dict(body.get("usage")).get("completion_tokens")
    if not _is_length(together):
        return [together]
    return [max(1, round(together / len(choices)))] * len(choices)


def _count(completion: Any) -> int | None:
    """Its tokens, as far as it has them."""
    values = _dict(completion)
    tokens = values.get("token_ids")
    if tokens is None:
        tokens = _dict(values.get("logprobs")).get("tokens")
    return len(tokens) if isinstance(tokens, list) else None


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    """A list of one thing at least; what is none has nothing that counts."""
    return value if isinstance(value, list) and value else [None]
