"""Weight stores in codes: what they hold, how they are made, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexgen_jax.models.fitting import quantize_fitted
from flexgen_jax.models.opt import OPTConfig
from flexgen_jax.models.params import flatten
from flexgen_jax.models.quantization import Quantized, dequantize, quantize
from flexgen_jax.weights.checkpoint import (
    DUMMY_SCALE,
    SourceError,
    StoreError,
    convert,
    convert_dummy,
    open_store,
    resolve,
)
from flexgen_jax.weights.weight_format import WeightFormat


def expected(params, bits, group):
    """Flat arrays as the rule stores them."""
    found = {}
    for name, x in params.items():
        if name.endswith((".kernel", ".tokens")):
            x = jnp.asarray(x)
            fitted = bits == 4
            q = quantize_fitted(x, group=group) if fitted else quantize(x, bits=bits, group=group)
            found[f"{name}.codes"], found[f"{name}.affine"] = map(np.asarray, (q.codes, q.affine))
        else:
            found[name] = x
    return found


def same(found, expected):
    """Nearly: sums may come out otherwise in other pieces, and choose another line."""
    for name, values in expected.items():
        differ = np.asarray(found[name] != values)
        assert differ.mean() <= 0.05, name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [64, 6])
def test_matrices_and_token_table_are_in_codes(tmp_path, tiny, monkeypatch, bits, group):
    monkeypatch.setattr("flexgen_jax.weights.weight_format._BLOCK", 100)  # several pieces each
    state = tiny.write_model(tmp_path / "hf")
    store = convert(tmp_path / "hf", tmp_path / "q", weight_bits=bits, group_size=group)
    wanted = expected(tiny.expected_params(tiny.config, state), bits, group)
    found = tiny.read(store)
    assert found.keys() == wanted.keys()
    same(found, wanted)
    model = open_store(store, dtype="float32")
    assert (model.manifest.weight_bits, model.manifest.weight_group) == (bits, group)


@pytest.mark.parametrize("name", ["facebook/opt-1.3b", "facebook/opt-30b", "facebook/opt-175b"])
def test_bytes_of_the_presets(name):
    config = OPTConfig.preset(name)
    sizes = [
        sum(e.nbytes for e in form.entries(config).values())
        for form in (WeightFormat.usual("bfloat16"), WeightFormat.usual("bfloat16", 4, 64))
    ]
    assert 0.28 < sizes[1] / sizes[0] < 0.30


def test_from_a_store_and_from_a_model_alike(tmp_path, tiny, model):
    (model / "tokenizer.json").write_text("of the model")
    plain = convert(model, tmp_path / "plain")
    direct = convert(model, tmp_path / "direct", weight_bits=4)
    again = convert(plain, tmp_path / "again", weight_bits=4)
    first, second = tiny.read(direct), tiny.read(again)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[n], second[n]) for n in first)
    assert (again / "tokenizer.json").read_text() == "of the model"


@pytest.mark.parametrize("bits", [4, 8])
def test_dummies_in_codes_are_spread_as_dummies_are(tmp_path, tiny, bits):
    made = tiny.read(convert_dummy(tiny.config, tmp_path / "dummy", weight_bits=bits))
    again = tiny.read(convert_dummy(tiny.config, tmp_path / "again", weight_bits=bits))
    same(made, again)
    other = tiny.read(convert_dummy(tiny.config, tmp_path / "other", weight_bits=bits, seed=1))
    codes, affine = "layer_0.fc1.kernel.codes", "layer_0.fc1.kernel.affine"
    assert not np.array_equal(made[codes], other[codes])
    q = Quantized(made[codes], made[affine], bits, tiny.config.ffn_dim)
    dense = np.asarray(dequantize(q))
    assert abs(dense.mean()) < 0.1 * DUMMY_SCALE
    assert 0.8 * DUMMY_SCALE < dense.std() < 1.2 * DUMMY_SCALE


def test_an_interrupted_conversion_goes_on(tmp_path, tiny, model):
    """Also where codes were complete and their scales were not."""

    class Stop(Exception):
        pass

    whole = tiny.read(convert(model, tmp_path / "whole", weight_bits=4))
    for stop_after in ("layer_0.fc1.kernel.codes", "layer_1.q.kernel.affine"):
        seen = []

        def progress(done, total, name, stop_after=stop_after, seen=seen):
            if stop_after in seen and name != stop_after:
                raise Stop
            seen.append(name)

        with pytest.raises(Stop):
            convert(model, tmp_path / "q", weight_bits=4, progress=progress)
        assert not (tmp_path / "q").exists()
    again = []
    store = convert(
        model, tmp_path / "q", weight_bits=4, progress=lambda done, total, name: again.append(name)
    )
    found = tiny.read(store)
    assert "layer_0.fc1.kernel.codes" not in again
    assert all(np.array_equal(found[n], whole[n]) for n in whole)


def test_orbax_restores_it(tmp_path, model):
    import orbax.checkpoint as ocp

    plain = convert(model, tmp_path / "plain")
    store = convert(model, tmp_path / "q", weight_bits=8)
    with ocp.StandardCheckpointer() as checkpointer:
        tree, dense = checkpointer.restore(store), flatten(checkpointer.restore(plain))
    leaf = tree["layer_0"]["fc1"]["kernel"]
    kernel = dense["layer_0.fc1.kernel"]
    q = Quantized(jnp.asarray(leaf["codes"]), jnp.asarray(leaf["affine"]), 8, kernel.shape[-1])
    assert np.abs(np.asarray(dequantize(q)) - kernel).max() < 0.02


def test_resolve_quantises_once_and_keeps_the_result(tmp_path, model):
    said = []
    form = {"dtype": "float32", "weight_bits": 4, "group_size": 32}
    first = resolve(model, offload_dir=tmp_path, say=said.append, **form)
    assert resolve(model, offload_dir=tmp_path, say=said.append, **form) == first
    assert len(said) == 1
    assert "float32-4bit-g32" in said[0]
    plain = resolve(model, dtype="float32", offload_dir=tmp_path)
    assert plain != first
    from_plain = resolve(plain, offload_dir=tmp_path / "other", say=said.append, **form)
    assert from_plain.parent == tmp_path / "other" / "stores"
    assert open_store(from_plain).manifest.weight_bits == 4
    # a store that is quantised already is taken as it is, if nothing else is asked for
    assert resolve(first, dtype="float32") == first
    assert resolve(first, **form) == first
    with pytest.raises(StoreError, match="holds weights of 4 bits, but 8 were requested"):
        resolve(first, dtype="float32", weight_bits=8)


def test_what_is_refused(tmp_path, tiny, model):
    store = convert(model, tmp_path / "q", weight_bits=4)
    with pytest.raises(
        StoreError, match=r"in float32 quantised to 4 bits in groups of 64 .*requested"
    ):
        convert(model, tmp_path / "q", weight_bits=4, group_size=32)
    with pytest.raises(SourceError, match="is quantised already"):
        convert(store, tmp_path / "again", weight_bits=4)
    with pytest.raises(SourceError, match=r"is a weight store already.*--weight-bits"):
        convert(store, tmp_path / "again")
    for wrong, words in (({"weight_bits": 3}, "4 or 8"), ({"group_size": 1}, "at least 2")):
        with pytest.raises(StoreError, match=words):
            convert(model, tmp_path / "other", **({"weight_bits": 4} | wrong))
    kernel = "model.decoder.layers.0.fc1.weight"
    broken = tiny.write_model(tmp_path / "broken")
    broken[kernel][0, 0] = np.inf
    save_file(broken, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(
        SourceError, match=r"layers\.0\.fc1\.weight has values that are not numbers"
    ):
        convert(tmp_path / "broken", tmp_path / "other", weight_bits=4)
