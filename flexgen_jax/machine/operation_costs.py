"""What operations of a run cost beside their work: threads, dispatch, the host's part of a step.

Measured where it arises: the engine runs a model whose layers have next to nothing to compute, once
with its weights in place and once with all of them on disk.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple, cast

from flexgen_jax.distributed.backends import local_devices
from flexgen_jax.engine.local_runner import LocalRunner
from flexgen_jax.engine.runner import Finished
from flexgen_jax.models.family import Config
from flexgen_jax.models.registry import MEASURED_WITH, preset
from flexgen_jax.planning.auto import Model, Uniform
from flexgen_jax.planning.planner import Planner
from flexgen_jax.weights.checkpoint import convert_dummy, open_model
from scheduling.hardware import Hardware
from scheduling.policy import Policy, Split
from scheduling.schedules import zigzag
from scheduling.timeline import Timeline

_ROWS, _BATCHES, _LAYERS = 16, 4, 4
_PROMPT, _LEFT_OUT = 16, 2  # steps that make the rings, and fill the queues


@functools.cache
def _config() -> Config:
    """The layers of profile's own measure of the overhead: one call of each is as little work."""
    sizes = {"vocab_size": 256, "hidden_size": 128, "ffn_dim": 64, "num_attention_heads": 2}
    sizes["word_embed_proj_dim"] = sizes["hidden_size"]
    sizes |= {"num_hidden_layers": _LAYERS, "max_position_embeddings": 64}
    return dataclasses.replace(cast(Any, preset(MEASURED_WITH)), **sizes)


class OperationCosts(NamedTuple):
    """Seconds, as ``Hardware`` has them; on top of an ``overhead`` that is known."""

    compute_overhead: float
    load_overhead: float
    step_overhead: float


class _Spans(NamedTuple):
    """Seconds of a computation, on average: of layers, and of a batch's first and last unit."""

    layer: float
    ends: float


def operation_costs(
    directory: Path, dtype: str, overhead: float, *, steps: int, repeats: int
) -> OperationCosts:
    """Measures them.

    Args:
        directory: On the disk from which weights are loaded.
        overhead: Seconds that a call takes where it is alone.
        steps: Of a run, at most 40.
        repeats: Runs, after one that compiles; their median counts.

    Raises:
        OSError: the directory cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-profile-", dir=directory) as scratch:
        store = convert_dummy(_config(), Path(scratch) / "store", dtype=dtype)
        found = {
            where: _measured(store, Path(scratch), split, steps, repeats)
            for where, split in (("here", Split()), ("disk", Split(device=0, disk=100)))
        }
    here = found["here"]
    return OperationCosts(
        compute_overhead=max(0.0, here.layer - overhead),
        load_overhead=max(0.0, found["disk"].layer - here.layer),
        step_overhead=max(0.0, here.ends - 2 * max(here.layer, overhead)),
    )


def _measured(store: Path, scratch: Path, weights: Split, steps: int, repeats: int) -> _Spans:
    policy = Policy(device_batch_size=_ROWS, num_device_batches=_BATCHES, weights=weights)
    runner = LocalRunner(local_devices()[:1], seed=0, scratch=scratch)
    try:
        opened = open_model(store)
        runner.open(opened, None)
        runner.place(policy)
        known = Model(opened.config, opened.dtype, opened.format)
        # A run needs no figures of a machine: only predictions are made from them.
        planner = Planner(known, policy, "zigzag", zigzag, Hardware.preset("laptop"))
        spans = [_spans(_run(runner, planner, steps)) for _ in range(1 + repeats)][1:]
    finally:
        runner.close()
    return _Spans(*(statistics.median(each) for each in zip(*spans, strict=True)))


def _run(runner: LocalRunner, planner: Planner, steps: int) -> Timeline:
    done: list[Finished] = []
    blocks = planner.blocks(Uniform(_PROMPT, steps).requests(planner.policy.block_size))
    runner.run(planner, blocks, lambda _, finished: done.append(finished))
    timeline = done[-1].timeline
    assert timeline is not None
    return timeline


def _spans(timeline: Timeline) -> _Spans:
    """On average: where threads wait for one another a few computations take ten times as long."""
    found: defaultdict[int, list[float]] = defaultdict(list)
    for span in timeline.spans:
        if span.op == "Compute" and span.step is not None and span.step >= _LEFT_OUT:
            assert span.layer is not None
            found[span.layer].append(span.seconds)
    means = {layer: statistics.fmean(each) for layer, each in found.items()}
    first, last = min(means), max(means)
    inner = [mean for layer, mean in means.items() if first < layer < last]
    return _Spans(statistics.fmean(inner), means[first] + means[last])
