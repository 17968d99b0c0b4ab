"""bitsandbytes: NF4 and FP4 (Dettmers et al. 2023, arXiv 2305.14314), and LLM.int8()."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexgen_jax.weights.schemes.scaled import scaled_codes
from flexgen_jax.weights.schemes.scheme import Codes, Module, Scheme, Shape, names
from flexgen_jax.weights.tensor_file import Entry
from storage.json_text import parse_json

if TYPE_CHECKING:
    from flexgen_jax.models.published_codes import TableCodes

_STATE = "weight.quant_state.bitsandbytes__"
_STATES = (f"{_STATE}nf4", f"{_STATE}fp4")
_BLOCK, _NESTED_BLOCK = 64, 256


class BitsAndBytes(Scheme):
    """4 bits: codes of a table and an absmax for each block; 8 bits: a scale for each output."""

    unused = frozenset({*_STATES, "weight_format"})

    def __init__(self, said: Mapping[str, Any]) -> None:
        self.four = bool(said.get("load_in_4bit", said.get("_load_in_4bit", False)))
        self.nested = bool(said.get("bnb_4bit_use_double_quant", False))
        kind = str(said.get("bnb_4bit_quant_type", "nf4")).upper()
        self.name = f"bitsandbytes {kind if self.four else '8 bits'}"
        self.skipped = ("lm_head", *names(said, "llm_int8_skip_modules"))

    def holds(self, tensors: Mapping[str, Entry]) -> bool:
        return "SCB" in tensors or any(state in tensors for state in _STATES)

    def codes(self, module: Module) -> Codes:
        if "SCB" in module.tensors:
            return scaled_codes(module, "SCB", None, divisor=127.0)
        n_in, n_out = module.n_in, module.n_out
        count = n_in * n_out
        state = self._state(module)
        block = state["blocksize"]
        blocks = -(-count // block)
        module.check("weight", [(-(-count // 2), 1), (1, -(-count // 2))], ["uint8"])
        module.check("weight.quant_map", [(16,)], ["float32"])
        nested = "weight.nested_absmax" in module.tensors
        module.check("weight.absmax", [(blocks,)], ["uint8" if nested else "float32"])
        fields = ["weight", "weight.quant_map", "weight.absmax"]
        inner = state["nested_blocksize"]
        if nested:
            module.check("weight.nested_absmax", [(-(-blocks // inner),)], ["float32"])
            module.check("weight.nested_quant_map", [(256,)], ["float32"])
            fields += ["weight.nested_absmax", "weight.nested_quant_map"]
        offset = float(state["nested_offset"])

        def make(arrays: Mapping[str, Any], *, rows: tuple[int, int], swapped: bool) -> TableCodes:
            from flexgen_jax.models.published_codes import TableCodes

            return TableCodes(
                n_in=n_in,
                n_out=n_out,
                rows=rows,
                swapped=swapped,
                codes=arrays["weight"],
                table=arrays["weight.quant_map"],
                absmax=arrays["weight.absmax"],
                nested=(arrays["weight.nested_absmax"], arrays["weight.nested_quant_map"])
                if nested
                else None,
                block=block,
                nested_block=inner if nested else 0,
                offset=offset if nested else 0.0,
            )

        return Codes(tuple(fields), make)

    def _state(self, module: Module) -> dict[str, Any]:
        """What a matrix says of itself in JSON."""
        name = next(n for n in _STATES if n in module.tensors)
        entry = module.tensors[name]
        if len(entry.shape) != 1 or not 2 <= entry.shape[0] <= 1 << 16:
            raise module.wrong(f"has {name} of shape {list(entry.shape)}")
        try:
            said = parse_json(module.read(name).tobytes().decode())
            found = {
                "blocksize": said["blocksize"],
                "nested_blocksize": said.get("nested_blocksize", _NESTED_BLOCK),
                "nested_offset": said.get("nested_offset", 0.0),
            }
            for key in ("blocksize", "nested_blocksize"):
                if type(found[key]) is not int or found[key] < 1:
                    raise ValueError(f"{key} {found[key]!r}")
            if not isinstance(found["nested_offset"], (int, float)):
                raise ValueError(f"nested_offset {found['nested_offset']!r}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise module.wrong(f"has {name} that cannot be read ({error})") from error
        return found

    def planned(self, n_in: int, n_out: int) -> dict[str, tuple[Shape, str]]:
        if not self.four:
            return {"weight": ((n_out, n_in), "int8"), "SCB": ((n_out,), "float32")}
        count = n_in * n_out
        blocks = -(-count // _BLOCK)
        found: dict[str, tuple[Shape, str]] = {
            "weight": ((-(-count // 2), 1), "uint8"),
            "weight.quant_map": ((16,), "float32"),
            "weight.absmax": ((blocks,), "uint8" if self.nested else "float32"),
        }
        if self.nested:
            found["weight.nested_absmax"] = (-(-blocks // _NESTED_BLOCK),), "float32"
            found["weight.nested_quant_map"] = (256,), "float32"
        return found


def read(said: Mapping[str, Any]) -> Scheme:
    """The scheme of a ``quantization_config``."""
    return BitsAndBytes(said)
