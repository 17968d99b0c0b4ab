"""A model that runs from its GGUF file alone, as from the weights that its blocks stand for."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import flexgen_jax as fg
from flexgen_jax.models.gguf_blocks import BLOCK_SIZES
from flexgen_jax.models.params import param_records
from flexgen_jax.weights.checkpoint import convert, open_model, resolve
from flexgen_jax.weights.element_blocks import dense_array
from flexgen_jax.weights.gguf_file import GGUFFile
from flexgen_jax.weights.tensor_file import SourceError

gguf = pytest.importorskip("gguf")

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB, LAYERS = 256, 512, 4, 2, 96, 2
SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}
# One of each kind, over the matrices of a layer.
KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "MXFP4"]
THEIRS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
POLICY = {"device_batch_size": 2, "num_device_batches": 1}
PROMPTS = [{"prompt_token_ids": [3, 40, 5]}, {"prompt_token_ids": [7, 8]}]
PARAMS = fg.SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


def blocks(kind, shape, rng):
    """Random blocks with scales that keep the values small."""
    elements, nbytes = BLOCK_SIZES[kind]
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // elements, nbytes), dtype=np.uint8)
    if kind == "MXFP4":
        data[..., 0] = 121
    else:
        small = {"Q4_K": 2e-4, "Q5_K": 1e-4, "Q6_K": 5e-5}.get(kind, 0.005)
        at = 208 if kind == "Q6_K" else 0
        for place in (at,) if kind in ("Q4_0", "Q5_0", "Q8_0", "Q6_K") else (at, at + 2):
            data[..., place : place + 2] = np.float16([small]).view(np.uint8)
    return data.reshape(*shape[:-1], -1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A GGUF file and the directory of what its blocks stand for."""
    directory, rng = tmp_path_factory.mktemp("gguf"), np.random.default_rng(0)
    path, dense = directory / "tiny.gguf", directory / "dense"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(c) for c in range(33, 33 + VOCAB - 3)]
    tokens = ["<|start|>", "<|end|>", "ab", *letters]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 1] + [1] * len(letters))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    state, number = {}, 0

    def add(name, theirs, shape, heads=0):
        nonlocal number
        if len(shape) == 1:
            values = rng.uniform(0.5, 1.5, shape).astype(np.float32)
            writer.add_tensor(name, values)
        else:
            kind = KINDS[number % len(KINDS)]
            number += 1
            type_ = gguf.GGMLQuantizationType[kind]
            if kind in BLOCK_SIZES:
                data = blocks(kind, shape, rng)
            else:
                data = gguf.quantize((rng.standard_normal(shape) * 0.05).astype(np.float32), type_)
            writer.add_tensor(name, data, raw_dtype=type_)
            values = gguf.dequantize(data, type_)
        if heads:
            pairs = values.reshape(heads, -1, 2, values.shape[-1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        state[theirs] = np.ascontiguousarray(values, np.float32)

    add("token_embd.weight", "model.embed_tokens.weight", (VOCAB, HIDDEN))
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name, 0)
            theirs = f"model.layers.{layer}.{THEIRS[name]}.weight"
            add(f"blk.{layer}.{name}.weight", theirs, shape, heads)
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(GGUFFile(path).config()))
    save_file(state, dense / "model.safetensors")
    return path, dense


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FLEXGEN_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "gguf-cache"))


def run(model, dtype, weights):
    found = {}
    policy = fg.Policy(**POLICY, weights=weights)
    with fg.LLM(str(model), policy=policy, dtype=dtype) as llm:
        llm.generate(PROMPTS, PARAMS, on_logits=lambda s, b, x: found.update({s: np.asarray(x)}))
        report = llm.report
    return found, report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_are_those_of_the_dense_weights(written, tmp_path, dtype):
    path, dense = written
    expected, _ = run(convert(dense, tmp_path / "store", dtype=dtype), dtype, fg.Split())
    for split in (fg.Split(), fg.Split(device=0, disk=100), fg.Split(device=40, host=30, disk=30)):
        found, report = run(path, dtype, split)
        assert found.keys() == expected.keys()
        for step, logits in expected.items():
            np.testing.assert_array_equal(found[step], logits)
    whole = sum(t.nbytes for t in GGUFFile(path).tensors.values())
    assert report.placement["weights"].nbytes() == whole  # packed on every tier


