"""What compression costs and what it saves: one text, in full precision and compressed.

The text is cut into windows. Each window's beginning is a prompt; the rest is forced through the
decode steps, so that every token is predicted from the cache as generating would keep it, on its
tiers, quantised and sparse as the policy says.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexgen_jax.llm import LLM
from flexgen_jax.planning.blocks import Block
from flexgen_jax.report import Report
from flexgen_jax.requests.outputs import RequestOutput
from flexgen_jax.requests.prompts import RequestError
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from flexgen_jax.requests.unanswered import answered
from scheduling.policy import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One way to run, beside full precision.

    Attributes:
        name: Such as ``"4-bit weights"``.
        perplexity: Of the forced tokens.
        kl_divergence: From full precision, in nats, the mean over tokens.
        top1_agreement: The share of tokens at which both have the same likeliest token.
        bytes_per_token: Over each link, per forced token.
        weight_nbytes, cache_nbytes: What the model and the largest block's cache take.
        tokens_per_second: Forced tokens over wall time, compilation aside.
    """

    name: str
    policy: Policy
    perplexity: float
    kl_divergence: float
    top1_agreement: float
    bytes_per_token: Mapping[str, float]
    weight_nbytes: int
    cache_nbytes: int
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        """Plain nested dicts."""
        return {**dataclasses.asdict(self), "policy": self.policy.to_json()}


