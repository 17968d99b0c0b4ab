"""Seconds to import the library and to print the help, beyond those of the bare interpreter.

With a model, also those of a job of one new token, from its command to its end: without programs
that an earlier process has kept, and with them (``FLEXGEN_JAX_PROGRAMS``).

    python benchmarks/startup.py >> results.jsonl
    python benchmarks/startup.py smollm2-135m      # made by examples/smollm2.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {
    "interpreter": ["-c", "pass"],
    "import flexgen_jax": ["-c", "import flexgen_jax"],
    "flexgen-jax --help": ["-m", "flexgen_jax", "--help"],
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def first_token(model: str, repeats: int) -> None:
    """Jobs whose programs are compiled, and jobs that find them."""
    with tempfile.TemporaryDirectory() as name:
        where, job = Path(name), ["-m", "flexgen_jax", "generate", "--model", model, "--json"]
        (where / "in.jsonl").write_text('{"prompt": "The tide comes in", "max_tokens": 1}\n')
        for programs, kept in (("off", "none"), (where / "programs", "all")):
            environment = {**os.environ, "FLEXGEN_JAX_PROGRAMS": str(programs)}
            environment["FLEXGEN_JAX_CACHE"] = str(where / "cache")
            times, compiling = [], []
            for number in range(repeats + 1):
                output = where / f"{kept}-{number}.jsonl"
                started = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, *job, "-i", where / "in.jsonl", "-o", output],
                    env=environment,
                    check=True,
                    capture_output=True,
                )
                if number:  # the first has converted, and kept, what there is to keep
                    times.append(time.perf_counter() - started)
                    compiling.append(json.loads(done.stdout)["compile_seconds"])
            record = {
                "benchmark": "first_token",
                "model": Path(model).name,
                "kept_programs": kept,
                "seconds": round(statistics.median(times), 2),
                "compile_seconds": round(statistics.median(compiling), 2),
                "repeats": repeats,
                "python": sys.version.split()[0],
            }
            print(json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="Measure a job of one new token of this model.")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.model is not None:
        first_token(args.model, args.repeats)
        return
    times = {name: [] for name in COMMANDS}
    for _ in range(11):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    bare = statistics.median(times["interpreter"])
    for name, values in times.items():
        median = statistics.median(values)
        record = {
            "benchmark": "startup",
            "command": name,
            "seconds": round(median, 3),
            "beyond_interpreter": round(median - bare, 3),
            "python": sys.version.split()[0],
        }
        print(json.dumps(record))


if __name__ == "__main__":
    main()
