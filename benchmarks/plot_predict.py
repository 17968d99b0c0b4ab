"""Draws predicted against measured totals of ``benchmarks/results.jsonl``.

python benchmarks/plot_predict.py   # writes docs/predictions.svg
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    lines = (ROOT / "benchmarks" / "results.jsonl").read_text().splitlines()
    records = [
        r for r in map(json.loads, lines) if r["benchmark"] == "predict" and not r.get("new")
    ]
    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasSVG(figure)
    ax = figure.subplots()
    for order, marker in zip(dict.fromkeys(r["order"] for r in records), "os^Dv", strict=False):
        for preset, face in (("facebook/opt-125m", "none"), ("facebook/opt-1.3b", None)):
            chosen = [r for r in records if (r["order"], r["preset"]) == (order, preset)]
            if chosen:
                ax.scatter(
                    [r["measured_seconds"] for r in chosen],
                    [r["predicted_seconds"] for r in chosen],
                    marker=marker,
                    facecolors=face,
                    edgecolors="#1b6ca8",
                    label=f"{order}, {preset.rpartition('-')[2]}",
                )
    ends = [
        min(r["measured_seconds"] for r in records) / 1.5,
        max(r["measured_seconds"] for r in records) * 1.5,
    ]
    ax.plot(ends, ends, color="#6b6b6b", linewidth=1)
    low, high = ([e * f for e in ends] for f in (0.75, 1.25))
    ax.fill_between(ends, low, high, color="#d9d9d9", zorder=0, label="within 25%")
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    ax.set(xlabel="measured, seconds", ylabel="predicted, seconds")
    ax.legend(frameon=False, fontsize="small")
    figure.savefig(ROOT / "docs" / "predictions.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
