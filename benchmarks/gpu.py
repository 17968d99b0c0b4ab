"""Beside a GPU: tokens per second with weights in host memory, against what bus and cores allow.

Random bfloat16 weights of the true widths of OPT-30B, Llama-3.1-70B and Mixtral-8x7B, but only
``--layers`` of their layers: whole models would take longer to make than to run. Each record says
how many; nothing is extrapolated. Each case runs twice, and the second run counts, without what
compiling is left. Limits: the bytes that the schedule moves by the measured bus, both directions at
once, and the products with weights by the measured rate of a large one; attention is in neither.

    python benchmarks/gpu.py --out gpu.jsonl --flexgen-python flexgen/bin/python
    python benchmarks/gpu.py --tiny          # anywhere, in seconds: of no meaning but that it runs
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from offload import result_of
from tables import table

import flexgen_jax as fg
from flexgen_jax.models.params import head_table, param_records
from flexgen_jax.models.registry import preset, write_config
from scheduling.sizes import Link
from storage.pinned_memory import allow_pinned_memory, through_pinned

HERE = Path(__file__).resolve().parent
HOST = fg.Split(device=0, host=100)
CASES: dict[str, dict[str, Any]] = {
    "weights": {},
    "weights, cache": {"cache": HOST},
    "weights, cache, attention": {"cache": HOST, "host_attention": True},
    "weights in 4 bits": {"weight_bits": 4},
    "weights; unequal lengths, refill": {"refill": True},
    "weights; unequal lengths, blocks": {},
}
MODELS = {
    "facebook/opt-30b": list(CASES),
    "meta-llama/Llama-3.1-70B": ["weights", "weights, cache, attention", "weights in 4 bits"],
    "mistralai/Mixtral-8x7B-v0.1": ["weights", "weights in 4 bits"],
}
# The peers' cases that are like ours, with FlexGen's options.
FLEXGEN = {
    "weights": "--percent 0 100 100 0 100 0",
    "weights, cache, attention": "--percent 0 100 0 100 100 0 --cpu-cache-compute",
    "weights in 4 bits": "--percent 0 100 100 0 100 0 --compress-weight",
}
_TINY = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def shape_of(name: str, layers: int, *, tiny: bool) -> Any:
    """The preset's config with fewer layers, and if ``tiny`` with next to no width."""
    config: Any = preset(name)
    there = {field.name for field in dataclasses.fields(config)}
    narrow = {key: value for key, value in _TINY.items() if tiny and key in there}
    return dataclasses.replace(config, num_hidden_layers=layers, **narrow)


def _rate(call: Callable[[Any], Any], made: Callable[[], Any], amount: float) -> float:
    """``amount`` by the median seconds of ``call`` with what ``made`` gives anew each time."""
    found = []
    for _ in range(6):
        given = jax.block_until_ready(made())
        started = time.perf_counter()
        jax.block_until_ready(call(given))
        found.append(time.perf_counter() - started)
    return amount / statistics.median(found[1:])


def machine(*, tiny: bool) -> dict[str, float]:
    """Bytes per second of the bus, and FLOP per second of a matrix product in bfloat16."""
    device = jax.local_devices()[0]
    here = jax.sharding.SingleDeviceSharding(device)
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    nbytes, width = (1 << 20, 128) if tiny else (1 << 28, 8192)
    there = jax.device_put(np.ones(nbytes, np.uint8), pinned)
    array = jax.device_put(there, here)
    matrix = jax.device_put(np.ones((width, width), jnp.bfloat16), here)
    product = jax.jit(jnp.matmul)
    # Anew each time: JAX keeps the NumPy array that was made of one.
    fresh = jax.jit(lambda x: x + np.uint8(1))
    return {
        "host_to_device": _rate(lambda x: jax.device_put(x, here), lambda: there, nbytes),
        "device_to_host": _rate(lambda x: jax.device_put(x, pinned), lambda: array, nbytes),
        "device_to_numpy": _rate(np.asarray, lambda: fresh(array), nbytes),
        "device_to_numpy_through_pinned": _rate(
            lambda x: through_pinned([x], pinned), lambda: fresh(array), nbytes
        ),
        "matmul_flops": _rate(lambda x: product(x, x), lambda: matrix, 2.0 * width**3),
    }


