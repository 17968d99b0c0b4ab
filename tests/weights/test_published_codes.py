"""Published quantisation in place: logits of the packages' own dense matrices, on every tier."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flexgen_jax as fg
from flexgen_jax.models.params import loaded_names
from flexgen_jax.weights.checkpoint import convert, open_model, resolve
from flexgen_jax.weights.coded_leaves import planned_format
from flexgen_jax.weights.element_blocks import dense_array
from flexgen_jax.weights.safetensors_file import SafetensorsFile
from flexgen_jax.weights.tensor_file import CODE_DTYPES, DTYPES, SourceError
from flexgen_jax.weights.verifying import verify

GOLDENS = Path(__file__).parent.parent / "goldens" / "quantised"
PROMPTS = json.loads((GOLDENS / "expected.json").read_text())["prompts"]
VARIANTS = sorted(p.name for p in GOLDENS.iterdir() if p.is_dir())
PARAMS = fg.SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
# One of each kind of leaf, a fused one among them.
KINDS = ["gptq_4", "awq", "fp8_blocks", "w4a16_zeros", "nf4_nested", "int8"]


@pytest.fixture(scope="module")
def theirs():
    with np.load(GOLDENS / "logits.npz") as found:
        return dict(found)


def logits_of(model, split=None, dtype="float32", prompts=PROMPTS, **more):
    """Per step, (requests, vocab) of all requests in the order given; and the report."""
    found = {}
    policy = fg.Policy(
        device_batch_size=4, num_device_batches=1, weights=split or fg.Split(), **more
    )
    with fg.LLM(str(model), policy=policy, dtype=dtype) as llm:
        llm.generate(
            [{"prompt_token_ids": p} for p in prompts],
            PARAMS,
            on_logits=lambda step, batch, x: found.update({step: np.asarray(x)}),
        )
        return found, llm.report


def planned_nbytes(model):
    """Of one pass over the layers, by the config alone."""
    config = fg.load_config(model)
    form = planned_format(model, config, "float32")
    entries = form.entries(config)
    return sum(
        entries[array].nbytes
        for unit in config.units
        for array in form.order(config, loaded_names(config, unit))
    )


def rows_like(found, expected):
    """``found``'s rows that are closest to each row of ``expected``."""
    distance = np.abs(found[:, None] - expected[None]).max(axis=-1)
    return found[distance.argmin(axis=0)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_dense_matrices(variant, theirs):
    found, report = logits_of(GOLDENS / variant, fg.Split(device=0, disk=100))
    expected = theirs[variant]
    ours = rows_like(found[0][:, : expected.shape[1]], expected)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    # In their codes over every link, as many bytes as were planned; and rows of the token table.
    rows = 4 * (16 + PARAMS.max_tokens - 1) * fg.load_config(GOLDENS / variant).hidden_size
    passes = PARAMS.max_tokens * planned_nbytes(GOLDENS / variant)
    assert report.disk_bytes - 2 * rows == pytest.approx(passes, rel=0.05)


@pytest.mark.parametrize("variant", KINDS)
def test_the_bits_are_the_same_wherever_they_lie(variant):
    model = GOLDENS / variant
    expected, _ = logits_of(model, fg.Split(), "bfloat16")
    for split in (fg.Split(device=0, host=100), fg.Split(device=30, host=30, disk=40)):
        found, _ = logits_of(model, split, "bfloat16")
        assert found.keys() == expected.keys()
        for step, logits in expected.items():
            np.testing.assert_array_equal(found[step], logits)


@pytest.mark.parametrize("variant", ["gptq_4", "w4a16_zeros"])
def test_they_are_converted_to_what_they_stand_for(variant, tmp_path, theirs):
    store = convert(GOLDENS / variant, tmp_path / "store", dtype="float32")
    assert "quantization_config" not in json.loads((store / "config.json").read_text())
    found, _ = logits_of(store)
    expected = theirs[variant]
    ours = rows_like(found[0][:, : expected.shape[1]], expected)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_they_are_quantised_anew_where_that_is_asked_for(tmp_path):
    model = GOLDENS / "fp8_whole"
    assert resolve(model) == model
    assert resolve(model, dtype="bfloat16") == model  # 16 bits of codes would be no fewer bytes
    store = resolve(model, weight_bits=8, group_size=16, offload_dir=tmp_path)
    assert open_model(store).format.bits == 8
    expected, _ = logits_of(model, dtype="bfloat16")
    found, _ = logits_of(store, dtype="bfloat16")
    error = np.abs(found[0] - expected[0]).max() / np.abs(expected[0]).max()
    assert error < 0.05


def test_export_writes_what_they_stand_for(tmp_path):
    directory = fg.export(GOLDENS / "gptq_4", tmp_path / "dense", dtype="float32")
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    found, _ = logits_of(directory)
    expected, _ = logits_of(GOLDENS / "gptq_4")
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-3)


