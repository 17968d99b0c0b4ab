"""Peak resident memory, page cache aside, of converting and of generating with weights on disk.

Each command runs as its own process; what it holds is sampled from ``/proc`` every 5 ms: anonymous
and shared pages, not the pages of mapped files, which the kernel takes back when it needs them.

    python benchmarks/memory.py --model facebook/opt-1.3b >> results.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def held_nbytes(pid: int) -> int:
    """Bytes of anonymous and shared memory of a process; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(fields.get(k, "0 kB").split()[0]) for k in ("RssAnon", "RssShmem")) * 1024


def peak_nbytes(arguments: list[str]) -> tuple[int, float]:
    """Runs ``flexgen-jax`` with ``arguments``; its peak held bytes and its seconds."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "flexgen_jax", *arguments])
    peak = 0
    while process.poll() is None:
        peak = max(peak, held_nbytes(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"flexgen-jax {' '.join(arguments)} failed")
    return peak, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="facebook/opt-1.3b", help="a preset")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-bench-") as scratch:
        store, source = Path(scratch) / "store", Path(scratch) / "in.jsonl"
        lines = [{"prompt_token_ids": [2 + i] * args.prompt_len} for i in range(args.requests)]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        convert = ["convert", "--dummy", args.model, str(store), "--dtype", args.dtype]
        generate = ["generate", "--model", str(store), "--dtype", args.dtype, "--quiet"]
        generate += ["-i", str(source), "-o", str(Path(scratch) / "out.jsonl"), "--ignore-eos"]
        generate += [
            "--percent",
            *["0", "0", "100", "0", "100", "0"],
            "--max-tokens",
            str(args.max_tokens),
        ]
        commands = {"convert": convert, "generate, mapped": [*generate, "--disk-mode", "mapped"]}
        commands["generate, direct"] = [*generate, "--disk-mode", "direct"]
        for name, arguments in commands.items():
            peak, seconds = peak_nbytes(arguments)
            record = {
                "benchmark": "memory",
                "command": name,
                "model": args.model,
                "dtype": args.dtype,
                "prompt_len": args.prompt_len,
                "requests": args.requests,
                "max_tokens": args.max_tokens,
                "peak_nbytes": peak,
                "peak_gb": round(peak / 1e9, 3),
                "seconds": round(seconds, 1),
                "python": sys.version.split()[0],
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
