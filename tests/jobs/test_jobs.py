"""What goes into a job and comes out: formats, streams, bad lines, bounded memory."""

import gc
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import zstandard
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.jobs.job import Completing, Job
from flexgen_jax.jobs.job_input import MAX_LINE, JobError, JobInput
from flexgen_jax.jobs.results import FileResults
from flexgen_jax.planning.window_size import WindowSize

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "flexgen_jax" / "demo_model")
MODEL = str(ROOT / "tests" / "goldens" / "pre_norm")
GREEDY = fg.SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def llm(offload):
    policy = fg.Policy(device_batch_size=4, num_device_batches=2)
    with fg.LLM(MODEL, policy=policy, offload_dir=offload) as llm:
        yield llm


@pytest.fixture
def generate(offload):
    def run(source, target, *options, model=MODEL, stdin=None, command="generate"):
        arguments = [command, "--model", model, "--offload-dir", offload, "-i", source]
        arguments += ["-o", target, "--device-batch-size", 4, "--num-device-batches", 2, *options]
        return CliRunner().invoke(
            main, [str(a) for a in arguments], input=stdin, catch_exceptions=False
        )

    return run


def ids(count, **fields):
    lines = [{"prompt_token_ids": [5 + i % 40, 6, 7][: 1 + i % 3], **fields} for i in range(count)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def run_job(llm, source, target, **options):
    with JobInput(source) as lines, FileResults(target) as results:
        return Job(llm, Completing(llm, GREEDY, "m"), lines, results, **options).run()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("in.jsonl", lambda data: data),
        ("in.jsonl.gz", gzip.compress),
        (
            "in.jsonl.zst",
            lambda data: zstandard.compress(data[:300]) + zstandard.compress(data[300:]),
        ),
    ],
)
@pytest.mark.parametrize("out", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"])
def test_compressed_files_are_the_same_job(generate, tmp_path, name, pack, out):
    (tmp_path / name).write_bytes(pack(ids(20)))
    result = generate(tmp_path / name, tmp_path / out, "--window", 8, "--max-tokens", 2)
    assert result.exit_code == 0, result.output
    data = (tmp_path / out).read_bytes()
    if out.endswith(".gz"):
        data = gzip.decompress(data)
    if out.endswith(".zst"):
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
            data = reader.read()
    assert [json.loads(line)["id"] for line in data.splitlines()] == [*range(1, 21)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, out, f"{out}.job"])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_archive_is_one_error_and_what_ran_is_kept(generate, tmp_path, suffix):
    pack = gzip.compress if suffix == ".gz" else zstandard.compress
    noise = random.Random(3)
    lines = ids(40, stop_token_ids=[noise.randrange(90) for _ in range(20)])
    source, target = tmp_path / f"in.jsonl{suffix}", tmp_path / f"out.jsonl{suffix}"
    source.write_bytes(pack(lines)[:-9])
    result = generate(source, target, "--max-tokens", 2)
    assert result.exit_code == 1
    assert "damaged" in result.stderr
    source.write_bytes(b"no archive at all, but something else")
    result = generate(source, target, "--max-tokens", 2)
    assert result.exit_code == 1
    assert "in.jsonl" in result.stderr
    assert result.stderr.count("Traceback") == 0


def test_a_small_archive_of_a_great_deal_takes_little_memory(tmp_path):
    """4 KB that stand for 128 MB: as a line they are too long, and never in memory together."""
    bomb = zstandard.ZstdCompressor(level=19).compress(b"x" * (128 << 20))
    assert len(bomb) < 10_000
    (tmp_path / "in.jsonl.zst").write_bytes(bomb + zstandard.compress(b"\nlast\n"))
    tracemalloc.start()
    with JobInput(tmp_path / "in.jsonl.zst") as source:
        found = [(line.number, line.raw) for line in source.lines()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(1, None), (2, b"last\n")]
    assert peak < 80 << 20


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_archive_of_no_bytes_is_an_error(generate, tmp_path, suffix):
    """Which an archive of nothing is not."""
    source = tmp_path / f"in.jsonl{suffix}"
    source.write_bytes(b"")
    result = generate(source, tmp_path / "out.jsonl", model="no/such-model")
    assert result.exit_code == 2
    assert f"in.jsonl{suffix}: damaged, it is empty" in result.stderr
    source.write_bytes((gzip if suffix == ".gz" else zstandard).compress(b""))
    assert generate(source, tmp_path / "out.jsonl").exit_code == 0


