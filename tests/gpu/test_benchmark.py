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
    fewer, more = runs["weights in 4 bits"], runs["weights"]
    assert fewer["bus_limit"] > more["bus_limit"]
    assert runs["weights; unequal lengths, refill"]["occupancy"] > 0
    skipped = {(r["tool"], r["skipped"]) for r in found if r["kind"] == "skipped"}
    assert ("vLLM", "not installed: vllm") in skipped
    assert ("FlexGen", "no --flexgen-python was given") in skipped
    assert "| facebook/opt-30b, 2 layers | weights in 4 bits | flexgen-jax |" in table


def test_without_time_it_says_what_it_left_out():
    found, _ = bench("--model", "mistralai/Mixtral-8x7B-v0.1", "--minutes", "0")
    left = [r["skipped"] for r in found if r.get("tool") == "flexgen-jax"]
    assert left == ["out of time"] * 2


FLEXGEN = """
import dataclasses

@dataclasses.dataclass
class Config:
    num_hidden_layers: int = 48

def get_opt_config(name):
    return Config()

def add_parser_arguments(parser):
    for name in ("model", "path", "offload-dir", "log-file"):
        parser.add_argument(f"--{name}")
    for name in ("gpu-batch-size", "num-gpu-batches", "prompt-len", "gen-len", "verbose"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--percent", nargs="+", type=int)

class timers:
    def __init__(self, name):
        self.costs = [1.0, 0.25, 0.25]

def run_flexgen(args):
    assert args.path == "_DUMMY_" and args.percent == [0, 100, 100, 0, 100, 0]
    assert get_opt_config(args.model).num_hidden_layers == 2
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    (ids,) = tokenizer(["a"], padding="max_length", max_length=args.prompt_len).input_ids
    assert len(ids) == 8
"""


def test_how_flexgens_package_is_asked(tmp_path):
    """With a stand-in that has the functions of flexgen 0.1.8 which are called."""
    (tmp_path / "flexgen").mkdir()
    (tmp_path / "flexgen" / "__init__.py").touch()
    (tmp_path / "flexgen" / "flex_opt.py").write_text(FLEXGEN)
    command = [sys.executable, str(ROOT / "benchmarks" / "peers" / "on_gpu.py"), "flexgen"]
    command += ["--folder", str(tmp_path), "--batch", "3", "--num-batches", "2", "--layers", "2"]
    command += ["--prompt-len", "8", "--gen-len", "4", "--percent"]
    command += ["0", "100", "100", "0", "100", "0"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens_per_second"] == 16
