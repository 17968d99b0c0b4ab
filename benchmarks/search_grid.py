"""Compares what policy auto predicts with the best of a grid of policies; prints JSON lines.

For models and machines, prompts of 32 to 2,048 tokens and 1 to 512 new ones: every block of 1 to
256 rows times 1 to 32 batches (powers of two and three quarters of them), splits in steps of 10%
and attention on the device or the host. Each is bounded by its busiest stream or link, which no
simulation undercuts, and by the memory it takes; those that are left are simulated, the lowest
bound first, as many as --simulations says; then every neighbour of the best, until none is better.

    python benchmarks/search_grid.py --each --seed 1 --out results.jsonl

takes each model on each machine once, prints the cases in which something is faster than auto, the
worst first, and a summary; every case goes to the file as it is found.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import flexgen_jax as fg
from flexgen_jax.models.registry import preset
from flexgen_jax.planning.auto import Model, Uniform
from scheduling.candidates import Dealer
from scheduling.limits import Limits
from scheduling.linear_program import TIERS, Program, with_splits
from scheduling.policy import Policy, Split

MODELS = (
    "facebook/opt-6.7b",
    "facebook/opt-30b",
    "facebook/opt-66b",
    "facebook/opt-175b",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
    "Qwen/Qwen3-32B",
    "Qwen/Qwen3-30B-A3B",
)
PROMPTS, NEW = (32, 128, 512, 2048), (1, 8, 32, 128, 512)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
STEP = 10
# An integer placement may have a little less on the slow tiers than its shares say.
SLACK = 0.97
ZIGZAG = fg.SCHEDULES["zigzag"]


def machines() -> dict[str, fg.Hardware]:
    """The presets, and three others."""
    found = {name: fg.Hardware.preset(name) for name in ("t4", "laptop", "h200", "a5000")}
    card = found["a5000"]
    found["little memory"] = dataclasses.replace(
        card, name="little memory", device_memory=8e9, host_memory=16e9
    )
    slow = dict.fromkeys(("disk_to_host", "host_to_disk_cache", "host_to_disk_hidden"), 0.4e9)
    found["slow disk"] = dataclasses.replace(card, name="slow disk", **slow)
    found["many cores"] = dataclasses.replace(
        found["t4"], name="many cores", host_memory=512e9, host_attention=300e9
    )
    return found


class Tried(NamedTuple):
    """A policy of the grid, and seconds of a request."""

    seconds: float
    policy: Policy


class Grid:
    """All policies for a model on a machine."""

    def __init__(self, model: str, hardware: fg.Hardware, job: Uniform) -> None:
        self.model, self.hardware, self.job = model, hardware, job
        self.limits = Limits.of(hardware)
        self.blocks = Model(preset(model), "bfloat16").blocks_of(job)
        self.dealer = Dealer(self.blocks, hardware, self.limits, ZIGZAG)
        self.known: dict[Policy, float | None] = {}
        self.bounded = 0

    def bounds(self) -> Iterator[tuple[float, Policy]]:
        """Lower bounds of those that may fit: of each split of cache and hidden states the best."""
        hosted = (False,) if self.hardware.host_to_device is None else (False, True)
        for size, count, host in itertools.product(SIZES, COUNTS, hosted):
            policy = Policy(device_batch_size=size, num_device_batches=count, host_attention=host)
            yield from self._of_shape(policy)

    def _of_shape(self, policy: Policy) -> Iterator[tuple[float, Policy]]:
        program = Program(policy, self.blocks, self.hardware, shared=self.limits.shared)
        sparse = "experts" in program.kinds
        fine, pure = _splits(STEP, self.limits), _splits(100, self.limits)
        of_kind: dict[str, list[Split]] = {
            "weights": pure if sparse else fine,
            "cache": fine,
            "hidden": pure,
            "experts": fine,
        }
        choices = [of_kind[kind] for kind in program.kinds]
        shares = [np.array([[s.shares()[t] / 100 for t in TIERS] for s in of]) for of in choices]
        index = np.indices([len(of) for of in choices]).reshape(len(choices), -1)
        x = np.concatenate([of[i] for of, i in zip(shares, index, strict=True)], axis=1)
        count = program.shares
        rows = np.array(program.rows)
        total = np.zeros(len(x))
        for phase in (0, 1):
            own = rows[:, count + phase] == -1
            if not own.any():  # one new token: no decode steps
                continue
            busy = x @ rows[own][:, :count].T - np.array(program.upper)[own]
            total += busy.max(axis=1)
        memory, room = program.memory(self.limits, dict.fromkeys(TIERS, 0.0))
        fits = np.ones(len(x), bool)
        for row, most in list(zip(memory, room, strict=True))[: len(TIERS)]:
            fits &= x @ row[:count] <= most * 1.02
        self.bounded += len(x)
        group = index[program.kinds.index("cache")] * 3 + index[program.kinds.index("hidden")]
        order = np.lexsort((total, group))
        order = order[fits[order]]
        _, firsts = np.unique(group[order], return_index=True)
        for i in order[firsts]:
            splits = {
                k: of[n] for k, of, n in zip(program.kinds, choices, index[:, i], strict=True)
            }
            yield SLACK * total[i] / policy.block_size, with_splits(policy, splits)

    def seconds(self, policy: Policy) -> float | None:
        """Of a request, by simulating some layers and steps; None: it does not fit."""
        if policy not in self.known:
            self.known[policy] = self._seconds(policy)
        return self.known[policy]

    def _seconds(self, policy: Policy) -> float | None:
        found = self.dealer.dealt(policy, {}, {})
        return None if found is None else self.dealer.simulated(found).seconds

    def best(self, simulations: int) -> list[Tried]:
        """The fastest few, the best first."""
        open_ = sorted(self.bounds(), key=lambda each: each[0])
        best, simulated = float("inf"), 0
        for bound, policy in open_:
            if bound >= best or simulated >= simulations:
                break
            seconds = self.seconds(policy)
            if seconds is not None:
                simulated += 1
                best = min(best, seconds)
        while True:
            ranked = self._ranked()
            for tried in ranked[:3]:
                for policy in _neighbours(tried.policy, self.limits):
                    self.seconds(policy)
            if self._ranked()[:1] == ranked[:1]:
                return self._ranked()

    def _ranked(self) -> list[Tried]:
        fit = [Tried(s, policy) for policy, s in self.known.items() if s is not None]
        return sorted(fit, key=lambda tried: tried.seconds)

    def tokens_per_second(self, policy: Policy) -> float:
        """As plan predicts it."""
        job = {"prompt_len": self.job.prompt_len, "gen_len": self.job.gen_len}
        return fg.plan(self.model, policy, self.hardware, **job).tokens_per_second


def _splits(step: int, limits: Limits) -> list[Split]:
    """All in steps of so many percent; without the host's where it is the device's memory."""
    shares = range(0, 101, step)
    found = [(d, h) for d in shares for h in shares if d + h <= 100]
    return [
        Split(device=d, host=h, disk=100 - d - h) for d, h in found if not (h and limits.shared)
    ]


def _neighbours(policy: Policy, limits: Limits) -> Iterator[Policy]:
    """One step away in the block's shape or in one split."""
    size, count = policy.device_batch_size, policy.num_device_batches
    for a, b in itertools.product((-1, 0, 1), repeat=2):
        i, j = SIZES.index(size) + a, COUNTS.index(count) + b
        if (a or b) and 0 <= i < len(SIZES) and 0 <= j < len(COUNTS):
            yield dataclasses.replace(
                policy, device_batch_size=SIZES[i], num_device_batches=COUNTS[j]
            )
    for kind in ("weights", "cache", "hidden", "experts"):
        split = getattr(policy, kind)
        if split is None:
            continue
        values = {tier.value: share for tier, share in split.shares().items()}
        for give, take in itertools.permutations(values, 2):
            if values[give] >= STEP and not (limits.shared and take == "host"):
                moved = {give: values[give] - STEP, take: values[take] + STEP}
                changes: dict[str, Any] = {kind: Split(**(values | moved))}
                yield dataclasses.replace(policy, **changes)


