"""Which package may import which: read off the source, so that it holds in every branch."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"scheduling", "storage", "flexgen_jax"}
# Of flexgen_jax's rooms and top-level files, which may know which: only what stands before them.
ORDER = (
    "_version",
    "_siblings",
    "logs",
    "arguments",
    "models",
    "requests",
    "weights",
    "planning",
    "engine",
    "distributed",
    "machine",
    "progress",
    "placed_model",
    "report",
    "completer",
    "scoring",
    "streaming",
    "llm",
    "compare",
    "evaluation",
    "jobs",
    "replicas",
    "ray",
    "demo",
    "cli",
    "__main__",
)


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


def modules() -> dict[str, Path]:
    """Dotted name below the root -> file, of all three packages."""
    found = {}
    for package in sorted(OURS):
        for file in files(package):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imported_modules(file: Path) -> set[str]:
    """Which of ours ``file`` imports, for type checkers or in functions as well."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole & set(MODULES) or {node.module} & set(MODULES)
    return found


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("name", [m for m in MODULES if m.startswith("flexgen_jax.")])
def test_a_room_knows_only_those_before_it(name):
    """What is public comes from everywhere; it is imported when first used."""
    rank = ORDER.index(room(name))
    for other in imported_modules(MODULES[name]):
        if other.startswith("flexgen_jax."):
            assert ORDER.index(room(other)) <= rank, f"{name} imports {other}"
    if room(name) == "models":
        assert not imported(MODULES[name].read_text()) & (OURS - {"flexgen_jax"})


def test_nothing_goes_round_in_circles():
    graph = {name: imported_modules(file) for name, file in MODULES.items()}
    graph["flexgen_jax"] = set()  # its names are imported when first used
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_two_files_have_one_name():
    names = [file.name for file in MODULES.values() if not file.name.startswith("__")]
    assert sorted(names) == sorted(set(names))


def test_every_room_says_what_it_is_for():
    for file in (ROOT / "flexgen_jax").glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), file
