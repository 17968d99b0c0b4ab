"""Machines side by side, and lengths."""

import json

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main

MODEL = ["--model", "facebook/opt-125m"]
SMALL = ["--gpu-batch-size", 4, "--num-gpu-batches", 2]


def run(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, (*MODEL, *arguments))])


@pytest.fixture
def tiny(tmp_path):
    """A machine on which nothing fits."""
    room = {"device_memory": 1e6, "host_memory": 1e6, "disk": 1e6}
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps({**fg.Hardware.preset("t4").to_json(), **room}))
    return file


def test_machines_side_by_side(tiny):
    asked = ["--prompt-len", 64, "--gen-len", 8, *SMALL]
    asked += ["--compare-hardware", "laptop", "t4", tiny, "h200"]
    done = run(*asked, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["machines"]
    assert [row["machine"] for row in rows] == ["laptop", "t4", str(tiny), "h200"]
    assert [row["fits"] for row in rows] == [True, True, False, True]
    assert [row["ratio"] is None for row in rows] == [False, False, True, False]
    assert "nothing fits within" in rows[2]["reason"]
    assert rows[0]["ratio"] == 1
    for row in (rows[0], rows[1], rows[3]):
        alone = json.loads(
            run(
                *("--prompt-len", 64, "--gen-len", 8, *SMALL, "--hardware", row["machine"]),
                "--json",
            ).stdout
        )
        assert row["tokens_per_second"] == alone["predicted"]["tokens_per_second"]
        assert row["policy"] == alone["policy"]
        assert row["limit"] == alone["answer"]["limit"]
        assert row["ratio"] == pytest.approx(
            row["tokens_per_second"] / rows[0]["tokens_per_second"]
        )
    lines = run(*asked).output.splitlines()
    assert lines[0].split()[:3] == ["machine", "fits", "tokens/s"]
    assert [line.split()[1] for line in lines[1:]] == ["yes", "yes", "no", "yes"]
    assert "nothing fits within" in lines[3]
    assert "4 x 2, weights " in lines[1]


def test_a_given_policy_that_one_machine_has_no_room_for():
    percent = ["--percent", *(100, 0) * 3, "--gpu-batch-size", 1, "--num-gpu-batches", 1]
    asked = ["--model", "facebook/opt-30b", "--prompt-len", 64, *percent, "--json"]
    done = run(*asked, "--compare-hardware", "t4", "h200")
    rows = json.loads(done.stdout)["machines"]
    assert [row["fits"] for row in rows] == [False, True]
    assert "too much" in rows[0]["reason"]
    assert rows[1]["ratio"] == 1  # of the first that fits


def test_lengths_side_by_side():
    asked = ["--hardware", "laptop", *SMALL, "--sweep"]
    asked += ["--sweep-prompt-lens", "32,2000", "--sweep-gen-lens", "4,64"]
    figures = json.loads(run(*asked, "--json").stdout)
    pairs = [(row["prompt_len"], row["gen_len"]) for row in figures["sweep"]]
    assert pairs == [(32, 4), (32, 64), (2000, 4)]
    assert figures["left_out"] == [[2000, 64]]
    one = fg.plan(
        "facebook/opt-125m",
        "auto",
        "laptop",
        prompt_len=32,
        gen_len=64,
        fixed={"device_batch_size": 4, "num_device_batches": 2},
    )
    assert figures["sweep"][1]["tokens_per_second"] == one.tokens_per_second
    assert figures["sweep"][1]["policy"] == json.loads(json.dumps(one.policy.to_json()))
    done = run(*asked)
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["32", "4"], ["32", "64"], ["2000", "4"]]
    assert "left out, beyond the model's positions: 2000 + 64" in lines[-1]
    assert done.stderr == ""  # progress is for terminals


def test_the_same_from_python():
    counted = []
    rows = fg.plan_sweep(
        "facebook/opt-125m",
        fg.Policy(device_batch_size=2, num_device_batches=1),
        "laptop",
        prompt_lens=[16],
        gen_lens=[2, 4],
        on_plan=counted.append,
    )
    assert [row.gen_len for row in rows] == [2, 4]
    assert counted == [1, 1]
    assert all(row.fits and row.tokens_per_second for row in rows)
    common = {"prompt_len": 16, "gen_len": 2}
    (row,) = fg.plan_machines("facebook/opt-125m", "auto", ["t4"], **common)
    assert row.plan.hardware == fg.Hardware.preset("t4")
    with pytest.raises(ValueError, match="at least one machine"):
        fg.plan_machines("facebook/opt-125m", "auto", [], **common)
    with pytest.raises(ValueError, match="none of them is within the model's 2048 positions"):
        fg.plan_sweep("facebook/opt-125m", prompt_lens=[2048], gen_lens=[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt-len", 8, "t4"], "machines are listed after --compare-hardware"),
        (["--prompt-len", 8, "--compare-hardware"], "list machines after it"),
        (["--compare-hardware", "t4", "--sweep"], "exclude each other"),
        (["--prompt-len", 8, "--hardware", "t4", "--compare-hardware", "t4"], "list all machines"),
        (["--prompt-len", 8], "give --hardware NAME|FILE, or --compare-hardware"),
        (["--hardware", "t4"], "give --prompt-len N, or --sweep"),
        (["--hardware", "t4", "--sweep", "--prompt-len", 8], "give --sweep-prompt-lens"),
        (["--hardware", "t4", "--sweep", "--gen-len", 8], "give --sweep-prompt-lens"),
        (["--hardware", "t4", "--prompt-len", 8, "--sweep-gen-lens", "8"], "goes with --sweep"),
        (["--hardware", "t4", "--sweep", "--lengths", "x"], "leave them or --sweep out"),
        (["--hardware", "t4", "--sweep", "--plot", "x.png"], "show one plan"),
        (["--hardware", "t4", "--sweep", "--sweep-gen-lens", "8,x"], "such as 32,128,512"),
        (["--hardware", "t4", "--sweep", "--sweep-gen-lens", "0"], "such as 32,128,512"),
        (["--prompt-len", 8, "--compare-hardware", "t4", "abacus"], "neither a preset"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
