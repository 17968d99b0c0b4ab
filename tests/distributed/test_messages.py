"""Messages between processes are data: whatever comes is read or refused, and nothing is run."""

import dataclasses
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_jax.distributed.frames import MessageError, frame, unframed
from flexgen_jax.distributed.messages import (
    SAMPLED_NBYTES,
    TOKENS_NBYTES,
    Run,
    decode,
    decode_tokens,
    encode,
    encode_tokens,
)
from flexgen_jax.distributed.plain import from_plain, to_plain
from flexgen_jax.distributed.processes import ProcessError, Processes
from flexgen_jax.engine.sampling import Sampled
from flexgen_jax.planning.blocks import make_blocks
from flexgen_jax.requests.request import Request
from flexgen_jax.requests.sampling_params import SamplingParams
from scheduling.policy import Policy, Split

REQUESTS = [
    Request(0, "a text — 漢字", (5, 6, 7), SamplingParams(temperature=0.0, stop=["x"], seed=2**90)),
    Request(1, None, (8,), SamplingParams(logit_bias={3: -1.5}, n=2, logprobs=3)),
    Request(
        3,
        None,
        (8,),
        SamplingParams(structured_outputs={"choice": ["a", "b"]}, allowed_token_ids=[1, 5]),
    ),
    Request(2, None, (9, 9), SamplingParams(), scored=(9, -1), forced=(4,), bad_words=((1, 2),)),
]
RUN = Run(
    {"the seed": "0"},
    Policy(weights=Split(device=30, host=30, disk=40), cache_bits=4),
    list(make_blocks(REQUESTS, device_batch_size=2, num_device_batches=2)),
)
TOKENS = Sampled(
    np.arange(2, dtype=np.int32),
    np.zeros(2, np.float32),
    np.ones(2, np.int32),
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.full((2, 3), -0.5, np.float32),
)


def fields(value):
    """``Request`` and blocks compare by identity."""
    return dataclasses.asdict(value)


def test_there_and_back():
    assert fields(decode(encode(RUN))) == fields(RUN)
    assert decode(encode(None)) is None


def test_tokens_there_and_back():
    said = encode_tokens(TOKENS, [TOKENS, TOKENS])
    assert len(said) <= TOKENS_NBYTES + 3 * (SAMPLED_NBYTES + sum(a.nbytes for a in TOKENS))
    sampled, scores = decode_tokens(said + bytes(1000), rows=2)  # in a buffer of fixed size
    assert len(scores) == 2
    for found in (sampled, *scores):
        for array, expected in zip(found, TOKENS, strict=True):
            np.testing.assert_array_equal(array, expected)
            assert array.dtype == expected.dtype


class RunsCode:
    ran = False

    def __reduce__(self):
        return setattr, (RunsCode, "ran", True)


def test_a_pickle_is_not_unpickled():
    payload = pickle.dumps(RunsCode())
    pickle.loads(payload)
    assert RunsCode.ran
    RunsCode.ran = False
    for came in (payload, encode(None)[:28] + payload, frame("run", payload.decode("latin-1"))):
        with pytest.raises(MessageError):
            decode(came)
        with pytest.raises(MessageError):
            decode_tokens(came, rows=2)
    assert not RunsCode.ran


def forged(text, data=b"", text_nbytes=None, nbytes=None):
    """A frame with a right checksum and anything in it."""
    text_nbytes = len(text) if text_nbytes is None else text_nbytes
    head = text_nbytes, len(data) if nbytes is None else nbytes
    return struct.pack("<8sIQQ", b"flexgen1", zlib.crc32(text + data), *head) + text + data


WRONG = {
    "nothing": (b"", "got 0 bytes"),
    "another protocol": (b"GET / HTTP/1.1\r\n\r\n", "got 18 bytes that begin with b'GET / HTTP"),
    "cut short": (encode(RUN)[:-1], "expected a message of .* bytes, got"),
    "a huge length": (forged(b"{}", nbytes=2**63), f"expected a message of {2**63 + 30} bytes"),
    "a flipped byte": (encode(RUN)[:-1] + b"?", "damaged: its checksum"),
    "no JSON": (forged(b"{"), "cannot be read"),
    "deep JSON": (forged(b"[" * 100_000), "nested too deeply"),
    "another shape of JSON": (forged(b'{"a": 1}'), "cannot be read"),
    "an unknown kind": (frame("eval", "print(1)"), "a message of kind 'eval'"),
    "objects as arrays": (
        forged(b'["run", [["object", [1]]], 0]', bytes(8)),
        "an array of 'object'",
    ),
    "too large an array": (forged(b'["run", [["int32", [9999999999]]], 0]'), "more elements than"),
    "too many bytes": (forged(b'["run", [], 0]', bytes(8)), "more bytes than"),
    "no blocks": (
        frame("run", {"settings": {}, "policy": 3, "blocks": [], "more": False}),
        "expected Policy, got 3",
    ),
    "no fields": (frame("run", {}), "Run without, or with the unknown, 'blocks, m.*ttings'"),
}


