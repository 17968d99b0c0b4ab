"""Tokenizers as Hugging Face directories have them, whole or in two files."""

import json
import shutil
from pathlib import Path

import pytest

from flexgen_jax.requests.tokenization import load_tokenizer

DEMO = Path(__file__).parents[2] / "flexgen_jax" / "demo_model"
TEXTS = ["To be, or not to be", " leading space", "naïve — 漢字 🙂", "", "line\nbreak\t</s> inside"]


@pytest.fixture
def two_files(tmp_path):
    """``vocab.json`` and ``merges.txt``, as the OPT repositories have them."""
    model = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_two_files_give_the_same_tokens_as_one(two_files, text):
    whole, parts = load_tokenizer(DEMO), load_tokenizer(two_files)
    ids = whole.encode(text)
    assert parts.encode(text) == ids
    assert ids[0] == 2  # OPT puts </s> before a prompt
    assert parts.decode(ids) == whole.decode(ids) == text.replace("</s>", "")


def test_the_leading_token_can_be_off(two_files):
    config = {"add_bos_token": False, "bos_token": {"content": "</s>"}}
    (two_files / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(two_files).encode("a") == load_tokenizer(DEMO).encode("a")[1:]


def test_single_tokens_have_a_text():
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer.token(2) == "</s>"
    assert tokenizer.token(10**6) is None


def test_no_files_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    shutil.copy(DEMO / "config.json", tmp_path)
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_damaged_file_is_named(two_files, name):
    (two_files / name).write_text('{"half": ')
    with pytest.raises(ValueError, match=f"cannot read the tokenizer .*{name}"):
        load_tokenizer(two_files)
