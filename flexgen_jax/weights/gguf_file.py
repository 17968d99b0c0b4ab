"""A model in one GGUF file, used in place: weights in their blocks, tokenizer and chat template.

The package ``gguf`` reads the header. What it says of the model becomes the files that lie beside
the weights of other models (``config.json``, ``tokenizer.json``), a few megabytes in the cache
directory; the weights stay where they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexgen_jax.models.family import Config, Source
from flexgen_jax.models.params import expert_numbers, param_records
from flexgen_jax.models.registry import (
    GGUF_ARCHITECTURES,
    GGUF_NORMED_GATES,
    GGUF_WITH_EXPERTS,
    family_of,
    load_config,
)
from flexgen_jax.weights import manifest
from flexgen_jax.weights.gguf_header import check_header
from flexgen_jax.weights.gguf_tokenizer import chat_files, generation_config, make_tokenizer
from flexgen_jax.weights.in_place import Needed
from flexgen_jax.weights.published_format import Leaf, PublishedFormat, float_leaf
from flexgen_jax.weights.stored_model import StoredModel
from flexgen_jax.weights.tensor_file import ModelNotFoundError, SourceError
from flexgen_jax.weights.weight_format import LAYOUTS, WeightFormat
from storage.array_file import ArrayFile, Stamp
from storage.json_text import digest_of

_OF_THE_MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_OF_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROUTERS = ("mlp.gate", "block_sparse_moe.gate")
_EXPERT = re.compile(r"\w+\.experts\.\d+\.(\w+)")
_OF_AN_EXPERT = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_VERSION = 1  # raise it when the files beside come out otherwise


@dataclasses.dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]  # rows first
    kind: str
    offset: int
    nbytes: int


def is_gguf(path: str | Path) -> bool:
    """Whether ``path`` is a file that says of itself that it is one."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


