"""The Python API: one model, prompts with parameters of their own, and what the run did.

    python examples/generate.py [MODEL]

MODEL is a weight store, a Hugging Face directory or a hub name; without one, the bundled model.
"""

import sys
from importlib import resources

import flexgen_jax as fg


def main(model):
    policy = fg.Policy(
        device_batch_size=4, num_device_batches=2, weights=fg.Split(device=20, host=30, disk=50)
    )
    prompts = ["ROMEO:\n", "What, no more ", {"prompt_token_ids": [2, 50, 60]}]
    params = [
        fg.SamplingParams(temperature=0.0, max_tokens=24),
        fg.SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=24),
        fg.SamplingParams(temperature=0.0, max_tokens=4, logprobs=2),
    ]
    with fg.LLM(model, policy=policy, say=print) as llm:
        print(llm.placement.describe("weights"))
        for output in llm.generate(prompts, params):
            completion = output.outputs[0]
            print(f"{output.prompt!r} -> {completion.text!r} ({completion.finish_reason})")
            for entry in completion.logprobs or ():
                print("   ", {p.decoded_token: round(p.logprob, 2) for p in entry.values()})
        report = llm.report
        print(f"{report.tokens_per_second:.1f} tokens/s, {report.padding:.0%} padding")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with resources.as_file(resources.files("flexgen_jax") / "demo_model") as bundled:
            main(str(bundled))
