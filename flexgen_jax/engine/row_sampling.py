"""How each row of a batch is sampled, whoever is in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexgen_jax.engine.sampling import (
    History,
    SamplingArrays,
    SamplingFeatures,
    batch_arrays,
    seed_words,
    words_of,
)
from flexgen_jax.planning.blocks import padded_length
from flexgen_jax.requests.generated import Generated
from flexgen_jax.requests.sampling_params import SamplingParams

Rows = Sequence[Generated | None]
_GREEDY = SamplingParams(temperature=0.0)


class RowSampling:
    """The parameters of a batch's rows, made anew whenever rows change.

    What its programs are able to do, and how wide their arrays are, only grows: rows come and go,
    and few programs serve them.

    Args:
        num_steps: The most new tokens of a row.
        seed: For requests that have none of their own.
        device: That samples; None: it is another process's.

    Attributes:
        arrays, features: As ``sample`` takes them.
        num_scores: The most likeliest tokens that are asked for beside a prompt's.
    """

    arrays: SamplingArrays
    features: SamplingFeatures

    def __init__(self, num_steps: int, seed: int, device: Any) -> None:
        self._num_steps, self._seed, self._device = num_steps, seed, device
        self.features = SamplingFeatures()
        self.num_scores = 0
        self._stops = self._biases = self._words = self._prompt_len = self._only = 1
        self._forcing = False
        self._prompts: jax.Array | None = None

    def rows_are(self, rows: Rows) -> None:
        """Takes the parameters of who is in the rows now; None: nobody."""
        params = [_GREEDY if row is None else row.request.params for row in rows]
        nothing = np.zeros(2, np.uint32)
        seeds = [nothing if row is None else self._seed_of(row) for row in rows]
        stops = [[] if row is None else sorted(row.stop_ids) for row in rows]
        here = [row.request for row in rows if row is not None]
        self._stops = max(self._stops, *map(len, stops))
        self._biases = max(self._biases, *(len(p.logit_bias) for p in params))
        self._only = max(self._only, *map(words_of, params))
        self._words = max(self._words, *(len(r.bad_words) for r in here), 1)
        self.num_scores = max(self.num_scores, *(p.prompt_logprobs or 0 for p in params))
        self._forcing = self._forcing or any(r.forced is not None for r in here)
        arrays, features = batch_arrays(
            params,
            seeds,
            stops,
            len(rows),
            num_stops=self._stops,
            num_biases=self._biases,
            num_words=self._only,
        )
        self.features = _both(self.features, features)
        self.arrays = jax.device_put(arrays, self._device)
        self._prompts = None
        if self.features.penalised:
            lengths = (padded_length(len(r.token_ids)) for r in here)
            self._prompt_len = max(self._prompt_len, *lengths, 1)
            prompts = np.full((len(rows), self._prompt_len), -1, np.int32)
            for place, row in enumerate(rows):
                if row is not None:
                    ids = row.request.token_ids
                    prompts[place, : len(ids)] = ids
            self._prompts = jnp.asarray(prompts)

    def _seed_of(self, row: Generated) -> np.ndarray:
        request = row.request
        seed = self._seed if request.seed is None else request.seed
        return seed_words(request.params, (seed, request.index), request.sample)

    def history(self, rows: Rows) -> History | None:
        """What was generated, for sampling; None where no request asked for it so far."""
        if not (self.features.penalised or self.features.banning):
            return None
        output = np.full((len(rows), self._num_steps), -1, np.int32)
        banned = np.full((len(rows), self._words), -1, np.int32)
        for place, row in enumerate(rows):
            if row is None:
                continue
            output[place, : len(row.token_ids)] = row.token_ids
            words = row.request.banned_after(row.token_ids)
            banned[place, : len(words)] = words
        nothing = jnp.full((len(rows), 1), -1, jnp.int32)
        penalised = self._prompts is not None
        return History(
            nothing if self._prompts is None else self._prompts,
            jnp.asarray(output) if penalised else nothing,
            jnp.asarray(banned),
        )

    def forced(self, rows: Rows) -> np.ndarray | None:
        """The tokens (rows,) that must come now, -1: any; None: any, of all."""
        if not self._forcing:
            return None
        tokens = np.full(len(rows), -1, np.int32)
        for place, row in enumerate(rows):
            if row is not None and row.request.forced is not None:
                following = len(row.token_ids)
                if following < len(row.request.forced):
                    tokens[place] = row.request.forced[following]
        return tokens


def _both(one: SamplingFeatures, other: SamplingFeatures) -> SamplingFeatures:
    either = {
        f.name: getattr(one, f.name) or getattr(other, f.name)
        for f in dataclasses.fields(SamplingFeatures)
    }
    counts = [n for n in (one.num_logprobs, other.num_logprobs) if n is not None]
    return SamplingFeatures(**{**either, "num_logprobs": max(counts) if counts else None})
