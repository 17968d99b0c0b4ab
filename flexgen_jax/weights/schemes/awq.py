"""AWQ (Lin et al. 2023, arXiv 2306.00978), as AutoAWQ's version ``gemm`` stores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_jax.weights.schemes.scheme import (
    FLOATS,
    Codes,
    Module,
    Scheme,
    Shape,
    group_counts,
    names,
    number,
    packed_integers,
    refused,
)
from flexgen_jax.weights.tensor_file import Entry


class AWQ(Scheme):
    """``qweight`` and ``qzeros`` packed along the outputs, eight a word in AWQ's own order."""

    layout = "in_out"

    def __init__(self, said: Mapping[str, Any]) -> None:
        bits = number(said, "bits", said.get("w_bit", 4))
        self.group = number(said, "group_size", said.get("q_group_size", 128))
        version = str(said.get("version", "gemm")).lower()
        if version != "gemm":
            raise refused(
                f"AWQ's version {version!r}", "take a checkpoint in the version gemm, as most are"
            )
        if bits != 4:
            raise refused(f"AWQ of {bits} bits", "take a checkpoint of 4 bits")
        self.name = "AWQ 4 bits"
        self.skipped = ("lm_head", *names(said, "modules_to_not_convert"))

    def holds(self, tensors: Mapping[str, Entry]) -> bool:
        return "qweight" in tensors

    def codes(self, module: Module) -> Codes:
        n_in, n_out = module.n_in, module.n_out
        if n_out % 8:
            raise module.wrong(f"of {n_in} x {n_out} does not fill whole words")
        module.check("qweight", [(n_in, n_out // 8)], ["int32"])
        scales = module.tensors.get("scales")
        groups = scales.shape[0] if scales and len(scales.shape) == 2 else 1
        if not 1 <= groups <= n_in or n_in % groups:
            raise module.wrong(f"has {groups} groups of {n_in} inputs")
        module.check("scales", [(groups, n_out)], FLOATS)
        module.check("qzeros", [(groups, n_out // 8)], ["int32"])

        make = packed_integers(
            module, kind="awq", bits=4, words="qweight", scales="scales", zeros="qzeros"
        )

        return Codes(("qweight", "scales", "qzeros"), make)

    def planned(self, n_in: int, n_out: int) -> dict[str, tuple[Shape, str]]:
        groups = group_counts(n_in, self.group)
        return {
            "qweight": ((n_in, n_out // 8), "int32"),
            "scales": ((groups, n_out), "float16"),
            "qzeros": ((groups, n_out // 8), "int32"),
        }


def read(said: Mapping[str, Any]) -> Scheme:
    """The scheme of a ``quantization_config``."""
    return AWQ(said)
