"""Parameters in published codes as leaves of a format: of a checkpoint, or of a config alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flexgen_jax.models.family import Config
from flexgen_jax.models.params import TOKEN_TABLE, param_records
from flexgen_jax.models.registry import family_of
from flexgen_jax.weights.huggingface import read_scheme
from flexgen_jax.weights.manifest import TensorEntry
from flexgen_jax.weights.published_format import Leaf, PublishedFormat, float_leaf
from flexgen_jax.weights.schemes import Codes, Scheme, scheme_of
from flexgen_jax.weights.weight_format import WeightFormat
from storage.json_text import read_json


def codes_names(name: str, module: str, tensors: Iterable[str]) -> dict[str, str]:
    """What the tensors of ``module``, of which parameter ``name`` is one, are called here."""
    unit, _, rest = name.partition(".")
    expert = rest.partition(".")[0]
    unit = f"{unit}.{expert}" if expert.startswith("expert_") else unit
    place = f"{unit}.{module.rpartition('.')[2]}"
    return {tensor: f"{place}.{tensor}" for tensor in tensors}


def codes_leaf(
    codes: Codes, entries: Mapping[str, TensorEntry], *, rows: tuple[int, int], swapped: bool
) -> Leaf:
    """Of a parameter in codes.

    Args:
        entries: Of its tensors, in the order of ``codes.tensors``.
        rows: Which outputs of the matrix. ``swapped``: The transpose of what lies there.
    """

    def make(arrays: list[Any], dtype: str) -> Any:
        named = dict(zip(codes.tensors, arrays, strict=True))
        return codes.make(named, rows=rows, swapped=swapped)

    return Leaf(entries, make, packed=True)


def planned_format(path: Path, config: Config, dtype: str) -> WeightFormat | None:
    """What the weights of a model will be, by its ``config.json`` alone; None: not in codes.

    Args:
        path: Of the directory, or of the ``config.json``.

    Raises:
        SourceError: in codes that are not read.
    """
    scheme = read_scheme(path)
    if scheme is None:
        return None
    values = read_json(path / "config.json" if path.is_dir() else path)
    said = values.get("dtype", values.get("torch_dtype"))
    published = said if said in ("float16", "bfloat16", "float32") else dtype
    return _planned(scheme, config, dtype, published)


def preset_format(config: Config, dtype: str) -> WeightFormat | None:
    """The same of a preset, as its family is published; None: not in codes."""
    scheme = scheme_of({"quantization_config": family_of(config).published_as})
    return None if scheme is None else _planned(scheme, config, dtype, "bfloat16")


def _planned(scheme: Scheme, config: Config, dtype: str, published: str) -> WeightFormat:
    """With what is not in codes in the dtype ``published``."""
    form = PublishedFormat.of(dtype, {}, scheme.name, scheme.layout)
    leaves = {}
    for name in param_records(config):
        leaf = _planned_leaf(scheme, config, name)
        if leaf is None:
            entry = TensorEntry.of(form.array_shape(config, name), published)
            kept = form.kept_dtype(config, name)
            leaf = float_leaf(form.array_name(config, name), entry, kept, swapped=False)
        leaves[name] = leaf
    return PublishedFormat.of(dtype, leaves, scheme.name, scheme.layout)


def _planned_leaf(scheme: Scheme, config: Config, name: str) -> Leaf | None:
    family, record = family_of(config), param_records(config)[name]
    source = family.source(config, name)
    lies = scheme.lies(source)
    if name == TOKEN_TABLE or not record.quantized or lies is None or not scheme.covers(lies[0]):
        return None
    module, transposed = lies
    n_in, n_out = record.shape if transposed else record.shape[::-1]
    if source.rows is not None:
        n_out = _fused_rows(config, source.key)
    planned = scheme.planned(n_in, n_out)
    stored = codes_names(name, module, planned)
    entries = {stored[t]: TensorEntry.of(*planned[t]) for t in planned}

    def make(arrays: list[Any], dtype: str) -> Any:
        raise TypeError("a format that was planned has no arrays")

    return Leaf(entries, make, packed=True)


def _fused_rows(config: Config, key: str) -> int:
    """Of a tensor that several parameters are parts of."""
    sources = (family_of(config).source(config, name) for name in param_records(config))
    return max(s.rows[1] for s in sources if s.key == key and s.rows is not None)
