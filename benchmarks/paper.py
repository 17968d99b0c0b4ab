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
# paper and its ablation).
_30B, _175B = (20, 80, 0, 100, 0, 100), (0, 50, 0, 0, 0, 100)
_ALL_HOST = (0, 100, 0, 100, 0, 100)
_HOST: dict[str, Any] = {"host_attention": True}
ROWS: list[tuple[str, str, tuple[float, ...], tuple[int, int], dict[str, Any], float]] = [
    ("opt-6.7b", "FlexGen", (100, 0, 100, 0, 100, 0), (2, 1), {}, 25.26),
    ("opt-30b", "FlexGen", _30B, (48, 3), _HOST, 7.32),
    ("opt-175b", "FlexGen", _175B, (32, 8), _HOST, 0.69),
    ("opt-30b", "no overlap", _30B, (48, 3), {**_HOST, "overlap": False}, 5.86),
    ("opt-175b", "no overlap", _175B, (32, 8), {**_HOST, "overlap": False}, 0.59),
    ("opt-30b", "no host attention", _30B, (48, 3), {}, 4.03),
    ("opt-175b", "no host attention", _175B, (32, 8), {}, 0.62),
    ("opt-30b", "4-bit cache", _ALL_HOST, (64, 8), {"cache_bits": 4}, 8.70),
    ("opt-175b", "4 bits", _ALL_HOST, (48, 3), {"weight_bits": 4, "cache_bits": 4}, 1.12),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append here instead of printing")
    args = parser.parse_args()
    with args.out.open("a") if args.out else sys.stdout as out:
        for model, what, percent, (batch, batches), choices, measured in ROWS:
            policy = fg.Policy.from_percent(
                *percent, device_batch_size=batch, num_device_batches=batches, **choices
            )
            started = time.perf_counter()
            found = fg.plan(
                f"facebook/{model}",
                policy,
                fg.Hardware.preset("t4"),
                prompt_len=512,
                gen_len=32,
                schedule=("zigzag", fg.SCHEDULES["zigzag"]),
            )
            record = {
                "benchmark": "paper",
                "model": model,
                "what": what,
                "block": [batch, batches],
                "percent": percent,
                "choices": choices,
                "measured": measured,
                "planning_seconds": round(time.perf_counter() - started, 2),
                **found.to_json(),
            }
            print(json.dumps(record), file=out, flush=True)


if __name__ == "__main__":
    main()
