"""The weight store: made from a Hugging Face model or from a preset, opened, found.

A store is a directory that Orbax restores and whose array files are read tensor by tensor
(``docs/design.md``); ``{"embed": {"tokens": ...}, "layer_0": ...}`` comes from::

    orbax.checkpoint.StandardCheckpointer().restore(store)

Importing this module costs no jax, tensorstore, torch or hub client: they are imported where used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np

from flexgen_jax.models.family import Config, Param
from flexgen_jax.models.params import param_records
from flexgen_jax.models.registry import load_config, preset, write_config
from flexgen_jax.weights.dtypes import DTYPES, checked_dtype
from flexgen_jax.weights.element_blocks import (
    check_content,
    finite,
    read_array,
    read_elements,
    transposed_blocks,
)
from flexgen_jax.weights.gguf_file import GGUFFile, is_gguf, open_gguf
from flexgen_jax.weights.huggingface import (
    COMPANION_FILES,
    HuggingFaceModel,
    download,
    facts_of,
    is_hub_name,
    is_model_directory,
    not_a_model,
)
from flexgen_jax.weights.in_place import lies_ready, open_in_place
from flexgen_jax.weights.manifest import (
    MANIFEST_NAME,
    Manifest,
    Source,
    TensorEntry,
    array_directory,
)
from flexgen_jax.weights.store_writer import Progress, Say, write_store
from flexgen_jax.weights.stored_model import StoredModel
from flexgen_jax.weights.tensor_file import ModelNotFoundError, SourceError
from flexgen_jax.weights.weight_format import WeightFormat
from storage.array_file import ArrayFile, StoreError, describe_array, dtype_of
from storage.checksums import TensorChecksum, tensor_checksum
from storage.json_text import digest_of, parse_json, read_json

__all__ = [
    "DTYPES",
    "ModelNotFoundError",
    "SourceError",
    "StoreError",
    "StoredModel",
    "cache_directory",
    "convert",
    "convert_dummy",
    "is_store",
    "open_model",
    "open_store",
    "resolve",
]

DUMMY_SCALE = 0.02  # the standard deviation OPT is initialised with
_DUMMY_VERSION = 3  # raise it when the same seed gives other numbers
_DUMMY_BLOCK = 1 << 20  # elements
_COPY_NBYTES = 1 << 22
GROUP_SIZE = 64


def convert(
    source: str | Path,
    store: str | Path,
    *,
    dtype: Any = "auto",
    weight_bits: int | None = None,
    group_size: int = GROUP_SIZE,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Path:
    """Makes a weight store of a Hugging Face model, holding no more than a block in memory.

    Of a model that was published in codes it holds one matrix, which it makes dense.

    An interrupted conversion is continued by the same call; a store that is already there and was
    made from the same files in the same dtype is left as it is.

    Args:
        source: A directory with ``config.json`` and safetensors or ``.bin`` weights, or a name on
            the hub; to quantise, a weight store too.
        store: The directory to write.
        dtype: Of the stored weights, as :func:`~flexgen_jax.weights.dtypes.checked_dtype` has it;
            ``"auto"``: bfloat16 for weights of 16 bits, float32 for others.
        weight_bits: 4 or 8: quantise them (:mod:`flexgen_jax.weights.weight_format` says which).
        group_size: The most elements that share a scale.
        progress: Called as (bytes done, bytes in all, tensor) after each block.
        say: Called with a line when it resumes, or waits for another process.

    Returns:
        ``store``, made absolute.

    Raises:
        ModelNotFoundError: there is no model ``source``.
        SourceError: its files are damaged or incomplete.
        StoreError: ``store`` is something else, or cannot be written.
    """
    dtype = checked_dtype(dtype)
    if is_store(source):
        if weight_bits is None:
            raise SourceError(
                f"{source} is a weight store already; convert the Hugging Face model it was made "
                "from, or quantise it with --weight-bits"
            )
        stored = open_store(source, dtype=dtype)
        form = _format(stored.dtype, weight_bits, group_size)
        return _convert(_Stored(stored), Path(store), form, progress, say)
    model = HuggingFaceModel(*_find(str(source)))
    form = _format(dtype or model.usual_dtype(), weight_bits, group_size)
    return _convert(model, Path(store), form, progress, say)


def convert_dummy(
    model: str | Path | Config,
    store: str | Path,
    *,
    dtype: Any = "auto",
    weight_bits: int | None = None,
    group_size: int = GROUP_SIZE,
    seed: int = 0,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Path:
    """Makes a weight store of random weights: the speed of a model without its download.

    Kernels and embeddings are normal with standard deviation ``DUMMY_SCALE``, biases zero, norms
    the identity. The numbers depend on ``seed`` and the tensor's name alone.

    Args:
        model: A preset such as ``facebook/opt-1.3b``, the path of a ``config.json``, or a config.
        store: The directory to write; this and the rest are as :func:`convert` has them.
        seed: Not negative.

    Raises:
        ConfigError: neither a preset nor a readable config.
        StoreError: ``store`` is something else, or cannot be written.
    """
    form = _format(checked_dtype(dtype) or "float32", weight_bits, group_size)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if isinstance(model, Config):
        name, config = "config", model
    elif os.path.exists(model):
        name, config = Path(model).resolve().name, load_config(model)
    else:
        name, config = str(model), preset(str(model))
    text = json.dumps(write_config(config), indent=1, allow_nan=False).encode()
    identity = f"dummy {_DUMMY_VERSION} {DUMMY_SCALE} {seed} ".encode() + text
    source = Source(f"dummy:{name}", hashlib.sha256(identity).hexdigest())
    records, entries = param_records(config), form.entries(config)
    kept = {name: dtype_of(form.kept_dtype(config, name)) for name in records}
    plain = form.pieces(config, lambda name: _dummy_blocks(name, records[name], kept[name], seed))

    def blocks(stored: str) -> Iterator[np.ndarray]:
        field, shape = stored.rpartition(".")[2], entries[stored].shape
        if form.bits is None or field not in ("codes", "affine"):
            return plain(stored)
        if field == "codes":
            return _dummy_codes(stored, math.prod(shape), seed)
        return iter([_dummy_affine(shape, form.bits)])

    return write_store(
        Path(store),
        _manifest(config, form, source, text),
        blocks,
        order=form.order(config, tuple(records)),
        files={"config.json": text + b"\n"},
        progress=progress,
        say=say,
    )


def is_store(path: str | Path) -> bool:
    """Whether ``path`` is a weight store, sound or not."""
    return (Path(path) / MANIFEST_NAME).is_file()


def fingerprint_of(model: str | Path) -> str | None:
    """Of the model in a directory here, weights unread; None: a hub name, or it cannot be told."""
    try:
        if is_store(model):
            return Manifest.load(Path(model)).source.fingerprint
        return HuggingFaceModel(Path(model)).fingerprint() if Path(model).is_dir() else None
    except (ValueError, OSError):
        return None


def is_ready(path: str | Path) -> bool:
    """Whether :func:`open_model` may open ``path``: what it holds is there."""
    return is_store(path) or is_gguf(path) or is_model_directory(Path(path))


def dtype_of_model(model: str | os.PathLike[str], dtype: Any = "auto") -> str:
    """The name of what ``model`` is computed with.

    Args:
        model: A weight store, a directory or ``config.json`` of a model, or the name of one that is
            not here.
        dtype: As :func:`checked_dtype` has it; ``"auto"``: what the weights have, or else what the
            config says; bfloat16 where nothing is known, as most models are published in 16 bits.

    Raises:
        StoreError, SourceError: a dtype or a model that cannot be.
    """
    if (chosen := checked_dtype(dtype)) is not None:
        return chosen
    path = Path(model)
    if is_store(path):
        return Manifest.load(path).dtype
    if is_gguf(path):
        return GGUFFile(path).usual_dtype()
    if path.is_dir() and is_model_directory(path):
        return HuggingFaceModel(path).usual_dtype()
    file = path / "config.json" if path.is_dir() else path
    said: Any = None
    if file.is_file():
        with contextlib.suppress(ValueError):  # whoever reads it as a config says what is wrong
            values = read_json(file)
            said = values.get("dtype", values.get("torch_dtype")) if isinstance(values, dict) else 0
    return "float32" if said == "float32" else "bfloat16"


def open_store(
    path: str | Path,
    *,
    dtype: str | None = None,
    needed: Callable[[Config, WeightFormat], Collection[str]] | None = None,
) -> StoredModel:
    """Checks a weight store without reading its weights.

    Args:
        path: The directory.
        dtype: What the weights are to be; None takes what is there.
        needed: Says which arrays are opened, and have to be there; None: all.

    Raises:
        StoreError: no store, of another version or dtype, incomplete or damaged.
        ConfigError: its ``config.json`` is.
    """
    path = Path(os.path.abspath(path))
    manifest = Manifest.load(path)
    if dtype is not None and dtype != manifest.dtype:
        raise StoreError(
            f"{path} holds {manifest.dtype} weights, but {dtype} was requested; convert the model "
            f"again with --dtype {dtype}, or pass dtype={manifest.dtype!r}"
        )
    config = load_config(path)
    check_config(path, manifest)
    _check_files(path, manifest)
    arrays = {}
    form, entries = entries_of(path, config, manifest)
    names = entries if needed is None else needed(config, form)
    for name, expected in entries.items():
        if name not in names:
            continue
        where = array_directory(path, name)
        checksum = manifest.tensors[name].checksum
        arrays[name] = dataclasses.replace(describe_array(where), checksum=checksum)
        found = TensorEntry.of(arrays[name].shape, arrays[name].dtype.name)
        if found != expected:
            raise StoreError(
                f"{where}: expected {_brief(expected)}, the array is {_brief(found)}; the "
                "store is damaged, remove it and convert the model again"
            )
    return StoredModel(path, config, manifest, arrays, form)


def open_model(
    path: str | Path,
    *,
    dtype: str | None = None,
    needed: Callable[[Config, WeightFormat], Collection[str]] | None = None,
) -> StoredModel:
    """Opens what :func:`resolve` has found: a weight store, or a checkpoint in place.

    Raises:
        As :func:`open_store`, and SourceError.
    """
    if is_store(path):
        return open_store(path, dtype=dtype, needed=needed)
    if is_gguf(path):
        return open_gguf(Path(path), cache_directory(), dtype=dtype, needed=needed)
    return open_in_place(Path(path), dtype=dtype, needed=needed)


def entries_of(
    path: Path, config: Config, manifest: Manifest
) -> tuple[WeightFormat, dict[str, TensorEntry]]:
    """How a store's parameters are stored, and as which arrays.

    Raises:
        StoreError: the manifest has others.
    """
    form = WeightFormat(
        manifest.dtype, manifest.weight_bits, manifest.weight_group, manifest.layout
    )
    entries = form.entries(config)
    for name, expected in entries.items():
        if manifest.tensors.get(name) != expected:
            raise StoreError(
                f"{path / MANIFEST_NAME}: expected {name} as {expected.dtype} "
                f"{list(expected.shape)} by {path / 'config.json'}, the manifest has "
                f"{_brief(manifest.tensors.get(name))}; the store is damaged, remove it and "
                "convert the model again"
            )
    for name in sorted(manifest.tensors.keys() - entries.keys()):
        raise StoreError(
            f"{path / MANIFEST_NAME} has the tensor {name}, which {path / 'config.json'} has no "
            "place for; the store is damaged, remove it and convert the model again"
        )
    return form, entries


def check_config(path: Path, manifest: Manifest) -> None:
    """Raises if the config is not the one that the weights were converted with."""
    file = path / "config.json"
    if manifest.config is not None and digest_of(read_json(file)) != manifest.config:
        raise StoreError(
            f"{file} was changed after the weights were converted: put back what it was, or "
            "convert the model again; with another config they are another model"
        )


def _check_files(path: Path, manifest: Manifest) -> None:
    """Raises if a tokenizer's file, or another one beside the arrays, is not what was written."""
    for name, checksum in manifest.files.items():
        try:
            same = tensor_checksum((path / Path(name).name).read_bytes()) == checksum
        except OSError as error:
            raise StoreError(
                f"cannot read {path / name}: {error.strerror}; the store is damaged, remove it and "
                "convert the model again"
            ) from error
        if not same:
            raise StoreError(
                f"{path / name} was changed after the model was converted: put back what it was; "
                f"if the change is meant, 'flexgen-jax verify --record {path}' accepts it"
            )


