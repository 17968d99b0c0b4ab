"""Files that somebody made to do harm: one line, bounded memory, nothing outside the directory."""

import json
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexgen_jax.weights.checkpoint import convert, open_model
from flexgen_jax.weights.safetensors_file import SafetensorsFile
from flexgen_jax.weights.tensor_file import SourceError

GOLDEN = Path(__file__).parent.parent / "goldens" / "pre_norm"


@pytest.fixture
def model(tmp_path):
    """A copy, alone in a directory."""
    directory = tmp_path / "here" / "model"
    shutil.copytree(GOLDEN, directory)
    return directory


def everything(directory):
    return {p.relative_to(directory): p.lstat().st_mtime_ns for p in directory.rglob("*")}


def refused(model, said):
    """By opening and by converting, with nothing written anywhere but a cache."""
    outside = model.parent.parent
    before = everything(outside)
    for act in (open_model, lambda m: convert(m, outside / "store")):
        with pytest.raises(SourceError, match=said) as found:
            act(model)
        assert "\n" not in str(found.value)
    assert everything(outside) == before


def header_of(file):
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write(file, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


KEY = "model.decoder.layers.0.fc1.weight"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data_offsets": [0, 2**62]}, "leaves a gap|overlaps|truncated"),
        ({"data_offsets": [2**62, 2**62 + 1]}, "leaves a gap"),
        ({"shape": [2**40, 2**40]}, "has [0-9]+ bytes"),
        ({"shape": [1] * 200_000}, "has [0-9]+ bytes"),
        ({"shape": [0, 2**62]}, "has [0-9]+ bytes"),
        ({"shape": [10**400]}, "has [0-9]+ bytes"),
        ({"dtype": "../../../etc/passwd"}, "has dtype"),
    ],
)
def test_places_and_shapes_that_cannot_be(model, values, said):
    file = model / "model.safetensors"
    header, data = header_of(file)
    header[KEY] |= values
    write(file, header, data)
    refused(model, said)


def test_a_shard_that_ends_early(model):
    file = model / "model.safetensors"
    for size in (4, 100, file.stat().st_size - 1):
        os.truncate(file, size)
        with pytest.raises(SourceError, match=r"truncated|not a safetensors file"):
            open_model(model)
        shutil.copy(GOLDEN / "model.safetensors", file)


def test_tensors_that_are_called_like_files(model):
    state = load_file(model / "model.safetensors")
    for name in ("../../evil", "/tmp/evil", "a/../../evil", "\x00", "model.decoder.layers.0/../x"):
        save_file({**state, name: np.ones(2, np.float32)}, model / "model.safetensors")
        refused(model, "unexpected tensor")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "sub/outside.safetensors", "..", ""]
)
def test_an_index_that_names_what_is_not_beside_it(model, name):
    outside = model.parent / "outside.safetensors"
    shutil.move(model / "model.safetensors", outside)
    (model / "sub").symlink_to(model.parent)
    state = load_file(outside)
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, "not a file beside it")


def peak_of(act):
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("said", "content"),
    [
        ("would have 100000000 bytes", b"{}"),
        ("more parts than tensors", b'{"a": [' + b"[]," * 8_000_000 + b"0]}"),
        ("more parts than tensors", b'{"a": ' + b'{"":' * 4_000_000 + b"0" + b"}" * 4_000_001),
    ],
    ids=["100 MB", "many lists", "deep"],
)
def test_a_header_that_fills_memory(tmp_path, said, content):
    file = tmp_path / "model.safetensors"
    write(file, content, b"")
    if said.startswith("would"):
        with file.open("r+b") as whole:
            whole.write((100_000_000).to_bytes(8, "little"))
        os.truncate(file, 100_000_008)  # sparse

    def act():
        with pytest.raises(SourceError, match=said):
            SafetensorsFile(file)

    assert peak_of(act) < 2 * len(content) + (1 << 20)


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_does_not_execute(model):
    """With PyTorch it is refused by its loader; without, nothing reads it."""
    (model / "model.safetensors").unlink()
    made = model.parent.parent / "executed"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({KEY: RunsCode(made)}))
    with pytest.raises(SourceError, match=r"no PyTorch weights|needs PyTorch"):
        convert(model, model.parent.parent / "store")
    assert not made.exists()


def test_a_config_that_asks_for_code_runs_none(model):
    values = json.loads((model / "config.json").read_text())
    values["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps(values))
    made = model.parent / "executed"
    (model / "evil.py").write_text(f"open({str(made)!r}, 'w')\n")
    open_model(model)
    assert not made.exists()
