"""The task of ``score``: prompts and continuations in, log-likelihoods out.

A line is ``{"prompt": ..., "continuation": ...}`` or ``{"prompt_token_ids": [...],
"continuation_token_ids": [...]}``, with an optional id.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flexgen_jax.jobs.asked import Asked
from flexgen_jax.requests.prompts import RequestError
from flexgen_jax.scoring import score_of, score_request

if TYPE_CHECKING:
    from flexgen_jax.llm import LLM
    from flexgen_jax.requests.outputs import RequestOutput
    from flexgen_jax.requests.request import Request

_CONTINUATION = ("continuation", "continuation_token_ids")


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The task of ``score``.

    Args:
        model: Its name.
    """

    llm: LLM
    model: str

    def request(self, index: int, asked: Asked) -> Request:
        if asked.openai:
            raise RequestError("scoring takes plain lines: a 'prompt' and a 'continuation'")
        if "messages" in asked.prompt or asked.metadata is not None:
            raise RequestError(
                "scoring takes a prompt and a continuation, not messages or metadata"
            )
        given = [name for name in _CONTINUATION if name in asked.sampling]
        unknown = sorted(set(asked.sampling) - set(_CONTINUATION))
        if unknown:
            raise RequestError(
                f"unknown field {', '.join(map(repr, unknown))}; known: id, prompt, "
                f"prompt_token_ids, {', '.join(_CONTINUATION)}"
            )
        if len(given) != 1:
            raise RequestError(
                "expected a 'prompt' and a 'continuation', or 'prompt_token_ids' and "
                "'continuation_token_ids'"
            )
        return score_request(self.llm, index, asked.prompt, asked.sampling[given[0]])

    def answer(
        self, asked: Asked, requests: Sequence[Request], outputs: Sequence[RequestOutput]
    ) -> dict[str, Any]:
        score = score_of(requests[0], outputs[0])
        return {
            "id": asked.id,
            "logprob": score.logprob,
            "token_ids": list(score.token_ids),
            "logprobs": list(score.logprobs),
            "is_greedy": score.is_greedy,
        }

    def at(self, begun: int) -> Scoring:
        return self

    def identity(self) -> dict[str, Any]:
        return scoring_identity(self.model)


def scoring_identity(model: str) -> dict[str, Any]:
    """Of the task of ``score``: known before there is a model."""
    return {"task": {"kind": "score", "model": model}}
