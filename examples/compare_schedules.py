"""Compare five schedules on paper, in one picture: no weights and no accelerator are needed.

    python examples/compare_schedules.py [PICTURE]

PICTURE is a .svg or .png file; without one, schedules.svg in the current directory. The weights of
OPT-125m lie on the disk of a laptop, and three batches are computed for three steps.
"""

import sys

import flexgen_jax as fg
from scheduling import (
    Compute,
    FreeWeights,
    LoadCache,
    LoadHidden,
    LoadWeights,
    StoreCache,
    StoreHidden,
    serialized,
    zigzag,
)
from scheduling.plot import plot


def back_and_forth(w):
    """Zig-zag, but each layer begins with the batch that was last through the layer before."""
    for step in range(w.num_steps):
        for layer in range(w.num_layers):
            yield LoadWeights(step, layer)
            there = range(w.num_batches)
            for batch in there if layer % 2 == 0 else reversed(there):
                if w.has_cache(layer) and step > 0:
                    yield LoadCache(step, layer, batch)
                yield LoadHidden(step, layer, batch)
                yield Compute(step, layer, batch)
                yield StoreHidden(step, layer, batch)
                if w.has_cache(layer) and step + 1 < w.num_steps:
                    yield StoreCache(step, layer, batch)
            yield FreeWeights(layer)


SCHEDULES = (
    "zigzag",
    back_and_forth,
    "diagonal",
    "row_by_row",
    ("without overlap", serialized(zigzag)),
)


def main(picture):
    policy = fg.Policy(
        device_batch_size=4, num_device_batches=3, weights=fg.Split(device=0, host=0, disk=100)
    )
    timelines = []
    for schedule in SCHEDULES:
        found = fg.plan(
            "facebook/opt-125m", policy, "laptop", prompt_len=128, gen_len=3, schedule=schedule
        )
        print(
            f"{found.schedule:16s} {found.seconds:6.2f} s, {found.tokens_per_second:6.2f} tokens/s"
        )
        timelines.append(found.timeline)
    plot(timelines, picture)
    print(f"{picture}: {len(timelines)} timelines")


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    main(sys.argv[1] if len(sys.argv) == 2 else "schedules.svg")
