"""MXFP4, in which gpt-oss publishes its experts: FP4 with a power of two for each 32 neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexgen_jax.models.family import Source
from flexgen_jax.weights.schemes.scheme import Codes, Module, Scheme, Shape, names
from flexgen_jax.weights.tensor_file import Entry

if TYPE_CHECKING:
    from flexgen_jax.models.published_codes import Mxfp4

_GROUP = 32


class MXFP4(Scheme):
    """``NAME_blocks`` and ``NAME_scales`` of all experts of a layer, (n_out, n_in) of each.

    In floats ``NAME`` lies the other way round.
    """

    name = "MXFP4"
    joint = "_"

    def __init__(self, said: Mapping[str, Any]) -> None:
        self.skipped = names(said, "modules_to_not_convert")

    def lies(self, source: Source) -> tuple[str, bool] | None:
        if source.expert is None or source.key.endswith("_bias"):
            return None
        return source.key, not source.transposed

    def holds(self, tensors: Mapping[str, Entry]) -> bool:
        return "blocks" in tensors and "scales" in tensors

    def codes(self, module: Module) -> Codes:
        if module.n_in % _GROUP:
            raise module.wrong(f"has {module.n_in} inputs, not a multiple of {_GROUP}")
        for tensor, (shape, dtype) in self.planned(module.n_in, module.n_out).items():
            module.check(tensor, [(module.experts or 0, *shape)], [dtype])
        every = 0, module.n_out

        def make(arrays: Mapping[str, Any], *, rows: tuple[int, int], swapped: bool) -> Mxfp4:
            from flexgen_jax.models.published_codes import Mxfp4

            assert not swapped
            leaf = Mxfp4(arrays["blocks"], arrays["scales"])
            return leaf if rows == every else leaf[slice(*rows)]

        return Codes(("blocks", "scales"), make)

    def planned(self, n_in: int, n_out: int) -> dict[str, tuple[Shape, str]]:
        groups = -(-n_in // _GROUP)
        return {
            "blocks": ((n_out, groups, _GROUP // 2), "uint8"),
            "scales": ((n_out, groups), "uint8"),
        }


def read(said: Mapping[str, Any]) -> Scheme:
    """The scheme of a ``quantization_config``."""
    return MXFP4(said)
