"""A profile that makes itself: once, by one process, and never in the way of a run."""

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.machine import first_profile, this_machine
from flexgen_jax.machine import profile as profiling

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "tests" / "goldens" / "pre_norm")
SHORT = dataclasses.replace(fg.Hardware.preset("laptop"), name="measured briefly", short=True)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """How often, and with what, the machine was measured; a user's environment."""
    calls = []

    def profile(directory, **options):
        calls.append(options)
        return SHORT

    monkeypatch.setattr(profiling, "profile", profile)
    monkeypatch.setenv("FLEXGEN_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLEXGEN_JAX_PROFILE", "")
    return calls


def opened(tmp_path, **options):
    said = []
    with fg.LLM(MODEL, offload_dir=str(tmp_path / "work"), say=said.append, **options) as llm:
        return llm.hardware, [line for line in said if "profile" in line or "measured" in line]


def test_the_first_run_measures_and_the_next_one_knows(measured, tmp_path):
    hardware, said = opened(tmp_path, dtype="float32")
    assert hardware == SHORT
    (line,) = said
    assert "measured a short one in" in line
    assert "'flexgen-jax profile' makes a full one" in line
    saved = this_machine.profile_path("float32")
    assert str(saved) in line
    assert json.loads(saved.read_text())["short"] is True
    assert opened(tmp_path, dtype="float32") == (SHORT, [])
    (call,) = measured
    assert call["short"]
    # Another dtype's figures are others.
    assert opened(tmp_path, dtype="bfloat16")[0] == SHORT
    assert [c["dtype"] for c in measured] == ["float32", "bfloat16"]


@pytest.mark.parametrize("other", ["version of JAX", "number of cores", "processor"])
def test_another_machine_has_figures_of_its_own(measured, monkeypatch, tmp_path, other):
    opened(tmp_path)
    if other == "version of JAX":
        monkeypatch.setattr(jax, "__version__", "0.99.3")
    elif other == "number of cores":
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    else:
        monkeypatch.setattr(this_machine, "this_cpu", lambda: "riscv64-1234")
    opened(tmp_path)
    assert len(measured) == len(list((tmp_path / "cache").glob("hardware-*.json"))) == 2


