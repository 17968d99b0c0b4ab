"""Matrices of small floats or integers with scales beside them: what FP8 and int8 share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexgen_jax.weights.schemes.scheme import FLOATS, Codes, Module, Shape

if TYPE_CHECKING:
    from flexgen_jax.models.published_codes import ScaledValues

FP8 = "float8_e4m3fn"
# Scales of activations and of the cache, which stay in full precision here.
ACTIVATIONS = frozenset(
    {"input_scale", "input_scale_ub", "input_zero_point", "output_scale", "input_global_scale"}
)


def scales_shape(n_in: int, n_out: int, block: tuple[int, int]) -> Shape:
    """Of a scale for each block."""
    return -(-n_out // block[0]), -(-n_in // block[1])


def scaled_codes(
    module: Module,
    scale: str,
    block: tuple[int, int] | None,
    *,
    zero: str | None = None,
    group: int | None = None,
    divisor: float = 1.0,
) -> Codes:
    """How ``module`` lies, whose ``weight`` (n_out, n_in) is float8_e4m3fn or int8.

    Args:
        scale: The tensor of scales. ``zero``: that of zeros, if it is there.
        block: Outputs and inputs that share a scale; None: told by how many scales there are, of
            all, of each output, or of groups of ``group`` inputs.
        divisor: Of the scales.
    """
    n_in, n_out = module.n_in, module.n_out
    module.check("weight", [(n_out, n_in)], [FP8, "int8"])
    possible: dict[Shape, tuple[int, int]] = {}
    if block is not None:
        possible[scales_shape(n_in, n_out, block)] = block
    else:
        possible |= dict.fromkeys([(n_out,), (n_out, 1)], (1, n_in))
        possible |= dict.fromkeys([(), (1,), (1, 1)], (n_out, n_in))
        if group:
            possible[scales_shape(n_in, n_out, (1, group))] = 1, group
    entry = module.check(scale, list(possible), FLOATS)
    chosen = possible[entry.shape]
    fields = ["weight", scale]
    if zero in module.tensors:
        assert zero is not None
        module.check(zero, [entry.shape], ["int8"])
        fields.append(zero)

    def make(arrays: Mapping[str, Any], *, rows: tuple[int, int], swapped: bool) -> ScaledValues:
        from flexgen_jax.models.published_codes import ScaledValues

        return ScaledValues(
            n_in=n_in,
            n_out=n_out,
            rows=rows,
            swapped=swapped,
            values=arrays["weight"],
            scales=arrays[scale],
            zeros=arrays[zero] if zero in fields else None,
            block=chosen,
            divisor=divisor,
        )

    return Codes(tuple(fields), make)
