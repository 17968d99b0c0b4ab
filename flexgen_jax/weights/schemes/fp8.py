"""FP8 (e4m3) as Qwen, DeepSeek and vLLM publish it: blocks, or one scale of all or of each output.

The scales multiply, whatever ``weight_scale_inv`` sounds like. Activations are not quantised here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_jax.weights.schemes.scaled import ACTIVATIONS, FP8, scaled_codes, scales_shape
from flexgen_jax.weights.schemes.scheme import Codes, Module, Scheme, Shape, names, refused
from flexgen_jax.weights.tensor_file import Entry, SourceError


class Float8(Scheme):
    """``weight`` in float8_e4m3fn with ``weight_scale_inv`` or ``weight_scale``."""

    unused = ACTIVATIONS

    def __init__(self, said: Mapping[str, Any]) -> None:
        if said.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise refused(f"FP8 of the kind {said['fmt']!r}", "take a checkpoint in e4m3")
        block = said.get("weight_block_size")
        if block is not None and not (
            isinstance(block, (list, tuple))
            and len(block) == 2
            and all(type(n) is int and n > 0 for n in block)
        ):
            raise SourceError(
                f"quantization_config: weight_block_size must be two lengths, got {block!r}"
            )
        self.block = None if block is None else (block[0], block[1])
        self.name = "FP8"
        self.skipped = (
            "lm_head",
            *names(said, "modules_to_not_convert", "ignored_layers", "ignore"),
        )

    def holds(self, tensors: Mapping[str, Entry]) -> bool:
        return "weight" in tensors and tensors["weight"].dtype.name == FP8

    def codes(self, module: Module) -> Codes:
        scale = "weight_scale_inv" if "weight_scale_inv" in module.tensors else "weight_scale"
        if self.block is not None:
            scale = "weight_scale_inv"
        return scaled_codes(module, scale, self.block)

    def planned(self, n_in: int, n_out: int) -> dict[str, tuple[Shape, str]]:
        found: dict[str, tuple[Shape, str]] = {"weight": ((n_out, n_in), FP8)}
        if self.block is None:
            return {**found, "weight_scale": ((1,), "float32")}
        return {**found, "weight_scale_inv": (scales_shape(n_in, n_out, self.block), "float32")}


def read(said: Mapping[str, Any]) -> Scheme:
    """The scheme of a ``quantization_config``."""
    return Float8(said)
