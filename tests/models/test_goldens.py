"""opt.py gives transformers' answers, for each variant of the architecture."""

import numpy as np
import pytest

from flexgen_jax.models.opt import OPTConfig

NEW_TOKENS = 24
# float32 on both sides; logits are of the order of ten.
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


def test_the_goldens_cover_what_they_should(golden):
    lengths = [len(p) for p in golden.prompts]
    assert lengths[0] == 1
    assert len(set(lengths)) == len(lengths)
    assert {len(t) for t in golden.tokens} == {NEW_TOKENS}
    assert max(lengths) + NEW_TOKENS == golden.config.max_position_embeddings
    pad = golden.config.pad_token_id
    assert any(p[0] == pad for p in golden.prompts)
    assert any(pad in p[1:-1] for p in golden.prompts)
    # Were the pad token's embedding zero, taking it for padding might go unnoticed.
    assert np.abs(golden.params["embed"]["tokens"][pad]).max() > 0.1


def test_one_left_padded_batch_of_all_prompts(golden, tools):
    chosen, logits = tools.greedy(
        golden.params,
        golden.config,
        *tools.left_pad(golden.prompts),
        new_tokens=NEW_TOKENS,
        cache_len=golden.config.max_position_embeddings,
    )
    assert chosen == golden.tokens
    np.testing.assert_allclose(logits, golden.logits, **CLOSE)


def alone(golden, tools, index, length=None):
    chosen, logits = tools.greedy(
        golden.params,
        golden.config,
        *tools.left_pad([golden.prompts[index]], length),
        new_tokens=NEW_TOKENS,
        cache_len=golden.config.max_position_embeddings,
    )
    assert chosen == [golden.tokens[index]]
    np.testing.assert_allclose(logits[0], golden.logits[index], **CLOSE)


def test_each_prompt_alone(golden, tools):
    longest = max(map(len, golden.prompts))
    for index in range(len(golden.prompts)):
        alone(golden, tools, index, longest)


@pytest.mark.parametrize("index", [2, 3])
def test_a_prompt_alone_and_unpadded(pre_norm, tools, index):
    """Each length is a program of its own to compile, so not for all; these have the pad token."""
    alone(pre_norm, tools, index)


def test_a_prompt_of_one_token_alone_and_unpadded(golden, tools):
    alone(golden, tools, 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_chooses_the_same_tokens(golden, tools, side):
    """Every greedy token is the winner of one forward pass over prompt and answer."""
    rows = [p + t for p, t in zip(golden.prompts, golden.tokens, strict=True)]
    tokens, padding = tools.left_pad(rows, fill=golden.config.pad_token_id)
    starts = padding.copy()
    if side == "right":  # nothing to the right of a token influences it, so no mask is needed
        tokens = np.stack([np.roll(r, -n) for r, n in zip(tokens, padding, strict=True)])
        padding = starts = np.zeros_like(padding)
    logits = np.asarray(tools.forward(golden.params, tokens, golden.config, padding))
    for i, (prompt, answer) in enumerate(zip(golden.prompts, golden.tokens, strict=True)):
        first = starts[i] + len(prompt) - 1
        np.testing.assert_allclose(logits[i, first], golden.logits[i], **CLOSE)
        assert logits[i, first : first + len(answer)].argmax(-1).tolist() == answer


def test_the_configs_are_read_as_transformers_wrote_them(golden):
    config = golden.config
    assert (config.vocab_size, config.hidden_size, config.head_dim) == (80, 24, 8)
    assert OPTConfig.from_json(config.to_json()) == config