class GGUFFile:
    """The header of a GGUF file, checked: no tensor lies outside the file.

    Attributes:
        fields: The metadata. ``tensors``: By GGUF's names.

    Raises:
        ModelNotFoundError: the package ``gguf`` is missing.
        SourceError: it is damaged, or cannot be read; the message says why.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ModuleNotFoundError as error:
            raise ModelNotFoundError(
                f"{path} is a GGUF file, which takes the package gguf to read: pip install "
                "'flexgen-jax[gguf]'"
            ) from error
        self.path = path
        try:
            check_header(path)
            # Damaged counts make NumPy warn of numbers that overflow before anything is wrong.
            with np.errstate(all="ignore"):
                reader = gguf.GGUFReader(path)
                self.fields: Mapping[str, Any] = {
                    name: field.contents() for name, field in reader.fields.items()
                }
                size = path.stat().st_size
                self.tensors = {t.name: self._tensor(t, size) for t in reader.tensors}
        except SourceError:
            raise
        except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError) as error:
            raise self._damaged(error) from error
        except (RecursionError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> SourceError:
        why = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        return SourceError(
            f"{self.path} is not a complete GGUF file ({why}); download the model again"
        )

    def _tensor(self, entry: Any, size: int) -> _Tensor:
        import gguf

        shape = tuple(int(n) for n in reversed(entry.shape))
        elements, nbytes = gguf.GGML_QUANT_SIZES[entry.tensor_type]
        if not shape or math.prod(shape) % elements or shape[-1] % elements:
            raise ValueError(f"tensor {entry.name} has shape {list(shape)}")
        total, offset = math.prod(shape) // elements * nbytes, int(entry.data_offset)
        if not 0 <= offset <= size - total:
            raise ValueError(f"tensor {entry.name} lies outside the file")
        return _Tensor(shape, entry.tensor_type.name, offset, total)

    def __getitem__(self, key: str) -> Any:
        if key not in self.fields:
            raise SourceError(f"{self.path} has no {key}, which its model takes to be run")
        return self.fields[key]

    @property
    def architecture(self) -> str:
        """As GGUF calls it."""
        return str(self["general.architecture"])

    @property
    def family(self) -> tuple[str, str, bool]:
        """What the registry says of the architecture.

        Raises:
            SourceError: one that is not read.
        """
        name = self.architecture
        known = GGUF_WITH_EXPERTS if self.experts else GGUF_ARCHITECTURES
        if name not in known:
            listed = dict.fromkeys([*GGUF_ARCHITECTURES, *GGUF_WITH_EXPERTS])
            raise SourceError(
                f"{self.path} is of the architecture {name!r}"
                f"{' with experts' if self.experts else ''}; read from GGUF are "
                f"{', '.join(listed)}: take the model's safetensors instead"
            )
        return known[name]

    @property
    def experts(self) -> bool:
        """Whether it has some."""
        return bool(self.fields.get(f"{self.architecture}.expert_count"))

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        name, (architecture, model_type, _) = self.architecture, self.family
        scaling = self.fields.get(f"{name}.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.tensors:
            raise SourceError(
                f"{self.path} scales its rotary positions, which is not read from GGUF: take the "
                "model's safetensors instead"
            )
        heads = self[f"{name}.attention.head_count"]
        width = self[f"{name}.embedding_length"]
        return {
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": self.tensors["token_embd.weight"].shape[0]
            if "token_embd.weight" in self.tensors
            else 0,
            "hidden_size": width,
            "intermediate_size": self[f"{name}.feed_forward_length"],
            "num_hidden_layers": self[f"{name}.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": self.fields.get(f"{name}.attention.head_count_kv", heads),
            "head_dim": self.fields.get(f"{name}.attention.key_length", width // max(heads, 1)),
            "max_position_embeddings": self[f"{name}.context_length"],
            "rope_theta": _shortest(self.fields.get(f"{name}.rope.freq_base", 1e4)),
            "rms_norm_eps": _shortest(self[f"{name}.attention.layer_norm_rms_epsilon"]),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in self.tensors,
            **(self._config_of_experts() if self.experts else {}),
            **generation_config(self.fields),
        }

    def _config_of_experts(self) -> dict[str, Any]:
        name = self.architecture
        width = self.fields.get(f"{name}.expert_feed_forward_length")
        clamp = self.fields.get(f"{name}.attention.clamp_kqv")
        return {
            "num_experts": self[f"{name}.expert_count"],
            "num_experts_per_tok": self[f"{name}.expert_used_count"],
            "moe_intermediate_size": width or self[f"{name}.feed_forward_length"],
            "norm_topk_prob": name in GGUF_NORMED_GATES,
            "clip_qkv": _shortest(clamp) if clamp else None,
        }

    def usual_dtype(self) -> str:
        """float32 if all of it is, else bfloat16."""
        kinds = {tensor.kind for tensor in self.tensors.values()}
        return "float32" if kinds <= {"F32"} else "bfloat16"

    def fingerprint(self) -> str:
        """Changes when the file does, without reading the weights."""
        digest = hashlib.sha256(f"gguf {_VERSION} ".encode())
        status = self.path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        with open(self.path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, status.st_size - (1 << 16)))
            digest.update(file.read())
        return digest.hexdigest()


def _shortest(value: float) -> float:
    """The number of which a float32 was made: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def open_gguf(
    path: Path, cache: Path, *, dtype: str | None = None, needed: Needed | None = None
) -> StoredModel:
    """Opens a GGUF file; reads none of the weights.

    Args:
        cache: Where the files go that lie beside other models' weights.
        dtype: That is computed with; None: :meth:`GGUFFile.usual_dtype`.
        needed: As :func:`~flexgen_jax.weights.checkpoint.open_store` has it.

    Raises:
        SourceError: damaged, or what is not read; the message says what to do.
        ConfigError: no model that can be run.
    """
    path = Path(os.path.abspath(path))
    stamp, file = Stamp.of(path), GGUFFile(path)
    fingerprint = file.fingerprint()
    dtype = dtype or file.usual_dtype()
    beside = _files_beside(file, cache / "gguf" / f"{path.stem}-{fingerprint[:16]}")
    config = load_config(beside)
    leaves: dict[str, Leaf] = {}
    files: dict[str, ArrayFile] = {}
    used: set[str] = set()
    for name in param_records(config):
        source = family_of(config).source(config, name)
        tensor_name = _gguf_name(source)
        used.add(tensor_name)
        leaf, array = _leaf(file, config, name, source, tensor_name, dtype)
        leaves[name] = leaf
        for stored in leaf.arrays:
            files[stored] = dataclasses.replace(array, stamp=stamp)
    if left := sorted(file.tensors.keys() - used):
        raise SourceError(
            f"{path} has a tensor {left[0]}, which a model of its architecture does not have here: "
            "take the model's safetensors instead"
        )
    kinds = dict.fromkeys(tensor.kind for tensor in file.tensors.values())
    form = PublishedFormat.of(dtype, leaves, ", ".join(kinds))
    known = manifest.Manifest(
        dtype=dtype,
        source=manifest.Source(path.name, fingerprint),
        tensors=form.entries(config),
        layout=form.layout,
        config=digest_of(file.config()),
    )
    wanted = files if needed is None else needed(config, form)
    arrays = {n: array for n, array in files.items() if n in wanted}
    return StoredModel(beside, config, known, arrays, form)


