"""Whole cells dealt to tiers, evenly."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling import Cell, Placement, Split, Tier, place

from .test_policy import splits

sizes = st.lists(st.integers(0, 10**9), max_size=60)


@given(sizes, splits())
def test_every_prefix_keeps_to_the_percentages(sizes, split):
    """At most 2/3 of the largest cell above a tier's share, and at most 5/6 below it."""
    tiers = place(sizes, split)
    largest = max(sizes, default=0)
    rounding = 1e-9 * sum(sizes) + 1e-9
    given_to = dict.fromkeys(Tier, 0)
    total = 0
    for nbytes, tier in zip(sizes, tiers, strict=True):
        total += nbytes
        given_to[tier] += nbytes
        for each, share in split.shares().items():
            above = given_to[each] - share / 100 * total
            assert -5 / 6 * largest - rounding <= above <= 2 / 3 * largest + rounding
    assert sum(given_to.values()) == sum(sizes)


@given(sizes, st.floats(0, 100), st.permutations(list(Tier)))
def test_two_tiers_stay_within_half_a_cell(sizes, share, order):
    first, second, none = (tier.value for tier in order)
    split = Split(**{first: share, second: 100 - share, none: 0})
    half = max(sizes, default=0) / 2 + 1e-9 * sum(sizes) + 1e-9
    total = given_to = 0
    for nbytes, tier in zip(sizes, place(sizes, split), strict=True):
        total += nbytes
        given_to += nbytes * (tier is order[0])
        assert abs(given_to - share / 100 * total) <= half


def test_the_bounds_are_reached():
    """Equal shares: the first cell is 2/3 too much. And an order that comes near 5/6 too little."""
    third = Split(device=100 / 3, host=100 / 3, disk=100 / 3)
    assert place([3], third) == [Tier.DEVICE]
    shares, cells = (46.02609404951059, 51.78244846544189), [100] * 6 + [28, 59, 100, 100, 67, 100]
    cells += [55, 87, 84, 100, 80, 100, 9, 1, 100, 100, 100, 18, 100, 25, 100, 51, 11, 46, 100, 35]
    uneven = Split(device=shares[0], host=shares[1], disk=100 - sum(shares))
    tiers = place(cells, uneven)
    least = min(
        sum(c for c, t in zip(cells[:n], tiers[:n], strict=True) if t is tier)
        - share / 100 * sum(cells[:n])
        for n in range(len(cells) + 1)
        for tier, share in uneven.shares().items()
    )
    assert least < -0.8 * 100


@given(sizes, st.sampled_from(Tier))
def test_all_means_all_and_none_means_none(sizes, tier):
    split = Split(**{each.value: 100 if each is tier else 0 for each in Tier})
    assert place(sizes, split) == [tier] * len(sizes)


@given(sizes, splits())
def test_a_tier_of_no_percent_gets_nothing_not_even_empty_cells(sizes, split):
    assert all(split.shares()[tier] > 0 for tier in place(sizes, split))


def test_traffic_is_even_from_layer_to_layer():
    tiers = place([7] * 40, Split(device=20, host=30, disk=50))
    for first in range(0, 40, 10):
        ten = tiers[first : first + 10]
        assert [ten.count(tier) for tier in Tier] == [2, 3, 5]
    assert place([1] * 6, Split(device=50, host=0, disk=50)) == [Tier.DEVICE, Tier.DISK] * 3


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="-1 bytes"):
        place([5, -1], Split())


def test_what_came_out():
    placement = Placement.of([("a", 30, Tier.DEVICE), ("b", 60, Tier.DISK), ("c", 30, Tier.DISK)])
    assert placement.cells[1] == Cell("b", 60, Tier.DISK)
    assert [placement.nbytes(tier) for tier in Tier] == [30, 0, 90]
    assert placement.nbytes() == 120
    assert placement.percent(Tier.DISK) == 75
    assert placement.count(Tier.DISK) == 2
    assert placement.table() == [
        ("device", 1, 30, 25.0),
        ("host", 0, 0, 0.0),
        ("disk", 2, 90, 75.0),
    ]
    described = json.loads(json.dumps(placement.to_json()))
    assert described["disk"] == {"cells": 2, "nbytes": 90, "percent": 75.0}
    expected = "weights: device 25.0% (30 bytes, 1 tensor), disk 75.0% (90 bytes, 2 tensors)"
    assert placement.describe("weights") == expected
    for nbytes, said in (
        (533 * 10**6, "0.53 GB"),
        (12_345_678, "12.3 MB"),
        (350 * 10**9, "350 GB"),
    ):
        assert f"({said}, 1 tensor)" in Placement.of([("a", nbytes, Tier.DISK)]).describe("x")
    assert Placement(()).describe("x") == "x: none"


def test_nothing_placed_is_no_percent():
    assert Placement(()).percent(Tier.DEVICE) == 0
    assert Placement(()).nbytes() == 0
