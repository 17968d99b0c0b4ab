"""Timelines as a picture: a row a stream, a colour a kind of work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scheduling.timeline import GENERATOR, Span, Timeline

_COLOURS = {
    "prefill": "#1b6ca8",
    "decode": "#59a5d8",
    "attend": "#5aa469",
    "load": "#e08e45",
    "store": "#8a6fb0",
    "free": "#6b6b6b",
    "barrier": "#d9d9d9",
}

_METADATA = {
    ".png": {"Software": GENERATOR},
    ".svg": {"Creator": GENERATOR},
    ".pdf": {"Creator": GENERATOR},
}


def check_format(path: str | Path) -> None:
    """Whether :func:`plot` could draw to ``path``: to be known before a long run.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no format of that name.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'flexgen-jax[plot]'") from error
    suffix = Path(path).suffix.lstrip(".").lower()
    known = FigureCanvasBase.get_supported_filetypes()
    if suffix not in known:
        raise ValueError(f"cannot draw {path}: expected one of .{', .'.join(sorted(known))}")


def _kind(span: Span) -> str:
    if span.op in ("Project", "Compute", "ComputeExperts"):
        return "decode" if span.step else "prefill"
    for prefix in ("Load", "Store", "Free", "Attend"):
        if span.op.startswith(prefix):
            return prefix.lower()
    return "barrier"


def plot(
    timelines: Timeline | Sequence[Timeline],
    path: str | Path,
    *,
    window: tuple[float, float] | None = None,
    steps: tuple[int, int] | None = None,
    title: str | None = None,
) -> None:
    """Draws one timeline, or several under each other on one time axis.

    Neighbouring layers differ in shade. The percentages are of the whole timeline, not the window.

    Args:
        path: ``.png`` or ``.svg``, as matplotlib understands it.
        window: Seconds from and to; None: everything.
        steps: The first step to show and the one to stop before, instead of ``window``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing to draw, or a window that is empty or given twice.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'flexgen-jax[plot]'") from error
    several = [timelines] if isinstance(timelines, Timeline) else list(timelines)
    if not several:
        raise ValueError("expected at least one timeline to draw, got none")
    begin, end = _window(several, window, steps)
    heights = [max(1, len(t.streams)) for t in several]
    figure = Figure(figsize=(12, 1.4 + 0.5 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(several), 1, sharex=True, squeeze=False, height_ratios=heights)
    drawn: set[str] = set()
    for ax, timeline in zip(axes[:, 0], several, strict=True):
        drawn |= _draw(ax, timeline, begin, end)
    last = axes[-1, 0]
    last.set_xlabel("seconds")
    last.set_xlim(begin, end)
    patches = [Patch(color=c, label=kind) for kind, c in _COLOURS.items() if kind in drawn]
    if patches:
        figure.legend(handles=patches, loc="outside upper right", ncols=len(patches), frameon=False)
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=120, metadata=_METADATA.get(Path(path).suffix.lower()))


def _window(
    several: list[Timeline], window: tuple[float, float] | None, steps: tuple[int, int] | None
) -> tuple[float, float]:
    if window is not None and steps is not None:
        raise ValueError("give window (seconds) or steps, not both")
    if steps is not None:
        shown = [
            s for t in several for s in t.spans if s.step is not None and s.step in range(*steps)
        ]
        if not shown:
            raise ValueError(f"no span lies in steps {steps[0]}..{steps[1] - 1}")
        window = min(s.start for s in shown), max(s.end for s in shown)
    begin, end = window or (0.0, max(t.seconds for t in several) or 1.0)
    if not begin < end:
        raise ValueError(f"the window must end after it begins, got {begin} to {end} seconds")
    return begin, end


def _draw(ax: Any, timeline: Timeline, begin: float, end: float) -> set[str]:
    bars: dict[tuple[int, str, bool], list[tuple[float, float]]] = {}
    streams = timeline.by_stream()
    for row, spans in enumerate(streams.values()):
        for span in spans:
            if span.seconds > 0 and span.end > begin and span.start < end:
                group = row, _kind(span), bool((span.layer or 0) % 2)
                bars.setdefault(group, []).append((span.start, span.seconds))
    for (row, kind, odd), ranges in bars.items():
        ax.broken_barh(
            ranges,
            (row - 0.4, 0.8),
            color=_COLOURS[kind],
            alpha=0.7 if odd else 1.0,
            linewidth=0,
            zorder=1 if kind == "barrier" else 2,
            snap=False,  # snapping drops most bars thinner than a pixel; so they tint it instead
        )
    total = timeline.seconds
    labels = [f"{name} ({timeline.busy(name) / total:.0%})" if total else name for name in streams]
    ax.set_yticks(range(len(streams)), labels)
    ax.set_ylim(max(1, len(streams)) - 0.5, -0.5)
    ax.set_title(timeline.label, loc="left", fontsize="medium")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return {kind for _, kind, _ in bars}
