"""What operations take beside their work: each constant in as many operations as it is about."""

import dataclasses

import pytest

import flexgen_jax as fg
from scheduling.hardware import FIXED, PRESETS

STEPS, BATCHES, LAYERS = 5, 3, 14  # of opt-125m, embedding and head with them
NEW = ("compute_overhead", "load_overhead", "step_overhead", "elementwise")


def seconds(weights, **changes):
    hardware = dataclasses.replace(fg.Hardware.preset("laptop"), **changes)
    policy = fg.Policy(
        device_batch_size=2, num_device_batches=BATCHES, weights=weights, overlap=False
    )
    found = fg.plan("facebook/opt-125m", policy, hardware, prompt_len=32, gen_len=STEPS)
    return found.seconds


@pytest.mark.parametrize(
    ("name", "here", "on_disk"),
    [
        ("compute_overhead", STEPS * BATCHES * LAYERS, STEPS * BATCHES * LAYERS),
        ("step_overhead", STEPS * BATCHES, STEPS * BATCHES),
        ("load_overhead", 0, STEPS * LAYERS),
    ],
)
def test_each_adds_to_what_it_is_about(name, here, on_disk):
    for weights, count in ((fg.Split(), here), (fg.Split(device=0, disk=100), on_disk)):
        more = seconds(weights, **{name: 0.25}) - seconds(weights)
        assert more == pytest.approx(0.25 * count, abs=1e-6)


def test_a_layer_takes_time_for_each_value_of_its_hidden_states():
    positions = 2 * BATCHES * (32 + STEPS - 1)
    more = seconds(fg.Split(), elementwise=1e-4) - seconds(fg.Split())
    assert more == pytest.approx(1e-4 * positions * 768 * (LAYERS - 2))


def test_presets_have_none_of_them():
    for hardware in PRESETS.values():
        assert [getattr(hardware, field) for field in NEW] == [0, 0, 0, 0]
        assert not hardware.short


def test_a_file_from_before_them_is_read():
    values = fg.Hardware.preset("t4").to_json()
    older = {k: v for k, v in values.items() if k not in (*NEW, "short")}
    assert fg.Hardware.from_json(older) == fg.Hardware.preset("t4")
    with pytest.raises(ValueError, match="short must be true or false, got 'yes'"):
        fg.Hardware.from_json({**values, "short": "yes"})
    with pytest.raises(ValueError, match="step_overhead must be a positive number, got -1"):
        fg.Hardware.from_json({**values, "step_overhead": -1})


def test_a_calibration_scales_them():
    hardware = dataclasses.replace(fg.Hardware.preset("t4"), step_overhead=1e-3)
    assert set(NEW) <= set(FIXED)
    scaled = hardware.scaled(dict.fromkeys(NEW, 2.0))
    assert (scaled.step_overhead, scaled.compute_overhead) == (2e-3, 0.0)
