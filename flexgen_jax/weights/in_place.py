"""A checkpoint that is used where it lies: each tensor a range of bytes of one of its files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection
from pathlib import Path

from flexgen_jax.models.family import Config
from flexgen_jax.models.params import param_records
from flexgen_jax.weights.coded_leaves import codes_leaf, codes_names
from flexgen_jax.weights.huggingface import CodesPlace, HuggingFaceModel, Place
from flexgen_jax.weights.manifest import Manifest, Source, TensorEntry
from flexgen_jax.weights.published_format import Leaf, PublishedFormat, float_leaf
from flexgen_jax.weights.recorded import read_recorded
from flexgen_jax.weights.stored_model import StoredModel
from flexgen_jax.weights.tensor_file import SourceError
from flexgen_jax.weights.weight_format import LAYOUTS, WeightFormat
from storage.array_file import ArrayFile, Stamp
from storage.json_text import digest_of, read_json

Needed = Callable[[Config, WeightFormat], Collection[str]]


def lies_ready(model: HuggingFaceModel, dtype: str) -> bool:
    """Whether ``model`` can be used in place with ``dtype``, and a store would be no smaller."""
    if not all(path.suffix == ".safetensors" for path in model.weight_files):
        return False
    return model.coded or dtype != "bfloat16" or model.usual_dtype() == "bfloat16"


def open_in_place(
    directory: Path, *, dtype: str | None = None, needed: Needed | None = None
) -> StoredModel:
    """Opens a directory of safetensors; reads none of the weights.

    Args:
        directory: With the ``config.json``.
        dtype: That is computed with; None: as published, bfloat16 for float16.
        needed: As :func:`~flexgen_jax.weights.checkpoint.open_store` has it.

    Raises:
        SourceError, ConfigError: as :class:`HuggingFaceModel`.
    """
    path = Path(os.path.abspath(directory))
    model = HuggingFaceModel(path)
    dtype = dtype or model.usual_dtype()
    if not lies_ready(model, dtype):
        raise SourceError(f"{path} cannot be used in place in {dtype}: convert it")
    leaves: dict[str, Leaf] = {}
    files: dict[str, ArrayFile] = {}
    records = param_records(model.config)
    stamps = {file: Stamp.of(file) for file in model.weight_files}
    known = read_recorded(path)
    # What is in codes is computed with the way round that it lies.
    layout = model.scheme.layout if model.scheme is not None and model.coded else None
    computed = PublishedFormat.of(dtype, {}, "", layout)

    def add(stored: str, place: Place) -> TensorEntry:
        entry = TensorEntry.of(place.shape, place.dtype.name)
        files[stored] = ArrayFile(
            path,
            place.file,
            place.shape,
            place.dtype,
            entry.nbytes,
            raw=True,
            checksum=known.tensors.get(stored),
            stamp=stamps[place.file],
            offset=place.offset,
            finite=place.dtype.kind not in "iu",
        )
        return entry

    for name, place in model.places().items():
        swapped = place.swapped != computed.transposes(model.config, name)
        if isinstance(place, CodesPlace):
            stored = codes_names(name, place.module, place.places)
            entries = {
                stored[tensor]: add(stored[tensor], at) for tensor, at in place.places.items()
            }
            leaves[name] = codes_leaf(place.codes, entries, rows=place.rows, swapped=swapped)
        else:
            array = name
            if records[name].role == "matrix":
                # Named by the way round that it lies, as a store's arrays are.
                lies = "out_in" if place.swapped else "in_out"
                array = f"{name.rpartition('.')[0]}.{LAYOUTS[lies]}"
            entry, kept = add(array, place), computed.kept_dtype(model.config, name)
            leaves[name] = float_leaf(array, entry, kept, swapped=swapped)
    kinds = ", ".join(
        dict.fromkeys(e.dtype for leaf in leaves.values() for e in leaf.arrays.values())
    )
    if layout is not None and model.scheme is not None:
        kinds = model.scheme.name
    form = PublishedFormat.of(dtype, leaves, kinds, layout)
    manifest = Manifest(
        dtype=dtype,
        source=Source(model.name, model.fingerprint()),
        tensors={
            n: dataclasses.replace(e, checksum=files[n].checksum)
            for n, e in form.entries(model.config).items()
        },
        layout=form.layout,
        config=digest_of(read_json(path / "config.json")),
        files=known.files,
    )
    wanted = files if needed is None else needed(model.config, form)
    arrays = {n: file for n, file in files.items() if n in wanted}
    return StoredModel(path, model.config, manifest, arrays, form)
