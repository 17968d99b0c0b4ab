"""A store goes back to what Hugging Face's transformers load."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.weights.checkpoint import StoreError, convert

from .test_convert import VARIANTS

GOLDENS = Path(__file__).parents[1] / "goldens"


def tensors(directory):
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back(tmp_path, tiny, variant, dtype):
    config = dataclasses.replace(tiny.config, **VARIANTS[variant])
    state = tiny.write_model(tmp_path / "hf", config, dtype=dtype)
    store = convert(tmp_path / "hf", tmp_path / "store", dtype=dtype)
    found = fg.export(store, tmp_path / "back")
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    back = tensors(found)
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, key)
    assert fg.OPTConfig.load(found) == config
    assert json.loads((found / "config.json").read_text())["torch_dtype"] == dtype
    again = convert(found, tmp_path / "again", dtype=dtype)
    tiny.assert_equal(tiny.read(again), tiny.expected_params(config, tensors(found)), dtype)


def test_shards(tmp_path, tiny):
    state = tiny.write_model(tmp_path / "hf")
    found = fg.export(
        tmp_path / "hf", tmp_path / "back", max_shard_nbytes=4000, offload_dir=tmp_path
    )
    index = json.loads((found / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    for key, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(found / file)[key], state[key])
    assert all(f.stat().st_size < 8000 for f in found.glob("*.safetensors"))
    convert(found, tmp_path / "again")


def test_codes_become_what_they_stand_for(tmp_path, tiny):
    state = tiny.write_model(tmp_path / "hf")
    store = convert(tmp_path / "hf", tmp_path / "store", weight_bits=8)
    back = tensors(fg.export(store, tmp_path / "back"))
    for key, value in back.items():
        span = state[key].max() - state[key].min()
        assert np.abs(value - state[key]).max() <= span / 255


def test_what_is_there_is_not_touched(tmp_path, tiny):
    tiny.write_model(tmp_path / "hf")
    (tmp_path / "back").mkdir()
    with pytest.raises(StoreError, match="back exists already; remove it, or give another name"):
        fg.export(tmp_path / "hf", tmp_path / "back", offload_dir=tmp_path)
    assert not list((tmp_path / "back").iterdir())


def test_the_command(tmp_path):
    arguments = ["export", "flexgen_jax/demo_model", str(tmp_path / "out"), "--dtype", "bfloat16"]
    arguments += ["--offload-dir", str(tmp_path / "off"), "--max-shard-size", "1MB"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "Hugging Face directory ready" in result.output
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    policy = fg.Policy(device_batch_size=2)
    with fg.LLM(str(tmp_path / "out"), policy=policy, offload_dir=str(tmp_path / "off")) as llm:
        (output,) = llm.generate(["Once"], fg.SamplingParams(temperature=0.0, max_tokens=4))
    assert len(output.outputs[0].token_ids) == 4
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert "exists already" in again.output


@pytest.mark.parametrize("golden", sorted(p.parent.name for p in GOLDENS.glob("*/config.json")))
def test_transformers_load_it_with_equal_logits(tmp_path, golden):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    exported = fg.export(GOLDENS / golden, tmp_path / "out", offload_dir=tmp_path)
    ids = torch.arange(5, 25)[None]
    logits = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        for path in (GOLDENS / golden, exported)
    ]
    assert torch.equal(*logits)
