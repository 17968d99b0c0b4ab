"""What one batch of a block has produced so far, and what its sampling needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexgen_jax.engine.no_token import why_no_score, why_no_token
from flexgen_jax.engine.sampling import History, Sampled, batch_arrays, seed_words
from flexgen_jax.planning.blocks import Batch, Block
from flexgen_jax.requests.generated import Generated
from flexgen_jax.requests.outputs import Logprob
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.stops import Decode

SCORE_CHUNK = 256  # positions scored at a time: their logits are (positions, vocab)


def batch_states(
    block: Block,
    seed: int,
    eos_token_ids: Sequence[int],
    decode: Decode | None = None,
    sampler: Any = None,
) -> list[BatchState]:
    """Of each batch of ``block``; the arguments are :class:`BatchState`'s."""
    return [BatchState(batch, seed, eos_token_ids, decode, sampler) for batch in block.batches]


class BatchState:
    """The arrays of one batch on its devices, and its requests' results on the host.

    Args:
        sampler: The device that samples; None: it is another process's.
    """

    def __init__(
        self,
        batch: Batch,
        seed: int,
        eos_token_ids: Sequence[int],
        decode: Decode | None = None,
        sampler: Any = None,
    ) -> None:
        self.batch = batch
        self._padding: dict[Any, jax.Array] = {}
        self.tokens = batch.tokens()  # what the embedding takes next, on the host
        self.sampled: Sampled | None = None
        self.scores: list[Sampled] = []  # of the prompts, chunk by chunk
        self.num_scores = max(r.params.prompt_logprobs or 0 for r in batch.requests)
        self._wanted = _wanted(batch)
        self._forced = _forced(batch)
        self.left = False
        stops = [_stop_ids(r, eos_token_ids) for r in batch.requests]
        self.results = [Generated(r, s, decode) for r, s in zip(batch.requests, stops, strict=True)]
        params = [r.params for r in batch.requests]
        seeds = [seed_words(r.params, (seed, r.index), r.sample) for r in batch.requests]
        arrays, self.features = batch_arrays(params, seeds, [sorted(s) for s in stops], batch.rows)
        self.arrays = jax.device_put(arrays, sampler)
        self._prompts: jax.Array | None = None
        if self.features.penalised:
            # An empty row's prompt is one token 0, and nobody asks what comes of it.
            real = np.arange(batch.prompt_len) >= batch.padding()[:, None]
            self._prompts = jnp.asarray(np.where(real, batch.tokens(), -1))

    def padding_on(self, device: Any) -> jax.Array:
        """(rows,) int32 on ``device``: positions of padding at the left of each row."""
        if device not in self._padding:
            self._padding[device] = jax.device_put(self.batch.padding(), device)
        return self._padding[device]

    def history(self) -> History | None:
        """What was generated, for sampling; None where no request of the batch asks for it."""
        rows = self.batch.rows
        if not (self.features.penalised or self.features.banning):
            return None
        output = np.full((rows, self.batch.num_steps), -1, np.int32)
        banned: list[list[int]] = [[] for _ in range(rows)]
        for row, result in enumerate(self.results):
            output[row, : len(result.token_ids)] = result.token_ids
            banned[row] = result.request.banned_after(result.token_ids)
        # As wide as it can get, so that one program serves all steps.
        widest = max(1, *(len(r.bad_words) for r in self.batch.requests))
        filled = [[*words, *[-1] * (widest - len(words))] for words in banned]
        nothing = jnp.full((rows, 1), -1, jnp.int32)
        penalised = self._prompts is not None
        return History(
            nothing if self._prompts is None else self._prompts,
            jnp.asarray(output) if penalised else nothing,
            jnp.asarray(filled, jnp.int32),
        )

    def forced(self, step: int) -> np.ndarray | None:
        """The tokens (rows,) that step ``step`` must give, -1: any; None: any, of all."""
        return None if self._forced is None else self._forced[:, step]

    @property
    def num_score_chunks(self) -> int:
        """How many :meth:`wanted_scores` gives."""
        return -(-self._wanted.shape[1] // SCORE_CHUNK)

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
            if (why := why_no_score(scores, i)) is not None:
                result.fail(why)

    def collect(self) -> int:
        """Waits for the tokens of the step before, books them; returns how many were wanted."""
        self._collect_scores()
        if self.sampled is None:
            return 0
        sampled = jax.device_get(self.sampled)
        self.sampled = None
        self.tokens = np.maximum(sampled.token, 0)[:, None]
        count = 0
        for row, result in enumerate(self.results):
            if result.finish_reason is None:
                step = len(result.token_ids)
                if (why := why_no_token(sampled, row, step)) is not None:
                    result.fail(why)
                    continue
                count += 1
                result.accept(int(sampled.token[row]))
                wanted = result.request.params.logprobs
                if wanted is not None:
                    result.logprobs.append(_logprobs(sampled, row, wanted))
        return count

    def to_json(self) -> dict[str, Any]:
        """What was produced so far, between two steps: all that the arrays do not follow from."""
        return {
            "tokens": self.tokens.tolist(),
            "left": self.left,
            "results": [result.to_json() for result in self.results],
        }

    def restore(self, values: Mapping[str, Any]) -> None:
        """Takes what :meth:`to_json` gave."""
        self.tokens = np.asarray(values["tokens"], np.int32)
        self.left = values["left"]
        for result, kept in zip(self.results, values["results"], strict=True):
            result.restore(kept)

    def position(self, step: int) -> np.int32:
        """The column of the token that decode step ``step`` computes."""
        return np.int32(self.batch.prompt_len + step - 1)

    @property
    def begun(self) -> bool:
        """Whether its prompts are in the cache."""
        return any(result.token_ids for result in self.results)

    @property
    def length(self) -> int:
        """Positions in the cache at a step's border: the last token has none yet."""
        steps = max(len(result.token_ids) for result in self.results)
        return self.batch.prompt_len + max(steps - 1, 0)

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


def _stop_ids(request: Request, eos_token_ids: Sequence[int]) -> frozenset[int]:
    ids = set(request.params.stop_token_ids)
    if not request.params.ignore_eos:
        ids.update(eos_token_ids)
    return frozenset(ids)


def _logprobs(sampled: Sampled, row: int, wanted: int) -> dict[int, Logprob]:
    found = {
        int(i): Logprob(float(p), rank)
        for rank, (i, p) in enumerate(
            zip(sampled.top_ids[row, :wanted], sampled.top_logprobs[row, :wanted], strict=True), 1
        )
        if p > -np.inf  # what cannot come is not likely
    }
    token = int(sampled.token[row])
    found.setdefault(token, Logprob(float(sampled.logprob[row]), int(sampled.rank[row])))
    return found
