"""The comparison with other tools: what needs none of them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import flexgen_jax as fg

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "flexgen_jax" / "demo_model"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def peers():
    """Imports a module of ``benchmarks/``, as its scripts do."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Hugging Face directory of a tiny Llama, and its tensors."""
    folder, draw = tmp_path_factory.mktemp("llama"), np.random.default_rng(0)
    hidden, width, kv = 32, 64, 16
    shapes = {"model.embed_tokens.weight": (48, hidden), "model.norm.weight": (hidden,)}
    for layer in range(2):
        name = f"model.layers.{layer}."
        shapes[name + "input_layernorm.weight"] = (hidden,)
        shapes[name + "post_attention_layernorm.weight"] = (hidden,)
        for letter, out in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{name}self_attn.{letter}_proj.weight"] = (out, hidden)
        for part, shape in (("gate", (width, hidden)), ("up", (width, hidden))):
            shapes[f"{name}mlp.{part}_proj.weight"] = shape
        shapes[f"{name}mlp.down_proj.weight"] = (hidden, width)
    tensors = {n: draw.normal(size=shape).astype(ml_dtypes.bfloat16) for n, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder, tensors


def test_a_driver_answers_as_the_library(tmp_path):
    prompts = [[2, 5, 9], [2, 7], [2, 11, 12, 13]]
    run = {"name": "all", "prompts": prompts, "limit": 6, "batch": 2}
    job = {
        "model": str(DEMO),
        "precision": "float32",
        "threads": 2,
        "settings": {},
        "ends": [15],
        "warm": [],
        "runs": [run],
        "scratch": str(tmp_path),
        "parent": os.getpid(),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-m", "peers.ours", str(tmp_path / "job.json")],
        cwd=ROOT / "benchmarks",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (record,) = map(json.loads, done.stdout.splitlines())
    policy = fg.Policy(device_batch_size=2, num_device_batches=1)  # other shapes, other last bits
    options = {"policy": policy, "dtype": "float32", "offload_dir": str(tmp_path)}
    with fg.LLM(str(DEMO), **options) as llm:
        params = fg.SamplingParams(temperature=0.0, max_tokens=6, stop_token_ids=[15])
        expected = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]
    assert record["answers"] == expected
    assert record["generated_tokens"] == sum(map(len, expected))
    assert record["seconds"] > 0


def test_a_tool_that_is_not_there_is_skipped(tmp_path):
    job = {"model": "x", "threads": 1, "settings": {}, "ends": [], "parent": os.getpid()}
    (tmp_path / "job.json").write_text(
        json.dumps({**job, "precision": "x", "warm": [], "runs": []})
    )
    done = subprocess.run(
        [sys.executable, "-S", "-m", "peers.with_ctranslate2", str(tmp_path / "job.json")],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout) == {"skipped": "No module named 'ctranslate2'"}


def test_an_environment_that_pip_cannot_make_says_why(peers, tmp_path, monkeypatch):
    environments = peers("peers.environments")
    monkeypatch.setitem(environments.PACKAGES, "odd", (("--no-index", "no-such-package-at-all"),))
    with pytest.raises(environments.NotInstalled, match="no-such-package-at-all"):
        environments.python_of("odd", tmp_path, {})
    assert environments.python_of("odd", tmp_path, {"odd": "/a/python"}) == "/a/python"


def test_tensors_are_read_as_they_were_written(peers, llama):
    folder, tensors = llama
    read = peers("peers.tensors").Tensors(folder)
    for name, values in tensors.items():
        np.testing.assert_array_equal(read[name], values.astype(np.float32))
    assert "lm_head.weight" not in read


def test_a_gguf_for_llama_cpp_has_the_tensors_in_its_order(peers, llama, tmp_path):
    gguf = pytest.importorskip("gguf")
    folder, tensors = llama
    peers("peers.gguf_model").write(str(folder), str(tmp_path / "x.gguf"), "F32")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    found = {t.name: t.data.reshape(tuple(reversed(t.shape))) for t in reader.tensors}
    assert len(found) == len(tensors)
    query = tensors["model.layers.1.self_attn.q_proj.weight"].astype(np.float32)
    # Of a head of 8: rows 0 and 4 turn together in Hugging Face's order, 0 and 1 in GGUF's.
    np.testing.assert_array_equal(found["blk.1.attn_q.weight"][:4], query[[0, 4, 1, 5]])
    np.testing.assert_array_equal(found["blk.1.attn_q.weight"][8:10], query[[8, 12]])
    down = tensors["model.layers.1.mlp.down_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(found["blk.1.ffn_down.weight"], down)


def test_llama_cpp_has_no_opt(peers):
    pytest.importorskip("gguf")
    with pytest.raises(peers("peers.job").CannotRun, match="no model of the family opt"):
        peers("peers.gguf_model").write(str(DEMO), "never-written.gguf", "F32")


def test_batches_are_of_prompts_of_about_one_length(peers):
    job = peers("peers.job")
    run = {"prompts": [[1], [1] * 5, [1] * 3, [1] * 4, [1] * 2], "batch": 2}
    assert job.in_batches(run) == [[1, 3], [2, 4], [0]]
    assert job.cut([4, 5, 2, 6], [2, 9]) == [4, 5, 2]
    told = job.by_batches(
        run | {"limit": 9}, [0], lambda asked, n: [[n, len(p), 0, 7] for p in asked]
    )
    assert told == [[9, len(p), 0] for p in run["prompts"]]
    assert job.cut([4, 5], [2]) == [4, 5]


def test_decode_steps_are_what_is_left_of_the_whole(peers):
    tables = peers("peers.tables")
    machine = {"kind": "machine", "cores": 2, "avx512": True, "amx": False}
    base = {"kind": "run", "workload": "batches", "model": "m", "tool": "t", "label": "l"}
    runs = [
        {**base, "run": "4 x 8 + 1", "seconds": 2.0},
        {**base, "run": "4 x 8 + 11", "seconds": 6.0},
    ]
    skipped = {**base, "kind": "skipped", "tool": "u", "reason": "no|reason"}
    table = tables.peers([machine, *runs, skipped], peers("tables").table)
    assert "| t | l | 10.0 (7.3) |" in table
    assert "- u l: no/reason" in table
    assert "2 CPU cores with AVX-512, one run each" in table
