"""``run-batch`` takes vLLM's options: does them, says why it ignores them, or refuses them."""

import json

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.cli.run_batch import ELSEWHERE, IGNORED

USER = [{"role": "user", "content": "What comes in?"}]
LINES = [
    ("text", "/v1/completions", {"prompt": [5, 6, 7]}),
    ("chat", "/v1/chat/completions", {"messages": USER}),
    ("long", "/v1/completions", {"prompt": [5] * 30}),
    ("short", "/v1/chat/completions", {"messages": USER, "max_tokens": 2}),
]


@pytest.fixture
def run_batch(tmp_path, chatting_model):
    def run(*options, command="run-batch", lines=LINES):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        texts = [{"custom_id": i, "method": "POST", "url": u, "body": b} for i, u, b in lines]
        source.write_text("".join(json.dumps(text) + "\n" for text in texts))
        arguments = [command, "--model", chatting_model, "-i", source, "-o", target]
        arguments += ["--offload-dir", tmp_path, *options]
        result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
        records = {}
        if target.exists():
            records = {r["custom_id"]: r for r in map(json.loads, target.read_bytes().splitlines())}
        return result, records

    return run


def test_vllms_command_line(run_batch):
    """The line of vLLM's documentation, and what scripts add to it."""
    result, records = run_batch(
        *("--max_model_len", "0.04k", "--served-model-name", "mine", "--dtype", "half"),
        *("--max-num-seqs", 4, "--tensor-parallel-size=2", "--num-device-batches", 2),
        *("--gpu-memory-utilization", 0.9, "--swap-space", 4, "--enforce-eager"),
        *("--trust-remote-code", "--seed", 3, "--disable-log-stats"),
    )
    assert result.exit_code == 0, result.output
    assert records["text"]["response"]["body"]["model"] == "mine"
    assert records["text"]["response"]["body"]["usage"]["completion_tokens"] <= 16
    # A conversation without max_tokens goes on to --max-model-len, or the end of the text.
    chat = records["chat"]["response"]["body"]
    stopped = chat["choices"][0]["finish_reason"] == "stop"
    assert stopped or chat["usage"]["total_tokens"] == 40
    assert (
        "max_tokens 16 exceed the 40 tokens of --max-model-len"
        in records["long"]["error"]["message"]
    )
    assert records["short"]["response"]["body"]["usage"]["completion_tokens"] <= 2
    for option in ("--gpu-memory-utilization", "--swap-space", "--enforce-eager"):
        assert result.stderr.count(f"ignoring {option}: ") == 1
    assert result.stderr.count("ignoring") == 5
    assert "--dtype half: computing in bfloat16" in result.stderr
    assert "--tensor-parallel-size 2: layers are pipelined over 2 devices" in result.stderr
    assert "blocks of 4 x 2" in result.stderr


def test_what_a_models_publishers_suggest(run_batch, chatting_model, tmp_path):
    """``auto`` here, as in vLLM; an option that is given wins; the same command is complete."""
    suggested = {"temperature": 0.1, "top_k": 1, "max_new_tokens": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(suggested))

    def usage(*options, command="run-batch"):
        result, records = run_batch(*options, "--restart", command=command)
        assert result.exit_code == 0, result.output
        bodies = [records[key]["response"]["body"] for key in ("text", "chat", "short")]
        found = [body["usage"]["completion_tokens"] for body in bodies]
        return found, [body["choices"] for body in bodies]

    theirs = ("--generation-config", tmp_path, "--seed", 7)
    counts, sampled = usage(*theirs)
    assert counts[1:] == [3, 2]
    assert counts[0] <= 3
    # A temperature of 0.1 among one likeliest token is greedy.
    assert sampled == usage(*theirs, "--temperature", 0)[1]
    assert usage(*theirs, "--max-tokens", 1)[0][0] == 1
    assert usage(*theirs, "--ignore-eos", command="generate")[0] == [3, 3, 2]
    assert usage("--max-tokens", 5, "--ignore-eos", command="generate")[0] == [5, 5, 2]
    again = ("--max-tokens", 5, "--ignore-eos")
    assert "already complete" in run_batch(*again, command="generate")[0].stderr
    other = run_batch(*again, *theirs, command="generate")[0]
    assert (
        "temperature was 0.0, is now 0.1" in other.stderr or "seed was 0, is now 7" in other.stderr
    )
    result, _ = run_batch("--generation-config", tmp_path / "none", "--restart")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "cannot take sampling defaults from" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-model-length", 8], "No such option '--max-model-length'|--max-model-len"),
        (["--quantization", "awq"], "No such option: --quantization: give --weight-bits 4 or 8"),
        (["--max-num-seqs", 4, "--device-batch-size", 8], "are one thing: give one"),
        (["-tp", 2, "--stages", 3], "--stages 3 and --tensor-parallel-size and"),
        (["--max-model-len", "many"], "must be a number of tokens or auto, got 'many'"),
        (["--dtype", "int8"], "'int8' is not one of 'auto', 'float32'"),
    ],
)
def test_what_is_refused(run_batch, options, words):
    result, _ = run_batch(*options)
    assert result.exit_code == 2
    assert any(word in result.stderr for word in words.split("|")), result.stderr


def test_generate_names_options_of_other_programs_too(run_batch):
    result, _ = run_batch("--max-new-tokens", 3, command="generate")
    assert (result.exit_code, "give --max-tokens" in result.stderr) == (2, True)
    result, _ = run_batch("--swap-space", 3, command="generate")
    assert "No such option" in result.stderr


def test_no_option_is_two_things():
    names = {name for p in main.commands["run-batch"].params for name in p.opts}
    assert names.isdisjoint(ELSEWHERE)
    assert {*IGNORED} <= names
    assert len(names) == sum(len(p.opts) for p in main.commands["run-batch"].params)


def test_another_limit_is_another_job():
    from flexgen_jax.jobs.job import Chatting, completing_identity

    params = fg.SamplingParams()
    found = [
        completing_identity(params, 0, "m", Chatting(to_the_limit=limit), length)
        for limit, length in ((False, None), (True, None), (False, 8))
    ]
    assert found[0] != found[1]
    assert found[0] != found[2]
