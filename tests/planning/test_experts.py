"""Where experts lie, and what their operations are expected to take."""

from __future__ import annotations

from collections import defaultdict

import pytest

import flexgen_jax as fg
from flexgen_jax.models.registry import preset
from flexgen_jax.planning.stage_layout import place_stages
from flexgen_jax.weights.weight_format import WeightFormat
from scheduling.sizes import ExpertSizes

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
