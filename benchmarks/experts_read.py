"""The share of a layer's experts that a pass reads, measured and expected, by the rows of a block.

Random weights of a small model, with the number of experts, and of those that a token chooses, of
a real one. Every expert lies on disk, and what was read of it is counted. A prompt of one token:
each pass computes as many tokens as the block has rows.

    python benchmarks/experts_read.py --out read.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tables import experts_read

import flexgen_jax as fg
from scheduling.sizes import Link

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EXPERTS = ((128, 8), (8, 2))


def small(count: int, chosen: int) -> dict[str, Any]:
    """A config of four layers, of which only the experts' numbers are those of a real model."""
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": count,
        "num_experts_per_tok": chosen,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }


def measure(store: Path, config: dict[str, Any], rows: int, gen_len: int) -> dict[str, Any]:
    policy = fg.Policy(
        device_batch_size=rows,
        num_device_batches=1,
        experts=fg.Split(device=0, disk=100),
    )
    params = fg.SamplingParams(temperature=0.0, max_tokens=gen_len, ignore_eos=True)
    drawn = np.random.default_rng(0).integers(2, config["vocab_size"], (rows, 1)).tolist()
    with fg.LLM(store, policy=policy) as llm:
        llm.generate(drawn, params)
        report = llm.report
    tensors = json.loads((store / "flexgen_manifest.json").read_text())["tensors"].items()
    whole = gen_len * sum(entry["nbytes"] for name, entry in tensors if ".expert_" in name)
    return {
        "rows": rows,
        "read": round(report.disk_bytes / whole, 4),
        "expected": round(report.moved[Link.DISK_TO_HOST] / whole, 4),
        "if_alike": round(
            1 - (1 - config["num_experts_per_tok"] / config["num_experts"]) ** rows, 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gen-len", type=int, default=16, help="passes of each run")
    parser.add_argument("--out", type=Path, help="append the JSON lines here")
    args = parser.parse_args()
    records = []
    with (
        args.out.open("a") if args.out else sys.stdout as out,
        tempfile.TemporaryDirectory() as work,
    ):
        for count, chosen in EXPERTS:
            config = small(count, chosen)
            path = Path(work) / f"{chosen}-of-{count}.json"
            path.write_text(json.dumps(config))
            store = fg.convert_dummy(path, path.with_suffix(""), dtype="float32")
            told = {"benchmark": "experts_read", "experts": count, "chosen": chosen}
            for rows in ROWS:
                records.append({**told, **measure(store, config, rows, args.gen_len)})
                print(json.dumps(records[-1]), file=out, flush=True)
    print(experts_read(records), file=sys.stderr)


if __name__ == "__main__":
    main()
