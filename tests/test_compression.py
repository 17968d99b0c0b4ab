"""Quantised weights and cache, sparse attention: what they compute, and what they move.

That placement and schedule do not change a bit of it is part of the crown test (test_llm.py).
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexgen_jax as fg
import flexgen_jax.engine.unpacking
from flexgen_jax.compare import compare, ways_to_compress
from flexgen_jax.models import opt
from flexgen_jax.models.kv_cache import CacheFormat, KeptCache, LayerCache
from flexgen_jax.models.packed import dense_tree
from flexgen_jax.models.params import nest, param_shapes
from flexgen_jax.models.quantization import dequantize
from flexgen_jax.weights.checkpoint import convert
from flexgen_jax.weights.element_blocks import dense_array
from scheduling.sizes import Link
from storage.array_file import describe_array
from storage.wrappers import Logged

GOLDENS = Path(__file__).parent / "goldens"
PROMPTS = json.loads((GOLDENS / "expected.json").read_text())["prompts"]
NEW = 9
GREEDY = fg.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
HOST = fg.Split(device=0, host=100)
DISK = fg.Split(device=0, disk=100)
MIXED = fg.Split(device=30, host=30, disk=40)


def policy(**changes):
    return fg.Policy(**{"device_batch_size": 4, "num_device_batches": 2} | changes)


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


def run(offload, prompts=PROMPTS, params=GREEDY, model="pre_norm", **options):
    """Token ids, logits by (step, batch), the report."""
    logits = {}

    def keep(step, batch, values):
        logits[step, batch] = np.asarray(values)

    options = {"policy": policy(), "offload_dir": offload} | options
    with fg.LLM(str(GOLDENS / model), **options) as llm:
        outputs = llm.generate(prompts, params, on_logits=keep)
        return [list(o.outputs[0].token_ids) for o in outputs], logits, llm.report


def stored(llm):
    """The parameters by their names, whichever way they lie."""
    model = llm.runner.model
    return {
        n: jnp.asarray(dense_array(model.format, model.config, model.arrays, n))
        for n in param_shapes(model.config)
    }


def read(store, name):
    file = describe_array(store / name)
    return np.fromfile(file.chunk, file.dtype).reshape(file.shape)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("variant", ["pre_norm", "post_norm_projected", "untied_projected"])
def test_quantised_weights_compute_what_the_reference_does(offload, tmp_path, variant, bits):
    store = convert(GOLDENS / variant, tmp_path / "q", weight_bits=bits)
    prompt = PROMPTS[0]
    with fg.LLM(str(store), policy=policy(weights=MIXED), offload_dir=offload) as llm:
        assert llm.policy.weight_bits == bits
        config, form = llm.config, llm.runner.model.format
        flat = {name: jnp.asarray(read(store, name)) for name in llm.runner.model.arrays}
        params = nest(form.assemble(config, flat))
        logits = []
        llm.generate([prompt], GREEDY, on_logits=lambda s, b, x: logits.append(np.asarray(x)))
    reference = opt.forward(params, jnp.asarray([prompt]), config)[0, -1]
    np.testing.assert_allclose(logits[0][0], reference, rtol=1e-4, atol=1e-4)
    plain = run(offload, prompts=[prompt], model=variant)[1][0, 0][0]
    error = np.abs(logits[0][0] - plain).mean() / np.abs(plain).mean()
    assert 0 < error < (0.3 if bits == 4 else 0.03)


def test_a_layer_is_dequantised_once_a_step_for_all_batches(offload, monkeypatch):
    made = []
    original = flexgen_jax.engine.unpacking._dense_into

    def counted(old, leaves, dtype):
        made.extend(leaves)
        return original(old, leaves, dtype)

    monkeypatch.setattr(flexgen_jax.engine.unpacking, "_dense_into", counted)
    for weights in (fg.Split(), DISK):
        made.clear()
        few = policy(device_batch_size=2, num_device_batches=4, weight_bits=4, weights=weights)
        with fg.LLM(str(GOLDENS / "pre_norm"), policy=few, offload_dir=offload) as llm:
            llm.generate(PROMPTS, GREEDY)
            layers = llm.config.num_hidden_layers
        # Every decoder layer, and the head, whose dense copy stays while its codes do. Of the
        # embedding only rows are dequantised.
        heads = NEW if weights is DISK else 1
        matrices = 6  # q, k, v, out, fc1, fc2
        assert len(made) == NEW * layers * matrices + heads


@pytest.mark.parametrize("bits", [4, 8])
def test_what_travels_is_packed(offload, bits):
    """Every link carries codes: a log of all moves, against what the sizes say."""
    moves = []

    def wrap(tier, store):
        return Logged(store, lambda verb, names, nbytes: moves.append((tier, verb, nbytes)))

    compressed = policy(weights=HOST, cache=HOST, weight_bits=bits, cache_bits=bits)
    full = policy(weights=HOST, cache=HOST)
    totals = []
    for chosen in (compressed, full):
        moves.clear()
        _, _, report = run(offload, policy=chosen, wrap_store=wrap)
        load = sum(n for tier, verb, n in moves if tier is fg.Tier.HOST and verb == "load")
        totals.append((load, report.moved))
    share = totals[0][0] / totals[1][0]
    assert share < (0.28 if bits == 4 else 0.45)  # of float32; this model's rows are short
    for link in (Link.HOST_TO_DEVICE, Link.DEVICE_TO_HOST):
        assert totals[0][1][link] < 0.45 * totals[1][1][link]


@pytest.mark.parametrize(
    "changes",
    [{}, {"weight_bits": 4}, {"cache_bits": 8}, {"weight_bits": 8, "cache_bits": 4}],
    ids=str,
)
@pytest.mark.parametrize("chunk", [8, 16])
def test_bytes_read_and_written_are_as_planned(offload, tmp_path, changes, chunk):
    """Rows of whole pages: what a file is padded to would count in a tiny model."""
    config = fg.OPTConfig(
        vocab_size=64,
        hidden_size=1024,
        num_hidden_layers=2,
        ffn_dim=128,
        num_attention_heads=16,
        max_position_embeddings=64,
    )
    store = str(fg.convert_dummy(config, tmp_path / "store"))
    everything = policy(weights=DISK, cache=DISK, hidden=DISK, **changes)
    context = fg.DiskContext(mode="mapped", chunk_positions=chunk)
    prompts = [[3 + i] * n for i, n in enumerate((16, 15, 9, 16, 12, 7, 3, 16))]
    with fg.LLM(store, policy=everything, disk=context, offload_dir=str(tmp_path)) as llm:
        (block,) = llm.planner.blocks([llm.request(i, p, GREEDY) for i, p in enumerate(prompts)])
        planned = llm.planner.traffic(block)
        llm.generate(prompts, GREEDY)
        report = llm.report
    read, written = planned[Link.DISK_TO_HOST], planned[Link.HOST_TO_DISK]
    assert report.disk_bytes == pytest.approx(read, rel=0.05)
    assert report.disk_bytes_written == pytest.approx(written, rel=0.05)
    assert report.moved == planned
    assert report.to_json()["moved_bytes"]["disk to host"] == read


def test_the_cache_is_attended_to_as_it_is_kept(offload):
    """Against the reference decoding from a cache that went through the codes."""
    prompt = [5, 9, 2, 30, 11, 8, 4]
    _, logits, _ = run(offload, prompts=[prompt], policy=policy(cache_bits=4))
    form = CacheFormat(4)
    with fg.LLM(str(GOLDENS / "pre_norm"), policy=policy(), offload_dir=offload) as llm:
        config = llm.config
        flat = stored(llm)
    params = nest(flat)
    first, caches = opt.prefill(params, jnp.asarray([prompt]), config, cache_len=32)

    def kept(cache):
        return LayerCache(*dense_tree(form.pack(cache), jnp.float32))

    token = jnp.argmax(first, axis=-1).astype(jnp.int32)
    second, _ = opt.decode(params, token, tuple(map(kept, caches)), len(prompt), config)
    np.testing.assert_allclose(logits[0, 0][0], first[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits[1, 0][0], second[0], rtol=1e-4, atol=1e-4)
    exact, _ = opt.decode(params, token, caches, len(prompt), config)
    assert np.abs(second - exact).max() > 1e-4


def sparse_by_hand(query, key, value, own_key, own_value, share):
    """One row and head, in plain numpy: the definition."""
    scores = np.append(key @ query, own_key @ query)
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    past = weights[:-1]
    kept = np.argsort(-past)[: int(np.ceil(share * len(past)))]
    rest = np.setdiff1d(np.arange(len(past)), kept)
    out = past[kept] @ value[kept] + weights[-1] * own_value
    if len(rest):
        out += past[rest].sum() * value[rest].mean(axis=0)
    return out


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_sparse_attention_is_what_it_says(share):
    rng = np.random.default_rng(1)
    batch, heads, room, dim, position = 3, 2, 32, 8, 20
    query, own_key, own_value = rng.normal(size=(3, batch, heads, 1, dim)).astype(np.float32)
    key, value = rng.normal(size=(2, batch, heads, room, dim)).astype(np.float32)
    padding = np.array([0, 7, 19], np.int32)
    new = LayerCache(jnp.asarray(own_key), jnp.asarray(own_value))
    where = (jnp.int32(position), jnp.asarray(padding))
    chosen = opt.select_cached(jnp.asarray(query), jnp.asarray(key), new, *where, share)
    positions = np.asarray(chosen.positions)
    taken = jnp.asarray(np.take_along_axis(value, positions[..., None], axis=2))
    value_sum = opt.sum_values(jnp.asarray(value[:, :, :position]), jnp.asarray(padding))
    got = np.asarray(opt.attend_selected(chosen, taken, new, value_sum))
    for b in range(batch):
        seen = slice(padding[b], position)
        for h in range(heads):
            arguments = query[b, h, 0], key[b, h, seen], value[b, h, seen]
            wanted = sparse_by_hand(*arguments, own_key[b, h, 0], own_value[b, h, 0], share)
            np.testing.assert_allclose(got[b, h, 0], wanted, rtol=2e-5, atol=2e-5)
            assert set(positions[b, h]) <= set(range(padding[b], position))


def test_attending_to_everything_is_dense_attention(offload):
    dense = run(offload)
    nearly = run(offload, policy=policy(attention_sparsity=0.9999))
    assert nearly[0] == dense[0]
    for place, values in dense[1].items():
        np.testing.assert_allclose(nearly[1][place], values, rtol=1e-4, atol=1e-4)
    sparse = run(offload, policy=policy(attention_sparsity=0.1))
    assert any(not np.allclose(sparse[1][p], v, atol=1e-3) for p, v in dense[1].items())


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("host_attention", [False, True])
def test_only_the_selected_values_are_fetched(offload, bits, host_attention):
    moves = []

    def wrap(tier, store):
        def log(verb, names, nbytes):
            if isinstance(names, str) and names.startswith("cache."):
                moves.append((verb, names, nbytes))

        return Logged(store, log)

    chosen = policy(
        cache=HOST, attention_sparsity=0.1, cache_bits=bits, host_attention=host_attention
    )
    tokens, _, report = run(offload, policy=chosen, wrap_store=wrap)
    loaded = {name for verb, name, _ in moves if verb == "load"}
    assert loaded
    assert not any(name.endswith(".values") for name in loaded)
    keys = sum(n for verb, _, n in moves if verb == "load")
    values = sum(n for verb, name, n in moves if verb == "take")
    assert {n for v, n, _ in moves if v == "take"} == {f"{n}.values" for n in loaded}
    assert values < 0.15 * keys
    everywhere = run(offload, policy=dataclasses.replace(chosen, cache=fg.Split()))
    assert everywhere[0] == tokens
    if host_attention:
        assert report.moved[Link.HOST_TO_DEVICE] == 0


def test_kept_caches_keep_their_shape():
    cache = LayerCache(*jax.random.normal(jax.random.key(0), (2, 3, 2, 5, 80)))
    for form in (CacheFormat(), CacheFormat(4), CacheFormat(8, 16)):
        kept = form.pack(cache)
        leaves = jax.tree.leaves(kept)
        sizes = [leaf.nbytes // (3 * 2 * 5) for leaf in leaves]
        assert sizes == form.position_nbytes(80, jnp.float32) * 2
        again = KeptCache(*form.unflatten(leaves, 80))
        assert jax.tree.structure(again) == jax.tree.structure(kept)
        assert all(map(np.array_equal, leaves, jax.tree.leaves(again)))
        if form.bits:
            assert np.abs(dequantize(again.value) - cache.value).max() < 0.3


def test_the_weights_are_fixed_once_in_place(offload):
    with fg.LLM(
        str(GOLDENS / "pre_norm"), policy=policy(weight_bits=4), offload_dir=offload
    ) as llm:
        llm.policy = policy(weight_bits=4, cache_bits=8)
        with pytest.raises(ValueError, match="in place already"):
            llm.policy = policy()


DEMO = Path(fg.__file__).parent / "demo_model"


@pytest.mark.usefixtures("optimised")  # 100,000 rows of it are computed
def test_the_error_on_the_bundled_model(tmp_path):
    """4 bits within 3% of full precision's perplexity, 8 within 0.3%, sparse within 3% more."""
    text = (DEMO / "held_out.txt").read_text(encoding="utf-8")
    base = fg.Policy(device_batch_size=16, num_device_batches=1)  # two blocks

    def make(**fields):
        chosen = dataclasses.replace(base, **fields)
        return fg.LLM(
            str(DEMO), policy=chosen, dtype="float32", offload_dir=str(tmp_path), say=lambda _: None
        )

    ways = ways_to_compress(weight_bits=4, cache_bits=4, attention_sparsity=0.1)
    off = ways["full precision"]
    rows = compare(
        make,
        text,
        {
            "full": off,
            "4": {**off, "weight_bits": 4, "cache_bits": 4},
            "8": {**off, "weight_bits": 8, "cache_bits": 8},
            "4 sparse": ways["all together"],
        },
        context=128,
        max_windows=32,
    )
    full, four, eight, sparse = (row.perplexity for row in rows)
    assert 20 < full < 100
    assert four < 1.03 * full
    assert eight < 1.003 * full
    assert sparse < 1.03 * four
    assert rows[0].kl_divergence == 0
    assert rows[0].top1_agreement == 1
    assert 0 < rows[2].kl_divergence < 0.001 < rows[1].kl_divergence < rows[3].kl_divergence < 0.1
    assert 0.8 < rows[3].top1_agreement < rows[1].top1_agreement < rows[2].top1_agreement < 1
    # Published in 16 bits, compared in 32.
    assert rows[1].weight_nbytes < 0.2 * 2 * rows[0].weight_nbytes
    assert rows[1].cache_nbytes < 0.2 * rows[0].cache_nbytes


def test_comparing_follows_the_given_text(offload, tmp_path):
    """The forced tokens' perplexity is the reference's."""
    tokens = [int(i) for i in np.random.default_rng(0).integers(3, 60, 72)]

    def make(**fields):
        return fg.LLM(str(GOLDENS / "pre_norm"), policy=policy(**fields), offload_dir=offload)

    (row,) = compare(make, tokens, {"full": {}}, context=24, prompt_len=10)
    with make() as llm:
        config = llm.config
        params = nest(stored(llm))
    total = 0.0
    for start in range(0, 72, 24):
        window = jnp.asarray([tokens[start : start + 24]])
        logprobs = jax.nn.log_softmax(opt.forward(params, window, config)[0])
        total += sum(float(logprobs[i - 1, window[0, i]]) for i in range(10, 24))
    assert row.perplexity == pytest.approx(np.exp(-total / 42), rel=1e-4)
    with pytest.raises(fg.RequestError, match="72 tokens, a window 100"):
        compare(make, tokens, {"full": {}}, context=100, prompt_len=10)
    with pytest.raises(fg.RequestError, match="prompt_len must be from 1 to context - 1, got 24"):
        compare(make, tokens, {"full": {}}, context=24, prompt_len=24)