def test_the_command_profile_replaces_it(measured, monkeypatch, tmp_path):
    opened(tmp_path, dtype="float32")
    full = dataclasses.replace(SHORT, name="in full", short=False)
    monkeypatch.setattr(profiling, "profile", lambda *args, **options: full)
    done = CliRunner().invoke(main, ["profile", "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert opened(tmp_path, dtype="float32") == (full, [])


@pytest.mark.parametrize("how", ["argument", "variable", "hardware", "command"])
def test_it_can_be_turned_off(measured, monkeypatch, tmp_path, how):
    if how == "command":
        source = tmp_path / "in.jsonl"
        source.write_text('{"prompt_token_ids": [5, 6]}\n')
        for number, more in enumerate((["--no-profile"], [])):
            command = ["generate", "--model", MODEL, "--offload-dir", tmp_path, "--max-tokens", 2]
            command += ["-i", source, "-o", tmp_path / f"out{number}.jsonl", *more]
            done = CliRunner().invoke(main, [str(a) for a in command])
            assert done.exit_code == 0, done.output
            assert len(measured) == number
        return
    if how == "variable":
        monkeypatch.setenv("FLEXGEN_JAX_PROFILE", "off")
    options = {"argument": {"profile": False}, "hardware": {"hardware": fg.Hardware.preset("t4")}}
    hardware, said = opened(tmp_path, **options.get(how, {}))
    assert hardware != SHORT
    assert measured == said == []
    assert not list((tmp_path / "cache").glob("hardware-*"))


@pytest.mark.parametrize("trouble", ["cannot be written", "full", "out of memory"])
def test_no_trouble_stops_a_run(measured, monkeypatch, tmp_path, trouble):
    if trouble == "cannot be written":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FLEXGEN_JAX_CACHE", str(tmp_path / "file" / "cache"))
    else:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if trouble == "out of memory":
            error = RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")

        def fails(*args, **options):
            raise error

        monkeypatch.setattr(profiling, "profile", fails)
    hardware, said = opened(tmp_path)
    assert hardware.name.startswith("not profiled; using preset ")
    (line,) = said
    assert line.startswith("this machine could not be measured (")
    assert "\n" not in line
    assert measured == []
    assert not list((tmp_path / "cache").glob("*.json"))


def test_only_the_first_of_several_processes_measures(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    found = first_profile.known_machine("float32", tmp_path, measure=True, say=print)
    assert found.name.startswith("not profiled")
    assert measured == []


def test_who_hangs_is_not_waited_for(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(first_profile, "_PATIENCE", 0.0)
    lock = this_machine.profile_path("float32").with_suffix(".json.lock")
    lock.parent.mkdir(parents=True)
    said = []
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = first_profile.known_machine("float32", tmp_path, measure=True, say=said.append)
    assert found.name.startswith("not profiled")
    assert "another process is measuring" in said[0]
    assert measured == []


BOTH = """
import dataclasses, os, sys, time
from pathlib import Path
import flexgen_jax as fg
from flexgen_jax.machine import first_profile, profile
here = Path(sys.argv[1])

def measure(directory, **options):
    with open(here / "log", "a") as log:
        log.write("measured\\n")
    # Until both are at it: the other one waits for this one, or comes later still.
    while not ((here / "begun-1").exists() and (here / "begun-2").exists()):
        time.sleep(0.01)
    return dataclasses.replace(fg.Hardware.preset("laptop"), name=f"by {os.getpid()}", short=True)

profile.profile = measure
(here / f"begun-{sys.argv[2]}").touch()
print(first_profile.known_machine("float32", here, measure=True, say=lambda _: None).name)
"""


def test_of_two_processes_that_begin_at_once_one_measures(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FLEXGEN_JAX_PROFILE": ""}
    environment["FLEXGEN_JAX_CACHE"] = str(tmp_path / "cache")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BOTH, str(tmp_path), str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    names = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert names[0] == names[1] != ""
    assert (tmp_path / "log").read_text() == "measured\n"


def test_a_profile_is_saved_as_a_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "hardware.json"
    this_machine.save(SHORT, path)

    def fails(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        this_machine.save(fg.Hardware.preset("t4"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["hardware.json"]
    assert fg.Hardware.load(str(path)) == SHORT


def test_a_short_profile_is_a_part_of_the_full_one_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(profiling, "_SHORT_ROWS", (2, 8))
    monkeypatch.setattr(profiling, "_STEPS", 4)
    found = profiling.profile(tmp_path, dtype="float32", repeats=1, file_nbytes=1 << 20, short=True)
    assert list(tmp_path.iterdir()) == []
    assert found.short
    assert found.name.endswith(", measured briefly")
    assert [rows for rows, _ in found.matmul] == [2, 8]
    assert found.disk_to_host_cache == found.disk_to_host
    near = fg.Hardware.preset("laptop")
    assert found.dequantize / near.dequantize == pytest.approx(
        found.cached_attention / near.cached_attention
    )
    for name in ("compute_overhead", "load_overhead", "step_overhead", "elementwise"):
        assert getattr(found, name) >= 0
    assert fg.Hardware.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_narrow_layer_tells_what_a_layer_takes_beside_products(monkeypatch):
    per_value, rate = 10e-9, 4e11

    def layer_rate(config, params, rows, *_):
        flops = profiling._flops(config)
        return flops / (flops / rate + config.hidden_size * per_value)

    monkeypatch.setattr(profiling, "_layer_rate", layer_rate)
    points = profiling._layers(profiling._SHORT_ROWS, "bfloat16", 1)
    found = profiling._elementwise(points, "bfloat16", 1)
    assert found == pytest.approx(per_value)
    alone = profiling._products(points, found)
    assert [each for _, each in alone] == pytest.approx([rate] * len(points))
