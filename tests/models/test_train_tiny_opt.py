"""The training example, on a very small text, writes a model that loads."""

import importlib.util
import json
import random
import re
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_tiny_opt.py"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("optax")
    spec = importlib.util.spec_from_file_location("train_tiny_opt", EXAMPLE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text():
    words = re.findall(
        r"\w+", "the sun rises over a green hill and we walk down to see her by night"
    )
    rng = random.Random(0)
    speeches = [
        f"{rng.choice(['ADA', 'BEN'])}:\n" + " ".join(rng.choices(words, k=rng.randint(4, 20)))
        for _ in range(300)
    ]
    return "\n\n".join(speeches) + "\n"


FLAGS = shlex.split(
    "--vocab 300 --hidden 16 --layers 1 --heads 2 --ffn 32 --positions 32 --context 32 --batch 2 "
    "--passage 20 --steps 24 --evaluate-every 12 --warmup 4 --learning-rate 0.02 --name a-test"
)


@pytest.fixture(scope="module")
def trained(example, text, tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    (directory / "text").write_text(text, encoding="utf-8")
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        example.main(["--text", str(directory / "text"), "--out", str(directory / "model"), *FLAGS])
    return directory / "model"


def test_the_model_loads_and_has_learnt_something(trained, text, tools):
    config, params = tools.load_hugging_face(trained)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 1, 300)
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    ids = tokenizer.encode(text).ids[:32]
    logits = np.asarray(tools.forward(params, np.asarray([ids], np.int32), config))[0, :-1]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -log_probs[np.arange(31), ids[1:]].mean()
    assert nats < 0.9 * np.log(300)  # knowing nothing costs log(300)


def test_the_tokenizer_round_trips_and_begins_like_opts(trained, text):
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    encoding = tokenizer.encode(text)
    assert encoding.ids[0] == 2
    assert encoding.ids.count(2) == 1
    assert tokenizer.decode(encoding.ids) == text
    assert len(encoding.ids) < len(text) / 2


def test_the_files_agree_with_each_other(trained):
    assert {file.name for file in trained.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "held_out.txt",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config, generation, settings = (
        json.loads((trained / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("config", "generation_config", "tokenizer_config")
    )
    assert config["model_type"] == "opt"
    for name in ("bos", "eos", "pad"):
        assert config[f"{name}_token_id"] == generation[f"{name}_token_id"]
        token = settings["added_tokens_decoder"][str(config[f"{name}_token_id"])]["content"]
        assert settings[f"{name}_token"] == token
    assert "# a-test" in (trained / "README.md").read_text(encoding="utf-8")


def test_all_passages_are_whole_speeches(example, text):
    tokenizer = example.train_tokenizer(text, 300)
    tokens, starts = example.speech_starts(tokenizer, text)
    assert len(starts) == 300
    source = example.passages(tokens, starts, 40, np.random.default_rng(0))
    for _ in range(50):
        first, *rest = next(source)
        passage = tokenizer.decode(rest)
        assert first == 2
        assert passage in text
        assert passage.startswith(("ADA:\n", "BEN:\n"))
        assert passage.endswith("\n")
    rows = example.sequences(source, 17)
    assert {(row.shape, row[0]) for row in (next(rows) for _ in range(20))} == {((17,), 2)}


def test_the_learning_rate_follows_steps_and_the_clock(example):
    options = example.parse_arguments(
        shlex.split("--text x --steps 100 --warmup 10 --minutes 1 --learning-rate 1")
    )
    assert example.learning_rate(options, 0, 0.0) == pytest.approx(0.1)
    assert example.learning_rate(options, 50, 0.0) == pytest.approx(0.5)
    assert example.learning_rate(options, 20, 30.0) == pytest.approx(0.5)
    assert example.learning_rate(options, 20, 90.0) == 0


@pytest.mark.parametrize(
    "flags", ["--steps 0", "--minutes 0", "--context 64 --positions 32", "--drop 1"]
)
def test_bad_flags_are_refused(example, flags, capsys):
    with pytest.raises(SystemExit):
        example.parse_arguments(["--text", "x", *flags.split()])
    assert flags.split()[0] in capsys.readouterr().err
