"""Layers in parts: the bits of a Compute that does all, whatever the order, place and method."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flexgen_jax as fg
from flexgen_jax.engine import kernels
from flexgen_jax.weights.checkpoint import convert
from scheduling import (
    Attend,
    Compute,
    LoadCache,
    LoadHidden,
    Project,
    StoreCache,
    StoreHidden,
    Stream,
    zigzag,
)
from tests.scheduling.strategies import in_parts

GOLDENS = Path(__file__).parents[1] / "goldens"
EXPECTED = json.loads((GOLDENS / "expected.json").read_text())
SPARSE = json.loads((GOLDENS / "families" / "expected.json").read_text())
VARIANT = sorted(EXPECTED["variants"])[0]
DEVICE, HOST = fg.Split(), fg.Split(device=0, host=100)
DISK, MIXED = fg.Split(device=0, disk=100), fg.Split(device=30, host=30, disk=40)
HALF = fg.Split(device=50, host=50)
SHAPE = {"device_batch_size": 2, "num_device_batches": 3, "refill": False}


def apart(w):
    """Zig-zag with all layers in parts, one after another."""
    return in_parts(zigzag(w), w)


def ahead(w):
    """The first parts of all batches of a layer before the rest of any; it needs three slots."""
    held = []
    for op in zigzag(w):
        if isinstance(op, (LoadHidden, LoadCache)) and op.step and w.has_cache(op.layer):
            yield op
            if isinstance(op, LoadHidden):
                yield Project(op.step, op.layer, op.batch)
                yield Attend(op.step, op.layer, op.batch)
        elif (
            isinstance(op, (Compute, StoreHidden, StoreCache)) and op.step and w.has_cache(op.layer)
        ):
            held.append(op)
        else:
            yield from held
            held.clear()
            yield op


# So many that cgopipe and neo go on across layers.
SLOTS = {"weight_slots": 3, "hidden_slots": 3, "cache_slots": 3}
ORDERS = [apart, ahead, "cgopipe", "neo"]


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def generate(offload):
    def run(schedule="zigzag", model=GOLDENS / VARIANT, prompts=None, new=5, **policy):
        """Tokens, the logits of every step, and the report."""
        found = {}

        def keep(step, batch, logits):
            found[batch, step] = np.asarray(logits)

        params = fg.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        llm = fg.LLM(
            str(model),
            policy=fg.Policy(**{**SHAPE, **policy}),
            schedule=schedule,
            offload_dir=offload,
            dtype="float32",
            slots=SLOTS,
        )
        with llm:
            outputs = llm.generate(prompts or EXPECTED["prompts"][:6], params, on_logits=keep)
            return [list(o.outputs[0].token_ids) for o in outputs], found, llm.report

    return run


def the_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for key, logits in one[1].items():
        np.testing.assert_array_equal(other[1][key], logits)


METHODS = {
    "host attention": {"cache": HOST, "host_attention": True},
    "from disk": {"cache": DISK, "host_attention": True, "weights": DISK, "hidden": DISK},
    "some of it": {"cache": HALF, "host_attention": True, "weights": MIXED},
    "on the device": {"cache": MIXED},
    "codes": {"cache": HALF, "host_attention": True, "cache_bits": 4, "weight_bits": 8},
    "codes on the device": {"cache": HOST, "cache_bits": 8},
    "a selection": {"cache": MIXED, "attention_sparsity": 0.4},
    "on the host": {"cache": HOST, "attention_sparsity": 0.4, "host_attention": True},
    "stages": {"cache": HALF, "host_attention": True, "num_stages": 2, "weights": DISK},
}


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("method", METHODS)
def test_the_bits_of_the_whole(method, generate):
    policy = METHODS[method]
    whole = generate(**policy)
    for schedule in ORDERS:
        the_same(whole, generate(schedule, **policy))
        if method == "some of it":
            the_same(whole, generate(schedule, overlap=False, **policy))


def test_attention_has_a_stream_of_its_own(generate):
    _, _, report = generate(ahead, cache=HOST, host_attention=True)
    spans = [s for s in report.timeline.spans if s.op == "Attend"]
    assert {s.stream for s in spans} == {Stream.ATTEND.value}
    cells = {(s.step, s.layer, s.batch) for s in spans}
    layers = len(fg.OPTConfig.load(GOLDENS / VARIANT).units) - 2
    assert len(cells) == len(spans) == 4 * layers * 3


splits = st.sampled_from([DEVICE, HOST, DISK, MIXED])


@given(
    weights=splits,
    cache=splits,
    hidden=splits,
    hosted=st.booleans(),
    overlap=st.booleans(),
    schedule=st.sampled_from(ORDERS),
)
@settings(max_examples=16)
def test_from_every_tier(generate, weights, cache, hidden, hosted, overlap, schedule):
    """Where attention is computed decides which programs run; the order does not."""
    placed = {"weights": weights, "hidden": hidden, "overlap": overlap}
    at = {"cache": cache, "host_attention": hosted}
    the_same(generate(**at), generate(schedule, **placed, **at))


@pytest.mark.parametrize("variant", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("cache", [HOST, HALF])
def test_with_experts(variant, cache, generate, tmp_path):
    store = convert(GOLDENS / "families" / variant, tmp_path / "store", dtype="float32")
    about = {"model": store, "prompts": SPARSE["prompts"][:6], "cache": cache}
    whole = generate(host_attention=True, **about)
    expected = [tokens[:5] for tokens in SPARSE["variants"][variant]["tokens"][:6]]
    assert whole[0] == expected
    for schedule in (ahead, "cgopipe", "neo"):
        again = generate(schedule, host_attention=True, weights=HOST, experts=DISK, **about)
        the_same(whole, again)


def job(count, most=12):
    rng = np.random.default_rng(3)
    prompts = [[int(t) for t in rng.integers(4, 80, n)] for n in rng.integers(1, 20, count)]
    lengths = np.clip(np.exp(rng.normal(1.5, 0.9, count)), 1, most).astype(int)
    return prompts, [
        fg.SamplingParams(temperature=0.0, max_tokens=int(n), ignore_eos=True) for n in lengths
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"cache": HALF},
        {"cache": DISK, "weights": DISK, "hidden": HOST},
        {"cache": HOST, "attention_sparsity": 0.3},
        {"cache": HOST, "cache_bits": 4, "num_stages": 2},
    ],
    ids=str,
)
def test_newcomers_join_while_the_others_attend(changes, offload):
    """Those who come into free rows, and batches that begin anew."""
    prompts, params = job(30)
    shape = {"device_batch_size": 3, "num_device_batches": 3, "host_attention": True}
    found = []
    for order, refill in (("zigzag", False), ("zigzag", True), *((s, True) for s in ORDERS)):
        policy = fg.Policy(**{**shape, **changes, "refill": refill})
        with fg.LLM(
            str(GOLDENS / VARIANT), policy=policy, schedule=order, offload_dir=offload, slots=SLOTS
        ) as llm:
            found.append([list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)])
    assert found == found[:1] * len(found)


@pytest.mark.parametrize("part", ["decode_qkv", "attend_cached", "decode_rest"])
def test_what_fails_in_a_part_ends_the_run_with_one_error(part, generate, monkeypatch):
    calls, real = itertools.count(), getattr(kernels, part)

    def failing(*arguments, **options):
        if next(calls) == 4:
            raise OSError(5, "it is gone")
        return real(*arguments, **options)

    failing._cache_size = real._cache_size  # programs are counted by it
    monkeypatch.setattr(kernels, part, failing)
    op = {"decode_qkv": "Project", "attend_cached": "Attend", "decode_rest": "Compute"}[part]
    with pytest.raises(fg.ExecutionError, match=rf"{op}\(step=.*it is gone"):
        generate(ahead, cache=HOST, host_attention=True)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("flexgen")]