def resolve(
    model: str | Path,
    *,
    dtype: str | None = None,
    weight_bits: int | None = None,
    group_size: int = GROUP_SIZE,
    offload_dir: str | Path | None = None,
    say: Say = lambda line: None,
    progress: Progress | None = None,
) -> Path:
    """Where the weights of ``model`` lie ready: as published, or a weight store made on first use.

    Args:
        model: A weight store or a Hugging Face directory of safetensors (returned as it is, unless
            it is to be quantised or made smaller), another Hugging Face directory, or a hub name.
        dtype: What is computed with, and what a conversion stores; None: what
            :meth:`HuggingFaceModel.usual_dtype` says, or a store has.
        weight_bits, group_size: Of a conversion; None takes what a weight store has.
        offload_dir: Converted stores go to its ``stores``; None: to the cache directory's.
        say: Called with a line before a conversion.
        progress: As in :func:`convert`.

    Raises:
        ModelNotFoundError: none of these; the message says what was tried.
        SourceError, StoreError, ConfigError: as :func:`convert`.
    """
    source: _Source
    if is_store(model):
        manifest = Manifest.load(Path(os.path.abspath(model)))
        if weight_bits in (None, manifest.weight_bits):
            return Path(os.path.abspath(model))
        if manifest.weight_bits is not None:
            raise StoreError(
                f"{model} holds weights of {manifest.weight_bits} bits, but "
                f"{weight_bits} were requested: quantise the model it was made from"
            )
        stored = open_store(model, dtype=dtype)
        source, dtype = _Stored(stored), stored.dtype
    elif is_gguf(model):
        if weight_bits is not None:
            raise SourceError(
                f"{model} is a GGUF file, whose weights stay as they are: leave weight_bits "
                "out, or quantise the model's safetensors"
            )
        return Path(os.path.abspath(model))
    else:
        directory, name = _find(str(model))
        source = HuggingFaceModel(directory, name)
        dtype = dtype or source.usual_dtype()
        if weight_bits is None and lies_ready(source, dtype):
            return Path(os.path.abspath(directory))
    form = _format(dtype, weight_bits, group_size)
    base = cache_directory() if offload_dir is None else Path(offload_dir)
    plain = re.sub(r"[^\w.-]+", "--", source.name)
    store = Path(os.path.abspath(base)) / "stores" / f"{plain}-{form}-{source.fingerprint()[:12]}"
    if not is_store(store):
        nbytes = sum(entry.nbytes for entry in form.entries(source.config).values())
        say(f"converting {model} to {form} weights in {store} ({nbytes / 1e9:.2f} GB), once")
        return _convert(source, store, form, progress, say)
    try:
        return _convert(source, store, form, progress, say)
    except StoreError as error:
        raise StoreError(
            f"{error}; once {store} is gone, the next run does so by itself"
        ) from error


