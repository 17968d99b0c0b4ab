"""Where a text ends: at the first of its stop strings, wherever tokens begin and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]  # without special tokens

# Bytes that a character takes at most: so many tokens may make one.
_UTF8 = 4
_HALF = "\N{REPLACEMENT CHARACTER}"  # what the first of them decode to


def first_stop(text: str, stops: Sequence[str], early: int = 0) -> tuple[int, str] | None:
    """Where the first of ``stops`` begins in ``text``, and which it is; None: there is none.

    Of several that begin at one place, the first given. One that ends within the ``early`` first
    characters does not count.
    """
    found = [
        (place, i)
        for i, stop in enumerate(stops)
        if (place := text.find(stop, max(0, early - len(stop) + 1))) >= 0
    ]
    if not found:
        return None
    place, i = min(found)
    return place, stops[i]


def stopped_by(
    tokens: Sequence[int], stops: Sequence[str], decode: Decode, min_tokens: int = 0
) -> str | None:
    """The stop string that the last token has completed; None: none.

    One that the first ``min_tokens`` tokens have completed does not count. Only so much of the end
    is decoded as a stop string can reach back.
    """
    tail = _tail(tokens, max(map(len, stops)), decode)
    found = first_stop(decode(tail), stops)
    if found is None or (len(tail) == len(tokens) and not min_tokens):
        return found[1] if found else None
    # The cut may have fallen into a character, and what was found may be too early.
    whole = first_stop(decode(tokens), stops, _early(tokens, min_tokens, decode))
    return whole[1] if whole else None


def up_to(
    stop: str, tokens: Sequence[int], decode: Decode, min_tokens: int = 0, *, include: bool = False
) -> str:
    """The text of ``tokens`` before ``stop``, by which :func:`stopped_by` has found it to end.

    Args:
        include: The text ends with ``stop``.
    """
    text = decode(tokens)
    found = first_stop(text, [stop], _early(tokens, min_tokens, decode))
    return text if found is None else text[: found[0] + (len(stop) if include else 0)]


def _early(tokens: Sequence[int], min_tokens: int, decode: Decode) -> int:
    """How many characters the first ``min_tokens`` tokens make; a half one is still to come."""
    return len(decode(tokens[:min_tokens]).rstrip(_HALF)) if min_tokens else 0


def _tail(tokens: Sequence[int], longest: int, decode: Decode) -> Sequence[int]:
    """The last token, and before it what has at least ``longest`` characters, if there is."""
    reach = _UTF8 * longest + _UTF8
    # Special tokens are no text.
    while reach < len(tokens) and len(decode(tokens[-reach:-1])) < longest + _UTF8:
        reach *= 2
    return tokens[-reach:]
