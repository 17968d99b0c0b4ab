"""What decoder layers are made of, whatever their family: products, norms, activations, heads.

Matrix products accumulate in float32; norms are computed in float32; activations keep the dtype of
what goes in. Wherever a matrix is taken, it may be :class:`Packed`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexgen_jax.models.family import ConfigError, Params
from flexgen_jax.models.packed import Packed, dense

LAYER_NORM_EPSILON = 1e-5

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}
ACTIVATIONS = tuple(_ACTIVATIONS)


def activate(name: str, x: Array) -> Array:
    """The activation that ``config.json`` calls ``name``."""
    return _ACTIVATIONS[name](x)


def check_activation(field: str, name: object, known: tuple[str, ...] = ACTIVATIONS) -> None:
    """Refuses an activation that is not there.

    Raises:
        ConfigError: lists those that are.
    """
    if name not in known:
        raise ConfigError(f"{field} must be one of {', '.join(known)}; got {name!r}")


def linear(params: Params, x: Float[Array, "*dims n_in"]) -> Float[Array, "*dims n_out"]:
    """``x @ kernel + bias``, accumulated in float32, returned in the dtype of ``x``.

    A matrix is ``kernel`` (n_in, n_out), as Flax has it, or ``weight`` (n_out, n_in), as published.
    """
    if "kernel" in params:
        y = _matmul(x, dense(params["kernel"], x.dtype))
    else:
        y = logits(params["weight"], x)
    if "bias" in params:
        y = y + params["bias"].astype(jnp.float32)
    return y.astype(x.dtype)


def _matmul(x: Array, kernel: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    # XLA's CPU backend has no fast bfloat16 kernel for one row (32 ms against 6 ms padded to two).
    lonely = rows.shape[0] == 1 and rows.dtype == jnp.bfloat16
    if lonely:
        rows = jnp.concatenate([rows, rows])
    y = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)
    return (y[:1] if lonely else y).reshape(*x.shape[:-1], kernel.shape[-1])


def logits(
    table: Float[Array, "vocab embed"] | Packed, hidden: Float[Array, "*dims embed"]
) -> Float[Array, "*dims vocab"]:
    """``hidden`` times each row of ``table``, in float32."""
    table = dense(table, hidden.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])
    lonely = rows.shape[0] == 1 and rows.dtype == jnp.bfloat16  # as in _matmul
    if lonely:
        rows = jnp.concatenate([rows, rows])
    found = jnp.einsum("rh,vh->rv", rows, table, preferred_element_type=jnp.float32)
    return (found[:1] if lonely else found).reshape(*hidden.shape[:-1], table.shape[0])


def layer_norm(
    params: Params, x: Float[Array, "*dims hidden"], epsilon: float = LAYER_NORM_EPSILON
) -> Float[Array, "*dims hidden"]:
    """Layer norm over the last axis, in float32; ``scale`` and ``bias`` where ``params`` has them.

    Args:
        epsilon: Added to the variance.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + epsilon)
    if "scale" in params:
        y = y * params["scale"].astype(jnp.float32)
    if "bias" in params:
        y = y + params["bias"].astype(jnp.float32)
    return y.astype(x.dtype)


def rms_norm(
    params: Params, x: Float[Array, "*dims hidden"], epsilon: float, offset: float = 0.0
) -> Float[Array, "*dims hidden"]:
    """Root-mean-square norm over the last axis, in float32, times ``scale + offset``."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + epsilon)
    scale = params["scale"].astype(jnp.float32)
    return (y * (scale + offset if offset else scale)).astype(x.dtype)


def split_heads(
    x: Float[Array, "batch seq width"], heads: int, head_dim: int
) -> Float[Array, "batch heads seq head_dim"]:
    """The last axis taken apart."""
    batch, seq, _ = x.shape
    return x.reshape(batch, seq, heads, head_dim).transpose(0, 2, 1, 3)


def merge_heads(
    x: Float[Array, "batch heads seq head_dim"],
) -> Float[Array, "batch seq width"]:
    """The inverse of :func:`split_heads`."""
    batch, heads, seq, head_dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, seq, heads * head_dim)


def gated_mlp(
    params: Params, x: Float[Array, "batch seq hidden"], activation: str
) -> Float[Array, "batch seq hidden"]:
    """``down(activation(gate(x)) * up(x))``."""
    gate = activate(activation, linear(params["gate"], x))
    return linear(params["down"], gate * linear(params["up"], x))
