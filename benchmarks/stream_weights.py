"""How well reading weights from disk hides behind computing, or computing behind reading.

Three measurements of the same decode steps, side by side in one run, several times over:

- compute alone: all weights on the device;
- read alone: every layer loaded through the ring, nothing computed;
- streamed: all weights on disk, read while computing.

The aim is streamed / max(compute alone, read alone) near 1. Cold: the files' pages are evicted
and reads bypass the page cache; warm: the page cache holds the files.

    python benchmarks/stream_weights.py --model facebook/opt-1.3b --batch 16 >> results.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

import flexgen_jax as fg
from flexgen_jax.engine.layer_loading import LayerLoader
from storage.disk import DiskContext
from storage.slots import Ring

DEVICE, DISK = fg.Split(), fg.Split(device=0, disk=100)


def step_seconds(llm: fg.LLM, args: argparse.Namespace) -> float:
    """Median seconds of a decode step: from one head computation to the next."""
    count = args.batch * args.num_batches
    prompts = [[2 + i % 97] * args.prompt_len for i in range(count)]
    params = fg.SamplingParams(temperature=0.0, max_tokens=args.steps + 1, ignore_eos=True)
    llm.generate(prompts, params)
    head = llm.config.num_hidden_layers + 1
    ends: dict[int, float] = {}
    for span in llm.report.timeline.spans:
        if span.op == "Compute" and span.layer == head:
            ends[span.step] = max(span.end, ends.get(span.step, 0.0))
    times = [ends[step] - ends[step - 1] for step in sorted(ends) if step > 0]
    return statistics.median(times)


def loader(llm: fg.LLM) -> LayerLoader:
    """What loads the layers of the only stage."""
    (stage,) = llm.runner._stages.values()
    return stage.weights


def read_seconds(weights: LayerLoader, prepare: Callable[[], None]) -> float:
    """Seconds to load every layer once, in order, through two slots that are there already."""
    ring = Ring(2)
    _load_all(weights, ring)  # open files, map them, touch the slots: that happens once a job
    prepare()
    started = time.perf_counter()
    _load_all(weights, ring)
    seconds = time.perf_counter() - started
    ring.close()
    return seconds


def _load_all(weights: LayerLoader, ring: Ring) -> None:
    for layer in range(len(weights.config.units)):
        slot = ring[layer % 2]
        slot.begin(weights.slot_nbytes(layer))
        weights.load(layer, slot)


def evict(store: Path) -> None:
    """Drops the store's pages from the page cache."""
    for file in store.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def warm(store: Path) -> None:
    for file in store.rglob("*"):
        if file.is_file():
            with file.open("rb") as f:
                while f.read(1 << 24):
                    pass


def measure(store: Path, args: argparse.Namespace) -> None:
    def policy(split: fg.Split) -> fg.Policy:
        return fg.Policy(
            device_batch_size=args.batch, num_device_batches=args.num_batches, weights=split
        )

    states = {"cold": ("direct", evict), "warm": ("mapped", warm)}
    figures: dict[str, list[float]] = {"compute": []}
    with fg.LLM(str(store), policy=policy(DEVICE), dtype=args.dtype) as resident:
        step_seconds(resident, args)  # compile
        for _ in range(args.repeats):
            figures["compute"].append(step_seconds(resident, args))
            for state, (mode, prepare) in states.items():
                context = DiskContext(mode=mode)
                disk = fg.LLM(str(store), policy=policy(DISK), dtype=args.dtype, disk=context)
                with disk:
                    read = read_seconds(loader(disk), lambda: prepare(store))  # noqa: B023
                    figures.setdefault(f"read {state}", []).append(read)
                    per_pass = loader(disk).disk_bytes // 2
                    prepare(store)
                    figures.setdefault(f"streamed {state}", []).append(step_seconds(disk, args))
    compute = statistics.median(figures["compute"])
    for state in states:
        read = statistics.median(figures[f"read {state}"])
        streamed = statistics.median(figures[f"streamed {state}"])
        ratios = [
            s / max(r, c)
            for s, r, c in zip(
                figures[f"streamed {state}"],
                figures[f"read {state}"],
                figures["compute"],
                strict=True,
            )
        ]
        record = {
            "benchmark": "stream_weights",
            "model": args.model,
            "dtype": args.dtype,
            "batch": args.batch,
            "num_batches": args.num_batches,
            "prompt_len": args.prompt_len,
            "steps": args.steps,
            "repeats": args.repeats,
            "page_cache": state,
            "nbytes_per_step": per_pass,
            "compute_seconds": round(compute, 4),
            "read_seconds": round(read, 4),
            "read_gb_per_second": round(per_pass / read / 1e9, 2),
            "streamed_seconds": round(streamed, 4),
            "serial_seconds": round(compute + read, 4),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(r, 3) for r in ratios],
            "jax": jax.__version__,
            "python": sys.version.split()[0],
            "cores": os.cpu_count(),
        }
        print(json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="facebook/opt-1.3b", help="a preset")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--num-batches", type=int, default=1)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6, help="decode steps of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store", type=Path, help="reuse or create the weights here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-bench-") as scratch:
        store = args.store or Path(scratch) / "store"
        if not store.exists():
            fg.convert_dummy(args.model, store, dtype=args.dtype)
        measure(store, args)


if __name__ == "__main__":
    main()
