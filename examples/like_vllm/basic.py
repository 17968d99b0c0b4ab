"""vLLM's offline example ``basic``: prompts in, sampled completions out.

    python examples/like_vllm/basic.py [MODEL]

What differs is the import, and that an ``LLM`` is a context manager.
"""

import sys

import flexgen_jax as fg

PROMPTS = ["The tide comes in", "Once more unto the", "My lord, the", "What is the"]


def main(model="facebook/opt-125m"):
    params = fg.SamplingParams(temperature=0.8, top_p=0.95, max_tokens=16, seed=0)
    with fg.LLM(model) as llm:
        for output in llm.generate(PROMPTS, params):
            print(f"Prompt:  {output.prompt!r}\nOutput:  {output.outputs[0].text!r}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
