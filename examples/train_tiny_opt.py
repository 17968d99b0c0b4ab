"""Trains a tiny OPT on a text and writes it as a Hugging Face model directory.

This made the demo model (``flexgen_jax/demo_model``). It also shows that ``opt.forward`` is an
ordinary pure function of its parameters: the loss below differentiates it, and the only
regulariser, dropping weights at random, is a function from parameters to parameters.

    pip install "flexgen-jax[train]"
    python examples/train_tiny_opt.py --text shakespeare.txt --out tiny-opt

Takes about 20 minutes on two quiet cores; ``--minutes`` sets a limit. The learning rate then
follows the clock, so that a short run is also annealed to its end.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from flexgen_jax.models import opt
from flexgen_jax.models.opt import OPTConfig
from flexgen_jax.models.params import flatten, nest, param_shapes

# In OPT's order: their places are their ids. </s> opens a sequence and also ends one.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
PAD, END = 1, 2


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE, which therefore never needs ``<unk>``; prepends ``</s>`` as OPT's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A",
        pair="</s> $A </s> $B:1",
        special_tokens=[("</s>", END)],
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def speech_starts(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of ``text``, and the index of the first token of each paragraph."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    first_of_char = {start: index for index, (start, _) in reversed([*enumerate(encoding.offsets)])}
    chars = [0, *(match.end() for match in re.finditer(r"\n\n+", text))]
    starts = [first_of_char[c] for c in chars if c in first_of_char]
    return np.asarray(encoding.ids, np.int32), np.asarray(starts, np.int64)


def passages(
    tokens: np.ndarray, starts: np.ndarray, mean_length: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Endless passages: some whole speeches in a row from a random place, each opened by ``</s>``.

    Each passage ends where a speech ends, so the model learns where it may stop.
    """
    while True:
        first = rng.integers(len(starts))
        wanted = starts[first] + rng.exponential(mean_length)
        last = np.searchsorted(starts, wanted, side="right")
        stop = starts[last] if last < len(starts) else len(tokens)
        yield np.concatenate([[END], tokens[starts[first] : stop]]).astype(np.int32)


