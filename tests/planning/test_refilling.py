"""Playing a rolling block with lengths gives what the engine does with tokens."""

import dataclasses
import json
import sys
import threading
from pathlib import Path

import pytest

import flexgen_jax as fg
from flexgen_jax.engine.block_cells import BlockCell
from flexgen_jax.planning.blocks import fit_into_less, padded_length, rows_for
from flexgen_jax.planning.capacities import capacity_for, next_capacity
from flexgen_jax.planning.refilling import IdealRefill, Life, ideal_passes, play
from tests.engine.test_refill import VARIANT, job

GOLDENS = Path(__file__).parents[1] / "goldens"
DEMO = str(Path(fg.__file__).parent / "demo_model")
EXPECTED = json.loads((GOLDENS / "expected.json").read_text())


@pytest.mark.parametrize(
    ("lengths", "rows", "passes"),
    [([], 4, 0), ([3], 4, 3), ([5, 1, 1, 1, 1], 2, 5), ([2, 2, 2], 2, 4), ([1] * 9, 4, 3)],
)
def test_ideal_refill_takes_so_many_passes(lengths, rows, passes):
    assert ideal_passes(lengths, rows) == passes


def test_lengths_may_be_known_in_any_order():
    lengths = [7, 2, 9, 4, 4, 1, 3]
    ideal = IdealRefill(3)
    for key in range(len(lengths)):
        ideal.comes(key)
        ideal.comes(key)  # who had to make way comes again
    for key in (3, 6, 0, 2, 1, 5, 4):
        ideal.has(key, Life(0, lengths[key]))
    assert ideal.passes == ideal_passes(lengths, 3)
    assert [life.num_tokens for life in ideal.lives] == lengths


def test_one_thread_may_tell_who_comes_while_another_tells_of_lengths():
    ideal, lengths = IdealRefill(3), [1 + number % 7 for number in range(20_000)]
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        coming = threading.Thread(target=lambda: [ideal.comes(key) for key in range(len(lengths))])
        coming.start()
        for key, length in enumerate(lengths):
            ideal.has(key, Life(0, length))
        coming.join()
    finally:
        sys.setswitchinterval(often)
    ideal.comes("last")
    ideal.has("last", Life(0, 1))
    assert ideal.passes == ideal_passes([*lengths, 1], 3)


def test_a_play_uses_each_token_once_and_all_passes():
    lives = [Life(16, 1 + 7 * i % 23) for i in range(50)]
    played = play(lives, device_batch_size=4, num_device_batches=3)
    assert played.rows_used == sum(life.num_tokens for life in lives)
    assert played.occupancy > 0.8
    assert played.passes == ideal_passes([life.num_tokens for life in lives], 12)
    assert [len(run) for run in played.runs] == sorted(map(len, played.runs), reverse=True)
    without = play(lives, device_batch_size=4, num_device_batches=3, refill=False)
    assert without.rows_used == played.rows_used
    assert without.occupancy < 0.7 * played.occupancy


@pytest.mark.parametrize("shape", [(4, 3), (2, 4), (8, 1), (1, 5)])
def test_the_engine_does_what_was_played(shape, tmp_path):
    prompts, params = job(40, seed=sum(shape))
    size = dict(zip(("device_batch_size", "num_device_batches"), shape, strict=True))
    with fg.LLM(str(GOLDENS / VARIANT), policy=fg.Policy(**size), offload_dir=str(tmp_path)) as llm:
        llm.generate(prompts, params)
        report = llm.report
        (block,) = llm.planner.blocks(
            [llm.request(i, *pair) for i, pair in enumerate(zip(prompts, params, strict=True))]
        )
        runs = llm.planner.runs(block)
    lives = [Life(padded_length(len(r.token_ids)), r.params.max_tokens) for r in block.requests]
    played = play(lives, **size)
    found = report.passes, report.rows_computed, report.rows_used
    assert found == (played.passes, played.rows_computed, played.rows_used)
    # The predicted timeline computes the same cells as the measured one. (Whether a batch goes on
    # is found out in its first layer.)
    computed = [
        sorted((s.step, s.layer, s.batch) for s in timeline.spans if s.op == "Compute" and s.layer)
        for timeline in (report.timeline, report.predicted)
    ]
    assert computed[0] == computed[1]
    assert sum(w.num_steps - bool(w.done) for w in runs) == report.passes
    joined = sum(
        rows * positions for w in runs for b in w.sizes.batches for _, rows, positions in b.joined
    )
    begun = sum(
        b.rows * positions for w in runs for b in w.sizes.batches for _, positions in b.begun
    )
    first = sum(b.rows * b.prompt_len for b in runs[0].sizes.batches)
    assert joined + begun + first == report.padded_tokens


