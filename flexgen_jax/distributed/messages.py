"""What processes of a pipeline say to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from flexgen_jax.distributed.frames import HEAD_NBYTES, MessageError, frame, unframed
from flexgen_jax.distributed.plain import from_plain, to_plain
from flexgen_jax.engine.sampling import Sampled
from flexgen_jax.planning.blocks import Block
from flexgen_jax.requests.request import Request
from scheduling.policy import Policy

_RUN, _MORE, _END, _TOKENS = "run", "more", "end", "tokens"
# Of the fields of Sampled.
_DTYPES = ("int32", "float32", "int32", "int32", "float32")
_NDIMS = (1, 1, 1, 2, 2)
# The frame of some tokens, beside their arrays and for each of these.
TOKENS_NBYTES, SAMPLED_NBYTES = HEAD_NBYTES + 64, 5 * 64


@dataclasses.dataclass(frozen=True)
class Run:
    """Blocks to be run now.

    Attributes:
        settings: Name -> what it is in process 0: it has to be the same everywhere.
        more: Whether others come after those of the blocks, as :class:`Newcomers`.
    """

    settings: dict[str, str]
    policy: Policy
    blocks: list[Block]
    more: bool = False


@dataclasses.dataclass(frozen=True)
class Newcomers:
    """A request for each row, who come next; ``over``: nobody does any more."""

    rows: list[Request]
    over: bool = False


def encode(message: Run | Newcomers | None) -> bytes:
    """None: there is nothing more to do."""
    if message is None:
        return frame(_END, None)
    return frame(_RUN if isinstance(message, Run) else _MORE, to_plain(message))


def decode_newcomers(came: bytes) -> Newcomers:
    """The inverse of :func:`encode`.

    Raises:
        MessageError: it says something else.
    """
    kind, content, _ = unframed(came)
    if kind != _MORE:
        raise MessageError(f"expected more requests, got a message of kind {kind[:40]!r}")
    try:
        found: Newcomers = from_plain(Newcomers, content)
    except (ValueError, TypeError, RecursionError) as error:
        raise MessageError(f"the requests that come next cannot be read ({error})") from error
    return found


def decode(came: bytes) -> Run | None:
    """The inverse of :func:`encode`, of what is to be run.

    Raises:
        MessageError: it is none of these.
    """
    kind, content, _ = unframed(came)
    if kind == _END:
        return None
    if kind != _RUN:
        raise MessageError(f"expected what is to be run, got a message of kind {kind[:40]!r}")
    try:
        run: Run = from_plain(Run, content)
        for batch in (batch for block in run.blocks for batch in block.batches):
            longest = max((len(r.token_ids) for r in batch.requests), default=0)
            if not (0 < len(batch.requests) <= batch.rows and 0 < longest <= batch.prompt_len):
                raise ValueError("a batch that its requests do not fit")
    except (ValueError, TypeError, RecursionError) as error:
        raise MessageError(
            f"what is to be run cannot be read ({error}); start all processes with the same "
            "software"
        ) from error
    return run


def encode_tokens(sampled: Sampled, scores: Sequence[Sampled]) -> bytes:
    """Of a batch: the tokens of a step, and the scores of its prompts."""
    arrays = [array for one in (sampled, *scores) for array in jax.device_get(one)]
    return frame(_TOKENS, None, arrays)


def decode_tokens(came: bytes, rows: int) -> tuple[Sampled, list[Sampled]]:
    """The inverse of :func:`encode_tokens`, for a batch of ``rows`` rows.

    Raises:
        MessageError: it is none.
    """
    kind, _, arrays = unframed(came)
    each = len(_DTYPES)
    made: Any = Sampled  # of NumPy's arrays, as the host has them
    found: list[Sampled] = [
        made(*arrays[i : i + each]) for i in range(0, len(arrays) - each + 1, each)
    ]
    sound = kind == _TOKENS and len(arrays) == each * len(found) and found
    if not sound or not all(map(_is_sound, found)) or found[0].token.shape != (rows,):
        raise MessageError(f"expected the tokens of {rows} rows, got a message of another content")
    return found[0], found[1:]


def _is_sound(sampled: Sampled) -> bool:
    return all(
        array.dtype == dtype and array.ndim == ndim
        for array, dtype, ndim in zip(sampled, _DTYPES, _NDIMS, strict=True)
    )
