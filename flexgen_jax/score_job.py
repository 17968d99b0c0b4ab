"""A file of prompts and continuations in, a file of log-likelihoods out.

A line is ``{"prompt": ..., "continuation": ...}`` or ``{"prompt_token_ids": [...],
"continuation_token_ids": [...]}``, with an optional id. A bad line becomes one error record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_jax.batch import Results, input_lines
from flexgen_jax.dialects import Asked, LineError, error_record, parse_line
from flexgen_jax.prompts import RequestError
from flexgen_jax.scoring import Score, run_scores, score_request

if TYPE_CHECKING:
    from flexgen_jax.blocks import Request
    from flexgen_jax.llm import LLM

_CONTINUATION = ("continuation", "continuation_token_ids")


@dataclasses.dataclass
class ScoreJob:
    """The lines of an input file, checked: ``asked[i]`` is what ``requests[i]`` answers."""

    asked: list[Asked]
    requests: list[Request]
    errors: dict[int, dict[str, Any]]


def read_score_job(llm: LLM, path: Path) -> ScoreJob:
    """Reads and checks every line of ``path``. Blank lines are passed over.

    Raises:
        JobError: the file cannot be read.
    """
    job = ScoreJob([], [], {})
    seen: dict[Any, int] = {}
    for line, raw in input_lines(path):
        try:
            asked = parse_line(raw, line)
            try:
                if asked.id in seen:
                    raise RequestError(f"id {asked.id!r} was used on line {seen[asked.id]}")
                job.requests.append(_request(llm, len(job.requests), asked))
            except RequestError as error:
                raise LineError("invalid_request", str(error), asked.id) from error
        except LineError as error:
            job.errors[line] = error_record(line, error)
        else:
            seen[asked.id] = line
            job.asked.append(asked)
    return job


def _request(llm: LLM, index: int, asked: Asked) -> Request:
    if asked.openai:
        raise RequestError("scoring takes plain lines: a 'prompt' and a 'continuation'")
    given = [name for name in _CONTINUATION if name in asked.sampling]
    unknown = sorted(set(asked.sampling) - set(_CONTINUATION))
    if unknown:
        raise RequestError(
            f"unknown field {', '.join(map(repr, unknown))}; known: id, prompt, prompt_token_ids, "
            + ", ".join(_CONTINUATION)
        )
    if len(given) != 1 or len(asked.prompt) != 1:
        raise RequestError(
            "expected a 'prompt' and a 'continuation', or 'prompt_token_ids' and "
            "'continuation_token_ids'"
        )
    return score_request(llm, index, asked.prompt, asked.sampling[given[0]])


def run_score_job(
    llm: LLM, job: ScoreJob, results: Results, *, progress: Callable[[int], None] | None = None
) -> None:
    """Scores the good lines of ``job`` and writes a record for every line to ``results``."""
    results.add(job.errors)

    def keep(finished: list[tuple[Request, Score]]) -> None:
        done = [(job.asked[request.index], score) for request, score in finished]
        results.add({asked.line: _answer(asked, score) for asked, score in done})

    if job.requests:
        run_scores(llm, job.requests, progress=progress, on_block=keep)
    results.finish()


def _answer(asked: Asked, score: Score) -> dict[str, Any]:
    return {
        "id": asked.id,
        "logprob": score.logprob,
        "token_ids": list(score.token_ids),
        "logprobs": list(score.logprobs),
        "is_greedy": score.is_greedy,
    }
