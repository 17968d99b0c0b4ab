import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexgen_jax.models.family import ConfigError
from flexgen_jax.models.opt import OPTConfig
from flexgen_jax.weights import checkpoint
from flexgen_jax.weights.checkpoint import StoreError, convert_dummy, open_store

ROOT = Path(__file__).parents[2]


def test_the_seed_decides(tmp_path, tiny, monkeypatch):
    first = tiny.read(convert_dummy(tiny.config, tmp_path / "a", seed=3))
    monkeypatch.setattr(checkpoint, "_normal_quantiles", checkpoint._normal_quantiles.__wrapped__)
    again = tiny.read(convert_dummy(tiny.config, tmp_path / "b", seed=3))
    other = tiny.read(convert_dummy(tiny.config, tmp_path / "c", seed=4))
    assert first.keys() == again.keys() == other.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        if values.ndim == 2:
            assert not np.array_equal(values, other[name])
    assert not np.array_equal(first["layer_0.q.kernel"], first["layer_0.k.kernel"])
    low = tiny.read(convert_dummy(tiny.config, tmp_path / "d", seed=3, dtype="bfloat16"))
    for name, values in first.items():  # the same numbers in the order in which they lie
        found = low[name].T if name.endswith(".kernel") else low[name]
        np.testing.assert_array_equal(
            values.astype(found.dtype).reshape(-1), found.reshape(-1), err_msg=name
        )


def test_the_distribution(tmp_path, tiny):
    config = dataclasses.replace(tiny.config, vocab_size=2**16 + 5, word_embed_proj_dim=32)
    params = tiny.read(convert_dummy(config, tmp_path / "a"))
    tokens = params["embed.tokens"]  # more than one block
    assert abs(tokens.mean()) < 1e-4
    assert abs(tokens.std() / checkpoint.DUMMY_SCALE - 1) < 0.01
    assert np.isfinite(tokens).all()
    flat = tokens.reshape(-1)
    assert not np.array_equal(flat[: 1 << 20], flat[1 << 20 : 2 << 20])
    assert (params["layer_0.attention_norm.scale"] == 1).all()
    for name, values in params.items():
        if name.endswith("bias"):
            assert (values == 0).all()


def test_presets_and_config_files(tmp_path, tiny):
    tiny.write_config(tmp_path / "hf", tiny.config)
    by_directory = convert_dummy(tmp_path / "hf", tmp_path / "a")
    assert convert_dummy(str(tmp_path / "hf" / "config.json"), tmp_path / "a") == by_directory
    assert open_store(by_directory).config == tiny.config
    assert open_store(by_directory).manifest.source.name == "dummy:hf"
    with pytest.raises(ConfigError, match=r"presets: .*opt-175b"):
        convert_dummy("facebook/opt-1.4b", tmp_path / "b")
    with pytest.raises(ValueError, match="seed"):
        convert_dummy(tiny.config, tmp_path / "b", seed=-1)


def test_a_preset_larger_than_the_disk_is_refused_at_once(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**11)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"not enough space in .*are still to be written"):
        convert_dummy("facebook/opt-175b", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_another_seed_is_another_store(tmp_path, tiny):
    convert_dummy(tiny.config, tmp_path / "a")
    with pytest.raises(StoreError, match="exists already"):
        convert_dummy(tiny.config, tmp_path / "a", seed=1)


# One layer whose MLP kernels take 105 MB each in float32.
LARGE = OPTConfig(
    vocab_size=64,
    hidden_size=2048,
    num_hidden_layers=1,
    ffn_dim=12800,
    num_attention_heads=16,
    max_position_embeddings=62,
)

MEASURE = """
import re, sys
from pathlib import Path
from flexgen_jax.weights.checkpoint import convert, convert_dummy
import tensorstore
from flexgen_jax.models.registry import families
list(families())  # imported when a config is read

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", status)[1]) * 1024

peak = before = anonymous()
def progress(done, total, name):
    global peak
    peak = max(peak, anonymous())
{"convert": convert, "dummy": convert_dummy}[sys.argv[1]](
    sys.argv[2], sys.argv[3], dtype="bfloat16", progress=progress)
print(peak - before)
"""


def write_sparse_model(directory, tiny):
    """A model of zeros whose file takes no space."""
    import json

    small = {"hidden_size": 2, "word_embed_proj_dim": 2, "ffn_dim": 3, "num_hidden_layers": 1}
    config = dataclasses.replace(tiny.config, **small)
    keys = tiny.state_dict(config)  # for the names and which dimension is which
    sizes = {2: LARGE.hidden_size, 3: LARGE.ffn_dim, config.vocab_size: LARGE.vocab_size, 32: 64}
    header, end = {}, 0
    for key, values in keys.items():
        shape = [sizes[n] for n in values.shape]
        start, end = end, end + 4 * int(np.prod(shape))
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    tiny.write_config(directory, LARGE)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured through /proc")
@pytest.mark.parametrize("what", ["dummy", "convert"])
def test_memory_is_bounded_by_a_block_and_not_by_a_tensor(tmp_path, tiny, what):
    if what == "convert":
        write_sparse_model(tmp_path / "hf", tiny)
    else:
        tiny.write_config(tmp_path / "hf", LARGE)
    command = [sys.executable, "-c", MEASURE, what, tmp_path / "hf", tmp_path / "store"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # The largest tensor takes 52 MB as it is stored, 105 MB as it is read.
    assert int(result.stdout) < 40e6
    open_store(tmp_path / "store", dtype="bfloat16")
