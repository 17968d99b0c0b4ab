"""What a report says of predictions is what a person can hold against them."""

import dataclasses

import pytest

import flexgen_jax as fg
from flexgen_jax.report import Sum
from scheduling.timeline import Span, Timeline

MODEL = "tests/goldens/pre_norm"


def lasting(seconds):
    span = Span("Compute", "compute", 0.0, seconds, 0, 0, 0)
    return Timeline((span,), label="x")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    offload = str(tmp_path_factory.mktemp("offload"))
    with fg.LLM(MODEL, policy=fg.Policy(device_batch_size=2), offload_dir=offload) as llm:
        llm.generate([[5, 6]], fg.SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
        yield llm


@pytest.fixture
def told(llm):
    def made(measured, predicted, compiling=0.0, bound=1.0):
        return dataclasses.replace(
            llm.report,
            timeline=lasting(measured),
            predict=lambda: lasting(predicted),
            lower_bound=lambda: bound,
            timeline_compile_seconds=compiling,
        )

    return made


def test_compiling_is_left_out_of_the_text_and_of_json(told):
    report = told(10.0, 3.0, 4.0)
    assert "measured 10.0 s, 4.0 s of it compiling: ratio 2.00;" in report.beside_prediction()
    figures = report.to_json()
    assert figures["working_seconds"] == 6.0
    assert figures["measured_over_predicted"] == 2.0
    assert figures["achieved_over_bound"] == 6.0
    whole = figures["predicted"]["makespan"]
    assert figures["predicted"]["compute"]["ratio"] is None
    assert (whole["ratio"], whole["measured_seconds"], whole["compile_seconds"]) == (2.0, 10.0, 4.0)


@pytest.mark.parametrize(
    ("measured", "predicted", "compiling"),
    [(0.5, 0.5, 0.0), (30.0, 0.5, 29.5), (30.0, 9.0, 45.0), (5.0, 0.001, 0.0), (0.0, 0.0, 0.0)],
)
def test_what_is_too_short_says_so(told, measured, predicted, compiling):
    report = told(measured, predicted, compiling)
    assert "too short to compare" in report.beside_prediction()
    assert "ratio" not in report.beside_prediction()
    figures = report.to_json()
    assert figures["measured_over_predicted"] is None
    assert figures["achieved_over_bound"] is None
    assert figures["predicted"]["makespan"]["ratio"] is None


def test_no_ratio_is_nothing(told):
    assert "ratio 0.003;" in told(3.0, 1000.0).beside_prediction()
    assert "ratio 0.25;" in told(3.0, 12.0).beside_prediction()


def test_a_resumed_job_compares_what_its_timeline_has(told, llm):
    """Compile seconds of earlier processes count, but not against the last one's time."""
    total = Sum.of(llm.planner)
    earlier = dataclasses.replace(told(0.0, 0.0), seconds=90.0, compile_seconds=80.0)
    total.add_sums(earlier.sums())
    own = dataclasses.replace(told(6.0, 4.0, 2.0), seconds=7.0, compile_seconds=2.5)
    report = total.add(own).total()
    assert (report.seconds, report.compile_seconds) == (97.0, 82.5)
    assert report.timeline_compile_seconds == 2.0
    assert report.measured_over_predicted == 1.0
