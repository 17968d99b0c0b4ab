"""Where no token can be chosen there is an error: logits that are not numbers, bans of all."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.engine.sampling import NOT_NUMBERS, NOTHING_LEFT, batch_arrays, sample, seed_words
from flexgen_jax.jobs.job import Completing, Job
from flexgen_jax.jobs.job_input import JobInput
from flexgen_jax.jobs.results import results
from flexgen_jax.planning.window_size import WindowSize
from flexgen_jax.requests.generated import Generated
from flexgen_jax.requests.request import Request
from flexgen_jax.weights.checkpoint import convert, open_store
from flexgen_jax.weights.verifying import verify

GOLDENS = Path(__file__).parent / "goldens"
EXPECTED = json.loads((GOLDENS / "expected.json").read_text())
PROMPTS, TOKENS = EXPECTED["prompts"], EXPECTED["variants"]["pre_norm"]["tokens"]
NEW = 8
GREEDY = fg.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
PLACE = 12  # the position whose embedding is no number
SOUND, LATE, AT_ONCE = PROMPTS[2], PROMPTS[3], PROMPTS[4]  # of 5, 9 and 17 tokens
POLICY = fg.Policy(device_batch_size=4, num_device_batches=1)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """One in which the embedding of a position is no number; conversion would have refused it."""
    store = convert(GOLDENS / "pre_norm", tmp_path_factory.mktemp("model") / "store")
    array = open_store(store).arrays["embed.positions"]
    table = np.memmap(array.chunk, array.dtype, "r+", shape=array.shape)
    table[PLACE + 2] = np.nan  # OPT's positions begin there
    table.flush()
    verify(store, record=True)
    with fg.LLM(str(store), policy=POLICY) as made:
        yield made


def test_the_others_of_the_batch_are_answered(llm):
    told = []
    with pytest.raises(fg.NoAnswerError) as caught:
        llm.generate([SOUND, AT_ONCE, LATE], GREEDY, on_block=told.extend)
    said = str(caught.value)
    assert "prompt 1: the logits of step 0 are not numbers (NaN or infinity)" in said
    assert "prompt 2: the logits of step 4 are not numbers (NaN or infinity)" in said
    assert "prompt 0" not in said
    first, *failed = caught.value.outputs
    assert first.error is None
    assert list(first.outputs[0].token_ids) == TOKENS[2][:NEW]
    assert [output.outputs for output in failed] == [(), ()]
    assert sorted(told, key=lambda o: o.request_id) == caught.value.outputs
    assert (llm.report.requests, llm.report.failed) == (3, 2)


def test_some_of_a_requests_completions_are_not_enough(llm):
    params = fg.SamplingParams(n=2, max_tokens=NEW, seed=3, logprobs=2)
    with pytest.raises(fg.RequestError, match=r"^prompt 0: the logits of step 4 "):
        llm.generate([LATE], params)
    assert len(llm.generate([SOUND], params)[0].outputs) == 2


def test_one_by_one_the_error_comes_in_its_place(llm):
    outputs = llm.generate_iter([SOUND, LATE, SOUND], GREEDY)
    assert list(next(outputs).outputs[0].token_ids) == TOKENS[2][:NEW]
    with pytest.raises(fg.RequestError, match=r"^prompt 1: the logits of step 4 "):
        next(outputs)


def test_scores(llm):
    good, bad = AT_ONCE[: PLACE - 1], AT_ONCE[:PLACE]
    (score,) = llm.score([good], [[5]])
    assert np.isfinite(score.logprob)
    with pytest.raises(fg.NoAnswerError, match=r"^prompt 1: the logits of .* are not numbers"):
        llm.score([good, bad], [[5], [5, 6]])
    with pytest.raises(fg.NoAnswerError, match=r"^prompt 0: the logits of "):
        fg.perplexity(llm, AT_ONCE)


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def run(tmp_path, llm, command, lines):
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = [command, "--model", str(llm.store), "--offload-dir", str(tmp_path)]
    arguments += ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    arguments += ["--device-batch-size", "2", "--num-device-batches", "1", "--json", "--restart"]
    result = CliRunner().invoke(main, arguments)
    records = list(map(strict, (tmp_path / "out.jsonl").read_text().splitlines()))
    return result, records


def test_a_job_has_error_records(tmp_path, llm):
    body = {"prompt": LATE, "max_tokens": NEW, "temperature": 0}
    openai = {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": body}
    lines = [{"prompt_token_ids": SOUND}, {"id": "a", "prompt_token_ids": AT_ONCE}, openai]
    lines = [{**line, "max_tokens": NEW} if "custom_id" not in line else line for line in lines]
    result, (sound, failed, of_openai) = run(tmp_path, llm, "generate", [*lines])
    assert result.exit_code == 0, result.output
    assert sound["token_ids"] == TOKENS[2][:NEW]
    assert failed["id"] == "a"
    assert (failed["error"]["line"], failed["error"]["type"]) == (2, "no_answer")
    assert failed["error"]["message"].startswith("the logits of step 0 are not numbers")
    assert (of_openai["custom_id"], of_openai["response"]["status_code"]) == ("b", 500)
    assert of_openai["error"]["code"] == "no_answer"
    assert "step 4" in of_openai["error"]["message"]
    assert "1 succeeded, 2 failed" in result.stderr
    assert "line 2: the logits of step 0" in result.stderr
    report = strict(result.stdout)
    assert (report["requests"], report["failed"], report["errors"]) == (3, 2, 2)


def test_a_job_without_any_answer_fails(tmp_path, llm):
    lines = [{"prompt_token_ids": AT_ONCE, "max_tokens": 2}] * 3
    result, records = run(tmp_path, llm, "generate", lines)
    assert result.exit_code == 1
    assert all(record["error"]["type"] == "no_answer" for record in records)


def test_a_job_that_goes_on_counts_what_failed_before(tmp_path, llm):
    ids = [AT_ONCE, SOUND, SOUND, LATE]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(json.dumps({"prompt_token_ids": i}) for i in ids))

    def job(on_window):
        with JobInput(source) as opened, results(tmp_path / "out.jsonl") as entered:
            size = WindowSize.of(1, 2)
            job = Job(llm, Completing(llm, GREEDY, "m"), opened, entered, window_size=size)
            return job.run(on_window=on_window)

    def stop(window, blocks, left):
        if window.number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(stop)
    done = job(lambda *_: None)
    assert (done.requests, done.errors) == (2, 2)
    records = list(map(strict, (tmp_path / "out.jsonl").read_text().splitlines()))
    assert ["error" in record for record in records] == [True, False, False, True]


def test_a_job_of_scores(tmp_path, llm):
    lines = [
        {"prompt_token_ids": ids, "continuation_token_ids": [5, 6]} for ids in (SOUND, AT_ONCE)
    ]
    result, (sound, failed) = run(tmp_path, llm, "score", lines)
    assert result.exit_code == 0, result.output
    assert sound["logprob"] < 0
    assert failed["error"]["type"] == "no_answer"
    assert "is_greedy" not in failed


def test_all_tokens_are_held_back(llm):
    stopped = fg.SamplingParams(
        temperature=0.0, max_tokens=NEW, min_tokens=2, stop_token_ids=list(range(80))
    )
    with pytest.raises(
        fg.NoAnswerError, match=r"^prompt 1: no token may come in step 0: "
    ) as caught:
        llm.generate([SOUND, SOUND], [GREEDY, stopped])
    assert list(caught.value.outputs[0].outputs[0].token_ids) == TOKENS[2][:NEW]


def test_a_snapshot_keeps_what_failed():
    request = Request(0, None, (1,), GREEDY)
    before, after = Generated(request, frozenset()), Generated(request, frozenset())
    before.fail("why")
    after.restore(json.loads(json.dumps(before.to_json())))
    assert (after.finish_reason, after.error) == ("error", "why")


ROWS = np.zeros((6, 5), np.float32)
ROWS[1, 3], ROWS[2, 3], ROWS[3, :], ROWS[4, :4] = np.nan, np.inf, -np.inf, -np.inf
ROWS[5, 2] = 1


@pytest.mark.parametrize("logprobs", [None, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_the_kernel_tells(temperature, logprobs):
    """A logit of minus infinity is that of a token that cannot come; all of them leave none."""
    params = [fg.SamplingParams(temperature=temperature, logprobs=logprobs, top_k=3)] * 6
    seeds = [seed_words(p, (0, i)) for i, p in enumerate(params)]
    arrays, features = batch_arrays(params, seeds, [[]] * 6, 6)
    found = sample(jnp.asarray(ROWS), arrays, np.zeros(len(ROWS), np.int32), features=features)
    token = np.asarray(found.token)
    assert token[1:5].tolist() == [NOT_NUMBERS, NOT_NUMBERS, NOTHING_LEFT, 4]
    assert all(token[[0, 5]] >= 0)
    if logprobs:
        assert np.isfinite(np.asarray(found.logprob)[[0, 4, 5]]).all()
    forced = jnp.asarray([3, 3, -1, 3, 3, 3], jnp.int32)
    found = sample(
        jnp.asarray(ROWS), arrays, np.zeros(len(ROWS), np.int32), forced, features=features
    )
    assert np.asarray(found.token).tolist() == [3, NOT_NUMBERS, NOT_NUMBERS, 3, 3, 3]


@pytest.mark.parametrize("value", [np.nan, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_with_what_is_no_number_is_named(tmp_path, value, dtype):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((GOLDENS / "pre_norm" / "config.json").read_text())
    tensors = load_file(GOLDENS / "pre_norm" / "model.safetensors")
    name = next(key for key in sorted(tensors) if key.endswith("layers.1.fc1.weight"))
    tensors[name][-1, 7] = value
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match="NaN or infinity") as caught:
        convert(model, tmp_path / "store", dtype=dtype)
    assert f"{model / 'model.safetensors'}: the tensor {name} has values" in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_store_with_what_is_no_number_is_named_when_it_is_quantised(tmp_path, llm):
    with pytest.raises(ValueError, match=r"store: the tensor embed\.positions has values"):
        convert(llm.store, tmp_path / "quantised", weight_bits=8)


def test_what_is_too_large_for_the_dtype_is_named(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((GOLDENS / "pre_norm" / "config.json").read_text())
    tensors = load_file(GOLDENS / "pre_norm" / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name].astype(np.float32)
    tensors[name].flat[0] = np.finfo(np.float32).max
    save_file(tensors, model / "model.safetensors")
    convert(model, tmp_path / "store", dtype="float32")
    with pytest.raises(ValueError, match=r"not numbers in bfloat16"):
        convert(model, tmp_path / "other", dtype="bfloat16")
