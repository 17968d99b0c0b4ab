"""Which sequences of tokens stand for a word that is never to come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexgen_jax.requests.tokenization import Tokenizer

Sequences = tuple[tuple[int, ...], ...]


def banned_sequences(words: Iterable[str], tokenizer: Tokenizer) -> Sequences:
    """The tokens of each word, at the beginning of a text and after a space (vLLM's rule).

    White space has no space before it: there, every token that holds it.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for sequence in (
            _of_white_space(word, tokenizer) if word.isspace() else _of(word, tokenizer)
        ):
            found[tuple(sequence)] = None
    return tuple(sequence for sequence in found if sequence)


def _of(word: str, tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    for prefix in ("", " "):
        yield tokenizer.encode_words(prefix + word.lstrip(" "))


def _of_white_space(word: str, tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    yield tokenizer.encode_words(word)
    # Most words begin with a space: they are not what a ban of spaces means.
    alone = not word.strip(" ")
    for token, text in tokenizer.texts.items():
        if word in text and (text.isspace() or not alone):
            yield (token,)
