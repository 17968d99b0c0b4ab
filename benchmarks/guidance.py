"""What answers in a form cost: tokens/s with and without one, on the same prompts.

All requests of both ways run to ``--tokens`` new ones: the free ones pass over the end of the text,
and the form is a list of more objects than fit, so that nothing but the guidance differs. Both run
in one process, in turns, after a run of each that compiles; a third way has a form for every second
request. A JSON line: tokens/s of each (the median), and what a guided way has of the free one's.

    python examples/smollm2.py smollm2-135m && python benchmarks/guidance.py smollm2-135m
    python benchmarks/guidance.py                 # the bundled model
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax

import flexgen_jax as fg

DEMO = Path(__file__).parent.parent / "flexgen_jax" / "demo_model"
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z]{1,12}@[a-z]{1,12}\\.com$"},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "rare"]}, "maxItems": 3},
    },
    "required": ["name", "age", "email", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(DEMO))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    prompts = [f"Write a list of {i + 3} people as JSON:" for i in range(args.requests)]
    free = fg.SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    form = fg.SamplingParams(
        temperature=0.0, max_tokens=args.tokens, structured_outputs={"json": SCHEMA}
    )
    ways = {
        "free": [free] * args.requests,
        "guided": [form] * args.requests,
        "every second": [(free, form)[i % 2] for i in range(args.requests)],
    }
    policy = fg.Policy(device_batch_size=args.requests, num_device_batches=1)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    with (
        tempfile.TemporaryDirectory() as scratch,
        fg.LLM(args.model, policy=policy, dtype=args.dtype, offload_dir=scratch) as llm,
    ):
        for repeat in range(args.repeats + 1):
            for way, params in ways.items():
                begun = time.perf_counter()
                outputs = llm.generate(prompts, params)
                seconds = time.perf_counter() - begun
                tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
                assert tokens == args.requests * args.tokens
                if repeat:
                    rates[way].append(tokens / seconds)
    found = {way: statistics.median(all_of) for way, all_of in rates.items()}
    line = {
        "benchmark": "guidance",
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "requests": args.requests,
        "new_tokens": args.tokens,
        "repeats": args.repeats,
        "tokens_per_second": found,
        "of_free": {way: rate / found["free"] for way, rate in found.items() if way != "free"},
        "jax": jax.__version__,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
