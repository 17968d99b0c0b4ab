"""Why a row has no token, or a prompt no score: by what came to the host with them."""

from __future__ import annotations

import math

from flexgen_jax.engine.sampling import NOT_NUMBERS, NOTHING_LEFT, Sampled
from flexgen_jax.requests.unanswered import not_numbers, nothing_left


def why_no_token(sampled: Sampled, row: int, step: int) -> str | None:
    """None: there is one, and its log-probability is a number, where that was asked for."""
    token = int(sampled.token[row])
    if token == NOTHING_LEFT:
        return nothing_left(step)
    if token == NOT_NUMBERS or not _is_finite(sampled, row):
        return not_numbers(f"the logits of step {step}")
    return None


def why_no_score(scores: Sampled, place: int) -> str | None:
    """None: the score at ``place`` is a number."""
    return None if _is_finite(scores, place) else not_numbers("the logits of the prompt")


def _is_finite(sampled: Sampled, row: int) -> bool:
    return not sampled.logprob.size or math.isfinite(sampled.logprob[row])
