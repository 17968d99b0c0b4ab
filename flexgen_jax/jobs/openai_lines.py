"""OpenAI's batch lines: ``custom_id``, ``url`` and ``body`` in; ``response`` or ``error`` out.

The fields are those of OpenAI's reference of ``/v1/completions`` and ``/v1/chat/completions``, and
vLLM's beside them, which are sampling fields here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexgen_jax.arguments import shown
from flexgen_jax.jobs.asked import MAX_ID, NO_ANSWER, Asked, LineError
from flexgen_jax.requests.chat import CHAT_FIELDS
from flexgen_jax.requests.outputs import CompletionOutput, Logprob, RequestOutput

if TYPE_CHECKING:
    from flexgen_jax.requests.tokenization import Tokenizer

MAX_PROMPTS = 2048  # of a line, as OpenAI has it
_URLS = ("/v1/completions", "/v1/chat/completions")
# Fields that change nothing here.
_NEUTRAL = {
    *("model", "user", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "request_id"),
}
# Fields that would change something: with the values that ask for nothing.
_OFF: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "priority": (0,),
}
_COMPLETION_OFF: dict[str, tuple[Any, ...]] = {
    **_OFF,
    "suffix": ("",),
    "add_special_tokens": (True,),
}
_CHAT_OFF: dict[str, tuple[Any, ...]] = {
    **_OFF,
    "echo": (False,),
    "add_special_tokens": (False,),
    "modalities": (["text"],),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True, False),
    "functions": (),
    "function_call": (),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
}


def asked_of(values: dict[str, Any], line: int) -> Asked:
    """What a line's values ask.

    Raises:
        LineError: they do not make a request.
    """
    line_id = values.get("custom_id")

    def wrong(message: str) -> LineError:
        return LineError("invalid_request", message, line_id, openai=True)

    if not isinstance(line_id, str) or len(line_id) > MAX_ID:
        given, line_id = shown(line_id), None
        raise wrong(f"custom_id must be a text of at most {MAX_ID} characters, got {given}")
    if values.get("method", "POST") != "POST":
        raise wrong(f"method must be 'POST', got {shown(values['method'])}")
    if values.get("url") not in _URLS:
        raise wrong(f"url must be {' or '.join(map(repr, _URLS))}, got {shown(values.get('url'))}")
    body = values.get("body")
    if not isinstance(body, dict):
        raise wrong(f"body must be a JSON object, got {shown(body)}")
    try:
        made = _chat if values["url"] == _URLS[1] else _completion
        return made(dict(body), line, line_id)
    except ValueError as error:
        raise wrong(str(error)) from error


def _completion(body: dict[str, Any], line: int, line_id: str) -> Asked:
    sampling, metadata = _without(body, _COMPLETION_OFF)
    if sampling.get("best_of") not in (None, sampling.get("n") or 1):
        raise ValueError(
            f"best_of={shown(body['best_of'])} is not supported unless it is n "
            f"({shown(body.get('n') or 1)})"
        )
    sampling.pop("best_of", None)
    if "prompt" not in sampling:
        raise ValueError("the body has no 'prompt'")
    echo = sampling.pop("echo", None) or False
    if not isinstance(echo, bool):
        raise ValueError(f"echo must be true or false, got {shown(echo)}")
    # A token is generated and not told: what is asked for is the prompt.
    silent = echo and sampling.get("max_tokens") == 0
    if silent:
        sampling["max_tokens"] = 1
    if echo and sampling.get("logprobs") is not None:
        sampling.setdefault("prompt_logprobs", sampling["logprobs"])
    prompts = tuple({"prompt": prompt} for prompt in _prompts(sampling.pop("prompt")))
    return Asked(line, line_id, prompts, sampling, "completion", echo, silent, metadata)


def _prompts(given: Any) -> list[Any]:
    """One prompt or several, each a text or a list of token ids."""
    if not isinstance(given, list) or not given or isinstance(given[0], int):
        return [given]
    if len(given) > MAX_PROMPTS:
        raise ValueError(f"a line may have at most {MAX_PROMPTS} prompts, got {len(given)}")
    return given


def _chat(body: dict[str, Any], line: int, line_id: str) -> Asked:
    sampling, metadata = _without(body, _CHAT_OFF)
    if "messages" not in sampling:
        raise ValueError("the body has no 'messages'")
    fields = ("messages", *CHAT_FIELDS)
    prompt = {name: sampling.pop(name) for name in fields if name in sampling}
    longest = sampling.pop("max_completion_tokens", None)
    if longest is not None:
        if sampling.get("max_tokens") not in (None, longest):
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        sampling["max_tokens"] = longest
    wanted, top = sampling.pop("logprobs", None), sampling.pop("top_logprobs", None)
    if wanted is not None and not isinstance(wanted, bool):
        raise ValueError(f"logprobs must be true or false, got {shown(wanted)}")
    if top is not None and not wanted:
        raise ValueError("top_logprobs needs logprobs: true")
    if wanted:
        sampling["logprobs"] = 0 if top is None else top
    return Asked(line, line_id, (prompt,), sampling, "chat", metadata=metadata)


def _without(
    body: dict[str, Any], off: Mapping[str, tuple[Any, ...]]
) -> tuple[dict[str, Any], Any]:
    """The fields that matter, and the metadata."""
    for name, values in off.items():
        if body.get(name) is not None and body[name] not in values:
            may = f"; leave it at {' or '.join(map(repr, values))}" if values else ""
            raise ValueError(f"{name}={shown(body[name])} is not supported{may}")
    kept = {k: v for k, v in body.items() if k not in _NEUTRAL and k not in off}
    metadata = kept.pop("metadata", None)
    return kept, metadata


def answer_of(
    asked: Asked,
    outputs: Sequence[RequestOutput],
    *,
    model: str,
    created: int,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """The output record of a finished line.

    Args:
        outputs: Of each of its prompts.
        created: Seconds since 1970.
    """
    if asked.dialect == "chat":
        kind, name = "chat.completion", f"chatcmpl-{asked.id}"
        choices = [_message(asked, c) for output in outputs for c in output.outputs]
    else:
        kind, name = "text_completion", f"cmpl-{asked.id}"
        choices = [_text(asked, output, c, tokenizer) for output in outputs for c in output.outputs]
    first = iter(choices)
    for output in outputs:  # vLLM's addition to the form
        for choice in itertools.islice(first, len(output.outputs)):
            if output.prompt_logprobs is not None and not asked.echo:
                choice["prompt_logprobs"] = list(map(entry, output.prompt_logprobs))
    for index, choice in enumerate(choices):
        choice["index"] = index
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    new_tokens = 0
    if not asked.silent:
        new_tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    body: dict[str, Any] = {
        "id": name,
        "object": kind,
        "created": created,
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
        },
    }
    if asked.metadata is not None:
        body["metadata"] = asked.metadata
    response = {"status_code": 200, "request_id": f"line-{asked.line}", "body": body}
    return {
        "id": f"line-{asked.line}",
        "custom_id": asked.id,
        "response": response,
        "error": None,
    }


def entry(found: Mapping[int, Logprob] | None) -> dict[str, Any] | None:
    """Of a position: token id -> how likely it was, as JSON has it."""
    if found is None:
        return None
    return {
        str(token): {"logprob": p.logprob, "rank": p.rank, "decoded_token": p.decoded_token}
        for token, p in found.items()
    }


def _text(
    asked: Asked, output: RequestOutput, completion: CompletionOutput, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """A choice of ``/v1/completions``."""
    prompt, text = "", completion.text
    entries: list[tuple[int, Mapping[int, Logprob] | None]] = []
    if asked.echo:
        prompt = output.prompt or ""
        if output.prompt is None and tokenizer is not None:
            prompt = tokenizer.decode(output.prompt_token_ids)
        if output.prompt_logprobs is not None:
            entries += zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    if asked.silent:
        text = ""
    elif completion.logprobs is not None:
        entries += zip(completion.token_ids, completion.logprobs, strict=True)
    return {
        "index": 0,
        "text": prompt + text,
        "logprobs": None if completion.logprobs is None else _legacy(entries, tokenizer),
        "finish_reason": "length" if asked.silent else completion.finish_reason,
    }


def _legacy(
    entries: Sequence[tuple[int, Mapping[int, Logprob] | None]], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Log-probabilities in the form of ``/v1/completions``; nothing comes before a first token."""
    tokens, offsets, place = [], [], 0
    for token, found in entries:
        text = None if found is None else found[token].decoded_token
        if text is None:
            text = (tokenizer.token(token) if tokenizer is not None else None) or ""
        tokens.append(text)
        offsets.append(place)
        place += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [None if found is None else found[t].logprob for t, found in entries],
        "top_logprobs": [
            None
            if found is None
            else {p.decoded_token or str(t): p.logprob for t, p in found.items()}
            for _, found in entries
        ],
        "text_offset": offsets,
    }


