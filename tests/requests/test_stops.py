"""A stop string ends a text where it is completed, if it is late enough."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_jax.requests.generated import Generated
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from flexgen_jax.requests.stops import first_stop, stopped_by
from flexgen_jax.requests.texts import output_of

SPECIAL = 256  # tokens are bytes, and this one, which is not text


class Bytes:
    def decode(self, ids, *, skip_special_tokens=True):
        return bytes(i for i in ids if i < SPECIAL).decode("utf-8", errors="replace")


def run(tokens, **params):
    """What comes of a request for which the model gives ``tokens``."""
    asked = SamplingParams(max_tokens=len(tokens), **params)
    generated = Generated(Request(0, None, (1,), asked), frozenset(), Bytes().decode)
    for token in tokens:
        if generated.finish_reason is None:
            generated.accept(token)
    return output_of(generated, Bytes()).outputs[0]


@pytest.mark.parametrize(
    ("text", "min_tokens", "count", "cut"),
    [
        ("abcdefgc", 0, 3, "ab"),
        ("abcdefgc", 2, 3, "ab"),
        ("abcdefgc", 3, 8, "abcdefg"),  # the first c is the third token: too early
        ("abcdefg", 4, 7, "abcdefg"),  # and does not cut when none comes later
        ("abcccc", 4, 5, "abcc"),
    ],
)
def test_only_what_is_completed_after_min_tokens_counts(text, min_tokens, count, cut):
    found = run(list(text.encode()), stop="c", min_tokens=min_tokens)
    ended = count < len(text) or cut != text
    assert (len(found.token_ids), found.text) == (count, cut)
    assert (found.finish_reason, found.stop_reason) == (
        ("stop", "c") if ended else ("length", None)
    )


def test_one_that_begins_early_and_is_completed_late_counts():
    found = run(list(b"a stop!"), stop="stop", min_tokens=5)
    assert (found.text, found.finish_reason, len(found.token_ids)) == ("a ", "stop", 6)


def test_special_tokens_in_between_are_no_text():
    tokens = list(b"hey, st") + [SPECIAL] * 90 + list(b"op")
    found = run(tokens, stop=["stop", "never"])
    assert (found.text, found.stop_reason) == ("hey, ", "stop")


@given(
    text=st.text(alphabet="ab é€😀", max_size=40),
    stop=st.text(alphabet="ab é€", min_size=1, max_size=4),
    min_tokens=st.integers(0, 30),
    special=st.lists(st.integers(0, 40), max_size=60),
)
def test_wherever_tokens_begin_and_end(text, stop, min_tokens, special):
    tokens = list(text.encode())
    for place in special:
        tokens.insert(place, SPECIAL)
    decode = Bytes().decode
    early = len(decode(tokens[:min_tokens]).rstrip("\N{REPLACEMENT CHARACTER}"))
    for count in range(min_tokens + 1, len(tokens) + 1):
        so_far = decode(tokens[:count])
        ends = [i + len(stop) for i in range(len(so_far)) if so_far.startswith(stop, i)]
        found = stopped_by(tokens[:count], [stop, "never"], decode, min_tokens)
        assert found == (stop if any(end > early for end in ends) else None)
        if found:
            break


@pytest.mark.parametrize(
    ("early", "expected"), [(0, (1, "b")), (2, (3, "cb")), (4, (3, "cb")), (5, None)]
)
def test_the_first_that_is_late_enough(early, expected):
    assert first_stop("abacb", ["b", "cb"], early) == expected
