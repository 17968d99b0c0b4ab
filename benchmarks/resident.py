"""Is the memory that a plan promises what a run takes? Policies, each a process of its own.

Random weights; the disk is read past the page cache, so that all that the process holds is its own.
The kernel's highest count of resident bytes (``VmHWM``), without pages of the weights' files, is
held against the plan, made before with the same policy; Python, its libraries and compiled programs
are in both.

    python benchmarks/resident.py --work /large/disk --out resident.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import flexgen_jax as fg
from flexgen_jax.models.registry import preset

DENSE, SPARSE = "opt-125m", "olmoe, small"
DISK = {"device": 0, "disk": 100}
HOST = {"device": 0, "host": 100}
MIXED = {"device": 40, "host": 30, "disk": 30}
# Name -> model, block, fields of the policy, and of the job what is not as usual.
CASES: dict[str, tuple[str, tuple[int, int], dict[str, Any], dict[str, Any]]] = {
    "all on the device": (DENSE, (16, 2), {}, {}),
    "many batches": (DENSE, (8, 8), {}, {}),
    "all in host memory": (DENSE, (16, 2), {"weights": HOST, "cache": HOST, "hidden": HOST}, {}),
    "weights on disk": (DENSE, (16, 2), {"weights": DISK}, {}),
    "weights and cache on disk": (DENSE, (16, 2), {"weights": DISK, "cache": DISK}, {}),
    "all on disk": (DENSE, (16, 4), {"weights": DISK, "cache": DISK, "hidden": DISK}, {}),
    "spread over the tiers": (
        DENSE,
        (16, 2),
        {"weights": MIXED, "cache": MIXED, "hidden": MIXED},
        {},
    ),
    "no overlap": (DENSE, (16, 2), {"weights": DISK, "overlap": False}, {}),
    "4-bit weights": (DENSE, (16, 2), {"weight_bits": 4}, {}),
    "4-bit weights on disk": (DENSE, (16, 2), {"weights": DISK, "weight_bits": 4}, {}),
    "4-bit cache": (DENSE, (16, 4), {"cache_bits": 4}, {}),
    "8-bit cache in host memory": (DENSE, (16, 4), {"cache": HOST, "cache_bits": 8}, {}),
    "sparse attention": (DENSE, (16, 2), {"cache": HOST, "attention_sparsity": 0.2}, {}),
    "attention on the host": (DENSE, (16, 4), {"cache": HOST, "host_attention": True}, {}),
    "no refill": (DENSE, (16, 2), {"refill": False}, {}),
    "refill": (DENSE, (16, 2), {}, {"times": 3, "vary": True}),
    "long prompts": (DENSE, (4, 2), {}, {"prompt_len": 256}),
    "diagonal": (DENSE, (8, 4), {"weights": DISK}, {"schedule": "diagonal"}),
    "experts on the device": (SPARSE, (16, 2), {}, {}),
    "experts on disk": (SPARSE, (16, 2), {"experts": DISK}, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--work", type=Path, help="keep the stores here")
    parser.add_argument("--prepare", action="store_true", help="only make the stores in --work")
    parser.add_argument("--out", type=Path, help="append here instead of printing")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one, args.work)))
        return
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-bench-") as scratch:
        work = args.work or Path(scratch)
        for name in args.cases:
            store_of(name, work)  # or the process would hold what converting takes
        if args.prepare:
            return
        with args.out.open("a") if args.out else sys.stdout as out:
            for name in args.cases:
                command = [sys.executable, __file__, "--one", name, "--work", str(work)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                record = json.loads(done.stdout.splitlines()[-1])
                print(json.dumps(record), file=out, flush=True)
                ratio = record["planned_bytes"] / record["peak_bytes"]
                print(f"{name}: {ratio:.2f}", file=sys.stderr)


def store_of(name: str, work: Path) -> Path:
    """Weights of the case's model, in its bits."""
    model, _, fields, _ = CASES[name]
    bits = fields.get("weight_bits")
    store = work / f"{model.replace(', ', '-')}-{bits or 32}"
    if not store.exists():
        work.mkdir(parents=True, exist_ok=True)
        config: Any = preset("facebook/opt-125m")
        if model == SPARSE:
            config = preset("allenai/OLMoE-1B-7B-0924")
            # A few hundred megabytes.
            config = dataclasses.replace(
                config,
                num_hidden_layers=6,
                hidden_size=512,
                num_attention_heads=8,
                num_key_value_heads=8,
                head_dim=64,
                rope=dataclasses.replace(config.rope, dim=64),
                moe_intermediate_size=512,
                num_experts=32,
            )
        fg.convert_dummy(config, store, dtype="float32", weight_bits=bits)
    return store


def measured(name: str, work: Path) -> dict[str, Any]:
    """Plans a case, runs it, and says what this process has taken."""
    model, (batch, batches), fields, job = CASES[name]
    splits = {k: fg.Split(**v) if isinstance(v, dict) else v for k, v in fields.items()}
    policy = fg.Policy(device_batch_size=batch, num_device_batches=batches, **splits)
    prompt_len, gen_len = job.get("prompt_len", 32), 8
    schedule = job.get("schedule", "zigzag")
    hardware = fg.Hardware.preset("laptop")
    store = str(store_of(name, work))
    found = fg.plan(
        store,
        policy,
        hardware,
        prompt_len=prompt_len,
        gen_len=gen_len,
        schedule=schedule,
        dtype="float32",
    )
    count = policy.block_size * job.get("times", 1)
    prompts, params = [], []
    for i in range(count):
        # Of unequal lengths the first are the longest.
        shorter = (i * 7) % gen_len if job.get("vary") and i else 0
        prompts.append([2 + i % 97] * (prompt_len - 2 * shorter))
        tokens = gen_len - shorter
        params.append(fg.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
    with (
        tempfile.TemporaryDirectory(dir=work) as scratch,
        fg.LLM(
            store,
            dtype="float32",
            policy=policy,
            schedule=schedule,
            offload_dir=scratch,
            hardware=hardware,
            disk=fg.DiskContext(mode="direct"),
        ) as llm,
    ):
        llm.generate(prompts, params)
        assert llm.report is not None
        report = llm.report
        peak = peak_bytes() - mapped_bytes(work)
    return {
        "benchmark": "resident",
        "case": name,
        "model": model,
        "block": [batch, batches],
        "prompt_len": prompt_len,
        "gen_len": gen_len,
        "requests": count,
        "planned_bytes": found.memory.host_bytes,
        "peak_bytes": peak,
        "seen_bytes": report.process_bytes,
        "placed_bytes": sum(found.peak_bytes[t] for t in (fg.Tier.DEVICE, fg.Tier.HOST)),
        "held_bytes": sum(report.peak_bytes[t] for t in (fg.Tier.DEVICE, fg.Tier.HOST)),
        "workspace_bytes": found.workspace_bytes,
        "python": sys.version.split()[0],
    }


def peak_bytes() -> int:
    """The most resident memory that this process ever had, by the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM: this needs Linux")


def mapped_bytes(directory: Path) -> int:
    """Resident pages of files below ``directory``, which the system takes back when it needs them:
    of the token table, whose rows are looked up in the file."""
    total, below = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split(maxsplit=5)
        if not first.endswith(":"):
            below = len(others) == 5 and others[4].startswith(str(directory.resolve()))
        elif first == "Rss:" and below:
            total += int(others[0]) * 1024
    return total


if __name__ == "__main__":
    main()
