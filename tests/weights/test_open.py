import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexgen_jax.models.family import ConfigError
from flexgen_jax.models.params import param_shapes
from flexgen_jax.weights.checkpoint import StoreError, convert, is_store, open_store
from flexgen_jax.weights.manifest import Manifest, with_seal


@pytest.fixture
def store(model, tmp_path):
    return convert(model, tmp_path / "store", dtype="bfloat16")


def edit(file, **changes):
    values = json.loads(file.read_text())
    values = {**values, **changes}
    file.write_text(json.dumps(with_seal(values) if "seal" in values else values))


def test_a_sound_store(store, tiny):
    model = open_store(store, dtype="bfloat16")
    assert model.path == store
    assert model.config == tiny.config
    names = [name.replace(".kernel", ".weight") for name in param_shapes(tiny.config)]
    assert list(model.arrays) == names
    assert all(array.raw for array in model.arrays.values())
    assert model.manifest == Manifest.load(store)
    assert model.manifest.nbytes == sum(array.nbytes for array in model.arrays.values())


def test_another_dtype_names_both_cures(store):
    with pytest.raises(StoreError) as caught:
        open_store(store, dtype="float32")
    for words in (
        "holds bfloat16",
        "but float32 was requested",
        "--dtype float32",
        "dtype='bfloat16'",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("change", [lambda b: b[:-2], lambda b: b + b"\0", lambda b: b""])
def test_a_chunk_of_another_size(store, change):
    chunk = store / "layer_1.v.weight" / "c" / "0" / "0"
    chunk.write_bytes(change(chunk.read_bytes()))
    with pytest.raises(StoreError, match=r"layer_1\.v\.weight/c/0/0 is (truncated|too long).*512"):
        open_store(store)


def test_a_missing_array(store):
    (store / "layer_0.k.bias" / "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"layer_0\.k\.bias/zarr\.json: No such file.*convert"):
        open_store(store)


def test_an_array_of_another_shape(store):
    edit(store / "layer_0.fc1.weight" / "zarr.json", shape=[16, 24])
    with pytest.raises(StoreError, match=r"expected bfloat16 \[24, 16\].* is bfloat16 \[16, 24\]"):
        open_store(store)


@pytest.mark.parametrize(
    ("version", "cure"), [(6, "upgrade flexgen-jax, or convert"), (0, "; convert"), (None, "conv")]
)
def test_another_version(store, version, cure):
    edit(store / "flexgen_manifest.json", format_version=version)
    with pytest.raises(StoreError, match=f"format version {version}, .*version 5.*{cure}"):
        open_store(store)


def test_codes_in_the_order_of_earlier_versions_are_refused(store):
    edit(store / "flexgen_manifest.json", weight_bits=4, weight_group=64, format_version=3)
    with pytest.raises(StoreError, match=r"4-bit codes .* version 3 had them.* convert the model"):
        open_store(store)


def test_quantised_weights_are_not_mistaken(store):
    edit(store / "flexgen_manifest.json", weight_bits=4)
    with pytest.raises(StoreError, match=r"wrong entry.*weight_bits 4 in groups of None"):
        open_store(store)
    edit(store / "flexgen_manifest.json", weight_group=64)
    with pytest.raises(StoreError, match=r"expected embed\.tokens\.codes as uint8"):
        open_store(store)


@pytest.mark.parametrize("content", ["", "{", "[]", "7"])
def test_a_manifest_that_is_none(store, content):
    (store / "flexgen_manifest.json").write_text(content)
    with pytest.raises(StoreError, match=r"flexgen_manifest\.json.*(not valid JSON|version None)"):
        open_store(store)


@pytest.mark.parametrize("key", ["dtype", "weight_bits", "source", "tensors", "config"])
def test_a_manifest_without_an_entry(store, key):
    file = store / "flexgen_manifest.json"
    values = json.loads(file.read_text())
    del values[key]
    file.write_text(json.dumps(with_seal(values)))
    with pytest.raises(StoreError, match=f"missing or wrong entry.*{key}"):
        open_store(store)
    edit(file, **{key: [3]})
    with pytest.raises(StoreError):
        open_store(store)


def as_version_2(store):
    """What versions without the config's digest wrote."""
    values = json.loads((store / "flexgen_manifest.json").read_text())
    del values["config"]
    (store / "flexgen_manifest.json").write_text(json.dumps({**values, "format_version": 2}))


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 4}, {"activation_function": "gelu"}, {"num_hidden_layers": 1}],
)
def test_a_config_that_was_edited_is_refused(store, change):
    text = (store / "config.json").read_text()
    edit(store / "config.json", **change)
    with pytest.raises(StoreError, match=r"config\.json was changed after the weights were conv"):
        open_store(store)
    (store / "config.json").write_text(json.dumps(json.loads(text), indent=7))  # says the same
    assert open_store(store).manifest.config


