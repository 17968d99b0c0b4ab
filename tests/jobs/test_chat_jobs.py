"""Conversations in files: plain lines, OpenAI's, and prompts that are what a user says."""

import json

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.jobs.job import Chatting, Completing, Job
from flexgen_jax.jobs.job_input import JobError, JobInput
from flexgen_jax.jobs.results import FileResults

USER = {"role": "user", "content": "What comes in?"}
GREEDY = fg.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(chatting_model, tmp_path_factory):
    policy = fg.Policy(device_batch_size=4, num_device_batches=1)
    offload = str(tmp_path_factory.mktemp("offload"))
    with fg.LLM(str(chatting_model), policy=policy, offload_dir=offload) as llm:
        yield llm


@pytest.fixture
def run(llm, tmp_path):
    """Runs lines; gives the records."""

    def run(lines, *, name="in.jsonl", task=None):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / name).write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        task = task or Completing(llm, GREEDY, "m")
        with JobInput(tmp_path / name) as source, FileResults(tmp_path / "out") as results:
            Job(llm, task, source, results).run()
        found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
        (tmp_path / "out").unlink()
        return found

    return run


def test_lines_with_messages(llm, run):
    (output,) = llm.chat([USER], GREEDY)
    text = output.outputs[0].text
    body = {"messages": [USER], "model": "any", "max_completion_tokens": 4}
    url = {"method": "POST", "url": "/v1/chat/completions"}
    lines = [
        {"id": "a", "messages": [USER]},
        {"custom_id": "b", **url, "body": body},
        {"id": "c", "prompt": output.prompt},
        {"id": "d", "messages": [USER], "prompt": "x"},
        {"id": "e", "messages": [{"role": "user"}]},
        {"custom_id": "f", **url, "body": {**body, "tool_choice": "required"}},
        {"id": "g", "messages": [USER], "chat_template": "{{ 1 }}"},
        {"id": "h", "messages": [USER, {"role": "assistant", "content": text}]}
        | {"continue_final_message": True},
        {"id": "i", "messages": [USER], "metadata": {"row": 7}},
    ]
    plain, openai, twice, both, empty, required, template, more, carried = run(lines)
    assert plain == {
        "id": "a",
        "text": text,
        "token_ids": list(output.outputs[0].token_ids),
        "finish_reason": "length",
    }
    answer = openai["response"]["body"]
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"]["prompt_tokens"] == len(output.prompt_token_ids)
    # As a prompt the same text is begun once more by the tokenizer.
    assert twice["prompt"] == output.prompt
    assert "'prompt' and 'messages' are both given" in both["error"]["message"]
    assert "needs content" in empty["error"]["message"]
    assert "tool_choice='required' is not supported" in required["error"]["message"]
    assert "'chat_template'" in template["error"]["message"]
    longer = llm.chat([USER], fg.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    assert text + more["text"] == longer[0].outputs[0].text
    assert carried["metadata"] == {"row": 7}


def test_prompts_are_what_a_user_says(llm, run):
    (output,) = llm.chat([USER], GREEDY)
    task = Completing(llm, GREEDY, "m", Chatting(prompts=True))
    lines = [
        {"id": "a", "prompt": USER["content"]},
        {"id": "b", "prompt_token_ids": [5]},
        {"id": "c", "messages": [USER]},
        {"custom_id": "d", "url": "/v1/completions", "body": {"prompt": USER["content"]}},
    ]
    said, ids, messages, openai = run(lines, task=task)
    assert said["prompt"] == USER["content"]
    assert said["text"] == messages["text"] == output.outputs[0].text
    assert "with --chat a prompt must be a text" in ids["error"]["message"]
    # OpenAI's endpoint for completions completes.
    assert openai["response"]["body"]["usage"]["prompt_tokens"] < len(output.prompt_token_ids)
    (text,) = run([USER["content"]], name="in.txt", task=task)
    assert text["text"] == said["text"]


def kept(job):
    """What the journal has of it."""
    return json.loads(json.dumps(job._header))


def test_dates_are_those_of_the_jobs_beginning(llm, tmp_path):
    """A job that goes on the next day asks what it asked before."""
    template = "{{ strftime_now('%Y') }} {{ messages[0].content }}"
    task = Completing(llm, GREEDY, "m", Chatting(template=template))
    (tmp_path / "in").write_text(json.dumps({"messages": [USER]}) + "\n")
    with JobInput(tmp_path / "in") as source, FileResults(tmp_path / "out") as results:
        results.begin(kept(Job(llm, task, source, results)) | {"begun": 10**9})
        asked = Job(llm, task.at(2 * 10**9), source, results)._task
        assert asked.begun == 10**9
        line = next(source.lines())
    from flexgen_jax.jobs.dialects import parse_line

    assert asked.request(0, parse_line(line.raw, 1)).prompt == "2001 What comes in?"


def test_another_template_is_another_job(llm, tmp_path):
    (tmp_path / "in").write_text(json.dumps({"messages": [USER]}) + "\n")
    one, other = (Completing(llm, GREEDY, "m", Chatting(template=f"{{{{ {i} }}}}")) for i in (1, 2))
    with JobInput(tmp_path / "in") as source, FileResults(tmp_path / "out") as results:
        results.begin(kept(Job(llm, one, source, results)))
        Job(llm, one, source, results)
        with pytest.raises(JobError, match="chat template was"):
            Job(llm, other, source, results)


def test_on_the_command_line(llm, tmp_path):
    (tmp_path / "in.txt").write_text(USER["content"] + "\n")
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    arguments = ["generate", "--model", str(llm.store), "-i", str(tmp_path / "in.txt")]
    arguments += ["--device-batch-size", "4", "--num-device-batches", "1", "--chat", "--quiet"]
    arguments += ["--max-tokens", "4", "--ignore-eos", "--offload-dir", str(tmp_path)]

    def run(*options):
        arguments_of = [*arguments, "-o", str(tmp_path / f"out-{len(options)}"), *options]
        result = CliRunner().invoke(main, arguments_of, catch_exceptions=False)
        target = tmp_path / f"out-{len(options)}"
        return result, json.loads(target.read_text()) if target.exists() else None

    _, own = run()
    assert own["text"] == llm.chat([USER], GREEDY)[0].outputs[0].text
    _, mine = run("--chat-template", str(tmp_path / "mine.jinja"))
    expected = llm.chat([USER], GREEDY, chat_template="{{ messages[0].content }}!")
    assert mine["text"] == expected[0].outputs[0].text
    result, _ = run("--chat-template", str(tmp_path / "none.jinja"), "--seed", "1")
    assert (result.exit_code, "there is no chat template" in result.stderr) == (2, True)
