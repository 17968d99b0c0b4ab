"""Predicts pipelines of T4s: the paper's four, and one to 64 of them; prints JSON lines.

Every stage is a machine of its own, as in the paper (table 3), 512 prompt and 32 new tokens.

    python benchmarks/stages.py --out stages.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import flexgen_jax as fg
from scheduling.cost_model import bound

# Model, six numbers, batch x batches, choices, measured tokens/s: the policies are those of the
# scripts in FlexGen's repository for four machines.
PAPER: list[tuple[str, tuple[float, ...], tuple[int, int], dict[str, Any], float]] = [
    ("opt-6.7b", (100, 0, 100, 0, 100, 0), (24, 4), {}, 201),
    ("opt-30b", (20, 80, 0, 100, 0, 100), (64, 12), {"host_attention": True}, 23.6),
    ("opt-175b", (0, 100, 0, 100, 0, 100), (40, 4), {"host_attention": True}, 2.33),
]
SCALED = (("opt-30b", 16), ("opt-175b", 16))
STAGES = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append here instead of printing")
    args = parser.parse_args()
    with args.out.open("a") if args.out else sys.stdout as out:
        for model, percent, (batch, batches), choices, measured in PAPER:
            policy = fg.Policy.from_percent(
                *percent,
                device_batch_size=batch,
                num_device_batches=batches,
                num_stages=4,
                num_groups=4,
                **choices,
            )
            record = {"kind": "paper", "measured": measured, **predicted(model, policy, 4)}
            print(json.dumps(record), file=out, flush=True)
        for model, batch in SCALED:
            for stages in STAGES:
                if stages > len(fg.OPTConfig.preset(f"facebook/{model}").units):
                    continue
                # Two groups of batches for each stage, of a shape that every row can have.
                fixed = {
                    "num_stages": stages,
                    "device_batch_size": batch,
                    "num_device_batches": 2 * stages,
                }
                found = predicted(model, "auto", stages, fixed=fixed)
                print(json.dumps({"kind": "scaling", **found}), file=out, flush=True)


def predicted(model: str, policy: Any, stages: int, **choices: Any) -> dict[str, Any]:
    """The figures of a plan over so many machines."""
    started = time.perf_counter()
    found = fg.plan(
        f"facebook/{model}",
        policy,
        fg.Hardware.preset("t4"),
        prompt_len=512,
        gen_len=32,
        schedule=("zigzag", fg.SCHEDULES["zigzag"]),
        num_hosts=stages,
        **choices,
    )
    name, least = bound(found.lower_bound)
    used = found.policy
    shares = found.stages
    return {
        "benchmark": "stages",
        "model": model,
        "stages": stages,
        "block": [used.device_batch_size, used.num_device_batches],
        "groups": len(found.workload.groups()),
        "weights": [used.weights.device, used.weights.host, used.weights.disk],
        "cache": [used.cache.device, used.cache.host, used.cache.disk],
        "tokens_per_second": found.tokens_per_second,
        "prefill_seconds": found.prefill_seconds,
        "seconds": found.seconds,
        "bound": name.partition(" of ")[0],
        "bound_over_time": least / found.seconds,
        "busy": max(s["busy"] for s in shares) if "busy" in shares[0] else None,
        "fits": not found.misfits,
        "planning_seconds": round(time.perf_counter() - started, 2),
    }


if __name__ == "__main__":
    main()
