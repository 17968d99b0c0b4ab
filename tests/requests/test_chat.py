"""Conversations become the texts and tokens that transformers makes of them."""

import json
from datetime import datetime
from pathlib import Path

import pytest

import flexgen_jax as fg
from flexgen_jax.requests.chat import Chat
from flexgen_jax.requests.chat_templates import templates_in
from flexgen_jax.requests.prompts import RequestError
from flexgen_jax.requests.tokenization import Tokenizer, load_tokenizer
from tests.goldens import make_chat_goldens as make

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN = json.loads((GOLDENS / "chat.json").read_text(encoding="utf-8"))
NOW = datetime.fromisoformat(GOLDEN["now"])
USER = {"role": "user", "content": "Hi"}


def chat_of(arguments, **more):
    own = {"messages", "chat_template", "tools", "documents", "add_generation_prompt"}
    own.add("continue_final_message")
    given = {k: v for k, v in arguments.items() if k in own}
    others = {k: v for k, v in arguments.items() if k not in own}
    # transformers begins no answer unless it is told to.
    given.setdefault("add_generation_prompt", False)
    return Chat.of({**given, "chat_template_kwargs": others}, **more)


def rendered(directory, arguments):
    tokenizer = load_tokenizer(directory)
    try:
        text = chat_of(arguments, now=NOW).text(tokenizer)
    except RequestError as error:
        return {"error": str(error)}
    return {"text": text, "token_ids": tokenizer.encode_words(text)}


@pytest.mark.parametrize("number", range(len(make.CASES)))
def test_texts_are_transformers(tmp_path, number):
    name, arguments = make.CASES[number]
    expected = GOLDEN["cases"][number]
    assert (expected["template"], expected["arguments"]) == (name, arguments)
    as_file = number % 2 == 1 and isinstance(make.TEMPLATES[name], str)
    directory = make.write_tokenizer(tmp_path, make.TEMPLATES[name], as_file=as_file)
    found = rendered(directory, arguments)
    assert found.get("text") == expected.get("text")
    assert found.get("token_ids") == expected.get("token_ids")
    assert expected.get("error", "") in found.get("error", "")
    assert len({*found} & {"error"}) == len({*expected} & {"error"})


def test_the_goldens_have_texts_and_refusals():
    refused = ["error" in case for case in GOLDEN["cases"]]
    assert any(refused)
    assert refused.count(False) > 15


def test_a_text_is_never_begun_twice(tmp_path):
    """A tokenizer that begins every text with a token meets templates that begin with it."""
    for case in GOLDEN["cases"]:
        assert case.get("token_ids", [0]).count(0) <= 1
    tokenizer = load_tokenizer(make.write_tokenizer(tmp_path, make.HEADERS))
    assert tokenizer.encode("x")[0] == 0  # it does so elsewhere
    ids = tokenizer.encode_words(Chat(messages=[USER]).text(tokenizer))
    assert (ids[0], ids.count(0)) == (0, 1)


def test_live_transformers_agrees(tmp_path):
    pytest.importorskip("transformers")
    for name, arguments in make.CASES:
        directory = make.write_tokenizer(tmp_path / name, make.TEMPLATES[name])
        theirs = make.by_transformers(directory, arguments)
        assert theirs.get("text") == rendered(directory, arguments).get("text"), (name, arguments)


def test_parts_become_what_the_template_takes(tmp_path):
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    chatml = load_tokenizer(make.write_tokenizer(tmp_path / "text", make.CHATML))
    assert "a\nb<|im_end|>" in Chat(messages=[parts]).text(chatml)
    only = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    tokenizer = load_tokenizer(make.write_tokenizer(tmp_path / "parts", only))
    assert Chat(messages=[parts]).text(tokenizer) == "<a><b>"
    assert Chat(messages=[USER]).text(tokenizer) == "<Hi>"


