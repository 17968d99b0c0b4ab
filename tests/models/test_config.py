"""Configs from Hugging Face's JSON, presets, and what people get to read when they are wrong."""

import dataclasses
import json
import math

import pytest

from flexgen_jax.models.family import ConfigError
from flexgen_jax.models.opt import ACTIVATIONS, PRESETS, OPTConfig
from flexgen_jax.models.params import param_shapes, unit_names, unit_shapes
from flexgen_jax.models.registry import load_config

# Zhang et al. 2022; 350m and the digits below the round names from the published checkpoints.
PUBLISHED_PARAMETERS = {
    "125m": 125e6,
    "350m": 331e6,
    "1.3b": 1.3e9,
    "2.7b": 2.7e9,
    "6.7b": 6.7e9,
    "13b": 13e9,
    "30b": 30e9,
    "66b": 66e9,
    "175b": 175e9,
}


def number_of_parameters(config: OPTConfig) -> int:
    return sum(math.prod(shape) for shape in param_shapes(config).values())


def test_every_published_size_has_a_preset():
    assert list(PRESETS) == list(PUBLISHED_PARAMETERS)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_presets_have_the_published_number_of_parameters(name):
    count = number_of_parameters(OPTConfig.preset(name))
    assert count == pytest.approx(PUBLISHED_PARAMETERS[name], rel=0.025)


def test_the_count_of_125m_is_exact():
    assert number_of_parameters(OPTConfig.preset("125m")) == 125_239_296


@pytest.mark.parametrize("name", ["facebook/opt-1.3b", "opt-1.3b", "1.3b", "OPT-1.3B"])
def test_presets_go_by_several_names(name):
    assert OPTConfig.preset(name).hidden_size == 2048


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"no preset 'gpt2'.*facebook/opt-125m.*facebook/opt-175b"
    ):
        OPTConfig.preset("gpt2")


def test_only_350m_is_post_norm_with_projections():
    odd = {name for name, config in PRESETS.items() if config.has_projection}
    assert odd == {"350m"}
    assert {name for name, config in PRESETS.items() if not config.do_layer_norm_before} == odd
    assert {name for name, config in PRESETS.items() if not config.has_final_norm} == odd


VARIED = OPTConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=3,
    ffn_dim=48,
    num_attention_heads=2,
    max_position_embeddings=16,
    word_embed_proj_dim=8,
    do_layer_norm_before=True,
    remove_final_layer_norm=True,
    enable_bias=False,
    layer_norm_elementwise_affine=False,
    activation_function="gelu",
    tie_word_embeddings=False,
    pad_token_id=3,
    bos_token_id=0,
    eos_token_id=5,
)


@pytest.mark.parametrize("config", [*PRESETS.values(), VARIED], ids=[*PRESETS, "varied"])
def test_json_round_trip(config, tmp_path):
    assert OPTConfig.from_json(config.to_json()) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert OPTConfig.load(tmp_path) == config
    assert OPTConfig.load(tmp_path / "config.json") == config


def test_the_varied_config_differs_from_the_default_everywhere():
    default = OPTConfig()
    same = [
        f.name
        for f in dataclasses.fields(OPTConfig)
        if getattr(VARIED, f.name) == getattr(default, f.name)
    ]
    assert same == ["do_layer_norm_before"]  # False would hide remove_final_layer_norm


def test_what_the_json_leaves_out_is_opt_125m():
    assert OPTConfig.from_json({}) == PRESETS["125m"]


def test_unknown_keys_and_nulls_change_nothing():
    values = {"model_type": "opt", "word_embed_proj_dim": None, "prefix": "</s>", "dropout": 0.1}
    assert OPTConfig.from_json(values) == PRESETS["125m"]


def test_embeddings_are_as_wide_as_the_layers_unless_said_otherwise():
    config = OPTConfig.from_json({"hidden_size": 24, "num_attention_heads": 2})
    assert config.word_embed_proj_dim == 24
    assert not config.has_projection


def test_a_config_is_hashable_and_frozen():
    assert hash(VARIED) == hash(dataclasses.replace(VARIED))
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIED.vocab_size = 7  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, r"model_type is 'llama'.*OPT family"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"hidden_size": "768"}, "hidden_size must be a positive integer, got '768'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive integer, got -1"),
        ({"ffn_dim": 12.5}, "ffn_dim must be a positive integer, got 12.5"),
        ({"max_position_embeddings": True}, "max_position_embeddings must be a positive integer"),
        ({"num_attention_heads": 5}, r"hidden_size \(768\) must be a multiple of .*\(5\)"),
        ({"activation_function": "swish"}, r"activation_function must be one of relu.*'swish'"),
    ],
)
def test_bad_values_are_named(values, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        OPTConfig.from_json(values)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message) as caught:
        OPTConfig.load(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{'model_type': 'opt'}", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[1, 2]", "expected a JSON object, got list"),
    ],
)
def test_a_file_that_is_no_config_is_named(content, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        OPTConfig.load(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file") as caught:
        OPTConfig.load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_accepted(activation):
    assert OPTConfig(activation_function=activation).activation_function == activation


@pytest.mark.parametrize("config", [PRESETS["125m"], PRESETS["350m"], VARIED])
def test_units_own_each_parameter_once(config):
    assert config.units == (
        "embed",
        *(f"layer_{i}" for i in range(config.num_hidden_layers)),
        "head",
    )
    owned = [name for unit in config.units for name in unit_shapes(config, unit)]
    assert owned == list(param_shapes(config))
    assert len(set(owned)) == len(owned)
    assert ("embed.tokens" in unit_names(config, "head")) == config.tie_word_embeddings
    assert ("head.tokens" in unit_names(config, "head")) != config.tie_word_embeddings


@pytest.mark.parametrize("value", ["false", [], 2, 0.5])
def test_a_switch_that_is_neither_on_nor_off_is_named(value, tmp_path):
    values = {**OPTConfig().to_json(), "do_layer_norm_before": value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="do_layer_norm_before must be true or false, got"):
        load_config(tmp_path)
