"""GPTQ (Frantar et al. 2022, arXiv 2210.17323), as AutoGPTQ and GPTQModel store it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flexgen_jax.weights.schemes.scheme import (
    FLOATS,
    Codes,
    Module,
    Scheme,
    Shape,
    group_counts,
    number,
    packed_integers,
    refused,
    words,
)
from flexgen_jax.weights.tensor_file import Entry

BITS = (2, 4, 8)


class GPTQ(Scheme):
    """``qweight`` packed along the inputs, ``qzeros`` along the outputs.

    The format ``gptq`` stores zeros less one, ``gptq_v2`` as they are. Which bits a matrix has is
    told by its shape: a checkpoint may mix them.
    """

    layout = "in_out"
    unused = frozenset({"g_idx"})  # where it says nothing

    def __init__(self, said: Mapping[str, Any]) -> None:
        self.bits, self.group = number(said, "bits"), number(said, "group_size", 128)
        format_ = said.get("checkpoint_format") or said.get("format") or "gptq"
        if format_ not in ("gptq", "gptq_v2"):
            raise refused(
                f"the GPTQ format {format_!r}",
                "take a checkpoint in the format gptq or gptq_v2, of which the others are made",
            )
        if self.bits not in BITS:
            raise refused(f"{self.bits} bits", "take a checkpoint of 2, 4 or 8 bits, or a GGUF")
        if said.get("pack_dtype", "int32") != "int32":
            raise refused(f"words of {said['pack_dtype']}", "take a checkpoint in int32")
        self.zeros_less_one = format_ == "gptq"
        self.ordered = bool(said.get("desc_act", False))
        self.name = f"GPTQ {self.bits} bits"
        self.skipped = () if said.get("lm_head") else ("lm_head",)

    def holds(self, tensors: Mapping[str, Entry]) -> bool:
        return "qweight" in tensors

    def codes(self, module: Module) -> Codes:
        n_in, n_out = module.n_in, module.n_out
        module.check("qweight", [(words(n_in, b), n_out) for b in BITS], ["int32"])
        rows = module.tensors["qweight"].shape[0]
        bits = next(b for b in BITS if words(n_in, b) == rows)
        if n_in % (32 // bits) or n_out % (32 // bits):
            raise module.wrong(f"of {n_in} x {n_out} does not fill whole words")
        scales = module.tensors.get("scales")
        groups = scales.shape[0] if scales and len(scales.shape) == 2 else 1
        module.check("scales", [(groups, n_out)], FLOATS)
        module.check("qzeros", [(groups, words(n_out, bits))], ["int32"])
        if not 1 <= groups <= n_in:
            raise module.wrong(f"has {groups} groups of {n_in} inputs")
        fields = ["qweight", "scales", "qzeros"]
        plain = np.arange(n_in) // -(-n_in // groups)
        if "g_idx" in module.tensors:
            module.check("g_idx", [(n_in,)], ["int32"])
            index = module.read("g_idx")
            if index.min() < 0 or index.max() >= groups:
                raise module.wrong(f"has inputs in groups beyond the {groups} that there are")
            if not np.array_equal(index, plain):
                fields.append("g_idx")
        elif int(plain[-1]) != groups - 1:
            raise module.wrong(f"has {groups} groups of {n_in} inputs, and no g_idx")

        make = packed_integers(
            module,
            kind="gptq",
            bits=bits,
            words="qweight",
            scales="scales",
            zeros="qzeros",
            groups="g_idx",
            zeros_less_one=self.zeros_less_one,
        )

        return Codes(tuple(fields), make)

    def planned(self, n_in: int, n_out: int) -> dict[str, tuple[Shape, str]]:
        groups = group_counts(n_in, self.group)
        uneven = self.group > 0 and n_in % self.group
        index: dict[str, tuple[Shape, str]] = {}
        if self.ordered or uneven:
            index["g_idx"] = (n_in,), "int32"
        return {
            "qweight": ((words(n_in, self.bits), n_out), "int32"),
            "scales": ((groups, n_out), "float16"),
            "qzeros": ((groups, words(n_out, self.bits)), "int32"),
            **index,
        }


def read(said: Mapping[str, Any]) -> Scheme:
    """The scheme of a ``quantization_config``."""
    return GPTQ(said)