def test_tokenizer_template_and_ends_come_with_it(written):
    path, _ = written
    with fg.LLM(str(path), policy=fg.Policy(**POLICY)) as llm:
        assert llm.tokenizer.encode("abc") == [2, 3 + ord("c") - 33]
        assert llm.config.eos_token_id in (1, (1,))
        messages = [{"role": "user", "content": "abc"}]
        (found,) = llm.chat([messages], fg.SamplingParams(max_tokens=1))
        assert list(found.prompt_token_ids) == [2, 3 + ord("c") - 33]
    assert open_model(path).dtype == "bfloat16"


def test_what_is_not_read_is_named(written, tmp_path):
    path, _ = written
    with pytest.raises(SourceError, match="whose weights stay as they are"):
        resolve(path, weight_bits=4)
    content = path.read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(content.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    with pytest.raises(SourceError, match=r"architecture 'mamba'; read from GGUF are llama"):
        open_model(other)
    other.write_bytes(content.replace(b"smollm", b"unseen"))
    with pytest.raises(SourceError, match=r"words cut as 'unseen'.*take the model's safetensors"):
        open_model(other)


EXPERTS, WIDTH = 4, 32
SPARSE = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "attn_q_norm": (HIDDEN // HEADS,),
    "attn_k_norm": (HIDDEN // HEADS,),
    "ffn_norm": (HIDDEN,),
    "ffn_gate_inp": (EXPERTS, HIDDEN),
    "ffn_gate_exps": (EXPERTS, WIDTH, HIDDEN),
    "ffn_up_exps": (EXPERTS, WIDTH, HIDDEN),
    "ffn_down_exps": (EXPERTS, HIDDEN, WIDTH),
}
OURS = {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down"}


def write_sparse(path, architecture, experts=EXPERTS):
    """A file with experts in Q8_0, all else in F32; and what their blocks stand for."""
    rng, found = np.random.default_rng(1), {}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    if architecture == "olmoe":
        writer.add_clamp_kqv(1.5)
    for name, shape in [
        ("token_embd.weight", (VOCAB, HIDDEN)),
        *((f"blk.0.{name}.weight", shape) for name, shape in SPARSE.items()),
        ("output_norm.weight", (HIDDEN,)),
    ]:
        if "_norm.weight" in name and shape[0] < HIDDEN:  # of each head
            if architecture == "llama":
                continue
            if architecture == "olmoe":  # of all heads together
                shape = (HIDDEN if "_q_" in name else HIDDEN // 2,)
        values = rng.standard_normal(shape).astype(np.float32)
        module = name.split(".")[-2]
        if module not in OURS:
            writer.add_tensor(name, values)
            continue
        data = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        of_each = gguf.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
        found |= {f"expert_{i}.{OURS[module]}.kernel": x.T for i, x in enumerate(of_each)}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


@pytest.mark.parametrize("architecture", ["llama", "olmoe", "qwen3moe"])
def test_experts_are_parts_of_tensors_that_all_share(architecture, tmp_path):
    path = tmp_path / "experts.gguf"
    expected = write_sparse(path, architecture)
    stored = open_model(path, dtype="float32")
    config, form = stored.config, stored.format
    assert (config.num_experts, config.num_experts_per_tok) == (EXPERTS, 2)
    assert config.norm_topk_prob == (architecture != "olmoe")
    assert getattr(config, "clip_qkv", None) == (1.5 if architecture == "olmoe" else None)
    found = {}
    for name in param_records(config):
        if "_experts_" in name:
            array = dense_array(form, config, stored.arrays, name)
            found[name.partition(".")[2]] = array.T if form.transposes(config, name) else array
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_other_numbers_of_experts_than_there_are_are_named(tmp_path):
    write_sparse(tmp_path / "more.gguf", "qwen3moe", experts=8)
    with pytest.raises(SourceError, match=r"ffn_gate_inp.weight has shape \[4, 256\]"):
        open_model(tmp_path / "more.gguf")
    write_sparse(tmp_path / "other.gguf", "qwen2")
    with pytest.raises(SourceError, match="architecture 'qwen2' with experts; read from GGUF are"):
        open_model(tmp_path / "other.gguf")