def compare(
    make: Callable[..., AbstractContextManager[LLM]],
    text: str | Sequence[int],
    ways: Mapping[str, Mapping[str, Any]],
    *,
    context: int = 256,
    prompt_len: int | None = None,
    max_windows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Compared]:
    """Runs ``text`` in several ways, the first of which is what the others are held against.

    Args:
        make: Given fields of the policy by name, an ``LLM`` that has them; a context manager.
        text: Or its token ids.
        ways: Name -> such fields; :func:`ways_to_compress` makes them.
        context: Tokens of a window. What does not fill one at the end is left out.
        prompt_len: Of them, those that are prefilled; None: half.
        max_windows: Of the text; None: all.
        progress: Told the number of tokens whenever some are through.

    Raises:
        RequestError: a text shorter than a window, or a window that does not fit the model.
    """
    prompt_len = max(1, context // 2) if prompt_len is None else prompt_len
    if not 1 <= prompt_len < context:
        raise RequestError(f"prompt_len must be from 1 to context - 1, got {prompt_len}")
    found: list[Compared] = []
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-compare-") as directory:
        reference: np.ndarray | None = None
        for name, fields in ways.items():
            with make(**fields) as llm:
                if llm.policy.weight_bits != fields.get("weight_bits"):
                    raise RequestError(
                        f"{name} wants the model unquantised, and it is stored in "
                        f"{llm.policy.weight_bits} bits; give the model it was made from"
                    )
                windows = _windows(llm, text, context, prompt_len, max_windows)
                # Windows are of one length: nobody makes room for the next, and each block's rows
                # are who they were.
                llm.choose_policy(windows)
                llm.policy = dataclasses.replace(llm.policy, refill=False)
                shape = (len(windows), context - prompt_len, llm.config.vocab_size)
                first = reference is None
                if reference is None:
                    file = Path(directory) / "logits"
                    reference = np.memmap(file, np.float32, "w+", shape=shape)
                meter = _Meter(llm.planner.blocks(windows), reference, record=first)
                _warm_up(llm, windows)
                outputs = answered(
                    llm.run(
                        windows,
                        progress=progress,
                        on_logits=meter.logits,
                        on_block=meter.next_block,
                    )
                )
                assert llm.report is not None
                found.append(_compared(name, outputs, meter, llm.report))
        del reference
    return found


def _windows(
    llm: LLM, text: str | Sequence[int], context: int, prompt_len: int, most: int | None
) -> list[Request]:
    tokens = llm.encode(text) if isinstance(text, str) else list(text)
    count = len(tokens) // context
    if count == 0:
        raise RequestError(f"the text has {len(tokens)} tokens, a window {context}")
    params = SamplingParams(
        temperature=0.0, max_tokens=context - prompt_len, ignore_eos=True, logprobs=0
    )
    windows = []
    for index in range(count if most is None else min(count, most)):
        window = tokens[index * context : (index + 1) * context]
        llm.request(index, window[prompt_len:], SamplingParams(max_tokens=1))  # checks the ids
        request = llm.request(index, window[:prompt_len], params)
        windows.append(dataclasses.replace(request, forced=tuple(window[prompt_len:])))
    return windows


class _Enough(Exception):
    """Ends a warm-up: every program has run."""


def _warm_up(llm: LLM, windows: Sequence[Request]) -> None:
    """Compiles: of one batch, the prefill and a decode step."""
    left = [len(windows[: llm.policy.device_batch_size])]

    def progress(count: int) -> None:
        left[0] -= count
        if left[0] < 0:
            raise _Enough

    with suppress(_Enough):
        llm.run(windows[: left[0]], progress=progress)


class _Meter:
    """Sums over the logits of a run: recorded the first time, then compared."""

    def __init__(self, blocks: Sequence[Block], reference: np.ndarray, *, record: bool) -> None:
        self._batches = [[[r.index for r in k.requests] for k in b.batches] for b in blocks]
        self._block = 0
        self._reference, self._record = reference, record
        self._divergences: list[np.ndarray] = []
        self._agreements: list[np.ndarray] = []

    def next_block(self, _: list[RequestOutput]) -> None:
        self._block += 1

    def logits(self, step: int, batch: int, logits: jax.Array) -> None:
        indices = self._batches[self._block][batch]
        given = _log_softmax(np.asarray(logits)[: len(indices)])
        if self._record:
            self._reference[indices, step] = given
            return
        wanted = self._reference[indices, step]
        self._divergences.append((np.exp(wanted) * (wanted - given)).sum(axis=-1))
        self._agreements.append(wanted.argmax(axis=-1) == given.argmax(axis=-1))

    @property
    def divergence(self) -> float:
        return float(np.concatenate(self._divergences).mean()) if self._divergences else 0.0

    @property
    def agreement(self) -> float:
        return float(np.concatenate(self._agreements).mean()) if self._agreements else 1.0


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _compared(name: str, outputs: list[RequestOutput], meter: _Meter, report: Report) -> Compared:
    logprobs = list(_forced_logprobs(outputs))
    return Compared(
        name=name,
        policy=report.policy,
        perplexity=math.exp(-math.fsum(logprobs) / len(logprobs)),
        kl_divergence=meter.divergence,
        top1_agreement=meter.agreement,
        bytes_per_token={k.value: n / len(logprobs) for k, n in report.moved.items()},
        weight_nbytes=report.placement["weights"].nbytes(),
        cache_nbytes=report.placement["cache"].nbytes(),
        tokens_per_second=report.tokens_per_second,
    )


def _forced_logprobs(outputs: list[RequestOutput]) -> Iterator[float]:
    for output in outputs:
        completion = output.outputs[0]
        assert completion.logprobs is not None
        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
            yield entry[token].logprob


def ways_to_compress(**choices: Any) -> dict[str, dict[str, Any]]:
    """Full precision, each choice of compression by itself, and all together.

    Args:
        choices: ``weight_bits``, ``cache_bits``, ``attention_sparsity``; None: not that.
    """
    names = {
        "weight_bits": "{}-bit weights",
        "cache_bits": "{}-bit cache",
        "attention_sparsity": "{:.0%} of the values",
    }
    off = {"weight_bits": None, "cache_bits": None, "attention_sparsity": 1.0}
    given = {name: value for name, value in choices.items() if value not in (None, off[name])}
    found = {"full precision": off}
    for name, value in given.items():
        found[names[name].format(value)] = {**off, name: value}
    if len(given) > 1:
        found["all together"] = {**off, **given}
    return found
