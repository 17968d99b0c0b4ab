"""Where experts lie, and what their operations are expected to take."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.models.registry import family_of, preset
from flexgen_jax.planning.expert_tiles import decode_tile
from flexgen_jax.planning.stage_layout import place_stages
from flexgen_jax.weights.weight_format import WeightFormat
from scheduling.sizes import ExpertSizes

GOLDENS = Path(__file__).parents[1] / "goldens" / "families"
MIXED = fg.Split(device=20, host=30, disk=50)
FORM = WeightFormat.usual("bfloat16", 4, 64)


def test_an_expert_lies_on_one_tier():
    config = preset("Qwen/Qwen3-30B-A3B")
    (placement,) = place_stages(config, FORM, fg.Policy(weights=MIXED))
    tiers = defaultdict(set)
    for cell in placement.cells:
        unit, module, *_ = cell.name.split(".")
        if "_experts_" in unit:
            tiers[unit, module].add(cell.tier)
    assert len(tiers) == 48 * 128
    assert all(len(found) == 1 for found in tiers.values())
    assert placement.percent(fg.Tier.DISK) == pytest.approx(50, abs=1)


def test_experts_of_a_model_that_has_none_are_refused():
    with pytest.raises(ValueError, match="the model has none"):
        place_stages(preset("facebook/opt-125m"), FORM, fg.Policy(experts=MIXED))


@pytest.mark.parametrize("tile", [1, 16, 128])
@pytest.mark.parametrize("tokens", [1, 16, 256, 4096, 10**6])
def test_rows_of_tiles_are_those_of_random_choices(tokens, tile):
    """Between what is wanted, and a whole tile more for each expert that is chosen."""
    sizes = ExpertSizes(units={}, count=128, chosen=8, tiles=(16, 128))
    mean = tokens * 8 / 128
    rows = sizes.rows(tokens, tile)
    assert mean * 0.999 <= rows <= mean + tile
    if tile == 1:
        assert rows == pytest.approx(mean, rel=1e-2, abs=1)


def test_tiles_of_decode_steps_are_at_most_what_chooses_an_expert_on_average():
    sizes = {rows: decode_tile(rows, 8, 128) for rows in (1, 196, 256, 420, 512, 900, 1024, 10**6)}
    assert sizes == {1: 16, 196: 16, 256: 32, 420: 32, 512: 64, 900: 64, 1024: 128, 10**6: 128}


def planned(model, *arguments):
    common = ["--model", GOLDENS / model, "--prompt-len", 8, "--gen-len", 4, "--hardware", "t4"]
    return CliRunner().invoke(main, [str(a) for a in ("plan", *common, *arguments)])


def test_experts_are_placed_on_the_command_line(tmp_path):
    weights, experts = ["--percent", *(100, 0) * 3], ["--experts-percent", 0, 100]
    done = planned("mixtral", *weights, *experts, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["policy"]["experts"] == {"device": 0, "host": 100, "disk": 0}
    placed = found["placement"]
    assert placed["experts"]["host"]["percent"] == 100
    assert placed["weights"]["host"]["nbytes"] == placed["experts"]["host"]["nbytes"]
    assert placed["weights"]["device"]["nbytes"] > 0
    said = planned("mixtral", *weights, *experts).stdout
    assert "of these, experts: host 100.0%" in said
    assert "of these, experts: device 100.0%" in planned("mixtral", *weights).stdout
    # Beside a file, and where all else is searched for.
    (tmp_path / "policy.json").write_text(json.dumps({"weights": {"device": 0, "host": 100}}))
    for others in (["--policy", tmp_path / "policy.json"], ["--num-device-batches", 2]):
        done = planned("mixtral", *others, "--experts-percent", 30, 0, "--json")
        assert done.exit_code == 0, done.output
        policy = json.loads(done.stdout)["policy"]
        assert policy["experts"] == {"device": 30, "host": 0, "disk": 70}


def test_experts_that_cannot_be_placed_so_are_refused():
    done = planned("mixtral", "--experts-percent", 60, 50)
    assert done.exit_code == 2
    assert "experts: 60.0 percent on the device and 50.0 on the host exceed 100" in done.output
    for others in ((), ("--percent", *(100, 0) * 3)):
        done = planned("llama", *others, "--experts-percent", 0, 100)
        assert done.exit_code == 2
        assert "the model has none" in done.output
        assert "--experts-percent" in done.output
    assert "of these" not in planned("llama").stdout


def test_auto_places_experts_apart_at_least_as_well_as_by_hand():
    """On a device that has no room for all of them."""
    machine = dataclasses.replace(fg.Hardware.preset("t4"), device_memory=5e9, host_memory=12e9)
    fixed = {"device_batch_size": 16, "num_device_batches": 4}

    def plan(policy, **options):
        where = {"prompt_len": 64, "gen_len": 16}
        return fg.plan("allenai/OLMoE-1B-7B-0924", policy, machine, **where, **options)

    found = plan("auto", fixed=fixed)
    assert not found.misfits
    assert found.policy.experts is not None
    assert found.policy.weights.device > found.policy.experts.device
    tried = [
        plan(fg.Policy(**fixed, weights=weights, experts=fg.Split(device=share, host=100 - share)))
        for weights in (fg.Split(), fg.Split(device=0, host=100))
        for share in (0, 20, 40, 60)
    ]
    fit = [by_hand.tokens_per_second for by_hand in tried if not by_hand.misfits]
    assert len(fit) > 1
    assert found.tokens_per_second >= max(fit) * (1 - 1e-9)


def test_auto_keeps_what_is_said_of_experts():
    """Of the weights alone: then it holds for experts, too."""
    machine = dataclasses.replace(fg.Hardware.preset("t4"), device_memory=5e9, host_memory=12e9)
    where = {"prompt_len": 64, "gen_len": 16}
    shape = {"device_batch_size": 16, "num_device_batches": 4}
    for said in (
        {"weights": fg.Split(device=0, host=75, disk=25)},
        {"experts": None},
        {"experts": fg.Split(device=70 / 3, host=100 - 70 / 3)},
    ):
        model = "allenai/OLMoE-1B-7B-0924"
        found = fg.plan(model, "auto", machine, **where, fixed={**shape, **said}).policy
        assert {name: getattr(found, name) for name in said} == said
        if "weights" in said:
            assert found.experts is None


def test_a_preset_is_planned_in_the_codes_that_it_is_published_in(tmp_path):
    """gpt-oss has MXFP4 experts: 13.8 GB, which are 41.8 in bfloat16."""
    config = preset("openai/gpt-oss-20b")
    said = {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(family_of(config).write(config) | said))
    policy = fg.Policy(device_batch_size=2, num_device_batches=1)

    def weights(model, **choices):
        chosen = dataclasses.replace(policy, **choices)
        found = fg.plan(model, chosen, "h200", prompt_len=16, gen_len=4)
        return found.placement["weights"].nbytes()

    assert weights("openai/gpt-oss-20b") == weights(tmp_path) == pytest.approx(13.76e9, rel=0.01)
    assert weights(config) == pytest.approx(41.8e9, rel=0.01)
    # Other codes are asked for: of what it was before.
    assert weights("openai/gpt-oss-20b", weight_bits=8) == pytest.approx(22.2e9, rel=0.02)


def test_codes_that_cannot_be_undone_are_not_advised():
    """gpt-oss is published in MXFP4; of another model 4 bits would help here."""
    machine = dataclasses.replace(fg.Hardware.preset("laptop"), device_memory=3e9, host_memory=1e9)
    policy = fg.Policy(
        device_batch_size=4, num_device_batches=1, weights=fg.Split(device=0, disk=100)
    )
    helped = {
        model: fg.plan(
            model, policy, machine, prompt_len=16, gen_len=4, help_wanted=True
        ).would_help
        for model in ("openai/gpt-oss-20b", preset("openai/gpt-oss-20b"))
    }
    coded, plain = helped.values()
    assert plain["4-bit weights"] > 1.3
    assert "4-bit weights" not in coded
    assert "twice the device memory" in coded
