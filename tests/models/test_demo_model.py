"""The bundled model: complete, small, and able to speak like its text."""

import json
from importlib import resources

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

DIRECTORY = resources.files("flexgen_jax") / "demo_model"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompts():
    lines = (DIRECTORY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_it_is_complete_and_small():
    files = {file.name: file.stat().st_size for file in DIRECTORY.iterdir() if file.is_file()}
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "held_out.txt",
        "model.safetensors",
        "prompts.jsonl",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= files.keys()
    assert sum(files.values()) <= 8_000_000
    assert [name for name in files if name.endswith(".txt")] == ["held_out.txt"]


def test_the_special_tokens_are_opts(tokenizer):
    ids = [tokenizer.token_to_id(t) for t in ("<s>", "<pad>", "</s>", "<unk>")]
    assert ids == [0, 1, 2, 3]
    assert tokenizer.encode("Enter ROMEO").ids[0] == 2
    assert tokenizer.encode("").ids == [2]


@pytest.mark.parametrize(
    "text", ["ROMEO:\nWhat light?\n\n", " a  b\t\n", "naïve → 漢字 🎭", "</s>x"]
)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert 3 not in ids


def test_the_prompts_are_unequal_and_fit(tokenizer, prompts, tools):
    config, _ = tools.load_hugging_face(DIRECTORY)
    lengths = [len(tokenizer.encode(p["prompt"]).ids) for p in prompts]
    assert len(prompts) >= 10
    assert len({p["id"] for p in prompts}) == len(prompts)
    assert len(set(lengths)) >= 8
    assert min(lengths) <= 5
    assert max(lengths) <= config.max_position_embeddings // 2


def test_it_expects_its_own_kind_of_text(tokenizer, tools):
    config, params = tools.load_hugging_face(DIRECTORY)
    assert tokenizer.get_vocab_size() == config.vocab_size

    def nats_per_byte(text: str) -> float:
        ids = tokenizer.encode(text).ids
        row = np.full((1, 128), config.pad_token_id, np.int32)
        row[0, : len(ids)] = ids
        log_probs = jax.nn.log_softmax(tools.forward(params, row, config))
        return -sum(float(log_probs[0, i, t]) for i, t in enumerate(ids[1:])) / len(text.encode())

    verse = (
        "KING:\nMy lord, I have not seen him since the day\n"
        "That first he came to speak with me of love;\n"
        "And now, good sir, I know not what to say.\n\nQUEEN:\nWhat is the news?\n"
    )
    prose = "The compiler allocates two registers per kernel launch and flushes its cache line."
    assert nats_per_byte(verse) < 1.5 < nats_per_byte(prose)
