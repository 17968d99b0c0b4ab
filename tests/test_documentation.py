"""The documents say what the code says: messages, names, options, events, formats."""

import ast
import json
import re
import runpy
from pathlib import Path

import flexgen_jax as fg
from flexgen_jax.cli.app import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGES = ("flexgen_jax", "scheduling", "storage")


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def said_by_the_code():
    """All texts in the packages' source; of a formatted one its fixed parts, as `…` splits them."""
    texts = []
    for file in (f for package in PACKAGES for f in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_messages_of_the_troubleshooting_page_are_the_codes_own():
    quoted = re.findall(r"^> `(.+)`$", page("troubleshooting.md"), re.MULTILINE)
    assert len(quoted) > 15
    code = said_by_the_code()
    for message in quoted:
        parts = [re.escape(part) for part in message.split("…")]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(pattern.search(text) for text in code), message


def test_every_public_name_is_on_the_page_of_the_api():
    listed = set(re.findall(r"^::: [\w.]+\.(\w+)$", page("api.md"), re.MULTILINE))
    assert set(fg.__all__) - {"__version__"} <= listed


def test_the_reference_has_every_command_and_option():
    text = "\n".join(runpy.run_path(str(DOCS / "_hooks" / "commands.py"))["reference"]())
    assert runpy.run_path(str(DOCS / "_hooks" / "commands.py"))["PLACE"] in page("cli.md")
    for name, command in main.commands.items():
        section = text.split(f"## flexgen-jax {name}\n")[1].split("\n## ")[0]
        for option in command.params:
            if option.param_type_name == "option":
                assert all(f"{flag}" in section for flag in option.opts), (name, option.opts)


def test_every_event_is_listed():
    called = set()
    for file in (ROOT / "flexgen_jax").rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        called |= set(re.findall(r"\b(?:event|_log_tokens)\(\s*\"([a-z ]+)\"", source))
    assert len(called) > 8
    assert called - set(re.findall(r"`([a-z ]+)`", page("operations.md"))) == set()


def test_the_documented_policy_file_is_the_default():
    (text,) = re.findall(r"```json\n(.*?)```", page("policies.md"), re.DOTALL)
    assert json.loads(text) == json.loads(json.dumps(fg.Policy().to_json()))
