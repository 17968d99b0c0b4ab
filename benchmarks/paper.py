"""Predicts the paper's runs on the paper's machine; prints JSON lines.

FlexGen's policies of its tables, 512 prompt and 32 new tokens on one T4, beside what it measured.

    python benchmarks/paper.py --out paper.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import flexgen_jax as fg

# Row: model, what, six numbers, batch x batches, choices, measured tokens/s (tables 2 and 4 of the
# paper and its ablation; the peers' batch sizes and devices are those that its repository lists).
_30B, _175B = (20, 80, 0, 100, 0, 100), (0, 50, 0, 0, 0, 100)
_ALL_HOST = (0, 100, 0, 100, 0, 100)
_ON_HOST, _ON_DISK = (0, 100, 100, 0, 100, 0), (0, 0, 100, 0, 100, 0)
_HOST: dict[str, Any] = {"host_attention": True}
_ONE_BY_ONE: dict[str, Any] = {"overlap": False, "schedule": "row_by_row"}
ROWS: list[tuple[str, str, tuple[float, ...], tuple[int, int], dict[str, Any], float]] = [
    ("opt-6.7b", "FlexGen", (100, 0, 100, 0, 100, 0), (2, 1), {}, 25.26),
    ("opt-6.7b", "Accelerate", (100, 0, 100, 0, 100, 0), (2, 1), _ONE_BY_ONE, 25.12),
    ("opt-6.7b", "DeepSpeed", _ON_HOST, (16, 1), {"schedule": "row_by_row"}, 9.28),
    ("opt-30b", "4-bit cache", _ALL_HOST, (64, 8), {"cache_bits": 4}, 8.70),
    ("opt-30b", "FlexGen", _30B, (48, 3), _HOST, 7.32),
    ("opt-30b", "no policy search", _ALL_HOST, (48, 3), _HOST, 7.26),
    ("opt-30b", "no overlap", _30B, (48, 3), {**_HOST, "overlap": False}, 5.86),
    ("opt-30b", "no host attention", _30B, (48, 3), {}, 4.03),
    ("opt-30b", "DeepSpeed's policy", _ON_HOST, (8, 1), {}, 1.57),
    ("opt-30b", "Accelerate", _ON_HOST, (8, 1), _ONE_BY_ONE, 0.62),
    ("opt-30b", "DeepSpeed", _ON_HOST, (4, 1), {"schedule": "row_by_row"}, 0.60),
    ("opt-175b", "4 bits", _ALL_HOST, (48, 3), {"weight_bits": 4, "cache_bits": 4}, 1.12),
    ("opt-175b", "FlexGen", _175B, (32, 8), _HOST, 0.69),
    ("opt-175b", "no host attention", _175B, (32, 8), {}, 0.62),
    ("opt-175b", "no overlap", _175B, (32, 8), {**_HOST, "overlap": False}, 0.59),
    ("opt-175b", "no policy search", _175B, (32, 1), _HOST, 0.27),
    ("opt-175b", "DeepSpeed's policy", _ON_DISK, (2, 1), {}, 0.01),
    ("opt-175b", "Accelerate", _ON_DISK, (2, 1), _ONE_BY_ONE, 0.01),
    ("opt-175b", "DeepSpeed", _ON_DISK, (1, 1), {"schedule": "row_by_row"}, 0.01),
]
SEARCHED = ("opt-6.7b", "opt-30b", "opt-175b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append here instead of printing")
    args = parser.parse_args()
    with args.out.open("a") if args.out else sys.stdout as out:
        for model, what, percent, (batch, batches), choices, measured in ROWS:
            chosen = dict(choices)
            schedule = chosen.pop("schedule", "zigzag")
            policy = fg.Policy.from_percent(
                *percent, device_batch_size=batch, num_device_batches=batches, **chosen
            )
            record = predicted(model, policy, schedule)
            record |= {"what": what, "percent": percent, "choices": choices, "measured": measured}
            print(json.dumps(record), file=out, flush=True)
        for model in SEARCHED:
            record = predicted(model, "auto", "zigzag")
            record |= {"what": "policy auto", "choices": {}, "measured": None}
            print(json.dumps(record), file=out, flush=True)


def predicted(model: str, policy: Any, schedule: str, **choices: Any) -> dict[str, Any]:
    """The plan of a block, and how long planning took."""
    started = time.perf_counter()
    found = fg.plan(
        f"facebook/{model}",
        policy,
        fg.Hardware.preset("t4"),
        prompt_len=512,
        gen_len=32,
        schedule=(schedule, fg.SCHEDULES[schedule]),
        **choices,
    )
    seconds = round(time.perf_counter() - started, 2)
    block = [found.policy.device_batch_size, found.policy.num_device_batches]
    return {
        "benchmark": "paper",
        "model": model,
        "block": block,
        "planning_seconds": seconds,
        **found.to_json(),
    }


if __name__ == "__main__":
    main()
