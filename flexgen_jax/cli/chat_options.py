"""The command line's options for conversations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexgen_jax.cli.failures import Failure

if TYPE_CHECKING:
    from flexgen_jax.jobs.job import Chatting

_OPTIONS = [
    click.option(
        "--chat",
        is_flag=True,
        help="Take the prompt of each plain line as what a user says: the model's chat template "
        "makes a conversation of it.",
    ),
    click.option(
        "--chat-template",
        metavar="FILE|NAME",
        help="Use this Jinja template for conversations: a file, the name of one of the model's "
        "templates, or the template itself. [default: the model's own]",
    ),
]


def chat_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; :func:`read_chatting` takes their values."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_chatting(options: dict[str, Any]) -> Chatting:
    """What they say; takes them out of ``options``.

    Raises:
        Failure: a template's file that cannot be read.
    """
    from flexgen_jax.jobs.job import Chatting

    prompts, template = options.pop("chat"), options.pop("chat_template")
    if template is not None and "{" not in template:
        path = Path(template)
        if path.is_file():
            try:
                template = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise Failure(f"cannot read the chat template {path}: {error}") from error
        elif "/" in template or path.suffix:
            raise Failure(f"there is no chat template {path}")
    return Chatting(prompts, template)
