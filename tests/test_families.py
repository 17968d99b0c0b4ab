"""Every family through the whole engine: the tokens of transformers from every tier."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import flexgen_jax as fg
from flexgen_jax.weights.checkpoint import convert, open_store
from flexgen_jax.weights.huggingface import HuggingFaceModel

GOLDENS = Path(__file__).parent / "goldens" / "families"
EXPECTED = json.loads((GOLDENS / "expected.json").read_text(encoding="utf-8"))
PROMPTS = EXPECTED["prompts"]
NEW = len(EXPECTED["variants"]["llama"]["tokens"][0])
# One of each family; the others differ from them in their configs and weights only.
THOROUGH = (
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3_partial",
    "olmo2",
    "granite",
    "smollm3",
)
# Those of them with windows, soft caps or a scale of their own in attention, and a plain one. For
# the cache in codes and for stages the others are nothing new.
ATTENDING = ("llama3", "mistral", "gemma2", "gemma3", "granite")
# Those with experts, of which one stands for all in the ways to compute them.
SPARSE = (
    "mixtral",
    "qwen3_moe",
    "qwen3_moe_step",
    "olmoe",
    "qwen2_moe",
    "gpt_oss",
    "glm4_moe",
)
DEVICE = fg.Split(device=100, host=0, disk=0)
HOST = fg.Split(device=0, host=100, disk=0)
DISK = fg.Split(device=0, host=0, disk=100)
MIXED = fg.Split(device=30, host=30, disk=40)


def run(store, prompts=PROMPTS, ignore_eos=True, **policy):
    """Tokens, and the logits of every step."""
    found = {}

    def keep(step, batch, logits):
        found[batch, step] = np.asarray(logits)

    policy = fg.Policy(**{"device_batch_size": len(prompts), "num_device_batches": 1, **policy})
    params = fg.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=ignore_eos)
    with fg.LLM(str(store), policy=policy) as llm:
        outputs = llm.generate(prompts, params, on_logits=keep)
    return [list(o.outputs[0].token_ids) for o in outputs], found


def equal_bits(first, second):
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def store_of(tmp_path_factory):
    made = {}

    def store(variant):
        if variant not in made:
            target = tmp_path_factory.mktemp("stores") / variant
            made[variant] = convert(GOLDENS / variant, target, dtype="float32")
        return made[variant]

    return store


@pytest.mark.parametrize("variant", THOROUGH)
def test_the_tokens_of_transformers_from_every_tier(variant, store_of):
    store, expected = store_of(variant), EXPECTED["variants"][variant]
    tokens, bits = run(store)
    assert tokens == expected["tokens"]

    stages = {"num_stages": 2} if variant in ATTENDING else {}
    spread = {"weights": MIXED, "cache": MIXED, "hidden": DISK}
    for options in (spread, {"weights": DISK, "cache": DISK, "hidden": HOST, **stages}):
        again, same = run(store, **options)
        assert again == tokens
        equal_bits(same, bits)

    hosted, _ = run(store, cache=MIXED, host_attention=True)
    assert hosted == tokens
    # All positions are selected, but by the way of a selection.
    sparse, _ = run(store, cache=HOST, attention_sparsity=0.999)
    assert sparse == tokens


@pytest.mark.parametrize("variant", ATTENDING)
def test_a_cache_in_codes_from_every_tier(variant, store_of):
    store, tokens = store_of(variant), EXPECTED["variants"][variant]["tokens"]
    coarse, codes = run(store, cache=DEVICE, cache_bits=4)
    again, same = run(store, cache=DISK, weights=DISK, cache_bits=4)
    assert again == coarse
    equal_bits(same, codes)
    assert [t[0] for t in coarse] == [t[0] for t in tokens]  # prompts are attended to in full


@pytest.mark.parametrize("variant", sorted(set(EXPECTED["variants"]) - {*THOROUGH, *SPARSE}))
def test_the_tokens_of_transformers_of_other_configs(variant, store_of):
    prompts, expected = PROMPTS, EXPECTED["variants"][variant]["tokens"]
    if variant == "phi3_long":
        kept = [i for i, p in enumerate(prompts) if not crosses(variant, p)]
        prompts, expected = [prompts[i] for i in kept], [expected[i] for i in kept]
        assert len(prompts) > 2
    tokens, _ = run(store_of(variant), prompts, weights=DISK, cache=HOST)
    assert tokens == expected


@pytest.mark.parametrize("variant", ["mistral", "gemma3"])
@pytest.mark.parametrize(
    "policy",
    [{"weights": DISK, "cache": MIXED, "hidden": DISK}, {"cache": DISK, "cache_bits": 4}],
    ids=["mixed", "codes"],
)
def test_newcomers_take_rows_of_rings_and_windows(variant, policy, store_of):
    """Prompts longer than the window and shorter, with lengths of their own."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(14)]
    params = [
        fg.SamplingParams(temperature=0.0, max_tokens=1 + 5 * i % NEW, ignore_eos=True)
        for i in range(14)
    ]
    found = []
    for refill in (False, True):
        shape = fg.Policy(device_batch_size=2, num_device_batches=2, refill=refill, **policy)
        with fg.LLM(str(store_of(variant)), policy=shape) as llm:
            found.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
    assert found[0] == found[1]
    if "cache_bits" not in policy:
        expected = EXPECTED["variants"][variant]["tokens"]
        of_each = zip(found[0], params, strict=True)
        for i, (tokens, asked) in enumerate(of_each):
            assert list(tokens) == expected[i % len(PROMPTS)][: asked.max_tokens]


