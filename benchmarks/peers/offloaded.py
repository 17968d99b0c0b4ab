"""One run of a peer on the CPU, in the peers' own environment; prints one JSON line.

Started by ``offload.py`` and ``experts.py``. Needs torch, transformers and accelerate.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # run as a file, not as a module

from machine import die_first, die_with, measured  # noqa: E402

_SCALE = 0.02


def _model(config_file: Path) -> Any:
    """The architecture without weights; what is computed and not stored is there."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(config_file.parent)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def _fill(name: str, tensor: Any) -> None:
    """Random weights as those of ``flexgen-jax convert --dummy``."""
    if name.endswith("bias"):
        tensor.zero_()
    elif "norm" in name:
        tensor.fill_(1)
    else:
        tensor.normal_(0, _SCALE)


def prepare(config_file: Path, folder: Path) -> None:
    """Writes Accelerate's offload folder, one tensor in memory at a time."""
    import torch
    from accelerate.utils import offload_weight, save_offload_index

    folder.mkdir(parents=True)
    index: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, meta in _model(config_file).named_parameters(remove_duplicate=False):
        if id(meta) in first:  # tied: the same bytes on disk, as in our store
            (folder / f"{name}.dat").symlink_to(f"{first[id(meta)]}.dat")
            index[name] = index[first[id(meta)]]
            continue
        first[id(meta)] = name
        tensor = torch.empty(meta.shape, dtype=meta.dtype)
        _fill(name, tensor)
        index = offload_weight(tensor, name, str(folder), index)
    save_offload_index(index, str(folder))


def in_memory(args: argparse.Namespace) -> Any:
    import torch

    model = _model(args.config).to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter)
    return model


def on_disk(args: argparse.Namespace) -> Any:
    from accelerate import disk_offload

    return disk_offload(_model(args.config), str(args.weights), execution_device="cpu")


def generate(model: Any, batch: int, prompt_len: int, gen_len: int) -> list[float]:
    """Greedy; every request gets ``gen_len`` tokens. The time of each step's end."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    ends = []

    class Clock(StoppingCriteria):
        def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
            ends.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    ids = torch.tensor([[2 + row % 97] * prompt_len for row in range(batch)])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            use_cache=True,
            min_new_tokens=gen_len,
            max_new_tokens=gen_len,
            stopping_criteria=StoppingCriteriaList([Clock()]),
        )
    assert out.shape == (batch, prompt_len + gen_len), out.shape
    return ends


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    model = in_memory(args) if args.peer == "hf" else on_disk(args)
    # The head gets a strided slice of the prefill's last positions. With Accelerate's weights torch
    # 2.13 then copies them once per request: gigabytes, seconds. Peers run at their best: not here.
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    generate(model, args.batch, 16, 2)  # lazy initialisation
    ends: list[float] = []

    def timed() -> None:
        ends.append(time.perf_counter())
        ends.extend(generate(model, args.batch, args.prompt_len, args.gen_len))

    figures = measured(timed, args.weights or args.config.parent)
    return {
        **figures,
        "generated_tokens": args.batch * args.gen_len,
        "prefill_seconds": round(ends[1] - ends[0], 3),
        "decode_seconds": round(ends[-1] - ends[1], 3),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, choices=("hf", "accelerate", "flexgen"))
    parser.add_argument("--config", type=Path, required=True, help="a config.json")
    parser.add_argument("--weights", type=Path, help="Accelerate's offload folder")
    parser.add_argument("--prepare", action="store_true", help="only write that folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--gen-len", type=int, default=32)
    parser.add_argument("--parent", type=int, default=os.getppid())
    args = parser.parse_args()
    die_with(args.parent)
    die_first(1000)
    needed = {
        "hf": ("torch", "transformers", "accelerate"),
        "accelerate": ("torch", "transformers", "accelerate"),
        "flexgen": ("flexgen",),
    }
    missing = [name for name in needed[args.peer] if importlib.util.find_spec(name) is None]
    if missing:
        result: dict[str, Any] = {"skipped": f"not installed: {', '.join(missing)}"}
    elif args.peer == "flexgen":
        # FlexGen 0.1.8 asks for CUDA in many places: whoever forces it onto the CPU does so here.
        result = {"skipped": "flexgen is there, but nothing here forces it onto the CPU"}
    elif args.prepare:
        prepare(args.config, args.weights)
        result = {"prepared": str(args.weights)}
    else:
        result = run(args)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
