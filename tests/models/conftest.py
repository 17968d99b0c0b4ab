"""What the model's tests share: the goldens, and a reader of Hugging Face weights of its own.

The reader is on purpose not the package's: it checks opt.py without trusting the conversion.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flexgen_jax.models import opt
from flexgen_jax.models.opt import OPTConfig
from flexgen_jax.models.params import nest, param_shapes

GOLDENS = Path(__file__).parents[1] / "goldens"
VARIANTS = tuple(json.loads((GOLDENS / "expected.json").read_text(encoding="utf-8"))["variants"])

# Compiled once per config and shape for the whole session: compiling is what these tests cost.
prefill = jax.jit(opt.prefill, static_argnames=("config", "cache_len"))
decode = jax.jit(opt.decode, static_argnames=("config",), donate_argnames=("caches",))
forward = jax.jit(opt.forward, static_argnames=("config",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Golden:
    """A tiny OPT, and transformers' answers to the prompts, each run alone."""

    config: OPTConfig
    params: opt.Params
    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: np.ndarray  # (prompt, vocab): after the last prompt token


def load_hugging_face(directory: Path) -> tuple[OPTConfig, opt.Params]:
    """Reads a single-file model in float32; every tensor must be known and used."""
    config = OPTConfig.load(directory)
    tensors = load_file(directory / "model.safetensors")
    modules = {
        "attention_norm": "self_attn_layer_norm",
        "mlp_norm": "final_layer_norm",
        **{n: f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")},
    }
    flat = {}
    for name, shape in param_shapes(config).items():
        unit, *rest = name.split(".")
        leaf = {"scale": "weight", "kernel": "weight"}.get(rest[-1], rest[-1])
        if unit.startswith("layer_"):
            key = f"model.decoder.layers.{unit[6:]}.{modules.get(rest[0], rest[0])}.{leaf}"
        else:
            key = {
                "embed.tokens": "model.decoder.embed_tokens.weight",
                "embed.positions": "model.decoder.embed_positions.weight",
                "embed.project_in.kernel": "model.decoder.project_in.weight",
                "head.project_out.kernel": "model.decoder.project_out.weight",
                "head.norm.scale": "model.decoder.final_layer_norm.weight",
                "head.norm.bias": "model.decoder.final_layer_norm.bias",
                "head.tokens": "lm_head.weight",
            }[name]
        tensor = tensors.pop(key).astype(np.float32)
        flat[name] = jnp.asarray(tensor.T if name.endswith(".kernel") else tensor)
        assert flat[name].shape == shape, name
    assert not tensors, f"unknown tensors: {[*tensors]}"
    return config, nest(flat)


def left_pad(
    rows: Sequence[Sequence[int]], length: int | None = None, fill: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """``(tokens, padding)`` of ``rows`` moved to the right of ``length`` columns."""
    length = max(map(len, rows)) if length is None else length
    tokens = np.full((len(rows), length), fill, np.int32)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
    return tokens, np.asarray([length - len(row) for row in rows], np.int32)


def greedy(
    params: opt.Params,
    config: OPTConfig,
    tokens: np.ndarray,
    padding: np.ndarray,
    *,
    new_tokens: int,
    cache_len: int,
) -> tuple[list[list[int]], np.ndarray]:
    """The most likely continuation of each row, and the logits after the prompts."""
    logits, caches = prefill(params, tokens, config, cache_len=cache_len, padding=padding)
    first = np.asarray(logits)
    chosen = [first.argmax(-1).astype(np.int32)]
    for position in range(tokens.shape[1], tokens.shape[1] + new_tokens - 1):
        logits, caches = decode(
            params, chosen[-1], caches, np.int32(position), config, padding=padding
        )
        chosen.append(np.asarray(logits).argmax(-1).astype(np.int32))
    return np.stack(chosen, axis=1).tolist(), first


@functools.cache
def _golden(variant: str) -> Golden:
    expected = json.loads((GOLDENS / "expected.json").read_text(encoding="utf-8"))
    config, params = load_hugging_face(GOLDENS / variant)
    with np.load(GOLDENS / "logits.npz") as logits:
        return Golden(
            config=config,
            params=params,
            prompts=expected["prompts"],
            tokens=expected["variants"][variant]["tokens"],
            logits=logits[variant],
        )


@pytest.fixture(params=VARIANTS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return _golden(request.param)


@pytest.fixture
def pre_norm() -> Golden:
    return _golden("pre_norm")


@pytest.fixture
def smooth() -> Golden:
    """A variant without kinks: GELU instead of ReLU; with biases, affine norms and projections."""
    return _golden("untied_projected")


@pytest.fixture
def tools() -> Any:
    """The functions above; a conftest cannot be imported by name."""

    @dataclasses.dataclass(frozen=True)
    class Tools:
        load_hugging_face: Callable[..., Any] = staticmethod(load_hugging_face)
        left_pad: Callable[..., Any] = staticmethod(left_pad)
        greedy: Callable[..., Any] = staticmethod(greedy)
        prefill: Callable[..., Any] = staticmethod(prefill)
        decode: Callable[..., Any] = staticmethod(decode)
        forward: Callable[..., Any] = staticmethod(forward)

    return Tools()
