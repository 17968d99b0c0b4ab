"""A prompt that has passed every check, and what is asked of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from flexgen_jax.requests.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt that has passed every check.

    Attributes:
        index: Its place in the input.
        scored: Per prompt token, the one that comes next, whose log-probability is wanted; -1: of
            none. None: of none at all.
        forced: What comes out, token by token, whatever is likeliest: to follow a given text
            through the cache as generating does.
        bad_words: Token sequences that are never generated.
        sample: Which of the ``n`` completions of its prompt.
        seed: Where ``params`` have none, of the call that it is part of; None: the runner's.
    """

    index: int
    prompt: str | None
    token_ids: tuple[int, ...]
    params: SamplingParams
    scored: tuple[int, ...] | None = None
    forced: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    sample: int = 0
    seed: int | None = None

    @property
    def max_tokens(self) -> int:
        """Most tokens to generate."""
        assert self.params.max_tokens is not None  # a request has passed every check
        return self.params.max_tokens

    @property
    def key(self) -> tuple[int, int]:
        """Tells it from all others of its job."""
        return self.index, self.sample

    @functools.cached_property
    def _split_bad_words(self) -> tuple[list[int], list[tuple[int, ...]]]:
        """Tokens that may never come, and sequences whose last may not come after the others."""
        single = [word[0] for word in self.bad_words if len(word) == 1]
        return single, [word for word in self.bad_words if len(word) > 1]

    def banned_after(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens that may not come next."""
        single, longer = self._split_bad_words
        last = tuple(token_ids[-max(map(len, longer), default=1) :])
        return single + [w[-1] for w in longer if last[1 - len(w) :] == w[:-1]]

    def samples(self) -> Iterator[Request]:
        """A request for each of its completions; what is asked of the prompt, of the first only."""
        yield self
        if self.params.n > 1:
            params = dataclasses.replace(self.params, prompt_logprobs=None)
            for sample in range(1, self.params.n):
                yield dataclasses.replace(self, params=params, scored=None, sample=sample)
