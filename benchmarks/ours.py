"""One run of flexgen-jax under one policy; prints one JSON line. Started by ``offload.py``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import die_first, die_with, measured

import flexgen_jax as fg
from scheduling.sizes import Link
from storage.wrappers import Throttled


class _Enough(Exception):
    """Ends a warm-up: every program has run."""


def _enough(requests: int) -> Callable[[int], None]:
    """A ``progress`` that stops a run once the first decode step has booked its tokens."""
    booked = 0

    def progress(count: int) -> None:
        nonlocal booked
        booked += count
        if booked > requests:
            raise _Enough

    return progress


def _warm_up(
    make: Callable[[], fg.LLM], prompts: list[list[int]], params: fg.SamplingParams
) -> None:
    """Compiles with the shapes of the real run, of which one batch has them all.

    Only the prefill and one decode step: ``params`` must stay, since the cache's length follows
    from ``max_tokens``.
    """
    with make() as llm, contextlib.suppress(_Enough):
        llm.generate(prompts, params, progress=_enough(len(prompts)))


def _prefill_end(llm: fg.LLM) -> float:
    """Seconds until the last batch has its first token."""
    spans, head = llm.report.timeline.spans, len(llm.config.units) - 1
    return max(s.end for s in spans if s.op == "Compute" and s.layer == head and s.step == 0)


def _split(percent: list[float] | None) -> fg.Split | None:
    if percent is None:
        return None
    device, host = percent
    return fg.Split(device=device, host=host, disk=100 - device - host)


def run(args: argparse.Namespace) -> dict[str, Any]:
    policy = fg.Policy.from_percent(
        *args.percent,
        device_batch_size=args.batch,
        num_device_batches=args.num_batches,
        weight_bits=args.weight_bits,
        cache_bits=args.cache_bits,
        attention_sparsity=args.sparsity,
        experts=_split(args.experts_percent),
    )

    def slow(tier: fg.Tier, store: Any) -> Any:
        throttled = tier is fg.Tier.DISK and args.throttle
        return Throttled(store, args.throttle) if throttled else store

    def make() -> fg.LLM:
        return fg.LLM(
            str(args.store),
            dtype=args.dtype,
            policy=policy,
            schedule=args.schedule,
            offload_dir=str(args.scratch),
            disk=fg.DiskContext(mode=args.disk_mode, chunk_positions=args.chunk_positions),
            wrap_store=slow,
        )

    # Drawn: tokens that are alike would choose the same experts.
    drawn = np.random.default_rng(0).integers(2, 1000, (policy.block_size, args.prompt_len))
    prompts = drawn.tolist()
    params = fg.SamplingParams(temperature=0.0, max_tokens=args.gen_len, ignore_eos=True)
    if args.warm_up:
        _warm_up(make, prompts[: args.batch], params)
    gc.collect()  # its weights may hang in a cycle, and would count for the measured run
    # A new LLM: the old one maps files, and the pages of mapped files cannot be evicted.
    with make() as llm:
        figures = measured(lambda: llm.generate(prompts, params), llm.store)
        report = llm.report
        prefill = _prefill_end(llm)
    return {
        **figures,
        "generated_tokens": report.generated_tokens,
        "prefill_seconds": round(prefill, 3),
        "decode_seconds": round(figures["seconds"] - prefill, 3),
        "compilations": report.compilations,
        "compile_seconds": round(report.compile_seconds, 3),
        # What was asked of the disk tier; what the page cache served is not in read_nbytes.
        "disk_tier_nbytes": report.disk_bytes,
        "planned_disk_nbytes": [
            report.moved[link] for link in (Link.DISK_TO_HOST, Link.HOST_TO_DISK)
        ],
        "placed_nbytes": {kind: placed.nbytes() for kind, placed in report.placement.items()},
        "disk_tier_written_nbytes": report.disk_bytes_written,
        "streams": {n: round(s["busy_seconds"], 3) for n, s in report.timeline.summary().items()},
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="for cache and hidden states")
    parser.add_argument("--percent", type=float, nargs=6, required=True)
    parser.add_argument("--experts-percent", type=float, nargs=2)
    parser.add_argument("--schedule", default="zigzag")
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--num-batches", type=int, default=1)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--gen-len", type=int, default=32)
    parser.add_argument("--weight-bits", type=int)
    parser.add_argument("--cache-bits", type=int)
    parser.add_argument("--sparsity", type=float, default=1.0)
    parser.add_argument("--throttle", type=float, default=0.0, help="bytes per second of the disk")
    parser.add_argument("--disk-mode", default="auto")
    parser.add_argument("--chunk-positions", type=int, default=16)
    parser.add_argument("--parent", type=int, default=os.getppid())
    args = parser.parse_args()
    die_with(args.parent)
    die_first(1000)
    print(json.dumps(run(args)), flush=True)


if __name__ == "__main__":
    main()
