"""What a safetensors header may not say."""

import json
import os

import numpy as np
import pytest
from safetensors import safe_open

from flexgen_jax.weights.safetensors_file import SafetensorsFile
from flexgen_jax.weights.tensor_file import SourceError

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [24, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
}
NBYTES = 26


def write(path, header, data=bytes(NBYTES)):
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def changed(key, **values):
    return {**GOOD, key: {**GOOD[key], **values}}


def test_a_sound_file(tmp_path):
    data = np.arange(6, dtype="<f4").tobytes() + b"\x80\x3f"
    file = SafetensorsFile(write(tmp_path / "f", json.dumps(GOOD).encode(), data))
    assert file.array("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.array("b") == 1
    assert file.array("none").shape == (0, 3)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (changed("a", data_offsets=[-24, 0]), "from 0 on"),
        (changed("a", data_offsets=[24, 0]), "before it begins"),
        (changed("b", data_offsets=[30, 32]), "leaves a gap before it"),
        (changed("b", data_offsets=[22, 24]), "overlaps the one before"),
        (changed("b", data_offsets=[0, 2]), "(overlaps|gap)"),
        (changed("b", data_offsets=[24, 2**60]), "is truncated"),
        ({"a": GOOD["a"]}, "2 bytes follow its last tensor"),
        ({**GOOD, "c": GOOD["a"]}, "overlaps"),
        (changed("a", data_offsets=[0.0, 24.0]), "whole numbers"),
        (changed("a", data_offsets=[False, 24]), "whole numbers"),
        (changed("a", data_offsets=[0]), "whole numbers"),
        (changed("a", data_offsets=None), "whole numbers"),
        (changed("a", shape=[2.0, 3]), "whole numbers"),
        (changed("a", shape="23"), "whole numbers"),
        (changed("a", shape=[-2, -3]), "from 0 on"),
        (changed("a", shape=[3, 3]), "of shape .* has 24 bytes"),
        (changed("a", dtype=["F32"]), "dtype"),
        (changed("a", dtype="F4"), "has dtype F4; readable are"),
        ({**GOOD, "c": None}, "NoneType"),
        ({**GOOD, "c": {}}, "dtype"),
        (b"[]", "does not begin with"),
        (b" " + json.dumps(GOOD).encode(), "does not begin with"),
        (json.dumps(GOOD).encode("utf-16"), "codec"),
        (b'{"a": ' + b"[" * 200_000, "more parts than tensors"),
        (b'{"a": ' + b"[" * 30_000 + b" " * 500_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a safetensors file"),
    ],
)
def test_what_the_format_forbids(tmp_path, header, said):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = write(tmp_path / "f", header)
    with pytest.raises(SourceError, match=rf"f is (truncated|no safetensors).*{said}|{said}"):
        SafetensorsFile(path)
    if header[:1] != b" ":  # which the library takes, though its format does not
        with pytest.raises(Exception, match=r"."), safe_open(path, "np") as file:
            file.get_tensor("a")


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "f"
    path.write_bytes((8 << 30).to_bytes(8, "little") + b"{}")
    os.truncate(path, 9 << 30)  # sparse
    with pytest.raises(SourceError, match=r"its header would have 8589934592 bytes of 33554432"):
        SafetensorsFile(path)