def cache_directory() -> Path:
    """``$FLEXGEN_JAX_CACHE``, or ``flexgen-jax`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("FLEXGEN_JAX_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flexgen-jax"


class _Source(Protocol):
    """What a store can be made from."""

    config: Config
    name: str
    directory: Path
    companions: tuple[Path, ...]
    opened: str

    def names(self) -> tuple[str, ...]: ...

    changed: Mapping[str, Any]

    def blocks(
        self, name: str, dtype: np.dtype, *, transposed: bool = False
    ) -> Iterator[np.ndarray]: ...

    def fingerprint(self) -> str: ...

    def facts(self) -> str:
        """Changes whenever one of the files does, of which the fingerprint reads the ends only."""
        ...


class _Stored:
    """A weight store as the source of another."""

    def __init__(self, model: StoredModel) -> None:
        if model.manifest.weight_bits is not None:
            raise SourceError(
                f"{model.path} is quantised already; convert the model it was made from"
            )
        self.config, self.directory = model.config, model.path
        self.name = model.manifest.source.name
        files = (model.path / name for name in COMPANION_FILES)
        self.companions = tuple(file for file in files if file.is_file())
        self.changed: Mapping[str, Any] = {}
        self._model = model
        self.opened = self.facts()

    def names(self) -> tuple[str, ...]:
        return tuple(param_records(self.config))

    def blocks(
        self, name: str, dtype: np.dtype, *, transposed: bool = False
    ) -> Iterator[np.ndarray]:
        form = self._model.format
        file = self._model.arrays[form.array_name(self.config, name)]
        if form.transposes(self.config, name) != transposed:
            blocks = transposed_blocks(read_array(file), dtype)
        else:
            blocks = _copied(file)
        yield from finite(blocks, f"{self.directory}: the tensor {name}")

    def fingerprint(self) -> str:
        return self._model.manifest.source.fingerprint

    def facts(self) -> str:
        chunks = (array.chunk for array in self._model.arrays.values())
        return facts_of((self.directory / "config.json", *self.companions, *chunks))


def _copied(file: ArrayFile) -> Iterator[np.ndarray]:
    """The elements of ``file``, held against its checksum when all have been read."""
    most, count = _COPY_NBYTES // file.dtype.itemsize, math.prod(file.shape)
    checksum = TensorChecksum()
    for first in range(0, count, most):
        block = read_elements(file, first, min(most, count - first))
        checksum.add(block.view(np.uint8))
        yield block
    check_content(file, str(checksum))


def _convert(
    model: _Source,
    store: Path,
    form: WeightFormat,
    progress: Progress | None,
    say: Say | None,
) -> Path:
    files = {path.name: path.read_bytes() for path in model.companions}
    files["config.json"] = (model.directory / "config.json").read_bytes()
    if model.changed:
        config = {**parse_json(files["config.json"]), **model.changed}
        config = {k: v for k, v in config.items() if k not in model.changed or v is not None}
        files["config.json"] = json.dumps(config, indent=2, allow_nan=False).encode() + b"\n"
    config_of = model.config
    source = Source(model.name, model.fingerprint())

    def check_source() -> None:
        if model.facts() != model.opened:
            raise SourceError(
                f"{model.directory} was changed while it was converted: the new store would be "
                "a mixture and is not kept; run the same command again"
            )

    return write_store(
        store,
        _manifest(model.config, form, source, files["config.json"]),
        form.pieces(
            config_of,
            lambda name: model.blocks(
                name,
                dtype_of(form.kept_dtype(config_of, name)),
                transposed=form.transposes(config_of, name),
            ),
        ),
        order=form.order(config_of, model.names()),
        files=files,
        facts=model.opened,
        check_source=check_source,
        progress=progress,
        say=say,
    )


def _find(source: str) -> tuple[Path, str | None]:
    """The local directory of a model, and its name if that is not the directory's."""
    path = Path(source)
    if path.is_dir():
        if not is_model_directory(path):
            raise ModelNotFoundError(not_a_model(path))
        return path, None
    if path.exists():
        raise ModelNotFoundError(f"{path} is a file; a model is a directory, or a name on the hub")
    if is_hub_name(source):
        return download(source), source
    raise ModelNotFoundError(
        f"no model {source!r}: there is no such directory, and it is not a name on the Hugging "
        "Face hub either (organisation/model, such as facebook/opt-1.3b)"
    )


