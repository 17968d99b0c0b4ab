"""Reads a model in Hugging Face's form: which files, which tensors, under which names.

Or an Orbax checkpoint of its params, with the ``config.json`` in or beside it.

A tensor is handed out in blocks, as the weight store wants it (kernels transposed, dtype
converted), from files that are mapped rather than loaded: what is held in memory is one block.
Knows nothing of the weight store itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexgen_jax.models.family import Param, Source
from flexgen_jax.models.params import TOKEN_TABLE, param_records
from flexgen_jax.models.registry import family_of, load_config
from flexgen_jax.weights import flax_files
from flexgen_jax.weights.dtypes import usual_dtype
from flexgen_jax.weights.element_blocks import blocks_of, finite, transposed_blocks
from flexgen_jax.weights.naming import Naming, naming
from flexgen_jax.weights.safetensors_file import SafetensorsFile
from flexgen_jax.weights.schemes import Codes, Module, Scheme, scheme_of
from flexgen_jax.weights.tensor_file import (
    DTYPES,
    Entry,
    ModelNotFoundError,
    SourceError,
    WeightFile,
)
from flexgen_jax.weights.torch_file import TorchFile
from storage.json_text import read_json

# What a tokenizer and a generation need beside the weights; copied as they are, where they exist.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
)
_ORBAX_FILE = "_METADATA"
# What says that the weights are quantised.
SCHEME_FIELDS = ("quantization_config", "compression_config")


@dataclasses.dataclass(frozen=True)
class _Located:
    """Where a parameter lies: file, place in it, and what of which tensor.

    ``codes``: How, if it is in codes; it then lies in several tensors of ``module``, whose
    (n_out, n_in) is the parameter's transpose if ``transposed``.
    """

    file: Path
    offset: int
    source: Source
    module: str = ""
    codes: Codes | None = None
    transposed: bool = False


class _Fused(NamedTuple):
    """How many rows and experts a tensor has, as far as parameters say."""

    rows: int
    experts: int


class Place(NamedTuple):
    """Where a parameter lies, and what lies there.

    Attributes:
        offset: Bytes.
        swapped: The parameter's transpose.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    swapped: bool


class CodesPlace(NamedTuple):
    """Where a parameter in codes lies.

    Attributes:
        module: Its name in the checkpoint, of which it may be a part.
        rows: Which outputs of it.
        places: Of its tensors, by what follows the module's name.
        swapped: The parameter's transpose.
    """

    module: str
    codes: Codes
    rows: tuple[int, int]
    places: Mapping[str, Place]
    swapped: bool


