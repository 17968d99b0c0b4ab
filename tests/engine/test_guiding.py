"""Answers in a form: every one fits, beside free ones that it changes nothing of."""

import json
import re

import numpy as np
import pytest

import flexgen_jax as fg
from flexgen_jax.jobs.job import Completing, Job
from flexgen_jax.jobs.job_input import JobInput
from flexgen_jax.jobs.results import FileResults
from flexgen_jax.models.family import eos_token_ids
from flexgen_jax.requests.guidance import masks
from flexgen_jax.requests.prompts import RequestError
from flexgen_jax.requests.texts import guidance_of

MODEL = "flexgen_jax/demo_model"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TAG = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=a>", "schema": {**NUMBER, "additionalProperties": False}, "end": "</f>"}
    ],
    "triggers": ["<f="],
}
SHAPE = {"device_batch_size": 4, "num_device_batches": 2}


def params(form=None, **fields):
    return fg.SamplingParams(**{"max_tokens": 60, "structured_outputs": form, **fields})


def fits(text):
    value = json.loads(text)
    assert list(value) == ["name", "age", "tags"]
    assert len(value["name"]) <= 8
    assert 0 <= value["age"] <= 120
    assert set(value["tags"]) <= {"a", "b"}
    assert len(value["tags"]) <= 2
    return True


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def llm(offload):
    with fg.LLM(MODEL, policy=fg.Policy(**SHAPE), offload_dir=offload) as llm:
        yield llm


# Three more than the block has rows, of unequal lengths: newcomers take rows of finished ones.
FORMS = [
    {"json": SCHEMA},
    {"regex": "[a-f]{3}-[0-9]{2}"},
    None,
    {"choice": ["yes", 'no "never"', "漢字\n"]},
    {"grammar": 'start: "<" /[a-z]+/ ">"'},
    None,
    {"json_object": True},
    {"json": json.dumps(SCHEMA)},
    {"json": SCHEMA},
    None,
    {"choice": ["one"]},
]
CHECKS = {
    "regex": lambda text: re.fullmatch("[a-f]{3}-[0-9]{2}", text),
    "choice": lambda text: text in ("yes", 'no "never"', "漢字\n", "one"),
    "grammar": lambda text: re.fullmatch("<[a-z]+>", text),
    "json": fits,
    "json_object": lambda text: isinstance(json.loads(text), dict),
}
PROMPTS = ["The tide comes in " * (1 + i % 3) for i in range(len(FORMS))]


def mixed():
    return [
        params(form, temperature=i % 2, seed=i, max_tokens=12 if form is None else 60)
        for i, form in enumerate(FORMS)
    ]


@pytest.fixture(scope="module")
def answers(llm):
    return [output.outputs[0] for output in llm.generate(PROMPTS, mixed())]


def test_every_answer_has_its_form(answers):
    for form, answer in zip(FORMS, answers, strict=True):
        if form is not None:
            (kind,) = form
            if answer.finish_reason == "stop":  # an object of any length may be cut
                assert CHECKS[kind](answer.text), (form, answer.text)
            else:
                assert kind in ("json_object", "grammar")
                assert answer.text[0] in "{<"
    stopped = [a.finish_reason == "stop" for a, f in zip(answers, FORMS, strict=True) if f]
    assert sum(stopped) >= 6


def test_free_neighbours_are_what_they_are_without(llm, answers):
    """To the bit: the same block, in which nobody has a form."""
    few = range(4)
    free = fg.SamplingParams(max_tokens=8, temperature=1.0, seed=7, logprobs=3, ignore_eos=True)
    guided = params({"regex": "[a-z ]{8,}"}, max_tokens=8, temperature=1.0, logprobs=3)
    alone = llm.generate(PROMPTS[:4], free)
    beside = llm.generate(PROMPTS[:4], [guided if i % 2 else free for i in few])
    for i in few:
        same = alone[i].outputs[0] == beside[i].outputs[0]
        assert same == (i % 2 == 0)


