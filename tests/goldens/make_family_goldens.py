"""Makes the goldens of the families: tiny variants and what transformers answers with them.

Run by hand, seldom, in two environments, since transformers 4 and 5 write config.json differently:

    python tests/goldens/make_family_goldens.py        # torch, transformers 5
    python tests/goldens/make_family_goldens.py --v4   # the same torch, transformers 4.57

or, with the names of variants behind it, for those only.

The first run writes a Hugging Face directory for each variant, ``expected.json`` and
``logits.npz``. Stored weights are bfloat16 and random; everything is computed in float32 with
exactly those values. Of each prompt run alone, ``tokens`` are the greedy tokens with every end
token ignored, ``until_end`` those up to and with the first of ``end_tokens``, the ids that
transformers obeys, and ``logits.npz`` has the logits after the prompt. A seed is taken only if no
step of any prompt is won by less than ``MIN_GAP``.

The second run writes ``config_v4.json`` from the same options, and fails unless transformers 4
answers with it as transformers 5 did with ``config.json``.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_goldens import MIN_GAP, NEW_TOKENS, PAD, greedy, readable

HERE = Path(__file__).parent / "families"
VOCAB = 96
LENGTHS = (1, 2, 5, 9, 17, 30, 47, 75)
NOISE = 0.3  # standard deviation of the matrices
# What transformers 4 takes otherwise leaves out the soft cap of Gemma 2's scores.
EAGER = {"attn_implementation": "eager"}

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,  # large, so that another would be noticed
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "tie_word_embeddings": False,
}
TIED: dict[str, Any] = {"tie_word_embeddings": True}
SCALED_PHI3: dict[str, Any] = {
    "model_type": "phi3",
    "max_position_embeddings": 1024,
    "num_hidden_layers": 3,
}
# Options as transformers 4 knows them; transformers 5 understands them and writes them its way.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    # Its head_dim of 8 has frequencies of all three bands: as they are, between, divided by 8.
    "llama3": {
        "model_type": "llama",
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        **TIED,
    },
    "llama_bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1000.0, **TIED},
    "qwen2_window": {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1000.0, **TIED},
    "qwen3_yarn": {
        "model_type": "qwen3",
        "head_dim": 16,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "query_pre_attn_scalar": 12,
        "sliding_window": 8,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 8.0,
        **TIED,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 12,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "rope_theta": 10000.0,
        "rope_local_base_freq": 100.0,
        **TIED,
    },
    "gemma3_scaled": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 12,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_theta": 1000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        **TIED,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 16, "original_max_position_embeddings": 128},
    # Prompts and their new tokens lie below 40, above it, and cross it.
    "phi3_long": {
        **SCALED_PHI3,
        "original_max_position_embeddings": 40,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.25, 1.5],
            "long_factor": [1.0, 1.5, 4.0, 16.0],
        },
    },
    # As Phi-4-mini: 6 of 8 dimensions turn, and the attention factor counts below the limit, too.
    "phi3_partial": {
        **SCALED_PHI3,
        "original_max_position_embeddings": 128,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.25, 1.5],
            "long_factor": [1.0, 4.0, 16.0],
        },
        **TIED,
    },
    "olmo2": {"model_type": "olmo2", "rope_theta": 500.0},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.75,
        "logits_scaling": 2.0,
        **TIED,
    },
    "smollm3": {
        "model_type": "smollm3",
        "num_hidden_layers": 3,
        "no_rope_layer_interval": 2,
        "rope_theta": 1000.0,
        **TIED,
    },
    "glm4": {
        "model_type": "glm4",
        "head_dim": 16,
        "num_hidden_layers": 3,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "rope_theta": 1000.0,
        **TIED,
    },
    "qwen3_moe_step": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 20,
        **TIED,
    },
    "olmoe": {
        "model_type": "olmoe",
        "intermediate_size": 12,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "clip_qkv": 1.5,
        **TIED,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 3,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 12,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "head_dim": 16,
        "num_hidden_layers": 3,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
}
# How many end tokens config.json and generation_config.json name; the latter's are obeyed.
ENDS: dict[str, tuple[int, int]] = {"llama3": (3, 3), "qwen3": (1, 2), "phi3": (1, 3)}
# Where a sequence crosses the limit of its short factors, both versions compute all of it again
# with the long ones, but version 4 forgets that this is to be causal.
WRONG_IN_V4 = {("phi3_long", LENGTHS.index(30))}


def make_prompts() -> list[list[int]]:
    """Unequal lengths; pad tokens at the start and in the middle are tokens like any other."""
    rng = np.random.default_rng(20250401)
    prompts = [rng.integers(4, VOCAB, n).tolist() for n in LENGTHS]
    prompts[2][0] = PAD
    prompts[3][3:5] = [PAD, PAD]
    prompts[7][40] = PAD
    return prompts


def make_config(name: str) -> transformers.PretrainedConfig:
    options = {**COMMON, **VARIANTS[name]}
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    # transformers 5 keeps the old key beside the new one.
    rope = getattr(config, "rope_parameters", None) or {}
    rope.pop("type", None)
    return config


def make_model(name: str, seed: int) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_config(make_config(name), **EAGER).eval()
    # What a call leaves out, generate() takes from here: also an end token set to None.
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD)
    # Tied embeddings that are scaled up would only ever repeat their token.
    embedded = 0.1 if model.config.model_type.startswith("gemma") else NOISE
    # What is clamped is to meet its limit.
    experts = 4 * NOISE if model.config.model_type == "gpt_oss" else NOISE
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, tensor in [*model.named_parameters(), *corrections(model)]:
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in parameter:
                noise = 1 + 0.2 * noise
            elif tensor.ndim == 1 or "bias" in parameter:
                noise = 0.2 * noise
            elif "embed_tokens" in parameter:
                noise = embedded * noise
            elif parameter.endswith("experts.gate_up_proj"):
                noise = experts * noise
            else:
                noise = NOISE * noise
            tensor.copy_(noise.bfloat16())
    return model


def corrections(model: transformers.PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """What is added to the scores of experts before some are chosen: no parameter, but saved."""
    return [(name, x) for name, x in model.named_buffers() if name.endswith("correction_bias")]


def load_model(folder: Path) -> transformers.PreTrainedModel:
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, **EAGER).eval()


def answers(
    model: transformers.PreTrainedModel, prompts: list[list[int]]
) -> tuple[list[list[int]], np.ndarray, float]:
    """Of each prompt the new tokens and the logits after it; of all of them the smallest gap."""
    tokens, logits, gaps = zip(*(greedy(model, p) for p in prompts), strict=True)
    return list(tokens), np.stack(logits), min(gaps)


@torch.no_grad()
def until_end(model: transformers.PreTrainedModel, prompt: list[int]) -> list[int]:
    """New tokens as generate() returns them by itself: the end token stops it."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    answer = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=PAD
    )
    return answer[0, len(prompt) :].tolist()