def test_openais_tool_calls_are_texts_of_json(tmp_path):
    tokenizer = load_tokenizer(make.write_tokenizer(tmp_path, make.HEADERS))

    def text(arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        return Chat(messages=[USER, {"role": "assistant", "tool_calls": [call]}]).text(tokenizer)

    assert text('{"a": 1}') == text({"a": 1})
    with pytest.raises(RequestError, match="arguments of a tool call are not JSON"):
        text("{")


WRONG = [
    ({"messages": []}, "at least one object with role and content"),
    ({"messages": "Hi"}, "at least one object with role and content"),
    ({"messages": [USER, "Hi"]}, "at least one object"),
    ({"messages": [{"content": "Hi"}]}, "needs a role"),
    ({"messages": [{"role": "user"}]}, "needs content"),
    ({"messages": [{"role": "user", "content": 3}]}, "a text or a list of parts, got 3"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'text' only"),
    ({"messages": [USER], "tools": ["f"]}, "tools must be a list of objects"),
    ({"messages": [USER], "add_generation_prompt": 1}, "must be true or false"),
    (
        {"messages": [USER], "add_generation_prompt": True, "continue_final_message": True},
        "give one of them",
    ),
    ({"messages": [USER], "chat_template_kwargs": {"tools": []}}, "cannot have tools"),
    ({"messages": [USER], "chat_template": "nope"}, "nor the name of one; the model's are default"),
    ({"messages": [USER], "chat_template": "{% if %}"}, "the chat template cannot be used"),
    ({"messages": [USER], "chat_template": "{{ 1 / 0 }}"}, "division by zero"),
    ({"messages": [USER], "chat_template": "{{ ''.__class__.__mro__ }}"}, "unsafe"),
    ({"messages": [USER], "chat_template": "{{ messages.append(1) }}"}, "unsafe"),
    ({"messages": [USER], "prompt": "Hi"}, "unknown field 'prompt' beside messages"),
]


@pytest.mark.parametrize(("values", "words"), WRONG)
def test_what_is_wrong_is_said(tmp_path, values, words):
    tokenizer = load_tokenizer(make.write_tokenizer(tmp_path, make.CHATML))
    with pytest.raises(RequestError, match=words):
        Chat.of(values).text(tokenizer)


def test_a_model_without_a_template_says_so(tmp_path):
    tokenizer = Tokenizer(load_tokenizer(make.write_tokenizer(tmp_path, "x"))._backend)
    with pytest.raises(RequestError, match=r"no chat template .*give a prompt instead"):
        Chat(messages=[USER]).text(tokenizer)
    rag = make.write_tokenizer(tmp_path / "named", make.NAMED[1:])
    with pytest.raises(RequestError, match="no default chat template; name one of tool_use, rag"):
        Chat(messages=[USER]).text(load_tokenizer(rag))


def test_files_that_cannot_be_read_are_named(tmp_path):
    make.write_tokenizer(tmp_path, [{"name": "default"}])
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template is neither"):
        templates_in(tmp_path)
    with pytest.raises(RequestError, match="chat_template is neither"):
        Chat(messages=[USER]).text(load_tokenizer(tmp_path))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    make.write_tokenizer(tmp_path, "x")
    with pytest.raises(ValueError, match=r"cannot read .*chat_template\.jinja"):
        templates_in(tmp_path)


def test_llm_chat(tmp_path, chatting_model):
    """One conversation or several; a prompt of messages is the same; the store has the template."""
    policy = fg.Policy(device_batch_size=2, num_device_batches=1)
    greedy = fg.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    with fg.LLM(str(chatting_model), policy=policy, offload_dir=str(tmp_path)) as llm:
        (one,) = llm.chat([USER], greedy)
        assert one.prompt == "</s>user: Hi\nassistant:"
        assert (one.prompt_token_ids[0], one.prompt_token_ids.count(2)) == (2, 1)
        several = llm.chat([[USER], [USER, {"role": "assistant", "content": "Yes"}]], greedy)
        assert [output.outputs[0].token_ids for output in several][:1] == [one.outputs[0].token_ids]
        (same,) = llm.generate([{"messages": [USER]}], greedy)
        assert same.prompt_token_ids == one.prompt_token_ids
        (other,) = llm.chat([USER], greedy, chat_template="{{ messages[0].content }}")
        assert other.prompt == "Hi"
        with pytest.raises(RequestError, match=r"prompt 1: .* needs a role"):
            llm.chat([[USER], [{}]], greedy)
    assert (llm.store / "chat_template.jinja").exists()
    bundled = str(Path(fg.__file__).parent / "demo_model")
    with fg.LLM(bundled, policy=policy, offload_dir=str(tmp_path)) as llm:  # noqa: SIM117
        with pytest.raises(RequestError, match="prompt 0: this model has no chat template"):
            llm.chat([USER], greedy)