def _message(asked: Asked, completion: CompletionOutput) -> dict[str, Any]:
    """A choice of ``/v1/chat/completions``."""
    logprobs = None
    if completion.logprobs is not None:
        chosen = zip(completion.token_ids, completion.logprobs, strict=True)
        most = asked.sampling.get("logprobs")
        logprobs = {"content": [_position(t, found, most) for t, found in chosen], "refusal": None}
    return {
        "index": 0,
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }


def _position(token: int, found: Mapping[int, Logprob], most: int | None) -> dict[str, Any]:
    """Of a chosen token; and of the likeliest, ``most`` of them, among which it need not be."""
    likeliest = sorted(found.items(), key=lambda item: item[1].rank or 0)[:most]
    return {**_token(token, found[token]), "top_logprobs": [_token(*item) for item in likeliest]}


def _token(token: int, p: Logprob) -> dict[str, Any]:
    text = p.decoded_token if p.decoded_token is not None else str(token)
    # A part of a character is no text, and its bytes are not known.
    whole = "\N{REPLACEMENT CHARACTER}" not in text
    return {
        "token": text,
        "logprob": p.logprob,
        "bytes": list(text.encode("utf-8", "replace")) if whole else None,
    }


def error_of(line: int, error: LineError, message: str) -> dict[str, Any]:
    """The output record of a line that has no answer: what OpenAI's server would have said."""
    ours = error.kind == NO_ANSWER
    said = {
        "message": message,
        "type": "server_error" if ours else "invalid_request_error",
        "param": None,
        "code": error.kind,
    }
    response = {
        "status_code": 500 if ours else 400,
        "request_id": f"line-{line}",
        "body": {"error": said},
    }
    return {
        "id": f"line-{line}",
        "custom_id": error.id,
        "response": response,
        "error": {"code": error.kind, "message": message, "line": line},
    }
