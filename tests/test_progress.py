"""The bar fits its terminal, and does not get in the way of what is said before it."""

import io

import pytest
from rich.console import Console

from flexgen_jax import progress


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_it_fits_the_terminal(width, monkeypatch):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, soft_wrap=True, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    with progress.count(None, "generating", "tokens", first="compiling, prefill") as bar:
        console.print("what is said first")
        said = out.getvalue()
        bar.expect(123456, exactly=False)
        bar._bar.refresh()
        before = out.getvalue()[len(said) :]
        bar(12345)
        bar._bar.refresh()
    after = out.getvalue()[len(said) + len(before) :]
    assert "0/" not in said
    assert "compiling, prefill 0/~123456 tokens" in " ".join(before.split()) or width >= 100
    assert "generating" in after
    assert "12345/~123456 tokens" in after
    for line in out.getvalue().replace("\r", "\n").split("\n"):
        plain = "".join(part.partition("K")[2] or part for part in line.split("\x1b[2"))
        plain = plain.replace("\x1b[?25l", "").replace("\x1b[?25h", "").replace("\x1b[1A", "")
        assert len(plain) <= width, repr(plain)
