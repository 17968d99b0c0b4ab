"""The examples run, and say what they promise."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = str(Path(__file__).parent / "goldens" / "pre_norm")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXGEN_JAX_CACHE", str(tmp_path))


def test_own_schedule(capsys):
    runpy.run_path(str(EXAMPLES / "own_schedule.py"))["main"](MODEL)
    out = capsys.readouterr().out
    assert "back_and_forth: " in out
    assert "the same tokens" in out


def test_generate(capsys):
    runpy.run_path(str(EXAMPLES / "generate.py"))["main"](
        str(EXAMPLES.parent / "flexgen_jax" / "demo_model")
    )
    out = capsys.readouterr().out
    assert "'ROMEO:\\n' -> " in out
    assert "tokens/s" in out
