"""What people read in a hurry: help whose every line stands alone, and none of the old phrases."""

import re
from pathlib import Path

import click
import pytest

from flexgen_jax.cli.app import main

ROOT = Path(__file__).parents[2]
COMMANDS = {name: command for name, command in main.commands.items() if name != "eval"}
STUMBLED_OVER = [
    "asked for was",
    "is no model:",
    "so or so",
    "Say nothing but errors",
    "requests are finished already",
    "there is no going on from there",
    "was begun otherwise",
    "begin anew",
    "cannot be said before",
    "to expect of {",
    "not profiled: taken for",
    "taken for lost",
    "Told in plain words",
    "Rows of one memory",
]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_is_explained_by_itself(name):
    for option in COMMANDS[name].params:
        if not isinstance(option, click.Option):
            continue
        text = option.help or ""
        assert text, f"{name}: {option.opts} has no help"
        assert not re.match(r"(Likewise|Of |The same, with|Such )", text), f"{option.opts}: {text}"
        assert text[0].isupper() or text[0] in "'{0-j", f"{option.opts}: {text}"
        assert text.endswith((".", "]")), f"{option.opts}: {text}"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_says_its_default(name):
    """In what is shown of it. A switch is off unless it is given; what is ignored does nothing."""
    context = click.Context(COMMANDS[name], info_name=name)
    for option in COMMANDS[name].params:
        if not isinstance(option, click.Option) or (option.is_flag and not option.secondary_opts):
            continue
        record = option.get_help_record(context)
        assert record is not None
        shown = record[1]
        if not shown.startswith("Ignored:"):
            assert "[default: " in shown or "required" in shown, f"{name}: {option.opts}: {shown}"


def test_phrases_that_people_stumble_over_are_gone():
    for folder, ends in (
        ("flexgen_jax", "*.py"),
        ("scheduling", "*.py"),
        ("storage", "*.py"),
        ("docs", "*.md"),
        ("benchmarks", "*.py"),
    ):
        for file in (ROOT / folder).rglob(ends):
            text = " ".join(file.read_text(encoding="utf-8").split())
            for phrase in STUMBLED_OVER:
                assert phrase not in text, f"{file}: {phrase}"
