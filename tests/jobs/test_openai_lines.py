"""OpenAI's batch lines, whole: what comes out is what the ``openai`` package reads."""

import json

import pytest

import flexgen_jax as fg
from flexgen_jax.jobs.job import Completing, Job
from flexgen_jax.jobs.job_input import JobInput
from flexgen_jax.jobs.results import FileResults

openai = pytest.importorskip("openai")
from openai.types import Completion  # noqa: E402 # where it is installed
from openai.types.chat import ChatCompletion  # noqa: E402
from openai.types.shared import ErrorObject  # noqa: E402

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "What comes in?"}]
GREEDY = fg.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
SCHEMA["additionalProperties"] = False
FORM = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
LONG = {"max_tokens": 40}
SAMPLED = {"temperature": 1.0, "seed": 5}

GOOD = {
    "text": (TEXT, {"prompt": "The tide"}),
    "ids": (TEXT, {"prompt": [5, 6, 7]}),
    "texts": (TEXT, {"prompt": ["The tide", "Once more", "The"]}),
    "lists": (TEXT, {"prompt": [[5, 6], [7]], "n": 2, "best_of": 2, **SAMPLED}),
    "logprobs": (TEXT, {"prompt": "The tide", "logprobs": 2}),
    "echo": (TEXT, {"prompt": "The tide", "echo": True}),
    "scored": (TEXT, {"prompt": ["The tide", [5, 6]], "echo": True, "logprobs": 1}),
    "only scored": (TEXT, {"prompt": "The tide", "echo": True, "logprobs": 1, "max_tokens": 0}),
    "vLLM's": (TEXT, {"prompt": "The tide", "prompt_logprobs": 1, "top_k": 5, "min_tokens": 2}),
    "allowed": (CHAT, {"messages": USER, "allowed_token_ids": [30, 40], "logprobs": True}),
    "ignored": (TEXT, {"prompt": "The tide", "model": "x", "user": "u", "stream": False}),
    "metadata": (CHAT, {"messages": USER, "metadata": {"row": "7"}, "store": True}),
    "chat": (CHAT, {"messages": USER, "max_completion_tokens": 3, "service_tier": "flex"}),
    "chosen": (CHAT, {"messages": USER, "logprobs": True}),
    "top": (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 2, "n": 2, **SAMPLED}),
    # The job's default goes on after the end of the text.
    "form": (CHAT, {"messages": USER, "response_format": FORM, "ignore_eos": False, **LONG}),
}
BAD = {
    "embeddings": ("/v1/embeddings", {"input": "x"}, "url must be '/v1/completions' or"),
    "no prompt": (TEXT, {}, "the body has no 'prompt'"),
    "one of two": (TEXT, {"prompt": ["The", [10**9]]}, "outside the vocabulary"),
    "many": (TEXT, {"prompt": ["x"] * 2049}, "at most 2048 prompts"),
    "echo": (TEXT, {"prompt": "x", "echo": 1}, "echo must be true or false"),
    "silent": (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens must be"),
    "suffix": (TEXT, {"prompt": "x", "suffix": "y"}, "suffix='y' is not supported"),
    "stream": (CHAT, {"messages": USER, "stream": True}, "stream=True is not supported"),
    "no messages": (CHAT, {"prompt": "x"}, "the body has no 'messages'"),
    "allowed": (TEXT, {"prompt": "x", "allowed_token_ids": []}, "at least one token id"),
    "number": (CHAT, {"messages": USER, "logprobs": 3}, "logprobs must be true or false"),
    "top": (CHAT, {"messages": USER, "top_logprobs": 3}, "top_logprobs needs logprobs"),
    "unknown": (CHAT, {"messages": USER, "tempratur": 3}, "unknown sampling field 'tempratur'"),
    "twice": (
        CHAT,
        {"messages": USER, "max_tokens": 3, "max_completion_tokens": 4},
        "give one of them",
    ),
}


@pytest.fixture(scope="module")
def llm(chatting_model, tmp_path_factory):
    policy = fg.Policy(device_batch_size=4, num_device_batches=2)
    offload = str(tmp_path_factory.mktemp("offload"))
    with fg.LLM(str(chatting_model), policy=policy, offload_dir=offload) as llm:
        yield llm


def run(llm, directory, lines, *, name="out", stop_after=None, seconds=None):
    text = "".join(
        json.dumps({"custom_id": key, "method": "POST", "url": url, "body": body}) + "\n"
        for key, url, body in lines
    )
    (directory / "in.jsonl").write_text(text)
    booked = 0

    def progress(count):
        nonlocal booked
        booked += count
        if stop_after is not None and booked >= stop_after:
            raise Stopped

    with JobInput(directory / "in.jsonl") as source, FileResults(directory / name) as results:
        job = Job(
            llm, Completing(llm, GREEDY, "served"), source, results, checkpoint_seconds=seconds
        )
        done = job.run(progress=progress)
    data = (directory / name).read_bytes()
    return done, {r["custom_id"]: r for r in map(json.loads, data.splitlines())}, data


class Stopped(BaseException):
    """The power goes."""


@pytest.fixture(scope="module")
def answers(llm, tmp_path_factory):
    lines = [(key, *line) for key, line in GOOD.items()]
    lines += [(f"bad {key}", url, body) for key, (url, body, _) in BAD.items()]
    return run(llm, tmp_path_factory.mktemp("job"), lines)[1]


def body_of(answers, key):
    record = answers[key]
    assert set(record) == {"id", "custom_id", "response", "error"}
    assert record["error"] is None, record["error"]
    assert record["response"]["status_code"] == 200
    return record["response"]["body"]


@pytest.mark.parametrize("key", GOOD)
def test_answers_are_openais(answers, key):
    body = body_of(answers, key)
    kind = ChatCompletion if GOOD[key][0] == CHAT else Completion
    if "scored" in key:
        # A first token has no log-probability: OpenAI's server says null, which its types do not
        # have; its client reads it so.
        assert body["choices"][0]["logprobs"]["token_logprobs"][0] is None
        made = kind.construct(**body)
    else:
        made = kind.model_validate(body)
    assert made.created == 1700000000
    assert made.model == "served"
    assert [choice.index for choice in made.choices] == [*range(len(made.choices))]
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    assert {choice.finish_reason for choice in made.choices} <= {"length", "stop"}


@pytest.mark.parametrize("key", BAD)
def test_errors_are_openais(answers, key):
    record, words = answers[f"bad {key}"], BAD[key][2]
    assert words in record["error"]["message"]
    assert record["response"]["status_code"] == 400
    error = ErrorObject.model_validate(record["response"]["body"]["error"])
    assert (error.type, words in error.message) == ("invalid_request_error", True)


def test_a_line_of_several_prompts_is_answered_at_once(llm, answers):
    texts = [choice["text"] for choice in body_of(answers, "texts")["choices"]]
    alone = [o.outputs[0].text for o in llm.generate(GOOD["texts"][1]["prompt"], GREEDY)]
    assert texts == alone
    body = body_of(answers, "lists")
    assert len(body["choices"]) == 4
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}


