"""Prompts that come one by one, and outputs that go one by one: never all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flexgen_jax.completer import Completer
from flexgen_jax.planning.window_size import WindowSize
from flexgen_jax.report import Report, Sum
from flexgen_jax.requests.outputs import RequestOutput
from flexgen_jax.requests.prompts import Prompt, RequestError
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from flexgen_jax.requests.unanswered import answered

_TOKEN_NBYTES = 4  # of a prompt's text, about


def generate_iter(
    llm: Completer,
    prompts: Iterable[Prompt],
    sampling_params: SamplingParams | Iterable[SamplingParams] | None,
    *,
    window: int | None,
    progress: Callable[[int], None] | None,
) -> Iterator[RequestOutput]:
    """See :meth:`LLM.generate_iter`."""
    total: Sum | None = None
    pairs = _pairs(prompts, sampling_params)
    wrong: RequestError | None = None
    index, ended = 0, False
    while not ended and wrong is None:
        # Of policy auto the first window decides, before there are blocks for it to be whole of.
        size = WindowSize.of(llm.policy.block_size if total is not None else 1, window)
        requests: list[Request] = []
        tokens = more = 0
        while not size.reached(len(requests), _TOKEN_NBYTES * tokens, more=more):
            try:
                prompt, params = next(pairs)
                requests.append(llm.request(index, prompt, params))
            except StopIteration:
                ended = True
                break
            except RequestError as error:
                wrong = RequestError(f"prompt {index}: {error}")
                break
            tokens += len(requests[-1].token_ids)
            more += requests[-1].params.n - 1
            index += 1
        if total is None:
            llm.choose_policy(requests)
            total = Sum.of(llm.planner)
        found: dict[int, RequestOutput] = {}
        sums = total

        def keep(_: int, finished: dict[int, RequestOutput], report: Report) -> None:
            sums.add(report)  # noqa: B023 # called before the next
            found.update(finished)  # noqa: B023

        llm.run_blocks(llm.planner.blocks(requests), keep, progress=progress)
        llm.report = total.total()
        for request in requests:
            yield from answered([found.pop(request.index)])
    if wrong is not None:
        raise wrong


def _pairs(
    prompts: Iterable[Prompt], params: SamplingParams | Iterable[SamplingParams] | None
) -> Iterator[tuple[Prompt, SamplingParams]]:
    if params is None or isinstance(params, SamplingParams):
        for prompt in prompts:
            yield prompt, params or SamplingParams()
        return
    of_each = iter(params)
    for number, prompt in enumerate(prompts):
        try:
            yield prompt, next(of_each)
        except StopIteration:
            raise RequestError(f"no sampling parameters for prompt {number}") from None
