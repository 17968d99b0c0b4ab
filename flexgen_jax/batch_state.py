"""What one batch of a block has produced so far, and what its sampling needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flexgen_jax.blocks import Batch, Request
from flexgen_jax.outputs import Logprob
from flexgen_jax.sampling import Sampled, batch_arrays, seed_words

SCORE_CHUNK = 256  # positions scored at a time: their logits are (positions, vocab)


@dataclasses.dataclass
class Generated:
    """What one request has produced so far (host side)."""

    request: Request
    stop_ids: frozenset[int]
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    scores: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
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
        self.scores: list[Sampled] = []  # of the prompts, chunk by chunk
        self.num_scores = max(r.params.prompt_logprobs or 0 for r in batch.requests)
        self._wanted = _wanted(batch)
        self._forced = _forced(batch)
        self.left = False
        stops = [_stop_ids(r, eos_token_id) for r in batch.requests]
        self.results = [Generated(r, s) for r, s in zip(batch.requests, stops, strict=True)]
        params = [r.params for r in batch.requests]
        seeds = [seed_words(r.params, (seed, r.index)) for r in batch.requests]
        self.arrays, self.features = batch_arrays(
            params, seeds, [sorted(s) for s in stops], batch.rows
        )

    def forced(self, step: int) -> np.ndarray | None:
        """The tokens (rows,) that step ``step`` must give, -1: any; None: any, of all."""
        return None if self._forced is None else self._forced[:, step]

    def wanted_scores(self) -> Iterator[np.ndarray]:
        """Rows, positions and next tokens (3, SCORE_CHUNK) whose log-probability is wanted."""
        for start in range(0, self._wanted.shape[1], SCORE_CHUNK):
            chunk = self._wanted[:, start : start + SCORE_CHUNK]
            yield np.pad(chunk, ((0, 0), (0, SCORE_CHUNK - chunk.shape[1])))

    def _collect_scores(self) -> None:
        if not self.scores:
            return
        scores = jax.tree.map(lambda *x: np.concatenate(x), *jax.device_get(self.scores))
        self.scores = []
        for i, row in enumerate(self._wanted[0]):
            result = self.results[row]
            wanted = result.request.params.prompt_logprobs or 0
            result.scores.append(_logprobs(scores, i, wanted))

    def collect(self) -> int:
        """Waits for the tokens of the step before, books them; returns how many were wanted."""
        self._collect_scores()
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


def _wanted(batch: Batch) -> np.ndarray:
    """Every row, position and next token (3, n) int32 that a request wants scored."""
    found = [np.zeros((3, 0), np.int32)]
    for row, request in enumerate(batch.requests):
        if request.scored is not None:
            tokens = np.asarray(request.scored, np.int32)
            (index,) = np.nonzero(tokens >= 0)
            position = index + batch.prompt_len - len(tokens)
            found.append(np.stack([np.full(len(index), row), position, tokens[index]]))
    return np.concatenate(found, axis=1).astype(np.int32)


def _forced(batch: Batch) -> np.ndarray | None:
    """(rows, steps) int32, -1 where a row is free; None if all are."""
    if all(r.forced is None for r in batch.requests):
        return None
    tokens = np.full((batch.rows, batch.num_steps), -1, np.int32)
    for row, request in enumerate(batch.requests):
        tokens[row, : len(request.forced or ())] = request.forced or ()
    return tokens


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
