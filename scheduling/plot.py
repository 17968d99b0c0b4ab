"""Timelines as a picture: a row a stream, a colour a kind of work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scheduling.timeline import Span, Timeline

_PREFILL, _DECODE, _MOVE, _OTHER = "#1b6ca8", "#59a5d8", "#e08e45", "#9a9a9a"
_KINDS = {
    "prefill": _PREFILL,
    "decode": _DECODE,
    "load or store": _MOVE,
    "other": _OTHER,
}


def _kind(span: Span) -> str:
    if span.op == "Compute":
        return "decode" if span.step else "prefill"
    return "load or store" if span.op.startswith(("Load", "Store")) else "other"


def plot(
    timelines: Timeline | list[Timeline],
    path: str | Path,
    *,
    window: tuple[float, float] | None = None,
    title: str | None = None,
) -> None:
    """Draws one timeline, or several under each other on one time axis.

    Args:
        path: ``.png`` or ``.svg``, as matplotlib understands it.
        window: Seconds from and to; None: everything.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'flexgen-jax[plot]'") from error
    several = [timelines] if isinstance(timelines, Timeline) else list(timelines)
    rows = sum(max(1, len(t.streams)) for t in several)
    figure = Figure(figsize=(12, 1.4 + 0.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(
        len(several),
        1,
        sharex=True,
        squeeze=False,
        height_ratios=[max(1, len(t.streams)) for t in several],
    )
    for ax, timeline in zip(axes[:, 0], several, strict=True):
        _draw(ax, timeline)
    last = axes[-1, 0]
    last.set_xlabel("seconds")
    last.set_xlim(*(window or (0, max(t.seconds for t in several) or 1)))
    used = {_kind(s) for t in several for s in t.spans}
    patches = [Patch(color=c, label=k) for k, c in _KINDS.items() if k in used]
    if patches:
        figure.legend(handles=patches, loc="outside upper right", ncols=len(patches), frameon=False)
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=120)


def _draw(ax: Any, timeline: Timeline) -> None:
    total = timeline.seconds
    streams = timeline.by_stream()
    for row, (_, spans) in enumerate(streams.items()):
        for kind, colour in _KINDS.items():
            # Neighbouring layers differ in shade, so that one can be told from the next.
            for odd in (False, True):
                bars = [
                    (s.start, s.seconds)
                    for s in spans
                    if _kind(s) == kind and bool((s.layer or 0) % 2) is odd
                ]
                ax.broken_barh(
                    bars, (row - 0.4, 0.8), color=colour, alpha=0.75 if odd else 1.0, linewidth=0
                )
    labels = [f"{name} ({timeline.busy(name) / total:.0%})" if total else name for name in streams]
    ax.set_yticks(range(len(streams)), labels)
    ax.set_ylim(len(streams) - 0.5, -0.5)
    ax.set_title(timeline.label, loc="left", fontsize="medium")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)