def test_blocks_without_refill(offload, answers):
    """Schedules, stages and processes with a form are in test_stages and test_processes."""
    policy = fg.Policy(**SHAPE, refill=False)
    with fg.LLM(MODEL, policy=policy, offload_dir=offload) as llm:
        outputs = llm.generate(PROMPTS, mixed())
    assert [o.outputs[0].token_ids for o in outputs] == [a.token_ids for a in answers]


def test_several_completions_each_fit(llm):
    (output,) = llm.generate(["x"], params({"json": SCHEMA}, temperature=1.5, n=3, seed=1))
    assert [fits(c.text) for c in output.outputs] == [True] * 3
    assert len({c.token_ids for c in output.outputs}) > 1


def test_a_form_of_allowed_tokens(llm):
    """Of two answers only one is spelled with them."""
    ids = [*llm.tokenizer.encode_words("two"), *eos_token_ids(llm.config)]
    form = {"choice": ["ace", "two"]}
    given = [params(form, temperature=1.0, allowed_token_ids=ids), params(form, temperature=1.0)]
    narrow, wide = llm.generate(["x", "x"], given)
    assert (narrow.outputs[0].text, narrow.outputs[0].finish_reason) == ("two", "stop")
    assert wide.outputs[0].text in ("ace", "two")


class Stopped(BaseException):
    """The power goes."""


