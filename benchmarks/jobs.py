"""A job of many short requests on the bundled tiny model: does memory grow, does it slow down?

Runs ``flexgen-jax generate`` as a process of its own. A JSON line a sample: seconds, requests that
are finished (lines of the output so far), held bytes (anonymous and shared pages); and a last line
that sets the last quarter beside the second one.

    python benchmarks/jobs.py --requests 100000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from memory import held_nbytes

MODEL = Path(__file__).parent.parent / "flexgen_jax" / "demo_model"
WORDS = ["the", "tide", "comes", "in", "my", "lord", "and", "says", "nothing", "of", "it"]


def write_input(path: Path, requests: int) -> None:
    """Prompts of 1 to 10 words."""
    chosen = random.Random(0)
    with path.open("w") as file:
        for number in range(requests):
            text = " ".join(chosen.choices(WORDS, k=chosen.randint(1, 10)))
            file.write(json.dumps({"id": f"r{number}", "prompt": text}) + "\n")


class Lines:
    """Counts the lines of a file that grows, and takes another name in the end."""

    def __init__(self, *paths: Path) -> None:
        self._paths, self._file, self.count = paths, None, 0

    def update(self) -> int:
        for path in self._paths if self._file is None else ():
            if path.exists():
                self._file = path.open("rb")
        while self._file is not None and (piece := self._file.read(1 << 20)):
            self.count += piece.count(b"\n")
        return self.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--max-tokens", type=int, default=4)
    parser.add_argument("--device-batch-size", type=int, default=64)
    parser.add_argument("--num-device-batches", type=int, default=4)
    parser.add_argument("--no-refill", action="store_true")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    args = parser.parse_args()
    samples: list[tuple[float, int, int]] = []
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-bench-") as scratch:
        source, target = Path(scratch) / "in.jsonl", Path(scratch) / "out.jsonl"
        write_input(source, args.requests)
        command = [sys.executable, "-m", "flexgen_jax", "generate", "--model", str(MODEL)]
        command += ["-i", str(source), "-o", str(target), "--offload-dir", scratch, "--quiet"]
        command += ["--device-batch-size", str(args.device_batch_size), "--json", "--ignore-eos"]
        command += ["--num-device-batches", str(args.num_device_batches)]
        command += ["--max-tokens", str(args.max_tokens)]
        command += ["--no-refill"] if args.no_refill else []
        lines = Lines(target, target.with_name("out.jsonl.ordered"))
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        shown = 0.0
        while process.poll() is None:
            time.sleep(0.2)
            held, seconds = held_nbytes(process.pid), time.perf_counter() - started
            if held:
                samples.append((seconds, lines.update(), held))
            if held and seconds >= shown + args.every:
                shown = seconds
                sample = {"seconds": round(seconds, 1), "requests": samples[-1][1]}
                print(json.dumps({**sample, "held_gb": round(held / 1e9, 3)}), flush=True)
        assert process.stdout is not None
        report = json.load(process.stdout)
        with target.open() as file:
            ids = [json.loads(line)["id"] for line in file]
        assert ids == [f"r{number}" for number in range(args.requests)]
    print(json.dumps(summary(args, samples, report)))


def summary(args: argparse.Namespace, samples: list[tuple[float, int, int]], report: dict) -> dict:
    """The second quarter of the requests beside the last: the first one compiles."""
    requests = args.requests
    quarters = []
    for quarter in (1, 3):
        inside = [
            s for s in samples if requests * quarter / 4 <= s[1] <= requests * (quarter + 1) / 4
        ]
        # Whole windows only: from when one was written out to when another one was.
        (begun, before, _) = inside[0]
        after = inside[-1][1]
        ended = min(seconds for seconds, count, _ in inside if count == after)
        held = max(s[2] for s in inside) / 1e9
        quarters.append(((after - before) / (ended - begun), held))
    (second, held_second), (last, held_last) = quarters
    return {
        "benchmark": "jobs",
        "requests": requests,
        "max_tokens": args.max_tokens,
        "block": [args.device_batch_size, args.num_device_batches],
        "refill": not args.no_refill,
        "seconds": samples[-1][0],
        "requests_per_second": {"second quarter": second, "last quarter": last},
        "peak_held_gb": {"second quarter": held_second, "last quarter": held_last},
        "padding": report["padding"],
        "compilations": report["compilations"],
        "jax": version("jax"),
        "cores": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    main()
