"""The doctor: what it says of this machine, and of machines that are ill."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.distributed import backends
from flexgen_jax.machine import doctor, file_system, profile
from flexgen_jax.machine.outlook import outlook

LAPTOP = fg.Hardware.preset("laptop")
SMALL = {"hardware": LAPTOP, "models": ["opt-125m"], "file_nbytes": 1 << 20}


def levels(found):
    return {f.check: f.level for f in found.findings}


def message(found, check):
    (text,) = (f.message for f in found.findings if f.check == check)
    return text


def test_this_machine_is_well(tmp_path):
    where = tmp_path / "not" / "there"
    found = doctor.diagnose(where, **SMALL)
    assert found.healthy
    assert set(levels(found).values()) <= {"ok", "warning"}
    assert found.versions["flexgen-jax"] == fg.__version__
    assert all(found.versions[name] for name in ("python", "jax", "jaxlib", "tensorstore", "numpy"))
    assert len(found.devices) >= 1
    assert 0 < found.memory["available"] <= found.memory["total"]
    assert found.disk_speed["read"] > 1e5
    assert found.file_system.locks
    (model,) = found.outlook
    assert not model.obstacles
    assert model.plan.tokens_per_second > 1
    assert not where.exists()
    assert list(tmp_path.iterdir()) == []
    assert json.loads(json.dumps(found.to_json()))["healthy"] is True


def test_without_a_file_the_machine_is_measured(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(profile, "profile", lambda *a, **k: asked.append((a, k)) or LAPTOP)
    found = doctor.diagnose(tmp_path, models=["opt-125m"], dtype="float32", file_nbytes=1 << 20)
    assert asked == [((tmp_path,), {"dtype": "float32", "repeats": 1, "file_nbytes": 1 << 20})]
    assert found.hardware is LAPTOP
    assert found.disk_speed["read"] == LAPTOP.disk_to_host


def test_a_device_that_computes_nothing(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand a long story")

    monkeypatch.setattr(profile, "profile", full)
    found = doctor.diagnose(tmp_path, file_nbytes=1 << 20)
    assert not found.healthy
    assert "nothing: RESOURCE_EXHAUSTED: Out of memory; see" in message(found, "compute")
    assert found.disk_speed["read"] > 0
    assert found.outlook == ()


def run(*arguments):
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_FILE_NBYTES", 1 << 20)
    file = tmp_path / "hardware.json"
    file.write_text(json.dumps(LAPTOP.to_json()))
    done = run("--offload-dir", tmp_path, "--hardware", file, "--model", "opt-125m")
    assert done.exit_code == 0, done.output
    assert f"jax {fg.__version__}, python 3." in done.stdout
    assert "opt-125m" in done.stdout
    assert re.search(
        r"tokens/s in blocks of \d+ x \d+; policy auto, weights: device 100%", done.stdout
    )
    done = run("--offload-dir", tmp_path, "--hardware", "t4", "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert [model["model"] for model in values["outlook"]] == list(doctor.PRESETS)
    assert values["hardware"]["name"].startswith("NVIDIA T4")


def test_a_model_that_is_to_be_run_must_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_FILE_NBYTES", 1 << 20)
    done = run("--offload-dir", tmp_path, "--hardware", "laptop", "--model", "opt-175b")
    assert done.exit_code == 1
    assert "error    opt-175b" in done.stdout
    assert "its weight store takes 349.2 GB of disk, 200.0 GB are free" in done.stdout
    assert run("--hardware", "laptop", "--model", "opt-7b").exit_code == 2


def test_what_little_memory_is_enough_for():
    """Auto goes down to the disk; what does not fit even so is said."""
    sizes = {"prompt_len": 256, "gen_len": 32, "dtype": "bfloat16"}
    small = fg.Hardware(**{**LAPTOP.to_json(), "device_memory": 4e8, "host_memory": 4e8})
    found = outlook("opt-1.3b", small, **sizes)
    assert (found.policy, found.obstacles) == ("auto", ())
    assert found.plan.policy.weights.disk > 50
    tiny = fg.Hardware(**{**LAPTOP.to_json(), "device_memory": 3e7, "host_memory": 1e6})
    found = outlook("opt-1.3b", tiny, **sizes)
    assert found.policy == "all on disk"
    assert found.obstacles[0].startswith("one request with everything on disk: memory: 0.")


def test_one_memory_is_judged_as_one():
    """A CPU's halves are not limits: what overflows one may lie in the other."""
    sizes = {"prompt_len": 256, "gen_len": 32, "dtype": "bfloat16"}
    halves = fg.Hardware(**{**LAPTOP.to_json(), "device_memory": 2e9, "host_memory": 9e9})
    links = ("host_to_device", "device_to_host_cache", "device_to_host_hidden")
    apart = fg.Hardware(**{**halves.to_json(), **dict.fromkeys(links, 1e10)})
    assert outlook("opt-1.3b", halves, **sizes).plan.policy.weights == fg.Split()
    assert outlook("opt-1.3b", apart, **sizes).plan.policy.weights.host > 10


