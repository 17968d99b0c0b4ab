"""What type checkers and editors see of the package: all that is public, with its types."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flexgen_jax as fg

ROOT = Path(__file__).parent.parent
SOURCE = ast.parse(Path(fg.__file__).read_text())
SCRIPT = """\
import flexgen_jax as fg
import flexgen_jax.ray

policy = fg.Policy(weights=fg.Split(device=0, disk=100), device_batch_size=4)
params = [fg.SamplingParams(temperature=0.0, max_tokens=4)]
with fg.LLM("facebook/opt-125m", policy=policy, schedule="zigzag") as llm:
    outputs = llm.generate(["The tide"], params)
    text: str = outputs[0].outputs[0].text
    for output in llm.generate_iter(prompt for prompt in ["a", "b"]):
        tokens: tuple[int, ...] = output.prompt_token_ids
    scores: list[fg.Score] = llm.score(["a"], ["b"])
    logprob: float = scores[0].logprob
    report = llm.report
    assert report is not None
    rate: float = report.tokens_per_second
    placed: int = llm.placement.nbytes(fg.Tier.DISK)
    in_force: fg.Policy = llm.policy
    found: fg.Perplexity = fg.perplexity(llm, "text")
hardware = fg.Hardware.preset("h200")
plan: fg.Plan = fg.plan(
    "facebook/opt-30b",
    "auto",
    hardware,
    prompt_len=512,
    gen_len=32,
    schedule=("zigzag", fg.SCHEDULES["zigzag"]),
)
workload = fg.Workload(num_steps=2, num_layers=3, num_batches=1)
fg.validate(fg.SCHEDULES["zigzag"](workload), workload)
timeline: fg.Timeline = plan.timeline
hidden: int = fg.open_store("store").config.hidden_size
completed = fg.ray.map_batches
"""
WRONG = """\
import flexgen_jax as fg

fg.Policy(device_batch_size="4")
fg.LLM("model", polcy=fg.Policy())
number: int = fg.LLM("model").generate("a")[0].outputs[0].text
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What mypy has made of the package, and of what that imports, is the same for any script."""
    return tmp_path_factory.mktemp("mypy")


def errors(tmp_path, cache, text):
    """What mypy says of a user's script: what is wrong inside an installed package it leaves."""
    pytest.importorskip("mypy", reason="mypy is of the dependency group check")
    (tmp_path / "script.py").write_text(text)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"),
            *("--cache-dir", str(cache), "script.py"),
        ],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def test_a_script_is_checked_strictly(tmp_path, cache):
    assert errors(tmp_path, cache, SCRIPT) == []


def test_what_is_wrong_in_a_script_is_found(tmp_path, cache):
    found = errors(tmp_path, cache, WRONG)
    assert [line.split(":")[1] for line in found] == ["3", "4", "5"]


def test_every_public_name_is_listed_wherever_it_has_to_be():
    """For star imports and editors, for type checkers, and for importing it when it is used."""
    (listed,) = (
        ast.literal_eval(node.value)
        for node in SOURCE.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    (checked,) = (node.body for node in SOURCE.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in checked for alias in node.names}
    assert {name: f"{seen.pop(name)}.{name}" for name in fg._FILES} == fg._FILES
    assert seen == fg._HOME
    assert sorted(listed) == sorted([*fg._HOME, "__version__"])
