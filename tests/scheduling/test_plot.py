"""Pictures: real files, of the size and the kind that was asked for."""

import re
import struct
import sys

import numpy as np
import pytest

from scheduling import Span, Timeline, Workload, lock_step, zigzag
from scheduling.plot import plot

from .timelines import timed

W = Workload(num_steps=2, num_layers=3, num_batches=2)
FEW = timed(zigzag, W)


def size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    return struct.unpack(">II", data[16:24])


def test_a_picture_grows_with_its_rows(tmp_path):
    plot(FEW, tmp_path / "one.png")
    plot([FEW, timed(lock_step, W)], tmp_path / "two.png", title="two schedules")
    one, two = size(tmp_path / "one.png"), size(tmp_path / "two.png")
    assert one[0] == two[0] == 1440
    assert two[1] > one[1] > 300


def test_svg_by_its_extension(tmp_path):
    plot(FEW, tmp_path / "one.svg")
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert "<svg" in text


def test_bars_thinner_than_a_pixel_are_not_lost(tmp_path):
    """Thousands of short spans on one stream: the row is tinted along all its length."""
    from matplotlib.image import imread

    spans = tuple(Span("Compute", "compute", i / 10, i / 10 + 0.02, 1, 0, 0) for i in range(20_000))
    plot(Timeline(spans), tmp_path / "many.png")
    picture = imread(tmp_path / "many.png")[..., :3]
    middle = picture[picture.shape[0] // 2]
    columns = np.flatnonzero(middle.min(axis=1) < 0.99)
    assert np.isin(np.arange(400, 1300), columns).all()


def test_nothing_to_show_is_still_a_picture(tmp_path):
    plot(Timeline((), "empty"), tmp_path / "empty.png")
    assert size(tmp_path / "empty.png")[0] == 1440


def test_windows(tmp_path):
    plot(FEW, tmp_path / "seconds.png", window=(0.5, 1.0))
    plot(FEW, tmp_path / "steps.png", steps=(1, 2))
    plot(FEW, tmp_path / "all.png")
    pictures = {(tmp_path / f"{n}.png").read_bytes() for n in ("seconds", "steps", "all")}
    assert len(pictures) == 3


@pytest.mark.parametrize(
    ("timelines", "options", "words"),
    [
        ([], {}, "expected at least one timeline"),
        (FEW, {"window": (1, 1)}, "must end after it begins, got 1 to 1"),
        (FEW, {"window": (0, 1), "steps": (0, 1)}, "not both"),
        (FEW, {"steps": (7, 9)}, "no span lies in steps 7..8"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, timelines, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        plot(timelines, tmp_path / "none.png", **options)
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"pip install 'flexgen-jax\[plot\]'"):
        plot(FEW, tmp_path / "none.png")
