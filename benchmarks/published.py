"""Predicts published runs of models with experts on one card, and two that nobody has published.

Policy auto on a preset of the card, with the paper's host memory, beside what the paper measured:
MoE-Gen (arXiv 2503.09716, table 6), in decode alone, and MoE-Lightning (arXiv 2411.11217, tables 4
and 5), which measured FlexGen beside itself. Nothing is run here: it is prediction beside
measurement, of different programs.

    python benchmarks/published.py --out published.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from tables import published

import flexgen_jax as fg

_8X7B, _8X22B = "mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x22B-v0.1"
_GEN, _LIGHTNING = "MoE-Gen", "MoE-Lightning"
# Card, GB of host memory, model, prompt and new tokens, attention on the host, of decode alone,
# measured tokens/s by whom.
ROWS: list[tuple[str, int, str, int, int, bool, bool, dict[str, float]]] = [
    ("a5000", 512, _8X7B, 512, 256, True, True, {_GEN: 469}),
    ("a5000", 512, _8X7B, 512, 256, False, True, {_GEN: 195}),
    ("a5000", 512, _8X22B, 512, 256, True, True, {_GEN: 91}),
    ("a5000", 512, _8X22B, 512, 256, False, True, {_GEN: 54}),
    ("t4", 192, _8X7B, 242, 50, True, False, {_LIGHTNING: 26.35, "FlexGen": 22.69}),
    ("t4", 192, _8X7B, 1693, 64, True, False, {_LIGHTNING: 4.52, "FlexGen": 3.87}),
    ("t4", 192, _8X7B, 418, 128, True, False, {_LIGHTNING: 30.12, "FlexGen": 9.5}),
]
# On the card's preset as it is, with 64 GB of host memory.
UNPUBLISHED = [
    ("Qwen/Qwen3-235B-A22B", {}),
    ("Qwen/Qwen3-235B-A22B", {"weight_bits": 4}),
    ("openai/gpt-oss-120b", {}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append here instead of printing")
    args = parser.parse_args()
    records = []
    with args.out.open("a") if args.out else sys.stdout as out:
        for card, memory, model, prompt_len, gen_len, on_host, decode, measured in ROWS:
            whole = fg.Hardware.preset(card)
            hardware = dataclasses.replace(whole, host_memory=memory * 10**9)
            fixed = {} if on_host else {"host_attention": False}
            record = predicted(model, hardware, prompt_len, gen_len, fixed, decode=decode)
            record |= {"card": card, "host_gb": memory, "measured": measured}
            record |= {"host_attention": on_host}
            records.append(record)
            print(json.dumps(record), file=out, flush=True)
        for model, fixed in UNPUBLISHED:
            record = predicted(model, fg.Hardware.preset("a5000"), 512, 256, fixed, decode=False)
            record |= {"card": "a5000", "host_gb": 64, "measured": {}, "host_attention": True}
            records.append(record)
            print(json.dumps(record), file=out, flush=True)
    print(published(records), file=sys.stderr)


def predicted(
    model: str,
    hardware: fg.Hardware,
    prompt_len: int,
    gen_len: int,
    fixed: dict[str, Any],
    *,
    decode: bool,
) -> dict[str, Any]:
    """The plan of a block, and how long planning took; tokens/s of ``decode`` alone or of all."""
    started = time.perf_counter()
    found = fg.plan(
        model,
        "auto",
        hardware,
        prompt_len=prompt_len,
        gen_len=gen_len,
        fixed=fixed,
        allow=[] if "host_attention" in fixed else ["host_attention"],
    )
    seconds = time.perf_counter() - started
    rate = found.tokens_per_second
    if decode:
        steps = found.policy.block_size * (gen_len - 1)
        rate = steps / (found.seconds - found.prefill_seconds)
    told = found.to_json()
    return {
        "benchmark": "published",
        "model": model,
        "prompt_len": prompt_len,
        "gen_len": gen_len,
        "decode_alone": decode,
        "weight_bits": found.policy.weight_bits,
        "block": [found.policy.device_batch_size, found.policy.num_device_batches],
        "attends_on_host": found.policy.host_attention,
        "predicted": round(rate, 2),
        "bound": told["bound"],
        "bound_over_time": round(told["lower_bound_seconds"] / found.seconds, 3),
        "planning_seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
