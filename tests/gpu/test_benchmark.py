"""The benchmark for GPUs runs anywhere with next to no width, and says what it left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def bench(*options):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_all_cases_of_a_model_and_peers_that_are_not_there():
    found, table = bench("--model", "facebook/opt-30b", "--vllm-python", sys.executable)
    (machine,) = (r for r in found if r["kind"] == "machine")
    assert all(machine[name] > 0 for name in ("host_to_device", "device_to_host", "matmul_flops"))
    runs = {r["case"]: r for r in found if r["kind"] == "run"}
    assert len(runs) == 6
    for run in runs.values():
        assert run["layers"] == 2
        assert run["tokens_per_second"] > 0
        assert run["flop_limit"] > 0
        assert run["bus_limit"] > 0
    fewer, more = runs["4 bits"], runs["weights in host memory"]
    assert fewer["bus_limit"] > more["bus_limit"]
    assert runs["unequal lengths, refill"]["occupancy"] > 0
    skipped = {(r["tool"], r["skipped"]) for r in found if r["kind"] == "skipped"}
    assert ("vLLM", "not installed: vllm") in skipped
    assert ("FlexGen", "no --flexgen-python was given") in skipped
    assert "| facebook/opt-30b, 2 layers | 4 bits | flexgen-jax |" in table


def test_without_time_it_says_what_it_left_out():
    found, _ = bench("--model", "mistralai/Mixtral-8x7B-v0.1", "--minutes", "0")
    left = [r["skipped"] for r in found if r.get("tool") == "flexgen-jax"]
    assert left == ["out of time"] * 2
