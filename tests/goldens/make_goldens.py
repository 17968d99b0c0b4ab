"""Makes the goldens: tiny OPT variants and what transformers answers with them.

Run by hand, seldom; it needs torch and transformers, which the tests of the goldens do not:

    python tests/goldens/make_goldens.py

Each variant becomes a Hugging Face directory written by transformers itself. ``expected.json``
holds the prompts and, for each prompt run alone, transformers' greedy tokens in float32 with the
end-of-text token ignored; ``logits.npz`` holds the logits after the last prompt token. Weights are
random and large, so that greedy output varies and the winner is clear: a seed is taken only if no
step of any prompt is won by less than ``MIN_GAP``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
VOCAB, POSITIONS, NEW_TOKENS = 80, 64, 24
PAD = 1
MIN_GAP = 5e-3

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "ffn_dim": 48,
    "max_position_embeddings": POSITIONS,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    # OPT of every size but one, and OPT-IML.
    "pre_norm": {},
    # OPT-350m: embeddings narrower than the layers, norms after the residual, none at the end.
    "post_norm_projected": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    # Galactica: no biases, norms without parameters, GELU.
    "no_bias_no_affine": {
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
    },
    # Models that were fine-tuned before the final norm was found missing.
    "no_final_norm": {
        "_remove_final_layer_norm": True,
        "enable_bias": False,
        "activation_function": "gelu",
    },
    "untied_projected": {
        "tie_word_embeddings": False,
        "word_embed_proj_dim": 32,
        "activation_function": "gelu_new",
    },
}


def make_prompts() -> list[list[int]]:
    """Unequal lengths; the longest, with its new tokens, uses the last position there is."""
    rng = np.random.default_rng(20230603)
    prompts = [
        rng.integers(4, VOCAB, n).tolist() for n in (1, 2, 5, 9, 17, 30, POSITIONS - NEW_TOKENS)
    ]
    prompts[2][0] = PAD  # the pad token is a token like any other, at the start
    prompts[3][3:5] = [PAD, PAD]  # and in the middle
    prompts[4][0] = 2  # as OPT's tokenizer begins
    return prompts


def make_model(options: dict[str, Any], seed: int) -> transformers.OPTForCausalLM:
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**COMMON, **options)).eval()
    # What a call leaves out, generate() takes from here: also an end-of-text token set to None.
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "layer_norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(0.2 * noise)
            else:
                tensor.copy_(0.3 * noise)
    return model


@torch.no_grad()
def greedy(
    model: transformers.PreTrainedModel, prompt: list[int]
) -> tuple[list[int], np.ndarray, float]:
    """New tokens, the logits after the prompt, and the smallest lead of a winner over the next."""
    ids = torch.tensor([prompt])
    # Without a mask, generate() would take the pad token for padding.
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        ),
    )
    logits = torch.cat(answer.logits).float()
    first, second = logits.topk(2).values.T
    tokens = answer.sequences[0, len(prompt) :].tolist()
    assert len(tokens) == NEW_TOKENS
    return tokens, logits[0].numpy(), float((first - second).min())


def main() -> None:
    prompts = make_prompts()
    expected: dict[str, Any] = {
        "made_with": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        },
        "prompts": prompts,
        "variants": {},
    }
    last_logits = {}
    for name, options in VARIANTS.items():
        for seed in range(100):
            model = make_model(options, seed)
            tokens, logits, gaps = zip(*(greedy(model, p) for p in prompts), strict=True)
            varied = min(len(set(t)) for t in tokens)
            if min(gaps) >= MIN_GAP and varied >= 5:
                break
        else:
            raise SystemExit(f"{name}: no seed has clear winners")
        # The tests are to know what transformers takes for the end, not what this script used.
        model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
        model.save_pretrained(HERE / name)
        expected["variants"][name] = {
            "seed": seed,
            "min_gap": round(min(gaps), 5),
            "tokens": list(tokens),
        }
        last_logits[name] = np.stack(logits)
        print(f"{name}: seed {seed}, min gap {min(gaps):.4f}, at least {varied} different tokens")
    np.savez_compressed(HERE / "logits.npz", **last_logits)
    (HERE / "expected.json").write_text(readable(expected), encoding="utf-8")


def readable(expected: dict[str, Any]) -> str:
    """JSON with lists of numbers on one line each, so that a change can be read."""
    text = json.dumps(expected, indent=1)
    return (
        re.sub(
            r"\[[\d,\s]*\]",
            lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"),
            text,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
