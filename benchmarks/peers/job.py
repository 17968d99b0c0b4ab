"""What a driver is asked to do, and how it answers. Standard library only: peers import it, too.

A job is a JSON file: ``model`` (a path), ``precision``, ``threads``, ``settings`` of the tool,
``ends`` (token ids that end an answer; none: every answer has ``limit`` tokens), ``warm`` and
``runs``. A run has ``name``, ``prompts`` (token ids), ``limit`` and ``batch``. A driver prints a
JSON line for each of ``runs``.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import die_first, die_with, measured

Answers = list[list[int]]
Generate = Callable[[dict[str, Any]], tuple[Answers, dict[str, Any]]]
# The new tokens of each of some prompts, of which there are at most so many.
Ask = Callable[[list[list[int]], int], list[list[int]]]


class CannotRun(Exception):
    """Why the tool cannot do this here; the table says so in its row."""


def cut(tokens: list[int], ends: list[int]) -> list[int]:
    """``tokens`` up to and with the first that ends an answer."""
    found = [i for i, token in enumerate(tokens) if token in ends]
    return tokens[: found[0] + 1] if found else tokens


def in_batches(run: dict[str, Any]) -> list[list[int]]:
    """The indices of the prompts, longest first, as many as a batch has: alike in length."""
    order = sorted(range(len(run["prompts"])), key=lambda i: -len(run["prompts"][i]))
    return [order[i : i + run["batch"]] for i in range(0, len(order), run["batch"])]


def by_batches(run: dict[str, Any], ends: list[int], ask: Ask) -> Answers:
    """The answers of prompts that are asked batch by batch: each ends when its last one does."""
    answers: Answers = [[] for _ in run["prompts"]]
    for rows in in_batches(run):
        found = ask([run["prompts"][i] for i in rows], run["limit"])
        for row, tokens in zip(rows, found, strict=True):
            answers[row] = cut(tokens, ends)
    return answers


def _timed(
    generate: Generate, run: dict[str, Any], files: str | None
) -> tuple[Answers, dict[str, Any]]:
    """The answers and the figures; with ``files``, those of memory and disk, too."""
    kept: list[tuple[Answers, dict[str, Any]]] = []
    started = time.perf_counter()
    if files:
        figures = measured(lambda: kept.append(generate(run)), Path(files))
    else:
        kept.append(generate(run))
        figures = {"seconds": round(time.perf_counter() - started, 3)}
    answers, facts = kept[0]
    return answers, {**figures, **facts}


def serve(load: Callable[[dict[str, Any]], tuple[Generate, dict[str, Any]]]) -> None:
    """Loads the model, warms up and answers each run, or prints why that cannot be.

    ``load`` returns the function that answers a run, and what is to be told of the tool. What the
    function tells of a run wins over what is measured here: ``seconds`` without compiling, say.
    """
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    die_with(job["parent"])
    die_first(1000)
    started = time.perf_counter()
    try:
        generate, told = load(job)
        loading = time.perf_counter() - started
        for run in job["warm"]:
            generate(run)
        for run in job["runs"]:
            answers, figures = _timed(generate, run, job.get("files"))
            record = {
                "run": run["name"],
                **told,
                "load_seconds": round(loading, 1),
                "generated_tokens": sum(map(len, answers)),
                "peak_rss_nbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                **figures,
                "answers": answers if job["ends"] else None,
            }
            print(json.dumps(record), flush=True)
    except (CannotRun, ImportError) as error:
        print(json.dumps({"skipped": str(error)}), flush=True)
