"""What is said when memory is not enough."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_jax.cli import address_space
from flexgen_jax.cli.failures import Failure, plain_errors

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("megabytes", [150, 600, 1200])
def test_too_few_addresses_are_one_line(tmp_path, megabytes):
    """Where Python cannot import, where JAX cannot start, and where it cannot compile."""
    (tmp_path / "in.jsonl").write_text("{}")
    model = str(ROOT / "flexgen_jax" / "demo_model")
    arguments = ["generate", "--model", model, "-i", "in.jsonl", "-o", "out.jsonl"]
    done = subprocess.run(
        [
            *("sh", "-c", f'ulimit -v {megabytes << 10}; exec "$@"', "sh"),
            *(sys.executable, "-m", "flexgen_jax", *arguments),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "(ulimit -v), and JAX on" in done.stderr


def test_what_is_enough_is_not_refused(monkeypatch):
    monkeypatch.setattr(address_space, "limit", lambda: 1 << 40)
    address_space.check()
    monkeypatch.setattr(address_space, "limit", lambda: None)
    address_space.check()


def test_cores_that_may_not_be_used_take_nothing(monkeypatch):
    """A container with two of a hundred cores is as small as a machine with two."""
    monkeypatch.setattr(address_space, "limit", lambda: 3 << 30)
    monkeypatch.setattr(os, "cpu_count", lambda: 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    address_space.check()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(100)), raising=False)
    with pytest.raises(MemoryError, match="JAX on 100 cores"):
        address_space.check()


def test_out_of_memory_is_one_line():
    with pytest.raises(Failure, match=r"^out of memory; smaller blocks") as caught, plain_errors():
        raise MemoryError
    assert caught.value.exit_code == 1
    with pytest.raises(Failure, match=r"^out of memory: 3 GB; smaller"), plain_errors():
        raise MemoryError("3 GB")