def crosses(variant, prompt):
    config = json.loads((GOLDENS / variant / "config.json").read_text())
    return len(prompt) <= config["original_max_position_embeddings"] < len(prompt) + NEW


def test_a_sequence_that_would_cross_the_border_of_long_positions_is_refused(store_of):
    """transformers computes all of it anew there; its cache would be of other positions."""
    prompt = next(p for p in PROMPTS if crosses("phi3_long", p))
    with pytest.raises(fg.RequestError, match="exceed the model's 40 positions"):
        run(store_of("phi3_long"), [prompt])


@pytest.mark.parametrize("variant", ["llama3", "gemma3", "phi3"])
def test_every_end_of_text_counts(variant, store_of):
    tokens, _ = run(store_of(variant), ignore_eos=False)
    assert tokens == EXPECTED["variants"][variant]["until_end"]
    assert any(len(t) < NEW for t in tokens)


@pytest.mark.parametrize("batches", [(4, 2), (2, 4)])
@pytest.mark.parametrize("variant", ["gemma3", "mistral"])
def test_windows_wrap_in_blocks_of_several_batches(variant, batches, store_of):
    size, count = batches
    shape = {"device_batch_size": size, "num_device_batches": count}
    tokens, bits = run(store_of(variant), **shape)
    assert tokens == EXPECTED["variants"][variant]["tokens"]
    again, same = run(store_of(variant), cache=DISK, hidden=DISK, weights=DISK, **shape)
    assert again == tokens
    equal_bits(same, bits)


def test_a_layer_with_a_window_keeps_only_the_window(store_of):
    """On every tier, as planned."""
    policy = fg.Policy(device_batch_size=8, num_device_batches=1, cache=DEVICE)
    params = fg.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    with fg.LLM(str(store_of("gemma3")), policy=policy) as llm:
        llm.generate(PROMPTS, params)
        cells = {c.name.split(".")[1]: c.nbytes for c in llm.report.placement["cache"].cells}
        config = llm.config
    wide = max(cells.values())
    for layer, kind in enumerate(config.layer_types):
        expected = wide if kind == "full_attention" else wide * 32 // 128
        assert cells[f"layer_{layer}"] == expected


@pytest.mark.parametrize("variant", EXPECTED["variants"])
def test_export_gives_the_checkpoint_back(variant, store_of, tmp_path):
    from safetensors.numpy import load_file

    exported = fg.export(store_of(variant), tmp_path / "out")
    before = load_file(GOLDENS / variant / "model.safetensors")
    after = load_file(exported / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor.astype(np.float32))
    assert HuggingFaceModel(exported).config == HuggingFaceModel(GOLDENS / variant).config


@pytest.mark.parametrize("differs", [True, False])
def test_a_head_of_its_own_counts_though_the_config_ties_it(differs, tmp_path):
    """transformers uses it, whatever the config says, if it is not the embedding."""
    import shutil

    from safetensors.numpy import load_file, save_file

    source = shutil.copytree(GOLDENS / "llama3", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = np.ascontiguousarray(table[::-1]) if differs else table.copy()
    save_file(tensors, source / "model.safetensors")
    store = open_store(convert(source, tmp_path / "store", dtype="float32"))
    assert store.config.tie_word_embeddings is not differs
    tokens, _ = run(store.path)
    assert (tokens == EXPECTED["variants"]["llama3"]["tokens"]) is not differs
    if differs:
        exported = fg.export(store.path, tmp_path / "out")
        assert load_file(exported / "model.safetensors").keys() == tensors.keys()


def test_a_tied_table_may_be_saved_as_the_head(tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file

    source = shutil.copytree(GOLDENS / "llama3", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / "model.safetensors")
    store = open_store(convert(source, tmp_path / "store", dtype="float32"))
    assert store.config.tie_word_embeddings
    tokens, _ = run(store.path)
    assert tokens == EXPECTED["variants"]["llama3"]["tokens"]
