"""Experts go back to what transformers load: each its own tensor, or a part of one for all."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import flexgen_jax as fg
from flexgen_jax.models.registry import load_config
from tests.test_families import SPARSE

GOLDENS = Path(__file__).parent.parent / "goldens" / "families"


def tensors(directory):
    """In float32, which has all values of bfloat16."""
    files = directory.glob("*.safetensors")
    found = {k: v for file in files for k, v in load_file(file).items()}
    return {key: tensor.astype(np.float32) for key, tensor in found.items()}


def equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)


@pytest.mark.parametrize("variant", SPARSE)
def test_there_and_back(variant, tmp_path):
    """From the checkpoint where it lies, and from a store, in shards."""
    model, expected = GOLDENS / variant, tensors(GOLDENS / variant)
    equal(tensors(fg.export(model, tmp_path / "straight", offload_dir=tmp_path)), expected)
    store = fg.convert(model, tmp_path / "store", dtype="float32")
    back = fg.export(store, tmp_path / "back", max_shard_nbytes=20_000)
    assert len(list(back.glob("*.safetensors"))) > 3
    equal(tensors(back), expected)
    assert load_config(back) == load_config(model)
    again = fg.load_params(back, offload_dir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, fg.load_params(store))
