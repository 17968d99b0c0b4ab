"""Rows that go on elsewhere take along what is theirs, and nothing else."""

from types import SimpleNamespace

import numpy as np

from flexgen_jax.engine.rearranging import saved


def test_what_nobody_has_is_saved_as_nothing():
    """A row that failed may hold NaN; whoever takes its place after a restart must not see it."""
    arrays = [np.full((3, 2, 4, 5), np.nan, np.float32), np.ones((3, 2, 4, 1), np.uint8)]
    arrays[0][[0, 2]] = 7
    cell = SimpleNamespace(name="cell")
    cells = SimpleNamespace(
        cache={(1, 0): cell},
        value_sums={"cell": np.array([[1.0], [np.nan], [2.0]])},
        positions=lambda layer, batch, column: arrays,
    )
    state = SimpleNamespace(
        rows=["somebody", None, "another"],
        begun=True,
        num_live=2,
        now=SimpleNamespace(column=3),
    )
    ((name, found),) = saved([state], cells)
    assert name == "cell"
    assert all(np.isfinite(array).all() for array in found.values())
    assert (found["0"][[0, 2]] == 7).all()
    assert not found["0"][1].any()
    assert not found["1"][1].any()
    assert found["1"][0].all()
    assert found["value_sum"].tolist() == [[1.0], [0.0], [2.0]]