def compare(
    model: str, machine: str, job: Uniform, hardware: fg.Hardware, simulations: int
) -> dict[str, Any]:
    """A case: auto, and the best of the grid."""
    case: dict[str, Any] = {"benchmark": "search_grid", "model": model, "machine": machine}
    case |= {"prompt_len": job.prompt_len, "gen_len": job.gen_len}
    begun = time.perf_counter()
    lengths = {"prompt_len": job.prompt_len, "gen_len": job.gen_len}
    auto = fg.plan(model, "auto", hardware, **lengths)
    case["seconds"] = round(time.perf_counter() - begun, 1)
    grid = Grid(model, hardware, job)
    tried = grid.best(simulations)[:3]
    rates = [(grid.tokens_per_second(t.policy), t.policy) for t in tried]
    rate, policy = max(rates, key=lambda each: each[0], default=(0.0, None))
    return case | {
        "ratio": round(auto.tokens_per_second / rate, 4) if rate else None,
        "auto": {"tokens_per_second": auto.tokens_per_second, "policy": _short(auto.policy)},
        "best": {"tokens_per_second": rate, "policy": _short(policy)},
        "bounded": grid.bounded,
        "simulated": len(grid.known),
    }


def _short(policy: Policy | None) -> Mapping[str, Any]:
    if policy is None:
        return {}
    default = Policy().to_json()
    return {k: v for k, v in policy.to_json().items() if v != default[k]}


