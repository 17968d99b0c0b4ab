"""What one batch of a block has produced so far, and what its sampling needs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flexgen_jax.blocks import Batch, Request
from flexgen_jax.outputs import Logprob
from flexgen_jax.sampling import Sampled, batch_arrays, seed_words


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


class BatchState:
    """The arrays of one batch on the device, and its requests' results on the host."""

    def __init__(self, batch: Batch, seed: int, eos_token_id: int | None) -> None:
        self.batch = batch
        self.padding = jnp.asarray(batch.padding())
        self.tokens = batch.tokens()  # what the embedding takes next, on the host
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
        self.tokens = sampled.token[:, None]
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
