"""Reads an OPT model in Hugging Face's form: which files, which tensors, under which names.

Or an Orbax checkpoint of its params, with the ``config.json`` in or beside it.

A tensor is handed out in blocks, as the weight store wants it (kernels transposed, dtype
converted), from files that are mapped rather than loaded: what is held in memory is one block.
Knows nothing of the weight store itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flexgen_jax.models.config import OPTConfig
from flexgen_jax.models.params import param_shapes
from flexgen_jax.weights import flax_files
from flexgen_jax.weights.safetensors_file import SafetensorsFile
from flexgen_jax.weights.tensor_file import (
    DTYPES,
    Entry,
    ModelNotFoundError,
    SourceError,
    WeightFile,
)
from flexgen_jax.weights.torch_file import TorchFile

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

# Old checkpoints save the decoder alone, without the language model around it.
_PREFIXES = ("model.decoder.", "decoder.")

# Saved by old versions, needed by nobody.
_HARMLESS = frozenset({"version"})

_BLOCK_NBYTES = 8 << 20
# A transposing block takes at least so many columns of the source: less than a page of each row
# would read the same pages again for the next block.
_MIN_COLUMNS = 512
# Rows transposed at once: numpy's copy of a transposed array is bound by cache misses, and strips
# of this height are 2-4 times faster than the whole.
_STRIP = 16


@dataclasses.dataclass(frozen=True)
class _Located:
    """Where a parameter lies: file, key, and whether it is stored transposed."""

    file: Path
    key: str
    offset: int
    transposed: bool


class HuggingFaceModel:
    """A local directory with ``config.json`` and weights, checked for completeness.

    Args:
        directory: Where it lies.
        name: For people; by default the directory's name.

    Raises:
        ModelNotFoundError: no config or no weights there.
        ConfigError: not an OPT model.
        SourceError: a file is missing or damaged, a tensor is missing, unexpected or misshapen.
    """

    def __init__(self, directory: Path, name: str | None = None) -> None:
        self.directory = directory
        self.name = name or directory.resolve().name
        found = _weights_in(directory)
        if not (directory / "config.json").is_file() or not found:
            raise ModelNotFoundError(not_a_model(directory))
        self.config = OPTConfig.load(directory)
        self.weight_files = _shards(found[0])
        self.companions = tuple(directory / n for n in COMPANION_FILES if (directory / n).is_file())
        self._open_path: Path | None = None
        self._open_file: WeightFile | None = None
        self._located = self._locate(found[0])

    def names(self) -> tuple[str, ...]:
        """Flat names of the parameters in the order in which the files hold them."""
        rank = {file: i for i, file in enumerate(self.weight_files)}
        order = {n: (rank[at.file], at.offset) for n, at in self._located.items()}
        return tuple(sorted(order, key=order.__getitem__))

    def blocks(self, name: str, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
        """The parameter ``name`` in C order and ``dtype``, a few megabytes at a time."""
        at = self._located[name]
        file = self._file(at.file)
        source = file.array(at.key)
        yield from (_transposed_blocks if at.transposed else _blocks)(source, dtype)
        del source
        file.release()

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
        key_of, prefix = _naming(entries)
        located: dict[str, _Located] = {}
        missing: list[str] = []
        for name, shape in param_shapes(self.config).items():
            key, transposed = key_of(name, prefix)
            if key not in entries:
                missing.append(key)
                continue
            path, entry = entries.pop(key)
            expected = shape[::-1] if transposed else shape
            if entry.shape != expected:
                raise SourceError(
                    f"{path}: tensor {key} has shape {list(entry.shape)}, expected "
                    f"{list(expected)} by {self.directory / 'config.json'}; the weights and the "
                    "config are not of the same model"
                )
            if entry.dtype not in DTYPES.values():
                raise SourceError(
                    f"{path}: tensor {key} has dtype {entry.dtype}, which is no weights' dtype"
                )
            located[name] = _Located(path, key, entry.offset, transposed)
        if missing:
            raise SourceError(
                f"{listed_in}: the tensor {missing[0]}{_more(missing)} is missing, which "
                f"{self.directory / 'config.json'} calls for; download the model again"
            )
        if self.config.tie_word_embeddings:
            entries.pop(key_of("head.tokens", prefix)[0], None)
        unexpected = [k for k in entries if k.removeprefix(prefix) not in _HARMLESS]
        if unexpected:
            raise SourceError(
                f"{entries[unexpected[0]][0]}: unexpected tensor {unexpected[0]}"
                f"{_more(unexpected)}; {self.directory / 'config.json'} describes a model "
                "without it"
            )
        return located


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
            f"{directory} is no model: it has a config.json, but no weights "
            f"({', '.join(WEIGHT_FILES)}, or an Orbax checkpoint)"
        )
    return (
        f"{directory} is no model: it has neither the manifest of a weight store nor a "
        "config.json with weights beside it"
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
        mapping = json.loads(index.read_bytes())["weight_map"]
        return {str(k): str(v) for k, v in mapping.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{index} is no index of weight shards ({type(error).__name__}: {error}); download "
            "the model again"
        ) from error


def _shards(listed_in: Path) -> tuple[Path, ...]:
    if not listed_in.name.endswith(".index.json"):
        return (listed_in,)
    names = sorted(set(_weight_map(listed_in).values()))
    # An index comes from outside: it names files beside itself, and nothing else.
    shards = tuple(listed_in.parent / Path(name).name for name in names)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise SourceError(
            f"{listed_in} names the shard {missing[0]}{_more(missing)}, which is missing "
            f"({len(shards) - len(missing)} of {len(shards)} are there); download the model again"
        )
    return shards


def _more(items: list[str]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


_MODULES = {
    "attention_norm": "self_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
}


def torch_key(name: str, prefix: str = _PREFIXES[0]) -> tuple[str, bool]:
    """Hugging Face's name of a parameter, and whether it holds the transpose."""
    if name == "head.tokens":
        return "lm_head.weight", False
    unit, module, *leaf = name.split(".")
    if not leaf:  # embed.tokens, embed.positions
        return f"{prefix}embed_{module}.weight", False
    kind = "bias" if leaf[0] == "bias" else "weight"
    if unit == "head" and module == "norm":
        return f"{prefix}final_layer_norm.{kind}", False
    if unit.startswith("layer_"):
        module = f"layers.{unit.removeprefix('layer_')}.{_MODULES.get(module, module)}"
    return f"{prefix}{module}.{kind}", leaf[0] == "kernel"