def sequences(source: Iterator[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Endless rows of ``length`` tokens; each starts with a passage, and more fill it up."""
    while True:
        parts, total = [], 0
        while total < length:
            parts.append(next(source))
            total += len(parts[-1])
        yield np.concatenate(parts)[:length]


def drop_weights(params: opt.Params, key: jax.Array, rate: float) -> opt.Params:
    """Zeroes a share of each kernel's entries and scales up the rest (DropConnect).

    Wan et al. 2013. Unlike dropout of activations it needs nothing inside the model.
    """
    flat = flatten(params)
    kernels = [name for name in flat if name.endswith(".kernel")]
    for subkey, name in zip(jax.random.split(key, len(kernels)), kernels, strict=True):
        keep = jax.random.bernoulli(subkey, 1 - rate, flat[name].shape)
        flat[name] = jnp.where(keep, flat[name] / (1 - rate), 0)
    return nest(flat)


def negative_log_likelihood(params: opt.Params, rows: jax.Array, config: OPTConfig) -> jax.Array:
    """Nats of each token of ``rows`` but the first: ``(batch, length - 1)``."""
    logits = opt.forward(params, rows[:, :-1], config)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])


def held_out_nats(
    params: opt.Params, tokens: np.ndarray, context: int, config: OPTConfig, batch_size: int = 8
) -> float:
    """Total nats of ``tokens``, in pieces that each follow ``</s>`` and see nothing before it."""
    count = -(-len(tokens) // context)
    count = -(-count // batch_size) * batch_size
    rows = np.full((count, context + 1), PAD, np.int32)
    rows[:, 0] = END
    counted = np.zeros((count, context), bool)
    for i in range(0, len(tokens), context):
        piece = tokens[i : i + context]
        rows[i // context, 1 : len(piece) + 1] = piece
        counted[i // context, : len(piece)] = True
    total = 0.0
    for i in range(0, count, batch_size):
        nats = _jitted_nats(params, rows[i : i + batch_size], config)
        total += float(np.asarray(nats, np.float64)[counted[i : i + batch_size]].sum())
    return total


_jitted_nats = jax.jit(negative_log_likelihood, static_argnames="config")


def make_optimizer(weight_decay: float) -> optax.GradientTransformation:
    """Muon for the kernels and Adam for everything else, at a learning rate of one.

    Muon (Jordan et al. 2024) reaches here in 1,500 steps what AdamW reaches in 2,000.
    """

    def kernels(params: opt.Params) -> Any:
        """The axes to orthogonalise over; None where Adam takes over."""
        marked = {
            name: contrib.MuonDimensionNumbers() if name.endswith(".kernel") else None
            for name in flatten(params)
        }
        return nest(marked)

    muon = contrib.muon(
        1.0,
        adam_b2=0.99,
        weight_decay=weight_decay,
        # Updates as large as Adam's, so that one learning rate serves both.
        consistent_rms=0.2,
        muon_weight_dimension_numbers=kernels,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def make_update(config: OPTConfig, options: argparse.Namespace) -> tuple[Any, Any]:
    """``(optimizer, update)``; the learning rate is an argument, for it follows the clock."""
    optimizer = make_optimizer(options.weight_decay)

    def loss(params: opt.Params, rows: jax.Array, key: jax.Array) -> jax.Array:
        if options.drop:
            params = drop_weights(params, key, options.drop)
        return negative_log_likelihood(params, rows, config).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(
        params: opt.Params, state: Any, rows: jax.Array, key: jax.Array, learning_rate: jax.Array
    ) -> tuple[opt.Params, Any, jax.Array]:
        nats, gradient = jax.value_and_grad(loss)(params, rows, key)
        step, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda p, s: p + learning_rate * s, params, step)
        return params, state, nats

    return optimizer, update


def learning_rate(options: argparse.Namespace, step: int, seconds: float) -> float:
    """Linear warm-up, then a cosine down to zero at the last step or the last minute."""
    warm = min(1.0, (step + 1) / max(1, options.warmup))
    progress = step / options.steps
    if options.minutes is not None:
        progress = max(progress, seconds / (60 * options.minutes))
    return options.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What the training came to; the figures of the model card."""

    config: OPTConfig
    steps: int
    seconds: float
    train_tokens: int
    epochs: float
    held_out_context: int
    held_out_tokens: int
    held_out_loss: float  # nats per token
    perplexity: float  # per token
    bits_per_byte: float
    best_step: int


def divide(text: str) -> tuple[str, str]:
    """The first 95% of ``text``, to train on, and the rest, to be held out."""
    cut = text.rfind("\n\n", 0, int(len(text) * 0.95)) + 2
    if cut < 2:
        raise SystemExit("the text needs paragraphs, separated by empty lines")
    return text[:cut], text[cut:]


def train(text: str, options: argparse.Namespace) -> tuple[opt.Params, Tokenizer, Result]:
    """Trains on the first 95% of ``text``; returns the parameters that were best on the rest."""
    seen, unseen = divide(text)
    tokenizer = train_tokenizer(seen, options.vocab)
    tokens, starts = speech_starts(tokenizer, seen)
    held_out = encode(tokenizer, unseen)
    if not len(held_out):
        raise SystemExit("the text is too short: its last 5% is empty")
    config = OPTConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        ffn_dim=options.ffn,
        max_position_embeddings=options.positions,
    )
    params = opt.init_params(jax.random.key(options.seed), config)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{len(seen):,} characters = {len(tokens):,} tokens ({len(starts):,} paragraphs) to train "
        f"on, {len(held_out):,} tokens held out; {config.vocab_size} tokens in the vocabulary; "
        f"{count / 1e6:.2f} M parameters",
        flush=True,
    )
    optimizer, update = make_update(config, options)
    state = optimizer.init(params)
    rng = np.random.default_rng(options.seed)
    source = passages(tokens, starts, options.passage, rng)
    rows_of = {n: sequences(source, n + 1) for n in {options.context, options.positions}}
    bytes_per_held_out = len(unseen.encode("utf-8"))

    best: tuple[float, int, opt.Params] | None = None
    started, trained, recent = time.monotonic(), 0, []
    for step in range(options.steps):
        seconds = time.monotonic() - started
        # One batch in eight is of full length, so that every position is trained.
        length = options.positions if step % 8 == 7 else options.context
        batch = max(1, options.batch * options.context // length)
        rows = np.stack([next(rows_of[length]) for _ in range(batch)])
        rate = learning_rate(options, step, seconds)
        key = jax.random.fold_in(jax.random.key(options.seed + 1), step)
        params, state, nats = update(params, state, rows, key, jnp.float32(rate))
        recent.append(float(nats))
        trained += rows[:, 1:].size
        last = step + 1 == options.steps or (
            options.minutes is not None and seconds >= 60 * options.minutes
        )
        if last or (step + 1) % options.evaluate_every == 0:
            total = held_out_nats(params, held_out, options.context, config)
            loss = total / len(held_out)
            # NaN is no improvement; the first is kept whatever it is.
            if best is None or loss < best[0]:
                best = (loss, step + 1, jax.tree.map(np.asarray, jax.tree.map(jnp.copy, params)))
            print(
                f"step {step + 1:5d}  {trained / len(tokens):5.2f} epochs  "
                f"{time.monotonic() - started:6.0f} s  rate {rate:.2e}  "
                f"train {np.mean(recent):.3f}  held out {loss:.3f} nats/token, "
                f"{total / math.log(2) / bytes_per_held_out:.3f} bits/byte"
                f"{'  *' if best[1] == step + 1 else ''}",
                flush=True,
            )
            recent = []
        if last:
            break
    assert best is not None
    _, best_step, params = best
    params = jax.tree.map(lambda x: x.astype(np.float16), params)  # what is saved is what is judged
    judged = jax.tree.map(lambda x: x.astype(np.float32), params)
    nats = held_out_nats(judged, held_out, options.positions, config)
    result = Result(
        config=config,
        steps=step + 1,
        seconds=time.monotonic() - started,
        train_tokens=trained,
        epochs=trained / len(tokens),
        held_out_context=options.positions,
        held_out_tokens=len(held_out),
        held_out_loss=nats / len(held_out),
        perplexity=math.exp(min(700.0, nats / len(held_out))),
        bits_per_byte=nats / math.log(2) / bytes_per_held_out,
        best_step=best_step,
    )
    return params, tokenizer, result


def hugging_face_tensors(params: opt.Params, config: OPTConfig) -> dict[str, np.ndarray]:
    """Hugging Face's names, and kernels as torch has them: (out, in)."""
    modules = {
        "embed.tokens": "embed_tokens.weight",
        "embed.positions": "embed_positions.weight",
        "embed.project_in": "project_in",
        "head.norm": "final_layer_norm",
        "head.project_out": "project_out",
    }
    parts = {
        "attention_norm": "self_attn_layer_norm",
        "mlp_norm": "final_layer_norm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "fc1": "fc1",
        "fc2": "fc2",
    }
    for i in range(config.num_hidden_layers):
        modules |= {f"layer_{i}.{ours}": f"layers.{i}.{theirs}" for ours, theirs in parts.items()}
    tensors = {}
    for name, leaf in flatten(params).items():
        array = np.asarray(leaf)
        module, _, kind = name.rpartition(".")
        if name in modules:
            tensors[f"model.decoder.{modules[name]}"] = array
        elif name == "head.tokens":
            tensors["lm_head.weight"] = array
        elif kind == "bias":
            tensors[f"model.decoder.{modules[module]}.bias"] = array
        else:
            weight = array.T if kind == "kernel" else array
            tensors[f"model.decoder.{modules[module]}.weight"] = np.ascontiguousarray(weight)
    return tensors


def save(out: Path, params: opt.Params, tokenizer: Tokenizer, result: Result, card: str) -> None:
    """Writes the directory that transformers and flexgen-jax load; files there are replaced."""
    config = result.config
    out.mkdir(parents=True, exist_ok=True)
    tensors = hugging_face_tensors(params, config)
    dtype = str(next(iter(tensors.values())).dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # it is made readable by its owner only
    tokenizer.save(str(out / "tokenizer.json"))
    # Dropout is torch's matter, and transformers' default is not zero.
    extra = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "dtype": dtype}
    named = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    documents = {
        "config.json": {**config.to_json(), **extra},
        "generation_config.json": {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
        },
        "special_tokens_map.json": named,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "added_tokens_decoder": {
                str(i): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for i, token in enumerate(SPECIAL_TOKENS)
            },
            **named,
        },
    }
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card, encoding="utf-8")


