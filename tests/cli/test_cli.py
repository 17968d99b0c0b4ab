"""The command line as a user meets it: files, flags, mistakes, exit codes."""

import contextlib
import errno
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.cli.job_commands import _Expected
from flexgen_jax.jobs.results import FileResults
from tests.interrupting import signal_in_block

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"
MODEL = str(GOLDENS / "pre_norm")
EXPECTED = json.loads((GOLDENS / "expected.json").read_text())


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


@pytest.fixture
def job(tmp_path, offload):
    """Writes lines, runs ``generate``, returns the result and the output records."""

    def run(lines, *options, model=MODEL):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        source.write_bytes("\n".join(texts).encode("utf-8", "surrogateescape"))
        arguments = ["generate", "--model", model, "-i", source, "-o", target]
        arguments += ["--offload-dir", offload, *options]
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        records = None
        if target.exists():
            records = [json.loads(r) for r in target.read_text(encoding="utf-8").splitlines()]
        return result, records

    return run


def test_a_job_streams_its_weights_from_disk(job):
    lines = [{"id": f"r{i}", "prompt_token_ids": p} for i, p in enumerate(EXPECTED["prompts"])]
    result, records = job(
        lines,
        *("--percent", 0, 0, 100, 0, 100, 0),
        *("--max-tokens", 24, "--ignore-eos", "--json", "--disk-mode", "direct"),
    )
    assert result.exit_code == 0, result.output
    assert [r["id"] for r in records] == [f"r{i}" for i in range(len(lines))]
    assert [r["token_ids"] for r in records] == EXPECTED["variants"]["pre_norm"]["tokens"]
    assert {r["finish_reason"] for r in records} == {"length"}
    report = json.loads(result.stdout)
    assert report["placement"]["weights"]["disk"]["percent"] == 100
    assert report["disk_bytes"] > 0
    assert report["requests"] == len(lines)
    assert report["errors"] == 0
    assert "disk 100.0%" in result.stderr
    assert "7 succeeded, 0 failed" in result.stderr
    assert "tokens/s" in result.stderr


def test_bad_lines_become_records_and_the_others_run(job):
    good = {"prompt_token_ids": [5, 6]}
    lines = [
        '{"prompt": ',
        good,
        "[1, 2]",
        {"prompt_token_ids": [5], "id": "x", "temperature": -1},
        "",
        {"id": "nothing"},
        {"prompt_token_ids": [1] * 9999, "id": "long"},
        {"prompt": "text but no tokenizer", "id": "text"},
        {"prompt_token_ids": [5], "wurst": 1},
        '{"prompt_token_ids": [5], "id": "\udcff"}',
        {"prompt_token_ids": [7], "id": "x2"},
        {"prompt_token_ids": [7], "id": "x2"},
    ]
    result, records = job(lines)
    assert result.exit_code == 0
    errors = {r["error"]["line"]: r["error"] for r in records if "error" in r}
    assert sorted(errors) == [1, 3, 4, 6, 7, 8, 9, 10, 12]
    for line, word in {
        1: "not JSON",
        3: "JSON object",
        4: "temperature must be",
        6: "found none of them",
        7: "too long",
        8: "no tokenizer",
        9: "unknown sampling field 'wurst'",
        10: "UTF-8",
        12: "used on line 11",
    }.items():
        assert word in errors[line]["message"]
        assert errors[line]["type"] in ("invalid_json", "invalid_request")
    assert [r["id"] for r in records] == [
        1,
        2,
        3,
        "x",
        "nothing",
        "long",
        "text",
        9,
        10,
        "x2",
        "x2",
    ]
    assert [len(r["token_ids"]) for r in records if "error" not in r] == [32, 32]
    assert "2 succeeded, 9 failed" in result.stderr


def test_what_is_no_text_or_no_number_is_one_bad_line(job):
    lines = [
        '\ufeff{"prompt_token_ids": [5]}',  # as Windows begins a file
        r'{"prompt": "\ud800 x"}',
        r'{"id": "\ud800", "prompt_token_ids": [5]}',
        '{"id": true, "prompt_token_ids": [5]}',
        '{"id": 1e400, "prompt_token_ids": [5]}',
        '{"prompt_token_ids": [5], "temperature": 1, "top_k": 100000000000}',
        '{"prompt_token_ids": [5], "temperature": 1e300}',
        '{"prompt_token_ids": [5], "temperature": 1' + "0" * 320 + "}",
    ]
    result, records = job(lines)
    assert result.exit_code == 0, result.output
    assert [("error" in r) for r in records] == [False] + [True] * 7
    messages = [r["error"]["message"] for r in records[1:]]
    for message, words in zip(
        messages,
        ["half of a surrogate pair"] * 2
        + ["id must be"] * 2
        + ["top_k must be"]
        + ["temperature must be"] * 2,
        strict=True,
    ):
        assert words in message
    assert "line 2: half of a surrogate pair" in result.stderr
    assert "and 4 more errors" in result.stderr


