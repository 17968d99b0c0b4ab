"""Between texts and tokens: a prompt to a request that fits the model, what it produced to text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from flexgen_jax.arguments import shown
from flexgen_jax.models.family import eos_token_ids
from flexgen_jax.models.registry import family_of
from flexgen_jax.requests.bad_words import Sequences, banned_sequences
from flexgen_jax.requests.chat import Chat
from flexgen_jax.requests.generated import Generated
from flexgen_jax.requests.outputs import CompletionOutput, Logprob, RequestOutput
from flexgen_jax.requests.prompts import Prompt, RequestError, parse_prompt
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from flexgen_jax.requests.stops import up_to

if TYPE_CHECKING:
    from flexgen_jax.models.family import Config
    from flexgen_jax.requests.guidance import Guidance
    from flexgen_jax.requests.tokenization import Tokenizer


def make_request(
    index: int,
    prompt: Prompt | Chat,
    params: SamplingParams,
    *,
    config: Config,
    tokenizer: Tokenizer | None,
    scoring: bool,
) -> Request:
    """As ``LLM.request``.

    Raises:
        RequestError: what is wrong with it.
    """
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling parameters must be SamplingParams, got {shown(params)}")
    if isinstance(prompt, Mapping) and "messages" in prompt:
        prompt = Chat.of(prompt)
    text: str | None
    ids: list[int] | None
    if isinstance(prompt, Chat):
        text, ids = _of_chat(prompt, tokenizer)
    else:
        text, ids = parse_prompt(prompt)
    if ids is None:
        assert text is not None
        ids = encode(text, tokenizer)
    if not ids:
        raise RequestError("the prompt has no tokens; give at least one")
    _check_vocabulary("token id", ids, config)
    _check_vocabulary("stop token id", params.stop_token_ids, config)
    _check_vocabulary("logit_bias token id", params.logit_bias, config)
    _check_vocabulary("allowed token id", params.allowed_token_ids or (), config)
    room = family_of(config).room(config, len(ids))
    if params.max_tokens is None:
        if len(ids) + max(1, params.min_tokens) > room:
            raise RequestError(
                f"too long: {len(ids)} prompt tokens leave no room for "
                f"{max(1, params.min_tokens)} new ones in the model's {room} positions"
            )
        params = dataclasses.replace(params, max_tokens=room - len(ids))
    if len(ids) + (0 if scoring else params.max_tokens or 0) > room:
        raise RequestError(
            f"too long: {len(ids)} prompt tokens and max_tokens {params.max_tokens} "
            f"exceed the model's {room} positions"
        )
    scored = None if params.prompt_logprobs is None else (*ids[1:], -1)
    bad_words = _bad_words(params, tokenizer)
    if params.structured_outputs is not None and tokenizer is not None:
        guidance_of(config, tokenizer).check(params.structured_outputs)
    return Request(index, text, tuple(ids), params, scored=scored, bad_words=bad_words)


def guidance_of(config: Config, tokenizer: Tokenizer) -> Guidance:
    """What guides answers of a model."""
    return tokenizer.guidance(config.vocab_size, tuple(eos_token_ids(config)))


def _of_chat(chat: Chat, tokenizer: Tokenizer | None) -> tuple[str, list[int]]:
    """Its text and tokens. The template has the special tokens in it: none are added.

    Raises:
        RequestError: no tokenizer or template, or no text.
    """
    if tokenizer is None:
        raise RequestError(
            "this model has no tokenizer files, which messages need; give prompt_token_ids"
        )
    text = chat.text(tokenizer)
    try:
        return text, tokenizer.encode_words(text)
    except UnicodeEncodeError as error:
        raise RequestError(f"the messages are not text: {error}") from error


def _bad_words(params: SamplingParams, tokenizer: Tokenizer | None) -> Sequences:
    """As tokens.

    Raises:
        RequestError: there is no tokenizer.
    """
    if tokenizer is None:
        for name in ("stop", "bad_words", "structured_outputs"):
            if getattr(params, name):
                raise RequestError(
                    f"this model has no tokenizer files, which {name} needs; give "
                    "stop_token_ids or logit_bias instead"
                )
        return ()
    return banned_sequences(params.bad_words, tokenizer)


def encode(text: str, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids of ``text``, special tokens included.

    Raises:
        RequestError: no tokenizer, or no text.
    """
    if tokenizer is None:
        raise RequestError(
            "this model has no tokenizer files; give prompt_token_ids instead of text"
        )
    try:
        return tokenizer.encode(text)
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not text: {error}") from error


def _check_vocabulary(what: str, ids: Iterable[int], config: Config) -> None:
    bad = next((i for i in ids if not 0 <= i < config.vocab_size), None)
    if bad is not None:
        raise RequestError(f"{what} {bad} is outside the vocabulary (0 to {config.vocab_size - 1})")


def output_of(generated: Generated, tokenizer: Tokenizer | None) -> RequestOutput:
    """What a request has produced, with one completion."""
    request, ids = generated.request, generated.token_ids
    if generated.error is not None:
        return RequestOutput(
            str(request.index), request.prompt, request.token_ids, (), error=generated.error
        )
    text, logprobs, cumulative = "", None, None
    stop = generated.stop_string
    by_token = generated.finish_reason == "stop" and stop is None
    if tokenizer is not None and request.params.detokenize:
        text = _text(generated, tokenizer, by_token=by_token)
    if request.params.logprobs is not None:
        logprobs = _decoded(generated.logprobs, tokenizer)
        cumulative = sum(entry[token].logprob for entry, token in zip(logprobs, ids, strict=True))
    stopped_by: int | str | None = stop
    if by_token and ids[-1] in request.params.stop_token_ids:
        stopped_by = ids[-1]
    completion = CompletionOutput(
        index=request.sample,
        text=text,
        token_ids=tuple(ids),
        finish_reason=generated.finish_reason or "length",
        stop_reason=stopped_by,
        logprobs=logprobs,
        cumulative_logprob=cumulative,
    )
    scored = None if request.scored is None else (None, *_decoded(generated.scores, tokenizer))
    return RequestOutput(
        str(request.index), request.prompt, request.token_ids, (completion,), scored
    )


def _text(generated: Generated, tokenizer: Tokenizer, *, by_token: bool) -> str:
    ids, params = generated.token_ids, generated.request.params
    include = params.include_stop_str_in_output

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens)

    if generated.stop_string is not None:
        return up_to(generated.stop_string, ids, decode, params.min_tokens, include=include)
    return decode(ids[:-1] if by_token and not include else ids)


def _decoded(
    entries: Sequence[dict[int, Logprob]], tokenizer: Tokenizer | None
) -> tuple[dict[int, Logprob], ...]:
    if tokenizer is None:
        return tuple(entries)
    text = tokenizer.token
    return tuple(
        {token: Logprob(p.logprob, p.rank, text(token)) for token, p in entry.items()}
        for entry in entries
    )
