"""Codes of 4 bits whose scales and zeros are chosen by the error that they leave.

Minimum and maximum are the best ends of a range only if nothing may be cut off. Here the ends are
drawn in by several amounts; from each, the codes and the line through them are fitted to each other
in turns (alternating least squares), and the best of all is kept: never worse than min-max.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexgen_jax.models.quantization import GROUP, Quantized, in_groups, quantize

# Shares of the range that are cut off at first, half at each end; and fits that follow.
_DRAWN_IN = (-0.02, 0.04, 0.1, 0.16, 0.24)
_FITS = 3
_LEVELS = 15
_TINY = 2.0**-126

Line = tuple[Array, Array]  # scale and zero, in bfloat16
Best = tuple[Array, Array, Array]  # error, scale and zero


def quantize_fitted(x: Float[Array, "*dims size"], *, group: int = GROUP) -> Quantized:
    """``x`` in codes of 4 bits, with less squared error than :func:`quantize` leaves.

    What is extraordinary is as there: infinities saturate, a NaN makes its group NaN.
    """
    plain = quantize(x, bits=4, group=group)
    groups = in_groups(x, group)
    mean = groups.mean(axis=-1)
    low, high = groups.min(axis=-1), groups.max(axis=-1)

    def codes_of(line: Line) -> Array:
        scale, zero = (field.astype(jnp.float32)[..., None] for field in line)
        return jnp.clip(jnp.round((groups - zero) / scale), 0, _LEVELS)

    def error_and_next(line: Line) -> tuple[Array, Line]:
        """What ``line`` leaves, and the line that fits its codes best."""
        codes = codes_of(line)
        scale, zero = (field.astype(jnp.float32) for field in line)
        left = groups - (zero[..., None] + codes * scale[..., None])
        middle = codes.mean(axis=-1)
        spread = (codes * codes).mean(axis=-1) - middle * middle
        together = (codes * groups).mean(axis=-1) - middle * mean
        fitted = together / jnp.maximum(spread, 1e-6)
        scale = jnp.where((together > 0) & (spread > 1e-6), fitted, scale)
        scale = jnp.maximum(scale, _TINY).astype(jnp.bfloat16)
        zero = (mean - middle * scale.astype(jnp.float32)).astype(jnp.bfloat16)
        return (left * left).sum(axis=-1), (scale, zero)

    def better(best: Best, line: Line, error: Array) -> Best:
        take = error < best[0]
        scale, zero = (jnp.where(take, n, b) for n, b in zip(line, best[1:], strict=True))
        return jnp.where(take, error, best[0]), scale, zero

    def from_start(best: Best, share: Array) -> tuple[Best, None]:
        width = high - low
        scale = jnp.maximum(width * (1 - share) / _LEVELS, _TINY).astype(jnp.bfloat16)
        zero = (low + width * share / 2).astype(jnp.bfloat16)

        def fit(_: int, state: tuple[Best, Line]) -> tuple[Best, Line]:
            best, line = state
            error, following = error_and_next(line)
            return better(best, line, error), following

        best, line = jax.lax.fori_loop(0, _FITS, fit, (best, (scale, zero)))
        error, _ = error_and_next(line)
        return better(best, line, error), None

    scale, zero = jnp.split(plain.affine, 2, axis=-1)
    error, _ = error_and_next((scale, zero))
    best = (error, scale, zero)
    (_, scale, zero), _ = jax.lax.scan(from_start, best, jnp.array(_DRAWN_IN, jnp.float32))
    codes = codes_of((scale, zero)).astype(jnp.uint8)
    return Quantized.packed(codes, scale, zero, 4, x.shape[-1])
