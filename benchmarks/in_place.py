"""A float16 checkpoint used where it lies beside the store converted from it; prints JSON lines.

Of each model's shapes, with random weights: seconds from starting the process to the first token
(of the store, converting included), bytes on disk, tokens/s of decoding with the weights on disk
(page cache warm) and in memory, and what the checks of the first reading take of a run. The two
forms take turns, and medians are compared.

    python benchmarks/in_place.py --out benchmarks/results.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import flexgen_jax as fg
from flexgen_jax.models.params import param_records
from flexgen_jax.models.registry import family_of, preset, write_config
from flexgen_jax.weights.checkpoint import open_model
from storage.checksums import is_finite, tensor_checksum

MODELS = ("facebook/opt-1.3b", "meta-llama/Llama-3.2-1B")
TIERS = {"disk": fg.Split(device=0, disk=100), "memory": fg.Split(device=0, host=100)}
ROWS, PROMPT, NEW = 8, 16, 6


def make(model: str, directory: Path) -> None:
    """Safetensors in float16 as Hugging Face has them, of random weights."""
    config = preset(model)
    family = family_of(config)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(write_config(config), allow_nan=False))
    header: dict[str, Any] = {}
    at = 0
    for name, record in param_records(config).items():
        source = family.source(config, name)
        shape = record.shape[::-1] if source.transposed else record.shape
        end = at + 2 * int(np.prod(shape))
        header[source.key] = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    drawn = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    some = (drawn * 0.02).astype(np.float16).tobytes()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(at, 0, -len(some)):
            file.write(some[:left])
        file.flush()
        os.fsync(file.fileno())  # what is still to be written takes the disk from what is measured


def nbytes_of(directory: Path) -> int:
    """Of all files."""
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def policy(tier: str) -> fg.Policy:
    """One batch, with only the weights elsewhere."""
    return fg.Policy(device_batch_size=ROWS, num_device_batches=1, weights=TIERS[tier])


def generate(llm: fg.LLM, new: int) -> None:
    """As many tokens for each request."""
    prompts = [{"prompt_token_ids": [5 + row] * PROMPT} for row in range(ROWS)]
    llm.generate(prompts, fg.SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True))


def first_token(model: Path, convert_to: Path | None) -> float:
    """Seconds of a process that ends with it."""
    code = [sys.executable, __file__, "--first", str(model)]
    started = time.perf_counter()
    subprocess.run([*code, *([str(convert_to)] if convert_to else [])], check=True)
    return time.perf_counter() - started


def decode_rate(llm: fg.LLM) -> float:
    """Tokens/s of the steps after the first, which has the prompt."""
    started = time.perf_counter()
    generate(llm, 1)
    once = time.perf_counter() - started
    started = time.perf_counter()
    generate(llm, NEW)
    return ROWS * (NEW - 1) / (time.perf_counter() - started - once)


def rates(models: dict[str, Path], tier: str, rounds: int) -> dict[str, float]:
    """Medians over turns."""
    found: dict[str, list[float]] = {form: [] for form in models}
    opened = {form: fg.LLM(str(path), policy=policy(tier)) for form, path in models.items()}
    try:
        for llm in opened.values():
            generate(llm, 2)  # compiles, reads
        for turn in range(rounds):
            for form in list(opened)[:: 1 if turn % 2 else -1]:
                found[form].append(decode_rate(opened[form]))
    finally:
        for llm in opened.values():
            llm.close()
        opened.clear()
        gc.collect()
    return {form: statistics.median(values) for form, values in found.items()}


def checking_seconds(model: Path) -> float:
    """What the checks of the first reading take, of what lies in the page cache."""
    files = open_model(model).arrays.values()
    total = 0.0
    for file in files:
        content = np.fromfile(
            file.chunk, file.dtype, int(np.prod(file.shape)), "", file.offset or 0
        )
        started = time.perf_counter()
        if file.checksum is not None:
            tensor_checksum(content.view(np.uint8))
        if file.finite:
            is_finite(content)
        total += time.perf_counter() - started
    return total


def measured(model: str, scratch: Path, rounds: int) -> dict[str, Any]:
    """The record of one model."""
    source, store = scratch / "source", scratch / "store"
    make(model, source)
    first = {"in place": first_token(source, None), "converted": first_token(source, store)}
    first["converted before"] = first_token(store, None)
    models = {"in place": source, "converted": store}
    steady = {tier: rates(models, tier, rounds) for tier in TIERS}
    checks = {form: checking_seconds(path) for form, path in models.items()}
    return {
        "benchmark": "in_place",
        "model": model,
        "source_dtype": "float16",
        "dtype": "bfloat16",
        "rows": ROWS,
        "prompt_len": PROMPT,
        "first_token_seconds": {k: round(v, 2) for k, v in first.items()},
        "disk_nbytes": {
            "in place": nbytes_of(source),
            "converted": nbytes_of(source) + nbytes_of(store),
        },
        "decode_tokens_per_second": steady,
        "of_converted": {
            tier: found["in place"] / found["converted"] for tier, found in steady.items()
        },
        "checking_seconds": {k: round(v, 3) for k, v in checks.items()},
        # Of the shortest run there is: one token.
        "checking_share": {k: round(v / first["in place"], 4) for k, v in checks.items()},
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
    }


def main() -> None:
    if sys.argv[1:2] == ["--first"]:
        model, *store = sys.argv[2:]
        if store:
            model = str(fg.convert(model, store[0]))
        with fg.LLM(model, policy=policy("disk")) as llm:
            generate(llm, 1)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="presets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append here instead of printing")
    args = parser.parse_args()
    os.environ["FLEXGEN_JAX_PROGRAMS"] = "off"  # else the first form compiles for the second
    with args.out.open("a") if args.out else sys.stdout as out:
        for model in args.models:
            scratch = Path(tempfile.mkdtemp(prefix="flexgen-jax-bench-"))
            try:
                print(json.dumps(measured(model, scratch, args.rounds)), file=out, flush=True)
            finally:
                shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
