"""Flax's msgpack files and Orbax checkpoints of params become the same store as safetensors do."""

import dataclasses
import gc
import json
import shutil

import flax.serialization
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flexgen_jax.models.params import nest
from flexgen_jax.weights.checkpoint import ModelNotFoundError, SourceError, convert, open_store

from .test_convert import VARIANTS


def flax_params(state, prefix="model.decoder."):
    """What transformers' FlaxOPTForCausalLM would save of ``state``: flat, by path."""
    found = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if "embed_" in key:
            kind = "embedding"
        elif key == "lm_head.weight" or (kind == "weight" and value.ndim == 2):
            kind, value = "kernel", value.T
        elif kind == "weight":
            kind = "scale"
        found[f"{module}.{kind}"] = np.ascontiguousarray(value)
    return found


def save_msgpack(path, flat):
    path.write_bytes(flax.serialization.msgpack_serialize(nest(dict(flat))))


@pytest.fixture
def written(tmp_path, tiny):
    """A Hugging Face directory with its weights taken out, and what they were."""

    def write(config=None, **options):
        state = tiny.write_model(tmp_path / "hf", config or tiny.config, **options)
        (tmp_path / "hf" / "model.safetensors").unlink()
        return tmp_path / "hf", state

    return write


@pytest.mark.parametrize("variant", VARIANTS)
def test_msgpack_of_every_variant(tmp_path, tiny, written, variant):
    config = dataclasses.replace(tiny.config, **VARIANTS[variant])
    directory, state = written(config)
    save_msgpack(directory / "flax_model.msgpack", flax_params(state))
    store = convert(directory, tmp_path / "store")
    tiny.assert_equal(tiny.read(store), tiny.expected_params(config, state), "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_and_dtypes(tmp_path, tiny, written, dtype):
    directory, state = written(dtype=dtype)
    flat, shards = flax_params(state), [{}, {}, {}]
    flat.pop("lm_head.kernel")  # tied
    weight_map = {}
    for number, (key, value) in enumerate(flat.items()):
        shards[number % 3][key] = value
        weight_map[key.replace(".", "/")] = f"flax_model-{number % 3 + 1:05}-of-00003.msgpack"
    for number, shard in enumerate(shards, 1):
        save_msgpack(directory / f"flax_model-{number:05}-of-00003.msgpack", shard)
    (directory / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    store = convert(directory, tmp_path / "store", dtype="float32")
    tiny.assert_equal(tiny.read(store), tiny.expected_params(tiny.config, state), "float32")


def test_arrays_in_chunks(tmp_path, tiny, written, monkeypatch):
    """As Flax saves what is larger than a gigabyte."""
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 128)
    directory, state = written()
    save_msgpack(directory / "flax_model.msgpack", flax_params(state))
    assert b"__msgpack_chunked_array__" in (directory / "flax_model.msgpack").read_bytes()
    store = convert(directory, tmp_path / "store")
    tiny.assert_equal(tiny.read(store), tiny.expected_params(tiny.config, state), "float32")


def test_a_damaged_msgpack_is_one_clear_error(tmp_path, written):
    directory, state = written()
    file = directory / "flax_model.msgpack"
    save_msgpack(file, flax_params(state))
    whole = file.read_bytes()
    for damaged in (b"", whole[:1000], whole[:-1], whole + b"x", b"nonsense", b"\x92\x01\x02"):
        file.write_bytes(damaged)
        with pytest.raises(SourceError, match=r"flax_model\.msgpack is truncated, or no Flax weig"):
            convert(directory, tmp_path / "store")
    flat = flax_params(state)
    flat.pop("model.decoder.layers.1.fc1.kernel")
    save_msgpack(file, flat)
    with pytest.raises(SourceError, match=r"layers\.1\.fc1\.kernel is missing"):
        convert(directory, tmp_path / "store")


KINDS = {"ocdbt": True, "zarr": False}
LAYOUTS = {"flat": "", "below": "params", "step": "3/default"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", ["own", "wrapped", "flax"])
def test_orbax_checkpoints_of_params(tmp_path, tiny, written, kind, layout, names):
    directory, state = written(dataclasses.replace(tiny.config, tie_word_embeddings=False))
    config = dataclasses.replace(tiny.config, tie_word_embeddings=False)
    expected = tiny.expected_params(config, state)
    flat = flax_params(state) if names == "flax" else expected
    tree = nest({k: jnp.asarray(v) for k, v in flat.items()})
    tree = {"params": tree} if names == "wrapped" else tree
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=KINDS[kind])
    with ocp.Checkpointer(handler) as checkpointer:
        target = directory / LAYOUTS[layout] if LAYOUTS[layout] else tmp_path / "saved"
        target.parent.mkdir(exist_ok=True)
        checkpointer.save(target, tree)
    if not LAYOUTS[layout]:
        shutil.copy(directory / "config.json", target)
        directory = target
    store = convert(directory, tmp_path / "store")
    tiny.assert_equal(tiny.read(store), expected, "float32")
    assert convert(directory, tmp_path / "store") == store  # left as it is
    assert open_store(store).config == config


# Orbax leaves coroutines unawaited where a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::RuntimeWarning")
def test_a_damaged_orbax_checkpoint_is_one_clear_error(tmp_path, tiny, written):
    directory, state = written()
    tree = nest({k: jnp.asarray(v) for k, v in tiny.expected_params(tiny.config, state).items()})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "params", tree)
    shutil.rmtree(directory / "params" / "d")
    with pytest.raises(SourceError, match="params is not a complete Orbax checkpoint of params"):
        convert(directory, tmp_path / "store")
    (directory / "params" / "_METADATA").write_text("{}")
    with pytest.raises(SourceError, match="params is not a complete Orbax checkpoint of params"):
        convert(directory, tmp_path / "store2")
    (directory / "params" / "_METADATA").unlink()
    with pytest.raises(ModelNotFoundError, match="or an Orbax checkpoint"):
        convert(directory, tmp_path / "store")
    gc.collect()
