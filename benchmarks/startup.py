"""Seconds to import the library and to print the help, beyond those of the bare interpreter.

python benchmarks/startup.py >> results.jsonl
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "interpreter": ["-c", "pass"],
    "import flexgen_jax": ["-c", "import flexgen_jax"],
    "flexgen-jax --help": ["-m", "flexgen_jax", "--help"],
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
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
