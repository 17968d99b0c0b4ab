"""What is reckoned once for all that is alike comes out as if each were reckoned by itself."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import pytest

import flexgen_jax as fg
from flexgen_jax.models.params import loaded_names, param_shapes
from flexgen_jax.models.registry import preset
from flexgen_jax.planning.auto import Model, Uniform
from flexgen_jax.planning.memory_need import _peak
from flexgen_jax.planning.planner import Planner
from flexgen_jax.planning.stage_layout import place_stages
from scheduling.alike import Kinds, alike
from scheduling.cost_model import CostModel
from scheduling.few_layers import few_layers
from scheduling.ops import (
    Barrier,
    Compute,
    ComputeExperts,
    FreeWeights,
    LoadCache,
    LoadChosen,
    LoadWeights,
    StoreCache,
)
from scheduling.peak import peak_nbytes
from scheduling.policy import Tier
from scheduling.sizes import Link

MIXED = fg.Split(device=20, host=30, disk=50)
DENSE, SPARSE = "facebook/opt-1.3b", "Qwen/Qwen3-30B-A3B"
T4 = fg.Hardware.preset("t4")
CHOICES = [
    (DENSE, {}),
    (DENSE, {"host_attention": True, "weight_bits": 4, "num_stages": 3}),
    (SPARSE, {"device_batch_size": 4, "experts": fg.Split(device=0, host=40, disk=60)}),
    (SPARSE, {"device_batch_size": 64, "cache_bits": 4}),
    ("openai/gpt-oss-20b", {"device_batch_size": 4}),  # every other layer has a window
]


def workload(name, choices, gen_len=4):
    policy = fg.Policy(
        **{"num_device_batches": 3, "weights": MIXED, "cache": MIXED, "hidden": MIXED} | choices
    )
    model = Model(preset(name), "bfloat16")
    planner = Planner(model, policy, "zigzag", fg.SCHEDULES["zigzag"], T4)
    (block,) = planner.blocks(Uniform(64, gen_len).requests(policy.block_size))
    return model, policy, planner.workload(block)


@pytest.mark.parametrize(("name", "choices"), CHOICES)
def test_every_op_costs_what_it_costs_alone(name, choices):
    _, _, w = workload(name, choices)
    together, alone = CostModel(w, T4), CostModel(w, T4)
    seen = 0
    for op in fg.SCHEDULES["zigzag"](w):
        if isinstance(op, (FreeWeights, Barrier)):
            continue
        for unpack in (False, True):
            seen += 1
            assert together.pieces(op, unpack=unpack) == alone._pieces(op, unpack, rest=False)
    assert len(together._known) < seen / 2


@pytest.mark.parametrize(("name", "choices"), CHOICES)
def test_those_that_are_alike_are_all_there_are(name, choices):
    _, _, w = workload(name, choices)
    kinds, counts = Kinds(w), Counter()
    for layer in range(w.num_layers):
        counts[kinds.weights[layer]] += 1
    found = alike(w)
    assert {kinds.weights[n]: many for (n, of), many in found.items() if of is None} == counts
    there = [n for n in range(w.num_layers) if not w.has_experts(n) or w.gives_hidden(n)]
    places = sum(many for (_, of), many in found.items() if of is not None)
    assert places == len(there) * w.num_batches


@pytest.mark.parametrize(("name", "choices"), CHOICES)
def test_loads_are_the_tensors_of_the_layer(name, choices):
    model, policy, w = workload(name, choices)
    config, form = model.config, model.form(policy)
    shapes = param_shapes(config)
    cells = {}
    for stage, placement in enumerate(place_stages(config, form, policy)):
        cells |= {(stage, cell.name): cell for cell in placement.cells}
    resident = defaultdict(int)
    for (stage, _), cell in cells.items():
        resident[stage, cell.tier] += cell.nbytes
    for layer in range(w.num_layers):
        names = loaded_names(config, config.units[layer])
        loads = dict.fromkeys(Tier, 0)
        for stored in form.order(config, names):
            cell = cells[w.stage_of(layer), stored]
            loads[cell.tier] += cell.nbytes
        assert w.sizes.weights[layer] == loads
        assert (w.sizes.reads[layer] > 0) <= (loads[Tier.DISK] > 0)
        dense = sum(2 * math.prod(shapes[n]) for n in names if form.unpacked(config, n))
        assert w.sizes.dense[layer] == dense
    for stage in range(w.num_stages):
        assert w.sizes.resident[stage] == {tier: resident[stage, tier] for tier in Tier}


@pytest.mark.parametrize(("name", "choices"), CHOICES)
def test_the_bound_is_the_sum_over_all_ops(name, choices):
    _, _, w = workload(name, choices)
    costs, total, loads = CostModel(w, T4), Counter(), defaultdict(list)
    batches = tuple(range(w.num_batches))
    for layer in range(w.num_layers):
        if not w.has_experts(layer):
            for resource, seconds in costs.pieces(LoadWeights(0, layer)):
                loads[w.stage_of(layer), resource].append(seconds)
        for step in range(w.num_steps):
            if w.has_experts(layer):
                ops = [LoadChosen(step, layer, batches), ComputeExperts(step, layer, batches)]
            else:
                ops = [Compute(step, layer, b) for b in batches]
                if w.has_cache(layer):
                    ops += [StoreCache(step, layer, b) for b in batches]
                    ops += [LoadCache(step, layer, b) for b in batches if step]
            for op in ops:
                total.update(dict(costs.pieces(op)))
    for (_, resource), each in loads.items():
        spared = sum(sorted(each)[len(each) - w.weight_slots :])
        total[resource] += w.num_steps * sum(each) - (w.num_steps - 1) * spared
    bound = costs.lower_bound()
    assert bound == pytest.approx({name: seconds for name, seconds in total.items() if seconds})


@pytest.mark.parametrize(("name", "choices"), CHOICES)
@pytest.mark.parametrize("order", ["zigzag", "row_by_row", "diagonal", "cgopipe", "neo"])
@pytest.mark.parametrize("gen_len", [1, 9])
def test_the_peak_of_a_few_steps_is_that_of_all(name, choices, order, gen_len):
    _, _, w = workload(name, choices, gen_len)
    schedule = fg.SCHEDULES[order]
    for shared in (False, True):
        assert _peak(schedule, w, shared=shared) == peak_nbytes(schedule(w), w, shared=shared)


@pytest.mark.parametrize(("name", "choices"), CHOICES)
def test_a_few_layers_are_a_part_of_all(name, choices):
    _, _, w = workload(name, choices)
    few = few_layers(w, 6)
    if w.num_stages > 1:
        assert few is w
        return
    assert few.num_layers < w.num_layers
    order = fg.SCHEDULES["zigzag"]
    whole, part = w.sizes.total(order(w)), few.sizes.total(order(few))
    share = 6 / sum(not w.has_experts(n) for n in range(1, w.num_layers - 1))
    for link in (Link.DISK_TO_HOST, Link.HOST_TO_DEVICE):
        # The first and the last layer are there in either.
        edges = sum(w.sizes.moved(LoadWeights(0, n)).get(link, 0) for n in (0, w.num_layers - 1))
        expected = share * whole[link] + w.num_steps * edges
        assert part[link] == pytest.approx(expected, rel=0.25)
    assert few_layers(w, w.num_layers) is w