def model_card(options: argparse.Namespace, result: Result) -> str:
    """The README.md of the model."""
    config = result.config
    count = sum(math.prod(shape) for shape in param_shapes(config).values())
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
tags: [opt, jax, flexgen-jax, demo]
---
# {options.name}

A language model of the OPT architecture with {count / 1e6:.1f} million parameters, small enough to
ship with flexgen-jax and to run anywhere. It writes lines that sound like its text and mean
little. It is there to show and to test software; it is good for nothing else.

- **Text:** {options.origin}
- **Tokenizer:** byte-level BPE with {config.vocab_size} tokens, trained on the same text. Like
  OPT's, it puts `</s>`, which also ends a text, before a prompt.
- **Shape:** {config.num_hidden_layers} layers, hidden size {config.hidden_size}, \
{config.num_attention_heads} heads, ffn {config.ffn_dim}, \
{config.max_position_embeddings} positions; pre-layer-norm,
  ReLU, tied embeddings. Weights in float16.
- **Training:** `examples/train_tiny_opt.py` of flexgen-jax: Muon and Adam, warm-up and
  cosine, at each step {options.drop:.0%} of the kernels' entries dropped. {result.steps:,} steps, \
{result.train_tokens / 1e6:.1f} million tokens ({result.epochs:.1f} epochs),
  {result.seconds / 60:.0f} minutes on a CPU. The weights are those of step {result.best_step:,}, \
