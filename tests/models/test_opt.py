"""The model as pure functions: jit, vmap, grad; prefill and decode; padding; dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexgen_jax.models import opt
from flexgen_jax.models.kv_cache import write_prompt
from flexgen_jax.models.opt import OPTConfig
from flexgen_jax.models.params import flatten, nest, param_shapes

TINY = OPTConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=24,
    max_position_embeddings=32,
)
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
# The shapes of the goldens' batch, so that its programs serve here as well.
ROWS, PROMPT, TOTAL = 7, 40, 64


@pytest.fixture
def random_tokens(pre_norm):
    rng = np.random.default_rng(0)
    return lambda *shape: rng.integers(0, pre_norm.config.vocab_size, shape).astype(np.int32)


# --- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"word_embed_proj_dim": 8, "do_layer_norm_before": False},
        {"enable_bias": False, "layer_norm_elementwise_affine": False},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_init_params_follow_the_table(options, dtype):
    config = dataclasses.replace(TINY, **options)
    flat = flatten(opt.init_params(jax.random.key(0), config, dtype))
    assert {name: leaf.shape for name, leaf in flat.items()} == param_shapes(config)
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype(dtype)}
    assert not any(name.endswith(".bias") and np.asarray(leaf).any() for name, leaf in flat.items())
    scales = [leaf for name, leaf in flat.items() if name.endswith(".scale")]
    assert all((np.asarray(leaf) == 1).all() for leaf in scales)
    assert bool(scales) == config.layer_norm_elementwise_affine


def test_init_params_are_small_random_and_repeatable():
    first = opt.init_params(jax.random.key(3), TINY)
    again = opt.init_params(jax.random.key(3), TINY)
    other = opt.init_params(jax.random.key(4), TINY)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [
        np.asarray(x).ravel()
        for n, x in flatten(first).items()
        if n.endswith((".kernel", "tokens"))
    ]
    assert np.concatenate(kernels).std() == pytest.approx(0.02, rel=0.05)
    assert not np.array_equal(first["layer_0"]["q"]["kernel"], first["layer_1"]["q"]["kernel"])
    assert not np.array_equal(first["layer_0"]["q"]["kernel"], other["layer_0"]["q"]["kernel"])


def test_init_params_can_be_evaluated_abstractly():
    shapes = jax.eval_shape(
        lambda key: opt.init_params(key, OPTConfig.preset("175b"), jnp.bfloat16), jax.random.key(0)
    )
    assert shapes["layer_95"]["fc1"]["kernel"].shape == (12288, 49152)


def test_nest_and_flatten_are_inverse():
    flat = {"embed.tokens": 1, "layer_0.q.kernel": 2, "layer_0.q.bias": 3}
    assert nest(flat) == {"embed": {"tokens": 1}, "layer_0": {"q": {"kernel": 2, "bias": 3}}}
    assert flatten(nest(flat)) == flat


# --- transformations ----------------------------------------------------------------------------


def test_jit_changes_nothing_but_speed(pre_norm, tools, random_tokens):
    tokens = random_tokens(2, 9)
    eager = opt.forward(pre_norm.params, jnp.asarray(tokens), pre_norm.config)
    assert eager.shape == (2, 9, pre_norm.config.vocab_size)
    assert eager.dtype == jnp.float32
    np.testing.assert_allclose(
        tools.forward(pre_norm.params, tokens, pre_norm.config), eager, **CLOSE
    )


def test_vmap_over_sequences_equals_the_loop(pre_norm, tools, random_tokens):
    tokens, padding = random_tokens(3, 2, 9), np.asarray([[0, 2], [5, 0], [1, 1]], np.int32)

    def one(row, pad):
        return opt.forward(pre_norm.params, row, pre_norm.config, pad)

    mapped = jax.jit(jax.vmap(one))(tokens, padding)
    looped = [
        tools.forward(pre_norm.params, t, pre_norm.config, p)
        for t, p in zip(tokens, padding, strict=True)
    ]
    np.testing.assert_allclose(mapped, np.stack(looped), **CLOSE)


def test_vmap_over_models_equals_the_loop(pre_norm, tools, random_tokens):
    """An ensemble: one axis in front of every parameter."""
    tokens = random_tokens(2, 9)
    models = [jax.tree.map(lambda x, s=s: x * s, pre_norm.params) for s in (1.0, 0.9)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    mapped = jax.jit(jax.vmap(lambda p: opt.forward(p, jnp.asarray(tokens), pre_norm.config)))(
        stacked
    )
    looped = [tools.forward(m, tokens, pre_norm.config) for m in models]
    np.testing.assert_allclose(mapped, np.stack(looped), **CLOSE)


def test_grad_agrees_with_finite_differences(smooth):
    """In one entry, the steepest, of each parameter of a model without kinks."""
    tokens = jnp.asarray(smooth.prompts[3])[None]

    @jax.jit
    def loss(params):
        log_probs = jax.nn.log_softmax(opt.forward(params, tokens[:, :-1], smooth.config))
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1).mean()

    gradient = jax.device_get(flatten(jax.jit(jax.grad(loss))(smooth.params)))
    flat = jax.device_get(flatten(smooth.params))
    assert gradient.keys() == flat.keys()
    for name, slope in gradient.items():
        if name.endswith(".k.bias"):  # shifts all scores of a query alike: no influence
            np.testing.assert_allclose(slope, 0, atol=1e-5)
            continue
        where = np.unravel_index(np.abs(slope).argmax(), slope.shape)

        def moved(by, name=name, where=where):
            array = flat[name].copy()
            array[where] += by
            return float(loss(nest({**flat, name: array})))

        difference = (moved(1e-2) - moved(-1e-2)) / 2e-2
        assert difference == pytest.approx(float(slope[where]), rel=0.02, abs=1e-3), name


def test_padding_has_no_gradient(smooth):
    tokens, padding = jnp.asarray([[7, 7, 7, 20, 21, 22]]), jnp.asarray([3])

    def loss(params):
        return opt.forward(params, tokens, smooth.config, padding)[:, 3:].sum()

    gradient = jax.jit(jax.grad(loss))(smooth.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(gradient["embed"]["tokens"][7], 0)
    assert np.abs(gradient["embed"]["tokens"][20]).max() > 0


# --- prefill and decode -------------------------------------------------------------------------


def test_prefill_and_decode_equal_forward(golden, tools):
    """Token after token, fed from outside rather than chosen, with and without padding."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, golden.config.vocab_size, (ROWS, TOTAL)).astype(np.int32)
    padding = np.asarray([0, 3, 8, 13, 21, 34, 39], np.int32)
    whole = np.asarray(tools.forward(golden.params, tokens, golden.config, padding))
    logits, caches = tools.prefill(
        golden.params, tokens[:, :PROMPT], golden.config, cache_len=TOTAL, padding=padding
    )
    np.testing.assert_allclose(logits, whole[:, PROMPT - 1], **CLOSE)
    for position in range(PROMPT, TOTAL):
        logits, caches = tools.decode(
            golden.params,
            tokens[:, position],
            caches,
            np.int32(position),
            golden.config,
            padding=padding,
        )
        np.testing.assert_allclose(logits, whole[:, position], **CLOSE)
    assert len(caches) == golden.config.num_hidden_layers
    assert caches[0].key.shape == caches[0].value.shape == (ROWS, 3, TOTAL, 8)


