"""Schedules of one's own on the command line."""

import json
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from flexgen_jax.cli.app import main
from tests.interrupting import signal_in_block

MODEL = str(Path(__file__).parents[1] / "goldens" / "pre_norm")
OWN = """
from scheduling import row_by_row, zigzag

def mine(w):
    yield from {base}(w)

def forgets(w):
    list(zigzag(w))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXGEN_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.py").write_text(OWN.format(base="zigzag"))
    lines = [{"prompt_token_ids": [5 + i, 7], "max_tokens": 4} for i in range(6)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "own.py"


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


ON_PAPER = ("--model", "facebook/opt-125m", "--hardware", "t4", "--prompt-len", 16, "--gen-len", 3)
ON_PAPER += ("--percent", 0, 0, 100, 0, 100, 0, "--gpu-batch-size", 2, "--num-gpu-batches", 2)


def test_on_paper_it_has_the_name_that_was_given(own):
    result = run(
        "simulate",
        *ON_PAPER,
        "--schedule",
        "own.py:mine",
        "--compare",
        "row_by_row",
        "--plot",
        "both.svg",
        "--json",
    )
    mine, other = json.loads(result.stdout)
    assert [mine["schedule"], other["schedule"]] == ["own.py:mine", "row_by_row"]
    assert mine["seconds"] < other["seconds"]
    assert "own.py:mine" in run("plan", *ON_PAPER, "--schedule", "own.py:mine").stdout


@pytest.mark.parametrize("command", ["plan", "simulate", "generate"])
def test_what_is_wrong_with_it_is_one_line(own, command):
    files = ("--model", MODEL, "-i", "in.jsonl", "-o", "out.jsonl")
    base = files if command == "generate" else ON_PAPER
    for name, words in (
        ("own.py:min", "has no function min; did you mean mine?"),
        ("own.py:forgets", "schedule own.py:forgets: None came instead of its ops"),
    ):
        result = run(command, *base, "--schedule", name, code=2)
        assert words in result.output
        assert "Traceback" not in result.output


def test_a_job_gives_the_same_answers_and_its_report_names_it(own):
    texts = []
    for name in ("zigzag", "own.py:mine"):
        result = run(
            "generate",
            "--model",
            MODEL,
            "-i",
            "in.jsonl",
            "-o",
            f"{name}.jsonl",
            "--schedule",
            name,
            "--json",
        )
        assert json.loads(result.stdout)["schedule"] == name
        texts.append(Path(f"{name}.jsonl").read_text())
    assert texts[0] == texts[1]


def test_a_job_that_is_resumed_notices_another_order(own, monkeypatch):
    job = ("generate", "--model", MODEL, "-i", "in.jsonl", "--no-refill")
    job += ("--percent", 0, 0, 100, 0, 100, 0, "--gpu-batch-size", 1, "--num-gpu-batches", 2)
    run(*job, "-o", "expected.jsonl")
    for place, (before, after, words) in enumerate(
        [
            ("zigzag", "own.py:mine", ""),
            ("row_by_row", "own.py:mine", "begun with schedule row_by_row, and goes on with own.p"),
            ("own.py:mine", "own.py:mine", "schedule own.py:mine gives another order than when"),
        ]
    ):
        out = ("-o", f"out{place}.jsonl")
        with monkeypatch.context() as patched:
            signal_in_block(patched, signal.SIGINT, 2)
            run(*job, *out, "--schedule", before, code=130)
        if before == after:
            own.write_text(OWN.format(base="row_by_row"))
        result = run(*job, *out, "--schedule", after)
        assert "resuming: 2 already finished" in result.stderr
        assert words in result.stderr
        assert ("the report's figures are of both" in result.stderr) == bool(words)
        assert Path(out[1]).read_text() == Path("expected.jsonl").read_text()
