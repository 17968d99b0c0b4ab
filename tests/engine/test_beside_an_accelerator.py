"""Runs with the stores of an accelerator, on a CPU: the same tokens and bits.

Weights and cells of the host tier lie in pinned memory, and layers are computed on another device
than attention on the host: what an accelerator has is told apart, and arrays of two devices never
meet in one program.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import flexgen_jax as fg
from flexgen_jax.engine import cells, layer_loading
from flexgen_jax.engine.local_runner import LocalRunner
from storage.host import HostStore, PinnedSequences

GOLDENS = Path(__file__).parents[1] / "goldens"
DENSE, SPARSE = GOLDENS / "pre_norm", GOLDENS / "families" / "mixtral"
PROMPTS = json.loads((GOLDENS / "expected.json").read_text())["prompts"][:6]
HOST, DISK = fg.Split(device=0, host=100), fg.Split(device=0, disk=100)
HALF, MIXED = fg.Split(device=50, host=50), fg.Split(device=30, host=30, disk=40)


class PinnedStore(HostStore):
    """That of an accelerator."""

    def __init__(self, device):
        super().__init__(device)
        self._shared = False
        self._home = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def run(offload):
    def generate(model, params=None, *, beside=False, prompts=PROMPTS, **policy):
        """Tokens, and the logits of every step; ``beside``: as beside an accelerator."""
        found, pinned = {}, []

        def keep(step, batch, logits):
            found[batch, step] = np.asarray(logits)

        def sequences(device):
            pinned.append(PinnedSequences(device, piece=8))
            return pinned[-1]

        policy = fg.Policy(**{"device_batch_size": 3, "num_device_batches": 2, **policy})
        options = {"policy": policy, "offload_dir": str(offload), "dtype": "float32"}
        params = params or fg.SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
        with pytest.MonkeyPatch.context() as patch:
            if beside:
                patch.setattr(cells, "host_sequences", sequences)
                patch.setattr(layer_loading, "HostStore", PinnedStore)
                devices = jax.local_devices()[1 : 1 + policy.num_stages]
                options["runner"] = LocalRunner(devices, seed=0, scratch=offload)
            with fg.LLM(str(model), **options) as llm:
                outputs = llm.generate(prompts, params, on_logits=keep)
        return [list(o.outputs[0].token_ids) for o in outputs], found, pinned

    return generate


METHODS = {
    "weights": {"weights": HOST},
    "cache and hidden states": {"cache": HOST, "hidden": HOST},
    "some everywhere": {"weights": MIXED, "cache": MIXED, "hidden": MIXED},
    "one after the other": {"weights": HOST, "cache": HOST, "hidden": HOST, "overlap": False},
    "attention on the host": {"cache": HALF, "host_attention": True},
    "attention on the host, from disk": {"cache": DISK, "host_attention": True, "weights": HOST},
    "codes": {"weights": HOST, "weight_bits": 4, "cache": HOST, "cache_bits": 4},
    "codes on the host": {"cache": HALF, "cache_bits": 4, "host_attention": True},
    "a selection": {"cache": MIXED, "attention_sparsity": 0.4},
    "a selection on the host": {"cache": HALF, "attention_sparsity": 0.4, "host_attention": True},
    "stages": {"weights": HOST, "cache": HALF, "hidden": HOST, "num_stages": 2},
    "stages, attention on the host": {"cache": HALF, "host_attention": True, "num_stages": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits(method, run):
    tokens, bits, _ = run(DENSE, **METHODS[method])
    again, same, _ = run(DENSE, beside=True, **METHODS[method])
    assert again == tokens
    assert same.keys() == bits.keys()
    for key, logits in bits.items():
        np.testing.assert_array_equal(same[key], logits)


@pytest.mark.parametrize("policy", [{"experts": HOST, "cache": HOST}, {"experts": MIXED}], ids=str)
def test_experts(policy, run):
    assert run(SPARSE, beside=True, **policy)[0] == run(SPARSE, **policy)[0]


@pytest.mark.parametrize(
    "policy",
    [
        {"cache": HOST, "hidden": HOST},
        {"cache": HALF, "host_attention": True},
        {"cache": HOST, "cache_bits": 4},
        {"cache": HALF, "attention_sparsity": 0.4},
        {"cache": HOST, "attention_sparsity": 0.4, "host_attention": True},
    ],
    ids=str,
)
def test_newcomers(policy, run):
    """Rings in pinned memory, which are renewed and change their size."""
    rng = np.random.default_rng(2)
    prompts = [[int(t) for t in rng.integers(4, 60, n)] for n in rng.integers(1, 20, 24)]
    params = [
        fg.SamplingParams(temperature=0.0, max_tokens=int(n), ignore_eos=True)
        for n in rng.integers(1, 40, 24)
    ]
    about = {"params": params, "prompts": prompts}
    tokens, *_ = run(DENSE, refill=False, **about, **policy)
    assert run(DENSE, beside=True, **about, **policy)[0] == tokens


def test_pinned_memory_is_what_was_used(run):
    """Else the tests above would say nothing."""
    _, _, pinned = run(DENSE, beside=True, cache=HOST, hidden=HOST)
    assert len(pinned) == 2
    assert all(isinstance(store, PinnedSequences) for store in pinned)
