"""vLLM's offline example ``chat``: a conversation, several of them, and a template of one's own.

python examples/like_vllm/chat.py [MODEL]
"""

import sys

import flexgen_jax as fg

CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I assist you today?"},
    {"role": "user", "content": "Write an essay about the importance of higher education."},
]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def main(model="HuggingFaceTB/SmolLM2-135M-Instruct", chat_template=None):
    params = fg.SamplingParams(temperature=0.5, max_tokens=32, seed=0)
    with fg.LLM(model) as llm:
        show(llm.chat(CONVERSATION, params, chat_template=chat_template))
        several = [CONVERSATION[:2]] * 2
        show(llm.chat(several, params, chat_template=chat_template))
        show(llm.chat(CONVERSATION, params, chat_template=TEMPLATE))


def show(outputs):
    for output in outputs:
        print(f"Prompt: {output.prompt!r}\nAnswer: {output.outputs[0].text!r}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
