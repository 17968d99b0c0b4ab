"""Results, in the shape of vLLM's."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Logprob:
    """How likely a token was under the unmodified logits.

    Attributes:
        logprob: Natural log-probability.
        rank: Among the whole vocabulary; 1 is the likeliest.
        decoded_token: Its text; None if the model has no tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One completion.

    Attributes:
        index: Which of the request's completions.
        text: Decoded ``token_ids`` without special tokens, up to a stop string; empty if the model
            has no tokenizer.
        token_ids: All generated tokens, the one that ended the request included.
        finish_reason: ``"stop"`` (end-of-text, a stop token or a stop string) or ``"length"``
            (``max_tokens``).
        stop_reason: The request's stop token id or stop string that ended it; None otherwise.
        logprobs: Per token: token id -> :class:`Logprob` of the chosen and the likeliest tokens;
            None unless asked for.
        cumulative_logprob: Sum over the chosen tokens; None unless ``logprobs`` was asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    cumulative_logprob: float | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and its completions.

    Attributes:
        request_id: Its place in the input, as a string.
        prompt: Its text; None if it was given as token ids.
        prompt_token_ids: Special tokens included.
        outputs: The completions, ``n`` of them.
        prompt_logprobs: An entry per prompt token, as ``CompletionOutput.logprobs`` has per new
            one; the first is None, since nothing comes before it. None unless asked for.
        error: Why there is no answer, and ``outputs`` is empty; None: there is one.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    finished: bool = True
    error: str | None = None


class Gathered:
    """Puts the completions of each prompt together as they come."""

    def __init__(self) -> None:
        self._parts: dict[str, list[RequestOutput]] = {}

    def add(self, output: RequestOutput, n: int) -> RequestOutput | None:
        """Takes one of ``n`` completions, in their order; the whole with the last of them."""
        parts = self._parts.setdefault(output.request_id, [])
        parts.append(output)
        if len(parts) < n:
            return None
        del self._parts[output.request_id]
        error = next((part.error for part in parts if part.error is not None), None)
        if error is not None:
            return dataclasses.replace(parts[0], outputs=(), error=error)
        outputs = tuple(completion for part in parts for completion in part.outputs)
        return dataclasses.replace(parts[0], outputs=outputs)
