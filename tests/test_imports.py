"""Which package may import which: read off the source, so that it holds in every branch."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"scheduling", "storage", "flexgen_jax"}
MODEL_FILES = ("opt", "kv_cache", "sampling", "sampling_params", "params", "config")


def imported(source: str) -> set[str]:
    """Top-level names of all modules that ``source`` imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def test_the_reader_sees_every_kind_of_import():
    source = (
        "import a.b\ndef f():\n    from c.d import e\nif x:\n    import g as h\nfrom . import i"
    )
    assert imported(source) == {"a", "c", "g"}


@pytest.mark.parametrize("file", files("scheduling"), ids=lambda f: f.name)
def test_scheduling_knows_no_array_and_no_file(file):
    allowed = sys.stdlib_module_names | {"scheduling", "numpy", "scipy", "matplotlib"}
    assert imported(file.read_text()) <= allowed


@pytest.mark.parametrize("file", files("storage"), ids=lambda f: f.name)
def test_storage_knows_no_schedule_and_no_model(file):
    assert not imported(file.read_text()) & (OURS - {"storage"})


@pytest.mark.parametrize("name", MODEL_FILES)
def test_the_model_knows_neither(name):
    source = (ROOT / "flexgen_jax" / f"{name}.py").read_text()
    assert not imported(source) & (OURS - {"flexgen_jax"})
