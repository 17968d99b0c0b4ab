"""What runs beside an accelerator, with whatever device JAX has; what takes long, on a GPU only."""

from __future__ import annotations

import jax
import pytest

import flexgen_jax as fg

PROMPTS = [[5, 9, 11, 4, 17], [8, 6], [30, 12, 7], [9, 9, 21, 5, 6, 7, 40]]


@pytest.fixture(scope="session")
def device():
    """That which is computed on."""
    return jax.local_devices()[0]


@pytest.fixture(scope="session")
def gpu(device):
    """Likewise, and it is a GPU."""
    if device.platform != "gpu":
        pytest.skip(f"needs a GPU, and JAX runs on a {device.platform} here: see 'make gpu'")
    return device


@pytest.fixture(scope="session")
def generate(tmp_path_factory):
    """Greedy tokens and the report of a small model under a policy.

    In full float32: GPUs multiply with fewer bits unless told otherwise, and a CPU does not.
    """
    offload = str(tmp_path_factory.mktemp("offload"))

    def run(model, *, prompts=PROMPTS, new=6, params=None, **options):
        policy = {"device_batch_size": 2, "num_device_batches": 2, **options.pop("policy", {})}
        params = params or fg.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        with (
            jax.default_matmul_precision("highest"),
            fg.LLM(
                str(model),
                policy=fg.Policy(**policy),
                offload_dir=offload,
                dtype="float32",
                **options,
            ) as llm,
        ):
            outputs = llm.generate(prompts, params)
            return [list(o.outputs[0].token_ids) for o in outputs], llm.report

    return run
