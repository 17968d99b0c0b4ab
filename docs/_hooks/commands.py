"""The page of the command line, read off the commands."""

import html
import inspect
import re
from collections.abc import Iterator

import click

from flexgen_jax.cli.app import main

PLACE = "<!-- commands -->"
NAME = "flexgen-jax"


def on_page_markdown(markdown, page, config, files):
    return markdown.replace(PLACE, "\n".join(reference()))


def reference() -> Iterator[str]:
    """A section for the group, and one for each of its commands."""
    context = click.Context(main, info_name=NAME)
    yield from _section(context)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        yield from _section(click.Context(command, info_name=name, parent=context))


def _section(context: click.Context) -> Iterator[str]:
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield from (f"## {context.command_path}", "", "```", usage, "```", "")
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b"):  # to be left as it is
            yield from ("```", inspect.cleandoc(paragraph.removeprefix("\b")), "```", "")
        else:
            yield from (_plain(paragraph), "")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            yield from (f"`{record[0]}`", f":   {_plain(record[1]) or '&nbsp;'}", "")


def _plain(text: str) -> str:
    return re.sub(r"([_*`\[\]])", r"\\\1", html.escape(text, quote=False))
