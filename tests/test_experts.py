"""Models with experts through the whole engine: the tokens of transformers, however it is run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flexgen_jax as fg
from flexgen_jax.engine import routing
from flexgen_jax.weights.checkpoint import convert
from scheduling import Link, LoadChosen, LoadWeights, zigzag
from tests.test_families import (
    DISK,
    EXPECTED,
    GOLDENS,
    HOST,
    MIXED,
    NEW,
    PROMPTS,
    SPARSE,
    equal_bits,
)
from tests.weights.test_experts import CASES, quantised

SHAPE = {"device_batch_size": 4, "num_device_batches": 2, "refill": False}


@pytest.fixture(scope="module")
def store_of(tmp_path_factory):
    made = {}

    def store(variant, **options):
        key = variant, *options.items()
        if key not in made:
            target = tmp_path_factory.mktemp("stores") / variant
            made[key] = convert(GOLDENS / variant, target, dtype="float32", **options)
        return made[key]

    return store


def run(store, prompts=PROMPTS, schedule="zigzag", max_tokens=NEW, **policy):
    """Tokens, the logits of every step, and the report."""
    found = {}

    def keep(step, batch, logits):
        found[batch, step] = np.asarray(logits)

    params = fg.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    policy = fg.Policy(**{**SHAPE, **policy})
    with fg.LLM(str(store), policy=policy, schedule=schedule, dtype="float32") as llm:
        outputs = llm.generate(prompts, params, on_logits=keep)
        return [list(o.outputs[0].token_ids) for o in outputs], found, llm.report


@pytest.mark.parametrize("variant", SPARSE)
def test_the_tokens_of_transformers(variant, store_of):
    tokens, bits, _ = run(store_of(variant))
    assert tokens == EXPECTED["variants"][variant]["tokens"]
    again, same, _ = run(store_of(variant), weights=DISK, cache=MIXED, hidden=DISK)
    assert again == tokens
    equal_bits(same, bits)
    # From the checkpoint where it lies.
    there = GOLDENS / variant
    again, _, _ = run(there, weights=DISK, experts=HOST, cache=HOST, host_attention=True)
    assert again == tokens


@pytest.mark.parametrize("variant", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    ("schedule", "policy"),
    [
        ("row_by_row", {"weights": DISK}),
        ("diagonal", {"weights": MIXED, "experts": DISK}),
        ("zigzag", {"weights": HOST, "experts": DISK, "overlap": False}),
        ("zigzag", {"weights": DISK, "num_stages": 2, "hidden": HOST}),
    ],
    ids=["row_by_row", "diagonal", "serial", "stages"],
)
def test_the_same_bits_in_any_order(variant, schedule, policy, store_of):
    """Also where other batches, and other numbers of them, go through the experts together."""
    tokens, bits, _ = run(store_of(variant))
    again, same, _ = run(store_of(variant), schedule=schedule, **policy)
    assert again == tokens
    equal_bits(same, bits)


def test_the_policys_block_decides_the_tiles_of_decode_steps(store_of, monkeypatch):
    """Not what a schedule puts together, nor what is left of a block: the bits stay the same."""
    taken = set()
    dealt = routing.tiles

    def noted(chosen, gates, *, tile, **more):
        taken.add(tile)
        return dealt(chosen, gates, tile=tile, **more)

    monkeypatch.setattr(routing, "tiles", noted)
    shape = {"device_batch_size": 32, "num_device_batches": 4, "max_tokens": 3}
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(100)]
    tokens, bits, _ = run(store_of("qwen3_moe"), prompts, **shape)
    assert taken == {64, 128}  # 128 rows of three choices among eight experts; and prompts
    again, same, _ = run(store_of("qwen3_moe"), prompts, "row_by_row", weights=DISK, **shape)
    assert taken == {64, 128}
    assert again == tokens
    equal_bits(same, bits)


splits = st.sampled_from([DISK, HOST, MIXED, fg.Split(device=60, host=0, disk=40)])


@given(
    weights=splits,
    experts=st.none() | splits,
    schedule=st.sampled_from(["zigzag", "row_by_row", "diagonal"]),
    overlap=st.booleans(),
)
@settings(max_examples=8)
def test_any_placement_gives_the_same_bits(store_of, weights, experts, schedule, overlap):
    prompts = PROMPTS[:6]
    shape = {"device_batch_size": 2, "num_device_batches": 3, "max_tokens": 4}
    tokens, bits, _ = run(store_of("olmoe"), prompts, **shape)
    placed = {"weights": weights, "experts": experts, "overlap": overlap}
    again, same, _ = run(store_of("olmoe"), prompts, schedule, **shape, **placed)
    assert again == tokens
    equal_bits(same, bits)


def load_all(workload):
    """Zig-zag that loads experts whether they were chosen or not."""
    for op in zigzag(workload):
        yield LoadWeights(op.step, op.layer) if isinstance(op, LoadChosen) else op


def test_what_nobody_chose_is_not_loaded_and_changes_nothing(store_of):
    """One row, which chooses two experts of eight a layer."""
    shape = {"device_batch_size": 1, "num_device_batches": 1, "weights": DISK}
    prompts = [[5]]
    all_of_them, bits, whole = run(store_of("qwen3_moe"), prompts, load_all, **shape)
    chosen, same, part = run(store_of("qwen3_moe"), prompts, **shape)
    assert chosen == all_of_them
    equal_bits(same, bits)
    assert part.disk_bytes < 0.8 * whole.disk_bytes
    # As planned for tokens that choose at random.
    assert part.disk_bytes == pytest.approx(part.moved[Link.DISK_TO_HOST], rel=0.15)


@pytest.mark.parametrize("variant", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("schedule", ["zigzag", "diagonal"])
def test_newcomers_choose_among_the_others(variant, schedule, store_of):
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(14)]
    params = [
        fg.SamplingParams(temperature=0.0, max_tokens=1 + 5 * i % NEW, ignore_eos=True)
        for i in range(14)
    ]
    shape = {"device_batch_size": 2, "num_device_batches": 2, "weights": DISK, "cache": MIXED}
    with fg.LLM(store_of(variant), policy=fg.Policy(**shape), schedule=schedule) as llm:
        outputs = llm.generate(prompts, params)
    expected = EXPECTED["variants"][variant]["tokens"]
    for i, (output, asked) in enumerate(zip(outputs, params, strict=True)):
        tokens = list(output.outputs[0].token_ids)
        assert tokens == expected[i % len(PROMPTS)][: asked.max_tokens]


def test_experts_in_codes(store_of):
    store = store_of("qwen3_moe", weight_bits=4)
    tokens, bits, _ = run(store)
    again, same, _ = run(store, weights=DISK, experts=MIXED, schedule="row_by_row")
    assert again == tokens
    equal_bits(same, bits)


def test_experts_have_a_split_of_their_own(store_of):
    _, _, report = run(store_of("mixtral"), max_tokens=1, weights=HOST, experts=DISK)
    for cell in report.placement["weights"].cells:
        assert cell.tier.value == ("disk" if "_experts_" in cell.name else "host")


@pytest.mark.parametrize("tile", [1, 3, 16])
def test_tiles_have_each_token_once_for_each_expert_that_it_chose(tile):
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((50, 8)), axis=1)[:, :3].astype(np.int32)
    chosen[rng.random(50) < 0.3] = -1
    gates = rng.random((50, 3)).astype(np.float32)
    dealt = routing.tiles(chosen, gates, experts=8, tile=tile, capacity=64)
    found = {}
    for expert in range(8):
        rows = dealt.rows[dealt.bounds[expert] : dealt.bounds[expert + 1]].reshape(-1)
        weights = dealt.gates[dealt.bounds[expert] : dealt.bounds[expert + 1]].reshape(-1)
        for row, gate in zip(rows, weights, strict=True):
            if row < 64:
                found[int(row), expert] = gate
        assert np.all(np.diff(rows[rows < 64]) > 0)
    wanted = {
        (token, int(expert)): gates[token, place]
        for token in range(50)
        for place, expert in enumerate(chosen[token])
        if expert >= 0
    }
    assert found == wanted


@pytest.mark.parametrize("case", CASES)
def test_experts_as_published_in_codes(case, tmp_path):
    """In place, from every tier: the tokens of what the codes stand for, and equal bits."""
    variant, said, encode = CASES[case]
    dense, coded = quantised(variant, tmp_path, said, encode)
    expected, _, _ = run(dense)
    tokens, bits, _ = run(coded)
    # FP8's floats stand for their codes as rounded to bfloat16.
    assert [t[0] for t in tokens] == [t[0] for t in expected]
    again, same, _ = run(coded, schedule="row_by_row", weights=DISK, experts=MIXED, hidden=DISK)
    assert again == tokens
    equal_bits(same, bits)
