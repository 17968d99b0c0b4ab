"""How near predictions come with a preset, with a short profile, and with the full one.

Small jobs, which show most of what is wrong: the bundled model with requests of one length and with
log-normal lengths, and a random model of OPT-125m's shapes, with weights in memory and on disk. The
machine is measured both ways right before; each job runs once to compile, then ``--repeats`` times.
A JSON line a job: predicted over measured for each, and with what the machine was measured.

    python benchmarks/profiles.py --work DIR
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import refill

import flexgen_jax as fg
from flexgen_jax.engine.runner import Finished
from flexgen_jax.machine.profile import SHORT_FILE_NBYTES, SHORT_REPEATS, profile
from flexgen_jax.machine.this_machine import nearest_preset
from flexgen_jax.planning.blocks import Block
from flexgen_jax.planning.planner import Planner
from flexgen_jax.requests.request import Request

DISK = fg.Split(device=0, disk=100)
BUNDLED, SMALL = str(refill.DEMO), "facebook/opt-125m"
# Name -> model, tokens of prompts, new tokens (None: log-normal), requests, block, weights.
JOBS: dict[str, tuple[Any, ...]] = {
    "bundled, equal lengths": (BUNDLED, (8, 200), 32, 256, (16, 4), fg.Split()),
    "bundled, log-normal lengths, weights on disk": (BUNDLED, (8, 200), None, 256, (16, 4), DISK),
    "opt-125m, weights in memory": (SMALL, (64, 64), 16, 32, (8, 2), fg.Split()),
    "opt-125m, weights on disk": (SMALL, (64, 64), 16, 32, (8, 2), DISK),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="keep the stores here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-bench-") as scratch:
        work = args.work or Path(scratch)
        machines, seconds = measured(work)
        for name in args.jobs:
            found = job(name, str(work), machines, args.repeats)
            print(json.dumps({**found, "profile_seconds": seconds}), flush=True)


def measured(work: Path) -> tuple[dict[str, fg.Hardware], dict[str, float]]:
    """The preset, and this machine both ways; the second time, when all is compiled."""
    found, seconds = {"preset": nearest_preset()}, {}
    short = {"repeats": SHORT_REPEATS, "file_nbytes": SHORT_FILE_NBYTES, "short": True}
    ways: dict[str, dict[str, Any]] = {"short": short, "full": {}}
    for name, options in ways.items():
        for again in ("compiling", "measuring"):
            begun = time.perf_counter()
            found[name] = profile(work, dtype="float32", **options)
            seconds[f"{name}, {again}"] = round(time.perf_counter() - begun, 1)
    print(json.dumps(seconds), file=sys.stderr, flush=True)
    return found, seconds


def job(name: str, work: str, machines: Mapping[str, fg.Hardware], repeats: int) -> dict[str, Any]:
    model, prompt, equal, count, block, weights = JOBS[name]
    asked = argparse.Namespace(
        model=model, prompt=prompt, equal=equal, requests=count, dtype="float32"
    )
    vars(asked).update(questions=None, mean=32, limit=192, seed=0)
    policy = fg.Policy(device_batch_size=block[0], num_device_batches=block[1], weights=weights)
    totals = []
    with fg.LLM(
        refill.store(asked, work),
        policy=policy,
        dtype="float32",
        offload_dir=work,
        hardware=machines["preset"],
    ) as llm:
        requests = refill.requests(llm, asked)
        for repeat in range(1 + repeats):
            blocks, done = run(llm, requests)
            if repeat:  # the first compiles
                totals.append(working_seconds(done))
            planner = llm.planner
        predicted = {
            label: predicted_seconds(dataclasses.replace(planner, hardware=h), blocks, done)
            for label, h in machines.items()
        }
    took = statistics.median(totals)
    return {
        "benchmark": "profiles",
        "job": name,
        "measured_seconds": took,
        "all_measured": totals,
        "predicted_over_measured": {label: s / took for label, s in predicted.items()},
        "costs": {
            label: {
                field: getattr(h, field)
                for field in ("overhead", "compute_overhead", "load_overhead", "step_overhead")
            }
            for label, h in machines.items()
        },
        "hardware": machines["full"].name,
        "jax": jax.__version__,
        "load_average": os.getloadavg()[0],
        "avx512": "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8"),
    }


def run(llm: fg.LLM, requests: Sequence[Request]) -> tuple[list[Block], list[Finished]]:
    """The blocks, and what came of each at its end."""
    blocks = llm.planner.blocks(requests)
    done: dict[int, Finished] = {}

    def keep(number: int, finished: Finished) -> None:
        if finished.ended:
            done[number] = finished

    llm.runner.run(llm.planner, blocks, keep)
    return blocks, [done[number] for number in range(len(blocks))]


def working_seconds(done: Sequence[Finished]) -> float:
    return sum(f.timeline.seconds - f.timeline_compile_seconds for f in done if f.timeline)


def predicted_seconds(planner: Planner, blocks: Sequence[Block], done: Sequence[Finished]) -> float:
    pairs = zip(blocks, done, strict=True)
    return sum(planner.predict(b, f.lives, f.passes).seconds for b, f in pairs)


if __name__ == "__main__":
    main()
