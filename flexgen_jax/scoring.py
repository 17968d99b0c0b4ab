"""Log-likelihoods: of continuations after prompts, and of a whole text.

Each sequence is one prefill; what is scored is chosen position by position. Knows no order and no
tier: the sequences run as requests of one step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from flexgen_jax.completer import Completer
from flexgen_jax.requests.outputs import RequestOutput
from flexgen_jax.requests.prompts import Prompt, RequestError, as_list, made_of_each, parse_prompt
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from flexgen_jax.requests.unanswered import answered

_PARAMS = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a continuation is after its prompt.

    Attributes:
        prompt_token_ids: What came before.
        token_ids: The continuation's.
        logprobs: Natural log-probability of each of ``token_ids``.
        is_greedy: Each of them is the likeliest token at its place.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """The continuation's: the sum over its tokens."""
        return math.fsum(self.logprobs)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        logprob: Natural log-probability of the text: the sum over its scored tokens.
        num_tokens: That were scored.
    """

    logprob: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-likelihood of a token."""
        return math.exp(-self.logprob / self.num_tokens)


def score(
    llm: Completer,
    prompts: Sequence[Prompt],
    continuations: Sequence[Prompt],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """See :meth:`LLM.score`."""
    prompts, continuations = as_list(prompts), as_list(continuations)
    if len(prompts) != len(continuations):
        raise RequestError(
            f"{len(prompts)} prompts but {len(continuations)} continuations: give one for each"
        )
    pairs = zip(prompts, continuations, strict=True)
    requests = made_of_each(pairs, lambda index, pair: score_request(llm, index, *pair))
    return run_scores(llm, requests, progress=progress)


def score_request(llm: Completer, index: int, prompt: Prompt, continuation: Prompt) -> Request:
    """Checks one pair and makes a :class:`Request` of it.

    Raises:
        RequestError: what is wrong with it.
    """
    before, after = _tokens(llm, prompt, continuation)
    if not before:
        raise RequestError(
            "the prompt has no tokens: the first one has nothing to follow; give at least one"
        )
    if not after:
        raise RequestError("the continuation has no tokens; give at least one")
    return sequence_request(llm, index, [*before, *after], len(after))


def sequence_request(llm: Completer, index: int, tokens: Sequence[int], num_scored: int) -> Request:
    """The request that scores the last ``num_scored`` of ``tokens``.

    Raises:
        RequestError: too many of them, or outside the vocabulary.
    """
    request = llm.request(index, list(tokens[:-1]), _PARAMS, scoring=True)
    llm.request(index, [tokens[-1]], _PARAMS)  # is looked up, not fed
    unscored = (-1,) * (len(tokens) - 1 - num_scored)
    return dataclasses.replace(request, scored=(*unscored, *tokens[len(tokens) - num_scored :]))


def run_scores(
    llm: Completer,
    requests: Sequence[Request],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """Runs what :func:`sequence_request` made; scores in the order of ``requests``."""
    outputs = answered(llm.run(requests, progress=progress))
    return [score_of(r, o) for r, o in zip(requests, outputs, strict=True)]


def score_of(request: Request, output: RequestOutput) -> Score:
    """What the ``output`` of such a request says."""
    assert request.scored is not None
    assert output.prompt_logprobs is not None
    tokens = tuple(t for t in request.scored if t >= 0)
    found = [
        entry[token]
        for entry, token in zip(output.prompt_logprobs[1:], tokens, strict=True)
        if entry is not None
    ]
    before = request.token_ids[: len(request.token_ids) + 1 - len(tokens)]
    greedy = all(p.rank == 1 for p in found)
    return Score(before, tokens, tuple(p.logprob for p in found), greedy)


def _tokens(llm: Completer, prompt: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
    before, after = parse_prompt(prompt), parse_prompt(continuation)
    if (before[1] is None) != (after[1] is None):
        raise RequestError("prompt and continuation must both be texts, or both be token ids")
    if before[1] is not None and after[1] is not None:
        return before[1], after[1]
    whole = llm.encode(f"{before[0]}{after[0]}")
    # Where the tokenizer joins the two across the border, the joint token is the continuation's.
    border = len(llm.encode(before[0] or ""))
    return whole[:border], whole[border:]


def perplexity(
    llm: Completer,
    text: str | Sequence[int],
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """The perplexity of a text under a sliding window.

    Args:
        text: Or its token ids. The first token is not scored.
        context: Tokens of a window; None: as many as the model takes.
        stride: How far the window moves: each token is scored once, with at least ``context -
            stride`` tokens before it, the first window's aside; None: half of ``context``.

    Raises:
        RequestError: too short a text, or a window that the model or the stride does not fit.
    """
    tokens = llm.encode(text) if isinstance(text, str) else list(text)
    requests = [
        sequence_request(llm, index, tokens[start:end], scored)
        for index, (start, end, scored) in enumerate(_windows(llm, tokens, context, stride))
    ]
    scores = run_scores(llm, requests, progress=progress)
    return Perplexity(math.fsum(s.logprob for s in scores), sum(len(s.token_ids) for s in scores))


def count_windows(
    llm: Completer, tokens: Sequence[int], context: int | None, stride: int | None
) -> int:
    """How many windows :func:`perplexity` scores; raises as it does."""
    return len(_windows(llm, tokens, context, stride))


def _windows(
    llm: Completer, tokens: Sequence[int], context: int | None, stride: int | None
) -> list[tuple[int, int, int]]:
    room = llm.config.max_position_embeddings
    context = room if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    if not 2 <= context <= room:
        raise RequestError(f"context must be from 2 to the model's {room} positions, got {context}")
    if not 1 <= stride < context:
        raise RequestError(f"stride must be from 1 to context - 1 ({context - 1}), got {stride}")
    if len(tokens) < 2:
        raise RequestError(f"the text has {len(tokens)} tokens; at least 2 are needed")
    return list(windows(len(tokens), context, stride))


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, how many at the end are scored) of each window over ``length`` tokens."""
    scored = 1
    for start in range(0, length, stride):
        end = min(start + context, length)
        if end > scored:
            yield start, end, end - scored
        scored = max(scored, end)
        if end == length:
            return
