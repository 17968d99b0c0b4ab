"""Draws how throughput grows with the rows that share each pass over the experts on disk.

python benchmarks/plot_experts.py    # rewrites docs/experts.svg from results.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
MODEL = "allenai/OLMoE-1B-7B-0924"


def runs(results: Path) -> tuple[list[dict], dict[int, float]]:
    """Ours of the model, fewest rows first, and the seconds of computing alone, by rows."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    own = [r for r in records if r["benchmark"] == "experts" and r["model"] == MODEL]
    ours = [r for r in own if r["kind"] == "run" and r["name"] == "ours"]
    alone = {_rows(r): r["seconds"] for r in own if r["kind"] == "compute"}
    return sorted(ours, key=_rows), alone


def _rows(record: dict) -> int:
    return record["batch"] * record["num_batches"]


def draw(records: list[dict], alone: dict[int, float], path: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "flexgen-jax"
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    rows = [_rows(r) for r in records]
    tokens = [r["generated_tokens"] for r in records]
    axes.plot(rows, [r["tokens_per_second"] for r in records], "o-", label="measured")
    limits = {
        "compute alone": [alone[n] for n in rows],
        "reading alone": [r["io_alone_seconds"] for r in records],
    }
    for label, seconds in limits.items():
        rates = [n / s for n, s in zip(tokens, seconds, strict=True)]
        axes.plot(rows, rates, ":", label=f"limit: {label}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(rows, [str(n) for n in rows])
    axes.set_xlabel("rows of the block")
    axes.set_ylabel("tokens/s")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(*runs(ROOT / "benchmarks" / "results.jsonl"), ROOT / "docs" / "experts.svg")
