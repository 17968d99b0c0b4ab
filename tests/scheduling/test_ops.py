"""The text form of ops and schedules."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling import (
    Barrier,
    Compute,
    FreeWeights,
    LoadCache,
    LoadHidden,
    LoadWeights,
    StoreCache,
    StoreHidden,
    format_schedule,
    parse_op,
    parse_schedule,
)

from .strategies import ops

KINDS = (
    LoadWeights,
    FreeWeights,
    LoadCache,
    StoreCache,
    LoadHidden,
    StoreHidden,
    Compute,
    Barrier,
)


@given(ops)
def test_an_op_parses_back(op):
    assert parse_op(str(op)) == op
    assert hash(parse_op(str(op))) == hash(op)


@given(st.lists(ops))
def test_a_schedule_parses_back(schedule):
    assert parse_schedule(format_schedule(schedule)) == schedule


def test_the_text_form():
    assert str(LoadWeights(step=0, layer=3)) == "LoadWeights(step=0, layer=3)"
    assert str(Compute(1, 2, 3)) == "Compute(step=1, layer=2, batch=3)"
    assert str(Barrier()) == "Barrier()"


def test_blank_lines_comments_and_spaces_are_passed_over():
    text = "# a title\n\n  LoadWeights( step = 0,layer=1 )  # why\nBarrier()\n#Barrier()\n"
    assert parse_schedule(text) == [LoadWeights(0, 1), Barrier()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Prefetch(layer=1)", "expected an op (LoadWeights, "),
        ("Compute", "expected an op (LoadWeights, "),
        ("Barrier() Barrier()", "expected Barrier()"),
        ("Barrier(step=1)", "expected Barrier()"),
        ("FreeWeights()", "expected FreeWeights(layer=<number>)"),
        ("FreeWeights(layer=x)", "expected FreeWeights(layer=<number>)"),
        ("FreeWeights(layer=1.5)", "expected FreeWeights(layer=<number>)"),
        ("FreeWeights(layer=1, layer=2)", "expected FreeWeights(layer=<number>)"),
        ("FreeWeights(layer=__import__('os'))", "expected FreeWeights(layer=<number>)"),
        ("FreeWeights(layer=1,)", "expected FreeWeights(layer=<number>)"),
        ("LoadWeights(layer=1, step=0)", "expected LoadWeights(step=<number>, layer=<number>)"),
        ("LoadWeights(0, 1)", "expected LoadWeights(step=<number>, layer=<number>)"),
    ],
)
def test_what_does_not_parse_is_named_with_its_line(text, expected):
    with pytest.raises(ValueError, match=r"^line 3: ") as caught:
        parse_schedule(f"Barrier()\n# two\n{text}\n")
    assert expected in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_ops_are_small_frozen_values_that_say_what_they_mean(kind):
    op = kind(*range(len(dataclasses.fields(kind))))
    assert op == kind(*range(len(dataclasses.fields(kind))))
    assert not hasattr(op, "__dict__")
    assert kind.__doc__.splitlines()[0].strip()
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(op, field.name, 1)


def test_kinds_with_equal_fields_differ():
    assert len({kind(0, 0, 0) for kind in (LoadCache, StoreCache, LoadHidden, Compute)}) == 4