def test_the_room_in_the_cache_does_not_matter(pre_norm, tools, random_tokens):
    tokens = random_tokens(2, 9)
    exact, _ = tools.prefill(pre_norm.params, tokens, pre_norm.config, cache_len=9)
    roomy, caches = tools.prefill(pre_norm.params, tokens, pre_norm.config, cache_len=16)
    np.testing.assert_allclose(exact, roomy, **CLOSE)
    assert not np.asarray(caches[0].key[:, :, 9:]).any()


def test_a_cache_shorter_than_the_prompt_is_refused():
    key = jnp.zeros((1, 2, 5, 4))
    with pytest.raises(ValueError, match="cache_len 4 is shorter than the prompt, 5"):
        write_prompt(key, key, 4)


# --- padding ------------------------------------------------------------------------------------


def test_neighbours_and_what_lies_in_the_padding_do_not_change_a_bit(golden, tools):
    """At one shape, a row's logits depend on its own tokens only: bit for bit."""
    vocab = golden.config.vocab_size
    row, pad = np.random.default_rng(2).integers(0, vocab, TOTAL).astype(np.int32), 24

    def run(index: int, seed: int) -> list[np.ndarray]:
        noise = np.random.default_rng(seed)
        tokens = noise.integers(0, vocab, (ROWS, PROMPT)).astype(np.int32)
        padding = noise.integers(0, PROMPT, ROWS).astype(np.int32)
        tokens[index, pad:], padding[index] = row[pad:PROMPT], pad
        logits, caches = tools.prefill(
            golden.params, tokens, golden.config, cache_len=TOTAL, padding=padding
        )
        seen = [np.asarray(logits)[index]]
        for position in range(PROMPT, PROMPT + 4):
            token = noise.integers(0, vocab, ROWS).astype(np.int32)
            token[index] = row[position]
            logits, caches = tools.decode(
                golden.params, token, caches, np.int32(position), golden.config, padding=padding
            )
            seen.append(np.asarray(logits)[index])
        return seen

    first = run(0, seed=0)
    for index, seed in ((0, 1), (1, 2), (4, 3), (ROWS - 1, 4)):
        np.testing.assert_array_equal(first, run(index, seed))


def test_more_padding_changes_logits_within_rounding_only(golden, tools):
    prompt = golden.prompts[4]
    shifts = [0, 1, 2, 9, 16, 30, TOTAL - len(prompt)]
    tokens = np.full((ROWS, TOTAL), golden.config.pad_token_id, np.int32)
    for row, shift in zip(tokens, shifts, strict=True):
        row[shift : shift + len(prompt)] = prompt
    logits = np.asarray(
        tools.forward(golden.params, tokens, golden.config, np.asarray(shifts, np.int32))
    )
    first, *others = (logits[i, s : s + len(prompt)] for i, s in enumerate(shifts))
    for other in others:
        np.testing.assert_allclose(other, first, **CLOSE)


