"""Models with experts from disk: tokens per second with little memory, beside other programs.

Random weights of a preset's shapes. What all tokens use lies in memory, each expert on disk. Every
request has a random prompt and gets all its tokens; each run is a process of its own, after the
weights' pages were evicted. For ours also: the same block with everything in memory, without a
limit; what was read divided by the disk's speed; the share of the experts that was read, and the
share that was expected.

    python benchmarks/experts.py --work /large/disk --out experts.jsonl --limit 8GiB \\
        --llama llama.cpp/build/bin/llama-batched-bench --llama-rows 16,64,256
    python benchmarks/experts.py --work /large/disk --out experts.jsonl --limit 4GiB \\
        --model allenai/OLMoE-1B-7B-0924 --bits 0 --gen-len 8 --blocks 8x1,8x4,8x16,8x64 \\
        --cache-percent 40 --peer-python peers/bin/python --peer-rows 128
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import evict, read_bandwidth
from offload import available_limiter, limit_note, limited, limits_of, result_of
from random_gguf import write_random
from tables import experts

HERE = Path(__file__).resolve().parent


class Bench:
    """The records of one go, as they come."""

    def __init__(self, args: argparse.Namespace, out: Any) -> None:
        self.args, self._out = args, out
        self.records: list[dict[str, Any]] = []
        kind = f"{args.bits}-bits" if args.bits else "bfloat16"
        self.store = args.work / f"{Path(args.model).name}-{kind}"
        self.gguf = self.store.with_suffix(".gguf")
        self.peer_weights = self.store.with_suffix(".accelerate")

    def record(self, kind: str, values: dict[str, Any]) -> None:
        told = {
            "benchmark": "experts",
            "kind": kind,
            "model": self.args.model,
            "weight_bits": self.args.bits,
            "prompt_len": self.args.prompt_len,
            "gen_len": self.args.gen_len,
        }
        self.records.append({**told, **values})
        print(json.dumps(self.records[-1]), file=self._out, flush=True)

    def prepare(self) -> None:
        """The weights on disk, once."""
        self.args.work.mkdir(parents=True, exist_ok=True)
        if not self.store.exists():
            convert = ["convert", "--dummy", self.args.model, str(self.store)]
            convert += ["--dtype", "bfloat16"]
            convert += ["--weight-bits", str(self.args.bits)] if self.args.bits else []
            command = [sys.executable, "-m", "flexgen_jax", *convert]
            subprocess.run(command, check=True, stdout=sys.stderr)
        if self.args.llama and not self.gguf.exists():
            write_random(self.store / "config.json", self.gguf)
        if self.args.peer_python and not (self.peer_weights / "index.json").exists():
            shutil.rmtree(self.peer_weights, ignore_errors=True)  # ours, and half written
            subprocess.run([*self._peer(), "--prepare"], stdout=sys.stderr)

    def ours(self, block: tuple[int, int], limit: int | None, *, in_memory: bool) -> None:
        """One block, with the experts on disk or with everything in memory."""
        batch, num_batches = block
        told = {"name": "ours", "batch": batch, "num_batches": num_batches}
        told |= {"limit_nbytes": limit, "cache_percent": self.args.cache_percent}
        command = [sys.executable, str(HERE / "ours.py"), "--store", str(self.store)]
        command += ["--scratch", str(self.args.work / "scratch"), "--parent", str(os.getpid())]
        command += ["--batch", str(batch), "--num-batches", str(num_batches), "--no-warm-up"]
        command += ["--prompt-len", str(self.args.prompt_len), "--gen-len", str(self.args.gen_len)]
        # FlexGen's six numbers. Experts have their own two.
        cache = 100 if in_memory else self.args.cache_percent
        percent = (100, 0, cache, 0, 100, 0)
        command += ["--percent", *map(str, percent), "--schedule", self.args.schedule]
        command += ["--weight-bits", str(self.args.bits)] if self.args.bits else []
        command += [] if in_memory else ["--experts-percent", "0", "0"]
        found = self._run(command, limit)
        if "seconds" in found:
            # A later run of the same command finds its programs compiled.
            found["seconds"] = round(found["seconds"] - found.pop("compile_seconds"), 3)
            found["tokens_per_second"] = round(found["generated_tokens"] / found["seconds"], 3)
        if not in_memory and "seconds" in found:
            read = found["disk_tier_nbytes"]
            found["io_alone_seconds"] = round(read / found["disk_bytes_per_second"], 3)
        if not in_memory and "seconds" in found and self.args.cache_percent == 100:
            # All that is read are experts.
            whole = self._experts_nbytes() * self.args.gen_len
            found["experts_share"] = round(read / whole, 4)
            found["experts_share_planned"] = round(found["planned_disk_nbytes"][0] / whole, 4)
        self._told("compute" if in_memory else "run", {**told, **found})

    def llama(self, rows: int, limit: int | None) -> None:
        """llama.cpp's batched bench, its weights mapped: what does not fit is read again."""
        shared, steps = self.args.llama_shared_prompt, self.args.llama_gen_len or self.args.gen_len
        told = {"name": "llama.cpp", "batch": rows, "num_batches": 1, "limit_nbytes": limit}
        told |= {"gen_len": steps, "shared_prompt": shared}
        positions = rows * (self.args.prompt_len + steps)
        command = [str(self.args.llama), "-m", str(self.gguf), "-c", str(positions)]
        command += ["-npp", str(self.args.prompt_len), "-ntg", str(steps)]
        command += ["-pps", "-kvu"] if shared else []
        command += ["-npl", str(rows), "-t", str(os.cpu_count()), "--no-repack"]
        command += ["--output-format", "jsonl", "-b", "2048", "-ub", str(self.args.llama_ubatch)]
        evict(self.gguf.parent)
        speed = read_bandwidth(self.store)
        found = self._run(command, limit)
        if "t" in found:
            seconds = found["t"]
            found = {
                "seconds": round(seconds, 3),
                "prefill_seconds": round(found["t_pp"], 3),
                "decode_seconds": round(found["t_tg"], 3),
                "tokens_per_second": round(rows * steps / seconds, 3),
                "disk_bytes_per_second": round(speed),
            }
        self._told("run", {**told, **found})

    def accelerate(self, rows: int, limit: int | None) -> None:
        """transformers with Accelerate's disk offload: each layer is read for each batch."""
        told = {"name": "Accelerate", "batch": rows, "num_batches": 1, "limit_nbytes": limit}
        evict(self.peer_weights)
        command = [*self._peer(), "--batch", str(rows), "--parent", str(os.getpid())]
        command += ["--prompt-len", str(self.args.prompt_len), "--gen-len", str(self.args.gen_len)]
        found = self._run(command, limit)
        if "seconds" in found:
            found["tokens_per_second"] = round(found["generated_tokens"] / found["seconds"], 3)
        self._told("run", {**told, **found})

    def _peer(self) -> list[str]:
        command = [
            self.args.peer_python,
            str(HERE / "peers" / "offloaded.py"),
            "--peer",
            "accelerate",
        ]
        command += ["--config", str(self.store / "config.json")]
        return [*command, "--weights", str(self.peer_weights)]

    def _run(self, command: list[str], limit: int | None) -> dict[str, Any]:
        try:
            with limited(limit, self.args.limit_by) as (prefix, state):
                return {**state, **result_of([*prefix, *command], self.args.timeout)}
        except RuntimeError as error:
            return {"failed": str(error)}

    def _told(self, kind: str, record: dict[str, Any]) -> None:
        if "failed" in record:
            kind = "failed"
        what = f"{record['name']} {record['batch']} x {record['num_batches']} {kind}"
        figure = record.get("tokens_per_second", record.get("failed"))
        print(f"{what}: {figure}", file=sys.stderr, flush=True)
        self.record(kind, record)

    def _experts_nbytes(self) -> int:
        manifest = json.loads((self.store / "flexgen_manifest.json").read_text())
        tensors = manifest["tensors"].items()
        return sum(entry["nbytes"] for name, entry in tensors if ".expert_" in name)


