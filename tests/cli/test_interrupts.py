"""Ctrl-C in every phase of the command, three times over: one line and 130, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_jax.cli.signals import Terminated, exit_code, terminable

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "tests" / "goldens" / "pre_norm")

# Interrupts itself when a module is first looked for, a function is called, or at the very end.
PROGRAM = """
import atexit, os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
when = sys.argv.pop(1)


def interrupt(*_):
    global interrupt
    interrupt = lambda *_: None
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)


class Finder:
    def find_spec(self, name, *_):
        if name == when:
            interrupt()


sys.meta_path.insert(0, Finder())
if when == "exit":
    atexit.register(lambda: interrupt())
if when == "job":
    from flexgen_jax.engine.effects import BlockEffects

    book, calls = BlockEffects._book, []

    def booking(self, state):
        book(self, state)
        calls.append(None)
        if len(calls) == 3:
            interrupt()

    BlockEffects._book = booking
from flexgen_jax.cli.entry import main

main()
"""


def run(when, *arguments):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, when, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("interrupts")
    line = json.dumps({"prompt_token_ids": [5, 6]}) + "\n"
    (scratch / "in.jsonl").write_text(line * 8)
    return [
        *("generate", "--model", MODEL, "--offload-dir", scratch / "offload"),
        *("-i", scratch / "in.jsonl", "--max-tokens", 40, "--ignore-eos"),
        *("--device-batch-size", 2, "--num-device-batches", 1),
    ]


@pytest.mark.parametrize(
    "when",
    ["flexgen_jax.cli.app", "click", "jax", "jax._src.xla_bridge", "flexgen_jax.llm", "rich"],
)
def test_before_the_job_it_ends_at_once(when, arguments, tmp_path):
    done = run(when, *arguments, "-o", tmp_path / "out")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "Error: interrupted")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_while_the_job_runs_it_says_what_is_kept(arguments, tmp_path):
    done = run("job", *arguments, "-o", tmp_path / "out", "--quiet")
    assert done.returncode == 130, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("Error: interrupted: ")


def test_at_the_end_it_changes_nothing():
    done = run("exit", "--version")
    assert (done.returncode, done.stderr) == (0, "")


def test_in_the_log_it_is_an_object(arguments, tmp_path):
    log = ["--log-format", "json"]
    done = run("flexgen_jax.llm", *log, *arguments, "-o", tmp_path / "out")
    assert done.returncode == 130
    assert json.loads(done.stderr.splitlines()[-1])["message"] == "interrupted"


def test_sigterm_has_its_exit_code_also_where_another_interrupt_takes_its_place():
    """As where Ray waits: it raises a KeyboardInterrupt of its own."""
    with terminable():
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        assert exit_code(KeyboardInterrupt()) == 143
    with terminable():
        assert exit_code(KeyboardInterrupt()) == 130
