"""Measuring this machine, small; and a run that is predicted as well."""

import json

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax import profile as profiling
from flexgen_jax.cli import main


@pytest.fixture(scope="module")
def hardware(tmp_path_factory):
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "_ROWS", (2, 8))
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
        assert 1e6 < getattr(hardware, name) < 1e13, name
    assert fg.Hardware.from_json(json.loads(json.dumps(hardware.to_json()))) == hardware


def test_a_run_is_predicted_beside_being_measured(hardware, tmp_path):
    source, file = tmp_path / "in.jsonl", tmp_path / "h.json"
    source.write_text('{"prompt": "The king"}\n' * 5)
    file.write_text(json.dumps(hardware.to_json()))
    command = ["generate", "--model", "flexgen_jax/demo_model", "--offload-dir", tmp_path]
    command += ["-i", source, "-o", tmp_path / "out.jsonl", "--hardware", file, "--max-tokens", 4]
    command += ["--percent", *(0, 0, 0, 0, 0, 0), "--gpu-batch-size", 2, "--num-gpu-batches", 2]
    command += ["--trace", tmp_path / "t.json", "--json"]
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
