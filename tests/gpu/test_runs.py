"""Whole runs beside an accelerator: wherever things lie, the tokens are those of all on the device.

Most need a GPU: on a CPU the same is asked in tests/test_llm.py, tests/engine and elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import flexgen_jax as fg
from flexgen_jax.weights.checkpoint import convert

pytestmark = pytest.mark.gpu

GOLDENS = Path(__file__).parents[1] / "goldens"
DENSE, SPARSE = GOLDENS / "pre_norm", GOLDENS / "families" / "mixtral"
HOST, DISK = fg.Split(device=0, host=100), fg.Split(device=0, disk=100)
MIXED = fg.Split(device=30, host=30, disk=40)


@pytest.fixture(scope="module")
def alone(generate):
    """Tokens with everything on the device, made once for each way to compute."""
    made = {}

    def tokens(model, **policy):
        key = (model, *sorted(policy.items()))
        if key not in made:
            made[key] = generate(model, policy=policy)[0]
        return made[key]

    return tokens


def test_attention_on_the_host(generate, alone):
    """The same greedy tokens: attention to the cache is computed by a CPU."""
    tokens, report = generate(DENSE, policy={"cache": HOST, "host_attention": True})
    assert tokens == alone(DENSE)
    assert report.placement["cache"].percent(fg.Tier.HOST) == 100


PLACED = {
    "weights in host memory": {"weights": HOST},
    "cache in host memory": {"cache": HOST},
    "hidden states in host memory": {"hidden": HOST},
    "all in host memory, no overlap": {
        "weights": HOST,
        "cache": HOST,
        "hidden": HOST,
        "overlap": False,
    },
    "all on disk": {"weights": DISK, "cache": DISK, "hidden": DISK},
    "some everywhere": {"weights": MIXED, "cache": MIXED, "hidden": MIXED},
    "some everywhere, attention on the host": {"cache": MIXED, "host_attention": True},
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("placed", PLACED)
def test_equal_tokens_from_every_tier(placed, generate, alone):
    assert generate(DENSE, policy=PLACED[placed])[0] == alone(DENSE)


WAYS = {
    "4-bit weights": {"weight_bits": 4},
    "8-bit weights": {"weight_bits": 8},
    "4-bit cache": {"cache_bits": 4},
    "sparse attention": {"attention_sparsity": 0.4},
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("way", WAYS)
def test_codes_and_selections_from_host_memory(way, generate, alone):
    there = {**WAYS[way], "weights": HOST, "cache": HOST}
    assert generate(DENSE, policy=there)[0] == alone(DENSE, **WAYS[way])


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("schedule", ["zigzag", "diagonal", "cgopipe"])
def test_experts(schedule, generate, alone, tmp_path_factory):
    there = {"experts": HOST, "cache": HOST}
    assert generate(SPARSE, policy=there, schedule=schedule)[0] == alone(SPARSE)


@pytest.mark.usefixtures("gpu")
def test_four_bit_experts(generate, tmp_path):
    store = convert(SPARSE, tmp_path / "store", dtype="float32", weight_bits=4)
    whole, _ = generate(store, policy={"weight_bits": 4})
    there, _ = generate(store, policy={"weight_bits": 4, "experts": DISK, "weights": HOST})
    assert there == whole


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "placed",
    [{}, {"cache": HOST}, {"cache": HOST, "host_attention": True}, {"cache": MIXED}],
    ids=str,
)
def test_newcomers_take_the_rows_of_the_finished(placed, generate):
    """Caches are rings; in pinned memory they are renewed piece by piece."""
    rng = np.random.default_rng(1)
    prompts = [[int(t) for t in rng.integers(4, 60, n)] for n in rng.integers(1, 20, 24)]
    params = [
        fg.SamplingParams(temperature=0.0, max_tokens=int(n), ignore_eos=True)
        for n in rng.integers(1, 16, 24)
    ]
    about = {"prompts": prompts, "params": params}
    blocks, _ = generate(DENSE, policy={"refill": False}, **about)
    refilled, report = generate(DENSE, policy=placed, **about)
    assert refilled == blocks
    assert report.blocks == 1


@pytest.mark.usefixtures("gpu")
def test_the_bundled_model_in_bfloat16_and_a_policy_of_autos(tmp_path):
    """Flash attention where the device has it; a policy for this machine's memory."""
    params = fg.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    found = []
    demo = str(Path(fg.__file__).parent / "demo_model")
    for policy in ("auto", fg.Policy(device_batch_size=2, num_device_batches=1, weights=HOST)):
        with fg.LLM(demo, policy=policy, dtype="bfloat16", offload_dir=str(tmp_path)) as llm:
            outputs = llm.generate(["The king", "Once more unto the"], params)
            found.append([o.outputs[0].token_ids for o in outputs])
    assert all(len(tokens) == 8 for tokens in (*found[0], *found[1]))
