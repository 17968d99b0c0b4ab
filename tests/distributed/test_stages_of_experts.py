"""Stages of a model with experts in two processes: the tokens of one process."""

from __future__ import annotations

import json
import shutil

import pytest

import flexgen_jax as fg
from flexgen_jax.models.params import unit_experts
from flexgen_jax.planning.stage_layout import layers_of, stored_names
from flexgen_jax.weights.checkpoint import convert, open_store
from tests.distributed.test_processes import ROOT, Pipeline
from tests.test_families import EXPECTED, GOLDENS

WORKER = """
import json
import sys
import jax

index, address, stages, path = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_num_cpu_devices", -(-stages // 2))
from flexgen_jax.distributed.processes import initialize
from flexgen_jax.machine.kept_programs import keep_programs
import flexgen_jax as fg
from tests.test_families import DISK, MIXED, NEW, PROMPTS

keep_programs()
initialize(address, 2, index, timeout=20)
policy = fg.Policy(
    device_batch_size=4, num_device_batches=2, num_stages=stages, weights=MIXED, experts=DISK,
    cache=MIXED,
)
params = fg.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
with fg.LLM(path, policy=policy, schedule=sys.argv[5], dtype="float32") as llm:
    if llm.leads:
        print(json.dumps([o.outputs[0].token_ids for o in llm.generate(PROMPTS, params)]))
    else:
        llm.follow()
"""


def only_of(store, target, layers):
    """A copy of a store that has ``layers`` only, their experts with them."""
    stored = open_store(store)
    needed = stored_names(stored.config, stored.format, layers)
    shutil.copytree(store, target)
    dropped = [p for p in target.iterdir() if p.is_dir() and p.name not in needed]
    assert any("_experts_" in path.name for path in dropped)
    for path in dropped:
        shutil.rmtree(path)
    return target


@pytest.mark.parametrize(
    ("variant", "stages", "schedule"), [("gpt_oss", 2, "zigzag"), ("qwen3_moe", 3, "diagonal")]
)
def test_two_processes_give_what_transformers_gives(tmp_path, variant, stages, schedule):
    """Each has the weights of its own layers only, and loads from disk the experts chosen there."""
    store = convert(GOLDENS / variant, tmp_path / "store", dtype="float32")
    config = fg.load_config(store)
    layers = layers_of(config, stages)
    first = -(-stages // 2)  # stages of process 0
    parts = [layers[:first], layers[first:]]
    copies = [
        only_of(store, tmp_path / f"{index}", [layer for some in part for layer in some])
        for index, part in enumerate(parts)
    ]
    experts = set(unit_experts(config))
    assert all(any(experts & set(some) for some in part) for part in parts)

    def arguments(index, address):
        return ["-c", WORKER, str(index), address, str(stages), str(copies[index]), schedule]

    with Pipeline(arguments, cwd=ROOT) as pipeline:
        (code, output, errors), (following, _, complaint) = pipeline.ends()
    assert code == 0, errors
    assert following == 0, complaint
    assert json.loads(output.splitlines()[-1]) == EXPECTED["variants"][variant]["tokens"]
