"""The line formats of batch jobs: what a line asks, and how its answer is written.

Plain lines (``{"prompt": ...}`` or ``{"messages": ...}`` with sampling fields beside it), OpenAI
batch lines (:mod:`~flexgen_jax.jobs.openai_lines`), and text, a prompt a line. A line is answered
in its own dialect, text like plain lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from flexgen_jax.arguments import shown
from flexgen_jax.jobs.asked import MAX_ID, NO_ANSWER, Asked, LineError
from flexgen_jax.jobs.openai_lines import asked_of, entry, error_of
from flexgen_jax.requests.chat import CHAT_FIELDS
from flexgen_jax.requests.outputs import CompletionOutput, RequestOutput

_MAX_MESSAGE = 1000
_PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")


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
        asked_of(values, line)
        if "custom_id" in values or "body" in values
        else _plain(values, line)
    )


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def parse_text(raw: bytes, line: int) -> Asked:
    """Reads one line of a text file, which is a prompt.

    Raises:
        LineError: not UTF-8.
    """
    try:
        return Asked(line, line, ({"prompt": raw.rstrip(b"\r\n").decode("utf-8-sig")},), {})
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
            "invalid_request",
            "expected a 'prompt', 'prompt_token_ids' or 'messages', found none of them",
            line_id,
        )
    if len(prompt) > 1:
        given = " and ".join(map(repr, prompt))
        every = "both" if len(prompt) == 2 else "all"
        raise LineError("invalid_request", f"{given} are {every} given: give one", line_id)
    if "messages" in prompt:
        prompt |= {k: values.pop(k) for k in CHAT_FIELDS if k in values}
    metadata = values.pop("metadata", None)
    return Asked(line, line_id, (prompt,), values, metadata=metadata)


def plain_answer(asked: Asked, output: RequestOutput) -> dict[str, Any]:
    """The output record of a finished plain line."""
    record: dict[str, Any] = {"id": asked.id}
    if isinstance(asked.prompt.get("prompt"), str):
        record["prompt"] = asked.prompt["prompt"]
    if len(output.outputs) == 1:
        record |= _completion(output.outputs[0])
    else:
        record["outputs"] = [{"index": c.index, **_completion(c)} for c in output.outputs]
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = list(map(entry, output.prompt_logprobs))
    if asked.metadata is not None:
        record["metadata"] = asked.metadata
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
        record["logprobs"] = list(map(entry, completion.logprobs))
    return record


def failed_record(asked: Asked, why: str) -> dict[str, Any]:
    """The output record of a request that was run and has no answer."""
    return error_record(asked.line, LineError(NO_ANSWER, why, asked.id, asked.openai))


def error_record(line: int, error: LineError) -> dict[str, Any]:
    """The output record of a line that could not be run."""
    message = str(error)
    if len(message) > _MAX_MESSAGE:
        message = message[: _MAX_MESSAGE - 3] + "..."
    if error.openai:
        return error_of(line, error, message)
    details = {"line": line, "type": error.kind, "message": message}
    return {"id": line if error.id is None else error.id, "error": details}


def dump(record: Mapping[str, Any]) -> bytes:
    """``record`` as a line, its end included."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