def choose_ends(name: str, tokens: list[list[int]]) -> tuple[list[int], list[int]]:
    """End tokens for the two files, from those generated in the middle, so that they are met."""
    met = list(dict.fromkeys(row[6] for row in reversed(tokens) if row[6] != PAD))
    in_config, in_generation = ENDS.get(name, (1, 1))
    return met[:in_config], met[:in_generation]


def one_or_many(ids: list[int]) -> int | list[int]:
    return ids if len(ids) > 1 else ids[0]


def write_variant(name: str, prompts: list[list[int]]) -> tuple[dict[str, Any], np.ndarray]:
    """Finds a seed, writes the directory, and answers with what was read back from it."""
    for seed in range(1000):
        model = make_model(name, seed)
        if greedy(model, prompts[-1])[2] < MIN_GAP:  # saves the time for the others
            continue
        tokens, logits, gap = answers(model, prompts)
        varied = min(len(set(row)) for row in tokens)
        if gap >= MIN_GAP and varied >= 5:
            break
    else:
        raise SystemExit(f"{name}: no seed has clear winners")
    in_config, in_generation = choose_ends(name, tokens)
    model.config.eos_token_id = one_or_many(in_config)
    model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
    model.generation_config.eos_token_id = one_or_many(in_generation)
    model.to(torch.bfloat16).save_pretrained(HERE / name)

    read = load_model(HERE / name)
    ended = [until_end(read, prompt) for prompt in prompts]
    read.generation_config = transformers.GenerationConfig(pad_token_id=PAD)
    again, logits_again, _ = answers(read, prompts)
    assert again == tokens
    assert np.array_equal(logits, logits_again)
    print(f"{name}: seed {seed}, min gap {gap:.4f}, at least {varied} different tokens")
    record = {
        "seed": seed,
        "min_gap": round(gap, 5),
        "end_tokens": in_generation,
        "tokens": tokens,
        "until_end": ended,
    }
    return record, logits


def write_goldens(names: list[str]) -> None:
    """Of the variants ``names``, beside those that are there; of all where none is named."""
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
    if names:
        before = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
        assert before["prompts"] == prompts
        expected["variants"] = before["variants"]
        with np.load(HERE / "logits.npz") as logits:
            last_logits = dict(logits)
    for name in names or VARIANTS:
        expected["variants"][name], last_logits[name] = write_variant(name, prompts)
    np.savez_compressed(HERE / "logits.npz", **last_logits)
    (HERE / "expected.json").write_text(readable(expected), encoding="utf-8")


def write_config_v4(name: str, expected: dict[str, Any], logits: np.ndarray) -> None:
    config = make_config(name)
    config.architectures = [
        transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__  # as saving would
    ]
    config.eos_token_id = json.loads((HERE / name / "config.json").read_text())["eos_token_id"]
    config.dtype = torch.bfloat16
    fields = json.loads(config.to_json_string())
    # As version 4 did before 4.56 and 4.53, and as the files that are published are.
    fields["torch_dtype"] = fields.pop("dtype")
    layer_types = fields.pop("layer_types", None)
    if layer_types != getattr(type(config)(**fields), "layer_types", None):
        fields["layer_types"] = layer_types
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    (HERE / name / "config_v4.json").write_text(text, encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HERE / name / "config_v4.json", Path(folder) / "config.json")
        shutil.copy(HERE / name / "model.safetensors", folder)
        model = load_model(Path(folder))
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD)
    tokens, logits_v4, _ = answers(model, expected["prompts"])
    distance = float(np.abs(logits_v4 - logits).max())
    print(f"{name}: logits of the two versions differ by at most {distance:.1e}")
    for row, (ours, theirs) in enumerate(
        zip(tokens, expected["variants"][name]["tokens"], strict=True)
    ):
        assert ours == theirs or (name, row) in WRONG_IN_V4, (name, row)
    assert distance < MIN_GAP / 10


def write_configs_v4(names: list[str]) -> None:
    expected = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
    with np.load(HERE / "logits.npz") as logits:
        for name in names or VARIANTS:
            write_config_v4(name, expected, logits[name])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    major = int(transformers.__version__.split(".")[0])
    names = [name for name in sys.argv[1:] if name in VARIANTS]
    if sys.argv[1:] == ["--v4", *names] and major == 4:
        write_configs_v4(names)
    elif sys.argv[1:] == names and major == 5:
        write_goldens(names)
    else:
        raise SystemExit(f"see the top of this file; this is transformers {major}")
