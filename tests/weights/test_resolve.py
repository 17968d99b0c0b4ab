import os
import shutil
from pathlib import Path

import pytest

from flexgen_jax.weights.checkpoint import (
    ModelNotFoundError,
    cache_directory,
    convert,
    open_store,
    resolve,
)


def test_a_store_is_returned_as_it_is(model, tmp_path):
    store = convert(model, tmp_path / "store")
    assert resolve(store, dtype="bfloat16", say=pytest.fail) == store
    assert resolve(os.path.relpath(store), dtype="float32", say=pytest.fail) == store


def test_a_directory_is_converted_once(model, tmp_path):
    lines = []
    assert resolve(model, dtype="float32", say=pytest.fail) == model  # nothing is gained by it
    store = resolve(model, dtype="bfloat16", offload_dir=tmp_path / "off", say=lines.append)
    assert store.parent == tmp_path / "off" / "stores"
    assert store.name.startswith("tiny-opt-bfloat16-")
    assert len(lines) == 1
    assert str(model) in lines[0]
    assert str(store) in lines[0]
    open_store(store, dtype="bfloat16")
    again = resolve(model, dtype="bfloat16", offload_dir=tmp_path / "off", say=pytest.fail)
    assert again == store
    form = {"dtype": "float32", "weight_bits": 8}
    other = resolve(model, **form, offload_dir=tmp_path / "off", say=lines.append)
    assert other != store
    assert len(list((tmp_path / "off" / "stores").iterdir())) == 2


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors", "vocab.json"])
def test_a_changed_source_is_converted_again(model, tmp_path, changed):
    first = resolve(model, dtype="bfloat16", offload_dir=tmp_path)
    file = model / changed
    content = file.read_bytes() if file.exists() else b""
    if changed == "model.safetensors":
        status = file.stat()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        file.write_bytes(content + b" ")
    second = resolve(model, dtype="bfloat16", offload_dir=tmp_path)
    assert first != second


def test_the_cache_directory(monkeypatch, model, tmp_path):
    monkeypatch.setenv("FLEXGEN_JAX_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    store = resolve(model, dtype="bfloat16")
    assert store.parent == tmp_path / "own" / "stores"
    monkeypatch.delenv("FLEXGEN_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "flexgen-jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "flexgen-jax"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a directory where the hub client keeps the model ``name``, as a download would."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(name: str, directory: Path) -> Path:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "blobs").mkdir()
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in directory.iterdir():
            shutil.copy(file, repository / "blobs" / file.name)
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
        return snapshot

    return add


def test_a_hub_name(hub, model, tmp_path, tiny):
    (model / "tokenizer.json").write_text("{}")
    snapshot = hub("someone/tiny-opt", model)
    assert resolve("someone/tiny-opt", say=pytest.fail) == snapshot
    lines = []
    store = resolve("someone/tiny-opt", dtype="bfloat16", offload_dir=tmp_path, say=lines.append)
    assert store.name.startswith("someone--tiny-opt-bfloat16-")
    assert "someone/tiny-opt" in lines[0]
    assert open_store(store).manifest.source.name == "someone/tiny-opt"
    assert (store / "tokenizer.json").read_text() == "{}"
    assert not (store / "tokenizer.json").is_symlink()
    assert not (store / "config.json").is_symlink()
    again = resolve("someone/tiny-opt", dtype="bfloat16", offload_dir=tmp_path, say=pytest.fail)
    assert again == store
    assert convert("someone/tiny-opt", tmp_path / "direct") == tmp_path / "direct"


def test_a_hub_model_without_safetensors_falls_back_to_bin(hub, tmp_path, tiny, monkeypatch):
    import huggingface_hub

    tiny.write_config(tmp_path / "bin", tiny.config)
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"not read here")
    snapshot = hub("someone/old-opt", tmp_path / "bin")
    asked = []
    original = huggingface_hub.snapshot_download

    def recorded(name, *, allow_patterns):
        asked.append(allow_patterns)
        return original(name, allow_patterns=allow_patterns)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", recorded)
    from flexgen_jax.weights.huggingface import download

    assert download("someone/old-opt") == snapshot
    assert not any("bin" in pattern for pattern in asked[0])
    assert "pytorch_model-*.bin" in asked[1]
    assert not any("safetensors" in pattern for pattern in asked[1])


def test_a_hub_name_that_is_not_to_be_had(hub, model, tmp_path, tiny):
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("someone/nothing", dtype="float32", offload_dir=tmp_path)
    for words in ("no model 'someone/nothing'", "no such directory", "Hugging Face hub"):
        assert words in str(caught.value)
    tiny.write_config(tmp_path / "bare", tiny.config)
    hub("someone/bare", tmp_path / "bare")
    with pytest.raises(ModelNotFoundError, match=r"copy at .* lacks config\.json or weights"):
        resolve("someone/bare", dtype="float32", offload_dir=tmp_path)


@pytest.mark.parametrize("name", ["nothing", "/nothing/at/all", "a/b/c", "../x", "facebook/"])
def test_a_name_of_nothing(name, tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such directory, and it is not a name"):
        resolve(name, dtype="float32", offload_dir=tmp_path)


def test_directories_and_files_that_are_no_models(tmp_path, tiny):
    (tmp_path / "photos").mkdir()
    with pytest.raises(
        ModelNotFoundError, match=r"photos is not a model directory: it has neither the manifest"
    ):
        resolve(tmp_path / "photos", dtype="float32", offload_dir=tmp_path)
    tiny.write_config(tmp_path / "bare", tiny.config)
    with pytest.raises(ModelNotFoundError, match=r"bare is not a model directory: .*no weights"):
        resolve(tmp_path / "bare", dtype="float32", offload_dir=tmp_path)
    (tmp_path / "weights.gguf").write_text("")
    with pytest.raises(ModelNotFoundError, match=r"weights\.gguf is a file"):
        resolve(tmp_path / "weights.gguf", dtype="float32", offload_dir=tmp_path)
    assert not (tmp_path / "stores").exists()
