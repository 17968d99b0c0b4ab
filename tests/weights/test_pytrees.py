"""Parameters as a nested dict: out of a model, into a model, and out again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexgen_jax as fg
from flexgen_jax.models.params import param_shapes
from flexgen_jax.weights.checkpoint import convert
from flexgen_jax.weights.pytrees import load_params, save_params
from storage.array_file import StoreError

CONFIG = fg.OPTConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=24,
    max_position_embeddings=32,
)


def equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_user_hands_over_is_had_again(dtype, tmp_path):
    params = fg.opt.init_params(jax.random.key(0), CONFIG, jnp.bfloat16)
    model = save_params(params, CONFIG, tmp_path / "model")
    again = load_params(model, dtype=dtype, offload_dir=tmp_path)
    equal(jax.tree.map(lambda x: x.astype(dtype), params), again)
    store = convert(model, tmp_path / "store", dtype=dtype)
    equal(again, load_params(store))


def test_it_runs_as_the_functions_do(tmp_path):
    params = fg.opt.init_params(jax.random.key(1), CONFIG)
    params = jax.tree.map(lambda x: 10 * x, params)
    model = save_params(params, CONFIG, tmp_path / "model")
    prompt = [3, 7, 9]
    logits = fg.opt.forward(params, jnp.asarray([prompt]), CONFIG)[0, -1]
    with fg.LLM(str(model), offload_dir=str(tmp_path)) as llm:
        (output,) = llm.generate(
            [prompt], fg.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        )
    assert output.outputs[0].token_ids == (int(logits.argmax()),)


def test_codes_become_what_they_stand_for(tmp_path):
    params = fg.opt.init_params(jax.random.key(2), CONFIG)
    model = save_params(params, CONFIG, tmp_path / "model")
    store = convert(model, tmp_path / "store", weight_bits=8)
    dense = load_params(store)
    kernel = params["layer_0"]["fc1"]["kernel"]
    step = (kernel.max() - kernel.min()) / 255
    np.testing.assert_allclose(dense["layer_0"]["fc1"]["kernel"], kernel, atol=float(step))


def test_parameters_of_another_model_are_refused(tmp_path):
    params = fg.opt.init_params(jax.random.key(0), CONFIG)
    wide = {**params, "head": {**params["head"], "more": {"scale": jnp.zeros(3)}}}
    with pytest.raises(StoreError, match=r"head\.more\.scale is not one of the config's"):
        save_params(wide, CONFIG, tmp_path / "model")
    del params["head"]["norm"]["scale"]
    with pytest.raises(StoreError, match=r"head\.norm\.scale is missing"):
        save_params(params, CONFIG, tmp_path / "model")
    params["head"]["norm"]["scale"] = jnp.zeros(3)
    with pytest.raises(StoreError, match=r"head\.norm\.scale has shape \[3\], expected \[16\]"):
        save_params(params, CONFIG, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert param_shapes(CONFIG)


def test_nothing_is_overwritten(tmp_path):
    with pytest.raises(StoreError, match="exists already"):
        save_params({}, CONFIG, tmp_path)