def _manifest(config: Config, form: WeightFormat, source: Source, text: bytes) -> Manifest:
    """``text`` is the store's ``config.json``."""
    return Manifest(
        dtype=form.dtype,
        source=source,
        tensors=form.entries(config),
        weight_bits=form.bits,
        weight_group=form.group,
        layout=form.layout,
        config=digest_of(parse_json(text)),
    )


def _format(dtype: str, bits: int | None, group: int) -> WeightFormat:
    if bits is None:
        return WeightFormat.usual(dtype)
    if bits not in (4, 8):
        raise StoreError(f"weight_bits must be 4 or 8, got {bits!r}")
    if group < 2:
        raise StoreError(f"group_size must be at least 2, got {group!r}")
    return WeightFormat.usual(dtype, bits, group)


def _brief(entry: TensorEntry | None) -> str:
    return f"{entry.dtype} {list(entry.shape)}" if entry else "no such tensor"


def _dummy_blocks(name: str, record: Param, dtype: np.dtype, seed: int) -> Iterator[np.ndarray]:
    count = math.prod(record.shape)
    if record.role in ("norm", "bias"):
        yield np.full(count, record.init, dtype)
        return
    bits = _random_bits(name, seed)
    # Four times faster than drawing normal numbers: 16 random bits choose one of 65,536 quantiles.
    quantiles = _normal_quantiles().astype(dtype)
    for start in range(0, count, _DUMMY_BLOCK):
        index = bits.random_raw(_DUMMY_BLOCK // 4).astype("<u8", copy=False).view("<u2")
        yield np.take(quantiles, index[: count - start], mode="clip")


def _dummy_codes(name: str, count: int, seed: int) -> Iterator[np.ndarray]:
    """Any codes are weights: quantising takes a hundred times as long as drawing them."""
    bits = _random_bits(name, seed)
    for start in range(0, count, 8 * _DUMMY_BLOCK):
        drawn = bits.random_raw(_DUMMY_BLOCK).astype("<u8", copy=False).view(np.uint8)
        yield drawn[: count - start]


def _dummy_affine(shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Scales and zeros with which evenly spread codes have a standard deviation of the dummies'."""
    width = DUMMY_SCALE * 12**0.5
    groups = shape[-1] // 2
    affine = np.full(shape, -width / 2, dtype_of("bfloat16"))
    affine[..., :groups] = width / (2**bits - 1)
    return affine


def _random_bits(name: str, seed: int) -> np.random.SFC64:
    """Of a tensor."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.SFC64(np.random.SeedSequence([seed, int.from_bytes(digest[:16], "little")]))


@cache
def _normal_quantiles() -> np.ndarray:
    inverse = NormalDist(0, DUMMY_SCALE).inv_cdf
    return np.array([inverse((i + 0.5) / 65536) for i in range(65536)])
