"""Is the prediction right? Policies x schedules x throttles, predicted and run; JSON lines.

The machine is profiled first; each combination runs ``--repeat`` times after a warm-up, and the
median of its measured totals is held against the simulator's.

    python benchmarks/predict.py --preset facebook/opt-125m --out predict.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flexgen_jax as fg
from flexgen_jax.machine.profile import profile
from storage.disk import DiskStore
from storage.slots import Slot
from storage.wrappers import Throttled

DISK = fg.Split(device=0, disk=100)
HOST = fg.Split(device=0, host=100)
HALF = fg.Split(device=50, disk=50)
POLICIES: dict[str, dict[str, Any]] = {
    "all on the device": {},
    "weights on disk": {"weights": DISK},
    "half of the weights on disk": {"weights": HALF},
    "weights and cache on disk": {"weights": DISK, "cache": DISK},
    "4-bit weights on disk": {"weights": DISK, "weight_bits": 4},
    "8-bit cache": {"cache_bits": 8},
    "8-bit weights": {"weight_bits": 8},
    "8-bit weights on disk": {"weights": DISK, "weight_bits": 8},
    "cache on disk": {"cache": DISK},
    "cache and hidden states on disk": {"cache": DISK, "hidden": DISK},
    "attention on the host": {"cache": HOST, "host_attention": True},
    "sparse attention": {"cache": HOST, "attention_sparsity": 0.1},
    "refill": {},
    "refill, weights on disk": {"weights": DISK},
}
REFILLED = 3  # blocks' worth of requests, whose lengths are unequal
# Name -> schedule, overlap.
ORDERS = {
    "zigzag": ("zigzag", True),
    "zigzag, no overlap": ("zigzag", False),
    "row_by_row": ("row_by_row", True),
    "diagonal": ("diagonal", True),
}
# Held out: nothing of the model was looked at with these in view.
NEW = (
    ("8-bit weights", "zigzag"),
    ("cache on disk", "zigzag"),
    ("cache on disk", "zigzag, no overlap"),
    ("cache and hidden states on disk", "row_by_row"),
    ("attention on the host", "zigzag"),
    ("attention on the host", "row_by_row"),
    ("sparse attention", "zigzag"),
    ("sparse attention", "row_by_row"),
    ("refill", "zigzag"),
    ("8-bit weights on disk", "zigzag"),
    ("8-bit weights on disk", "row_by_row"),
    ("refill, weights on disk", "zigzag"),
    ("refill, weights on disk", "zigzag, no overlap"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", default="facebook/opt-125m")
    add("--prompt-len", type=int, default=64)
    add("--gen-len", type=int, default=12)
    add("--block", type=int, nargs=2, default=(16, 2), metavar=("BATCH", "BATCHES"))
    add("--throttle", type=float, nargs="+", default=[0.0, 2e8], help="bytes/s of weights' disk")
    add("--repeat", type=int, default=3)
    add("--policies", nargs="+", choices=POLICIES, default=list(POLICIES)[:6])
    add("--new", action="store_true", help="those that were added to see if the model holds")
    add("--new-part", type=int, nargs=2, metavar=("FIRST", "LAST"), help="only some of --new")
    add("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    add("--hardware", help="a profile that was made before")
    add("--work", type=Path, help="keep the store here")
    add("--out", type=Path, help="append here instead of printing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-bench-") as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)

        def stored(bits: int | None) -> Path:
            # In bits of its own: else the disk's speed would be that of another store.
            name = f"{Path(args.preset).name}-{bits or 'bfloat16'}-store"
            return fg.convert_dummy(args.preset, work / name, dtype="bfloat16", weight_bits=bits)

        stored(None)
        if args.hardware:
            hardware = fg.Hardware.load(args.hardware)
        else:
            hardware = profile(work, say=lambda line: print(line, file=sys.stderr))
        with args.out.open("a") if args.out else sys.stdout as out:
            for policy, order, throttle in chosen(args):
                bits = POLICIES[policy].get("weight_bits")
                record = measure(args, stored(bits), scratch, hardware, policy, order, throttle)
                print(json.dumps(record), file=out, flush=True)
                ratio = record["predicted_seconds"] / record["measured_seconds"]
                print(f"{policy}, {order}, {throttle:g}: {ratio:.2f}", file=sys.stderr)


def chosen(args: argparse.Namespace) -> Iterator[tuple[str, str, float]]:
    """Policy, order and throttle of each combination that was asked for."""
    if args.new:
        first, last = args.new_part or (1, len(NEW))
        for policy, order in NEW[first - 1 : last]:
            yield policy, order, max(args.throttle) if throttled(policy) else 0.0
        return
    for throttle in args.throttle:
        for policy in args.policies:
            for order in args.orders:
                if not throttle or throttled(policy):
                    yield policy, order, throttle


def throttled(policy: str) -> bool:
    """Whether there is anything that a throttle slows down: weights on disk."""
    weights = POLICIES[policy].get("weights")
    return weights is not None and weights.disk > 0


def speed_of(store: Path) -> float:
    """Bytes per second that the decoder layers of ``store`` are read with, past the page cache."""
    model = fg.open_store(store, dtype="bfloat16")
    files = {
        n: f for n, f in model.arrays.items() if n.startswith("layer_") and f.nbytes >= 1 << 20
    }
    disk, slot = DiskStore(files, fg.DiskContext(mode="direct")), Slot()
    try:
        rates = []
        for _ in range(2):
            started = time.perf_counter()
            for name in files:
                slot.begin(disk.slot_nbytes([name]))
                slot.release(list(disk.load([name], slot).values()))
            seconds = time.perf_counter() - started
            rates.append(sum(f.nbytes for f in files.values()) / seconds)
        return statistics.median(rates)
    finally:
        slot.begin()
        disk.close()


def measure(
    args: argparse.Namespace,
    store: Path,
    scratch: str,
    hardware: fg.Hardware,
    policy: str,
    order: str,
    throttle: float,
) -> dict[str, Any]:
    """One combination."""
    schedule, overlap = ORDERS[order]
    batch, batches = args.block
    chosen = fg.Policy(
        device_batch_size=batch, num_device_batches=batches, overlap=overlap, **POLICIES[policy]
    )

    def slow(tier: fg.Tier, inner: Any) -> Any:
        weights = not hasattr(inner, "append")  # cells are stores of sequences
        slowed = throttle and tier is fg.Tier.DISK and weights
        return Throttled(inner, throttle) if slowed else inner

    # A shared disk's speed changes by the minute, and files that were just written, as a profile's
    # are, read faster than old ones: what the store itself reads at now, or less by the throttle.
    now = speed_of(store)
    if throttle:
        now = min(now, throttle)
    hardware = dataclasses.replace(hardware, disk_to_host=now, disk_read_latency=0.0)
    # Without a second job's worth of requests refill is never seen.
    times = REFILLED if policy.startswith("refill") else 1
    prompts = [[2 + i % 97] * args.prompt_len for i in range(times * chosen.block_size)]
    params = [
        fg.SamplingParams(
            temperature=0.0,
            max_tokens=args.gen_len - (i * 5) % (args.gen_len - 1 if times > 1 else 1),
            ignore_eos=True,
        )
        for i in range(len(prompts))
    ]
    totals = []
    with fg.LLM(
        str(store),
        dtype="bfloat16",
        policy=chosen,
        schedule=schedule,
        offload_dir=scratch,
        disk=fg.DiskContext(mode="direct"),
        wrap_store=slow,
        hardware=hardware,
        say=lambda _: None,
    ) as llm:
        for _ in range(args.repeat + 1):
            llm.generate(prompts, params)
            assert llm.report is not None
            totals.append(llm.report.timeline.seconds)
        predicted = llm.report.predicted
        assert predicted is not None
        streams = llm.report.to_json()["predicted"]
    measured = statistics.median(totals[1:])
    return {
        "benchmark": "predict",
        "preset": args.preset,
        "policy": policy,
        "order": order,
        "throttle": throttle,
        "repeat": args.repeat,
        "new": args.new,
        "block": list(args.block),
        "prompt_len": args.prompt_len,
        "gen_len": args.gen_len,
        "predicted_seconds": round(predicted.seconds, 4),
        "measured_seconds": round(measured, 4),
        "spread": [round(min(totals[1:]), 4), round(max(totals[1:]), 4)],
        "streams": streams,
        "python": sys.version.split()[0],
    }


if __name__ == "__main__":
    main()
