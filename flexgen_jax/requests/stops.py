"""Where a text ends: at the first of its stop strings, wherever tokens begin and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

# Bytes that a character takes at most: so many tokens may make one.
_UTF8 = 4


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the first of ``stops`` begins in ``text``, and which it is; None: there is none.

    Of several that begin at one place, the first given.
    """
    found = [(place, i) for i, stop in enumerate(stops) if (place := text.find(stop)) >= 0]
    if not found:
        return None
    place, i = min(found)
    return place, stops[i]


def stopped_by(tokens: Sequence[int], stops: Sequence[str], decode: Decode) -> str | None:
    """The stop string that the last token has completed; None: none.

    Only so much of the end is decoded as a stop string can reach back.
    """
    reach = _UTF8 * max(map(len, stops)) + _UTF8
    found = first_stop(decode(tokens[-reach:]), stops)
    if found is None or len(tokens) <= reach:
        return found[1] if found else None
    # The cut may have fallen into a character: the whole text decides.
    whole = first_stop(decode(tokens), stops)
    return whole[1] if whole else None
