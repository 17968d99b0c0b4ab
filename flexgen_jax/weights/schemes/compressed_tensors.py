"""The formats of the package compressed-tensors (LLM Compressor): integers and FP8.

``pack-quantized`` (W4A16, W8A16), ``int-quantized``, ``float-quantized`` and
``naive-quantized``. What a matrix is, is told by its tensors: a checkpoint may mix formats.
Activations are not quantised here, whatever the config says of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_jax.weights.schemes.scaled import ACTIVATIONS, FP8, scaled_codes, scales_shape
from flexgen_jax.weights.schemes.scheme import (
    FLOATS,
    Codes,
    Module,
    Scheme,
    Shape,
    names,
    packed_integers,
    refused,
    words,
)
from flexgen_jax.weights.tensor_file import Entry, SourceError

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
BITS = (2, 4, 8)


class CompressedTensors(Scheme):
    """See the module."""

    unused = ACTIVATIONS | {"weight_shape", "weight_g_idx"}

    def __init__(self, said: Mapping[str, Any]) -> None:
        groups = said.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise SourceError("quantization_config: there are no config_groups")
        self.skipped = names(said, "ignore")
        formats = [said.get("format"), *(g.get("format") for g in groups.values())]
        for found in formats:
            if found not in (None, "mixed-precision", *FORMATS):
                raise refused(
                    f"the format {found!r} of compressed-tensors",
                    f"take a checkpoint in one of {', '.join(FORMATS[:3])}",
                )
        for label in ("sparsity_config", "transform_config"):
            part = said.get(label)
            if part and (not isinstance(part, Mapping) or part.get("format", "") != "dense"):
                raise refused(
                    f"a {label}", "take a checkpoint that is quantised and nothing beside"
                )
        first = next(iter(groups.values())).get("weights")
        if not isinstance(first, Mapping):
            raise SourceError("quantization_config: the weights of a group are not described")
        self.weights = first
        self.bits = first.get("num_bits", 8)
        if self.bits not in BITS:
            raise refused(f"{self.bits} bits", "take a checkpoint of 2, 4 or 8 bits, or a GGUF")
        kind = "FP8" if first.get("type") == "float" else f"W{self.bits}A16"
        self.name = f"compressed-tensors {kind}"
        self.packed = formats[0] == "pack-quantized" or "pack-quantized" in formats

    def _size(self, key: str) -> Any:
        return self.weights.get(key)

    @property
    def group(self) -> int | None:
        """Inputs that share a scale."""
        size = self._size("group_size")
        grouped = self._size("strategy") == "group" and isinstance(size, int) and size > 0
        return size if grouped else None

    @property
    def block(self) -> tuple[int, int] | None:
        """Outputs and inputs that do."""
        size = self._size("block_structure")
        if self._size("strategy") != "block":
            return None
        if isinstance(size, str):  # "128x128", as earlier versions have it
            size = [int(n) for n in size.split("x")] if size.replace("x", "").isdigit() else None
        if not isinstance(size, (list, tuple)) or len(size) != 2:
            raise SourceError(f"quantization_config: block_structure {size!r} is not two lengths")
        return int(size[0]), int(size[1])

    def holds(self, tensors: Mapping[str, Entry]) -> bool:
        if "weight_packed" in tensors:
            return True
        return "weight" in tensors and tensors["weight"].dtype.name in (FP8, "int8")

    def codes(self, module: Module) -> Codes:
        if "weight_packed" in module.tensors:
            return self._packed_codes(module)
        return scaled_codes(
            module, "weight_scale", self.block, zero="weight_zero_point", group=self.group
        )

    def _packed_codes(self, module: Module) -> Codes:
        n_in, n_out = module.n_in, module.n_out
        module.check("weight_packed", [(n_out, words(n_in, b)) for b in BITS], ["int32"])
        columns = module.tensors["weight_packed"].shape[1]
        bits = next(b for b in BITS if words(n_in, b) == columns)
        scales = module.tensors.get("weight_scale")
        groups = scales.shape[1] if scales and len(scales.shape) == 2 else 1
        if not 1 <= groups <= n_in or n_in % groups:
            raise module.wrong(f"has {groups} groups of {n_in} inputs")
        module.check("weight_scale", [(n_out, groups)], FLOATS)
        fields = ["weight_packed", "weight_scale"]
        zero = "weight_zero_point"
        if zero in module.tensors:
            if module.tensors[zero].dtype.name == "int32":
                module.check(zero, [(words(n_out, bits), groups)], ["int32"])
            else:
                module.check(zero, [(n_out, groups)], ["int8"])
            fields.append(zero)
        index = "weight_g_idx"
        if index in module.tensors:
            module.check(index, [(n_in,)], ["int32"])
            found = module.read(index)
            if found.min() >= 0:  # -1: not used
                if found.max() >= groups:
                    raise module.wrong(f"has inputs in groups beyond the {groups} that there are")
                fields.append(index)

        make = packed_integers(
            module,
            kind="compressed-tensors",
            bits=bits,
            words="weight_packed",
            scales="weight_scale",
            zeros=zero,
            groups=index,
        )

        return Codes(tuple(fields), make)

    def planned(self, n_in: int, n_out: int) -> dict[str, tuple[Shape, str]]:
        block = self.block or (1, self.group or n_in)
        if self._size("strategy") == "tensor":
            scales: Shape = (1,)
        else:
            scales = scales_shape(n_in, n_out, block)
        found: dict[str, tuple[Shape, str]] = {"weight_scale": (scales, "bfloat16")}
        asymmetric = self._size("symmetric") is False
        if self.packed:
            if asymmetric:
                found["weight_zero_point"] = (words(n_out, self.bits), *scales[1:]), "int32"
            if self._size("actorder") == "group":
                found["weight_g_idx"] = (n_in,), "int32"
            return {"weight_packed": ((n_out, words(n_in, self.bits)), "int32"), **found}
        if asymmetric:
            found["weight_zero_point"] = scales, "int8"
        kind = FP8 if self._size("type") == "float" else "int8"
        return {"weight": ((n_out, n_in), kind), **found}


def read(said: Mapping[str, Any]) -> Scheme:
    """The scheme of a ``quantization_config``."""
    return CompressedTensors(said)
