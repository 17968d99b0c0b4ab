"""Makes the goldens of published quantisation: tiny checkpoints, and logits of what they stand for.

Run by hand, seldom, with torch, transformers, compressed-tensors, bitsandbytes and autoawq (without
its dependencies; only its packing is used):

    python tests/goldens/make_quantised_goldens.py

Each variant is a family's golden model whose matrices a format's own package has put into codes
and made dense again; GPTQ, whose package does not install everywhere, by the paper's formulas and
its authors' layout, written here anew. ``logits.npz`` has what transformers answers in float32 with
the dense matrices, after each of ``expected.json``'s prompts.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
OUT = HERE / "quantised"
PROMPTS = [[5, 17, 30, 3], [7], [11, 28, 2, 24, 9, 31, 6, 19, 23]]
GROUP = 16
State = dict[str, torch.Tensor]
# Matrix (n_out, n_in) -> its tensors by what follows the module's name, and what they stand for.
Encode = Callable[[torch.Tensor], tuple[State, torch.Tensor]]


def fp8_blocks(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """As transformers' fine-grained FP8 has it; blocks of 16 x 16, cut at the edges."""
    rows, columns = (-(-n // GROUP) for n in weight.shape)
    padded = torch.zeros(rows * GROUP, columns * GROUP)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(rows, GROUP, columns, GROUP)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-6) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    dense = (codes.float() * scale[:, None, :, None]).reshape(padded.shape)
    cut = tuple(slice(n) for n in weight.shape)
    kept = codes.reshape(padded.shape)[cut].contiguous()
    return {"weight": kept, "weight_scale_inv": scale}, dense[cut]


def fp8_whole(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """One scale of all, as vLLM's static FP8."""
    scale = weight.abs().max().reshape(1) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    state = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}
    return state, codes.float() * scale


def by_compressed_tensors(format_: str, **weights: Any) -> tuple[Encode, dict[str, Any]]:
    """The package's own compressor, and the config."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(format_)

    def encode(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        groups = weight.reshape(weight.shape[0], -1, weights.get("group_size") or weight.shape[1])
        scale, zero = calculate_qparams(groups.amin(dim=-1), groups.amax(dim=-1), args)
        scale = scale.bfloat16().float()
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        found = compressor.compress(state, scheme)
        dense = compressor.decompress(found, scheme)["weight"]
        found["weight_scale"] = found["weight_scale"].bfloat16()
        return found, dense.float()

    config = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump()}},
    }
    return encode, json.loads(json.dumps(config, default=str))


def packed(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Codes in words of 32 bits, the first one lowest, along ``axis``."""
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    groups = codes.reshape(*codes.shape[:-1], -1, 32 // bits)
    words = np.zeros(groups.shape[:-1], np.uint32)
    for place in range(32 // bits):
        words |= groups[..., place] << np.uint32(bits * place)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def gptq(bits: int, *, ordered: bool, symmetric: bool, version: int) -> Encode:
    """Rounded to the nearest: how codes are chosen is not what is tested."""

    def encode(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        matrix = weight.numpy().T  # (n_in, n_out)
        n_in = len(matrix)
        index = np.arange(n_in) // GROUP
        if ordered:
            index = np.random.default_rng(n_in).permutation(index)
        groups, top = index.max() + 1, (1 << bits) - 1  # the last one may be smaller
        low = np.stack([matrix[index == g].min(axis=0) for g in range(groups)])
        high = np.stack([matrix[index == g].max(axis=0) for g in range(groups)])
        if symmetric:
            high = np.maximum(np.abs(low), high)
            low = -high
        low, high = np.minimum(low, 0), np.maximum(high, 1e-4)
        scales = ((high - low) / top).astype(np.float16).astype(np.float32)
        if symmetric:
            zeros = np.full_like(scales, (top + 1) // 2)
        else:
            zeros = np.clip(np.round(-low / scales), 0, top)
        codes = np.clip(np.round(matrix / scales[index]) + zeros[index], 0, top)
        dense = (codes - zeros[index]) * scales[index]
        words = packed(zeros.astype(np.uint32), bits, 1)
        if version == 1:  # less one, as integers are subtracted from words
            ones = sum(1 << bits * place for place in range(32 // bits))
            words = (words.view(np.uint32) - np.uint32(ones)).view(np.int32)
        state = {
            "qweight": torch.from_numpy(packed(codes.astype(np.uint32), bits, 0)),
            "qzeros": torch.from_numpy(words),
            "scales": torch.from_numpy(scales.astype(np.float16)),
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }
        return state, torch.from_numpy(np.ascontiguousarray(dense.T))

    return encode


def awq(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """Unpacked by AutoAWQ, whose own packing takes multiples of 32 outputs only."""
    from awq.utils.packing_utils import dequantize_gemm

    matrix = weight.numpy().T  # (n_in, n_out)
    groups = matrix.reshape(-1, GROUP, matrix.shape[1])
    low, high = np.minimum(groups.min(axis=1), 0), np.maximum(groups.max(axis=1), 1e-4)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.clip(np.round(-low / scales), 0, 15)
    index = np.arange(len(matrix)) // GROUP
    codes = np.clip(np.round(matrix / scales.astype(np.float32)[index]) + zeros[index], 0, 15)

    def words(codes: np.ndarray) -> torch.Tensor:
        mixed = codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return torch.from_numpy(packed(mixed.reshape(codes.shape), 4, 1))

    state = {"qweight": words(codes), "qzeros": words(zeros), "scales": torch.from_numpy(scales)}
    dense = dequantize_gemm(state["qweight"], state["qzeros"], state["scales"].float(), 4, GROUP)
    return state, dense.T.contiguous()


def bitsandbytes(kind: str, *, nested: bool) -> Encode:
    """Quantised by the package, made dense by its table.

    Its own ``dequantize_4bit`` is wrong on CPUs where a row is shorter than a block (0.50).
    """

    def encode(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        from bitsandbytes.functional import dequantize_blockwise, quantize_4bit

        codes, state = quantize_4bit(
            weight, blocksize=64, quant_type=kind, compress_statistics=nested
        )
        found = {"weight": codes}
        for key, value in state.as_dict(packed=True).items():
            found[f"weight.{key}"] = value
        absmax = state.absmax
        if nested:
            absmax = dequantize_blockwise(absmax, state.state2).float() + state.offset
        both = codes.flatten()
        index = torch.stack([both >> 4, both & 15], dim=-1).flatten().long()
        dense = state.code[index] * absmax.repeat_interleave(64)[: index.numel()]
        return found, dense.reshape(weight.shape)

    return encode


def int8(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """LLM.int8(): vectors' maxima as ``SCB``."""
    maxima = weight.abs().amax(dim=1)
    codes = (weight * (127 / maxima[:, None])).round().to(torch.int8)
    state = {"weight": codes, "SCB": maxima, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return state, codes.float() * (maxima / 127)[:, None]


def variants() -> dict[str, tuple[str, dict[str, Any], Encode]]:
    """Name -> the golden that it is made of, ``quantization_config``, how a matrix is encoded."""
    common = {"quant_method": "gptq", "group_size": GROUP}
    found: dict[str, tuple[str, dict[str, Any], Encode]] = {
        "fp8_blocks": (
            "families/qwen3",
            {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP], "fmt": "e4m3"},
            fp8_blocks,
        ),
        "fp8_whole": (
            "families/mistral",
            {"quant_method": "fp8", "activation_scheme": "static"},
            fp8_whole,
        ),
        "gptq_4": (
            "families/phi3",
            {**common, "bits": 4, "desc_act": True, "sym": False, "checkpoint_format": "gptq"},
            gptq(4, ordered=True, symmetric=False, version=1),
        ),
        "gptq_4_v2": (
            "pre_norm",
            {**common, "bits": 4, "desc_act": False, "checkpoint_format": "gptq_v2"},
            gptq(4, ordered=False, symmetric=False, version=2),
        ),
        "gptq_8": (
            "families/qwen2",
            {**common, "bits": 8, "desc_act": False, "sym": True},
            gptq(8, ordered=False, symmetric=True, version=1),
        ),
        "awq": (
            "families/llama_bias",
            {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
            awq,
        ),
        "nf4": (
            "families/llama",
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            bitsandbytes("nf4", nested=False),
        ),
        "nf4_nested": (
            "families/smollm3",
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
            bitsandbytes("nf4", nested=True),
        ),
        "llm_int8": (
            "families/gemma2",
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            int8,
        ),
    }
    four: dict[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    for name, base, format_, weights in (
        ("w4a16", "families/llama3", "pack-quantized", {**four, "symmetric": True}),
        ("w4a16_zeros", "families/glm4", "pack-quantized", {**four, "symmetric": False}),
        ("w8a16", "families/olmo2", "pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int8", "families/granite", "int-quantized", {"num_bits": 8, "strategy": "channel"}),
        (
            "fp8_channel",
            "families/gemma3",
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "channel"},
        ),
    ):
        encode, config = by_compressed_tensors(format_, **weights)
        found[name] = base, config, encode
    return found


def write(name: str, base: Path, config: dict[str, Any], encode: Encode) -> np.ndarray:
    """The directory, and the logits."""
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    linear = {
        f"{key}.weight"
        for key, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and key != "lm_head"
    }
    state: State = {}
    for key, tensor in load_file(base / "model.safetensors").items():
        if key not in linear:
            state[key] = tensor
            continue
        codes, dense = encode(tensor.float())
        for part, values in codes.items():
            state[f"{key.removesuffix('.weight')}.{part}"] = values.contiguous()
        assert (dense - tensor.float()).abs().max() < 0.3 * tensor.float().abs().max()
        with torch.no_grad():
            model.get_parameter(key).copy_(dense)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((base / "config.json").read_text())
    values["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    with torch.no_grad():
        return np.stack([model(torch.tensor([p])).logits[0, -1].numpy() for p in PROMPTS])


def main() -> None:
    chosen = sys.argv[1:]
    logits, file = {}, OUT / "logits.npz"
    if chosen and file.exists():
        with np.load(file) as known:
            logits = dict(known)
    for name, (base, config, encode) in variants().items():
        if not chosen or name in chosen:
            logits[name] = write(name, HERE / base, config, encode)
    np.savez(file, **logits)
    (OUT / "expected.json").write_text(json.dumps({"prompts": PROMPTS}) + "\n")


if __name__ == "__main__":
    main()