def test_an_empty_job_is_an_empty_archive(generate, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\n\n")
    assert generate(tmp_path / "in.jsonl", tmp_path / "out.jsonl.gz").exit_code == 0
    data = (tmp_path / "out.jsonl.gz").read_bytes()
    assert data
    assert gzip.decompress(data) == b""


def test_text_is_a_prompt_a_line(generate, tmp_path):
    text = "\ufeffThe tide comes in\r\n\n  Once more\nbad \udcff byte\n{}\n"
    (tmp_path / "in.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    result = generate(tmp_path / "in.txt", tmp_path / "out.jsonl", model=DEMO)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["id"] for r in records] == [1, 3, 4, 5]
    assert [r.get("prompt") for r in records] == ["The tide comes in", "  Once more", None, "{}"]
    assert "not UTF-8 text" in records[2]["error"]["message"]


@pytest.mark.parametrize("name", ["fifo", "fifo.gz", "/dev/fd"])
def test_a_pipe_by_its_name_is_a_stream(generate, tmp_path, name):
    """As ``-i <(command)`` gives it: read once, and nothing asked of its end."""
    data = ids(20) + b"nonsense\n"
    if name == "/dev/fd":
        out, into = os.pipe()
        source = f"/dev/fd/{out}"
        with os.fdopen(into, "wb") as file:
            file.write(data)
    else:
        source = tmp_path / name
        os.mkfifo(source)
        packed = gzip.compress(data) if name.endswith(".gz") else data
        writer = threading.Thread(target=source.write_bytes, args=(packed,))  # waits for a reader
        writer.start()
    result = generate(source, tmp_path / "out.jsonl", "--max-tokens", 2, "--window", 8)
    os.close(out) if name == "/dev/fd" else writer.join()
    assert result.exit_code == 0, result.output
    records = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(r)["id"] for r in records] == [*range(1, 22)]


def test_a_parquet_file_from_a_pipe_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    os.mkfifo(tmp_path / "rows.parquet")
    writer = os.open(tmp_path / "rows.parquet", os.O_RDWR)  # so that nobody waits
    with pytest.raises(
        JobError, match=r"rows\.parquet: Parquet is read from its end, which a pipe"
    ):
        JobInput(tmp_path / "rows.parquet")
    os.close(writer)


def test_from_and_to_a_pipe(generate, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(ids(20) + b"nonsense\n")
    generate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--max-tokens", 2)
    result = generate("-", "-", "--max-tokens", 2, "--window", 8, stdin=ids(20) + b"nonsense\n")
    assert result.exit_code == 0
    assert result.stdout_bytes == (tmp_path / "out.jsonl").read_bytes()
    for options, words in (
        (["--json"], "both want the standard output"),
        (["--restart"], "nothing"),
    ):
        result = generate("-", "-", *options, stdin=b"")
        assert (result.exit_code, words in result.stderr) == (2, True)


def test_a_closed_pipe_is_no_traceback(tmp_path, offload):
    (tmp_path / "in.jsonl").write_bytes(ids(8))
    command = f"{sys.executable} -m flexgen_jax generate --model {MODEL} --offload-dir {offload}"
    command += f" -i {tmp_path}/in.jsonl -o - --window 1 --device-batch-size 1"
    done = subprocess.run(
        ["bash", "-c", f"{command} --num-device-batches 1 | head -n 1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    first, code = done.stdout.splitlines()
    assert json.loads(first)["id"] == 1
    assert code == "1", done.stderr
    assert "cannot write the standard output: Broken pipe; " in done.stderr
    assert re.search(r"[1-8] lines were written; .* cannot be resumed", done.stderr)
    assert "Exception ignored" not in done.stderr


def test_run_batch_is_vllms(generate, tmp_path):
    body = {"model": "m", "prompt": [5, 6, 7]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    chat = {**line, "custom_id": "b", "url": "/v1/embeddings", "body": {"input": "x"}}
    lines = [line, chat, {**line, "custom_id": "c", "body": {**body, "logprobs": 0}}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    result = generate(
        tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--ignore-eos", command="run-batch"
    )
    assert result.exit_code == 0, result.output
    good, bad, sampled = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert good["response"]["body"]["usage"]["completion_tokens"] == 16  # OpenAI's default
    logprobs = sampled["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"]
    assert min(logprobs) < -4.5  # temperature 1, as OpenAI's; the likeliest tokens are likelier
    assert bad["custom_id"] == "b"
    assert bad["response"]["status_code"] == 400
    assert "'/v1/chat/completions', got '/v1/embeddings'" in bad["error"]["message"]
    assert bad["error"]["line"] == 2


def test_what_is_wrong_with_a_line_is_said_with_its_number(generate, tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    good = '{"prompt_token_ids": [5]}'
    cases = [
        (good, None),
        ('{"id": 4, "prompt_token_ids": [5]}', None),
        ('{"prompt": "x", "prompt_token_ids": [5]}', "both given: give one"),
        (good, "id 4 was used on line 2 (a line without an id has its number)"),
        ('{"id": 1, "prompt_token_ids": [5]}', "id 1 was used on line 1"),
        ('{"id": 1.0, "prompt_token_ids": [5]}', "was used on line 1"),
        ('{"id": "1", "prompt_token_ids": [5]}', None),
        ('{"prompt_token_ids": [5], "temperature": NaN}', "NaN is not a JSON number"),
        ('{"prompt_token_ids": [5], "top_p": -Infinity}', "-Infinity is not a JSON number"),
        (f'{{"prompt_token_ids": {deep}}}', "nested too deeply"),
        (f'{{"id": "{"x" * 2000}", "prompt_token_ids": [5]}}', "at most 1000 characters"),
        (f'{{"prompt_token_ids": [5], "{"y" * 5000}": 1}}', "unknown sampling field"),
        ('{"prompt": "' + "z" * MAX_LINE + '"}', f"longer than {MAX_LINE} bytes"),
        ('{"prompt_token_ids": [5], "seed": ' + "9" * 5000 + "}", "not JSON"),
        (good, None),
    ]
    (tmp_path / "in.jsonl").write_text("".join(f"{line}\n" for line, _ in cases))
    result = generate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--max-tokens", 2)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for number, (record, (_, words)) in enumerate(zip(records, cases, strict=True), 1):
        assert ("error" in record) == (words is not None), record
        if words is not None:
            assert words in record["error"]["message"]
            assert record["error"]["line"] == number
            assert len(json.dumps(record)) < 2000


def test_a_grouping_is_a_function_of_the_input_alone():
    limits = WindowSize.of(8, 20)
    assert limits.requests == 24  # whole blocks
    assert WindowSize.of(32).requests == 4096
    assert WindowSize.of(3000).requests == 12_000
    assert not limits.reached(23, 0)
    assert limits.reached(24, 0)
    assert not limits.reached(9, 1 << 30)  # a block is finished first
    assert limits.reached(16, 1 << 30)
    assert limits.reached(9, 0, lines=24 * 16)


def test_an_input_that_changes_under_the_job_is_noticed(llm, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(ids(20))
    os.utime(source, ns=(1, 1))
    with JobInput(source) as lines, FileResults(tmp_path / "out.jsonl") as results:
        job = Job(llm, Completing(llm, GREEDY, "m"), lines, results)
        os.utime(source, ns=(2, 2))
        with pytest.raises(JobError, match="was changed while it was read"):
            job.run()


def test_memory_does_not_grow_with_the_job(offload, tmp_path, monkeypatch):
    """What is held after 12 windows is what is held after 4: requests, results, ids, journal."""
    # What reaches its own limit only later.
    monkeypatch.setattr("flexgen_jax.engine.block_run.MOST_OPS", 2000)
    monkeypatch.setattr("flexgen_jax.engine.block_run.MOST_SPANS", 0)
    monkeypatch.setattr("flexgen_jax.planning.refilling.MOST_LIVES", 0)
    held, count = [], 3100
    (tmp_path / "in.jsonl").write_bytes(ids(count) + b"nonsense\n" * 20)

    def on_window(window, blocks, left):
        gc.collect()
        held.append((tracemalloc.get_traced_memory()[0], len(window.requests)))

    policy = fg.Policy(device_batch_size=32, num_device_batches=4)
    with (
        fg.LLM(MODEL, policy=policy, offload_dir=offload) as llm,
        JobInput(tmp_path / "in.jsonl") as lines,
        FileResults(tmp_path / "out") as results,
    ):
        limits = WindowSize.of(llm.policy.block_size, 256)
        job = Job(llm, Completing(llm, GREEDY, "m"), lines, results, window_size=limits)
        tracemalloc.start()
        try:
            report = job.run(on_window=on_window).report
        finally:
            tracemalloc.stop()
    assert [size for _, size in held] == [256] * 12 + [28]
    assert report.requests == count
    assert report.generated_tokens == 3 * count
    # A kept output alone takes a kilobyte: 2048 of them would show.
    assert held[11][0] - held[3][0] < 200_000
    records = (tmp_path / "out").read_text().splitlines()
    assert [json.loads(line)["id"] for line in records] == [*range(1, count + 21)]


def mutated(line, random_):
    """One of the many ways in which a line may be wrong, or not."""
    data = bytearray(line)
    for _ in range(random_.randint(1, 3)):
        place = random_.randrange(len(data) + 1)
        match random_.randrange(6):
            case 0:
                data[place : place + 1] = bytes([random_.randrange(256)])
            case 1:
                del data[place : place + random_.randint(1, 9)]
            case 2:
                data[place:place] = random_.choice(
                    [b"NaN", b"1e999", b"-1", b"null", b"{}", b"[[[", b'"', b"\\ud800", b"9" * 400]
                )
            case 3:
                data[place:place] = data[: random_.randint(1, 30)]
            case 4:
                data[place:place] = random_.choice(
                    [b"true", b"\xff", b"\x00", b"0", b"e", b":", b","]
                )
            case 5:
                key = random_.choice(
                    ["max_tokens", "top_k", "seed", "id", "stop", "prompt", "body"]
                )
                value = random_.choice(["-1", "1e400", "[]", "{}", "null", '"x"', "1e3", "2"])
                data[1:1] = f'"{key}": {value}, '.encode()
    return bytes(data).replace(b"\n", b" ")


def test_two_thousand_mutated_lines(llm, tmp_path):
    random_ = random.Random(2024)
    body = {"prompt": [5, 6], "max_tokens": 2, "temperature": 0.5}
    originals = [
        json.dumps(line).encode()
        for line in (
            {"id": "a", "prompt_token_ids": [5, 6, 7], "max_tokens": 2, "top_p": 0.9},
            {"prompt_token_ids": [8], "logprobs": 1, "stop_token_ids": [3], "seed": 7},
            {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": body},
        )
    ]
    lines = [mutated(random_.choice(originals), random_) for _ in range(2000)]
    lines = [line.replace(b'"a"', b'"%d a"' % i) or b"x" for i, line in enumerate(lines)]
    lines = [line.replace(b'"b"', b'"%d b"' % i) for i, line in enumerate(lines)]
    assert all(line.strip() for line in lines)
    (tmp_path / "in.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    done = run_job(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    text = (tmp_path / "out.jsonl").read_bytes().decode("utf-8")

    def no_constant(name):
        raise AssertionError(name)

    records = [json.loads(r, parse_constant=no_constant) for r in text.splitlines()]
    assert len(records) == 2000
    wrong = [r["error"]["line"] for r in records if r.get("error")]
    assert len(wrong) == done.errors
    assert done.errors > 1000
    assert done.requests == 2000 - done.errors
    assert done.requests > 50
    for number, record in enumerate(records, 1):
        if record.get("error"):
            assert record["error"]["line"] == number
            assert record["error"]["message"]


def test_outputs_come_as_prompts_go(llm):
    taken = []

    def prompts():
        for i in range(50):
            taken.append(i)
            yield {"prompt_token_ids": [5 + i % 40, 6]}

    expected = llm.generate([[5 + i % 40, 6] for i in range(50)], GREEDY)
    found = llm.generate_iter(prompts(), GREEDY, window=16)
    assert taken == []  # lazily
    outputs = [next(found)]
    assert len(taken) == 16
    outputs += [next(found) for _ in range(15)]
    assert len(taken) == 16
    outputs += list(found)
    assert [o.request_id for o in outputs] == [str(i) for i in range(50)]
    assert [o.outputs for o in outputs] == [o.outputs for o in expected]
    assert llm.report.requests == 50
    assert llm.report.blocks == 4  # one for each window
    assert llm.report.generated_tokens == 150


def test_a_bad_prompt_in_a_stream_loses_nothing(llm):
    found = llm.generate_iter(iter([[5], [6], [10**9], [7]]), iter([GREEDY] * 4))
    assert [next(found).request_id, next(found).request_id] == ["0", "1"]
    with pytest.raises(fg.RequestError, match="prompt 2: token id 1000000000 is outside"):
        next(found)
    short = llm.generate_iter([[5], [6]], [GREEDY])
    assert next(short).request_id == "0"
    with pytest.raises(fg.RequestError, match="no sampling parameters for prompt 1"):
        next(short)
    with pytest.raises(ValueError, match="window must be"):
        llm.generate_iter([], window=0)
    assert list(llm.generate_iter([])) == []


def test_lines_of_any_size_are_read_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("flexgen_jax.jobs.job_input.MAX_LINE", 10)
    monkeypatch.setattr("flexgen_jax.jobs.job_input._PIECE", 4)
    data = b"short\n" + b"0123456789" + b"\n" + b"x" * 35 + b"\n\nlast one that is long"
    (tmp_path / "in").write_bytes(data)
    with JobInput(tmp_path / "in") as source:
        found = [(line.number, line.raw) for line in source.lines()]
        assert source.share_read == 1
    assert found == [(1, b"short\n"), (2, None), (3, None), (5, None)]
    assert io.BytesIO(data).readlines()[4] == b"last one that is long"


def test_a_hugging_face_dataset_is_completed_row_by_row(llm):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt_token_ids": [5 + i] * (i + 1)} for i in range(3)]
    labelled = datasets.Dataset.from_list([{**row, "label": 1} for row in rows])
    with pytest.raises(fg.RequestError, match=r"unknown field 'label' .*select_columns"):
        list(llm.generate_iter(labelled, GREEDY))
    dataset = labelled.select_columns("prompt_token_ids")
    expected = [o.outputs[0].token_ids for o in llm.generate(rows, GREEDY)]
    for given in (dataset, dataset.to_iterable_dataset(), (row for row in dataset)):
        found = list(llm.generate_iter(given, GREEDY, window=2))
        assert [o.outputs[0].token_ids for o in found] == expected


def test_token_ids_may_be_arrays(llm):
    ids = [[5, 6, 7], [8, 9]]
    expected = [o.outputs for o in llm.generate(ids, GREEDY)]
    assert [o.outputs for o in llm.generate([np.array(i) for i in ids], GREEDY)] == expected
    assert [o.outputs for o in llm.generate((jnp.array(i) for i in ids), GREEDY)] == expected
    one = llm.generate(np.array(ids[0]), GREEDY)
    assert [o.outputs[0].token_ids for o in one] == [expected[0][0].token_ids]
    with pytest.raises(fg.RequestError, match="expected a text or a list of token ids"):
        llm.generate([np.array([0.5, 1.5])], GREEDY)
