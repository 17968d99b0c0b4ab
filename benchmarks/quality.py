"""What compression costs on the bundled model's held-out text; prints JSON lines.

Perplexity, divergence from full precision, bytes over each link and tokens/s, with the weights and
the cache on disk, for 4 and 8 bits in groups of 64 and 32 and for sparse attention.

    python benchmarks/quality.py --out quality.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import flexgen_jax as fg
from flexgen_jax.compare import compare

DEMO = Path(fg.__file__).parent / "demo_model"
OFF: dict[str, Any] = {"weight_bits": None, "cache_bits": None, "attention_sparsity": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "full precision": {},
    "8-bit weights and cache": {"weight_bits": 8, "cache_bits": 8},
    "4-bit weights": {"weight_bits": 4},
    "4-bit cache": {"cache_bits": 4},
    "4-bit weights and cache": {"weight_bits": 4, "cache_bits": 4},
    "4-bit weights and cache, groups of 32": {
        "weight_bits": 4,
        "cache_bits": 4,
        "group_size": 32,
    },
    "10% of the values": {"attention_sparsity": 0.1},
    "4-bit weights and cache, 10% of the values": {
        "weight_bits": 4,
        "cache_bits": 4,
        "attention_sparsity": 0.1,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--out", type=Path, help="append here instead of printing")
    args = parser.parse_args()
    text = (DEMO / "held_out.txt").read_text(encoding="utf-8")
    disk = fg.Split(device=0, disk=100)
    base = fg.Policy(device_batch_size=32, num_device_batches=4, weights=disk, cache=disk)
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-bench-") as directory:

        def make(**fields: Any) -> fg.LLM:
            policy = dataclasses.replace(base, **fields)
            return fg.LLM(str(DEMO), policy=policy, offload_dir=directory, say=lambda _: None)

        ways = {name: {**OFF, **fields} for name, fields in WAYS.items()}
        rows = compare(make, text, ways, context=args.context)
    with args.out.open("a") if args.out else sys.stdout as out:
        for row in rows:
            values = {"benchmark": "quality", "context": args.context, **row.to_json()}
            print(json.dumps(values), file=out)


if __name__ == "__main__":
    main()
