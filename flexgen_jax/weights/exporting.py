"""A weight store back into a Hugging Face directory, which transformers loads."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flexgen_jax.models.family import Source
from flexgen_jax.models.params import param_shapes
from flexgen_jax.models.registry import family_of
from flexgen_jax.weights.checkpoint import open_model, resolve
from flexgen_jax.weights.dtypes import checked_dtype
from flexgen_jax.weights.element_blocks import dense_array
from flexgen_jax.weights.huggingface import COMPANION_FILES, SCHEME_FIELDS
from flexgen_jax.weights.store_writer import Progress
from flexgen_jax.weights.stored_model import StoredModel
from storage.array_file import StoreError

MAX_SHARD_NBYTES = 5 * 10**9


def export(
    model: str | Path,
    directory: str | Path,
    *,
    dtype: Any = "auto",
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
    offload_dir: str | Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes ``config.json``, safetensors and the tokenizer's files.

    Codes become weights of the store's dtype again: what they stand for, not what they were made
    from. One shard is in memory at a time. The directory gets its name when it is complete.

    Args:
        model: A weight store, or what :func:`convert` takes.
        directory: Must not exist.
        dtype: As ``LLM`` has it.
        max_shard_nbytes: A file takes no more, unless one tensor does.
        offload_dir: Where a converted model is kept, as ``LLM`` has it.
        progress: Called as (bytes done, bytes in all, tensor) after each tensor.
        say: Told of a conversion.

    Returns:
        ``directory``, made absolute.

    Raises:
        StoreError: the store is damaged, or the directory is there already.
        SourceError, ModelNotFoundError: no model, or a damaged one.
        OSError: the directory cannot be written.
    """
    target = Path(os.path.abspath(directory))
    if target.exists():
        raise StoreError(f"{target} exists already; remove it, or give another name")
    if max_shard_nbytes < 1:
        raise ValueError(f"max_shard_nbytes must be at least 1, got {max_shard_nbytes}")
    stored = open_model(
        resolve(model, dtype=checked_dtype(dtype), offload_dir=offload_dir, say=say),
        dtype=checked_dtype(dtype),
    )
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_weights(stored, partial, max_shard_nbytes, progress or (lambda *_: None))
        config = json.loads((stored.path / "config.json").read_text(encoding="utf-8"))
        config.update({"torch_dtype": stored.dtype, "dtype": stored.dtype})
        for field in SCHEME_FIELDS:  # what is written is dense
            config.pop(field, None)
        (partial / "config.json").write_text(
            json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
        for name in COMPANION_FILES:
            if (stored.path / name).is_file():
                shutil.copyfile(stored.path / name, partial / name)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _write_weights(stored: StoredModel, into: Path, limit: int, progress: Progress) -> None:
    from safetensors.numpy import save_file

    itemsize = 2 if stored.dtype == "bfloat16" else 4
    config, family, shapes = stored.config, family_of(stored.config), param_shapes(stored.config)
    # Several parameters may be parts of one published tensor.
    parts: dict[str, list[tuple[str, Source]]] = {}
    for name in shapes:
        source = family.source(config, name)
        parts.setdefault(source.key, []).append((name, source))
    sizes = {k: itemsize * sum(math.prod(shapes[n]) for n, _ in v) for k, v in parts.items()}
    shards = list(_shards(sizes, limit))
    total, done = sum(sizes.values()), 0
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for key in keys:
            tensors[key] = _published(stored, parts[key])
            weight_map[key] = file
            done += sizes[key]
            progress(done, total, key)
        save_file(tensors, into / file, metadata={"format": "pt"})
        del tensors
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (into / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, allow_nan=False) + "\n"
        )


def _shards(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    nbytes = 0
    for name, size in sizes.items():
        if names and nbytes + size > limit:
            yield names
            names, nbytes = [], 0
        names.append(name)
        nbytes += size
    yield names


def _published(stored: StoredModel, parts: list[tuple[str, Source]]) -> np.ndarray:
    """A tensor as the family's checkpoints have it."""
    found = []
    for name, source in sorted(parts, key=_place):
        array = dense_array(stored.format, stored.config, stored.arrays, name)
        swapped = source.transposed != stored.format.transposes(stored.config, name)
        found.append(array.T if swapped else array)
    if parts[0][1].expert is not None:
        whole = np.stack(found)
    else:
        whole = found[0] if len(found) == 1 else np.concatenate(found)
    # What is made of transposed arrays is transposed in memory, and is written as it lies there.
    return np.ascontiguousarray(whole)


def _place(part: tuple[str, Source]) -> tuple[int, int]:
    source = part[1]
    return source.expert or 0, (source.rows or (0, 0))[0]
