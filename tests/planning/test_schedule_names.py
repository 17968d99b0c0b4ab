"""Schedules by name, out of a file, from a package, and as functions."""

import importlib.metadata
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import flexgen_jax as fg
from flexgen_jax.planning import schedule_names
from flexgen_jax.planning.schedule_names import named_schedule, portable
from scheduling import ScheduleError, Workload, register, registered, row_by_row, validate, zigzag

OWN = """
from scheduling import zigzag

COUNT = 3
runs = []

def backwards(w):
    yield from zigzag(w)

def of_two(w, hardware):
    yield from zigzag(w)

def endless(w):
    while True:
        yield from zigzag(w)
"""

RUNS = """
with open("runs", "a") as file:
    file.write(".")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


@pytest.fixture
def clean():
    """What a test registers is not there for the next one."""
    before = dict(registered._all)
    yield
    registered._all.clear()
    registered._all.update(before)


def plan(schedule):
    return fg.plan(
        "facebook/opt-125m", fg.Policy(), "t4", prompt_len=16, gen_len=3, schedule=schedule
    )


def test_a_function_of_a_file_is_a_schedule_and_keeps_the_name_it_was_given(own):
    named = plan("own.py:backwards")
    assert named.schedule == named.planner.schedule_name == "own.py:backwards"
    assert named.seconds == plan("zigzag").seconds
    assert plan(f"{own}:backwards").schedule == f"{own}:backwards"
    assert plan(("mine", zigzag)).schedule == "mine"
    assert plan(row_by_row).schedule == "row_by_row"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zagzig", "no schedule 'zagzig'; did you mean zigzag"),
        ("zagzig", "known: cgopipe, diagonal, lock_step, neo, row_by_row, zigzag; your own is "),
        ("owm.py:backwards", "there is no file owm.py; did you mean own.py"),
        ("nowhere/own.py:backwards", "there is no file nowhere/own.py"),
        ("own.py", "name its function, as in own.py:my_schedule; it has backwards, of_two"),
        ("own.py:", "name its function"),
        ("own.py:backward", "own.py has no function backward; did you mean backwards?"),
        ("own.py:COUNT", "own.py:COUNT: expected a function from a Workload to operations, got a"),
        ("own.py:of_two", "must be callable with a Workload alone, and its parameters are"),
        ("own.txt:backwards", "expected a file of Python, as in own.py:my_schedule"),
        ("absent.py:f", "importing absent.py failed: ModuleNotFoundError: No module named 'no_s"),
        ("broken.py:f", "importing broken.py failed: SyntaxError"),
        ("leaves.py:f", "importing leaves.py failed: SystemExit: 3"),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(own, name, words):
    (own.parent / "absent.py").write_text("import no_such_module\n")
    (own.parent / "broken.py").write_text("def f(w:\n")
    (own.parent / "leaves.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(ValueError, match="schedule") as caught:
        named_schedule(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_runs_once_until_it_changes(own):
    own.write_text(OWN.replace("runs = []", RUNS))
    for _ in range(3):
        named_schedule("own.py:backwards")
    assert Path("runs").read_text() == "."
    own.write_text(own.read_text() + "# changed\n")
    named_schedule("own.py:backwards")
    assert Path("runs").read_text() == ".."


def test_a_plan_names_the_schedule_that_is_wrong(own):
    with pytest.raises(ScheduleError, match=r"^schedule own\.py:endless: op \d+, "):
        plan("own.py:endless")

    def fails(w):
        yield from list(zigzag(w))[:7]
        raise RuntimeError("no more")

    with pytest.raises(
        ScheduleError, match=r"^schedule fails: op 7 did not come: RuntimeError: no"
    ):
        plan(fails)
    with pytest.raises(ScheduleError, match=r"^schedule mine: None came instead of its ops"):
        plan(("mine", lambda w: None))


def test_what_is_wrong_only_in_a_long_block_is_noticed_all_the_same():
    def late(w):
        if w.num_steps < 500:
            return zigzag(w)
        return (op for op in zigzag(w) if getattr(op, "step", 0) != 400)

    with pytest.raises(ScheduleError, match=r"^schedule late: op "):
        fg.plan(
            "facebook/opt-125m",
            fg.Policy(num_device_batches=6),
            "t4",
            prompt_len=16,
            gen_len=600,
            schedule=late,
        )


def test_registered_ones_are_known_everywhere(clean):
    register("mine", row_by_row)
    assert fg.SCHEDULES["mine"] is row_by_row
    assert plan("mine").schedule == "mine"
    with pytest.raises(ValueError, match="'mine' is registered already: choose another name"):
        register("mine", zigzag)
    register("mine", zigzag, replace=True)
    assert fg.SCHEDULES["mine"] is zigzag
    with pytest.raises(ValueError, match="there is a schedule 'zigzag' in the library"):
        register("zigzag", row_by_row, replace=True)


@pytest.mark.parametrize("name", ["", "own.py", "a b", "a:b", "a/b", "1st", None])
def test_names_that_cannot_be(clean, name):
    with pytest.raises(ValueError, match="the name of a schedule must consist of letters"):
        register(name, zigzag)


@pytest.mark.parametrize("value", [3, lambda: None, lambda w, more: None])
def test_what_is_no_schedule_is_not_registered(clean, value):
    with pytest.raises(ValueError, match="schedule mine: "):
        register("mine", value)
    assert "mine" not in fg.SCHEDULES


def offering(monkeypatch, *points):
    def entry_points(*, group):
        return [point for point in points if point.group == group]

    monkeypatch.setattr(schedule_names, "entry_points", entry_points)


def point(name, value):
    return EntryPoint(name, value, schedule_names.GROUP)


def test_packages_offer_schedules(monkeypatch):
    offering(
        monkeypatch,
        point("theirs", "scheduling.schedules:row_by_row"),
        point("gone", "scheduling.schedules:no_such"),
        point("both", "scheduling.schedules:zigzag"),
        point("both", "scheduling.schedules:row_by_row"),
        point("zigzag", "scheduling.schedules:row_by_row"),
    )
    assert named_schedule("theirs") == ("theirs", row_by_row)
    assert named_schedule("zigzag") == ("zigzag", zigzag)  # the library's own
    for name, words in (
        ("gone", "the schedule 'gone' of scheduling.schedules:no_such cannot be loaded: Attribute"),
        ("both", "several packages offer a schedule 'both'"),
        ("their", "did you mean theirs?"),
    ):
        with pytest.raises(ValueError, match=words[:20]) as caught:
            named_schedule(name)
        assert words in str(caught.value)


def test_the_group_is_looked_up_for_real():
    assert list(importlib.metadata.entry_points(group=schedule_names.GROUP)) == []


def test_what_another_process_is_given(own, clean):
    register("theirs", lambda w: zigzag(w))
    assert portable("own.py:backwards") == f"{own}:backwards"
    assert portable("zigzag") == ("zigzag", zigzag)
    assert portable("of_a_package") == "of_a_package"
    assert portable("theirs") == ("theirs", fg.SCHEDULES["theirs"])
    assert portable(zigzag) is zigzag


def test_the_order_tells_schedules_apart(own):
    prints = [plan(s).planner.fingerprint for s in ("zigzag", "own.py:backwards", "row_by_row")]
    assert prints[0] == prints[1] != prints[2]


def test_a_function_of_a_file_validates_like_any_other(own):
    w = Workload(num_steps=2, num_layers=3, num_batches=2)
    validate(named_schedule("own.py:backwards")[1], w)
