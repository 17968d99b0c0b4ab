"""Tokens per second beside the tools that people would take instead, on the same work.

Each tool runs in an environment of its own, made from the package index below ``--cache`` when it
is first needed, and each run is a process of its own; all of a go run on the same prompts, one
after another, as often as ``--repeat`` says. A tool that cannot run says why.

    questions   SmolLM2-135M-Instruct answers 256 everyday questions, greedily, up to its own ends
    batches     random weights of a preset's shapes, by the requests of a batch: prefill and decode
    memory      the same with only so much memory left, page cache included

    python benchmarks/compare_peers.py --work /large/disk --cache environments --out peers.jsonl
    python benchmarks/compare_peers.py ... --workload memory --limit 1.2GiB,0.6GiB
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from machine import available_nbytes
from offload import available_limiter, limit_note, limited, limits_of
from peers.environments import NotInstalled, python_of
from peers.models import HERE as PEERS
from peers.models import ROOT, SMOLLM2, Models
from peers.tables import peers
from peers.tools import TOOLS, Tool
from tables import table

Workload = dict[str, Any]


class _Crashed(RuntimeError):
    """A driver ended by a signal that nobody sent."""


class Bench:
    """The records of one go, as they come."""

    def __init__(self, args: argparse.Namespace, out: Any) -> None:
        self.args, self._out = args, out
        self.records: list[dict[str, Any]] = []
        self._models = Models(args.work, self._python)
        self._missing: dict[str, str] = {}

    def _python(self, environment: str) -> str:
        if environment in self._missing:
            raise NotInstalled(self._missing[environment])
        try:
            return python_of(environment, self.args.cache, self.args.python)
        except NotInstalled as error:
            self._missing[environment] = str(error)
            raise

    def record(self, kind: str, values: dict[str, Any]) -> None:
        self.records.append({"benchmark": "peers", "kind": kind, **values})
        print(json.dumps(self.records[-1]), file=self._out, flush=True)

    def prompts(self) -> list[list[int]]:
        """The token ids of the questions; one way of splitting for all tools."""
        from chat_questions import questions
        from tokenizers import Tokenizer

        folder = self._models.path(SMOLLM2, "hf", "float32")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        found = tokenizer.encode_batch(questions(self.args.questions), add_special_tokens=False)
        return [one.ids for one in found]

    def workloads(self) -> list[Workload]:
        found = []
        if "questions" in self.args.workload:
            prompts, limit = self.prompts(), self.args.max_tokens
            for batch in self.args.rows:
                run = {"name": f"{batch} rows", "prompts": prompts, "limit": limit, "batch": batch}
                found.append(
                    {"workload": "questions", "model": SMOLLM2, "ends": [2], "runs": [run]}
                )
        for model in self.args.model:
            for kind in ("batches", "memory"):
                if kind in self.args.workload:
                    runs = [run for batch in self.args.batches for run in self._steps(batch)]
                    found.append({"workload": kind, "model": model, "ends": [], "runs": runs})
        return found

    def _steps(self, batch: int) -> list[dict[str, Any]]:
        """Of each pair of lengths the whole, and the first token alone: what is left is decode."""
        found = []
        for prompt_len, gen_len in self.args.lengths:
            # Different for each request: some would be computed once for all.
            prompts = [
                [2 + (row * 31 + i * 7) % 997 for i in range(prompt_len)] for row in range(batch)
            ]
            name = f"{batch} x {prompt_len} + "
            for limit in (1, gen_len):
                run = {"name": name + str(limit), "prompts": prompts}
                found.append({**run, "limit": limit, "batch": batch})
        return found

    def run(self, tool: Tool, work: Workload, limit: int | None, repeat: int) -> None:
        told = {
            "workload": work["workload"],
            "model": work["model"],
            "tool": tool.name,
            "label": tool.label,
            "limit_nbytes": limit,
            "repeat": repeat,
        }
        if work["workload"] == "questions":
            told |= {"questions": self.args.questions, "max_tokens": self.args.max_tokens}
        print(f"{tool.name} {tool.label}: {work['workload']} ...", file=sys.stderr, flush=True)
        try:
            try:
                records = self._records(tool, work, limit)
            except _Crashed as crash:
                if tool.after_crash is None:
                    raise
                told["after_crash"] = str(crash)
                again = dataclasses.replace(tool, settings=tool.settings | tool.after_crash)
                records = self._records(again, work, limit)
        except (NotInstalled, RuntimeError) as error:
            records = [{"skipped": str(error)}]
        for found in records:
            if "skipped" in found:
                print(f"    {found['skipped']}", file=sys.stderr, flush=True)
                self.record("skipped", {**told, "reason": found["skipped"][:300]})
                continue
            rate = found["generated_tokens"] / found["seconds"]
            print(f"    {found['run']}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
            answers = found.pop("answers")
            if answers is not None:
                found["answers_file"] = self._keep(tool, found["run"], answers)
            self.record("run", {**told, "tokens_per_second": round(rate, 2), **found})

    def _records(self, tool: Tool, work: Workload, limit: int | None) -> list[dict[str, Any]]:
        """What the driver printed, a record for each of the runs, or the reason for none."""
        python = self._python(tool.environment) if tool.environment else sys.executable
        model = self._models.path(work["model"], tool.kind, tool.stored)
        runs = work["runs"]
        # Lazy initialisation. What ours compiles later is taken from its time.
        few = 8 if work["ends"] else None
        warm = [{**r, "prompts": r["prompts"][::few], "limit": 2} for r in runs[:1]]
        job = {
            "model": str(model),
            "precision": tool.precision,
            "threads": os.cpu_count(),
            "settings": tool.settings | ({"memory": limit} if limit else {}),
            "ends": work["ends"],
            "warm": [] if limit else warm,
            "runs": runs,
            "files": str(model) if limit else None,
            "scratch": str(self.args.work / "scratch"),
            "parent": os.getpid(),
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json", dir=self.args.work) as file:
            json.dump(job, file)
            file.flush()
            command = [python, "-m", f"peers.{tool.driver}", file.name]
            with limited(limit, self.args.limit_by) as (prefix, _):
                return self._printed([*prefix, *command])

    def _printed(self, command: list[str]) -> list[dict[str, Any]]:
        paths = [str(PEERS.parent), str(ROOT)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        try:
            done = subprocess.run(
                command,
                cwd=PEERS.parent,
                env=environment,
                capture_output=True,
                text=True,
                timeout=self.args.timeout,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end within {self.args.timeout:.0f} s") from None
        records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode < 0 and done.returncode != -9:
            name = signal.Signals(-done.returncode).name
            raise _Crashed(f"ended by {name}")
        if done.returncode in (-9, 137):
            records.append({"skipped": "killed: more memory than is left"})
        elif done.returncode or not records:
            words = done.stderr.strip().splitlines()[-1:] or [f"ended {done.returncode}"]
            records.append({"skipped": words[0]})
        return records

    def _keep(self, tool: Tool, name: str, answers: list[list[int]]) -> str:
        """The answers, for comparing; too long for a record."""
        words = f"{tool.name} {tool.label} {name}".replace(",", "").replace(" ", "-")
        path = self.args.work / "answers" / f"{words}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(answers))
        return path.name

    def agreement(self) -> None:
        """How many answers of each tool are those of transformers in float32, token for token."""
        folder = self.args.work / "answers"
        kept = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
        first = next((a for name, a in kept.items() if name.startswith("transformers-float32")), [])
        for name, answers in kept.items():
            if first and len(answers) == len(first):
                same = Counter(a == b for a, b in zip(answers, first, strict=True))[True]
                values = {"answers_file": f"{name}.json", "same": same, "of": len(first)}
                self.record("agreement", values)


def _lengths(text: str) -> list[tuple[int, int]]:
    pairs = [part.split("+") for part in text.split(",")]
    return [(int(prompt), int(new)) for prompt, new in pairs]


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _pair(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    return name, path


def _words(text: str) -> list[str]:
    return text.split(",")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workload", type=_words, default=["questions", "batches"], metavar="NAME,NAME")
    add("--only", nargs="+", metavar="TOOL[:LABEL]", help="these alone, in this order")
    add("--questions", type=int, default=256, help="how many")
    add("--max-tokens", type=int, default=128, help="of an answer, at most")
    add("--rows", type=_integers, default=[64], metavar="N,N", help="of a batch of questions")
    add("--model", type=_words, default=["meta-llama/Llama-3.2-1B"], metavar="PRESET,PRESET")
    add("--batches", type=_integers, default=[1, 8, 16, 64], metavar="N,N")
    add("--lengths", type=_lengths, default=[(128, 32), (32, 128)], metavar="P+N,P+N")
    add("--limit", type=limits_of, default=limits_of("1.2GiB,0.6GiB"), metavar="2GiB,1GiB")
    add("--limit-by", choices=("auto", "systemd", "balloon"), default="auto")
    add("--repeat", type=int, default=1, help="of everything, in turns")
    add("--timeout", type=float, default=3600, help="seconds of one process")
    python = "an environment that is there already, instead of making it; may be given often"
    add("--python", type=_pair, action="append", default=[], metavar="NAME=PATH", help=python)
    add("--cache", type=Path, required=True, help="environments are made and stay here")
    add("--work", type=Path, required=True, help="models and scratch files stay here")
    add("--out", type=Path, help="append the JSON lines here instead of printing them")
    args = parser.parse_args()
    args.python, args.work, args.cache = (
        dict(args.python),
        args.work.resolve(),
        args.cache.resolve(),
    )
    if args.limit_by == "auto":
        args.limit_by = available_limiter() if "memory" in args.workload else "balloon"
    return args


def chosen(only: list[str] | None) -> list[Tool]:
    if not only:
        return list(TOOLS)
    found = []
    for word in only:
        name, _, label = word.partition(":")
        match = [t for t in TOOLS if t.name == name and label in ("", t.label)]
        if not match:
            known = ", ".join(f"{t.name}:{t.label}" for t in TOOLS)
            raise SystemExit(f"--only: expected some of {known}; got {word}")
        found += match
    return found


def main() -> None:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") if args.out else sys.stdout as out:
        bench = Bench(args, out)
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        memory = "memory" in args.workload
        machine = {
            "cores": os.cpu_count(),
            "avx512": "avx512f" in flags,
            "amx": "amx_tile" in flags,
            "available_nbytes": available_nbytes(),
            "limit_note": limit_note(args.limit_by) if memory else None,
        }
        bench.record("machine", machine)
        tools = chosen(args.only)
        for repeat in range(args.repeat):
            for work in bench.workloads():
                limits = args.limit if work["workload"] == "memory" else [None]
                for limit in limits:
                    for tool in tools:
                        if work["workload"] in tool.workloads:
                            bench.run(tool, work, limit, repeat)
        if "questions" in args.workload:
            bench.agreement()
        if any(r["kind"] == "run" for r in bench.records):
            print(peers(bench.records, table), file=sys.stderr)


if __name__ == "__main__":
    main()