def test_echo(llm, answers):
    (plain,) = body_of(answers, "text")["choices"]
    (echoed,) = body_of(answers, "echo")["choices"]
    assert echoed["text"] == "The tide" + plain["text"]
    ids = llm.encode("The tide")
    text, of_ids = body_of(answers, "scored")["choices"]
    (silent,) = body_of(answers, "only scored")["choices"]
    assert (silent["text"], silent["finish_reason"]) == ("The tide", "length")
    assert body_of(answers, "only scored")["usage"]["completion_tokens"] == 0
    assert text["logprobs"]["token_logprobs"][0] is None
    assert len(text["logprobs"]["tokens"]) == len(ids) + 4
    assert len(of_ids["logprobs"]["tokens"]) == 2 + 4
    assert of_ids["text"].startswith(llm.tokenizer.decode([5, 6]))
    for name in ("tokens", "text_offset"):
        assert silent["logprobs"][name] == text["logprobs"][name][: len(ids)]
    mine, theirs = (c["logprobs"]["token_logprobs"][1 : len(ids)] for c in (silent, text))
    assert mine == pytest.approx(theirs)
    found = text["logprobs"]
    assert "".join(found["tokens"][1:])[: len("The tide")] == "The tide"
    places = [sum(map(len, found["tokens"][:i])) for i in range(len(found["tokens"]))]
    assert found["text_offset"] == places


def test_logprobs_of_chats(answers):
    chosen = body_of(answers, "chosen")["choices"][0]["logprobs"]["content"]
    assert [position["top_logprobs"] for position in chosen] == [[]] * 4
    for choice in body_of(answers, "top")["choices"]:
        for position in choice["logprobs"]["content"]:
            top = position["top_logprobs"]
            assert len(top) == 2
            assert top[0]["logprob"] >= top[1]["logprob"]
            # What was drawn need not be among the likeliest.
            assert position["logprob"] <= top[0]["logprob"]
            if position["bytes"] is not None:
                assert bytes(position["bytes"]).decode() == position["token"]


def test_only_allowed_tokens_come(llm, answers):
    (choice,) = body_of(answers, "allowed")["choices"]
    words = {llm.tokenizer.token(30), llm.tokenizer.token(40)}
    assert {entry["token"] for entry in choice["logprobs"]["content"]} <= words


def test_fields_that_change_nothing(answers):
    assert body_of(answers, "ignored")["choices"] == body_of(answers, "text")["choices"]
    assert body_of(answers, "metadata")["metadata"] == {"row": "7"}
    assert json.loads(body_of(answers, "form")["choices"][0]["message"]["content"])["a"] in (1, 2)
    assert len(body_of(answers, "vLLM's")["choices"][0]["prompt_logprobs"]) > 2


def test_a_job_goes_on_within_a_line_of_several_prompts(llm, tmp_path):
    lines = [
        (f"{i}", TEXT, {"prompt": [f"The {j}" for j in range(i)], "max_tokens": 2 + 3 * (i % 3)})
        for i in range(1, 9)
    ]
    done, clean, data = run(llm, tmp_path, lines, name="clean")
    assert {key: len(body_of(clean, key)["choices"]) for key in clean} == {
        f"{i}": i for i in range(1, 9)
    }
    assert done.requests == 36
    with pytest.raises((Stopped, fg.ExecutionError)):
        run(llm, tmp_path, lines, stop_after=60, seconds=1e-9)
    assert run(llm, tmp_path, lines, seconds=1e-9)[2] == data
