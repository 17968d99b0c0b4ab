"""Where the command ``flexgen-jax`` begins."""

from __future__ import annotations

from flexgen_jax.cli import interrupts


def main() -> None:
    """Runs the command line, and exits."""
    interrupts.install()
    from flexgen_jax.cli.app import main as command

    try:
        command(prog_name="flexgen-jax")
    finally:
        interrupts.ignore()
