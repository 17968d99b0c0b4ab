"""JSON within bounds, and lines that must not change."""

import json
import os

import pytest

from storage.json_text import digest_of, parse_json, read_json, sealed, unsealed

VALUES = {"a": [1, "\u00e9", None], "b": {"check": 1.5}}


def test_what_is_sealed_is_json_and_comes_back():
    line = sealed(VALUES)
    assert line.endswith(b"\n")
    assert unsealed(line) == VALUES
    assert {k: v for k, v in json.loads(line).items() if k != "check"} == VALUES


def test_every_changed_bit_and_every_cut_is_noticed():
    line = sealed(VALUES)
    for at in range(len(line)):
        for bit in range(8):
            changed = bytearray(line)
            changed[at] ^= 1 << bit
            with pytest.raises(ValueError, match="checksum"):
                unsealed(bytes(changed))
        with pytest.raises(ValueError, match="checksum"):
            unsealed(line[:at])
    with pytest.raises(ValueError, match="checksum"):
        unsealed(line + b" ")


def test_json_is_wrong_in_one_way_only(tmp_path):
    for text in (b"[" * 200_000, b"9" * 5000, b"{", b"\xff", b""):
        with pytest.raises(ValueError, match=r".") as caught:
            parse_json(text)
        assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_parsed(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"[1, 2]")
    assert read_json(path, 6) == [1, 2]
    with pytest.raises(ValueError, match="more than 5 bytes"):
        read_json(path, 5)
    os.truncate(path, 9 << 30)  # sparse
    with pytest.raises(ValueError, match="more than 33554432 bytes"):
        read_json(path)


def test_what_a_pipe_says_is_read(tmp_path):
    out, into = os.pipe()
    os.write(into, b"[1, 2]")
    os.close(into)
    assert read_json(f"/dev/fd/{out}") == [1, 2]
    os.close(out)


def test_the_same_values_have_the_same_digest():
    assert digest_of({"a": 1, "b": 2}) == digest_of(json.loads('{"b":2,   "a":1}'))
    assert digest_of({"a": 1}) != digest_of({"a": 2})
