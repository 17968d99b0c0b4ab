"""A finished output stays: the same command says so, another one is refused, and so is whatever
would replace what no job has written."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.jobs.job_input import JobError
from flexgen_jax.jobs.results import FileResults
from tests.interrupting import signal_in_block

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "tests" / "goldens" / "pre_norm")
LINES = "".join(json.dumps({"prompt_token_ids": [5 + i]}) + "\n" for i in range(4)) + "nonsense\n"


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in.jsonl").write_text(LINES)
    return tmp_path / "in.jsonl"


@pytest.fixture
def generate(source, offload, tmp_path):
    def run(*more, target=tmp_path / "out", command="generate", stdin=None, model=MODEL):
        given = "-" if stdin is not None else source
        arguments = [command, "--model", model, "--offload-dir", offload, "-i", given, "-o", target]
        if command == "generate":
            arguments += ["--max-tokens", 2]
        arguments += ["--device-batch-size", 4, *more]
        return CliRunner().invoke(
            main, [str(a) for a in arguments], input=stdin, catch_exceptions=False
        )

    return run


@pytest.fixture
def no_model(monkeypatch):
    """From here on a model cannot be loaded."""

    def load(*_, **__):
        raise AssertionError("a model is loaded")

    return lambda: monkeypatch.setattr(fg.LLM, "__init__", load)


def test_the_same_job_again_is_complete(generate, tmp_path, no_model):
    first = generate()
    assert first.exit_code == 0, first.output
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    no_model()
    again = generate("--json")
    assert again.exit_code == 0, again.output
    assert again.stderr.startswith("already complete: 4 succeeded, 1 failed")
    report = json.loads(again.stdout)
    assert (report["complete"], report["requests"], report["errors"]) == (True, 4, 1)
    assert report["generated_tokens"] == 8
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-tokens", 3], "max_tokens was 2, is now 3"),
        (["--device-batch-size", 2], "policy device_batch_size was 4, is now 2"),
        (["--cache-bits", 4], "policy cache_bits was None, is now 4"),
        (["--dtype", "bfloat16"], "weights dtype was float32, is now bfloat16"),
    ],
)
def test_another_job_is_refused_without_restart(generate, tmp_path, no_model, options, said):
    assert generate().exit_code == 0
    before = (tmp_path / "out").read_bytes()
    no_model()
    refused = generate(*options)
    assert refused.exit_code == 2
    assert "this output is complete, from a job with different settings: " in refused.stderr
    assert said in refused.stderr
    assert "--restart to replace it" in refused.stderr
    assert (tmp_path / "out").read_bytes() == before


def test_another_input_or_model_is_refused(generate, source, tmp_path, no_model):
    model = shutil.copytree(MODEL, tmp_path / "model")
    assert generate(model=str(model)).exit_code == 0
    before = (tmp_path / "out").read_bytes()
    (model / "generation_config.json").write_text('{"eos_token_id": 7}')
    with (model / "config.json").open("a") as file:
        file.write(" ")
    no_model()
    assert "weights source was" in generate(model=str(model)).stderr
    source.write_text(LINES.replace("5", "6"))
    refused = generate(model=str(model))
    assert (refused.exit_code, "input digest was" in refused.stderr) == (2, True)
    assert (tmp_path / "out").read_bytes() == before


def test_restart_replaces_it_at_the_end_only(generate, tmp_path, monkeypatch):
    assert generate().exit_code == 0
    before = (tmp_path / "out").read_bytes()
    with monkeypatch.context() as patch:
        signal_in_block(patch, 2, block=1)
        assert generate("--restart", "--max-tokens", 3).exit_code == 130
    assert (tmp_path / "out").read_bytes() == before
    assert generate("--restart", "--max-tokens", 3).exit_code == 0
    replaced = (tmp_path / "out").read_bytes()
    assert replaced != before
    assert generate("--max-tokens", 3).stderr.startswith("already complete")
    assert (tmp_path / "out").read_bytes() == replaced


def test_what_no_job_has_written_is_not_replaced(generate, tmp_path, no_model):
    target = tmp_path / "out"
    target.write_text("somebody's work\n")
    no_model()
    for more in ([], ["--restart"]):
        refused = generate(*more)
        assert (refused.exit_code, "--force to replace it" in refused.stderr) == (2, True)
        assert refused.stderr.count("\n") == 1
    assert target.read_text() == "somebody's work\n"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == ["out"]


def test_force_replaces_it(generate, tmp_path):
    target = tmp_path / "out"
    target.write_text("somebody's work\n")
    assert generate("--force").exit_code == 0
    assert len(target.read_text().splitlines()) == 5
    # An output that was changed afterwards is no job's any more.
    target.write_text(target.read_text() + "a note\n")
    refused = generate("--restart")
    assert (refused.exit_code, "--force to replace it" in refused.stderr) == (2, True)
    assert target.read_text().endswith("a note\n")


def test_what_comes_to_lie_there_meanwhile_is_not_replaced(source, tmp_path):
    target = tmp_path / "out"
    with FileResults(target) as results:
        results.begin({"identity": {}, "policy": {}})
        target.write_text("somebody's work\n")
        with pytest.raises(JobError, match="appeared or was changed after this job was started"):
            results.finish()
    assert target.read_text() == "somebody's work\n"
    with pytest.raises(JobError, match="appeared or was changed"), FileResults(target):
        pass
    target.rename(tmp_path / "away")
    with FileResults(target) as results:
        results.finish()
    assert target.read_bytes() == b""


def test_a_stream_is_compared(generate, tmp_path):
    assert generate(stdin=LINES).exit_code == 0
    before = (tmp_path / "out").read_bytes()
    assert generate(stdin=LINES).stderr.startswith("already complete")
    refused = generate(stdin=LINES.replace("5", "6"))
    assert (refused.exit_code, "with another input" in refused.stderr) == (2, True)
    assert (tmp_path / "out").read_bytes() == before


def test_scores_are_kept_likewise(generate, source, tmp_path, no_model):
    source.write_text('{"prompt_token_ids": [5], "continuation_token_ids": [6]}\n')
    assert generate(command="score").exit_code == 0
    no_model()
    again = generate(command="score")
    assert (again.exit_code, again.stderr[:16]) == (0, "already complete")
    refused = generate()
    assert (refused.exit_code, "command was score, is now generate" in refused.stderr) == (2, True)


def test_quiet_says_that_every_line_is_bad(generate, source, tmp_path):
    source.write_text("nonsense\nmore\n")
    result = generate("--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: none of the 2 lines has an answer (line 1: not JSON")
    assert result.stderr.count("\n") == 1
    assert generate("--quiet").exit_code == 1  # complete, and as bad as before
