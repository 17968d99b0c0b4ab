"""What 4-bit weights cost with fitted scales and zeros, beside minimum and maximum; JSON lines.

Both on the same text, in the same groups: perplexity and divergence from full precision.

    python benchmarks/four_bits.py                      # the bundled model
    python benchmarks/four_bits.py --model smollm2-135m # a directory made by examples/smollm2.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

import flexgen_jax as fg
from flexgen_jax.compare import compare
from flexgen_jax.models.fitting import quantize_fitted
from flexgen_jax.models.params import param_records
from flexgen_jax.models.quantization import dequantize, quantize
from flexgen_jax.models.registry import family_of
from flexgen_jax.weights.huggingface import HuggingFaceModel
from flexgen_jax.weights.weight_format import WeightFormat

DEMO = Path(fg.__file__).parent / "demo_model"
PIECE = 1 << 16  # elements at a time, as a conversion has it


def there_and_back(quantise: Callable[..., Any], x: np.ndarray, group: int) -> np.ndarray:
    """What the codes of ``x`` stand for."""
    rows = max(1, PIECE // x.shape[-1])
    back = jax.jit(lambda part: dequantize(quantise(part, group=group)))
    return np.concatenate([np.asarray(back(x[i : i + rows])) for i in range(0, len(x), rows)])


def write(model: Path, into: Path, dtype: str, quantise: Callable[..., Any], group: int) -> None:
    """A dense directory of what the codes of ``model`` stand for."""
    source = HuggingFaceModel(model)
    form = WeightFormat.usual(dtype, 4, group)
    state = {}
    for name, record in param_records(source.config).items():
        transposed = form.transposes(source.config, name)
        shape = form.array_shape(source.config, name)
        blocks = source.blocks(name, np.dtype(np.float32), transposed=transposed)
        x = np.concatenate([block.reshape(-1) for block in blocks]).reshape(shape)
        if record.quantized:
            x = there_and_back(quantise, x, group)
        place = family_of(source.config).source(source.config, name)
        state[place.key] = np.ascontiguousarray(x.T if place.transposed != transposed else x)
    into.mkdir()
    shutil.copy(model / "config.json", into)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, into)
    save_file(state, into / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--out", type=Path, help="append here instead of printing")
    args = parser.parse_args()
    text = (DEMO / "held_out.txt").read_text(encoding="utf-8")
    ways: dict[str, Callable[..., Any]] = {
        "min-max": lambda x, group: quantize(x, bits=4, group=group),
        "fitted": lambda x, group: quantize_fitted(x, group=group),
    }
    policy = fg.Policy(device_batch_size=32, num_device_batches=4, refill=False)  # one block
    with tempfile.TemporaryDirectory(prefix="flexgen-jax-bench-") as scratch:
        models = {"full": args.model}
        for name, quantise in ways.items():
            models[name] = Path(scratch) / name
            write(args.model, models[name], args.dtype, quantise, args.group_size)

        def make(model: str = "full", **_: Any) -> fg.LLM:
            return fg.LLM(str(models[model]), policy=policy, dtype="float32")

        found = compare(
            make,
            text,
            {name: {"model": name} for name in models},
            context=args.context,
            max_windows=args.windows,
        )
    full, *others = found
    rises = {row.name: row.perplexity / full.perplexity - 1 for row in others}
    record = {
        "benchmark": "four_bits",
        "model": "bundled" if args.model == DEMO else args.model.name,
        "layout": WeightFormat.usual(args.dtype).layout,
        "group_size": args.group_size,
        "perplexity": {row.name: row.perplexity for row in found},
        "rise": rises,
        "of_min_max": rises["fitted"] / rises["min-max"],
        "kl_divergence": {row.name: row.kl_divergence for row in others},
        "python": sys.version.split()[0],
    }
    with args.out.open("a") if args.out else sys.stdout as out:
        print(json.dumps(record), file=out)


if __name__ == "__main__":
    main()
