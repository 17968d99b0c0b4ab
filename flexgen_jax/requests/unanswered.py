"""Requests that were run and have no answer: why, and how a caller is told."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_jax.requests.outputs import RequestOutput
from flexgen_jax.requests.prompts import RequestError

_SHOWN = 3


class NoAnswerError(RequestError):
    """Some requests have no answer.

    Attributes:
        outputs: Of all that were run; those without an answer have an ``error``.
    """

    def __init__(self, message: str, outputs: Sequence[RequestOutput]) -> None:
        super().__init__(message)
        self.outputs = list(outputs)


def answered(outputs: Sequence[RequestOutput]) -> list[RequestOutput]:
    """``outputs``, if all requests have an answer.

    Raises:
        NoAnswerError: with the numbers of those that have none.
    """
    failed = [output for output in outputs if output.error is not None]
    if failed:
        reasons = [f"prompt {output.request_id}: {output.error}" for output in failed[:_SHOWN]]
        more = [f"and {len(failed) - _SHOWN} more"] if len(failed) > _SHOWN else []
        raise NoAnswerError("; ".join(reasons + more), outputs)
    return list(outputs)


def not_numbers(what: str) -> str:
    """Of logits that are NaN or infinite."""
    return (
        f"{what} are not numbers (NaN or infinity): the checkpoint has such values, which "
        "'flexgen-jax convert' finds, or its own values overflow in the dtype"
    )


def nothing_left(step: int) -> str:
    """Of a step in which no token may come."""
    return (
        f"no token may come in step {step}: allowed_token_ids, bad_words, min_tokens and "
        "structured_outputs leave none of the vocabulary, or the model none that is possible; ask "
        "for less"
    )