def test_outputs_that_must_not_be_replaced(job, tmp_path, offload):
    result, _ = job([{"prompt_token_ids": [5]}])
    assert result.exit_code == 0
    base = ["generate", "--model", MODEL, "--offload-dir", offload, "-i", tmp_path / "in.jsonl"]

    def run(*more):
        return CliRunner().invoke(main, [str(a) for a in (*base, *more)])

    same = run("-o", tmp_path / "in.jsonl")
    assert (same.exit_code, "are the same file" in same.stderr) == (2, True)
    os.mkfifo(tmp_path / "pipe")
    pipe = run("-o", tmp_path / "pipe")
    assert (pipe.exit_code, "not a regular file" in pipe.stderr) == (2, True)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to(tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").write_text("")
    assert run("-o", tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out.jsonl").read_text() == before


def test_what_an_earlier_job_left_is_not_lost_by_a_mistyped_one(job, tmp_path):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text("hours of work\n")
    result, _ = job([{"prompt_token_ids": [5]}], model="nowhere/to-be-found")
    assert result.exit_code == 2
    assert partial.read_text() == "hours of work\n"
    result, records = job([{"prompt_token_ids": [5]}])
    assert result.exit_code == 0
    assert len(records) == 1
    assert not partial.exists()
    assert (tmp_path / "out.jsonl.partial.old").read_text() == "hours of work\n"


def test_two_jobs_do_not_share_an_output(job, tmp_path):
    with FileResults(tmp_path / "out.jsonl"):
        result, _ = job([{"prompt_token_ids": [5]}])
    assert result.exit_code == 2
    assert "another job is writing it" in result.stderr


def test_a_disk_that_fills_while_results_are_written(job, monkeypatch, tmp_path):
    real = os.fsync

    def full(file):
        if (tmp_path / "out.jsonl.partial").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr("flexgen_jax.jobs.results.os.fsync", full)
    result, _ = job([{"prompt_token_ids": [5]}])
    assert result.exit_code == 1
    assert "out.jsonl.partial: No space left on device" in result.stderr


def test_if_no_line_is_good_the_exit_code_says_so(job):
    result, records = job(["nonsense"])
    assert result.exit_code == 1
    assert len(records) == 1


def test_an_empty_file_is_an_empty_job(job):
    result, records = job([])
    assert result.exit_code == 0
    assert records == []
    assert "0 succeeded, 0 failed" in result.stderr


def test_sampling_fields_of_a_line_win(job):
    prompt = EXPECTED["prompts"][2]
    lines = [
        {"prompt_token_ids": prompt, "max_tokens": 3, "logprobs": 2},
        {"prompt_token_ids": prompt, "temperature": 1.0, "seed": 4},
        {
            "prompt_token_ids": prompt,
            "stop_token_ids": [EXPECTED["variants"]["pre_norm"]["tokens"][2][2]],
        },
    ]
    result, records = job(lines, "--max-tokens", 5, "--ignore-eos")
    assert result.exit_code == 0
    assert records[0]["token_ids"] == EXPECTED["variants"]["pre_norm"]["tokens"][2][:3]
    assert len(records[0]["logprobs"]) == 3
    assert records[0]["cumulative_logprob"] < 0
    assert len(records[1]["token_ids"]) == 5
    assert records[2]["finish_reason"] == "stop"
    assert records[2]["stop_reason"] == records[2]["token_ids"][-1]


def test_openai_lines_are_answered_in_their_dialect(job):
    body = {"model": "any", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    lines = [
        line,
        {**line, "custom_id": "b", "url": "/v1/embeddings"},
        {**line, "custom_id": "c", "body": {**body, "best_of": 3}},
        {**line, "custom_id": "d", "body": {**body, "suffix": "x"}},
        {**line, "custom_id": "e", "body": {**body, "prompt_logprobs": 1}},
    ]
    result, records = job(lines, "--ignore-eos")
    scored = records.pop()["response"]["body"]["choices"][0]["prompt_logprobs"]
    assert scored[0] is None
    assert ["6" in scored[1], "7" in scored[2]] == [True, True]
    assert result.exit_code == 0
    good = records[0]
    assert good["custom_id"] == "a"
    assert good["error"] is None
    assert good["response"]["status_code"] == 200
    assert good["response"]["body"]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
    }
    assert good["response"]["body"]["choices"][0]["finish_reason"] == "length"
    for record, word in zip(records[1:], ("/v1/completions", "best_of=3", "suffix"), strict=True):
        assert record["response"]["status_code"] == 400
        assert word in record["response"]["body"]["error"]["message"]
        assert word in record["error"]["message"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--percent", "80", "30", "100", "0", "100", "0"], "exceed 100"),
        (["--compress-weight", "--weight-bits", "8"], "--weight-bits 8 and --compress-weight"),
        (["--compress-cache", "--cache-bits", "8"], "--cache-bits 8 and --compress-cache"),
        (["--attn-sparsity", "0"], "attention_sparsity must be a number in (0, 1]"),
        (["--sep-layer", "true"], "not supported yet: --sep-layer"),
        (["--pin-weight", "false"], "not supported: --pin-weight false"),
        (["--overlap", "--no-overlap"], "exclude each other"),
        (["--prompt-len", "8"], "leave out --input"),
        (["--plot", "picture.xyz"], "cannot draw picture.xyz: expected one of"),
        (["--trace", "nowhere/trace.json"], "cannot write nowhere/trace.json"),
        (["--seed", "-1"], "seed must be an integer of at least 0, got -1"),
        (["--cache-slots", "0"], "cache_slots must be an integer of at least 1"),
        (["--schedule", "zagzig"], "no schedule 'zagzig'"),
        (["--temperature", "-1"], "temperature must be"),
        (["--policy", "missing.json"], "cannot read the policy missing.json"),
        (["--policy", "auto", "--percent", "0", "0", "100", "0", "100", "0"], "exclude each other"),
        (["--gpu-batch-size", "0"], "device_batch_size must be"),
        (["--device-memory", "much"], "such as '12GiB'"),
        (["--device-memory", "9kB", "--percent", *"000000"], "0.01 MB are allowed. Allow more"),
        (["--host-memory", "1", "--percent", *"000000"], "this run would take 0.33 GB of memory"),
        (["--allow", "weight-bits", "--percent", *"000000"], "Leave one or the other out"),
        (["--dtype", "int8"], "int8"),
        (["--percent", "0", "0"], "requires 6 arguments"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_wrong_options_are_one_clear_error(job, options, words):
    result, records = job([{"prompt_token_ids": [5]}], *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert records is None


def test_missing_model_input_and_output(job, tmp_path, offload):
    result, records = job([{"prompt_token_ids": [5]}], model=str(tmp_path / "no-model"))
    assert result.exit_code == 2
    assert "no-model" in result.stderr
    assert records is None
    base = ["generate", "--model", MODEL, "--offload-dir", offload]
    source = tmp_path / "in.jsonl"
    for arguments, words in (
        (["-i", tmp_path / "none.jsonl", "-o", tmp_path / "o.jsonl"], "none.jsonl"),
        (["-i", source, "-o", tmp_path / "no" / "dir" / "o.jsonl"], "cannot write"),
        (["-i", source, "-o", tmp_path], "is a directory"),
    ):
        result = CliRunner().invoke(main, [*base, *map(str, arguments)])
        assert result.exit_code == 2
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"weights": {"gpu": 1}}', '{"weights": 5}'])
def test_a_wrong_policy_file_is_named(job, tmp_path, text):
    file = tmp_path / "policy.json"
    file.write_text(text)
    result, records = job([{"prompt_token_ids": [5]}], "--policy", file)
    assert result.exit_code == 2
    assert f"{file} is not a policy: " in result.stderr
    assert records is None


def test_a_policy_file(job, tmp_path):
    policy = fg.Policy(device_batch_size=2, weights=fg.Split(device=0, host=50, disk=50))
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(policy.to_json()))
    result, _ = job([{"prompt_token_ids": [5]}], "--policy", file, "--no-overlap", "--json")
    assert result.exit_code == 0, result.output
    used = json.loads(result.stdout)["policy"]
    assert used == {**policy.to_json(), "overlap": False}


def test_trace_and_picture(job, tmp_path):
    trace, picture = tmp_path / "trace.json", tmp_path / "picture.svg"
    result, _ = job([{"prompt_token_ids": [5]}], "--trace", trace, "--plot", picture)
    assert result.exit_code == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(e["name"].startswith("Compute") for e in events)
    assert picture.read_text().startswith("<?xml")


def test_a_failing_read_keeps_what_was_finished(tmp_path, offload, monkeypatch):
    """The disk dies in the second block: one error, the first block's results are kept."""
    import storage.disk

    original = storage.disk.DiskStore.load
    calls = 0

    def dying(self, names, slot):
        nonlocal calls
        calls += 1
        if calls > 25:
            raise OSError(5, "Input/output error")
        return original(self, names, slot)

    monkeypatch.setattr(storage.disk.DiskStore, "load", dying)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt_token_ids": [i + 3]}) + "\n" for i in range(9)))
    arguments = ["generate", "--model", MODEL, "-i", source, "-o", target, "--max-tokens", 4]
    arguments += ["--offload-dir", offload, "--percent", 0, 0, 100, 0, 100, 0]
    arguments += ["--device-batch-size", 2, "--num-device-batches", 1]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 1
    assert "LoadWeights" in result.stderr
    assert "Input/output error" in result.stderr
    assert not target.exists()
    kept = (tmp_path / "out.jsonl.partial").read_text().splitlines()
    assert len([line for line in kept if '"text"' in line]) == 2
    assert "2 requests are finished and kept" in result.stderr
    assert "run the same command again to resume" in result.stderr
    monkeypatch.undo()
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert "resuming: 2 already finished" in result.stderr
    assert [json.loads(r)["id"] for r in target.read_text().splitlines()] == [*range(1, 10)]


def test_an_interrupt_keeps_what_was_finished(tmp_path, offload, monkeypatch):
    """Ctrl-C in the middle of the third block: the first two blocks' results are kept."""
    signal_in_block(monkeypatch, signal.SIGINT, 3)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt_token_ids": [i + 3]}) + "\n" for i in range(9)))
    arguments = ["generate", "--model", MODEL, "-i", source, "-o", target, "--max-tokens", 4]
    arguments += ["--offload-dir", offload, "--percent", 0, 0, 100, 0, 100, 0, "--ignore-eos"]
    arguments += ["--device-batch-size", 2, "--num-device-batches", 1, "--no-refill"]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 130
    assert "interrupted: 4 requests are finished and kept" in result.stderr
    assert not target.exists()
    kept = (tmp_path / "out.jsonl.partial").read_text().splitlines()
    assert len([line for line in kept if '"text"' in line]) == 4


def test_progress_shows_on_a_terminal_and_not_in_a_pipe(tmp_path, offload):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt_token_ids": [5, 6]}\n' * 6)
    arguments = ["-m", "flexgen_jax", "generate", "--model", MODEL, "--offload-dir", offload]
    arguments += ["-i", str(source), "-o", str(target), "--ignore-eos"]
    quiet = python(*arguments)
    assert quiet.returncode == 0, quiet.stderr
    assert "generating" not in quiet.stderr
    assert "\x1b" not in quiet.stderr
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    arguments = [sys.executable, *arguments, "--restart"]
    process = subprocess.Popen(arguments, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    # Linux reports a terminal that nobody holds any more as an input/output error.
    with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        while chunk := terminal.read(4096):
            shown += chunk
    assert process.wait() == 0
    for word in (b"generating", b"192/192 tokens", b"ETA"):
        assert word in shown


def test_convert_and_run_the_store(job, tmp_path):
    store = tmp_path / "store"
    result = CliRunner().invoke(main, ["convert", MODEL, str(store), "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    result, _ = job([{"prompt_token_ids": [5]}], "--dtype", "float32", model=str(store))
    assert result.exit_code == 2
    assert "--dtype" in result.stderr
    assert "bfloat16" in result.stderr
    result, records = job([{"prompt_token_ids": [5]}], "--dtype", "bfloat16", model=str(store))
    assert result.exit_code == 0
    assert len(records[0]["token_ids"]) > 0


def test_convert_needs_one_source(tmp_path):
    for arguments, words in (
        (["x", "y", "--dummy", "125m"], "give either MODEL and STORE, or --dummy"),
        (["x"], "give either MODEL and STORE"),
        (["--dummy", "11b", "x"], "no preset '11b'"),
    ):
        result = CliRunner().invoke(main, ["convert", *arguments])
        assert result.exit_code == 2
        assert words in result.stderr


def test_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["demo", "--max-tokens", "4"])
    assert result.exit_code == 0, result.output
    assert "disk 100.0%" in result.stderr
    assert "tokens/s" in result.stderr
    names = {p.name for p in (tmp_path / "demo-output").iterdir()}
    assert names == {
        "completions.jsonl",
        "completions.jsonl.job",
        "timeline.json",
        "timeline.png",
    }
    records = [
        json.loads(r)
        for r in (tmp_path / "demo-output" / "completions.jsonl").read_text().splitlines()
    ]
    assert len(records) >= 10
    assert all(r["text"] for r in records)


@pytest.mark.parametrize("arguments", [[], ["generate"], ["convert"], ["demo"]])
def test_help(arguments):
    result = CliRunner().invoke(main, [*arguments, "--help"])
    assert result.exit_code == 0
    assert "Usage: " in result.output


def python(*arguments, env=os.environ, **options):
    environment = {**env, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        **options,
    )


def test_module_and_version():
    result = python("-m", "flexgen_jax", "--version")
    assert result.stdout.strip() == f"flexgen-jax, version {fg.__version__}"


def test_stages_make_the_devices_they_need_of_a_cpu(tmp_path, offload):
    (tmp_path / "in.jsonl").write_text('{"prompt_token_ids": [5, 6]}\n{"prompt_token_ids": [7]}\n')
    outputs = []
    environment = {name: v for name, v in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    for stages in (1, 2):
        out = tmp_path / f"{stages}.jsonl"
        arguments = ["generate", "--model", MODEL, "--offload-dir", offload]
        arguments += ["-i", tmp_path / "in.jsonl", "-o", out, "--max-tokens", "4"]
        arguments += ["--percent", "50", "50", "0", "100", "0", "100"]
        arguments += ["--stages", str(stages)]
        done = python("-m", "flexgen_jax", *arguments, env=environment)
        assert done.returncode == 0, done.stderr
        outputs.append(out.read_text())
    assert outputs[0] == outputs[1]


def test_importing_and_helping_stay_light():
    """Neither may import JAX or anything as heavy; ``benchmarks/startup.py`` has the seconds."""
    heavy = "{'jax', 'numpy', 'scipy', 'tensorstore', 'rich', 'matplotlib', 'huggingface_hub'}"
    result = python("-c", f"import flexgen_jax, sys; print(sorted({heavy} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr
    code = (
        "import sys; from flexgen_jax.cli.app import main; main(['--help'], standalone_mode=False);"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    assert python("-c", code).stdout.strip().endswith("[]")


def test_flexgens_own_command_line(tmp_path):
    """As in FlexGen's examples: random weights, made-up prompts, everything off the device."""
    config = tmp_path / "tiny"
    config.mkdir()
    (config / "config.json").write_bytes((GOLDENS / "pre_norm" / "config.json").read_bytes())
    arguments = [
        *("generate", "--model", config, "--path", "_DUMMY_", "--offload-dir", tmp_path / "off"),
        *("--percent", 20, 30, 0, 50, 0, 0, "--gpu-batch-size", 2, "--num-gpu-batches", 3),
        *("--overlap", "False", "--sep-layer", "False", "--pin-weight", "True"),
        *("--cpu-cache-compute", "--prompt-len", 12, "--gen-len", 8, "--cut-gen-len", 3),
        *("--attn-sparsity", "1.0", "--json"),
    ]
    for run in range(2):
        result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert ("making random float32 weights" in result.stderr) == (run == 0)
        report = json.loads(result.stdout)
        assert report["requests"] == 6
        assert report["prompt_tokens"] == 6 * 12
        assert report["generated_tokens"] == 6 * 3
        assert report["policy"]["host_attention"] is True
        assert report["policy"]["overlap"] is False
        for kind in ("weights", "cache", "hidden"):
            placed = report["placement"][kind]
            for tier in ("device", "host", "disk"):
                percent = placed[tier]["percent"]
                if percent:
                    assert f"{tier} {percent:.1f}%" in result.stderr
        assert report["placement"]["cache"]["host"]["percent"] == 50
        assert report["placement"]["hidden"]["disk"]["percent"] == 100
        assert report["disk_bytes_written"] > 0
        assert "overlap off, attention on the host" in result.stderr
        assert "6 succeeded, 0 failed: not kept" in result.stderr
    assert not any((tmp_path / "off").glob("flexgen-jax-scratch-*"))


def test_made_up_prompts_may_be_kept_and_an_input_is_needed_otherwise(tmp_path, offload):
    base = ["generate", "--model", MODEL, "--offload-dir", offload]
    target = tmp_path / "kept.jsonl"
    options = ["--prompt-len", "5", "--gpu-batch-size", "2", "--num-gpu-batches", "1"]
    result = CliRunner().invoke(main, [*map(str, base), *options, "-o", str(target)])
    assert result.exit_code == 0, result.output
    assert len(target.read_text().splitlines()) == 2
    for options in ([], ["-i", str(target)], ["-o", str(target)]):
        result = CliRunner().invoke(main, [*map(str, base), *options])
        assert result.exit_code == 2
        assert "give --input and --output, or --prompt-len to measure" in result.stderr
    result = CliRunner().invoke(main, [*map(str, base), "--prompt-len", "5000"])
    assert result.exit_code == 2
    assert "too long: 5000 prompt tokens" in result.stderr


def test_a_cache_that_does_not_fit_on_the_disk_is_refused_before_the_run(job, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    result, records = job([{"prompt_token_ids": [5, 6]}], "--percent", 0, 0, 0, 0, 100, 0)
    assert result.exit_code == 2
    assert "the cache and hidden states of a block need" in result.stderr
    assert records is None


def test_a_weight_store_brings_its_dtype(tmp_path):
    """Asked for or not: what was converted once is not to be repeated."""
    config = Path(__file__).parents[1] / "goldens" / "pre_norm" / "config.json"
    store, packed = tmp_path / "store", tmp_path / "packed"
    for arguments in (
        ["convert", "--dummy", config, store, "--dtype", "bfloat16"],
        ["convert", store, packed, "--weight-bits", "4"],
        ["generate", "--model", store, "--prompt-len", 8, "--max-tokens", 2, "--json"],
        ["generate", "--model", packed, "--prompt-len", 8, "--max-tokens", 2, "--json"],
    ):
        done = CliRunner().invoke(main, [str(a) for a in [*arguments, "--quiet"]])
        assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["policy"]["weight_bits"] == 4
    assert json.loads((packed / "flexgen_manifest.json").read_text())["dtype"] == "bfloat16"
    wrong = CliRunner().invoke(
        main, ["generate", "--model", str(store), "--prompt-len", "8", "--dtype", "float32"]
    )
    assert wrong.exit_code == 2
    assert "holds bfloat16" in wrong.output


def test_several_completions_in_both_dialects(job):
    body = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 1.0, "n": 3, "best_of": 3}
    lines = [
        {"id": "a", "prompt_token_ids": [5, 6, 7], "n": 2, "temperature": 1.0, "logprobs": 0},
        {"custom_id": "b", "url": "/v1/completions", "body": body},
        {"id": "c", "prompt_token_ids": [5, 6, 7], "n": 2},
    ]
    _, (plain, openai, greedy) = job(lines, "--ignore-eos", "--max-tokens", 5)
    assert [c["index"] for c in plain["outputs"]] == [0, 1]
    assert all(len(c["token_ids"]) == len(c["logprobs"]) == 5 for c in plain["outputs"])
    assert "text" not in plain
    answer = openai["response"]["body"]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
    assert "temperature above 0" in greedy["error"]["message"]


def test_what_is_expected_goes_by_what_requests_turn_out_to_have():
    """Of the tokens that they may have, and of the part of the input that was read."""

    class Bar:
        def __call__(self, more):
            pass

        def expect(self, total, *, exactly=True):
            self.shown = total, exactly

    source, job, bar = SimpleNamespace(share_read=0.5), SimpleNamespace(limit_tokens=70), Bar()
    expected = _Expected(source, bar, 0, job)
    expected.add(1000, 10)
    assert bar.shown == (2000, False)
    expected.advance(90)
    assert bar.shown == (2000, False)
    job.limit_tokens += 300  # of those that have finished; others have a part of the 90
    expected.advance(60)
    assert bar.shown == (1000, False)
    source.share_read = 1
    expected.add(1000, 20)
    assert bar.shown == (1000, False)
    expected.advance(150)
    assert bar.shown == (2000, True)
    source.share_read = None  # a pipe
    expected.add(1000, 30)
    assert bar.shown == (None, True)
