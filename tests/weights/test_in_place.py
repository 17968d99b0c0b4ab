"""A checkpoint where it lies answers as the store that is converted from it, bit for bit."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flexgen_jax as fg
from flexgen_jax.weights.checkpoint import StoreError, convert, dtype_of_model, open_model, resolve
from flexgen_jax.weights.dtypes import checked_dtype
from flexgen_jax.weights.verifying import verify
from scheduling.policy import Tier
from storage.disk import DiskContext

GOLDENS = Path(__file__).parent.parent / "goldens"
PLACES = {
    "device": fg.Split(device=100),
    "host": fg.Split(device=0, host=100),
    "disk": fg.Split(device=0, disk=100),
    "mixed": fg.Split(device=30, host=30, disk=40),
}
PROMPTS = [{"prompt_token_ids": [3, 4, 5, 6]}, {"prompt_token_ids": [7, 8]}]
PARAMS = fg.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


def published(tmp_path, dtype, source=GOLDENS / "pre_norm", shift=0):
    """The golden model in ``dtype``, its tensors ``shift`` bytes later in the file."""
    directory = tmp_path / f"{source.name}-{dtype}-{shift}"
    directory.mkdir()
    shutil.copy(source / "config.json", directory)
    state = load_file(source / "model.safetensors")
    kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    file = directory / "model.safetensors"
    save_file({k: v.astype(kind) for k, v in state.items()}, file)
    if shift:
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + size] + b" " * shift
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    return directory


def logits_of(model, split, **more):
    found = {}
    policy = fg.Policy(device_batch_size=2, num_device_batches=1, weights=split)
    with fg.LLM(str(model), policy=policy, **more) as llm:
        outputs = llm.generate(
            PROMPTS, PARAMS, on_logits=lambda s, b, x: found.update({(s, b): np.asarray(x)})
        )
        report = llm.report
    return [o.outputs[0].token_ids for o in outputs], found, report


def same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for key, logits in expected[1].items():
        np.testing.assert_array_equal(found[1][key], logits)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("float16", "auto"), ("bfloat16", "auto"), ("float32", "auto"), ("float16", "float32")],
)
def test_the_bits_are_those_of_the_converted_store(tmp_path, stored, dtype, monkeypatch):
    model = published(tmp_path, stored)
    store = convert(model, tmp_path / "store", dtype=dtype)
    expected = logits_of(store, PLACES["device"])
    monkeypatch.setattr("flexgen_jax.weights.checkpoint._convert", None)  # nothing is converted
    for name, split in PLACES.items():
        mode = DiskContext(mode="direct", small_nbytes=0) if name == "mixed" else DiskContext()
        same(logits_of(model, split, dtype=dtype, disk=mode), expected)


@pytest.mark.parametrize("mode", ["auto", "mapped", "direct"])
@pytest.mark.parametrize("shift", [1, 8])
def test_a_tensor_may_begin_anywhere(tmp_path, mode, shift):
    model = published(tmp_path, "bfloat16", shift=shift)
    disk = DiskContext(mode=mode, small_nbytes=0)
    found = logits_of(model, PLACES["disk"], disk=disk)
    same(found, logits_of(published(tmp_path, "bfloat16"), PLACES["device"]))


def test_parts_of_a_fused_tensor(tmp_path):
    source = GOLDENS / "families" / "phi3"
    model = published(tmp_path, "float16", source)
    store = convert(model, tmp_path / "store")
    same(logits_of(model, PLACES["disk"]), logits_of(store, PLACES["device"]))


def test_bytes_are_moved_as_planned(tmp_path):
    *_, report = logits_of(published(tmp_path, "float16"), PLACES["disk"])
    # In the bytes as published; the tied head loads the table, the embedding rows of it.
    passes = PARAMS.max_tokens * report.placement["weights"].nbytes(Tier.DISK)
    assert report.disk_bytes == pytest.approx(passes, rel=0.05)


def test_what_is_smaller_is_converted(tmp_path):
    model = published(tmp_path, "float32")
    assert resolve(model, dtype=None) == model
    store = resolve(model, dtype="bfloat16", offload_dir=tmp_path / "kept")
    assert store.parent == tmp_path / "kept" / "stores"
    assert resolve(published(tmp_path, "float16"), dtype="float32").name == "pre_norm-float16-0"


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("auto", None),
        (None, None),
        ("bfloat16", "bfloat16"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (np.float32, "float32"),
        (np.dtype("float32"), "float32"),
        ("float", "float32"),
    ],
)
def test_dtypes_are_understood(dtype, name):
    assert checked_dtype(dtype) == name


@pytest.mark.parametrize("dtype", ["half", "float16", np.float16, "int8", 3, "fp8", object()])
def test_a_dtype_that_is_not_computed_with_is_refused(dtype):
    with pytest.raises(StoreError, match=r"float16 is read, but not computed|dtype must be auto"):
        checked_dtype(dtype)


def test_jax_types_are_understood():
    import jax.numpy as jnp

    assert checked_dtype(jnp.bfloat16) == "bfloat16"
    with pytest.raises(StoreError, match="overflows where bfloat16 does not"):
        checked_dtype(jnp.float16)


def test_auto_is_the_same_everywhere(tmp_path):
    half, single = published(tmp_path, "float16"), published(tmp_path, "float32")
    assert dtype_of_model(half) == open_model(half).dtype == "bfloat16"
    assert dtype_of_model(single) == open_model(single).dtype == "float32"
    assert dtype_of_model(convert(half, tmp_path / "a")) == "bfloat16"
    assert dtype_of_model(convert(single, tmp_path / "b")) == "float32"
    assert dtype_of_model("facebook/opt-125m") == "bfloat16"
    (half / "model.safetensors").unlink()
    values = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**values, "torch_dtype": "float32"}))
    assert dtype_of_model(half) == "float32"


def test_the_largest_float16_stays_finite(tmp_path):
    model = published(tmp_path, "float16")
    state = load_file(model / "model.safetensors")
    key = "model.decoder.layers.0.fc1.bias"
    state[key][:] = np.float16(65504.0)
    save_file(state, model / "model.safetensors")
    opened = open_model(model)
    from flexgen_jax.weights.element_blocks import dense_array

    found = dense_array(opened.format, opened.config, opened.arrays, "layer_0.fc1.bias")
    np.testing.assert_array_equal(found, np.full_like(found, 65536.0))


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_what_is_no_number_is_found_at_the_first_reading(tmp_path, tier):
    model = published(tmp_path, "float16")
    state = load_file(model / "model.safetensors")
    state["model.decoder.layers.1.fc1.weight"][3, 3] = np.inf
    save_file(state, model / "model.safetensors")
    with pytest.raises(Exception, match=r"layer_1\.fc1\.weight in .*not numbers"):
        logits_of(model, PLACES[tier])


def test_checksums_that_were_taken(tmp_path):
    model = published(tmp_path, "float16")
    found = verify(model)
    assert found.sound
    assert found.checked == 0
    assert verify(model, record=True).recorded
    found = verify(model)
    assert found.sound
    assert found.checked == found.tensors
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert len(verify(model).problems) == 1
    with pytest.raises(Exception, match="is damaged: the bytes in"):
        logits_of(model, PLACES["disk"])


def test_a_shard_that_changes_meanwhile(tmp_path):
    model = published(tmp_path, "float16")
    policy = fg.Policy(device_batch_size=2, num_device_batches=1, weights=PLACES["disk"])
    with fg.LLM(str(model), policy=policy) as llm:
        llm.generate(PROMPTS, PARAMS)
        before = (model / "model.safetensors").stat()
        os.utime(model / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        with pytest.raises(fg.ExecutionError, match="was changed or replaced while it was in use"):
            llm.generate(PROMPTS, PARAMS)
