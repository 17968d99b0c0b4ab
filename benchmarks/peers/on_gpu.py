"""One run of FlexGen's package or of vLLM's offloading, with random weights; prints a JSON line.

Started by ``gpu.py``, in the peer's own environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def flexgen(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    """Its own benchmark of OPT-30B in float16, with fewer layers and without a tokenizer."""
    from flexgen import flex_opt

    whole = flex_opt.get_opt_config

    def shortened(name: str, **more: Any) -> Any:
        return dataclasses.replace(whole(name, **more), num_hidden_layers=args.layers)

    def tokenizer(prompts: list[str], *, max_length: int, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[[5] * max_length for _ in prompts])

    flex_opt.get_opt_config = shortened
    flex_opt.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)
    parser = argparse.ArgumentParser()
    flex_opt.add_parser_arguments(parser)
    with tempfile.TemporaryDirectory() as scratch:
        asked = ["--model", "facebook/opt-30b", "--path", "_DUMMY_", "--offload-dir", scratch]
        asked += ["--gpu-batch-size", str(args.batch), "--num-gpu-batches", str(args.num_batches)]
        asked += ["--prompt-len", str(args.prompt_len), "--gen-len", str(args.gen_len)]
        asked += ["--log-file", f"{scratch}/log", "--verbose", "0"]
        flex_opt.run_flexgen(parser.parse_args([*asked, *options]))
    seconds = sum(flex_opt.timers("generate").costs)
    return {"seconds": seconds, "dtype": "float16"}


def vllm(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    """The model of the folder, all of its weights offloaded to host memory as far as it does."""
    import vllm as package

    llm = package.LLM(
        str(args.folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        cpu_offload_gb=math.ceil(args.gb),
        max_model_len=args.prompt_len + args.gen_len,
        max_num_seqs=args.batch * args.num_batches,
        enable_prefix_caching=False,
    )
    params = package.SamplingParams(
        temperature=0.0, max_tokens=args.gen_len, ignore_eos=True, detokenize=False
    )
    prompts = [
        {"prompt_token_ids": [2 + (row * 31 + i * 7) % 997 for i in range(args.prompt_len)]}
        for row in range(args.batch * args.num_batches)
    ]
    llm.generate(prompts, params, use_tqdm=False)
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return {"seconds": time.perf_counter() - started, "version": package.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=("flexgen", "vllm"))
    parser.add_argument("--folder", type=Path, required=True, help="with a config.json")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--num-batches", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--prompt-len", type=int, required=True)
    parser.add_argument("--gen-len", type=int, required=True)
    parser.add_argument("--gb", type=float, default=0, help="of weights, for vLLM")
    args, options = parser.parse_known_args()
    if importlib.util.find_spec(args.peer) is None:
        print(json.dumps({"skipped": f"not installed: {args.peer}"}))
        return
    found = (flexgen if args.peer == "flexgen" else vllm)(args, options)
    tokens = args.batch * args.num_batches * args.gen_len
    seconds = round(found.pop("seconds"), 3)
    rate = round(tokens / seconds, 2)
    print(json.dumps({"tokens_per_second": rate, "seconds": seconds, **found}), flush=True)


if __name__ == "__main__":
    main()
