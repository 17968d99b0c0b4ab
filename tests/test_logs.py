"""Logs: events with fields on stderr, as text or as JSON lines; and none that nobody asked for."""

import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax import logs
from flexgen_jax.cli.app import main

MODEL = str(Path(__file__).parent / "goldens" / "pre_norm")


@pytest.fixture
def run(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt_token_ids": [5, 6]}\n{"prompt_token_ids": [7]}\nwurst\n')

    def run(*options, more=()):
        arguments = [*options, "generate", "--no-refill", "--model", MODEL, "-i", source]
        arguments += ["-o", tmp_path / "out.jsonl", "--offload-dir", tmp_path, "--max-tokens", 3]
        arguments += ["--gpu-batch-size", 1, "--num-gpu-batches", 1, "--ignore-eos", *more]
        return CliRunner().invoke(main, [str(a) for a in arguments])

    yield run
    logs.reset()
    assert not logs.in_json()
    assert logs.LOGGER.propagate


def test_every_line_is_an_object_of_json(run, tmp_path):
    done = run("--log-format", "json")
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert {r["logger"] for r in records} == {"flexgen_jax"}
    assert all("T" in r["time"] for r in records)
    events = [r["event"] for r in records if r["event"] != "message"]
    assert events == [
        "policy chosen",
        "model opened",
        "bad line",
        "run begun",
        *["placement"] * 3,
        *["block begun", "results kept", "block finished"] * 2,
        "run finished",
        "results written",
    ]
    by = {r["event"]: r for r in records}
    assert by["bad line"]["line"] == 3
    assert by["bad line"]["level"] == "warning"
    assert by["run begun"]["requests"] == 2
    assert by["block finished"]["tokens"] == 3
    assert by["block finished"]["tokens_per_second"] > 0
    assert by["run finished"]["tokens"] == 6
    assert by["results written"]["path"] == str(tmp_path / "out.jsonl")
    # What is said to people comes as records, too.
    assert any("2 succeeded, 1 failed" in r.get("message", "") for r in records)


def test_levels(run):
    quiet, debug = run("--log-level", "error"), run("--log-level", "debug", more=["--restart"])
    assert "block finished" not in quiet.stderr
    assert "2 succeeded" in quiet.stderr
    assert " INFO block finished: block=0, tokens=3, seconds=" in debug.stderr
    assert " DEBUG streams: block=0" in debug.stderr
    warning = run("--log-level", "warning", more=["--restart"])
    assert " WARNING bad line: line=3" in warning.stderr
    assert " INFO " not in warning.stderr


def test_none_unless_asked_for(run):
    run("--log-format", "json")
    done = run()  # in the same process
    assert "block finished" not in done.stderr
    assert "bad line: " not in done.stderr
    assert '"event"' not in done.stderr


def test_an_error_is_a_record_too(run):
    done = run("--log-format", "json", more=["--device-memory", "much"])
    assert done.exit_code == 2
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["level"] == "error"
    assert "such as '12GiB'" in last["message"]


def test_a_program_sets_its_own_handlers(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "flexgen_jax"), fg.LLM(MODEL, offload_dir=tmp_path) as llm:
        llm.generate([[5, 6]], fg.SamplingParams(max_tokens=2, ignore_eos=True))
    (finished,) = (r for r in caplog.records if getattr(r, "event", "") == "run finished")
    assert finished.fields["tokens"] == 2
    assert finished.getMessage().startswith("run finished: tokens=2, seconds=")


def test_a_traceback_stays_on_its_line(capsys):
    logs.set_up("info", "json")
    try:
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError:
            logs.LOGGER.exception("went wrong")
    finally:
        logs.reset()
    (line,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError" in json.loads(line)["traceback"]


def test_nothing_is_logged_unasked_whoever_has_set_up_the_root_logger(run, caplog):
    """Orbax does so where a snapshot is read, and a bad line is a warning."""
    assert logging.getLogger().handlers
    done = run(more=["--quiet"])
    assert done.exit_code == 0
    assert done.stderr == ""
    assert [r for r in caplog.records if r.name == "flexgen_jax"] == []
    logs.event("of a program's own", level=logging.WARNING)
    assert "of a program's own" in caplog.text
