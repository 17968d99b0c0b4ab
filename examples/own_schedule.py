"""Write a schedule, validate it, simulate it, run it, and compare it with zig-zag.

    python examples/own_schedule.py [MODEL]

MODEL is a weight store, a Hugging Face directory or a hub name; without one, the bundled model.

The schedule goes through the layers of a step back and forth over the batches: the batch that was
last through a layer is the first through the next, so its activations are still in the caches.
"""

import sys
from importlib import resources

import flexgen_jax as fg
from scheduling import (
    Compute,
    FreeWeights,
    LoadCache,
    LoadHidden,
    LoadWeights,
    StoreCache,
    StoreHidden,
)


def back_and_forth(w):
    for step in range(w.num_steps):
        for layer in range(w.num_layers):
            yield LoadWeights(step, layer)
            there = range(w.num_batches)
            for batch in there if layer % 2 == 0 else reversed(there):
                cached = w.has_cache(layer)
                if cached and step > 0:
                    yield LoadCache(step, layer, batch)
                yield LoadHidden(step, layer, batch)
                yield Compute(step, layer, batch)
                yield StoreHidden(step, layer, batch)
                if cached and step + 1 < w.num_steps:
                    yield StoreCache(step, layer, batch)
            yield FreeWeights(layer)


def main(model):
    workload = fg.Workload(num_steps=4, num_layers=6, num_batches=3)
    fg.validate(back_and_forth(workload), workload)
    policy = fg.Policy(
        device_batch_size=2, num_device_batches=3, weights=fg.Split(device=0, disk=100)
    )
    prompts = [{"prompt_token_ids": [5 + i, 7]} for i in range(6)]
    params = fg.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    tokens = {}
    for schedule in ("zigzag", back_and_forth):
        with fg.LLM(model, policy=policy, schedule=schedule) as llm:
            llm.generate(prompts, params)  # compiles: not to be measured
            outputs = llm.generate(prompts, params)
            tokens[llm.report.schedule] = [o.outputs[0].token_ids for o in outputs]
            print(f"{llm.report.schedule}: {llm.report.beside_prediction()}")
    assert tokens["zigzag"] == tokens["back_and_forth"]
    print("the same tokens")


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        with resources.as_file(resources.files("flexgen_jax") / "demo_model") as bundled:
            main(str(bundled))
