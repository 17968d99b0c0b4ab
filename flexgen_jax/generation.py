"""What the ops of a schedule do for one block: the state of its batches, and their results.

The executor says when; :mod:`flexgen_jax.kernels` compute; :mod:`flexgen_jax.weights` fetch. The
cache and the hidden states stay on the device here, so moving them is no work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexgen_jax import kernels
from flexgen_jax.blocks import Batch, Block, Request
from flexgen_jax.kv_cache import LayerCache
from flexgen_jax.outputs import Logprob
from flexgen_jax.sampling import Sampled, batch_arrays, sample, seed_words
from flexgen_jax.weights import LayerWeights, Weights
from scheduling.dependencies import Issue
from scheduling.ops import Barrier, Compute, FreeWeights, LoadWeights, Op
from storage.slots import Ring

OnLogits = Callable[[int, int, jax.Array], None]
OnTokens = Callable[[int], None]


@dataclasses.dataclass
class Generated:
    """What one request has produced so far (host side)."""

    request: Request
    stop_ids: frozenset[int]
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def accept(self, token: int) -> None:
        self.token_ids.append(token)
        if token in self.stop_ids and len(self.token_ids) > self.request.params.min_tokens:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.request.params.max_tokens:
            self.finish_reason = "length"


class _BatchState:
    """The arrays of one batch on the device, and its requests' results on the host."""

    def __init__(self, batch: Batch, seed: int, eos_token_id: int | None) -> None:
        self.batch = batch
        self.padding = jnp.asarray(batch.padding())
        self.hidden: jax.Array | None = None
        self.caches: dict[int, LayerCache] = {}
        self.sampled: Sampled | None = None
        self.left = False
        stops = [_stop_ids(r, eos_token_id) for r in batch.requests]
        self.results = [Generated(r, s) for r, s in zip(batch.requests, stops, strict=True)]
        params = [r.params for r in batch.requests]
        seeds = [seed_words(r.params, (seed, r.index)) for r in batch.requests]
        self.arrays, self.features = batch_arrays(
            params, seeds, [sorted(s) for s in stops], batch.rows
        )

    def collect(self) -> int:
        """Waits for the tokens of the step before, books them; returns how many were wanted."""
        if self.sampled is None:
            return 0
        sampled = jax.device_get(self.sampled)
        self.sampled = None
        count = 0
        for row, result in enumerate(self.results):
            if result.finish_reason is None:
                count += 1
                result.accept(int(sampled.token[row]))
                wanted = result.request.params.logprobs
                if wanted is not None:
                    result.logprobs.append(_logprobs(sampled, row, wanted))
        return count

    @property
    def finished(self) -> bool:
        return all(result.finish_reason is not None for result in self.results)

    def leave(self) -> None:
        """Drops the batch's arrays: its cache makes room at once."""
        self.left = True
        self.hidden = None
        self.caches.clear()


def _stop_ids(request: Request, eos_token_id: int | None) -> frozenset[int]:
    ids = set(request.params.stop_token_ids)
    if not request.params.ignore_eos and eos_token_id is not None:
        ids.add(eos_token_id)
    return frozenset(ids)


def _logprobs(sampled: Sampled, row: int, wanted: int) -> dict[int, Logprob]:
    found = {
        int(i): Logprob(float(p), rank)
        for rank, (i, p) in enumerate(
            zip(sampled.top_ids[row, :wanted], sampled.top_logprobs[row, :wanted], strict=True), 1
        )
    }
    token = int(sampled.token[row])
    found.setdefault(token, Logprob(float(sampled.logprob[row]), int(sampled.rank[row])))
    return found


