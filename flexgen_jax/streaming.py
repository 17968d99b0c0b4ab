"""Prompts that come one by one, and outputs that go one by one: never all of them at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from flexgen_jax.completer import Completer
from flexgen_jax.planning.window_size import WindowSize
from flexgen_jax.report import Report, Sum
from flexgen_jax.requests.outputs import RequestOutput
from flexgen_jax.requests.pairs import failed_output
from flexgen_jax.requests.prompts import OnError, RequestError
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from flexgen_jax.requests.unanswered import answered

_TOKEN_NBYTES = 4  # of a prompt's text, about


def generate_iter(
    llm: Completer,
    pairs: Iterator[tuple[Any, SamplingParams]],
    *,
    window: int | None,
    progress: Callable[[int], None] | None,
    on_error: OnError,
    seed: int,
) -> Iterator[RequestOutput]:
    """See :meth:`LLM.generate_iter`."""
    total: Sum | None = None
    wrong: RequestError | None = None
    index, ended = 0, False
    while not ended and wrong is None:
        # Of policy auto the first window decides, before there are blocks for it to be whole of.
        size = WindowSize.of(llm.policy.block_size if total is not None else 1, window)
        requests: list[Request] = []
        found: dict[int, RequestOutput] = {}
        first, tokens, more = index, 0, 0
        while not size.reached(index - first, _TOKEN_NBYTES * tokens, more=more):
            try:
                prompt, params = next(pairs)
            except StopIteration:
                ended = True
                break
            except RequestError as error:
                wrong = RequestError(f"prompt {index}: {error}")
                break
            try:
                requests.append(dataclasses.replace(llm.request(index, prompt, params), seed=seed))
            except RequestError as error:
                if on_error == "raise":
                    wrong = RequestError(f"prompt {index}: {error}")
                    break
                found[index] = failed_output(index, prompt, error)
            else:
                tokens += len(requests[-1].token_ids)
                more += requests[-1].params.n - 1
            index += 1
        if total is None:
            llm.choose_policy(requests)
            total = Sum.of(llm.planner)
        sums = total

        def keep(_: int, finished: dict[int, RequestOutput], report: Report) -> None:
            sums.add(report)  # noqa: B023 # called before the next
            found.update(finished)  # noqa: B023

        llm.run_blocks(llm.planner.blocks(requests), keep, progress=progress)
        llm.report = dataclasses.replace(total.total(), seed=seed)
        for number in range(first, index):
            output = found.pop(number)
            yield from answered([output]) if on_error == "raise" else [output]
    if wrong is not None:
        raise wrong
