"""Live parity with transformers on random configs; runs where torch and transformers are installed.

The goldens hold the same promise everywhere; here are more shapes, and the newest transformers.
"""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from flexgen_jax.models import decoding
from flexgen_jax.models.opt import PRESETS, OPTConfig
from flexgen_jax.models.params import nest, param_shapes
from flexgen_jax.weights.huggingface import HuggingFaceModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

CHOICES = {
    "hidden_size": [16, 24, 40],
    "num_hidden_layers": [1, 2, 3],
    "num_attention_heads": [1, 2, 4],
    "ffn_dim": [8, 50],
    "vocab_size": [30, 101],
    "word_embed_proj_dim": [None, 12, 48],
    "do_layer_norm_before": [True, False],
    "enable_bias": [True, False],
    "layer_norm_elementwise_affine": [True, False],
    "activation_function": ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh"],
    "tie_word_embeddings": [True, False],
    "_remove_final_layer_norm": [False, False, True],
}


def random_model(seed: int):
    rng = np.random.default_rng(seed)
    options = {name: values[rng.integers(len(values))] for name, values in CHOICES.items()}
    config = transformers.OPTConfig(max_position_embeddings=32, dropout=0.0, **options)
    model = transformers.OPTForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return rng, model


@pytest.mark.parametrize("seed", range(6))
def test_random_configs(seed, tools, tmp_path):
    """The same logits for prompts of unequal lengths, and the same greedy tokens where clear."""
    rng, model = random_model(seed)
    model.save_pretrained(tmp_path)
    config, params = tools.load_hugging_face(tmp_path)
    rows = [rng.integers(0, config.vocab_size, n).tolist() for n in (1, 4, 11, 18)]
    rows[2][5] = config.pad_token_id

    tokens, padding = tools.left_pad(rows)
    ours = np.asarray(tools.forward(params, tokens, config, padding))
    with torch.no_grad():
        for row, pad, logits in zip(rows, padding, ours, strict=True):
            ids = torch.tensor([row])
            theirs = model(ids, attention_mask=torch.ones_like(ids)).logits[0].numpy()
            np.testing.assert_allclose(
                logits[pad:], theirs, rtol=1e-4, atol=1e-4 * max(1, np.abs(theirs).max())
            )

    new_tokens = 8
    chosen, _ = tools.greedy(
        params, config, tokens, padding, new_tokens=new_tokens, cache_len=tokens.shape[1] + 8
    )
    with torch.no_grad():
        for row, answer in zip(rows, chosen, strict=True):
            ids = torch.tensor([row + answer[:-1]])
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(row) - 1 :]
            lead = logits.max(-1).values - logits[range(new_tokens), answer]
            # Each choice is theirs, or as good as theirs to rounding.
            assert lead.max() <= 1e-4 * max(1, logits.abs().max())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_count_as_transformers_does(name):
    """On torch's meta device, so that no array is made."""
    config = transformers.OPTConfig(**PRESETS[name].to_json())
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(config)
    theirs = sum(p.numel() for p in model.parameters())
    assert sum(math.prod(s) for s in param_shapes(PRESETS[name]).values()) == theirs


def test_transformers_reads_our_config_and_we_read_theirs():
    ours = OPTConfig(
        hidden_size=32,
        num_attention_heads=2,
        word_embed_proj_dim=8,
        remove_final_layer_norm=True,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        activation_function="gelu",
        tie_word_embeddings=False,
        pad_token_id=3,
        bos_token_id=0,
        eos_token_id=5,
    )
    theirs = transformers.OPTConfig.from_dict(ours.to_json())
    assert OPTConfig.from_json(theirs.to_dict()) == ours


def test_transformers_loads_the_demo_model(tools):
    from importlib import resources

    directory = resources.files("flexgen_jax") / "demo_model"
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)
    text = "JULIET:\nO, speak again!\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    config, params = tools.load_hugging_face(directory)
    with torch.no_grad():
        theirs = model.eval()(torch.tensor([ids])).logits.numpy()
    ours = tools.forward(params, np.asarray([ids], np.int32), config)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


FAMILIES = Path(__file__).parents[1] / "goldens" / "families"


@pytest.mark.parametrize("variant", sorted(p.name for p in FAMILIES.iterdir() if p.is_dir()))
def test_new_random_weights_of_every_family(variant, tmp_path):
    """The goldens' configs with other weights, and whatever transformers is installed."""
    config = transformers.AutoConfig.from_pretrained(FAMILIES / variant)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = 0.2 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + noise if name.endswith("norm.weight") else noise)
    model.eval().float().save_pretrained(tmp_path)
    ours = HuggingFaceModel(tmp_path)
    params = {
        name: np.concatenate(
            [block.reshape(-1) for block in ours.blocks(name, np.dtype(np.float32))]
        ).reshape(shape)
        for name, shape in param_shapes(ours.config).items()
    }
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, ours.config.vocab_size, n).tolist() for n in (3, 19, 31)]
    tokens = np.zeros((3, 31), np.int32)
    for number, row in enumerate(rows):
        tokens[number, 31 - len(row) :] = row
    padding = np.asarray([31 - len(row) for row in rows], np.int32)
    forward = jax.jit(decoding.forward, static_argnames="config")
    found = np.asarray(forward(nest(params), tokens, ours.config, padding))
    with torch.no_grad():
        for row, pad, logits in zip(rows, padding, found, strict=True):
            theirs = model(torch.tensor([row])).logits[0].numpy()
            close = 1e-4 * max(1, np.abs(theirs).max())
            np.testing.assert_allclose(logits[pad:], theirs, rtol=1e-4, atol=close)
