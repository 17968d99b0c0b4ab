"""Experts in codes: each is a part of tensors that all share, or has its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexgen_jax.models.params import param_records
from flexgen_jax.models.registry import load_config
from flexgen_jax.weights.checkpoint import convert, open_store
from flexgen_jax.weights.coded_leaves import planned_format
from flexgen_jax.weights.element_blocks import dense_array
from flexgen_jax.weights.exporting import export
from flexgen_jax.weights.in_place import open_in_place
from flexgen_jax.weights.tensor_file import SourceError

GOLDENS = Path(__file__).parent.parent / "goldens" / "families"
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def quantised(variant, into, said, encode):
    """A golden whose matrices of experts are what ``encode`` makes, and its dense twin."""
    tensors = load_file(GOLDENS / variant / "model.safetensors")
    dense, coded = {}, {}
    for key, tensor in tensors.items():
        if ".experts." in key and not key.endswith("bias"):
            stands_for, more = encode(key, tensor)
            dense[key] = stands_for.astype(tensor.dtype)
            coded.update(more)
        else:
            dense[key] = coded[key] = tensor
    folders = []
    for name, found in (("dense", dense), ("coded", coded)):
        folder = shutil.copytree(GOLDENS / variant, into / name)
        save_file(found, folder / "model.safetensors")
        folders.append(folder)
    config = json.loads((folders[1] / "config.json").read_text())
    config["quantization_config"] = said
    (folders[1] / "config.json").write_text(json.dumps(config))
    return folders


def mxfp4(key, tensor):
    """Random codes, of (experts, n_out, n_in), for floats of (experts, n_in, n_out)."""
    rng = np.random.default_rng(len(key) + int(key.split(".")[2]))
    experts, n_in, n_out = tensor.shape
    codes = rng.integers(0, 16, (experts, n_out, n_in // 32, 32))
    exponents = rng.integers(122, 126, (experts, n_out, n_in // 32)).astype(np.uint8)
    values = np.where(codes < 8, 1, -1) * FP4[codes % 8]
    values = values * np.float32(2) ** (exponents.astype(np.int32) - 127)[..., None]
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    dense = values.reshape(experts, n_out, n_in).swapaxes(1, 2)
    dense = np.ascontiguousarray(dense, np.float32)
    return dense, {f"{key}_blocks": blocks, f"{key}_scales": exponents}


def float8(key, tensor):
    scale = np.array([0.03 + 0.001 * len(key)], np.float32)
    weight = (tensor.astype(np.float32) / scale).astype(ml_dtypes.float8_e4m3fn)
    return weight.astype(np.float32) * scale, {key: weight, f"{key}_scale": scale}


FLOATS = ["self_attn", "layers.0.mlp", "mlp.gate"]
CASES = {
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4"}, mxfp4),
    "fp8": ("qwen3_moe", {"quant_method": "fp8", "ignored_layers": FLOATS}, float8),
}


@pytest.fixture(scope="module", params=CASES)
def twins(request, tmp_path_factory):
    variant, said, encode = CASES[request.param]
    return quantised(variant, tmp_path_factory.mktemp(request.param), said, encode)


def matrices(stored):
    found = {}
    for name in param_records(stored.config):
        array = dense_array(stored.format, stored.config, stored.arrays, name)
        found[name] = array.T if stored.format.transposes(stored.config, name) else array
    return found


def test_every_expert_is_its_own(twins):
    """In place, converted and exported: what the codes stand for, in bfloat16."""
    dense, coded = (matrices(open_in_place(twin, dtype="bfloat16")) for twin in twins)
    assert dense.keys() == coded.keys()
    for name, array in dense.items():
        np.testing.assert_allclose(
            coded[name].astype(np.float32), array.astype(np.float32), rtol=1e-2, err_msg=name
        )
    kernels = [array.tobytes() for name, array in coded.items() if "expert_" in name]
    assert len(set(kernels)) == len(kernels)


def test_what_is_converted_and_exported_is_dense(twins, tmp_path):
    plain, coded = twins
    store = open_store(convert(coded, tmp_path / "store", dtype="float32"))
    found, expected = matrices(store), matrices(open_in_place(plain, dtype="float32"))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array.astype(np.float32), rtol=1e-2, err_msg=name)
    exported = load_file(export(coded, tmp_path / "out") / "model.safetensors")
    assert {k: v.shape for k, v in exported.items()} == {
        k: v.shape for k, v in load_file(plain / "model.safetensors").items()
    }


def test_they_travel_in_their_codes_as_planned(twins):
    plain, coded = twins
    form = open_in_place(coded, dtype="bfloat16").format
    planned = planned_format(coded, load_config(coded), "bfloat16")
    assert planned is not None
    config = load_config(coded)
    ours, theirs = form.entries(config), planned.entries(config)
    assert {n: e.nbytes for n, e in ours.items() if "scale" not in n} == {
        n: e.nbytes for n, e in theirs.items() if "scale" not in n
    }
    experts = [name for name in ours if "expert_" in name and "bias" not in name]
    whole = open_in_place(plain, dtype="bfloat16").format.entries(config)
    dense = [name for name in whole if "expert_" in name and "bias" not in name]
    share = sum(ours[n].nbytes for n in experts) / sum(whole[n].nbytes for n in dense)
    assert share < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, k: t.pop(f"{k}_scales"), "tensor .*gate_up_proj is missing"),
        (lambda t, k: t.update({f"{k}_scales": t[f"{k}_scales"][1:]}), "has scales of shape"),
        (lambda t, k: t.update({f"{k}_blocks": t[f"{k}_blocks"][:, :8]}), "has blocks of shape"),
        (
            lambda t, k: t.update({f"{k}_blocks": t[f"{k}_blocks"].astype(np.int8)}),
            "has blocks in int8",
        ),
    ],
)
def test_damaged_codes_are_named(change, message, tmp_path):
    variant, said, encode = CASES["mxfp4"]
    _, coded = quantised(variant, tmp_path, said, encode)
    tensors = load_file(coded / "model.safetensors")
    change(tensors, "model.layers.1.mlp.experts.gate_up_proj")
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, coded / "model.safetensors")
    with pytest.raises(SourceError, match=message):
        open_in_place(coded)


def test_a_tensor_of_another_number_of_experts_is_named(tmp_path):
    model = shutil.copytree(GOLDENS / "gpt_oss", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    key = "model.layers.1.mlp.experts.down_proj"
    tensors[key] = np.ascontiguousarray(tensors[key][:3])
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(SourceError, match=r"has shape \[3, 32, 32\], expected \[4, 32, 32\]"):
        open_in_place(model)


def test_corrections_of_scores_stay_in_full_precision(tmp_path):
    """In place, in stores, in what is exported again; all else is bfloat16."""
    model = shutil.copytree(GOLDENS / "glm4_moe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    key, name = "model.layers.1.mlp.gate.e_score_correction_bias", "layer_1.router.correction"
    tensors[key] = np.linspace(7, 7.01, 8, dtype=np.float32)
    save_file(tensors, model / "model.safetensors")
    stored = open_store(convert(model, tmp_path / "store", dtype="bfloat16"))
    exported = export(stored.path, tmp_path / "out", dtype="bfloat16")
    for found in (open_in_place(model, dtype="bfloat16"), stored, open_in_place(exported)):
        np.testing.assert_array_equal(matrices(found)[name], tensors[key])
        entries = found.format.entries(found.config)
        assert {e.dtype for n, e in entries.items() if "correction" not in n} == {"bfloat16"}