def test_rows_of_padding_alone_are_finite(golden, tools):
    """The last batch of a block may be filled up with rows that nobody asked for."""
    tokens = np.ones((ROWS, PROMPT), np.int32)
    padding = np.asarray([PROMPT] * 5 + [PROMPT - 1, 0], np.int32)
    logits, caches = tools.prefill(
        golden.params, tokens, golden.config, cache_len=TOTAL, padding=padding
    )
    assert np.isfinite(logits).all()
    logits, _ = tools.decode(
        golden.params, tokens[:, 0], caches, np.int32(PROMPT), golden.config, padding=padding
    )
    assert np.isfinite(logits).all()


# --- bfloat16 -----------------------------------------------------------------------------------


def halve(params: opt.Params) -> opt.Params:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24)])
def test_one_bfloat16_row_equals_the_same_row_of_two(pre_norm, shape):
    """A single row takes a way of its own, which must not show."""
    params = halve(pre_norm.params)
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    both = jnp.concatenate([x, x])
    linear = jax.jit(opt.linear)
    layer = params["layer_0"]["fc1"]
    assert linear(layer, x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(linear(layer, x), linear(layer, both)[:1])
    head = jax.jit(opt.head, static_argnames="config")
    table = params["embed"]["tokens"]
    one = head(params["head"], table, x, pre_norm.config)
    assert one.dtype == jnp.float32
    np.testing.assert_array_equal(one, head(params["head"], table, both, pre_norm.config)[:1])


def test_one_bfloat16_query_equals_the_same_query_of_two():
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 3, 1, 8), jnp.bfloat16)
    key, value = (jax.random.normal(k, (2, 3, 16, 8), jnp.bfloat16) for k in keys[1:])
    visible = (jnp.arange(16) < 11)[None, None].repeat(2, axis=0)
    attend = jax.jit(opt.attend)
    both = attend(jnp.concatenate([query, query], axis=2), key, value, visible)
    np.testing.assert_array_equal(attend(query, key, value, visible), both[:, :, :1])


@pytest.mark.parametrize("variant", ["pre_norm", "smooth"])
def test_bfloat16_generation_of_one_row(variant, tools, request):
    """One sequence of one token, then decoding, is the batch of two alike, and near float32."""
    golden = request.getfixturevalue(variant)
    params = halve(golden.params)
    prompt = golden.prompts[0]

    def run(params: opt.Params, count: int) -> np.ndarray:
        tokens, padding = tools.left_pad([prompt] * count)
        logits, caches = tools.prefill(
            params, tokens, golden.config, cache_len=TOTAL, padding=padding
        )
        seen = [np.asarray(logits)]
        for position in (1, 2, 3):
            token = np.full(count, golden.tokens[0][position - 1], np.int32)
            logits, caches = tools.decode(
                params, token, caches, np.int32(position), golden.config, padding=padding
            )
            seen.append(np.asarray(logits))
        assert {c.dtype for cache in caches for c in cache} == {params["embed"]["tokens"].dtype}
        return np.stack(seen)

    one, two, exact = run(params, 1), run(params, 2), run(golden.params, 1)
    assert one.dtype == np.float32
    np.testing.assert_allclose(one[:, 0], two[:, 0], rtol=1e-2, atol=1e-2 * np.abs(exact).max())
    # bfloat16 keeps 8 bits, through two layers.
    assert np.abs(one - exact).max() < 0.1 * np.abs(exact).max()


def test_flash_attention_is_asked_for_the_same_thing(monkeypatch):
    """What a GPU computes by cuDNN, by the same call's plain implementation."""
    keys = jax.random.split(jax.random.key(3), 3)
    query, key, value = (jax.random.normal(k, (3, 2, 9, 8)) for k in keys)
    padding = jnp.asarray([0, 4, 8], jnp.int32)
    plain = np.asarray(opt.attend_prompt(query, key, value, padding))
    flash = np.asarray(opt.attend_prompt(query, key, value, padding, flash="xla"))
    for row, pad in enumerate((0, 4, 8)):
        np.testing.assert_allclose(flash[row, :, pad:], plain[row, :, pad:], **CLOSE)
    asked = []

    def cudnn(q, k, v, *, mask, scale, is_causal, implementation):
        asked.append((q.shape, mask.shape, scale, is_causal, implementation))
        return q

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    half = (x.astype(jnp.bfloat16) for x in (query, key, value))
    assert opt.attend_prompt(*half, padding).shape == (3, 2, 9, 8)
    opt.attend_prompt(query, key, value, padding)  # not in 32 bits
    assert asked == [((3, 9, 2, 8), (3, 1, 9, 9), 1.0, True, "cudnn")]
