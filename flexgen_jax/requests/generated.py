"""What one request has produced so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flexgen_jax.requests.guidance import Guide
from flexgen_jax.requests.outputs import Logprob
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.stops import Decode, stopped_by


@dataclasses.dataclass
class Generated:
    """What one request has produced so far (host side).

    Attributes:
        guide: Says which tokens may come, if the answer is to have a form and this process samples.
    """

    request: Request
    stop_ids: frozenset[int]
    decode: Decode | None = None
    guide: Guide | None = None
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    scores: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None  # that ended it
    error: str | None = None  # why there is no answer

    def accept(self, token: int) -> None:
        self.token_ids.append(token)
        params = self.request.params
        late = len(self.token_ids) > params.min_tokens
        if token in self.stop_ids and late:
            self.finish_reason = "stop"
            return
        if params.stop and late and self.decode is not None:
            self.stop_string = stopped_by(
                self.token_ids, params.stop, self.decode, params.min_tokens
            )
        if self.stop_string is not None:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.request.max_tokens:
            self.finish_reason = "length"

    def fail(self, why: str) -> None:
        """Ends it without an answer."""
        self.finish_reason, self.error = "error", why

    def to_json(self) -> dict[str, Any]:
        """What was produced, as plain JSON."""
        return {
            "token_ids": self.token_ids,
            "logprobs": list(map(_plain, self.logprobs)),
            "scores": list(map(_plain, self.scores)),
            "finish_reason": self.finish_reason,
            "stop_string": self.stop_string,
            "error": self.error,
        }

    def restore(self, values: Mapping[str, Any]) -> None:
        """Takes what :meth:`to_json` gave."""
        self.token_ids = list(values["token_ids"])
        self.logprobs = list(map(_entry, values["logprobs"]))
        self.scores = list(map(_entry, values["scores"]))
        self.finish_reason, self.stop_string = values["finish_reason"], values["stop_string"]
        self.error = values["error"]


def _plain(entry: dict[int, Logprob]) -> dict[str, Any]:
    return {str(token): [p.logprob, p.rank] for token, p in entry.items()}


def _entry(values: Mapping[str, Any]) -> dict[int, Logprob]:
    return {int(token): Logprob(*pair) for token, pair in values.items()}