def flops(config: Any, positions: int, tokens: int) -> float:
    """Of the products with weights, for so many positions, of which so many gave a token."""
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    records = param_records(config)
    head = 2.0 * np.prod(records[head_table(config)].shape)
    layers = sum(
        2.0 * np.prod(record.shape) * (share if ".expert_" in name else 1)
        for name, record in records.items()
        if record.role == "matrix" and name.startswith("layer_")
    )
    return layers * positions + head * tokens


class Bench:
    """The records of one go, as they come."""

    def __init__(self, args: argparse.Namespace, work: Path, out: Any) -> None:
        self.args, self._work, self._out = args, work, out
        self.records: list[dict[str, Any]] = []
        self._begun = time.perf_counter()
        self._speeds: dict[str, float] = {}

    def record(self, kind: str, values: dict[str, Any]) -> None:
        self.records.append({"benchmark": "gpu", "kind": kind, **values})
        print(json.dumps(self.records[-1]), file=self._out, flush=True)

    def _told(self, model: str, case: str, tool: str) -> dict[str, Any]:
        args = self.args
        block = {"block": [args.batch, args.num_batches], "layers": args.layers, "tiny": args.tiny}
        lengths = {"prompt_len": args.prompt_len, "gen_len": args.gen_len}
        return {"tool": tool, "model": model, "case": case, **block, **lengths}

    def over(self) -> bool:
        """Whether no more is begun."""
        return time.perf_counter() - self._begun > 60 * self.args.minutes

    def peers(self, model: str) -> None:
        """Others on the same shapes, each in a process of its own, before JAX takes the device."""
        args, config = self.args, shape_of(model, self.args.layers, tiny=self.args.tiny)
        folder = self._work / f"{Path(model).name}-config"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(write_config(config)))
        nbytes = 2 * sum(float(np.prod(r.shape)) for r in param_records(config).values())
        jobs = [("vLLM", args.vllm_python, "weights", f"--gb {nbytes / 2**30:.2f}")]
        if model == "facebook/opt-30b":
            jobs += [("FlexGen", args.flexgen_python, case, o) for case, o in FLEXGEN.items()]
        for tool, python, case, options in jobs:
            told = self._told(model, case, tool)
            if python is None or self.over():
                why = f"no --{tool.lower()}-python was given" if python is None else "out of time"
                self.record("skipped", {**told, "skipped": why})
                continue
            command = [python, str(HERE / "peers" / "on_gpu.py"), tool.lower()]
            command += ["--folder", str(folder), "--batch", str(args.batch)]
            command += ["--num-batches", str(args.num_batches), "--layers", str(args.layers)]
            command += ["--prompt-len", str(args.prompt_len), "--gen-len", str(args.gen_len)]
            found = result_of([*command, *options.split()], args.timeout)
            kind = next((kind for kind in ("failed", "skipped") if kind in found), "run")
            self.record(kind, {**told, **found})

    def measure(self) -> None:
        """What the limits are made of."""
        device = jax.local_devices()[0]
        self._speeds = machine(tiny=self.args.tiny)
        about = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
        self.record("machine", {**about, "cores": os.cpu_count(), **self._speeds})

    def ours(self, model: str) -> None:
        """The cases of a model that there is time for; weights that cases share are made once."""
        args = self.args
        config = shape_of(model, args.layers, tiny=args.tiny)
        for case in MODELS[model]:
            told = self._told(model, case, "flexgen-jax")
            if self.over():
                self.record("skipped", {**told, "skipped": "out of time"})
                continue
            choices = {"refill": False, **CASES[case]}
            policy = fg.Policy(
                device_batch_size=args.batch,
                num_device_batches=args.num_batches,
                weights=HOST,
                **choices,
            )
            bits = policy.weight_bits
            store = self._work / f"{Path(model).name}-{args.layers}-{bits or 16}"
            if not store.exists():
                fg.convert_dummy(config, store, dtype="bfloat16", weight_bits=bits)
            print(f"{model}, {case} ...", file=sys.stderr, flush=True)
            try:
                found = self._run(config, store, policy, unequal="unequal" in case)
                self.record("run", {**told, **found})
            except (RuntimeError, ValueError, fg.ExecutionError) as error:
                self.record("failed", {**told, "failed": f"{type(error).__name__}: {error}"[:500]})

    def _run(self, config: Any, store: Path, policy: fg.Policy, *, unequal: bool) -> dict[str, Any]:
        args, draw = self.args, np.random.default_rng(0)
        count = policy.block_size * (3 if unequal else 1)
        prompts = draw.integers(4, 1000, (count, args.prompt_len)).tolist()
        ends = draw.integers(1, args.gen_len + 1, count) if unequal else [args.gen_len] * count
        params = [
            fg.SamplingParams(temperature=0.0, max_tokens=int(end), ignore_eos=True) for end in ends
        ]
        with fg.LLM(
            str(store),
            policy=policy,
            dtype="bfloat16",
            offload_dir=str(self._work),
            profile=False,
        ) as llm:
            for _ in range(2):  # the first compiles
                llm.generate(prompts, params, use_tqdm=False)
            report = llm.report
        assert report is not None
        seconds = report.seconds - report.compile_seconds
        tokens, speeds = report.generated_tokens, self._speeds
        bus = max(
            report.moved[Link.HOST_TO_DEVICE] / speeds["host_to_device"],
            report.moved[Link.DEVICE_TO_HOST] / speeds["device_to_host"],
        )
        computing = flops(config, report.prompt_tokens + tokens, tokens) / speeds["matmul_flops"]
        return {
            "tokens_per_second": round(tokens / seconds, 2),
            "seconds": round(seconds, 3),
            "bus_limit": round(tokens / bus, 2) if bus else None,
            "flop_limit": round(tokens / computing, 2),
            "of_the_limit": round(max(bus, computing) / seconds, 3),
            "occupancy": round(report.occupancy, 3),
            "streams": {
                name: round(stream["busy_seconds"], 3)
                for name, stream in report.timeline.summary().items()
            },
            "peak_nbytes": {tier.value: n for tier, n in report.peak_bytes.items()},
        }