def _gguf_name(source: Source) -> str:
    whole, _, leaf = source.key.rpartition(".")
    if whole in _OF_THE_MODEL:
        return f"{_OF_THE_MODEL[whole]}.{leaf}"
    if found := _LAYER.fullmatch(source.key):
        module = _OF_A_LAYER.get(found[2])
        if found[2] in _ROUTERS:
            module = "ffn_gate_inp"
        elif expert := _EXPERT.fullmatch(found[2]):
            module = _OF_AN_EXPERT.get(expert[1])
        if module is not None:
            return f"blk.{found[1]}.{module}.{found[3]}"
    return source.key  # which no file has


def _expert_of(config: Config, name: str, tensor: str) -> tuple[int, int] | None:
    """Which of how many experts of ``tensor`` parameter ``name`` is; None: all of it."""
    found = re.match(r"\w+\.expert_(\d+)\.", name)
    numbers = expert_numbers(config)
    if found is None or numbers is None or "_exps." not in tensor:
        return None
    return int(found[1]), numbers[0]


def _leaf(
    file: GGUFFile, config: Config, name: str, source: Source, tensor_name: str, dtype: str
) -> tuple[Leaf, ArrayFile]:
    """How a parameter lies, and where."""
    from flexgen_jax.models.gguf_blocks import BLOCK_SIZES, Blocks, Rotated

    if tensor_name not in file.tensors:
        raise SourceError(
            f"{file.path} has no tensor {tensor_name}, which its model takes; download it again"
        )
    tensor, record = file.tensors[tensor_name], param_records(config)[name]
    expected = record.shape[::-1] if source.transposed else record.shape
    expert = _expert_of(config, name, tensor_name)
    if tensor.shape != (expected if expert is None else (expert[1], *expected)):
        raise SourceError(
            f"{file.path}: tensor {tensor_name} has shape {list(tensor.shape)}, expected "
            f"{list(expected)}{' of each expert' if expert else ''} by its metadata"
        )
    if expert is not None:
        nbytes = tensor.nbytes // expert[1]
        offset = tensor.offset + expert[0] * nbytes
        tensor = dataclasses.replace(tensor, shape=expected, offset=offset, nbytes=nbytes)
    stored = name
    if record.role == "matrix":
        stored = f"{name.rpartition('.')[0]}.{LAYOUTS['out_in']}"
    swapped = source.transposed != WeightFormat.usual(dtype).transposes(config, name)
    heads = 0
    if file.family[2]:
        if ".attn_q." in tensor_name:
            heads = config.num_attention_heads
        elif ".attn_k." in tensor_name:
            heads = config.num_key_value_heads
    if tensor.kind in _FLOATS:
        entry = manifest.TensorEntry.of(tensor.shape, _FLOATS[tensor.kind])
        if heads:
            leaf = Leaf(
                {stored: entry}, lambda a, dtype: Rotated(a[0], heads, swapped), packed=True
            )
        else:
            leaf = float_leaf(stored, entry, dtype, swapped=swapped)
    elif tensor.kind in BLOCK_SIZES:
        elements, nbytes = BLOCK_SIZES[tensor.kind]
        shape = (*tensor.shape[:-1], tensor.shape[-1] // elements * nbytes)
        entry = manifest.TensorEntry.of(shape, "uint8")
        kind = tensor.kind
        leaf = Leaf(
            {stored: entry}, lambda a, dtype: Blocks(a[0], kind, heads, swapped), packed=True
        )
    else:
        raise SourceError(
            f"{file.path}: tensor {tensor_name} is in {tensor.kind}, which is not read; read are "
            f"{', '.join([*_FLOATS, *BLOCK_SIZES])}: take a file of one of these"
        )
    array = ArrayFile(
        file.path.parent,
        file.path,
        entry.shape,
        manifest.dtype_of(entry.dtype),
        entry.nbytes,
        raw=True,
        offset=tensor.offset,
        finite=tensor.kind in _FLOATS,
    )
    return leaf, array


def _files_beside(file: GGUFFile, directory: Path) -> Path:
    """Writes what lies beside other models' weights; it is there whole or not at all."""
    config = file.config()
    if not (directory / "config.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer(file.fields)
        if tokenizer is not None:
            _write(directory / "tokenizer.json", tokenizer.to_str())
        for name, values in chat_files(file.fields).items():
            _write(directory / name, json.dumps(values, allow_nan=False))
        _write(directory / "config.json", json.dumps(config, allow_nan=False))
    return directory


def _write(path: Path, text: str) -> None:
    manifest.write_durably(path, text.encode())
