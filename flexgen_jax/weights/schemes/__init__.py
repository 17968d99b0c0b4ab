"""Published quantisation: what ``quantization_config`` in a ``config.json`` says of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_jax.weights.schemes import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from flexgen_jax.weights.schemes.scheme import Codes, Module, Scheme
from flexgen_jax.weights.tensor_file import SourceError

__all__ = ["Codes", "Module", "Scheme", "scheme_of"]

_METHODS = {
    "gptq": gptq.read,
    "awq": awq.read,
    "fp8": fp8.read,
    "fbgemm_fp8": fp8.read,
    "compressed-tensors": compressed_tensors.read,
    "bitsandbytes": bitsandbytes.read,
    "mxfp4": mxfp4.read,
}


def scheme_of(values: Mapping[str, Any]) -> Scheme | None:
    """How the matrices of a checkpoint are quantised; None: they are not.

    Args:
        values: Of its ``config.json``.

    Raises:
        SourceError: in a way that is not read; the message says what to do.
    """
    said = values.get("quantization_config", values.get("compression_config"))
    if not said:
        return None
    if not isinstance(said, Mapping):
        raise SourceError(f"quantization_config must be an object, got {type(said).__name__}")
    method = said.get("quant_method")
    if method is None and "config_groups" in said:
        method = "compressed-tensors"
    if method is None and ("load_in_4bit" in said or "load_in_8bit" in said):
        method = "bitsandbytes"
    if method not in _METHODS:
        raise SourceError(
            f"its weights are quantised by {method!r}, which is not read; read are "
            f"{', '.join(_METHODS)}, and GGUF files: take a checkpoint in one of these, or the "
            "model as it was before it was quantised"
        )
    return _METHODS[method](said)
