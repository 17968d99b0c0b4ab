"""The family that ``docs/families.md`` adds is one file and one line, and runs."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import flexgen_jax as fg
from flexgen_jax.models import decoding, registry
from flexgen_jax.models.params import nest, param_shapes
from flexgen_jax.weights.huggingface import HuggingFaceModel

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
CONFIG = {
    "model_type": "phi",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "eos_token_id": 1,
}
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 60, 11, 4]]


@pytest.fixture
def phi(monkeypatch):
    (source,) = re.findall(r"```python\n(\"\"\"Phi.*?)```", PAGE.read_text(), re.DOTALL)
    module = types.ModuleType("flexgen_jax.models.phi")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "phi.py", "exec"), module.__dict__)
    line = re.search(r'^    "(\w+)": "(\w+)",$', PAGE.read_text(), re.MULTILINE)
    monkeypatch.setitem(registry.FAMILIES, line[1], line[2])
    registry.family_of_type.cache_clear()
    yield module
    registry.family_of_type.cache_clear()


def test_the_excerpt_is_what_the_file_says():
    (excerpt,) = re.findall(r"```python\n(class Mixtral.*?)```", PAGE.read_text(), re.DOTALL)
    assert excerpt in (PAGE.parents[1] / "flexgen_jax" / "models" / "mixtral.py").read_text()


def make(directory):
    """A small checkpoint of random weights as such models are published."""
    config = registry.read_config(CONFIG)
    store = fg.convert_dummy(config, directory / "dummy", seed=3)
    return config, fg.export(store, directory / "published")


def greedy(model, prompt, new):
    """By the unscheduled reference, without a cache."""
    config = model.config
    flat = {
        name: np.concatenate(
            [b.reshape(-1) for b in model.blocks(name, np.dtype(np.float32))]
        ).reshape(shape)
        for name, shape in param_shapes(config).items()
    }
    forward = jax.jit(decoding.forward, static_argnames="config")
    tokens = list(prompt)
    padding = np.asarray([32 - len(prompt)], np.int32)
    for _ in range(new):
        padding = np.asarray([32 - len(tokens)], np.int32)
        row = np.zeros((1, 32), np.int32)
        row[0, 32 - len(tokens) :] = tokens
        tokens.append(int(np.asarray(forward(nest(flat), row, config, padding))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "options",
    [
        {"weights": fg.Split(device=0, host=0, disk=100), "num_stages": 2},
        {"cache": fg.Split(device=0, host=100, disk=0), "host_attention": True},
    ],
    ids=["disk and stages", "host attention"],
)
def test_the_pages_family_runs(options, phi, tmp_path):
    config, published = make(tmp_path)
    assert registry.preset("phi-2") == phi.PRESETS["microsoft/phi-2"]
    assert registry.read_config(registry.write_config(config)) == config
    expected = [greedy(HuggingFaceModel(published), p, 6) for p in PROMPTS]
    policy = fg.Policy(device_batch_size=4, num_device_batches=1, **options)
    with fg.LLM(str(published), policy=policy, offload_dir=str(tmp_path)) as llm:
        params = fg.SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        outputs = llm.generate(PROMPTS, params)
    assert [list(o.outputs[0].token_ids) for o in outputs] == expected


def test_its_logits_are_those_of_transformers(phi, tmp_path):
    """Where transformers is installed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, published = make(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    with torch.no_grad():
        theirs = [model.eval()(torch.tensor([p])).logits[0, -1].numpy() for p in PROMPTS]
    ours = HuggingFaceModel(published)
    assert ours.config == config
    for prompt, logits in zip(PROMPTS, theirs, strict=True):
        assert greedy(ours, prompt, 1) == [int(logits.argmax())]
