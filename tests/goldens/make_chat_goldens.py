"""Conversations as transformers renders them: ``pip install transformers``, then run this.

    python tests/goldens/make_chat_goldens.py

Writes ``chat.json`` beside it. The templates were written for this test, each in the style of a
family's; what they use of Jinja and of transformers is what those use.
"""

from __future__ import annotations

import json
import tempfile
from datetime import datetime
from pathlib import Path

GOLDEN = Path(__file__).parent / "chat.json"
NOW = datetime(2026, 3, 9, 12, 30)

# ChatML, as SmolLM2's and Qwen's: a system message of its own where there is none.
CHATML = """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
        {{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {% endif %}
    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{ '<|im_start|>assistant\\n' }}
{% endif %}
"""

# Llama 3's: the beginning of text, dates, tools as JSON, contents stripped.
HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set user_messages = messages %}
{%- set system = "" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set user_messages = messages[1:] %}
{%- endif %}
{{- "<|head|>system<|end|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}
    {{- "Tools:\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n" }}
    {%- endfor %}
{%- endif %}
{{- system + "<|eot|>" }}
{%- for message in user_messages %}
    {%- if message.tool_calls is defined %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|head|>assistant<|end|>\\n\\n" + '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot|>" }}
    {%- else %}
        {{- "<|head|>" + message['role'] + "<|end|>\\n\\n" + message['content'] | trim }}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|head|>assistant<|end|>\\n\\n" }}
{%- endif %}
"""

# Mistral's: roles in turn or an exception, spaces that count, a loop that is left early.
IN_TURN = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant/user/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ ' [INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] + eos_token }}
{% else %}
{{ raise_exception('only user and assistant') }}
{% endif %}
{% if message['content'] == 'enough' %}{% break %}{% endif %}
{% endfor %}"""

# Gemma's: the assistant is called model, contents may be parts, a namespace across the loop.
PARTS = """\
{{ bos_token }}
{%- set ns = namespace(count=0) -%}
{%- for message in messages -%}
    {%- set ns.count = ns.count + 1 -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<turn>' + role + ' ' + (ns.count | string) + '\\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception('Invalid content type') }}
    {%- endif -%}
    {{ '<end>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<turn>model\\n' }}{%- endif -%}
"""

# SmolLM3's: thinking switched by a variable, what the assistant says marked for training.
THINKING = """\
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = "/think" if enable_thinking else "/no_think" -%}
{{- "<|im_start|>system " + mode + "\\n" -}}
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {% generation %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if message.reasoning_content is defined %}
            {{- "<think>" + message.reasoning_content + "</think>" }}
        {%- endif %}
        {{- message.content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- endgeneration %}
    {%- else -%}
        {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" + ("" if enable_thinking else "<think>\\n\\n</think>\\n") }}
{%- endif -%}
"""

# Several, by name, as Command R's.
NAMED = [
    {"name": "default", "template": "{% for m in messages %}[{{ m.content }}]{% endfor %}"},
    {"name": "tool_use", "template": "tools {{ tools | tojson }} {{ messages[-1].content }}"},
    {
        "name": "rag",
        "template": "{% for d in documents %}{{ loop.index }}. {{ d['title'] }}: {{ d['text'] }}\n"
        "{% endfor %}{{ messages | map(attribute='content') | join(' / ') }}",
    },
]

TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "in turn": IN_TURN,
    "parts": PARTS,
    "thinking": THINKING,
    "named": NAMED,
}

USER = {"role": "user", "content": "  What is <b>2 & 3</b>?\n"}
SYSTEM = {"role": "system", "content": "Be brief, naïve and 漢."}
ASSISTANT = {"role": "assistant", "content": " Five. "}
PART = {"role": "user", "content": [{"type": "text", "text": t} for t in (" one ", "two")]}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "It's <sunny> & 漢",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "tool", "content": "rain"}
THOUGHT = {"role": "assistant", "content": "\nIt is 5.", "reasoning_content": "2 + 3"}
DOCUMENT = {"title": "Sums", "text": "2 and 3 are 5"}

CASES = [
    ("chatml", {"messages": [USER], "add_generation_prompt": True}),
    ("chatml", {"messages": [SYSTEM, USER, ASSISTANT, USER], "add_generation_prompt": True}),
    ("chatml", {"messages": [USER, ASSISTANT]}),
    ("chatml", {"messages": [USER, ASSISTANT], "continue_final_message": True}),
    ("headers", {"messages": [USER], "add_generation_prompt": True}),
    ("headers", {"messages": [SYSTEM, USER], "date_string": "1 Jan 2000"}),
    ("headers", {"messages": [USER, CALLING, ANSWER], "tools": [TOOL]}),
    ("headers", {"messages": [USER, ASSISTANT], "continue_final_message": True}),
    ("headers", {"messages": [USER, {**CALLING, "tool_calls": [CALL, CALL]}]}),
    ("in turn", {"messages": [USER, ASSISTANT, USER]}),
    ("in turn", {"messages": [{**USER, "content": "enough"}, ASSISTANT]}),
    ("in turn", {"messages": [USER, USER]}),
    ("parts", {"messages": [PART, ASSISTANT, USER], "add_generation_prompt": True}),
    ("parts", {"messages": [USER, ASSISTANT], "continue_final_message": True}),
    ("thinking", {"messages": [USER, THOUGHT, USER], "add_generation_prompt": True}),
    (
        "thinking",
        {"messages": [USER], "add_generation_prompt": True, "enable_thinking": False},
    ),
    ("named", {"messages": [USER, ASSISTANT]}),
    ("named", {"messages": [USER], "tools": [TOOL]}),
    ("named", {"messages": [USER], "chat_template": "rag", "documents": [DOCUMENT]}),
    ("named", {"messages": [USER], "chat_template": "{{ bos_token }}{{ messages[0].role }}"}),
]


def write_tokenizer(directory: Path, template: object, *, as_file: bool = False) -> Path:
    """Bytes, and special tokens; like Llama's it begins every text with one.

    Args:
        as_file: The template lies in a file of its own.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    directory.mkdir(parents=True, exist_ok=True)
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|end|>", "<|eot|>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken", "special": True},
    }
    if as_file:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def by_transformers(directory: Path, arguments: dict) -> dict:
    """Text and tokens; or that it was refused."""
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return NOW

    tokenizer = AutoTokenizer.from_pretrained(directory)
    arguments = dict(arguments)
    messages = arguments.pop("messages")
    there = chat_template_utils.datetime
    chat_template_utils.datetime = Clock
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)
    except Exception as error:  # whatever a template's failing is there
        return {"error": str(error)}
    finally:
        chat_template_utils.datetime = there
    return {"text": text, "token_ids": list(ids)}


def main() -> None:
    import transformers

    made = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, arguments in CASES:
            directory = write_tokenizer(Path(scratch) / name, TEMPLATES[name])
            found = by_transformers(directory, arguments)
            made.append({"template": name, "arguments": arguments, **found})
    golden = {"transformers": transformers.__version__, "now": NOW.isoformat(), "cases": made}
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
