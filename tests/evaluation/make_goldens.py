"""Writes goldens.json: the figures of lm_eval's own ``hf`` model for the bundled tiny model.

Needs torch and transformers: python -m tests.evaluation.make_goldens, from the project's root.
"""

import json
from pathlib import Path

from tests.evaluation.harness import figures

if __name__ == "__main__":
    found = figures("hf", pretrained="flexgen_jax/demo_model", dtype="float32", device="cpu")
    (Path(__file__).parent / "goldens.json").write_text(json.dumps(found, indent=1) + "\n")