def cases(models: list[str], known: list[str]) -> list[tuple[str, str, Uniform]]:
    """All there are, those that the model has positions for."""
    found = []
    for model, machine, prompt, new in itertools.product(models, known, PROMPTS, NEW):
        if prompt + new <= preset(model).max_position_embeddings:
            found.append((model, machine, Uniform(prompt, new)))
    return found


def one_of_each(
    chosen: list[tuple[str, str, Uniform]], seed: int
) -> list[tuple[str, str, Uniform]]:
    """Each model on each machine once, with lengths that are as seldom so far as any."""
    chosen = random.Random(seed).sample(chosen, len(chosen))
    pairs = dict.fromkeys((model, machine) for model, machine, _ in chosen)
    seen: Counter[Uniform] = Counter()
    found = []
    for pair in pairs:
        jobs = [job for *those, job in chosen if tuple(those) == pair]
        job = min(jobs, key=lambda each: seen[each])
        seen[job] += 1
        found.append((*pair, job))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, help="a random sample of so many [default: all]")
    parser.add_argument("--each", action="store_true", help="each model on each machine once")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument("--out", type=Path, help="a file to append every case to")
    parser.add_argument("--simulations", type=int, default=200, help="of the grid, for each case")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--machines", nargs="+", default=list(machines()))
    args = parser.parse_args()
    known = machines()
    chosen = cases(args.models, args.machines)
    if args.each:
        chosen = one_of_each(chosen, args.seed)
    if args.cases is not None:
        chosen = random.Random(args.seed).sample(chosen, min(args.cases, len(chosen)))
    found = []
    for model, machine, job in chosen:
        try:
            case = compare(model, machine, job, known[machine], args.simulations)
        except ValueError as error:  # nothing fits
            print(f"{model} on {machine}, {job}: {error}", file=sys.stderr)
            continue
        found.append(case)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as out:
                print(json.dumps(case), file=out)
        print(f"{case['ratio']} {model} on {machine}, {job}", file=sys.stderr)
    ratios = [case["ratio"] for case in found if case["ratio"] is not None]
    for case in sorted(found, key=lambda each: each["ratio"] or 0.0):
        if case["ratio"] is None or case["ratio"] < 1:
            print(json.dumps(case))
    summary = {
        "cases": len(found),
        "worst": min(ratios, default=None),
        "below_0.99": sum(ratio < 0.99 for ratio in ratios),
        "below_1": sum(ratio < 1 for ratio in ratios),
        "slowest_search_seconds": max((case["seconds"] for case in found), default=None),
    }
    print(json.dumps({"summary": summary}))


if __name__ == "__main__":
    main()