def test_too_few_open_files_are_noticed(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    found = outlook(
        "opt-66b", fg.Hardware.preset("h200"), prompt_len=32, gen_len=2, dtype="bfloat16"
    )
    assert "1024 are allowed: raise the limit by 'ulimit -n'" in found.obstacles[0]


def test_a_broken_platform_is_said_plainly(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "wurst"}
    done = subprocess.run(
        [sys.executable, "-m", "flexgen_jax", "doctor", "--offload-dir", str(tmp_path), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    (wrong,) = (f for f in found["findings"] if f["level"] == "error")
    assert wrong["check"] == "backend"
    assert "JAX_PLATFORMS=wurst" in wrong["message"]
    assert "Set JAX_PLATFORMS=cpu" in wrong["message"]
    assert found["outlook"] == []
    assert found["disk_bytes_per_second"]["read"] > 0
    job = tmp_path / "in.jsonl"
    job.write_text('{"prompt_token_ids": [5]}\n')
    command = [sys.executable, "-m", "flexgen_jax", "generate", "-i", str(job)]
    command += ["--model", "flexgen_jax/demo_model", "-o", str(tmp_path / "out.jsonl")]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: JAX cannot start the platform that JAX_PLATFORMS=wurst")
    assert done.stderr.count("\n") == 1


def test_a_backend_that_says_nothing(monkeypatch):
    import jax

    def silent():
        raise AssertionError

    monkeypatch.setattr(jax, "local_devices", silent)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(backends, "_asked", lambda: None)
    with pytest.raises(backends.BackendError, match=r"no device \(it gives no reason.*=cpu"):
        backends.local_devices()


def test_an_accelerator_without_the_cpu_beside_it(monkeypatch):
    def local(backend=None):
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return ["cuda:0"]

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr("jax.local_devices", local)
    with pytest.raises(backends.BackendError, match=r"leaves out the CPU.*JAX_PLATFORMS=cuda,cpu"):
        backends.local_devices()
    monkeypatch.setattr("jax.local_devices", lambda backend=None: ["cuda:0"])
    assert backends.local_devices() == ["cuda:0"]


def test_a_directory_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    found = doctor.diagnose(file, **SMALL)
    assert not found.healthy
    assert f"cannot write in {file}" in message(found, "disk")
    assert found.file_system is None


@pytest.mark.parametrize(
    ("changes", "check", "level", "words"),
    [
        ({"kind": "tmpfs"}, "file system", "warning", "lies in memory"),
        ({"kind": "nfs4"}, "file system", "warning", "is a network file system"),
        ({"direct_io": False}, "direct I/O", "warning", "page cache"),
        ({"locks": False}, "locks", "error", "cannot be locked"),
        ({"free": 1000}, "disk", "error", "free some"),
    ],
)
def test_file_systems_that_are_not_what_a_run_likes(
    tmp_path, monkeypatch, changes, check, level, words
):
    good = {"kind": "ext4", "free": 10**12, "direct_io": True, "locks": True}
    kind = file_system.FileSystem(**{**good, **changes})
    monkeypatch.setattr(doctor, "file_system", lambda where: kind)
    found = doctor.diagnose(tmp_path, **SMALL)
    assert levels(found)[check] == level
    assert words in message(found, check)
    assert found.healthy == (level != "error")


def test_little_memory_a_slow_disk_and_small_pages(tmp_path, monkeypatch):
    pages = tmp_path / "enabled"
    pages.write_text("always madvise [never]\n")
    monkeypatch.setattr(doctor, "_HUGE_PAGES", pages)
    monkeypatch.setattr(doctor, "total_memory", lambda: 8 * 10**9)
    monkeypatch.setattr(doctor, "memory_limit", lambda: 2 * 10**9)
    monkeypatch.setattr(doctor, "available_memory", lambda: 10**9)
    monkeypatch.setattr(profile, "disk_speed", lambda *a: (9e8, 5e7, 1e10))
    found = doctor.diagnose(tmp_path, **SMALL)
    for check in ("huge pages", "memory", "disk speed"):
        assert levels(found)[check] == "warning"
    assert "may take 2.0 GB (a limit of its cgroup)" in message(found, "memory")
    assert "writes 0.05 GB/s" in message(found, "disk speed")


def test_the_kind_is_that_of_the_nearest_mount(tmp_path, monkeypatch):
    table = "\n".join(
        f"{i} 1 0:{i} / {point} rw - {kind} source rw"
        for i, (point, kind) in enumerate(
            [("/", "ext4"), (str(tmp_path), "nfs4"), (f"{tmp_path}/a\\040b", "tmpfs")]
        )
    )
    mounts = tmp_path / "mountinfo"
    mounts.write_text(table)
    (tmp_path / "a b").mkdir()
    real = file_system.Path
    monkeypatch.setattr(
        file_system, "Path", lambda p: mounts if p == "/proc/self/mountinfo" else real(p)
    )
    assert file_system.file_system(tmp_path).network
    assert file_system.file_system(tmp_path / "a b").in_memory
    assert file_system.existing(tmp_path / "x" / "y") == tmp_path
