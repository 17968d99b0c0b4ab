"""Draws how throughput grows with the batches of a block, from ``results.jsonl``.

python benchmarks/plot_batches.py    # rewrites docs/batches.svg
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent


def growth(results: Path) -> list[dict]:
    """The records of the runs that differ in the number of batches alone, fewest first."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    chosen = [r for r in records if r["benchmark"] == "growth" and r["kind"] == "summary"]
    return sorted(chosen, key=lambda r: r["num_batches"])


def draw(records: list[dict], path: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "flexgen-jax"
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    batches = [r["num_batches"] for r in records]
    axes.plot(batches, [r["tokens_per_second"] for r in records], "o-", label="measured")
    limits = {"compute alone": "compute_alone_seconds", "reading alone": "io_alone_seconds"}
    for label, name in limits.items():
        rates = [r["tokens_per_second"] * r["seconds"] / r[name] for r in records]
        axes.plot(batches, rates, ":", label=f"limit: {label}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(batches, [str(n) for n in batches])
    axes.set_xlabel("num_device_batches")
    axes.set_ylabel("tokens/s")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(growth(ROOT / "benchmarks" / "results.jsonl"), ROOT / "docs" / "batches.svg")
