"""Makes the golden of bits: digests of the logits that OPT gives under several policies.

A refactoring must not change them. XLA promises equal bits for one version and one kind of
processor only, so there is an entry for each combination on which this script was run:

    python tests/goldens/make_bits.py

run before a change, adds this machine's entry; ``tests/test_bits.py`` compares where there is one.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flexgen_jax as fg

HERE = Path(__file__).parent
FILE = HERE / "bits.json"
DISK, HOST = fg.Split(device=0, host=0, disk=100), fg.Split(device=0, host=100, disk=0)

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "float32": ("pre_norm", "float32", {}),
    "post norm, projections": ("post_norm_projected", "float32", {"weights": DISK}),
    "untied": ("untied_projected", "float32", {"cache": DISK, "hidden": DISK}),
    "bfloat16": ("pre_norm", "bfloat16", {"weights": DISK, "cache": DISK}),
    "host attention": ("no_bias_no_affine", "bfloat16", {"cache": HOST, "host_attention": True}),
    "4 bits": ("pre_norm", "float32", {"weight_bits": 4, "cache_bits": 4}),
    "sparse": ("pre_norm", "float32", {"cache": HOST, "attention_sparsity": 0.4}),
}


def platform() -> str:
    """What bits depend on beside the code."""
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    # Flags do not tell: of two processors with AVX-512 each has its own tiles and caches.
    kind = [
        found[1] if (found := re.search(rf"^{name}\s*:\s*(\S+)", about, re.MULTILINE)) else "?"
        for name in ("vendor_id", "cpu family", "model")
    ]
    return f"jax {jax.__version__}, {jax.default_backend()}, {' '.join(kind)}"


def digest(case: str) -> str:
    """Of the logits of every step and batch, in their order."""
    variant, dtype, options = CASES[case]
    prompts = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))["prompts"]
    found: dict[tuple[int, int], bytes] = {}

    def keep(step: int, batch: int, logits: jax.Array) -> None:
        found[batch, step] = np.asarray(logits).tobytes()

    policy = fg.Policy(device_batch_size=4, num_device_batches=2, **options)
    with (
        tempfile.TemporaryDirectory() as directory,
        fg.LLM(str(HERE / variant), policy=policy, dtype=dtype, offload_dir=directory) as llm,
    ):
        llm.generate(
            prompts,
            fg.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
            on_logits=keep,
        )
    total = hashlib.sha256()
    for key in sorted(found):
        total.update(found[key])
    return total.hexdigest()[:16]


def main(say: Callable[[str], None] = print) -> None:
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    known[platform()] = {case: digest(case) for case in CASES}
    FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    say(f"{FILE}: {platform()}")


if __name__ == "__main__":
    main()