class BlockEffects:
    """The ``Effects`` of one block. Use :meth:`results` after the schedule has run.

    Args:
        seed: The ``LLM``'s seed, for requests without their own.
        on_tokens: Told how many new tokens were booked, at each step border of a batch.
        on_logits: Given (step, batch, logits) of every head computation: for tests and research.
    """

    def __init__(
        self,
        block: Block,
        weights: Weights,
        ring: Ring,
        *,
        seed: int,
        on_tokens: OnTokens | None = None,
        on_logits: OnLogits | None = None,
    ) -> None:
        self._config = weights.config
        self._weights = weights
        self._ring = ring
        self._on_tokens = on_tokens
        self._on_logits = on_logits
        self._head = weights.num_layers - 1
        self._states = [_BatchState(b, seed, self._config.eos_token_id) for b in block.batches]
        self._loaded: dict[int, LayerWeights] = {}
        self._readers: dict[int, list[jax.Array]] = {}
        self._last_marker: jax.Array | None = None
        self._finished = False

    def effortless(self, op: Op) -> bool:
        """Weights resident on the device need no loading; cache and hidden never move here."""
        if isinstance(op, (LoadWeights, FreeWeights)):
            return self._weights.resident(op.layer) is not None
        return not isinstance(op, (Compute, Barrier))

    def wanted(self, op: Op) -> bool:
        if isinstance(op, (FreeWeights, Barrier)):
            return True
        if isinstance(op, LoadWeights):
            return not self._finished
        return not self._states[op.batch].left

    def finished(self) -> bool:
        return self._finished

    def make_room(self, issue: Issue) -> None:
        if isinstance(issue.op, LoadWeights):
            assert issue.slot is not None
            self._ring[issue.slot].begin()

    def perform(self, issue: Issue) -> Any:
        op = issue.op
        match op:
            case LoadWeights():
                assert issue.slot is not None
                self._loaded[op.layer] = self._weights.load(op.layer, self._ring[issue.slot])
                self._readers[op.layer] = []
            case FreeWeights():
                assert issue.slot is not None
                readers = self._readers.pop(op.layer, [])
                if self._loaded.pop(op.layer, None) is not None:
                    self._ring[issue.slot].release(readers)
            case Compute():
                return self._compute(op)
            case Barrier():
                # Dispatched is not computed: a barrier means computed.
                jax.block_until_ready(self._last_marker)
            case _:
                raise TypeError(f"{op} moves nothing here and should not reach a stream")
        return None

    def _compute(self, op: Compute) -> jax.Array | None:
        state = self._states[op.batch]
        if op.layer == 0 and op.step > 0 and self._border(state):
            return None
        weights = self._weights.resident(op.layer) or self._loaded[op.layer]
        marker = self._run_layer(op, state, weights)
        if op.layer in self._readers:
            self._readers[op.layer].append(marker)
        self._last_marker = marker
        return marker

    def _border(self, state: _BatchState) -> bool:
        """Books the tokens of the step before; True if the batch is finished and leaves."""
        tokens = state.sampled.token if state.sampled is not None else None
        self._book(state)
        if state.finished:
            state.leave()
            self._finished = all(s.left for s in self._states)
            return True
        assert tokens is not None
        state.hidden = tokens[:, None]  # the head's output is what the next step embeds
        return False

    def _book(self, state: _BatchState) -> None:
        count = state.collect()
        if count and self._on_tokens is not None:
            self._on_tokens(count)

    def _run_layer(self, op: Compute, state: _BatchState, weights: LayerWeights) -> jax.Array:
        batch, config = state.batch, self._config
        position = np.int32(batch.prompt_len + op.step - 1)
        if op.layer == 0:
            tokens = state.hidden if op.step else jnp.asarray(batch.tokens())
            first = position if op.step else np.int32(0)
            state.hidden, marker = kernels.embed(
                weights.params, tokens, first, state.padding, config=config
            )
        elif op.layer == self._head:
            logits = kernels.head(weights.params, weights.token_table, state.hidden, config=config)
            if self._on_logits is not None:
                self._on_logits(op.step, op.batch, logits)
            state.sampled = sample(logits, state.arrays, np.int32(op.step), features=state.features)
            marker = state.sampled.token
        elif op.step == 0:
            state.hidden, state.caches[op.layer], marker = kernels.prefill_layer(
                weights.params,
                state.hidden,
                state.padding,
                config=config,
                cache_len=batch.cache_len,
            )
        else:
            state.hidden, state.caches[op.layer], marker = kernels.decode_layer(
                weights.params,
                state.hidden,
                state.caches.pop(op.layer),
                position,
                state.padding,
                config=config,
            )
        return marker

    def results(self) -> Iterator[Generated]:
        """What every request of the block produced; books the last step's tokens first."""
        for state in self._states:
            self._book(state)
            yield from state.results
