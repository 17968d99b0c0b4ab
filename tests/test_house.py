"""What holds the house together: checked shapes, a README that is true, an honest version."""

import ast
import dataclasses
import functools
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

import flexgen_jax as fg
from flexgen_jax.engine import kernels
from flexgen_jax.models import opt
from flexgen_jax.models.kv_cache import write_prompt

ROOT = Path(__file__).parent.parent


def test_shapes_and_dtypes_are_checked_in_tests():
    """If the import hook were gone, wrong shapes would pass unnoticed everywhere."""
    good = jnp.zeros((2, 3, 4, 5))
    with pytest.raises(TypeCheckError):
        write_prompt(good, jnp.zeros((2, 3, 9, 5)), 16)
    with pytest.raises(TypeCheckError):
        opt.attend(good, good, good, jnp.zeros((2, 4, 4)))  # floats where booleans belong
    with pytest.raises(TypeCheckError):
        kernels.embed({}, jnp.zeros(3, jnp.int32), 0, jnp.zeros(3, jnp.int32), config=None)


def test_everything_public_can_be_had():
    for name in fg.__all__:
        assert getattr(fg, name) is not None
    assert set(fg.__all__) == set(dir(fg))
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = fg.LLMs


def _members(name, value):
    """A public name, and of a class the methods and properties it defines."""
    yield name, value
    if inspect.isclass(value):
        for key, member in vars(value).items():
            if not key.startswith("_") and (
                inspect.isfunction(member)
                or isinstance(member, (property, functools.cached_property, classmethod))
            ):
                yield f"{name}.{key}", getattr(member, "__func__", member)


def _undocumented(names):
    """Those of them without a docstring of their own; what dataclasses make up is none."""
    for name, value in names:
        if callable(value) or isinstance(value, property):
            text = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
            if not text or text.startswith(f"{name}("):
                yield name


def test_everything_public_is_documented():
    everything = [m for name in fg.__all__ for m in _members(name, getattr(fg, name))]
    assert len(everything) > 2 * len(fg.__all__)
    assert list(_undocumented(everything)) == []


def test_what_has_no_docstring_is_noticed():
    @dataclasses.dataclass
    class Bare:
        value: int

        def method(self):
            return self.value

    class Heir(fg.Policy):
        pass

    assert list(_undocumented(_members("Bare", Bare))) == ["Bare", "Bare.method"]
    assert list(_undocumented(_members("Heir", Heir))) == ["Heir"]


# Whose JSON is read by themselves only, or parsed strictly: a NaN does no harm there.
_OWN_JSON = {
    *("windows.py", "dialects.py", "job.py", "parquet.py", "tables.py", "ray.py", "json_text.py"),
    *("logs.py", "bus_errors.py", "store_writer.py"),
}


def test_json_that_is_written_has_no_nan():
    """``json`` writes ``NaN`` unless it is told not to, which is not JSON."""
    for file in (f for name in ("flexgen_jax", "scheduling", "storage") for f in files_of(name)):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                strict = "allow_nan=False" in ast.unparse(node)
                assert strict or file.name in _OWN_JSON, f"{file}:{node.lineno}"


def files_of(package):
    return (ROOT / package).rglob("*.py")


def test_packages_are_typed_and_shipped():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    for package in build["targets"]["wheel"]["packages"]:
        assert (ROOT / package / "py.typed").exists()


def test_the_readmes_tables_are_made_from_the_results():
    script = ROOT / "benchmarks" / "tables.py"
    result = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_links_between_the_documents_lead_somewhere():
    import re

    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