def gpu(records: list[dict[str, Any]]) -> str:
    """The table of the runs, and of what was left out."""
    rows = []
    for r in records:
        if r["kind"] == "machine":
            continue
        first = f"{r['model']}, {r['layers']} layers"
        if r["kind"] != "run":
            why = r.get("failed") or r["skipped"]
            rows.append((first, r["case"], r["tool"], r["kind"], why, "", ""))
            continue
        limits = [f"{r[n]:.1f}" if r.get(n) else "" for n in ("bus_limit", "flop_limit")]
        share = f"{r['of_the_limit']:.0%}" if "of_the_limit" in r else ""
        rate = f"{r['tokens_per_second']:.1f}"
        rows.append((first, r["case"], r["tool"], rate, *limits, share))
    header = ("model", "in host memory", "tool", "tokens/s", "bus allows", "FLOP/s allow", "share")
    return table(header, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", action="append", choices=list(MODELS), help="again for more; all by default")
    add("--layers", type=int, default=2, help="of each model")
    add("--batch", type=int, help="requests of a device batch: 64, or 2 with --tiny")
    add("--num-batches", type=int, default=4)
    add("--prompt-len", type=int, help="tokens: 128, or 8 with --tiny")
    add("--gen-len", type=int, help="new tokens: 16, or 4 with --tiny")
    add("--minutes", type=float, default=6, help="after which no case is begun any more")
    add("--timeout", type=float, default=120, help="seconds of one run of a peer")
    add("--flexgen-python", help="of an environment with FlexGen's package, flexgen")
    add("--vllm-python", help="of an environment with vLLM")
    add("--tiny", action="store_true", help="next to no width: to see that all of it runs")
    add("--work", type=Path, help="where weights lie and stay; a temporary directory otherwise")
    add("--out", type=Path, help="append the JSON lines here instead of printing them")
    args = parser.parse_args()
    args.batch = args.batch or (2 if args.tiny else 64)
    args.prompt_len = args.prompt_len or (8 if args.tiny else 128)
    args.gen_len = args.gen_len or (4 if args.tiny else 16)
    return args


def main() -> None:
    args = parse()
    allow_pinned_memory()
    with (
        tempfile.TemporaryDirectory(prefix="flexgen-jax-bench-") as scratch,
        args.out.open("a") if args.out else sys.stdout as out,
    ):
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, work, out)
        models = args.model or list(MODELS)
        for model in models:
            bench.peers(model)
        bench.measure()
        for model in models:
            bench.ours(model)
        print(gpu(bench.records), file=sys.stderr)


if __name__ == "__main__":
    main()
