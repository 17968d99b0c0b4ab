"""Tokens per second beside Hugging Face transformers and Accelerate: same shapes, same machine.

All in one go, so that what is compared ran side by side: transformers in memory, Accelerate with
everything on disk, and ours with everything on the device, with the weights on disk, and with
weights and cache on disk; then the offloaded ones with little memory left, page cache included.
Random bfloat16 weights of a preset's shapes, greedy, every request gets all its tokens. Each run is
a process of its own. For ours also: the same block computed with everything on the device, what was
read divided by the disk's speed, and the ratio of the whole to the larger of the two.

    python benchmarks/offload.py --peer-python peers/bin/python --out offload.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from balloon import balloon
from machine import available_nbytes
from tables import table

HERE = Path(__file__).resolve().parent
PEERS = ("hf", "accelerate", "flexgen")
# FlexGen's six numbers: weights, cache, hidden on device and on host; the rest on disk.
POLICIES: dict[str, tuple[tuple[float, ...], dict[str, Any]]] = {
    "device": ((100, 0, 100, 0, 100, 0), {}),
    "weights-disk": ((0, 0, 100, 0, 100, 0), {}),
    "cache-disk": ((0, 0, 0, 0, 100, 0), {}),
}
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Config:
    """What one process runs. ``percent`` is None for a peer."""

    name: str
    batch: int
    num_batches: int = 1
    percent: tuple[float, ...] | None = None
    weight_bits: int | None = None
    cache_bits: int | None = None
    sparsity: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch, self.num_batches

    @property
    def in_memory(self) -> bool:
        """Nothing of it is on disk: the plain race, pointless where memory is short."""
        if self.percent is None:
            return self.name == "hf"
        return all(sum(self.percent[i : i + 2]) == 100 for i in (0, 2, 4))


class Bench:
    """The records of one go, as they come."""

    def __init__(self, args: argparse.Namespace, out: Any) -> None:
        self.args, self._out = args, out
        self.records: list[dict[str, Any]] = []
        self.store = args.store or args.work / f"{Path(args.preset).name}-bfloat16-store"
        self.peer_weights = args.work / f"{Path(args.preset).name}-bfloat16-accelerate"

    def record(self, kind: str, values: dict[str, Any]) -> None:
        record = {"benchmark": self.args.label, "kind": kind, **values}
        self.records.append(record)
        print(json.dumps(record), file=self._out, flush=True)

    def prepare(self, configs: list[Config]) -> None:
        """The weights on disk, once."""
        self.args.work.mkdir(parents=True, exist_ok=True)
        if not self.store.exists():  # the peers take their shapes from its config.json
            convert = ["convert", "--dummy", self.args.preset, str(self.store)]
            command = [sys.executable, "-m", "flexgen_jax", *convert, "--dtype", "bfloat16"]
            subprocess.run(command, check=True, stdout=sys.stderr)
        manifest = json.loads((self.store / "flexgen_manifest.json").read_text())
        is_preset = Path(self.args.preset).name in manifest["source"]["name"]
        if manifest["dtype"] != "bfloat16" or not is_preset:
            raise SystemExit(f"{self.store} is not {self.args.preset} in bfloat16")
        # A peer that cannot prepare says why when it is run.
        wanted = any(c.name == "accelerate" for c in configs) and self.args.peer_python
        if wanted and not (self.peer_weights / "index.json").exists():
            shutil.rmtree(self.peer_weights, ignore_errors=True)  # ours, and half written
            subprocess.run([*self._peer("accelerate"), "--prepare"], stdout=sys.stderr)

    def _peer(self, name: str) -> list[str]:
        command = [self.args.peer_python, str(HERE / "peers" / "offloaded.py"), "--peer", name]
        command += ["--config", str(self.store / "config.json"), "--parent", str(os.getpid())]
        return command + (["--weights", str(self.peer_weights)] if name == "accelerate" else [])

    def _command(self, config: Config) -> list[str]:
        if config.percent is None:
            command = self._peer(config.name)
        else:
            command = [sys.executable, str(HERE / "ours.py"), "--store", str(self.store)]
            command += ["--scratch", str(self.args.work / "scratch"), "--parent", str(os.getpid())]
            command += ["--percent", *map(str, config.percent)]
            command += ["--num-batches", str(config.num_batches)]
            if config.weight_bits:
                command += ["--weight-bits", str(config.weight_bits)]
            if config.cache_bits:
                command += ["--cache-bits", str(config.cache_bits)]
            command += ["--sparsity", str(config.sparsity), "--throttle", str(self.args.throttle)]
            command += ["--disk-mode", self.args.disk_mode]
            command += ["--chunk-positions", str(self.args.chunk_positions)]
        command += ["--batch", str(config.batch), "--prompt-len", str(self.args.prompt_len)]
        return [*command, "--gen-len", str(self.args.gen_len)]

    def needed_nbytes(self, config: Config) -> int:
        """Weights and cache in memory: what surely does not fit is not tried."""
        if config.percent is None and config.name != "hf":
            return 0
        weights, cache = 100.0, 100.0
        if config.percent is not None:
            weights, cache = sum(config.percent[:2]), sum(config.percent[2:4])
        shapes = json.loads((self.store / "config.json").read_text())
        per_token = 4 * shapes["num_hidden_layers"] * shapes["hidden_size"]
        tokens = config.batch * config.num_batches * (self.args.prompt_len + self.args.gen_len)
        stored = sum(f.stat().st_size for f in self.store.rglob("*") if f.is_file())
        # Codes, and two bfloat16 for 64 of them.
        weights *= (config.weight_bits + 0.5) / 16 if config.weight_bits else 1
        cache *= (config.cache_bits + 0.5) / 16 if config.cache_bits else 1
        return round((weights * stored + cache * tokens * per_token) / 100)

    def run(self, config: Config, limit: int | None, repeat: int, kind: str = "run") -> None:
        told = {
            "name": config.name,
            "batch": config.batch,
            "num_batches": config.num_batches,
            "percent": config.percent,
            "weight_bits": config.weight_bits,
            "cache_bits": config.cache_bits,
            "sparsity": config.sparsity,
            "throttle": self.args.throttle,
            "preset": self.args.preset,
            "prompt_len": self.args.prompt_len,
            "gen_len": self.args.gen_len,
            "limit_nbytes": limit,
            "limit_by": self.args.limit_by if limit else None,
            "repeat": repeat,
        }
        needed = self.needed_nbytes(config)
        if config.percent is None and not self.args.peer_python:
            return self.record("skipped", {**told, "reason": "no --peer-python"})
        if needed > (limit or available_nbytes()):
            reason = f"weights and cache in memory take {needed / 1e9:.1f} GB"
            return self.record("skipped", {**told, "reason": reason})
        _say(f"{_shown(limit)}: {config.name} {config.batch}x{config.num_batches} ...")
        try:
            with limited(limit, self.args.limit_by) as (prefix, state):
                result = result_of([*prefix, *self._command(config)], self.args.timeout)
        except RuntimeError as error:
            result, state = {"failed": str(error)}, {}
        if "skipped" in result:
            return self.record("skipped", {**told, "reason": result["skipped"]})
        if "failed" in result:
            return self.record("failed", {**told, **state, "reason": result["failed"]})
        rate = result["generated_tokens"] / result["seconds"]
        _say(f"    {rate:.2f} tokens/s")
        return self.record(kind, {**told, **state, "tokens_per_second": round(rate, 3), **result})

    def summarise(self) -> None:
        """Per configuration: medians over the repeats, and against the two lower limits."""
        runs: dict[tuple, list[dict[str, Any]]] = {}
        for r in self.records:
            if r["kind"] == "run":
                key = (r["limit_nbytes"], r["name"], r["batch"], r["num_batches"])
                runs.setdefault(key, []).append(r)
        computed = {
            (r["batch"], r["num_batches"], r["repeat"]): r["seconds"]
            for r in self.records
            if r["kind"] in ("run", "compute") and r["name"] == "ours-device"
        }
        best: dict[tuple, float] = {}
        for (limit, name, *_), repeats in runs.items():
            rate = statistics.median(r["tokens_per_second"] for r in repeats)
            best[limit, name] = max(rate, best.get((limit, name), 0))
        for (limit, name, batch, num_batches), repeats in runs.items():
            names = ("tokens_per_second", "seconds", "prefill_seconds", "decode_seconds")
            names += ("peak_rss_nbytes", "peak_anon_nbytes", "read_nbytes", "disk_bytes_per_second")
            medians = {n: statistics.median(r[n] for r in repeats) for n in names}
            fields = ("preset", "prompt_len", "gen_len", "percent", "weight_bits", "cache_bits")
            fields += ("sparsity", "throttle", "placed_nbytes", "planned_disk_nbytes")
            fields += ("disk_tier_nbytes", "disk_tier_written_nbytes")
            told = {n: repeats[0][n] for n in fields if n in repeats[0]}
            summary = {**told, "limit_nbytes": limit, "name": name, "batch": batch, **medians}
            summary["num_batches"] = num_batches
            summary["spread"] = [f(r["tokens_per_second"] for r in repeats) for f in (min, max)]
            summary["best"] = medians["tokens_per_second"] == best[limit, name]
            summary["repeats"] = len(repeats)
            summary.update(_bounds(repeats, computed))
            self.record("summary", summary)

    def show(self) -> str:
        rows = [_row(r) for r in self.records if r["kind"] == "summary" and r["best"]]
        header = ("memory", "", "block", "tokens/s", "prefill", "decode", "peak RSS", "of it held")
        header += ("read", "disk", "compute alone", "I/O alone", "ratio")
        a = self.args
        what = f"{a.preset}, bfloat16, prompt {a.prompt_len}, {a.gen_len} generated"
        how = f"medians of {a.repeat}, the best block of each"
        ratio = "Ratio: the whole / max(compute alone, I/O alone)."
        lines = [f"{what}; {how}. {ratio}", "", table(header, rows), ""]
        if any(a.limit):
            lines += [limit_note(a.limit_by), ""]
        seen = set()
        for r in self.records:
            if r["kind"] in ("skipped", "failed"):
                where = f"{_shown(r['limit_nbytes'])}: {r['name']} {r['batch']}x{r['num_batches']}"
                seen.add(f"{r['kind']} {where}: {r['reason']}")
        return "\n".join([*lines, *sorted(seen)])


def _bounds(repeats: list[dict[str, Any]], computed: dict[tuple, float]) -> dict[str, Any]:
    """Compute alone and I/O alone of ours, and how close the whole comes; of each repeat's own."""
    shapes = [(r["batch"], r["num_batches"], r["repeat"]) for r in repeats]
    if repeats[0]["name"] == "ours-device" or not repeats[0]["percent"]:
        return {}
    if not all(s in computed for s in shapes):
        return {}
    compute = [computed[s] for s in shapes]
    # What the page cache served is no I/O; what was read twice over is no excuse.
    io = [
        min(r["read_nbytes"], r["disk_tier_nbytes"]) / r["disk_bytes_per_second"] for r in repeats
    ]
    ratios = [r["seconds"] / max(c, i) for r, c, i in zip(repeats, compute, io, strict=True)]
    return {
        "compute_alone_seconds": round(statistics.median(compute), 3),
        "io_alone_seconds": round(statistics.median(io), 3),
        "ratio": round(statistics.median(ratios), 3),
    }


