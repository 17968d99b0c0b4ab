"""What refill gains on requests that end at very different lengths, beside blocks without it.

Lengths are log-normal (``--mean``, at most ``--limit``), prompts of 8 to 200 random tokens; what
ends a request is its own number of tokens, which nobody knows before. Both ways run in one process,
in turns, on the same requests; most programs are compiled by a run of some of them before, and what
compiling is left is not counted. A JSON line: tokens/s of both, occupancy, passes over those of
ideal refill, whether all tokens were equal, and what was predicted for lengths that are known.

    python benchmarks/refill.py --weights disk
    python benchmarks/refill.py --model facebook/opt-125m --weights disk --gb-per-second 0.5
    python benchmarks/refill.py --equal 32              # all of one length: no slower than without
    python benchmarks/refill.py --questions DIR         # SmolLM2 as examples/smollm2.py makes it
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from chat_questions import questions

import flexgen_jax as fg
from flexgen_jax.machine.first_profile import known_machine
from flexgen_jax.planning.blocks import in_turn
from flexgen_jax.planning.refilling import ideal_passes
from flexgen_jax.requests.request import Request
from scheduling.policy import Tier
from storage.wrappers import Throttled

DEMO = Path(__file__).parent.parent / "flexgen_jax" / "demo_model"
SIGMA = 1.0  # of the logarithm of a length


def lengths(count: int, mean: float, limit: int, seed: int) -> list[int]:
    """Log-normal, clipped to 1..limit, scaled so that their mean is about ``mean``."""
    draws = np.exp(np.random.default_rng(seed).normal(0, SIGMA, count))
    low, high = 0.0, float(limit)
    for _ in range(60):
        scale = (low + high) / 2
        found = np.clip(np.round(scale * draws), 1, limit)
        low, high = (scale, high) if found.mean() < mean else (low, scale)
    return [int(n) for n in found]


def requests(llm: fg.LLM, args: argparse.Namespace) -> list[Request]:
    draw = np.random.default_rng(args.seed)
    prompts = [
        [int(t) for t in draw.integers(4, llm.config.vocab_size - 4, n)]
        for n in draw.integers(args.prompt[0], args.prompt[1] + 1, args.requests)
    ]
    if args.equal:
        ends = [args.equal] * args.requests
    else:
        ends = lengths(args.requests, args.mean, args.limit, args.seed)
    params = [
        fg.SamplingParams(temperature=0.0, max_tokens=args.equal or args.limit, ignore_eos=True)
        for _ in ends
    ]
    made = [llm.request(i, *pair) for i, pair in enumerate(zip(prompts, params, strict=True))]
    if args.equal:
        return made
    # A row's room is the limit, and nothing but its end says how long it lives: a token id that
    # is forced when it is due, and stops it.
    stop = 3
    return [
        dataclasses.replace(
            request,
            params=dataclasses.replace(request.params, stop_token_ids=(stop,)),
            forced=(*[-1] * (n - 1), stop),
        )
        for request, n in zip(made, ends, strict=True)
    ]


def asked_questions(llm: fg.LLM, args: argparse.Namespace) -> list[Request]:
    """Everyday questions, in the chat format of SmolLM2."""
    params = fg.SamplingParams(temperature=0.0, max_tokens=args.limit)
    texts = questions(args.requests, args.seed)
    return [llm.request(i, text, params) for i, text in enumerate(texts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO), help="a directory, or a preset's shapes")
    parser.add_argument("--questions", metavar="DIR", help="ask this chat model, up to its ends")
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--mean", type=float, default=32)
    parser.add_argument("--limit", type=int, default=192)
    parser.add_argument("--equal", type=int, help="this many new tokens of every request")
    parser.add_argument("--prompt", type=int, nargs=2, default=(8, 200))
    parser.add_argument("--weights", choices=[t.value for t in Tier], default="device")
    parser.add_argument("--cache", choices=[t.value for t in Tier], default="device")
    parser.add_argument("--hidden", choices=[t.value for t in Tier], default="device")
    parser.add_argument("--gb-per-second", type=float, help="throttle the weights' disk to so much")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device-batch-size", type=int, default=16)
    parser.add_argument("--num-device-batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--warm", type=int, default=128, help="requests that are run to compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", help="where stores lie and stay")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-bench-") as scratch:
        print(json.dumps(run(args, args.work or scratch)), flush=True)


def store(args: argparse.Namespace, work: str) -> str:
    model = args.questions or args.model
    path = Path(work) / f"{_named(model).replace('/', '--')}-{args.dtype}"
    if path.is_dir():
        return str(path)
    if model == str(DEMO):  # published in float16: used in place, it is converted at each load
        return str(fg.convert(model, path, dtype=args.dtype))
    if Path(model).is_dir():
        return model
    return str(fg.convert_dummy(model, path, dtype=args.dtype))


def run(args: argparse.Namespace, work: str) -> dict[str, Any]:
    def on(tier: str) -> fg.Split:
        return fg.Split(**{**{t.value: 0 for t in Tier}, tier: 100})

    def throttled(tier: Tier, kept: Any) -> Any:
        slow = args.gb_per_second and tier is Tier.DISK
        return Throttled(kept, args.gb_per_second * 1e9) if slow else kept

    policy = fg.Policy(
        device_batch_size=args.device_batch_size,
        num_device_batches=args.num_device_batches,
        weights=on(args.weights),
        cache=on(args.cache),
        hidden=on(args.hidden),
    )
    options: dict[str, Any] = {"policy": policy, "dtype": args.dtype, "offload_dir": work}
    if args.gb_per_second:  # what is predicted is of the disk as it is throttled
        known = known_machine(args.dtype, Path(work), measure=True, say=print)
        rate = {"disk_to_host": args.gb_per_second * 1e9}
        options["hardware"] = dataclasses.replace(known, **rate)
    with fg.LLM(store(args, work), **options, wrap_store=throttled) as llm:
        asked = asked_questions(llm, args) if args.questions else requests(llm, args)
        found: dict[bool, list[fg.Report]] = {True: [], False: []}
        tokens = {}
        some = asked[:: max(1, len(asked) // args.warm)]
        for repeat in range(args.repeats + 1):
            for refill in (True, False):
                llm.policy = dataclasses.replace(policy, refill=refill)
                begun = time.perf_counter()
                outputs = llm.run(asked if repeat else some)
                seconds = time.perf_counter() - begun
                print(f"refill {refill}, {repeat}: {seconds:.1f} s", file=sys.stderr, flush=True)
                if repeat:  # the first compiles
                    tokens[refill] = [o.outputs[0].token_ids for o in outputs]
                    found[refill].append(llm.report)
        with_, without = found[True], found[False]
        ends = [len(tokens[True][r.index]) for r in in_turn(asked)]
        ideal = ideal_passes(ends, policy.block_size)
        predicted = with_[-1].predicted.seconds
    rates = {r: statistics.median(map(_rate, found[r])) for r in found}
    count = [len(t) for t in tokens[True]]
    return {
        "benchmark": "refill",
        "model": "SmolLM2-135M-Instruct" if args.questions else _named(args.model),
        "questions": bool(args.questions),
        "dtype": args.dtype,
        "requests": len(asked),
        "mean_length": round(statistics.mean(count), 1),
        "longest": max(count),
        "limit": args.limit,
        "equal": args.equal,
        "block": [args.device_batch_size, args.num_device_batches],
        "weights": args.weights,
        "cache": args.cache,
        "hidden": args.hidden,
        "gb_per_second": args.gb_per_second,
        "repeats": args.repeats,
        "tokens_per_second": {"refill": rates[True], "blocks": rates[False]},
        "ratio": rates[True] / rates[False],
        "occupancy": {"refill": with_[-1].occupancy, "blocks": without[-1].occupancy},
        "passes": {"refill": with_[-1].passes, "blocks": without[-1].passes, "ideal": ideal},
        "passes_over_ideal": with_[-1].passes / ideal,
        "all_tokens_equal": tokens[True] == tokens[False],
        "measured_over_predicted": (
            (with_[-1].timeline.seconds - with_[-1].compile_seconds) / predicted
        ),
        "padding": with_[-1].padding,
        "hardware": with_[-1].hardware,
        "jax": jax.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "avx512": "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8"),
    }


def _rate(report: fg.Report) -> float:
    return report.generated_tokens / (report.seconds - report.compile_seconds)


def _named(model: str) -> str:
    return "bundled" if model == str(DEMO) else model


if __name__ == "__main__":
    main()
