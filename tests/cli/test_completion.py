"""Completion: the scripts, and what they are answered."""

import shutil
import subprocess

import pytest
from click.testing import CliRunner

from flexgen_jax.cli.app import main


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script(shell, tmp_path):
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0, done.output
    assert f"_FLEXGEN_JAX_COMPLETE={shell}_complete" in done.stdout
    assert "flexgen-jax" in done.stdout
    if shutil.which(shell):
        script = tmp_path / "script"
        script.write_text(done.stdout)
        subprocess.run([shell, "-n", str(script)], check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("flexgen-jax do", {"doctor"}),
        ("flexgen-jax generate --num-d", {"--num-device-batches"}),
        ("flexgen-jax generate --num-g", {"--num-gpu-batches", "--num-groups"}),
        ("flexgen-jax generate --dtype ", {"auto", "float32", "bfloat16"}),
        ("flexgen-jax completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_what_is_completed(words, expected):
    environment = {
        "_FLEXGEN_JAX_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = CliRunner().invoke(main, [], env=environment, prog_name="flexgen-jax")
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == expected


def test_an_unknown_shell():
    done = CliRunner().invoke(main, ["completion", "csh"])
    assert done.exit_code == 2
    assert "'bash', 'zsh', 'fish'" in done.stderr