def test_checksums_of_codes(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(GOLDENS / "gptq_4", model)
    assert verify(model, record=True).recorded
    found = verify(model)
    assert found.sound
    assert found.checked == found.tensors
    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.down_proj.qweight"][2, 5] ^= 1 << 9
    save_file(state, model / "model.safetensors")
    (problem,) = verify(model).problems
    assert problem.startswith("layer_1.down_proj.qweight: the bytes are not those")
    with pytest.raises(fg.ExecutionError, match=r"layer_1\.down_proj\.qweight is damaged"):
        logits_of(model, fg.Split(device=0, disk=100))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plan_by_the_config_alone_has_the_bytes(variant, tmp_path):
    shutil.copy(GOLDENS / variant / "config.json", tmp_path)
    found = fg.plan(tmp_path, fg.Policy(), "t4", prompt_len=8, gen_len=4)
    opened = open_model(GOLDENS / variant)
    there = sum(e.nbytes for e in opened.format.entries(opened.config).values())
    assert found.placement["weights"].nbytes() == pytest.approx(there, rel=0.05)


def load_state(file):
    """As safetensors' own function, which does not know FP8."""
    found = SafetensorsFile(file)
    return {key: np.array(found.array(key)) for key in found.entries}


def save_state(state, file):
    header, data = {}, b""
    for key, x in state.items():
        kind = next(n for n, dtype in {**DTYPES, **CODE_DTYPES}.items() if dtype == x.dtype)
        begin, data = len(data), data + x.tobytes()
        header[key] = {"dtype": kind, "shape": x.shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edited(tmp_path, variant, change=None, config=None):
    """A copy whose tensors and ``quantization_config`` are changed."""
    model = tmp_path / variant
    shutil.copytree(GOLDENS / variant, model)
    if change is not None:
        state = load_state(model / "model.safetensors")
        change(state)
        save_state(state, model / "model.safetensors")
    values = json.loads((model / "config.json").read_text())
    if config is not None:
        values["quantization_config"] |= config
        (model / "config.json").write_text(json.dumps(values))
    return model


@pytest.mark.parametrize(
    ("variant", "config", "said"),
    [
        ("gptq_4", {"bits": 3}, "3 bits, which is not read: take a checkpoint of 2, 4 or 8"),
        ("gptq_4", {"checkpoint_format": "marlin"}, "GPTQ format 'marlin', which is not read"),
        ("awq", {"version": "gemv"}, "AWQ's version 'gemv', which is not read"),
        ("fp8_blocks", {"fmt": "e5m2"}, "FP8 of the kind 'e5m2', which is not read"),
        ("fp8_blocks", {"weight_block_size": [0, "x"]}, "must be two lengths"),
        ("w4a16", {"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized' of compressed"),
        ("w4a16", {"transform_config": {"a": {}}}, "a transform_config, which is not read"),
        ("w4a16", {"config_groups": {}}, "no config_groups"),
        ("gptq_4", {"bits": "many"}, "bits must be an integer"),
        ("nf4", {"quant_method": "hqq"}, "by 'hqq', which is not read; read are gptq, awq"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, variant, config, said):
    model = edited(tmp_path, variant, config=config)
    with pytest.raises(SourceError, match=re.escape(said)) as found:
        open_model(model)
    assert str(model / "config.json") in str(found.value)
    with pytest.raises(SourceError, match=re.escape(said)):
        fg.plan(model, fg.Policy(), "t4", prompt_len=8, gen_len=4)


MLP = "model.layers.0.mlp.down_proj"


def drop(name):
    return lambda state: state.pop(f"{MLP}.{name}")


def cut(name):
    return lambda state: state.update({f"{MLP}.{name}": state[f"{MLP}.{name}"][:-1]})


def beyond(name):
    return lambda state: state[f"{MLP}.{name}"].__setitem__(0, 99)


@pytest.mark.parametrize(
    ("variant", "change", "said"),
    [
        ("gptq_4", drop("scales"), "is in codes, but has no tensor scales"),
        ("gptq_4", cut("qweight"), "has qweight of shape"),
        ("gptq_4", cut("qzeros"), "has qzeros of shape"),
        ("gptq_4", beyond("g_idx"), "has inputs in groups beyond"),
        ("awq", cut("scales"), "has qzeros of shape"),
        ("fp8_blocks", drop("weight_scale_inv"), "has no tensor weight_scale_inv"),
        ("w4a16", cut("weight_scale"), "has weight_scale of shape"),
        ("nf4", cut("weight.absmax"), "has weight.absmax of shape"),
        (
            "nf4",
            lambda state: state[f"{MLP}.weight.quant_state.bitsandbytes__nf4"].fill(91),
            "cannot be read",
        ),
    ],
)
def test_damaged_codes_are_named(tmp_path, variant, change, said):
    model = edited(tmp_path, variant, change)
    with pytest.raises(SourceError, match=re.escape(said)) as found:
        open_model(model)
    assert MLP in str(found.value)


def test_modules_that_are_not_in_codes_stay_as_they_are(tmp_path):
    """Whatever the config says of them."""

    def undo(state):
        for tensor in ("weight", "weight_scale_inv"):
            state.pop(f"{MLP}.{tensor}")
        state[f"{MLP}.weight"] = dense

    opened = open_model(GOLDENS / "fp8_blocks")
    dense = dense_array(opened.format, opened.config, opened.arrays, "layer_0.down.kernel")
    model = edited(tmp_path, "fp8_blocks", undo)
    found, _ = logits_of(model, fg.Split(device=0, disk=100))
    expected, _ = logits_of(GOLDENS / "fp8_blocks")
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-2)


def test_what_is_no_number_in_fp8_is_found(tmp_path):
    def spoil(state):
        state[f"{MLP}.weight"].view(np.uint8)[3, 3] = 0x7F

    model = edited(tmp_path, "fp8_whole", spoil)
    assert "not numbers" in verify(model).problems[0]
    with pytest.raises(Exception, match="not numbers"):
        logits_of(model)
