"""The line formats of batch jobs: what a line asks, and how its answer is written.

Plain lines (``{"prompt": ...}`` with sampling fields beside it), OpenAI batch lines
(``custom_id``, ``url``, ``body``), and text, a prompt a line. A line is answered in its own
dialect, text like plain lines.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from flexgen_jax.requests.outputs import CompletionOutput, Logprob, RequestOutput
from flexgen_jax.requests.prompts import shown

MAX_ID = 1000  # characters
NO_ANSWER = "no_answer"  # the kind of error of a request that was run
_MAX_MESSAGE = 1000
_PROMPT_FIELDS = ("prompt", "prompt_token_ids")
# Fields of an OpenAI body that change nothing here, and those that would: with the value that
# asks for nothing.
_OPENAI_NEUTRAL = {"model", "user", "metadata"}
_OPENAI_OFF = {"stream": False, "echo": False, "suffix": None, "stream_options": None}


class LineError(ValueError):
    """A line that is no request; ``kind`` classes the mistake, ``id`` is the line's, if any."""

    def __init__(self, kind: str, message: str, line_id: Any = None, openai: bool = False) -> None:
        super().__init__(message)
        self.kind, self.id, self.openai = kind, line_id, openai


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request as its line words it: ``prompt`` for ``LLM.request``, ``sampling`` unchecked."""

    line: int
    id: Any
    prompt: Mapping[str, Any]
    sampling: Mapping[str, Any]
    openai: bool = False


def parse_line(raw: bytes, line: int) -> Asked:
    """Reads one line.

    Raises:
        LineError: not UTF-8, not a JSON object, or fields that do not make a request.
    """
    try:
        values = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise LineError("invalid_json", f"not UTF-8 JSON: {error.reason}") from error
    except RecursionError as error:
        raise LineError("invalid_json", "nested too deeply") from error
    except json.JSONDecodeError as error:  # which counts lines from this one
        message = f"not JSON: {error.msg} (column {error.colno})"
        raise LineError("invalid_json", message) from error
    except ValueError as error:
        raise LineError("invalid_json", f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise LineError("invalid_request", f"expected a JSON object, got {type(values).__name__}")
    return parse_values(values, line)


def parse_values(values: dict[str, Any], line: int) -> Asked:
    """What a line's values ask; takes them apart.

    Raises:
        LineError: they do not make a request.
    """
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = repr(error.object[error.start])
        raise LineError("invalid_request", f"half of a surrogate pair, {half}: no text") from error
    except RecursionError as error:
        raise LineError("invalid_json", "nested too deeply") from error
    return (
        _openai(values, line) if "custom_id" in values or "body" in values else _plain(values, line)
    )


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def parse_text(raw: bytes, line: int) -> Asked:
    """Reads one line of a text file, which is a prompt.

    Raises:
        LineError: not UTF-8.
    """
    try:
        return Asked(line, line, {"prompt": raw.rstrip(b"\r\n").decode("utf-8-sig")}, {})
    except UnicodeDecodeError as error:
        raise LineError("invalid_request", f"not UTF-8 text: {error.reason}") from error


def _plain(values: dict[str, Any], line: int) -> Asked:
    line_id = values.pop("id", None)
    if isinstance(line_id, (dict, list, bool)) or line_id in (math.inf, -math.inf):
        raise LineError("invalid_request", f"id must be a text or a number, got {shown(line_id)}")
    if len(str(line_id)) > MAX_ID:
        raise LineError("invalid_request", f"id must be at most {MAX_ID} characters long")
    line_id = line if line_id is None else line_id
    prompt = {k: values.pop(k) for k in _PROMPT_FIELDS if k in values}
    if not prompt:
        raise LineError(
            "invalid_request", "expected a 'prompt' or 'prompt_token_ids', found neither", line_id
        )
    if len(prompt) == len(_PROMPT_FIELDS):
        raise LineError(
            "invalid_request", "'prompt' and 'prompt_token_ids' are both given: give one", line_id
        )
    return Asked(line, line_id, prompt, values)


def _openai(values: dict[str, Any], line: int) -> Asked:
    line_id = values.get("custom_id")

    def wrong(message: str) -> LineError:
        return LineError("invalid_request", message, line_id, openai=True)

    if not isinstance(line_id, str) or len(line_id) > MAX_ID:
        given, line_id = shown(line_id), None
        raise wrong(f"custom_id must be a text of at most {MAX_ID} characters, got {given}")
    if values.get("method", "POST") != "POST":
        raise wrong(f"method must be 'POST', got {shown(values['method'])}")
    if values.get("url") != "/v1/completions":
        raise wrong(f"url must be '/v1/completions', got {shown(values.get('url'))}")
    body = values.get("body")
    if not isinstance(body, dict):
        raise wrong(f"body must be a JSON object, got {shown(body)}")
    for name, off in _OPENAI_OFF.items():
        if body.get(name, off) not in (off, None):
            raise wrong(f"{name}={shown(body[name])} is not supported; leave it at {off!r}")
    best_of, count = body.get("best_of"), body.get("n") or 1
    if best_of not in (None, count):
        raise wrong(f"best_of={shown(best_of)} is not supported unless it is n ({shown(count)})")
    if "prompt" not in body:
        raise wrong("the body has no 'prompt'")
    skipped = {*_OPENAI_NEUTRAL, *_OPENAI_OFF, "best_of", "prompt"}
    sampling = {k: v for k, v in body.items() if k not in skipped}
    return Asked(line, line_id, {"prompt": body["prompt"]}, sampling, openai=True)


def answer(asked: Asked, output: RequestOutput, model: str) -> dict[str, Any]:
    """The output record of a finished request."""
    if asked.openai:
        return _openai_answer(asked, output, model)
    return plain_answer(asked, output)


def plain_answer(asked: Asked, output: RequestOutput) -> dict[str, Any]:
    """Likewise, of a plain line."""
    record: dict[str, Any] = {"id": asked.id}
    if isinstance(asked.prompt.get("prompt"), str):
        record["prompt"] = asked.prompt["prompt"]
    if len(output.outputs) == 1:
        record |= _completion(output.outputs[0])
    else:
        record["outputs"] = [{"index": c.index, **_completion(c)} for c in output.outputs]
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = list(map(_entry, output.prompt_logprobs))
    return record


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    if completion.stop_reason is not None:
        record["stop_reason"] = completion.stop_reason
    if completion.logprobs is not None:
        record["cumulative_logprob"] = completion.cumulative_logprob
        record["logprobs"] = list(map(_entry, completion.logprobs))
    return record


def _entry(entry: Mapping[int, Logprob] | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {str(token): dataclasses.asdict(p) for token, p in entry.items()}


def _openai_answer(asked: Asked, output: RequestOutput, model: str) -> dict[str, Any]:
    prompt_tokens = len(output.prompt_token_ids)
    new_tokens = sum(len(c.token_ids) for c in output.outputs)
    choices = list(map(_choice, output.outputs))
    if output.prompt_logprobs is not None:  # vLLM's addition to the form
        for choice in choices:
            choice["prompt_logprobs"] = list(map(_entry, output.prompt_logprobs))
    body = {
        "id": f"cmpl-{asked.id}",
        "object": "text_completion",
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
        },
    }
    response = {"status_code": 200, "request_id": f"line-{asked.line}", "body": body}
    return {
        "id": f"line-{asked.line}",
        "custom_id": asked.id,
        "response": response,
        "error": None,
    }


def _choice(completion: CompletionOutput) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        chosen = list(zip(completion.logprobs, completion.token_ids, strict=True))
        logprobs = {
            "tokens": [entry[t].decoded_token for entry, t in chosen],
            "token_logprobs": [entry[t].logprob for entry, t in chosen],
            "top_logprobs": [
                {p.decoded_token or str(t): p.logprob for t, p in entry.items()}
                for entry, _ in chosen
            ],
        }
    return {
        "index": completion.index,
        "text": completion.text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }


def failed_record(asked: Asked, why: str) -> dict[str, Any]:
    """The output record of a request that was run and has no answer."""
    return error_record(asked.line, LineError(NO_ANSWER, why, asked.id, asked.openai))


def error_record(line: int, error: LineError) -> dict[str, Any]:
    """The output record of a line that could not be run."""
    message = str(error)
    if len(message) > _MAX_MESSAGE:
        message = message[: _MAX_MESSAGE - 3] + "..."
    if error.openai:
        return {
            "id": f"line-{line}",
            "custom_id": error.id,
            "response": None,
            "error": {"code": error.kind, "message": message, "line": line},
        }
    details = {"line": line, "type": error.kind, "message": message}
    return {"id": line if error.id is None else error.id, "error": details}


def dump(record: Mapping[str, Any]) -> bytes:
    """``record`` as a line, its end included."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