def test_a_job_goes_on_inside_an_answer(llm, tmp_path):
    """Matchers are made anew of the tokens so far; bad schemas are errors of their lines."""
    lines = [
        {"id": i, "prompt": prompt, "max_tokens": 40, "structured_outputs": form, "seed": i}
        for i, (prompt, form) in enumerate(zip(PROMPTS[:7], FORMS[:7], strict=True))
    ]
    guided = [
        {"guided_json": SCHEMA},
        {"guided_choice": ["up", "down"]},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
        {"response_format": {"type": "text"}},
        {"response_format": TAG, "max_tokens": 4},
        {"guided_json": {"type": "nope"}},
        {"guided_regex": "[a"},
        {"guided_regex": "a", "guided_json": SCHEMA},
        {"response_format": {"type": "xml"}},
        {"structured_outputs": {"jsn": {}}},
        {"guided_choice": ["a"], "ignore_eos": True},
    ]
    lines += [{"id": f"g{i}", "prompt": "x", **fields} for i, fields in enumerate(guided)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    defaults = fg.SamplingParams(max_tokens=60, temperature=1.0)

    def run(target, stop_after=None):
        booked = 0

        def progress(count):
            nonlocal booked
            booked += count
            if stop_after is not None and booked >= stop_after:
                raise Stopped

        with JobInput(source) as read, FileResults(target) as results:
            task = Completing(llm, defaults, "m")
            Job(llm, task, read, results, checkpoint_seconds=1e-9).run(progress=progress)
        return target.read_bytes()

    clean = run(tmp_path / "clean")
    for stop_after in (30, 40):
        with pytest.raises((Stopped, fg.ExecutionError)):
            run(tmp_path / "out", stop_after)
        assert list((tmp_path / "out.checkpoint").glob("*/state.json"))
    assert run(tmp_path / "out") == clean
    records = list(map(json.loads, clean.splitlines()))
    schema, choice, openai, text, tagged, *wrong = records[7:]
    assert "error" not in tagged
    assert fits(schema["text"])
    assert fits(openai["text"])
    assert choice["text"] in ("up", "down")
    assert "error" not in text
    words = [
        "cannot be compiled: Invalid type: nope",
        "cannot be compiled: .*unclosed character class",
        "guided_json and guided_regex say both|guided_regex and guided_json say both",
        "response_format must be an object whose type is",
        "unknown field 'jsn'",
        "ignore_eos goes on after it",
    ]
    for record, word in zip(wrong, words, strict=True):
        assert re.search(word, record["error"]["message"], re.S), record


def test_a_form_that_nothing_may_follow_is_an_error_of_its_request(llm):
    bad = params({"choice": ["yes"]}, min_tokens=20)
    with pytest.raises(fg.NoAnswerError, match="structured_outputs leave none") as raised:
        llm.generate(["x", "y"], [bad, params(None, max_tokens=2)])
    assert len(raised.value.outputs[1].outputs[0].token_ids) == 2


def test_a_matcher_that_fails_says_so(llm):
    guide = guidance_of(llm.config, llm.tokenizer).guide(
        params({"choice": ["a"]}).structured_outputs
    )
    free = guidance_of(llm.config, llm.tokenizer).guide(params({"regex": "."}).structured_outputs)
    words = -(-llm.config.vocab_size // 32)
    allowed = masks([(0, guide, [7]), (2, free, [])], 3)
    assert allowed.shape == (3, words)
    assert not allowed[0].any()
    assert (allowed[1] == -1).all()
    assert np.unpackbits(allowed[2].view(np.uint8)).sum() > 50
    assert "cannot be followed any further" in guide.error
    assert free.error is None


def test_text_with_calls_in_it(llm):
    """Free text, until a trigger comes; then one of the structures, and text again."""
    for form in ({"structural_tag": TAG}, {"structural_tag": json.dumps(TAG)}):
        guide = guidance_of(llm.config, llm.tokenizer).guide(params(form).structured_outputs)
        said: list[int] = []

        def may_come(text, said=said, guide=guide):
            """Which of single letters may follow what was said so far and ``text``."""
            said += llm.tokenizer.encode_words(text)
            (allowed,) = masks([(0, guide, said)], 1)
            bits = np.unpackbits(allowed.view(np.uint8), bitorder="little")
            letters = {c: llm.tokenizer.encode_words(c)[-1] for c in 'x{"<5}'}
            return {c for c, token in letters.items() if bits[token]}

        assert may_come("I ask:") == set('x{"<5}')
        assert may_come("<f=a>") == {"{"}
        assert may_come('{"n": 5') == {"5", "}"}
        assert may_come("}") == {"<"}
        assert may_come("</f>") == set('x{"<5}')
    (output,) = llm.generate(["x"], params({"structural_tag": TAG}, max_tokens=8))
    assert len(output.outputs[0].token_ids) <= 8


def test_what_python_refuses(llm, offload):
    for form, words in [
        ({}, "exactly one of json, regex, choice, grammar, json_object and structural_tag, got no"),
        (
            {"structural_tag": {"triggers": ["<f"]}},
            "structural_tag must be .*'structures' is missing",
        ),
        ({"structural_tag": {**TAG, "triggers": ["<g"]}}, "no trigger begins '<f=a>'"),
        ({"structural_tag": {**TAG, "format": {}}}, "unknown field 'format'"),
        ({"json": SCHEMA, "regex": "x"}, "got json, regex"),
        ({"choice": []}, "choice must be a list"),
        ({"json": "{"}, "schema is not JSON"),
        ({"json": 3}, "must be an object or its text"),
        ({"regex": 3}, "regex must be a text"),
        ("json", "must be an object with one of"),
        ({"json_object": False}, "json_object must be true"),
    ]:
        with pytest.raises(ValueError, match=words):
            params(form)
    assert params({"json": SCHEMA}) == params(fg.StructuredOutputsParams(json=SCHEMA))
    with pytest.raises(RequestError, match="prompt 0: structured_outputs cannot be compiled"):
        llm.generate(["x"], params({"json": {"$ref": "#/nope"}}))
    bare = fg.LLM("tests/goldens/pre_norm", policy=fg.Policy(**SHAPE), offload_dir=offload)
    with bare, pytest.raises(RequestError, match="which structured_outputs needs"):
        bare.generate([[5]], params({"json": SCHEMA}))
