"""Programs are kept between processes, and nothing depends on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_jax.machine import kept_programs

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "tests" / "goldens" / "pre_norm")


@pytest.fixture
def job(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt_token_ids": [5, 6]}\n' * 2)

    def run(name, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}
        environment["FLEXGEN_JAX_CACHE"] = str(tmp_path / "cache")
        arguments = ["generate", "--model", MODEL, "-i", tmp_path / "in.jsonl"]
        arguments += ["-o", tmp_path / name, "--max-tokens", 3, "--json", "--temperature", 1]
        arguments += ["--logprobs", 3]
        done = subprocess.run(
            [sys.executable, "-m", "flexgen_jax", *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not [line for line in done.stderr.splitlines() if "ache entry" in line]
        return (tmp_path / name).read_bytes(), json.loads(done.stdout), done.stderr

    return run


def kept(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache" / "programs").rglob("*-cache"))


def test_the_next_process_takes_them_to_the_same_bits(job, tmp_path):
    plain, _, said = job("plain", FLEXGEN_JAX_PROGRAMS="off")
    assert not (tmp_path / "cache" / "programs").exists()
    first, report, said_first = job("first", FLEXGEN_JAX_PROGRAMS="")
    programs = kept(tmp_path)
    assert len(programs) >= report["compilations"] > 0
    second, _, said_second = job("second", FLEXGEN_JAX_PROGRAMS="")
    assert kept(tmp_path) == programs  # nothing was compiled anew
    assert plain == first == second
    # XLA has nothing to say about what it loads: as many lines each time.
    assert said_second.count("\n") == said_first.count("\n") <= said.count("\n")


def test_a_damaged_program_is_compiled_again(job, tmp_path):
    first, *_ = job("first", FLEXGEN_JAX_PROGRAMS="")
    for path in (tmp_path / "cache" / "programs").rglob("*-cache"):
        path.write_bytes(b"damaged")
    assert job("second", FLEXGEN_JAX_PROGRAMS="")[0] == first


def test_a_directory_that_cannot_be_written_is_left_alone(job, tmp_path):
    (tmp_path / "file").write_text("")
    job("out", FLEXGEN_JAX_PROGRAMS=str(tmp_path / "file" / "below"))
    assert (tmp_path / "file").read_text() == ""


PROGRAMS = """
import resource, sys
from flexgen_jax.machine import kept_programs
kept_programs.MOST_NBYTES = int(sys.argv[1])
kept_programs.keep_programs()
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # no file may be longer
import jax, jax.numpy as jnp
for n in range(2, 8):
    print(float(jax.jit(lambda x: jnp.tanh(x @ x.T).sum() * n)(jnp.ones((n, n)))))
"""


@pytest.fixture
def compiled(tmp_path):
    """What six programs say whose cache has so much room; and what is kept of them."""

    def run(most_nbytes, disk="", name="kept"):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        environment |= {"FLEXGEN_JAX_PROGRAMS": str(tmp_path / name)}
        command = [sys.executable, "-c", PROGRAMS, str(most_nbytes), disk]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout, {p.name: p.stat().st_size for p in (tmp_path / name).rglob("*-cache")}

    return run


def test_they_are_bounded(compiled):
    said, kept = compiled(10**9)
    assert len(kept) >= 6
    most = sum(kept.values()) // 2
    again, fewer = compiled(most, name="bounded")
    assert again == said
    assert 0 < sum(fewer.values()) <= most


def test_few_enough_are_kept_to_look_at_each(tmp_path, monkeypatch):
    """Those that were used last stay; nothing happens while there are no more than the most."""
    monkeypatch.setenv("FLEXGEN_JAX_PROGRAMS", str(tmp_path))
    monkeypatch.setattr(kept_programs, "MOST", 8)
    monkeypatch.setattr(kept_programs, "_in_use", lambda: False)
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    directory = tmp_path / kept_programs.this_cpu()
    directory.mkdir()

    def add(names):
        for name in names:
            (directory / f"{name}-cache").write_bytes(b"program")
            used = (99 - int(name)).to_bytes(8, "little")  # the first was used last
            (directory / f"{name}-atime").write_bytes(used)

    def names():
        assert kept_programs.keep_programs() == directory
        found = {path.name.partition("-") for path in directory.iterdir()}
        assert {last for *_, last in found} == {"atime", "cache"}
        return sorted({name for name, *_ in found}, key=int)

    add(map(str, range(8)))
    assert names() == [str(n) for n in range(8)]
    add(map(str, range(8, 11)))
    assert names() == [str(n) for n in range(6)]


def test_a_full_disk_ends_nothing(compiled, tmp_path):
    """Halves that it leaves are in nobody's way later."""
    said, halves = compiled(10**9, "full")
    assert said.count("\n") == 6
    assert set(halves.values()) <= {100}
    for path in (tmp_path / "kept").rglob("*-cache"):
        os.utime(path, (0, 0))
    again, kept = compiled(10**9)
    assert again == said
    assert len(kept) >= 6
    assert min(kept.values()) > 100


def test_each_kind_of_cpu_has_a_directory(monkeypatch):
    texts = iter(["flags : a b\n", "flags : a b c\n", "flags : b a\n"])
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: next(texts))
    one, other, same = (kept_programs.this_cpu() for _ in range(3))
    assert one != other
    assert one == same