the best on the last 5%
  of the text, which was held out.
- **Held-out text** (`held_out.txt`)**:** {result.held_out_tokens:,} tokens, in pieces of \
{result.held_out_context}: {result.held_out_loss:.3f} nats per token, perplexity
  {result.perplexity:.1f} per token, {result.bits_per_byte:.3f} bits per byte.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a tiny OPT on a text; write it as a Hugging Face model directory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--text",
        type=Path,
        required=True,
        help="a text file (UTF-8), paragraphs separated by empty lines",
    )
    add("--out", type=Path, default=Path("tiny-opt"), help="the directory to write")
    add("--name", default="tiny-opt-shakespeare", help="the model's name in its card")
    add(
        "--origin",
        default="about 1 MB of the plays of William Shakespeare, which are in the public domain.",
        help="what the card says about the text",
    )
    add("--steps", type=int, default=1500, help="updates at most")
    add("--minutes", type=float, default=None, help="stop after this time, annealed")
    add("--vocab", type=int, default=1536, help="tokens in the vocabulary, at least 260")
    add("--hidden", type=int, default=192)
    add("--layers", type=int, default=6)
    add("--heads", type=int, default=6)
    add("--ffn", type=int, default=768)
    add("--positions", type=int, default=512, help="the longest sequence the model takes")
    add("--context", type=int, default=256, help="tokens per row of most batches")
    add("--batch", type=int, default=8, help="rows per batch")
    add("--passage", type=int, default=250, help="mean tokens of a passage before it ends")
    add("--learning-rate", type=float, default=4e-3)
    add("--warmup", type=int, default=100, help="steps of linear warm-up")
    add("--weight-decay", type=float, default=0.1)
    add("--drop", type=float, default=0.15, help="share of the kernels' entries dropped per step")
    add("--evaluate-every", type=int, default=100, help="steps between looks at the held-out text")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in ("steps", "context", "batch", "passage", "evaluate_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.minutes is not None and options.minutes <= 0:
        parser.error("--minutes must be above 0")
    if options.context > options.positions:
        parser.error("--context must not exceed --positions")
    if not 0 <= options.drop < 1:
        parser.error("--drop must be at least 0 and below 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    text = options.text.read_text(encoding="utf-8")
    params, tokenizer, result = train(text, options)
    save(options.out, params, tokenizer, result, model_card(options, result))
    (options.out / "held_out.txt").write_text(divide(text)[1], encoding="utf-8")
    figures = {k: v for k, v in dataclasses.asdict(result).items() if k != "config"}
    print(f"wrote {options.out}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