def test_a_store_that_does_not_know_its_config_is_read_as_far_as_its_tensors_fit(store, tiny):
    as_version_2(store)
    assert open_store(store).config == tiny.config
    edit(store / "config.json", num_hidden_layers=1)
    with pytest.raises(StoreError, match=r"has the tensor layer_1\..*has no place for"):
        open_store(store)


def test_a_manifest_and_a_config_of_different_models(store):
    as_version_2(store)
    edit(store / "config.json", num_hidden_layers=3)
    with pytest.raises(StoreError, match=r"expected layer_2\..*no such tensor"):
        open_store(store)
    (store / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_store(store)


def test_what_is_no_store(tmp_path):
    assert not is_store(tmp_path)
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(StoreError, match=r"is not a weight store.*flexgen-jax convert"):
            open_store(path)


def test_a_tree_that_orbax_saved_in_its_own_layout_is_read_too(store, tiny, model):
    """Not raw, but arrays all the same: the disk tier falls back to TensorStore."""
    import tensorstore as ts

    old = store / "layer_0.q.weight"
    values = tiny.read(store)["layer_0.q.kernel"]
    (old / "c" / "0" / "0").unlink()
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{old}/"},
        "metadata": {
            "shape": [16, 16],
            "data_type": "bfloat16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [8, 16]}},
        },
    }
    ts.open(spec, create=True, delete_existing=True).result().write(values.T).result()
    array = open_store(store).arrays["layer_0.q.weight"]
    assert not array.raw
    np.testing.assert_array_equal(tiny.read(store)["layer_0.q.kernel"], values)


def test_importing_costs_no_heavy_library():
    heavy = ("jax", "tensorstore", "orbax", "torch", "safetensors", "huggingface_hub", "scipy")
    code = f"import sys, flexgen_jax.weights.checkpoint; print(*({heavy} & sys.modules.keys()))"
    code = code.replace(str(heavy), repr(set(heavy)))
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_of_before_there_were_layouts_is_read(dtype, model, tmp_path, tiny):
    """Version 1: matrices (in, out), and no word of it in the manifest; its logits are as good."""
    from flexgen_jax.weights import checkpoint
    from flexgen_jax.weights.weight_format import WeightFormat

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightFormat, "usual", classmethod(lambda cls, *args: cls(*args)))
        old = convert(model, tmp_path / "old", dtype=dtype)
    values = json.loads((old / "flexgen_manifest.json").read_text())
    assert values.pop("layout") == "in_out"
    (old / "flexgen_manifest.json").write_text(json.dumps({**values, "format_version": 1}))
    assert "layer_0.fc1.kernel" in open_store(old).arrays
    new = convert(model, tmp_path / "new", dtype=dtype)
    assert {n: a.tolist() for n, a in tiny.read(old).items()} == {
        n: a.tolist() for n, a in tiny.read(new).items()
    }
    assert checkpoint.resolve(old, dtype=dtype) == old
    again = convert(old, tmp_path / "codes", dtype=dtype, weight_bits=4)
    assert open_store(again).format.bits == 4
