"""Every family: its configs in both of transformers' styles, its parameters, and its logits."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexgen_jax.engine import kernels
from flexgen_jax.models import decoding, pieces
from flexgen_jax.models.family import ConfigError, eos_token_ids
from flexgen_jax.models.kv_cache import CacheFormat
from flexgen_jax.models.params import (
    matmul_flops,
    nest,
    param_records,
    param_shapes,
    query_flops,
    unit_kinds,
    unit_records,
)
from flexgen_jax.models.positions import positions
from flexgen_jax.models.registry import (
    FAMILIES,
    families,
    family_of,
    load_config,
    preset,
    preset_names,
    read_config,
    write_config,
)
from flexgen_jax.weights.huggingface import HuggingFaceModel

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "families"
EXPECTED = json.loads((GOLDENS / "expected.json").read_text(encoding="utf-8"))
VARIANTS = list(EXPECTED["variants"])
PROMPTS = EXPECTED["prompts"]

forward = jax.jit(decoding.forward, static_argnames="config")


def loaded(variant: str) -> tuple[Any, dict[str, Any]]:
    """The config, and the parameters in float32."""
    model = HuggingFaceModel(GOLDENS / variant)
    flat = {}
    for name, shape in param_shapes(model.config).items():
        blocks = model.blocks(name, np.dtype(np.float32))
        whole = np.concatenate([block.reshape(-1) for block in blocks])
        flat[name] = jnp.asarray(whole.reshape(shape))
    return model.config, nest(flat)


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    length = max(map(len, prompts))
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
    return tokens, np.asarray([length - len(p) for p in prompts], np.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_after_unequal_prompts_are_those_of_transformers(variant):
    config, params = loaded(variant)
    tokens, padding = padded(PROMPTS)
    ours = np.asarray(forward(params, tokens, config, padding))[:, -1]
    with np.load(GOLDENS / "logits.npz") as logits:
        theirs = logits[variant]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_scores_of_experts_are_computed_in_full_precision():
    config, params = loaded("glm4_moe")
    tokens, padding = padded(PROMPTS)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ours = np.asarray(forward(half, tokens, config, padding))[:, -1]
    with np.load(GOLDENS / "logits.npz") as logits:
        theirs = logits["glm4_moe"]
    assert np.abs(ours - theirs).mean() < 0.05 * np.abs(theirs).max()


def test_sinks_and_windows_count_for_each_new_token():
    """All at once, and taken apart as where attention is computed elsewhere."""
    config, params = loaded("gpt_oss")
    tokens, padding = map(jnp.asarray, padded([PROMPTS[-1], PROMPTS[-2]]))
    whole = np.asarray(forward(params, tokens, config, padding))
    prefill = jax.jit(decoding.prefill, static_argnames=("config", "cache_len"))
    _, caches = prefill(
        params, tokens[:, :-1], config=config, cache_len=tokens.shape[1], padding=padding
    )
    last = jnp.int32(tokens.shape[1] - 1)
    decode = jax.jit(decoding.decode, static_argnames="config")
    step, _ = decode(params, tokens[:, -1], caches, last, config=config, padding=padding)
    np.testing.assert_allclose(step, whole[:, -1], rtol=1e-4, atol=1e-3)

    hidden = jnp.asarray(whole[:, -1:, : config.hidden_size])
    for layer in range(2):
        where = {"config": config, "kind": family_of(config).kind(config, layer)}
        own, form = params[f"layer_{layer}"], CacheFormat()
        made, _ = kernels.decode_qkv(own, hidden, last, padding, form=form, **where)
        query, new, _, sinks = made
        attended = kernels.attend_cached(
            query, caches[layer], new, last, padding, sinks, kind=where["kind"]
        )
        parts, _ = kernels.decode_rest(own, hidden, attended, **where)
        once, *_ = kernels.decode_layer(
            own, hidden, caches[layer], last, padding, form=form, **where
        )
        np.testing.assert_allclose(parts.hidden, once.hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["gemma3", "phi3_long", "olmo2"])
def test_a_long_prompt_in_pieces_gives_the_same(variant, monkeypatch):
    config, params = loaded(variant)
    tokens, padding = padded([PROMPTS[-1], PROMPTS[-2]])
    tokens, padding = np.pad(tokens, ((0, 0), (21, 0))), padding + 21
    whole = np.asarray(forward(params, tokens, config, padding))
    monkeypatch.setattr(pieces, "PREFILL_TOKENS", 32)
    assert pieces.positions_per_call(tokens.shape[1]) == 32
    parts = jax.jit(lambda *args: decoding.forward(*args[:2], config, args[2]))(
        params, tokens, padding
    )
    for row, pad in enumerate(padding):
        np.testing.assert_allclose(parts[row, pad:], whole[row, pad:], rtol=1e-4, atol=1e-4)


# --- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", sorted(GOLDENS.glob("*/config_v4.json")), ids=lambda f: f.parent.name
)
def test_both_styles_of_a_config_are_one(file):
    old, new = (
        read_config(json.loads(f.read_text())) for f in (file, file.with_name("config.json"))
    )
    # Of the ends of texts, version 4 leaves out its own defaults.
    assert dataclasses.replace(old, eos_token_id=None) == dataclasses.replace(
        new, eos_token_id=None, bos_token_id=old.bos_token_id, pad_token_id=old.pad_token_id
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_of_transformers_survives_writing_and_reading(variant):
    config = load_config(GOLDENS / variant)
    assert read_config(write_config(config)) == config


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_survives_writing_and_reading(name):
    config = preset(name)
    assert read_config(json.loads(json.dumps(write_config(config)))) == config
    assert hash(config) == hash(dataclasses.replace(config))


BILLIONS = {
    "meta-llama/Llama-2-7b-hf": 6.74,
    "meta-llama/Llama-2-13b-hf": 13.02,
    "meta-llama/Llama-2-70b-hf": 68.98,
    "meta-llama/Llama-3.1-8B": 8.03,
    "meta-llama/Llama-3.1-70B": 70.55,
    "meta-llama/Llama-3.1-405B": 405.85,
    "meta-llama/Llama-3.2-1B": 1.236,
    "meta-llama/Llama-3.2-3B": 3.213,
    "HuggingFaceTB/SmolLM2-135M": 0.1345,
    "HuggingFaceTB/SmolLM2-360M": 0.3618,
    "HuggingFaceTB/SmolLM2-1.7B": 1.711,
    "HuggingFaceTB/SmolLM3-3B": 3.075,
    "mistralai/Mistral-7B-v0.1": 7.24,
    "mistralai/Mistral-Nemo-Base-2407": 12.25,
    "mistralai/Mistral-Small-24B-Base-2501": 23.57,
    "mistralai/Mistral-Large-Instruct-2407": 122.6,
    "Qwen/Qwen2.5-0.5B": 0.494,
    "Qwen/Qwen2.5-7B": 7.616,
    "Qwen/Qwen2.5-72B": 72.71,
    "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-8B": 8.19,
    "Qwen/Qwen3-32B": 32.76,
    "google/gemma-2-2b": 2.614,
    "google/gemma-2-9b": 9.24,
    "google/gemma-2-27b": 27.23,
    "google/gemma-3-1b-pt": 1.0,
    "google/gemma-3-27b-pt": 27.0,
    "microsoft/phi-4": 14.66,
    "allenai/OLMo-2-1124-7B": 7.3,
    "allenai/OLMo-2-0325-32B": 32.23,
    "ibm-granite/granite-3.0-2b-base": 2.53,
    "ibm-granite/granite-3.0-8b-base": 8.17,
    "mistralai/Mixtral-8x7B-v0.1": 46.70,
    "mistralai/Mixtral-8x22B-v0.1": 140.6,
    "Qwen/Qwen1.5-MoE-A2.7B": 14.32,
    "Qwen/Qwen2-57B-A14B": 57.41,
    "Qwen/Qwen3-30B-A3B": 30.53,
    "Qwen/Qwen3-235B-A22B": 235.1,
    "allenai/OLMoE-1B-7B-0924": 6.92,
    "openai/gpt-oss-20b": 20.91,
    "openai/gpt-oss-120b": 116.8,
    "zai-org/GLM-4.5-Air": 106.9,
    "zai-org/GLM-4.5": 352.8,
}


@pytest.mark.parametrize("name", BILLIONS)
def test_presets_have_the_published_number_of_parameters(name):
    count = sum(math.prod(shape) for shape in param_shapes(preset(name)).values())
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


def test_presets_go_by_the_hubs_names_or_what_stands_behind_the_slash():
    assert preset("llama-3.1-8b") == preset("meta-llama/Llama-3.1-8B")
    with pytest.raises(ConfigError, match=r"no preset 'gpt2'; presets: .*Llama.*opt-125m"):
        preset("gpt2")


LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox'.*there are: .*llama.*families.md"),
        ({"model_type": None}, "there is no model_type"),
        ({"hidden_size": None}, "there is no hidden_size"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of .*\(3\)"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is more than any model has"),
        ({"num_hidden_layers": 1025}, "num_hidden_layers 1025 is more than any model has"),
        ({"vocab_size": "64"}, "vocab_size must be a positive integer, got '64'"),
        ({"hidden_act": "mish"}, "hidden_act must be one of .*silu.*'mish'"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type must be one of default.*'spiral'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor must be a positive number"),
        ({"rope_parameters": {"full_attention": {}}}, "one flat object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"eos_token_id": "2"}, "eos_token_id must be a token id.*'2'"),
        ({"eos_token_id": []}, "eos_token_id is an empty list"),
        ({"eos_token_id": [1, 64]}, r"eos_token_id 64 is outside the vocabulary \(0 to 63\)"),
        ({"head_dim": 7}, "7 elements of a head are not even"),
    ],
    ids=str,
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        read_config({**LLAMA, **values})


MIXTRAL = {**LLAMA, "model_type": "mixtral"}
QWEN_MOE = {**LLAMA, "model_type": "qwen3_moe"}
GLM_MOE = {**LLAMA, "model_type": "glm4_moe"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**MIXTRAL, "num_local_experts": 0}, "num_experts must be a positive integer, got 0"),
        ({**MIXTRAL, "num_local_experts": 10**6}, "1000000 in each of 2 layers is more than any"),
        ({**MIXTRAL, "num_hidden_layers": 10**9}, "1000000000 is more than any model has"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) exceeds .* \(8\)"),
        ({**MIXTRAL, "num_experts_per_tok": None}, "there is no num_experts_per_tok"),
        ({**QWEN_MOE, "num_experts": "8"}, "num_experts must be a positive integer, got '8'"),
        ({**QWEN_MOE, "moe_intermediate_size": -1}, "moe_intermediate_size must be a positive"),
        ({**QWEN_MOE, "norm_topk_prob": "no"}, "norm_topk_prob must be true or false, got 'no'"),
        ({**QWEN_MOE, "mlp_only_layers": 1}, "mlp_only_layers must be a list of layers, got 1"),
        ({**QWEN_MOE, "decoder_sparse_step": 0}, "decoder_sparse_step must be a positive"),
        ({**QWEN_MOE, "num_hidden_layers": 10**9}, "1000000000 is more than any model has"),
        ({**LLAMA, "model_type": "olmoe", "clip_qkv": 0}, "clip_qkv must be a positive number"),
        (
            {**LLAMA, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 0},
            "shared_expert_intermediate_size must be a positive integer",
        ),
        ({**LLAMA, "model_type": "gpt_oss", "swiglu_limit": "7"}, "swiglu_limit must be a number"),
        ({**GLM_MOE, "n_group": 3}, r"n_routed_experts \(128\) must be a multiple of n_group"),
        ({**GLM_MOE, "topk_group": 2}, r"topk_group \(2\) exceeds n_group \(1\)"),
        ({**GLM_MOE, "n_group": 64}, "exceeds the 2 experts of topk_group groups"),
        ({**GLM_MOE, "n_group": 128}, "groups of 1 expert"),
        ({**GLM_MOE, "first_k_dense_replace": -1}, "first_k_dense_replace must be a number of"),
    ],
    ids=str,
)
def test_bad_values_of_experts_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        read_config(values)


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({}, None, (2,)),
        ({"eos_token_id": 5}, None, (5,)),
        ({"eos_token_id": [5, 6, 7]}, None, (5, 6, 7)),
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 8]}, (7, 8)),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": 5}, {"eos_token_id": None}, ()),
        ({"eos_token_id": 5}, {}, ()),
    ],
    ids=str,
)
def test_what_ends_a_text_is_what_transformers_takes(config, generation, ids, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_ids(load_config(tmp_path)) == ids


def test_a_bad_generation_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 64}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id 64 is outside"):
        load_config(tmp_path)


# --- what derives from the records ----------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_parameters_follow_the_records(variant):
    config = load_config(GOLDENS / variant)
    init = functools.partial(decoding.init_params, config=config, dtype=jnp.bfloat16)
    tree = jax.eval_shape(init, jax.random.key(0))
    shapes = {
        ".".join(str(key.key) for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    assert shapes == param_shapes(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_a_checkpoint_has_one_owner(variant):
    config = load_config(GOLDENS / variant)
    family, rows = family_of(config), {}
    for name in param_records(config):
        source = family.source(config, name)
        if source.expert is None:
            rows.setdefault(source.key, []).append(source.rows)
        else:  # experts follow one another
            rows.setdefault(source.key, []).append((source.expert, source.expert + 1))
    for parts in rows.values():
        if parts != [None]:  # parts of a fused tensor follow one another
            assert sorted(parts)[0][0] == 0
            assert all(a[1] == b[0] for a, b in zip(sorted(parts), sorted(parts)[1:], strict=False))


def test_products_count_once_for_each_element():
    config = load_config(GOLDENS / "llama")
    flops = matmul_flops(config)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    q = config.num_attention_heads * config.head_dim
    layer = 32 * q * 2 + 2 * 32 * kv + 3 * 32 * config.intermediate_size
    assert flops[0] == 0
    assert set(flops[1:-1]) == {2.0 * layer}
    assert flops[-1] == 2.0 * 32 * config.vocab_size


@pytest.mark.parametrize("variant", VARIANTS)
def test_queries_keys_and_values_are_what_comes_before_attention(variant):
    """Without any of them it cannot be computed, and without the other matrices it can."""
    config = load_config(GOLDENS / variant)
    family, kinds = family_of(config), unit_kinds(config)
    for unit, kind, flops in zip(config.units, kinds, query_flops(config), strict=True):
        if kind.role != "decoder":
            assert flops == 0
            continue
        records = unit_records(config, unit)
        arrays = {n: jax.ShapeDtypeStruct(r.shape, jnp.float32) for n, r in records.items()}
        matrices = [n for n, r in records.items() if r.role == "matrix"]
        before = [n for n in matrices if n.split(".")[1] in ("q", "k", "v")]
        assert flops == 2.0 * sum(math.prod(records[n].shape) for n in before)

        def compute(without, arrays=arrays, unit=unit, kind=kind):
            some = {n: array for n, array in arrays.items() if n not in without}
            hidden = jnp.zeros((1, 1, config.hidden_size))
            at = positions(0, 1, jnp.zeros(1, jnp.int32))
            jax.eval_shape(  # nothing is computed, only named
                lambda params: family.before_attention(params, hidden, at, config, kind),
                nest(some)[unit],
            )

        compute([n for n in matrices if n not in before])
        for name in before:
            with pytest.raises(KeyError):
                compute([name])


def test_products_of_experts_count_for_one_of_them():
    config = load_config(GOLDENS / "qwen2_moe")
    units = family_of(config).units(config)
    found = dict(zip((unit.name for unit in units), matmul_flops(config), strict=True))
    attention = 2 * 32 * 32 + 2 * 32 * 16
    shared = 3 * 32 * config.shared_expert_intermediate_size + 32
    assert found["layer_0"] == 2.0 * (attention + shared + 32 * config.num_experts)
    assert found["layer_1"] == 2.0 * (attention + 3 * 32 * config.intermediate_size)
    of_experts = {flops for name, flops in found.items() if "experts" in name}
    assert of_experts == {2.0 * 3 * 32 * config.moe_intermediate_size}
    assert sum(len(unit.experts) for unit in units) == 2 * config.num_experts


def test_layers_are_of_the_kinds_that_their_config_says():
    kinds = unit_kinds(preset("google/gemma-3-1b-pt"))
    assert [k.window for k in kinds[1:7]] == [512] * 5 + [None]
    assert len(set(kinds)) == 4  # embedding, sliding, full, head
    assert {k.soft_cap for k in unit_kinds(preset("google/gemma-2-2b"))[1:-1]} == {50.0}
    assert [k.variant for k in unit_kinds(preset("HuggingFaceTB/SmolLM3-3B"))[1:5]] == [
        "",
        "",
        "",
        "no rope",
    ]


# --- the seam -------------------------------------------------------------------------------------


def test_each_file_supplies_the_types_that_the_registry_says():
    said = {kind for family in families() for kind in family.model_types}
    assert said == set(FAMILIES)


def test_no_family_is_named_outside_its_file_and_the_registry():
    """In code: neither a module, nor a class, nor a text that is compared with."""
    own = {ROOT / "flexgen_jax" / "models" / f"{file}.py" for file in set(FAMILIES.values())}
    own |= {ROOT / "flexgen_jax" / "models" / "registry.py", ROOT / "flexgen_jax" / "__init__.py"}
    # Ways to cut texts have names of models, too.
    own.add(ROOT / "flexgen_jax" / "weights" / "gguf_tokenizer.py")
    words = {*FAMILIES, *FAMILIES.values()}
    found = []
    for package in ("flexgen_jax", "scheduling", "storage"):
        for file in (ROOT / package).rglob("*.py"):
            if file not in own:
                found += [(file.name, word) for word in named(file.read_text()) & words]
    assert found == []


def named(source: str) -> set[str]:
    """Identifiers, parts of imported modules and whole texts of ``source``, docstrings aside."""
    words = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                words |= set(name.lower().removesuffix("config").split("."))
            case ast.ImportFrom(module=str(name)):
                words |= set(name.split("."))
            case ast.Constant(value=str(text)):
                words.add(text.lower())
    return words


def test_a_named_family_is_noticed():
    assert "opt" in named("from flexgen_jax.models.opt import x")
    assert "opt" in named("OPTConfig.load(1)")
    assert "llama" in named("if config.model_type == 'llama': pass")