@pytest.mark.parametrize(("came", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_message_is_said_to_be_none(came, message):
    with pytest.raises(MessageError, match=message) as caught:
        decode(came)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("policy", "num_stages"), True),
        (("policy", "num_stages"), -1),
        (("settings",), []),
        (("blocks", 0, "batches", 0, "rows"), 0),
        (("blocks", 0, "batches", 0, "requests"), []),
        (("blocks", 0, "batches", 0, "prompt_len"), 1),
        (("blocks", 0, "batches", 0, "requests", 0, "token_ids"), "abc"),
        (("blocks", 0, "batches", 0, "requests", 0, "params", "top_p"), 7),
        (("blocks", 0, "batches", 0, "requests", 0, "params", "temperature"), "hot"),
        (("blocks", 0, "batches", 0, "requests", 0, "__class__"), "os.system"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_a_message_with_a_wrong_field_is_refused(path, value):
    content = json.loads(json.dumps(to_plain(RUN)))
    *way, last = path
    inner = content
    for step in way:
        inner = inner[step]
    inner[last] = value
    with pytest.raises(MessageError, match="start all processes with the same software"):
        decode(frame("run", content))


@given(place=st.integers(0, len(encode(RUN)) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_changed_bytes_are_noticed(place, byte, cut):
    came = bytearray(encode(RUN))
    came[place] ^= byte
    if cut:
        del came[place:]
    if bytes(came) == encode(RUN):
        return
    with pytest.raises(MessageError):
        decode(bytes(came))


@given(came=st.binary(max_size=200), marked=st.booleans())
def test_garbage_is_refused(came, marked):
    with pytest.raises(MessageError):
        unframed(b"flexgen1" * marked + came)


@pytest.mark.parametrize(
    ("arrays", "rows"),
    [
        (TOKENS, 3),
        (TOKENS[:4], 2),
        ((*TOKENS[:4], TOKENS.token), 2),
        ((TOKENS.logprob, *TOKENS[1:]), 2),
        ((), 2),
    ],
)
def test_other_arrays_than_tokens_are_refused(arrays, rows):
    with pytest.raises(MessageError, match=f"expected the tokens of {rows} rows"):
        decode_tokens(frame("tokens", None, arrays), rows)


def test_what_comes_decides_no_class():
    with pytest.raises(ValueError, match="expected int"):
        from_plain(int, {"__class__": "Policy"})


class Store:
    """The runtime's key-value store, with what a peer has put there."""

    def __init__(self, count, *parts):
        self._count, self._parts = count, parts

    def blocking_key_value_get(self, name, timeout):
        return self._count

    def blocking_key_value_get_bytes(self, name, timeout):
        place = int(name.rpartition("/")[2])
        if place >= len(self._parts):
            raise RuntimeError("DEADLINE_EXCEEDED: timed out")
        return self._parts[place]


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (Store("1", b"SSH-2.0-OpenSSH\r\n"), "expected a message of flexgen-jax, got 17 bytes"),
        (Store("9999999999999"), "expected how many parts a message has, got '9999999999999'"),
        (Store("-1"), "expected how many parts a message has, got '-1'"),
        (Store("0"), "a message has 1 to 4096 parts, not 0"),
        (Store("2", encode(None)), "a message of 2 parts was announced, and part 1 has not come"),
    ],
)
def test_the_peer_is_named(store, message):
    processes = Processes.__new__(Processes)  # of no runtime
    processes._client, processes._space, processes._received = store, "space", 0
    processes._names, processes._verdict = ["process 0 (stage 0, layers 0 to 3)"], None
    with pytest.raises(ProcessError, match=message) as caught:
        processes.receive()
    said = str(caught.value)
    assert said.startswith("process 0 (stage 0, layers 0 to 3) does not speak as it should: ")
    assert "\n" not in said
