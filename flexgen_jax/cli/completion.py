"""The command ``completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands and options in SHELL.

    \b
    bash:  flexgen-jax completion bash > ~/.local/share/bash-completion/completions/flexgen-jax
    zsh:   flexgen-jax completion zsh > "${fpath[1]}/_flexgen-jax"
    fish:  flexgen-jax completion fish > ~/.config/fish/completions/flexgen-jax.fish
    """
    made = get_completion_class(shell)
    assert made is not None  # click knows the three
    root = context.find_root().command
    click.echo(made(root, {}, "flexgen-jax", "_FLEXGEN_JAX_COMPLETE").source())
