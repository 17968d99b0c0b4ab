"""What a long prompt takes beside the weights and its cache: seconds, and peak resident memory.

    python benchmarks/long_prompt.py --model meta-llama/Llama-3.2-1B --prompt-len 16384

Random weights in memory, one prompt, two new tokens. The memory is that of a process of its own,
less what it held before it began to compute; the cache, which is there at the end, is told apart.
Prints a JSON line, with what the planner counts as workspace beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

import flexgen_jax as fg
from scheduling.policy import Tier


def resident(what: str) -> int:
    """Bytes: ``VmRSS`` now, or ``VmHWM`` at most so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{what}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def measure(store: str, args: argparse.Namespace) -> None:
    policy = fg.Policy(device_batch_size=1, num_device_batches=1)
    params = fg.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    with fg.LLM(store, policy=policy, dtype=args.dtype) as llm:
        vocab = llm.config.vocab_size
        llm.generate([[5, 9, 11]], params)
        before = resident("VmRSS")
        prompt = [(31 * i + 11) % vocab for i in range(args.prompt_len)]
        llm.generate([prompt], params)
        report = llm.report
        assert report is not None
        cache = report.placement["cache"].nbytes(Tier.DEVICE)
        request = llm.request(0, prompt, params)
        workload = llm.planner.workload(llm.planner.blocks([request])[0])
        assert workload.sizes is not None
        prefill = max(s.end for s in report.timeline.spans if getattr(s, "step", 1) == 0)
        print(
            json.dumps(
                {
                    "benchmark": "long_prompt",
                    "model": args.model,
                    "dtype": args.dtype,
                    "prompt_len": args.prompt_len,
                    "prefill_seconds": round(prefill, 1),
                    "cache_gb": round(cache / 1e9, 3),
                    "beyond_weights_and_cache_gb": round(
                        (resident("VmHWM") - before - cache) / 1e9, 3
                    ),
                    "planned_workspace_gb": round(workload.sizes.batches[0].workspace / 1e9, 3),
                    "jax": jax.__version__,
                    "cores": os.cpu_count(),
                }
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="meta-llama/Llama-3.2-1B", help="a preset")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--prompt-len", type=int, default=16384)
    parser.add_argument("--work", help="where the store is made and kept; default: temporary")
    parser.add_argument("--store", help=argparse.SUPPRESS)  # of the measuring process
    args = parser.parse_args()
    if args.store is not None:
        measure(args.store, args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(args.work or scratch)
        store = fg.convert_dummy(
            args.model, work / f"{Path(args.model).name}-{args.dtype}", dtype=args.dtype
        )
        subprocess.run([sys.executable, *sys.argv, "--store", str(store)], check=True)


if __name__ == "__main__":
    main()