def test_capacities_are_few_and_last():
    assert [capacity_for(n, 1000) for n in (1, 32, 33, 65, 97, 129, 200, 257, 400, 999)] == [
        *(32, 32, 64, 96, 128, 192, 256, 384, 512, 1000)
    ]
    assert next_capacity(64, 65, 1000) == 96
    assert next_capacity(96, 60, 1000) == 96  # it would soon be too small
    assert next_capacity(96, 30, 1000) == 64
    assert next_capacity(96, 90, 80) == 80


def test_cells_grow_and_shrink_as_was_played(tmp_path, monkeypatch):
    """A long row among short ones; then short ones alone."""
    ends = [3] * 30
    ends[1] = 70
    prompts = [[5 + i, 6] for i in range(len(ends))]
    params = [fg.SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in ends]
    seen = []
    add = BlockCell.add

    def adding(self, kept):
        if kept.capacity is not None and self.name == "cache.layer_0.batch_0":
            seen.append(kept.capacity)
        add(self, kept)

    monkeypatch.setattr(BlockCell, "add", adding)
    policy = fg.Policy(device_batch_size=2, num_device_batches=1)
    with fg.LLM(DEMO, policy=policy, offload_dir=str(tmp_path)) as llm:
        found = llm.generate(prompts, params)
        llm.policy = dataclasses.replace(policy, refill=False)
        assert found == llm.generate(prompts, params)
    lives = [Life(16, n) for n in sorted(ends, reverse=True)]
    (run,) = play(lives, device_batch_size=2, num_device_batches=1).runs
    assert [capacity for _, capacity in run[0].resized] == seen == [32, 64, 96, 64]


@pytest.mark.parametrize(
    ("live", "rows", "left"),
    [(16, 16, 16), (5, 16, 16), (4, 16, 4), (1, 16, 1), (1, 6, 1), (3, 64, 4)],
)
def test_the_last_batch_shrinks_to_few_numbers_of_rows(live, rows, left):
    assert rows_for(live, rows) == left
    assert fit_into_less(live, 1, rows) == (left < rows)
    assert fit_into_less(live, 2, rows)
    assert not fit_into_less(0, 2, rows)


def test_who_is_left_alone_drags_few_empty_rows_along(tmp_path):
    ends = [2] * 16 + [20]
    prompts = [[5 + i, 6] for i in range(len(ends))]
    params = [fg.SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in ends]
    size = {"device_batch_size": 8, "num_device_batches": 2}
    with fg.LLM(str(GOLDENS / VARIANT), policy=fg.Policy(**size), offload_dir=str(tmp_path)) as llm:
        outputs, report = llm.generate(prompts, params), llm.report
        llm.policy = dataclasses.replace(llm.policy, refill=False)
        assert outputs == llm.generate(prompts, params)
    played = play([Life(16, n) for n in sorted(ends, reverse=True)], **size)
    # Two passes of 16 rows, two of those and the last one to come, and 2 rows from then on.
    assert report.rows_computed == played.rows_computed <= 2 * 16 + 2 * 16 + 16 * 2
    assert report.passes == played.passes == 20
