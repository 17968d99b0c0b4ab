"""Measuring this machine, small; and a run that is predicted as well."""

import json

import jax
import jax.monitoring
import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.machine import profile as profiling
from flexgen_jax.machine.this_machine import this_machine


@pytest.fixture(scope="module")
def hardware(tmp_path_factory):
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "_ROWS", (2, 8))
        patch.setattr(profiling, "_STEPS", 4)
        directory = tmp_path_factory.mktemp("disk")
        found = profiling.profile(
            directory, dtype="float32", repeats=1, file_nbytes=1 << 20, say=said.append
        )
    assert list(directory.iterdir()) == []
    assert len(said) >= 4
    return found


def test_every_figure_is_measured(hardware):
    assert [rows for rows, _ in hardware.matmul] == [2, 8]
    assert hardware.host_to_device is None  # one memory, on a CPU
    assert hardware.device_memory + hardware.host_memory > 1e8
    for name in ("disk_to_host", "attention", "cached_attention", "dequantize"):
        assert 1e6 < getattr(hardware, name) < 1e12, name  # no memory is faster
    assert fg.Hardware.from_json(json.loads(json.dumps(hardware.to_json()))) == hardware


def test_a_run_is_predicted_beside_being_measured(hardware, tmp_path):
    source, file = tmp_path / "in.jsonl", tmp_path / "h.json"
    source.write_text('{"prompt": "The king"}\n' * 5)
    file.write_text(json.dumps(hardware.to_json()))
    command = ["generate", "--model", "flexgen_jax/demo_model", "--offload-dir", tmp_path]
    command += ["-i", source, "-o", tmp_path / "out.jsonl", "--hardware", file, "--max-tokens", 4]
    command += ["--percent", *(0, 0, 0, 0, 0, 0), "--gpu-batch-size", 2, "--num-gpu-batches", 2]
    command += ["--trace", tmp_path / "t.json", "--json", "--no-refill"]
    done = CliRunner().invoke(main, [str(a) for a in command])
    assert done.exit_code == 0, done.output
    assert "predicted" in done.stderr
    both = json.loads(done.stdout)["predicted"]
    assert both["makespan"]["predicted_seconds"] > 0
    assert both["load weights"]["ratio"] > 0
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"predicted", "measured"}
    spans = [e for e in events if e["ph"] == "X"]
    counted = [
        sum(e["pid"] == process and e["name"].startswith("Compute") for e in spans)
        for process in (1, 2)
    ]
    assert counted[0] == counted[1]


def test_the_command(monkeypatch, tmp_path, hardware):
    monkeypatch.setattr(profiling, "profile", lambda *args, **options: hardware)
    done = CliRunner().invoke(main, ["profile", "-o", str(tmp_path / "h.json"), "--json"])
    assert done.exit_code == 0, done.output
    assert fg.Hardware.load(str(tmp_path / "h.json")) == hardware
    assert json.loads(done.stdout)["name"] == hardware.name
    wrong = CliRunner().invoke(main, ["profile", "-o", str(tmp_path / "none" / "h.json")])
    assert wrong.exit_code == 2
    assert "cannot write" in wrong.output


def test_what_profile_saves_is_what_runs_use(monkeypatch, tmp_path, hardware):
    monkeypatch.setenv("FLEXGEN_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(profiling, "profile", lambda *args, **options: hardware)
    assert this_machine("float32").name.startswith("not profiled; using preset ")
    done = CliRunner().invoke(main, ["profile", "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert this_machine("float32") == hardware
    assert this_machine("bfloat16").name.startswith("not profiled; using preset ")
    with fg.LLM("flexgen_jax/demo_model", dtype="float32", offload_dir=str(tmp_path)) as llm:
        llm.generate([[5, 6]], fg.SamplingParams(max_tokens=2))
        assert llm.report.hardware == hardware.name


def test_calibrating_by_a_report(tmp_path, hardware):
    source, file = tmp_path / "in.jsonl", tmp_path / "h.json"
    source.write_text('{"prompt": "The king and the queen"}\n' * 8)
    file.write_text(json.dumps(hardware.to_json()))
    command = ["generate", "--model", "flexgen_jax/demo_model", "--offload-dir", tmp_path]
    command += ["-i", source, "-o", tmp_path / "out.jsonl", "--hardware", file, "--max-tokens", 8]
    command += ["--percent", *(0, 0, 0, 0, 0, 0), "--gpu-batch-size", 4, "--num-gpu-batches", 2]
    done = CliRunner().invoke(main, [str(a) for a in [*command, "--json"]])
    assert done.exit_code == 0, done.output
    report = tmp_path / "report.json"
    report.write_text(done.stdout)
    rows = json.loads(done.stdout)["observations"]
    assert {row["op"] for row in rows} >= {"Compute", "LoadWeights"}
    better = tmp_path / "better.json"
    calibrate = ["profile", "--calibrate", report, "--hardware", file, "-o", better]
    done = CliRunner().invoke(main, [str(a) for a in calibrate])
    assert done.exit_code == 0, done.output
    assert "times as long as predicted" in done.output
    fitted = fg.Hardware.load(str(better))
    assert fitted.name == f"{hardware.name}, calibrated"
    assert fitted.disk_to_host != hardware.disk_to_host
    for change, words in (
        (["--hardware", "t4"], "was predicted for"),
        (["--calibrate", source], "is not a report"),
        (["--calibrate", tmp_path / "none"], "cannot read"),
    ):
        wrong = CliRunner().invoke(main, [str(a) for a in [*calibrate, *change]])
        assert wrong.exit_code == 2
        assert words in wrong.output
    wrong = CliRunner().invoke(main, ["profile", "--hardware", "t4"])
    assert wrong.exit_code == 2
    assert "--hardware goes with --calibrate" in wrong.output


def test_made_up_arrays_compile_nothing():
    """What a doctor's short look would spend most of its time on."""
    events = []
    listener = lambda event, seconds, **_: events.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    for rows in range(3, 6):
        made = profiling._normal(rows, 41, dtype="bfloat16")
        assert (made.shape, made.dtype.name) == ((rows, 41), "bfloat16")
    jax.monitoring.unregister_event_duration_listener(listener)
    assert not [event for event in events if "backend_compile" in event]
