import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from flexgen_jax.models.params import flatten, nest, param_shapes
from flexgen_jax.weights import element_blocks
from flexgen_jax.weights.checkpoint import SourceError, StoreError, convert, open_store

VARIANTS = {
    "opt": {},
    "post-norm, projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
    "untied": {"tie_word_embeddings": False},
    "no biases": {"enable_bias": False, "activation_function": "gelu"},
    "plain norms": {"layer_norm_elementwise_affine": False},
    "no final norm": {"remove_final_layer_norm": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_arrives_under_its_name_and_turned(tmp_path, tiny, variant):
    config = dataclasses.replace(tiny.config, **VARIANTS[variant])
    state = tiny.write_model(tmp_path / "hf", config)
    store = convert(tmp_path / "hf", tmp_path / "store")
    tiny.assert_equal(tiny.read(store), tiny.expected_params(config, state), "float32")
    assert {n: a.shape for n, a in open_store(store).arrays.items()} == param_shapes(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("source_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_dtypes_and_shards(tmp_path, tiny, source_dtype, dtype, shards):
    state = tiny.write_model(tmp_path / "hf", dtype=source_dtype, shards=shards)
    store = convert(tmp_path / "hf", tmp_path / "store", dtype=dtype)
    tiny.assert_equal(tiny.read(store), tiny.expected_params(tiny.config, state), dtype)
    assert open_store(store, dtype=dtype).dtype == dtype


def test_tensors_of_many_blocks(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(element_blocks, "_BLOCK_NBYTES", 100)
    monkeypatch.setattr(element_blocks, "_MIN_COLUMNS", 3)
    state = tiny.write_model(tmp_path / "hf", dtype="bfloat16")
    store = convert(tmp_path / "hf", tmp_path / "store", dtype="float32")
    tiny.assert_equal(tiny.read(store), tiny.expected_params(tiny.config, state), "float32")


def test_old_checkpoints_without_the_language_model_around_the_decoder(tmp_path, tiny):
    state = tiny.write_model(tmp_path / "hf", prefix="decoder.")
    expected = tiny.expected_params(tiny.config, state, prefix="decoder.")
    store = convert(tmp_path / "hf", tmp_path / "store")
    tiny.assert_equal(tiny.read(store), expected, "float32")


def test_a_header_that_leaves_the_data_unaligned(tmp_path, tiny):
    state = tiny.write_model(tmp_path / "hf", dtype="bfloat16")
    file = tmp_path / "hf" / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip()
    header += b" " * (1 - len(header) % 2)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    assert len(header) % 2
    store = convert(tmp_path / "hf", tmp_path / "store", dtype="float32")
    tiny.assert_equal(tiny.read(store), tiny.expected_params(tiny.config, state), "float32")


def test_orbax_restores_the_store_with_and_without_a_target(tmp_path, tiny):
    import orbax.checkpoint as ocp

    state = tiny.write_model(tmp_path / "hf")
    expected = tiny.expected_params(tiny.config, state)
    store = convert(tmp_path / "hf", tmp_path / "store", dtype="bfloat16")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(store)
        tiny.assert_equal(tiny.turned(flatten(tree)), expected, "bfloat16")
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = nest(
            {
                name: jax.ShapeDtypeStruct(array.shape, "bfloat16", sharding=sharding)
                for name, array in open_store(store).arrays.items()
            }
        )
        restored = flatten(checkpointer.restore(store, target))
    assert all(isinstance(leaf, jax.Array) for leaf in restored.values())
    found = tiny.turned({k: np.asarray(v) for k, v in restored.items()})
    tiny.assert_equal(found, expected, "bfloat16")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = tiny.turned(flatten(checkpointer.restore(store)))
        tiny.assert_equal(found, expected, "bfloat16")


def test_what_lies_beside_the_arrays(model, tmp_path):
    for name in ("tokenizer.json", "merges.txt"):
        (model / name).write_text(f"content of {name}")
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (model / "training_args.json").write_text("of no use here")
    store = convert(model, tmp_path / "store")
    files = {p.name for p in store.iterdir() if p.is_file()}
    assert files == {
        *("_METADATA", "_CHECKPOINT_METADATA", "flexgen_manifest.json", "config.json"),
        *("tokenizer.json", "merges.txt", "generation_config.json"),
    }
    assert (store / "merges.txt").read_text() == "content of merges.txt"
    assert (store / "config.json").read_bytes() == (model / "config.json").read_bytes()
    manifest = json.loads((store / "flexgen_manifest.json").read_text())
    assert manifest["format_version"] == 5
    assert manifest["weight_bits"] is None
    assert manifest["source"]["name"] == "tiny-opt"
    entry = {"shape": [16, 24], "dtype": "float32", "nbytes": 16 * 24 * 4}
    found = manifest["tensors"]["layer_0.fc1.kernel"]
    assert len(found.pop("checksum")) == 16
    assert found == entry
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_progress_counts_every_byte_once(model, tmp_path):
    calls = []
    store = convert(model, tmp_path / "store", progress=lambda *call: calls.append(call))
    total = open_store(store).manifest.nbytes
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert done[-1] == total
    assert {call[1] for call in calls} == {total}
    assert {call[2] for call in calls} == set(open_store(store).arrays)


def test_the_same_conversion_again_finds_the_store(model, tmp_path):
    store = convert(model, tmp_path / "store")
    before = (store / "flexgen_manifest.json").stat()
    assert convert(model, tmp_path / "store", progress=pytest.fail) == store
    assert (store / "flexgen_manifest.json").stat().st_mtime_ns == before.st_mtime_ns


def test_an_existing_directory_is_never_overwritten(model, tmp_path, tiny):
    convert(model, tmp_path / "store")
    with pytest.raises(StoreError, match=r"store exists already: .* in float32 .* in bfloat16"):
        convert(model, tmp_path / "store", dtype="bfloat16")
    tiny.write_model(tmp_path / "other", seed=1)
    with pytest.raises(StoreError, match=r"holds tiny-opt in float32.*but other.* was requested"):
        convert(tmp_path / "other", tmp_path / "store")
    open_store(tmp_path / "store", dtype="float32")

    mine = tmp_path / "mine"
    mine.mkdir()
    convert(model, mine)  # an empty directory is no loss
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("thesis", "file"):
        with pytest.raises(StoreError, match=f"{name} exists and is not a weight store"):
            convert(model, tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_a_damaged_store_is_not_reused(model, tmp_path):
    store = convert(model, tmp_path / "store")
    chunk = store / "layer_0.q.kernel" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-4])
    with pytest.raises(StoreError, match=r"layer_0\.q\.kernel.*truncated"):
        convert(model, tmp_path / "store")


def test_truncated_safetensors(model, tmp_path):
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    expected = (
        rf"model\.safetensors is truncated: it has {len(content) - 5} bytes, .*{len(content)}"
    )
    with pytest.raises(SourceError, match=expected):
        convert(model, tmp_path / "store")
    for size in (0, 7, 20):
        file.write_bytes(content[:size])
        with pytest.raises(SourceError, match=r"model\.safetensors is (truncated|no safetensors)"):
            convert(model, tmp_path / "store")
    file.write_bytes(b"\x08" + b"\x00" * 7 + b"no json!")
    with pytest.raises(SourceError, match=r"model\.safetensors is not a safetensors file"):
        convert(model, tmp_path / "store")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-opt"]


def test_incomplete_shards(tmp_path, tiny):
    hf = tmp_path / "hf"
    state = tiny.write_model(hf, shards=3)
    index = hf / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())["weight_map"]
    lost = json.dumps(
        {"weight_map": {**mapping, "model.decoder.extra": mapping[next(iter(state))]}}
    )
    index.write_text(lost)
    with pytest.raises(SourceError, match=r"lists the tensor model\.decoder\.extra, which"):
        convert(hf, tmp_path / "store")
    (hf / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SourceError, match=r"names the shard model-00002-of.*\(2 of 3 are there\)"):
        convert(hf, tmp_path / "store")
    index.write_text("[]")
    with pytest.raises(SourceError, match=r"index\.json is not an index of weight shards"):
        convert(hf, tmp_path / "store")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def rewrite(hf, state):
    from safetensors.numpy import save_file

    save_file(state, hf / "model.safetensors")


def test_tensors_that_do_not_fit_the_config(tmp_path, tiny):
    hf = tmp_path / "hf"
    state = tiny.write_model(hf)
    key = "model.decoder.layers.1.fc1.weight"
    rewrite(hf, {k: v for k, v in state.items() if k != key})
    with pytest.raises(SourceError, match=rf"the tensor {key} is missing"):
        convert(hf, tmp_path / "store")
    rewrite(hf, {**state, key: state[key].T.copy()})
    with pytest.raises(SourceError, match=rf"{key} has shape \[16, 24\], expected \[24, 16\]"):
        convert(hf, tmp_path / "store")
    rewrite(hf, {**state, "model.decoder.layers.2.fc1.weight": state[key]})
    with pytest.raises(SourceError, match=r"unexpected tensor model\.decoder\.layers\.2\.fc1"):
        convert(hf, tmp_path / "store")
    rewrite(hf, {**state, key: state[key].astype(np.int32)})
    with pytest.raises(SourceError, match=rf"{key} has dtype int32"):
        convert(hf, tmp_path / "store")
    rewrite(hf, {**state, "model.decoder.version": np.ones(1, np.float32)})
    convert(hf, tmp_path / "store")


def test_dtypes_that_are_not_stored(model, tmp_path):
    with pytest.raises(StoreError, match="'float16': float16 is read, but not computed with"):
        convert(model, tmp_path / "store", dtype="float16")


def test_a_store_is_no_source(model, tmp_path):
    store = convert(model, tmp_path / "store")
    with pytest.raises(SourceError, match="is a weight store already"):
        convert(store, tmp_path / "again", dtype="bfloat16")


def test_bin_without_torch_names_the_extra(tmp_path, tiny, monkeypatch):
    tiny.write_config(tmp_path / "hf", tiny.config)
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SourceError, match=r"pip install 'flexgen-jax\[torch-bin\]'"):
        convert(tmp_path / "hf", tmp_path / "store")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bin(tmp_path, tiny, dtype, zipped):
    torch = pytest.importorskip("torch")
    state = tiny.state_dict(tiny.config)
    tensors = {k: torch.from_numpy(v).to(getattr(torch, dtype)) for k, v in state.items()}
    rounded = {k: v.float().numpy() for k, v in tensors.items()}
    hf = tmp_path / "hf"
    tiny.write_config(hf, tiny.config)
    torch.save(tensors, hf / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    store = convert(hf, tmp_path / "store")
    tiny.assert_equal(tiny.read(store), tiny.expected_params(tiny.config, rounded), "float32")

    content = (hf / "pytorch_model.bin").read_bytes()
    (hf / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match=r"pytorch_model\.bin is truncated, or no PyTorch"):
        convert(hf, tmp_path / "another")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda torch, t: {7: t}, r"a tensor is called 7, which is not text"),
        (lambda torch, t: {"x": t.to(torch.float8_e4m3fn)}, r"tensor x is torch\.float8_e4m3fn"),
        (lambda torch, t: {"x": t.to_sparse()}, r"tensor x is torch\.float32 .*sparse"),
        (lambda torch, t: {"x": t.to("meta")}, r"tensor x is torch\.float32 .* meta"),
        (lambda torch, t: [t], r"no PyTorch weights"),
    ],
)
def test_a_bin_of_what_is_no_array(tmp_path, tiny, change, said):
    torch = pytest.importorskip("torch")
    hf = tmp_path / "hf"
    tiny.write_config(hf, tiny.config)
    torch.save(change(torch, torch.ones(2, 2)), hf / "pytorch_model.bin")
    with pytest.raises(SourceError, match=said) as caught:
        convert(hf, tmp_path / "store")
    assert "\n" not in str(caught.value)


def test_sharded_bin(tmp_path, tiny):
    torch = pytest.importorskip("torch")
    state = tiny.state_dict(tiny.config)
    hf = tmp_path / "hf"
    tiny.write_config(hf, tiny.config)
    mapping = {}
    for i in range(2):
        name = f"pytorch_model-{i + 1:05}-of-00002.bin"
        part = {k: torch.from_numpy(state[k]) for k in list(state)[i::2]}
        torch.save(part, hf / name)
        mapping.update(dict.fromkeys(part, name))
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": mapping}))
    store = convert(hf, tmp_path / "store")
    tiny.assert_equal(tiny.read(store), tiny.expected_params(tiny.config, state), "float32")
