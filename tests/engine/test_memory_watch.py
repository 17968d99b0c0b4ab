"""What a run takes is looked at between passes, and kept to what is allowed."""

import itertools
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.engine.memory_watch import MemoryExceededError, MemoryWatch
from flexgen_jax.planning.auto import limits_of_this_machine
from flexgen_jax.planning.memory_need import MemoryLimitError, MemoryLimits
from storage.memory import resident_memory

DEMO = str(Path(fg.__file__).parent / "demo_model")
PROMPTS = [[5, 6, 7 + i] for i in range(6)]
GREEDY = fg.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


def watch(*resident, on_device=None, **limits):
    """Of a process that comes to these bytes, one after another; the last of them stays."""
    values = itertools.chain(resident, itertools.repeat(resident[-1]))
    return MemoryWatch(
        MemoryLimits(**limits), resident=lambda: next(values), on_device=lambda: on_device
    )


def test_the_highest_is_kept():
    seen = watch(100, 300, 200)
    assert seen.process_bytes == 100
    seen.look()
    seen.look()
    assert seen.process_bytes == 300
    assert seen.device_bytes is None


def test_what_was_there_before_for_other_ends_does_not_count():
    notebook, gigabyte = 5 * 10**9, 10**9
    seen = watch(notebook, notebook + gigabyte, host=2 * gigabyte)
    seen.look()
    assert gigabyte < seen.process_bytes < 2 * gigabyte


@pytest.mark.parametrize("name", ["device", "host"])
def test_where_both_are_one_memory_either_limit_is_of_the_process(name):
    seen = watch(10, 1000, 1001, **{name: 1000})
    seen.look()
    with pytest.raises(MemoryExceededError, match=r"the process holds .* more than the 0\.00 MB"):
        seen.look()


def test_a_device_with_memory_of_its_own_has_its_own_limit():
    seen = watch(10, 10**9, on_device=500, device=500)
    seen.look()  # the process has no limit
    assert (seen.device_bytes, seen.process_bytes) == (500, 10**9)
    with pytest.raises(MemoryExceededError, match="the device holds"):
        watch(10, 10, on_device=501, device=500).look()
    with pytest.raises(MemoryExceededError, match="the process holds"):
        watch(10, 21, on_device=1, host=20).look()


def test_what_the_process_holds_is_measured():
    before = resident_memory()
    assert before > 10**8
    kept = bytearray(b"x") * (1 << 26)
    assert resident_memory() - before >= 0.9 * len(kept)


def test_what_is_only_kept_for_later_is_given_back():
    """Blocks that lie between others are free for the allocator, not for the system."""
    seen = MemoryWatch()
    kept, between = [], []
    for _ in range(1 << 15):
        between.append(bytearray(b"x") * 12_000)
        kept.append(bytearray(b"x") * 600)
    del between
    held = resident_memory()
    seen.look()
    assert resident_memory() < held - 10**8
    assert len(kept) == 1 << 15


def test_a_report_says_what_was_seen(offload):
    with fg.LLM(DEMO, policy=fg.Policy(), offload_dir=offload) as llm:
        llm.generate(PROMPTS, GREEDY)
        report = llm.report
    assert report.process_bytes > 10**8
    assert report.to_json()["process_bytes"] == report.process_bytes


@pytest.mark.parametrize("limit", ["device_memory", "host_memory"])
def test_what_would_take_more_is_not_begun(offload, limit):
    policy = fg.Policy(device_batch_size=64, num_device_batches=64)
    with pytest.raises(MemoryLimitError, match=r"0\.30 GB are allowed.*--device-batch-size"):
        fg.LLM(DEMO, policy=policy, offload_dir=offload, **{limit: "300MB"})
    hardware = fg.Hardware.preset("laptop")
    allowed = int(hardware.runtime_memory) + 20_000_000
    begun = []
    arguments = {"offload_dir": offload, "hardware": hardware, limit: allowed}
    with fg.LLM(DEMO, policy=policy, **arguments) as llm:
        with pytest.raises(MemoryLimitError, match="this run would take"):
            llm.generate([[5] * 64] * 4096, GREEDY, progress=begun.append)
        assert not begun
        # A block of fewer requests takes less, and runs.
        assert len(llm.generate(PROMPTS, GREEDY)) == len(PROMPTS)


class _Swollen(MemoryWatch):
    """Takes more than any limit after some looks."""

    looks = 0

    def __init__(self, limits):
        super().__init__(limits, resident=self._resident_bytes, on_device=lambda: None)

    def _resident_bytes(self):
        _Swollen.looks += 1
        return 10**12 if _Swollen.looks > 12 else 10**6


def test_what_takes_more_ends_and_can_be_gone_on_with(offload, tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    lines = [{"prompt_token_ids": [5, 6, 7 + i], "max_tokens": 4} for i in range(12)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["generate", "--model", DEMO, "--offload-dir", offload, "-i", str(source)]
    arguments += ["--percent", *("100", "0") * 3, "--gpu-batch-size", "2", "--num-gpu-batches", "1"]
    arguments += ["--temperature", "0", "--ignore-eos", "--no-refill", "--device-memory", "8GiB"]

    def run(name):
        return CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / name)])

    monkeypatch.setattr("flexgen_jax.llm.MemoryWatch", _Swollen)
    ended = run("out.jsonl")
    assert ended.exit_code == 1
    assert "the process holds 1000.00 GB of memory, more than the 8.59 GB" in ended.stderr
    assert "finished" in ended.stderr
    monkeypatch.undo()
    resumed = run("out.jsonl")
    assert resumed.exit_code == 0, resumed.stderr
    assert "resuming: " in resumed.stderr
    assert "resuming: 0" not in resumed.stderr
    assert run("other.jsonl").exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "other.jsonl").read_bytes()


def test_auto_leaves_room_for_what_a_plan_may_be_off_by(tmp_path):
    def limits(**memory):
        return limits_of_this_machine(MemoryLimits(**memory), tmp_path, 0, 3e8)

    allowed = limits(device=10**9)
    assert (allowed.device, allowed.host, allowed.shared) == (10**9, 0, True)
    assert allowed.aside == pytest.approx(3e8 + 0.09e9)
    # Where both are one memory, either is all of it.
    assert limits(host=10**9).device == 10**9
    assert limits(device=10**9, host=10**8).device == 10**9
    assert limits().aside == 0  # a share of what is free, with room to spare


def test_what_can_be_given_back_is_not_held_against_a_limit():
    seen = watch(10**6, 31 * 10**6, 29 * 10**6, 29 * 10**6, 31 * 10**6, host=30 * 10**6)
    seen.look()  # 31 MB, of which 2 MB go
    seen.look()
    with pytest.raises(MemoryExceededError):
        seen.look()  # 31 MB stay
