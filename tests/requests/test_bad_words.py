"""Bad words are banned as the tokens that stand for them, white space in every token."""

from pathlib import Path

import pytest

from flexgen_jax.requests.bad_words import banned_sequences
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from flexgen_jax.requests.tokenization import Tokenizer, load_tokenizer

DEMO = load_tokenizer(Path(__file__).parents[2] / "flexgen_jax" / "demo_model")


def tokenizer_of(*tokens):
    """One that knows ``tokens``, as GPT-2's byte level writes them."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def test_a_newline_is_banned_in_whatever_token_it_comes():
    words = ["?", "a", "Ċ", "ĊĊ", ".Ċ", "Ġ", "ĠĊ", "Ġa"]  # Ċ: a newline, Ġ: a space
    tokenizer = tokenizer_of(*words)
    assert tokenizer.texts[4] == ".\n"
    newline = {words.index(w) for w in ("Ċ", "ĊĊ", ".Ċ", "ĠĊ")}
    assert {token for (token,) in banned_sequences(["\n"], tokenizer)} == newline
    space = {words.index(w) for w in ("Ġ", "ĠĊ")}
    assert {token for (token,) in banned_sequences([" "], tokenizer)} == space


def test_a_newline_bans_no_space():
    assert banned_sequences(["\n"], DEMO) == ((202,),)
    assert banned_sequences([" "], DEMO) == ((224,),)
    assert banned_sequences(["\n\n", "\t"], DEMO) == ((202, 202), (201,))


def test_a_word_is_banned_at_the_beginning_and_after_a_space():
    """ " have" is one token, and not what stands for "ave"."""
    sequences = banned_sequences(["ave"], DEMO)
    assert set(sequences) == {tuple(DEMO.encode_words(w)) for w in ("ave", " ave")}
    assert tuple(DEMO.encode_words(" have")) not in sequences
    assert banned_sequences([" ave", "ave"], DEMO) == sequences
    assert DEMO.encode_words("\nave") in map(list, banned_sequences(["\nave"], DEMO))


@pytest.mark.parametrize(
    ("token_ids", "banned"),
    [([], [9]), ([1], [9, 2]), ([5, 1], [9, 2]), ([1, 2], [9, 3]), ([2], [9]), ([1, 2, 3], [9])],
)
def test_the_last_token_of_a_sequence_may_not_come_after_the_others(token_ids, banned):
    request = Request(0, None, (1,), SamplingParams(), bad_words=((9,), (1, 2), (1, 2, 3)))
    assert request.banned_after(token_ids) == banned
