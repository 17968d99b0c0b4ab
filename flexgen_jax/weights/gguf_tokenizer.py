"""The tokenizer and the chat template that a GGUF file has, as other models' files have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_jax.weights.tensor_file import SourceError

_CONTROL, _USER_DEFINED = 3, 4  # GGUF's types of tokens that are matched whole
_KEY = "tokenizer.ggml"
_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
# How a text is cut into words, of the tokenizers called so; from their published files.
_DIGITS = {"smollm"}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
}


def generation_config(fields: Mapping[str, Any]) -> dict[str, int]:
    """Which tokens begin, end and pad, where the file says so."""
    return {
        f"{ours}_token_id": fields[f"{_KEY}.{theirs}_token_id"]
        for ours, theirs in _NAMES.items()
        if ours != "unk" and f"{_KEY}.{theirs}_token_id" in fields
    }


def chat_files(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``generation_config.json``, and ``tokenizer_config.json`` with the chat template."""
    tokens = fields.get(f"{_KEY}.tokens", [])
    special = {
        f"{ours}_token": tokens[fields[f"{_KEY}.{theirs}_token_id"]]
        for ours, theirs in _NAMES.items()
        if fields.get(f"{_KEY}.{theirs}_token_id", len(tokens)) < len(tokens)
    }
    config: dict[str, Any] = {"add_bos_token": bool(fields.get(f"{_KEY}.add_bos_token")), **special}
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return {
        "generation_config.json": generation_config(fields),
        "tokenizer_config.json": config,
    }


def make_tokenizer(fields: Mapping[str, Any]) -> Any | None:
    """A byte-level BPE of the package ``tokenizers``; None: the file has no tokenizer.

    Raises:
        SourceError: a tokenizer of another kind.
    """
    model = fields.get(f"{_KEY}.model")
    if model is None:
        return None
    kind = str(fields.get(f"{_KEY}.pre", "default"))
    if model != "gpt2" or (kind not in _DIGITS and kind not in _SPLITS):
        known = ", ".join(sorted({*_DIGITS, *_SPLITS}))
        raise SourceError(
            f"the GGUF file's tokenizer is {model!r} with words cut as {kind!r}; read are 'gpt2' "
            f"(byte-level BPE) with {known}: take the model's safetensors and tokenizer.json"
        )
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )

    tokens = fields[f"{_KEY}.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields[f"{_KEY}.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    prefix = bool(fields.get(f"{_KEY}.add_space_prefix", False))
    if kind in _DIGITS:
        parts = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        ]
    else:
        parts = [
            pre_tokenizers.Split(Regex(_SPLITS[kind]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, fields[f"{_KEY}.token_type"], strict=True):
        if type_ == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif type_ == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if fields.get(f"{_KEY}.add_bos_token"):
        bos = tokens[fields[f"{_KEY}.bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, fields[f"{_KEY}.bos_token_id"])],
        )
    return tokenizer