def _flax_key(name: str, prefix: str) -> tuple[str, bool]:
    """Likewise, Flax's: its kernels lie as ours do, but for the head's."""
    if name == "head.tokens":
        return f"{prefix.removesuffix('model.decoder.')}lm_head.kernel", True
    key, _ = torch_key(name, prefix)
    whole, _, kind = key.rpartition(".")
    if kind == "weight":
        leaf = name.rpartition(".")[2]
        kind = leaf if leaf in ("kernel", "scale") else "embedding"
    return f"{whole}.{kind}", False


def _own_key(name: str, prefix: str) -> tuple[str, bool]:
    """Likewise, of a tree of our own params."""
    return prefix + name, False


def _naming(entries: Iterable[str]) -> tuple[Callable[[str, str], tuple[str, bool]], str]:
    """Whose names these are, and what stands before them."""
    for key in entries:
        if key.endswith("embed_tokens.embedding"):
            return _flax_key, key.removesuffix("embed_tokens.embedding")
        if key in ("embed.tokens", "params.embed.tokens"):
            return _own_key, key.removesuffix("embed.tokens")
    known = (p for p in _PREFIXES if any(k.startswith(p) for k in entries))
    return torch_key, next(known, _PREFIXES[0])


def _blocks(source: np.ndarray, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK_NBYTES // max(1, math.prod(source.shape[1:]) * dtype.itemsize))
    for start in range(0, len(source), rows):
        yield np.ascontiguousarray(source[start : start + rows], dtype)


def _transposed_blocks(source: np.ndarray, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    n_out, n_in = source.shape
    columns = max(_MIN_COLUMNS, _BLOCK_NBYTES // (n_out * dtype.itemsize))
    for start in range(0, n_in, columns):
        stop = min(n_in, start + columns)
        block = np.empty((stop - start, n_out), dtype)
        for row in range(0, n_out, _STRIP):
            strip = source[row : row + _STRIP, start:stop].astype(dtype, copy=False)
            block[:, row : row + _STRIP] = strip.T
        yield block