def _row(r: dict[str, Any]) -> tuple[str, ...]:
    rate = f"{r['tokens_per_second']:.2f}"
    if r["repeats"] > 1:
        rate += " ({:.2f}-{:.2f})".format(*r["spread"])
    ours = ("compute_alone_seconds", "io_alone_seconds")
    return (
        _shown(r["limit_nbytes"]),
        r["name"],
        f"{r['batch']} x {r['num_batches']}",
        rate,
        f"{r['prefill_seconds']:.1f} s",
        f"{r['decode_seconds']:.1f} s",
        f"{r['peak_rss_nbytes'] / 1e9:.2f} GB",
        f"{r['peak_anon_nbytes'] / 1e9:.2f} GB",
        f"{r['read_nbytes'] / 1e9:.1f} GB",
        f"{r['disk_bytes_per_second'] / 1e9:.2f} GB/s",
        *(f"{r[n]:.1f} s" if n in r else "" for n in ours),
        f"{r['ratio']:.2f}" if "ratio" in r else "",
    )


def result_of(command: list[str], timeout: float) -> dict[str, Any]:
    """The last line of JSON that a process prints, or why there is none."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"failed": f"no end within {timeout:.0f} s"}
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode == 0 and lines:
        return json.loads(lines[-1])
    if process.returncode in (-9, 137):
        return {"failed": "killed: more memory than is left"}
    return {"failed": " | ".join(err.strip().splitlines()[-2:]) or f"ended {process.returncode}"}


@contextlib.contextmanager
def limited(limit: int | None, by: str) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """What to put before a command so that it has ``limit`` bytes, and how that was done."""
    if limit is None:
        yield [], {}
    elif by == "balloon":
        with balloon(limit) as state:
            yield [], {"balloon": state}
    else:
        yield [*_scope(limit)], {}


def _scope(limit: int) -> list[str]:
    """A control group of its own for the command, made and removed by systemd."""
    user = [] if os.geteuid() == 0 else ["--user"]
    limits = ["-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
    return ["systemd-run", "--scope", "--quiet", *user, *limits, "--"]


def available_limiter() -> str:
    try:
        done = subprocess.run([*_scope(1 << 26), "true"], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "balloon"
    return "balloon" if done.returncode else "systemd"


def limit_note(by: str) -> str:
    if by == "systemd":
        return "Memory limited by a systemd scope of each run's own, page cache included."
    return (
        "Memory limited by a balloon that locks the rest of the machine's: what is left, page "
        "cache included, is shared by everything that runs on it, this benchmark or not."
    )


def _shown(limit: int | None) -> str:
    return "all" if limit is None else f"{limit / UNITS['GiB']:g} GiB"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def configurations(args: argparse.Namespace) -> list[Config]:
    found = [Config(name, batch) for name in PEERS for batch in args.peer_batches]
    for name, (percent, compression) in {**POLICIES, **dict(args.policy)}.items():
        chosen = [shapes for key, shapes in args.blocks if key == name]
        chosen = chosen or [shapes for key, shapes in args.blocks if key is None]
        shapes = chosen[-1] if chosen else [(16, 1), (16, 4)]
        found += [Config(f"ours-{name}", *s, percent=percent, **compression) for s in shapes]
    names = list(dict.fromkeys(c.name for c in found))
    unknown = [name for name in args.only or () if name not in names]
    if unknown:
        raise SystemExit(f"--only: no {', '.join(unknown)}; there are {', '.join(names)}")
    return [c for c in found if not args.only or c.name in args.only]


def _limit(text: str) -> int | None:
    if text == "none":
        return None
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            return round(float(text.removesuffix(unit)) * factor)
    raise argparse.ArgumentTypeError(f"{text!r}: none, or a number with {', '.join(UNITS)}")


def limits_of(text: str) -> list[int | None]:
    return [_limit(part) for part in text.split(",")]


def _blocks(text: str) -> tuple[str | None, list[tuple[int, int]]]:
    name, _, shapes = text.rpartition("=")
    parts = [shape.split("x") for shape in shapes.split(",")]
    return name or None, [(int(batch), int(number)) for batch, number in parts]


def _policy(text: str) -> tuple[str, tuple[tuple[float, ...], dict[str, Any]]]:
    name, _, words = text.partition("=")
    kinds: dict[str, tuple[str, Any]] = {
        "w": ("weight_bits", int),
        "c": ("cache_bits", int),
        "s": ("sparsity", float),
    }
    numbers = [word for word in words.split(",") if word[:1] not in kinds]
    letters = [word for word in words.split(",") if word[:1] in kinds]
    if len(numbers) != 6:
        raise argparse.ArgumentTypeError(f"{text!r}: NAME= and six percentages")
    compression = {kinds[word[0]][0]: kinds[word[0]][1](word[1:]) for word in letters}
    return name, (tuple(map(float, numbers)), compression)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", default="facebook/opt-1.3b")
    add("--prompt-len", type=int, default=256)
    add("--gen-len", type=int, default=32, help="with 32 of prompt and 128 here, decode counts")
    add("--peer-python", help="the interpreter with torch, transformers and accelerate")
    add("--peer-batches", type=_integers, default=[16], metavar="N,N")
    add(
        "--blocks",
        type=_blocks,
        action="append",
        default=[],
        metavar="[NAME=]BxN,BxN",
        help="device batch x number of batches to try, of all of ours or of one (weights-disk=...)",
    )
    add(
        "--policy",
        type=_policy,
        action="append",
        default=[],
        metavar="NAME=WD,WH,CD,CH,HD,HH[,w4][,c4][,s0.1]",
        help="one more of ours, in percent: weights, cache, hidden on device and host; then bits "
        "of weights and cache, and the share of the positions attended to",
    )
    add("--throttle", type=float, default=0.0, help="ours: bytes per second of its disk tier")
    add("--disk-mode", default="auto", help="how ours reads: auto, mapped, direct, tensorstore")
    add("--chunk-positions", type=int, default=16, help="of ours, of the cache on disk")
    add("--limit", type=limits_of, default=[None, *limits_of("2GiB,4GiB")], metavar="none,2GiB,...")
    add("--limit-by", choices=("auto", "systemd", "balloon"), default="auto")
    add("--no-compute-alone", action="store_true", help="leave the comparison with it out")
    add("--only", type=lambda text: text.split(","), metavar="NAME,NAME")
    add("--label", default="offload", help="what the records are called: growth, for the plot")
    add("--repeat", type=int, default=1)
    add("--timeout", type=float, default=3600, help="seconds of one run")
    add("--store", type=Path, help="reuse this bfloat16 store; only read")
    add("--work", type=Path, help="keep weights and scratch files here; about twice the model")
    add("--out", type=Path, help="append the JSON lines here instead of printing them")
    args = parser.parse_args()
    if args.limit_by == "auto":
        args.limit_by = available_limiter() if any(args.limit) else "balloon"
    return args


def run_all(bench: Bench, configs: list[Config]) -> None:
    args = bench.args
    bench.record(
        "machine",
        {
            "cores": os.cpu_count(),
            "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "kernel": platform.release(),
            "limit_by": args.limit_by if any(args.limit) else None,
            "limit_note": limit_note(args.limit_by) if any(args.limit) else None,
        },
    )
    bench.prepare(configs)
    device = [c for c in configs if c.name == "ours-device"] if None in args.limit else []
    offloaded = [c for c in configs if c.percent and not c.in_memory]
    shapes = {c.shape for c in offloaded} - {c.shape for c in device}
    percent, _ = POLICIES["device"]
    shapes = set() if args.no_compute_alone else shapes
    alone = [Config("ours-device", *s, percent=percent) for s in sorted(shapes)]
    for repeat in range(args.repeat):  # outermost: what is compared ran in the same minutes
        for config in alone:
            bench.run(config, None, repeat, "compute")
        for limit in args.limit:
            for config in configs:
                if limit is None or not config.in_memory:
                    bench.run(config, limit, repeat)
    bench.summarise()


def main() -> None:
    args = parse()
    configs = configurations(args)
    with contextlib.ExitStack() as stack:
        if args.work is None:
            scratch = tempfile.TemporaryDirectory(prefix="flexgen-jax-bench-")
            args.work = Path(stack.enter_context(scratch))
        out = stack.enter_context(args.out.open("a")) if args.out else sys.stdout
        bench = Bench(args, out)
        run_all(bench, configs)
        _say(bench.show())


if __name__ == "__main__":
    main()