def _block(text: str) -> Iterator[tuple[int, int]]:
    for part in filter(None, text.split(",")):
        batch, _, num_batches = part.partition("x")
        yield int(batch), int(num_batches or 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="Qwen/Qwen3-30B-A3B", help="of the presets, one with experts")
    add("--bits", type=int, default=4, help="of the weights; 0: bfloat16")
    add("--blocks", type=lambda text: [*_block(text)], default=[(64, 4)], metavar="64x4,...")
    add("--limit", type=limits_of, default=limits_of("8GiB"), metavar="none,8GiB,...")
    add("--limit-by", choices=("auto", "systemd", "balloon"), default="auto")
    add("--prompt-len", type=int, default=32)
    add("--gen-len", type=int, default=32)
    add("--cache-percent", type=float, default=100, help="in memory; the rest is on disk")
    add("--schedule", default="zigzag")
    add("--no-compute-alone", action="store_true", help="leave out what needs all the memory")
    add("--llama", type=Path, help="llama.cpp's llama-batched-bench, built from its sources")
    add("--llama-rows", type=lambda text: [int(n) for n in text.split(",")], default=[16])
    add("--llama-ubatch", type=int, default=512)
    add("--llama-gen-len", type=int, help="fewer decode steps than ours, which are alike")
    shared = "compute one prompt for all rows: only the decode steps are of interest"
    add("--llama-shared-prompt", action="store_true", help=shared)
    add("--peer-python", help="with torch, transformers and accelerate: bfloat16 only")
    add("--peer-rows", type=lambda text: [int(n) for n in text.split(",")], default=[16])
    add("--timeout", type=float, default=7200, help="seconds of one run")
    add("--work", type=Path, required=True, help="weights and scratch files stay here")
    add("--out", type=Path, help="append the JSON lines here instead of printing them")
    args = parser.parse_args()
    if args.limit_by == "auto":
        args.limit_by = available_limiter() if any(args.limit) else "balloon"
    return args


def main() -> None:
    args = parse()
    with args.out.open("a") if args.out else sys.stdout as out:
        bench = Bench(args, out)
        machine = {
            "cores": os.cpu_count(),
            "limit_note": limit_note(args.limit_by) if any(args.limit) else None,
        }
        bench.record("machine", machine)
        bench.prepare()
        for limit in args.limit:
            for block in args.blocks:
                bench.ours(block, limit, in_memory=False)
            for rows in args.llama_rows if args.llama else ():
                bench.llama(rows, limit)
            for rows in args.peer_rows if args.peer_python else ():
                bench.accelerate(rows, limit)
        for block in () if args.no_compute_alone else args.blocks:
            bench.ours(block, None, in_memory=True)
        print(experts(bench.records), file=sys.stderr)


if __name__ == "__main__":
    main()
