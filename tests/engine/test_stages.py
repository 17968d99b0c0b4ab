"""One model over the devices of a host: the same tokens, each layer where it belongs."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import flexgen_jax as fg
from flexgen_jax.engine.pipeline import fullest
from flexgen_jax.models.opt import OPTConfig
from flexgen_jax.models.params import unit_names
from flexgen_jax.planning.stage_layout import layers_of, stage_starts
from scheduling import peak_nbytes
from scheduling.dependencies import Stream
from storage.wrappers import Logged

DEMO = Path("flexgen_jax/demo_model")
MIXED = fg.Split(device=34, host=33, disk=33)
DISK = fg.Split(device=0, disk=100)
PARAMS = [
    fg.SamplingParams(max_tokens=9, temperature=0.0),
    fg.SamplingParams(max_tokens=3, temperature=1.0, n=2),
    fg.SamplingParams(max_tokens=12, temperature=0.8, logprobs=2, prompt_logprobs=1),
    fg.SamplingParams(max_tokens=12, temperature=0.0, stop=["e"]),
    fg.SamplingParams(
        max_tokens=9,
        temperature=0.7,
        frequency_penalty=1.0,
        structured_outputs={"regex": "[a-z ]{6,20}"},
    ),
]
PROMPTS = ["Once upon a time", "The", "A little dog ran into the garden and", "Then", "He"]


def policy(stages=1, **changes):
    # Refill puts rows together when stages and groups come to it: the last bits are those of other
    # company. tests/engine/test_refill.py has stages with it.
    fields = {"device_batch_size": 2, "num_device_batches": 3, "refill": False}
    fields["num_stages"] = stages
    return fg.Policy(**fields | changes)


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


def generate(offload, chosen, params=None, **options):
    params = params or PARAMS
    with fg.LLM(str(DEMO), policy=chosen, offload_dir=offload, **options) as llm:
        return llm.generate(PROMPTS, params), llm.report


@pytest.fixture(scope="module")
def alone(offload):
    """What one device gives: sampled, stopped early, scored, several completions of a prompt."""
    return generate(offload, policy())[0]


@pytest.mark.parametrize(
    ("stages", "schedule"),
    [*((3, name) for name in sorted(fg.SCHEDULES)), (2, "zigzag"), (4, "zigzag"), (4, "diagonal")],
)
def test_the_same_outputs_as_one_device(offload, alone, stages, schedule):
    chosen = policy(stages, weights=MIXED, cache=MIXED, hidden=MIXED)
    outputs, report = generate(offload, chosen, schedule=schedule)
    assert outputs == alone
    assert report.timeline.num_stages == stages
    assert {s.stage for s in report.timeline.spans if s.op == "Compute"} == set(range(stages))
    assert report.predicted.num_stages == stages


@pytest.mark.parametrize(
    "changes",
    [
        {"cache": fg.Split(device=0, host=100), "host_attention": True},
        {"weights": MIXED, "weight_bits": 4, "cache": MIXED, "cache_bits": 4},
        {"cache": MIXED, "attention_sparsity": 0.5},
        {"weights": DISK, "cache": DISK, "hidden": DISK, "overlap": False},
        {"num_groups": 1},
        {"num_groups": 3, "weights": DISK},
    ],
    ids=["host attention", "codes", "sparse", "no overlap", "one group", "three groups"],
)
def test_with_every_method(offload, changes):
    one, _ = generate(offload, policy(1, **changes))
    assert generate(offload, policy(3, **changes))[0] == one


def test_a_layer_lies_and_is_computed_on_the_device_of_its_stage(offload, tmp_path):
    config = OPTConfig.load(DEMO / "config.json")
    store = str(fg.convert(str(DEMO), tmp_path / "store"))
    with fg.LLM(store, policy=policy(3, cache=MIXED), offload_dir=offload) as llm:
        form = llm.planner.model.form(llm.policy)
        stages = [llm.runner._stages[number] for number in range(3)]
        assert [stage.device for stage in stages] == jax.local_devices()[:3]
        for stage, layers in zip(stages, layers_of(config, 3), strict=True):
            for layer in layers:
                arrays = jax.tree.leaves(stage.weights.resident(layer))
                assert {a.device for a in arrays} == {stage.device}
            names = {n for i in layers for n in unit_names(config, config.units[i])}
            needed = {form.array_name(config, name) for name in names}
            assert {cell.name for cell in stage.weights.placement.cells} == needed
        llm.generate(PROMPTS)
        table = [c for c in llm.placement.cells if c.name == "embed.tokens"]
        assert len(table) == 2  # the head is tied to it: the first stage's, and the last's


def test_stages_are_balanced_by_cost():
    small, large = OPTConfig.preset("facebook/opt-125m"), OPTConfig.preset("facebook/opt-175b")
    sizes = [len(layers) for layers in layers_of(large, 4)]
    assert sizes == [25, 24, 24, 25]  # embedding and head cost little beside a layer
    # The head of a small model costs as much as one and a half of its layers.
    assert [len(layers) for layers in layers_of(small, 4)] == [4, 3, 4, 3]
    with pytest.raises(ValueError, match=r"num_stages must lie in 1\.\.14.*got 15"):
        stage_starts(small, 15)


def test_hidden_states_go_from_device_to_device(offload):
    moved = []

    def wrap(tier, store):
        return Logged(store, lambda verb, name, nbytes: moved.append((tier, verb, name)))

    _, report = generate(offload, policy(2, hidden=DISK), wrap_store=wrap)
    hidden = {(tier, verb) for tier, verb, name in moved if name.startswith("hidden")}
    assert {tier for tier, _ in hidden} == {fg.Tier.DISK}
    _, report = generate(offload, policy(2))
    spans = [s for s in report.timeline.spans if s.stream == Stream.HAND_OVER.value]
    steps = 12 * 3  # of three batches: a hidden state from the first stage, tokens from the last
    assert {s.op for s in spans} == {"StoreHidden"}
    assert 0 < len(spans) <= 2 * steps
    assert {s.stage for s in spans} == {0, 1}


def test_too_few_devices_is_said_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"num_stages 5 needs 5 devices, and JAX finds 4 \(cpu\)"):
        fg.LLM(str(tmp_path / "nothing"), policy=policy(5), offload_dir=str(tmp_path))


def test_more_stages_than_layers_are_refused_by_number(tmp_path, monkeypatch):
    device = jax.local_devices()[0]
    monkeypatch.setattr(
        "flexgen_jax.distributed.process_runner.stage_devices", lambda count: [device] * count
    )
    for options in ({"policy": policy(99)}, {"fixed": {"num_stages": 99}}):
        with pytest.raises(ValueError, match=r"num_stages must lie in 1\..*got 99"):
            fg.LLM(str(DEMO), offload_dir=str(tmp_path), **options)


def test_what_is_in_place_stays(offload):
    with fg.LLM(str(DEMO), policy=policy(2), offload_dir=offload) as llm:
        with pytest.raises(ValueError, match="in place already"):
            llm.policy = policy(1)
        llm.policy = policy(2, num_device_batches=1)
        assert len(llm.generate(PROMPTS)) == len(PROMPTS)


def test_auto_chooses_for_the_stages(offload):
    outputs, report = generate(offload, "auto", fixed={"num_stages": 2}, device_memory="600MB")
    assert report.policy.num_stages == 2
    assert len(outputs) == len(PROMPTS)


def test_what_a_run_holds_is_as_planned(offload):
    params = fg.SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    chosen = policy(2, weights=MIXED, cache=MIXED)
    disk = fg.DiskContext(mode="direct", small_nbytes=0)
    with fg.LLM(str(DEMO), policy=chosen, offload_dir=offload, disk=disk) as llm:
        llm.generate(PROMPTS, params)
        requests = [llm.request(i, p, params) for i, p in enumerate(PROMPTS)]
        (block,) = llm.planner.blocks(requests)
        workload = llm.planner.workload(block)
        peak = peak_nbytes(fg.SCHEDULES["zigzag"](workload), workload, shared=True)
        for tier in fg.Tier:
            planned = max(phase[tier] for phase in peak.values())
            assert llm.report.peak_bytes[tier] <= planned * 1.02 + 4096 * 64
            if planned > 100_000:
                assert llm.report.peak_bytes[tier] >= 0.7 * planned


def test_the_fullest_device():
    held = [{fg.Tier.DEVICE: 3, fg.Tier.HOST: 1}, {fg.Tier.DEVICE: 5, fg.Tier.HOST: 2}]
    assert fullest(held, shared=True) == {fg.Tier.DEVICE: 8, fg.Tier.HOST: 3, fg.Tier.DISK: 0}
    assert fullest(held, shared=False) == {fg.Tier.DEVICE: 5, fg.Tier.HOST: 3, fg.Tier.DISK: 0}


def test_the_report_has_the_stages(offload):
    _, report = generate(offload, policy(2, weights=DISK))
    found = json.loads(json.dumps(report.to_json()))
    assert found["policy"]["num_stages"] == 2
    assert "stage 1: compute" in found["streams"]
    assert found["moved_bytes"]["stage to stage"] > 0
    assert len(found["stages"]) == 2
    assert all(0 < stage["busy"] <= 1 for stage in found["stages"])
    assert found["predicted"]["stage 1: compute"]["predicted_seconds"] > 0


def test_logits_are_bit_equal(offload):
    def logits(stages):
        found = {}
        with fg.LLM(str(DEMO), policy=policy(stages, weights=MIXED), offload_dir=offload) as llm:
            llm.generate(
                PROMPTS,
                fg.SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True),
                on_logits=lambda step, batch, x: found.update({(step, batch): np.asarray(x)}),
            )
        return found

    one = logits(1)
    for stages in (2, 4):
        many = logits(stages)
        assert many.keys() == one.keys()
        assert all(np.array_equal(many[place], one[place]) for place in one)


def test_policies_with_stages_go_to_json_and_back():
    chosen = policy(4, num_groups=8)
    assert fg.Policy.from_json(chosen.to_json()) == chosen
    assert policy(4).groups == 4  # all on the devices: as many as batches, but one a stage at least
    assert policy(4, num_device_batches=6).groups == 6
    assert policy(4, num_device_batches=6, weights=DISK).groups == 4
    assert policy(1, num_device_batches=6).groups == 1
    with pytest.raises(ValueError, match="num_groups must be an integer of at least 1"):
        dataclasses.replace(chosen, num_groups=0)
