"""A user's own ``storage.py`` beside their script is noticed, and the cure named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(script, *flags):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        [sys.executable, *flags, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.mark.parametrize("name", ["storage", "scheduling"])
@pytest.mark.parametrize("first", ["", "import {name}\n"])
def test_a_shadowed_package_is_named(tmp_path, name, first):
    intruder = tmp_path / f"{name}.py"
    intruder.write_text("")
    script = tmp_path / "script.py"
    script.write_text(first.format(name=name) + "import flexgen_jax\nprint('fine')\n")
    result = run(script)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: ")
    assert str(intruder) in message
    assert "python -P" in message
    result = run(script, "-P")
    assert result.stdout == "fine\n", result.stderr