class HuggingFaceModel:
    """A local directory with ``config.json`` and weights, checked for completeness.

    Args:
        directory: Where it lies.
        name: For people; by default the directory's name.

    Attributes:
        config: Of the weights.
        scheme: How matrices are quantised; None: they are not.
        changed: What in ``config.json`` is not what the weights are; None: it is not to be there.
        opened: The :meth:`facts` when it was opened.

    Raises:
        ModelNotFoundError: no config or no weights there.
        ConfigError: not a model that can be run.
        SourceError: a file is missing or damaged, a tensor is missing, unexpected or misshapen.
    """

    def __init__(self, directory: Path, name: str | None = None) -> None:
        self.directory = directory
        self.name = name or directory.resolve().name
        found = _weights_in(directory)
        if not (directory / "config.json").is_file() or not found:
            raise ModelNotFoundError(not_a_model(directory))
        self.weight_files = _shards(found[0])
        self.companions = tuple(directory / n for n in COMPANION_FILES if (directory / n).is_file())
        self.opened = self.facts()  # before anything of them is read
        self.config = load_config(directory)
        self.scheme = read_scheme(directory)
        self.changed: Mapping[str, Any] = {}
        self._open_path: Path | None = None
        self._open_file: WeightFile | None = None
        self._located = self._locate(found[0])
        if self.scheme is not None:
            self.changed = {**self.changed, **dict.fromkeys(SCHEME_FIELDS)}

    def names(self) -> tuple[str, ...]:
        """Flat names of the parameters in the order in which the files hold them."""
        rank = {file: i for i, file in enumerate(self.weight_files)}
        order = {n: (rank[at.file], at.offset) for n, at in self._located.items()}
        return tuple(sorted(order, key=order.__getitem__))

    def blocks(
        self, name: str, dtype: np.dtype[Any], *, transposed: bool = False
    ) -> Iterator[np.ndarray]:
        """The parameter ``name`` in C order and ``dtype``, a few megabytes at a time.

        Args:
            transposed: The other way round than its record has it.
        """
        at = self._located[name]
        if at.codes is not None:
            yield from self._decoded(name, at, dtype, transposed)
            return
        file = self._file(at.file)
        whole = file.array(at.source.key)
        part = whole if at.source.expert is None else whole[at.source.expert]
        part = part if at.source.rows is None else part[slice(*at.source.rows)]
        blocks = transposed_blocks if at.source.transposed != transposed else blocks_of
        yield from finite(blocks(part, dtype), f"{at.file}: the tensor {at.source.key}")
        del whole, part
        file.release()

    def _decoded(
        self, name: str, at: _Located, dtype: np.dtype[Any], transposed: bool
    ) -> Iterator[np.ndarray]:
        """As :meth:`blocks`, of what is in codes: all of the matrix is in memory."""
        import jax

        from flexgen_jax.models.packed import dense_jit

        assert at.codes is not None
        keys = {tensor: self._tensor(at.module, tensor) for tensor in at.codes.tensors}
        swapped = self._lies_swapped(at) != transposed
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            # Copies: another of the files may be opened for the next one.
            expert = slice(None) if at.source.expert is None else at.source.expert
            arrays = {
                tensor: jax.numpy.array(self._file(self._entries[key][0]).array(key)[expert])
                for tensor, key in keys.items()
            }
            leaf = at.codes.make(arrays, rows=self._rows(name, at), swapped=False)
            whole = np.asarray(dense_jit(leaf, dtype.name))
        blocks = transposed_blocks if swapped else blocks_of
        yield from finite(blocks(whole, dtype), f"{at.file}: the matrix {at.module}")

    def _lies_swapped(self, at: _Located) -> bool:
        """Whether the transpose of a parameter in codes lies there."""
        assert self.scheme is not None
        return at.transposed != (self.scheme.layout == "in_out")

    def _tensor(self, module: str, tensor: str) -> str:
        """The key of a tensor of a module in codes."""
        assert self.scheme is not None
        return f"{module}{self.scheme.joint}{tensor}"

    def _rows(self, name: str, at: _Located) -> tuple[int, int]:
        shape = param_records(self.config)[name].shape
        return at.source.rows or (0, shape[1] if at.transposed else shape[0])

    def fingerprint(self) -> str:
        """Changes when the weights, the config or the tokenizer do, without reading the weights."""
        digest = hashlib.sha256()
        for path in (self.directory / "config.json", *self.companions):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.name} {content}\n".encode())
        for path in sorted(_files(self.weight_files)):
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
                digest.update(file.read(1 << 16))
                file.seek(max(0, status.st_size - (1 << 16)))
                digest.update(file.read(1 << 16))
        return digest.hexdigest()

    def facts(self) -> str:
        """Changes whenever one of the files does: by when, as the file system knows it."""
        files = (self.directory / "config.json", *self.companions, *_files(self.weight_files))
        return facts_of(files)

    def usual_dtype(self) -> str:
        """What is computed with where nothing else is asked for.

        bfloat16 if the largest tensor, which says most of what the model is, has 16 bits; else
        float32. Of what is in codes, the largest that is not.
        """
        floats = (entry for _, entry in self._entries.values() if entry.dtype in DTYPES.values())
        entry = max(floats, key=lambda entry: math.prod(entry.shape), default=None)
        return "bfloat16" if entry is None else usual_dtype(entry.dtype)

    @property
    def coded(self) -> bool:
        """Whether any parameter is in codes."""
        return any(at.codes is not None for at in self._located.values())

    def places(self) -> dict[str, Place | CodesPlace]:
        """Parameter -> where it lies, in layer order; of safetensors only."""
        return {
            name: self._place(at) if at.codes is None else self._codes_place(name, at)
            for name, at in self._located.items()
        }

    def _codes_place(self, name: str, at: _Located) -> CodesPlace:
        assert at.codes is not None
        found = {}
        for tensor in at.codes.tensors:
            path, entry = self._entries[self._tensor(at.module, tensor)]
            shape, offset = _of_expert(entry, at.source.expert)
            # What is one number lies in one row here.
            found[tensor] = Place(path, offset, shape or (1,), entry.dtype, False)
        return CodesPlace(at.module, at.codes, self._rows(name, at), found, self._lies_swapped(at))

    def _place(self, at: _Located) -> Place:
        entry = self._entries[at.source.key][1]
        shape, offset = _of_expert(entry, at.source.expert)
        first, last = at.source.rows or (0, shape[0] if shape else 1)
        offset += first * math.prod(shape[1:]) * entry.dtype.itemsize
        shape = (last - first, *shape[1:])
        return Place(at.file, offset, shape, entry.dtype, at.source.transposed)

    def _file(self, path: Path) -> WeightFile:
        if self._open_file is None or self._open_path != path:
            self._open_file = None  # one at a time: an old .bin is not mapped but loaded
            self._open_file = _open(path)
            self._open_path = path
        return self._open_file

    def _locate(self, listed_in: Path) -> dict[str, _Located]:
        entries: dict[str, tuple[Path, Entry]] = {}
        for path in self.weight_files:
            entries.update({k: (path, e) for k, e in self._file(path).entries.items()})
        if listed_in.name.endswith(".index.json"):
            # Flax's index has slashes between the parts.
            lost = [k for k in _weight_map(listed_in) if k.replace("/", ".") not in entries]
            if lost:
                raise SourceError(
                    f"{listed_in} lists the tensor {lost[0]}{_more(lost)}, which its shard does "
                    "not contain; download the model again"
                )
        self._entries = entries
        names = naming(self.config, entries)
        self._fused = _fused(names.source(name) for name in param_records(self.config))
        tied = self.config.tie_word_embeddings and names.head.key in entries
        if tied:
            self._untie_if_different(names, entries)
        located: dict[str, _Located] = {}
        missing: list[str] = []
        coded: dict[str, Codes] = {}
        modules = {} if self.scheme is None else _modules(entries, self.scheme.joint)
        for name, record in param_records(self.config).items():
            source = names.source(name)
            if name == TOKEN_TABLE and source.key not in entries and tied:
                source = names.head  # saved once, under its other name
            lies = None if self.scheme is None else self.scheme.lies(source)
            if (
                self.scheme is not None
                and lies is not None
                and name != TOKEN_TABLE
                and self.scheme.holds(modules.get(lies[0], {}))
            ):
                module, transposed = lies
                shape = record.shape if transposed else record.shape[::-1]
                if module not in coded:
                    coded[module] = self._codes(source, module, shape, modules[module])
                codes = coded[module]
                path, entry = entries[self._tensor(module, codes.tensors[0])]
                offset = _of_expert(entry, source.expert)[1]
                located[name] = _Located(path, offset, source, module, codes, transposed)
                continue
            if source.key not in entries:
                missing.append(source.key)
                continue
            path, entry = entries[source.key]
            self._check(path, entry, source, record)
            located[name] = _Located(path, entry.offset, source)
        missing = list(dict.fromkeys(missing))  # of one tensor several parameters may be parts
        if missing:
            raise SourceError(
                f"{listed_in}: the tensor {missing[0]}{_more(missing)} is missing, which "
                f"{self.directory / 'config.json'} calls for; download the model again"
            )
        used = {at.source.key for at in located.values()} | {names.head.key}
        for module, codes in coded.items():
            assert self.scheme is not None
            tensors = (*codes.tensors, *self.scheme.unused)
            used |= {self._tensor(module, tensor) for tensor in tensors}
        # Of matrices that stay as they are, and of the cache's values and keys.
        if self.scheme is not None:
            last = self.scheme.unused | {"k_scale", "v_scale"}
            used |= {k for k in entries if k.rpartition(".")[2] in last}
        family = family_of(self.config)
        unexpected = [k for k in entries if k not in used and not family.ignored(self.config, k)]
        if unexpected:
            raise SourceError(
                f"{entries[unexpected[0]][0]}: unexpected tensor {unexpected[0]}"
                f"{_more(unexpected)}; {self.directory / 'config.json'} describes a model "
                "without it"
            )
        return located

    def _codes(
        self, source: Source, module: str, shape: tuple[int, ...], tensors: Mapping[str, Entry]
    ) -> Codes:
        """``shape``: (n_in, n_out) of the parameter, which may be a part of the module."""
        n_in, n_out = shape
        if source.rows is not None:
            n_out = self._fused[source.key].rows
        experts = None if source.expert is None else self._fused[source.key].experts

        def read(tensor: str) -> np.ndarray:
            key = self._tensor(module, tensor)
            return self._file(self._entries[key][0]).array(key)

        where = str(self._entries[self._tensor(module, next(iter(tensors)))][0])
        assert self.scheme is not None
        return self.scheme.codes(Module(module, n_in, n_out, tensors, read, where, experts))

    def _check(self, path: Path, entry: Entry, source: Source, record: Param) -> None:
        expected = record.shape[::-1] if source.transposed else record.shape
        if source.rows is not None:
            expected = (self._fused[source.key].rows, *expected[1:])
        if source.expert is not None:
            expected = (self._fused[source.key].experts, *expected)
        if entry.shape != expected:
            raise SourceError(
                f"{path}: tensor {source.key} has shape {list(entry.shape)}, expected "
                f"{list(expected)} by {self.directory / 'config.json'}; the weights and the "
                "config are not of the same model"
            )
        if entry.dtype not in DTYPES.values():
            raise SourceError(
                f"{path}: tensor {source.key} has dtype {entry.dtype}, which is not a dtype of "
                "weights: of codes, quantization_config in config.json says how they are meant"
            )

    def _untie_if_different(self, names: Naming, entries: dict[str, tuple[Path, Entry]]) -> None:
        """A head of its own counts, whatever the config says, if it differs: transformers' rule."""
        table = names.source(TOKEN_TABLE)
        if table.key not in entries:
            return
        (file, entry), (other, own) = entries[table.key], entries[names.head.key]
        shape = own.shape[::-1] if names.head.transposed else own.shape
        left, right = (file, table.key), (other, names.head.key)
        if entry.shape == shape and self._same(left, right, names.head.transposed):
            return
        untied: Any = dataclasses.replace(self.config, tie_word_embeddings=False)  # type: ignore[type-var]
        self.config = untied
        self.changed = {"tie_word_embeddings": False}

    def _same(self, first: tuple[Path, str], second: tuple[Path, str], transposed: bool) -> bool:
        # Both are held: of a loaded format, only one file is open at a time.
        left, right = (self._file(path).array(key) for path, key in (first, second))
        right = right.T if transposed else right
        rows = max(1, (8 << 20) // (4 * left.shape[1]))
        return all(
            np.array_equal(left[i : i + rows], right[i : i + rows])
            for i in range(0, len(left), rows)
        )


def read_scheme(path: Path) -> Scheme | None:
    """How the matrices of a checkpoint are quantised; None: they are not.

    Args:
        path: Of the directory, or its ``config.json``.

    Raises:
        SourceError: in a way that is not read.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        return scheme_of(read_json(file))
    except SourceError as error:
        raise SourceError(f"{file}: {error}") from error


def _fused(sources: Iterable[Source]) -> dict[str, _Fused]:
    """Of the tensors that several parameters are parts of, by their keys."""
    found: dict[str, _Fused] = {}
    for source in sources:
        if source.rows is not None or source.expert is not None:
            rows, experts = found.get(source.key, (0, 0))
            last = 0 if source.rows is None else source.rows[1]
            number = 0 if source.expert is None else source.expert + 1
            found[source.key] = _Fused(max(rows, last), max(experts, number))
    return found


def _of_expert(entry: Entry, expert: int | None) -> tuple[tuple[int, ...], int]:
    """The shape and offset of an expert's part of a tensor; None: of all of it."""
    if expert is None:
        return entry.shape, entry.offset
    shape = entry.shape[1:]
    return shape, entry.offset + expert * math.prod(shape) * entry.dtype.itemsize


def _modules(entries: Mapping[str, tuple[Path, Entry]], joint: str) -> dict[str, dict[str, Entry]]:
    """Module -> its tensors by what follows its name: ``weight``, ``weight.absmax``."""
    found: dict[str, dict[str, Entry]] = {}
    for key, (_, entry) in entries.items():
        module, weight, rest = key.partition(".weight.")
        if not weight:
            module, _, rest = key.rpartition(joint)
        found.setdefault(module, {})[f"weight.{rest}" if weight else rest] = entry
    return found


def is_model_directory(directory: Path) -> bool:
    """Whether there are a config and weights, whatever is in them."""
    return (directory / "config.json").is_file() and bool(_weights_in(directory))


def _weights_in(directory: Path) -> list[Path]:
    """Files, or the directory of an Orbax checkpoint: at most two levels below."""
    found = [directory / n for n in WEIGHT_FILES if (directory / n).is_file()]
    patterns = ("", "*/", "*/*/")
    return found or [
        file.parent for p in patterns for file in sorted(directory.glob(f"{p}{_ORBAX_FILE}"))
    ]


def facts_of(files: Iterable[Path]) -> str:
    """Hexadecimal, of which files they are and when they were last changed.

    Whoever sets the time of a file's content back changes the time of its status.

    Raises:
        SourceError: one of them is gone.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        try:
            found = path.stat()
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error
        times = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
        digest.update(f"{path.name} {found.st_ino} {times}\n".encode())
    return digest.hexdigest()


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from (p for p in path.rglob("*") if p.is_file())
        else:
            yield path


def not_a_model(directory: Path) -> str:
    """Why :func:`is_model_directory` says no."""
    if (directory / "config.json").is_file():
        return (
            f"{directory} is not a model directory: it has a config.json, but no weights "
            f"({', '.join(WEIGHT_FILES)}, or an Orbax checkpoint)"
        )
    return (
        f"{directory} is not a model directory: it has neither the manifest of a weight store nor "
        "a config.json with weights beside it"
    )


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_name(name: str) -> bool:
    """Whether ``name`` has the form ``organisation/model``."""
    return _HUB_NAME.fullmatch(name) is not None


def download(name: str) -> Path:
    """The local copy of the hub's model ``name``, fetched where it is not there yet.

    Raises:
        ModelNotFoundError: it could not be had; the message says why.
    """
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        allow = ["config.json", *COMPANION_FILES, *patterns]
        return Path(snapshot_download(name, allow_patterns=allow))

    try:
        directory = fetch("model.safetensors", "model-*.safetensors", WEIGHT_FILES[1])
        if not any(directory.glob("*.safetensors")):
            directory = fetch("pytorch_model.bin", "pytorch_model-*.bin", WEIGHT_FILES[3])
    except Exception as error:  # the hub client's own errors and its HTTP library's
        reason = str(error).strip().partition("\n")[0]
        raise ModelNotFoundError(
            f"no model {name!r}: there is no such directory, and from the Hugging Face hub came "
            f"{type(error).__name__}: {reason}"
        ) from error
    if not is_model_directory(directory):
        raise ModelNotFoundError(
            f"no model {name!r}: there is no such directory, and the Hugging Face hub's copy at "
            f"{directory} lacks config.json or weights ({', '.join(WEIGHT_FILES)})"
        )
    return directory


def _open(path: Path) -> WeightFile:
    try:
        if path.is_dir():
            return flax_files.OrbaxParams(path)
        if path.suffix == ".msgpack":
            return flax_files.MsgpackFile(path)
        return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        mapping = read_json(index)["weight_map"]
        if not all(isinstance(shard, str) for shard in mapping.values()):
            raise ValueError("a shard whose name is not text")
        return dict(mapping)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{index} is not an index of weight shards ({type(error).__name__}: {error}); download "
            "the model again"
        ) from error


def _shards(listed_in: Path) -> tuple[Path, ...]:
    if not listed_in.name.endswith(".index.json"):
        return (listed_in,)
    names = sorted(set(_weight_map(listed_in).values()))
    # An index comes from outside: it names files beside itself, and nothing else. They may be
    # links, as in the hub's cache; what they lead to is read as weights or not at all.
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise SourceError(
                f"{listed_in} names the shard {name!r}, which is not a file beside it; download "
                "the model again"
            )
    shards = tuple(listed_in.parent / name for name in names)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise SourceError(
            f"{listed_in} names the shard {missing[0]}{_more(missing)}, which is missing "
            f"({len(shards) - len(missing)} of {len(shards)} are there); download the model again"
        )
    return shards


def _more(items: list[str]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
