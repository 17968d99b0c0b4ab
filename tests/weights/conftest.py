"""Tiny OPT models in Hugging Face's form, written without torch, and what they should become."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from flexgen_jax.models.opt import OPTConfig

TINY = OPTConfig(
    vocab_size=37,
    hidden_size=16,
    num_hidden_layers=2,
    ffn_dim=24,
    num_attention_heads=2,
    max_position_embeddings=30,
)

LAYER_MODULES = {
    "attention_norm": "self_attn_layer_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "fc1": "fc1",
    "fc2": "fc2",
}


def state_dict(config, dtype="float32", prefix="model.decoder.", seed=0):
    """What transformers would save, with random values."""
    rng = np.random.default_rng(seed)
    hidden, embed, ffn = config.hidden_size, config.word_embed_proj_dim, config.ffn_dim
    state = {}

    def add(key, *shape):
        values = rng.standard_normal(shape, dtype=np.float32)
        state[key] = values.astype(getattr(ml_dtypes, dtype, dtype))

    def add_norm(key):
        if config.layer_norm_elementwise_affine:
            add(f"{key}.weight", hidden)
            add(f"{key}.bias", hidden)

    def add_linear(key, n_in, n_out):
        add(f"{key}.weight", n_out, n_in)
        if config.enable_bias:
            add(f"{key}.bias", n_out)

    add(f"{prefix}embed_tokens.weight", config.vocab_size, embed)
    add(f"{prefix}embed_positions.weight", config.max_position_embeddings + 2, hidden)
    if embed != hidden:
        add(f"{prefix}project_in.weight", hidden, embed)
        add(f"{prefix}project_out.weight", embed, hidden)
    for i in range(config.num_hidden_layers):
        layer = f"{prefix}layers.{i}"
        for name in ("q", "k", "v", "out"):
            add_linear(f"{layer}.self_attn.{name}_proj", hidden, hidden)
        add_norm(f"{layer}.self_attn_layer_norm")
        add_linear(f"{layer}.fc1", hidden, ffn)
        add_linear(f"{layer}.fc2", ffn, hidden)
        add_norm(f"{layer}.final_layer_norm")
    if config.do_layer_norm_before and not config.remove_final_layer_norm:
        add_norm(f"{prefix}final_layer_norm")
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state[f"{prefix}embed_tokens.weight"].copy()
    else:
        add("lm_head.weight", config.vocab_size, embed)
    return state


def expected_params(config, state, prefix="model.decoder."):
    """The flat parameters that ``state`` means, the plain way."""
    params = {
        "embed.tokens": state[f"{prefix}embed_tokens.weight"],
        "embed.positions": state[f"{prefix}embed_positions.weight"],
    }
    for unit, module in (("embed", "project_in"), ("head", "project_out")):
        if f"{prefix}{module}.weight" in state:
            params[f"{unit}.{module}.kernel"] = state[f"{prefix}{module}.weight"].T
    pairs = {
        f"layer_{i}.{ours}": f"{prefix}layers.{i}.{theirs}"
        for i in range(config.num_hidden_layers)
        for ours, theirs in LAYER_MODULES.items()
    }
    pairs["head.norm"] = f"{prefix}final_layer_norm"
    for ours, theirs in pairs.items():
        if f"{theirs}.bias" in state:
            params[f"{ours}.bias"] = state[f"{theirs}.bias"]
        if f"{theirs}.weight" in state:
            weight = state[f"{theirs}.weight"]
            if ours.endswith("norm"):
                params[f"{ours}.scale"] = weight
            else:
                params[f"{ours}.kernel"] = weight.T
    if not config.tie_word_embeddings:
        params["head.tokens"] = state["lm_head.weight"]
    return params


def write_config(directory, config):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_json()))


def write_model(directory, config=TINY, *, shards=1, **more):
    """A directory with config and safetensors; returns its state dict."""
    from safetensors.numpy import save_file

    state = state_dict(config, **more)
    write_config(directory, config)
    if shards == 1:
        save_file(state, directory / "model.safetensors")
        return state
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {k: state[k] for k in list(state)[i::shards]}
        save_file(part, directory / name)
        weight_map.update(dict.fromkeys(part, name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return state


@dataclasses.dataclass(frozen=True)
class Tiny:
    """What the tests share; modules of tests do not import each other."""

    config = TINY
    state_dict = staticmethod(state_dict)
    expected_params = staticmethod(expected_params)
    write_config = staticmethod(write_config)
    write_model = staticmethod(write_model)

    @staticmethod
    def read(store: Path) -> dict[str, np.ndarray]:
        """Flat name -> values, through TensorStore; matrices (in, out), however they lie."""
        import tensorstore as ts

        found = {}
        for array in sorted(p.parent for p in store.glob("*/zarr.json")):
            kvstore = {"driver": "file", "path": f"{array}/"}
            found[array.name] = ts.open({"driver": "zarr3", "kvstore": kvstore}).result().read()
        return Tiny.turned({name: values.result() for name, values in found.items()})

    @staticmethod
    def turned(arrays):
        """By the parameters' names, matrices (in, out)."""
        return {
            name.replace(".weight", ".kernel"): a.T if name.endswith(".weight") else a
            for name, a in arrays.items()
        }

    @staticmethod
    def assert_equal(found, expected, dtype):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name].dtype.name == dtype, name
            np.testing.assert_array_equal(
                found[name].astype(np.float32),
                values.astype(np.float32).astype(found[name].dtype).astype(np.float32),
                err_msg=name,
            )


@pytest.fixture
def tiny():
    return Tiny


@pytest.fixture
def model(tmp_path):
    """A tiny float32 model in one safetensors file."""
    directory = tmp_path / "tiny-opt"
    write_model(directory)
    return directory
