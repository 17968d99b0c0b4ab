"""What is somebody else's is still there afterwards, whatever it is called."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.engine.snapshots import Snapshots, State
from flexgen_jax.jobs.beside import Beside
from flexgen_jax.jobs.job import Completing, Job
from flexgen_jax.jobs.job_input import JobError, JobInput
from flexgen_jax.jobs.results import FileResults
from scheduling.hardware import Hardware
from scheduling.timeline import Timeline
from storage.store import StorageError

MODEL = str(Path(__file__).parents[1] / "goldens" / "pre_norm")
GREEDY = fg.SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
LINES = "".join(json.dumps({"prompt_token_ids": [5 + i]}) + "\n" for i in range(5))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    policy = fg.Policy(device_batch_size=4)
    with fg.LLM(MODEL, policy=policy, offload_dir=tmp_path_factory.mktemp("offload")) as llm:
        yield llm


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in.jsonl").write_text(LINES)
    return tmp_path / "in.jsonl"


def run(llm, source, target, **options):
    with JobInput(source) as lines, FileResults(target) as results:
        return Job(llm, Completing(llm, GREEDY, "m"), lines, results, **options).run()


def command(source, target, *more):
    """One that fails before it looks for a model."""
    options = ["generate", "--model", "no/such-model", "-i", source, "-o", target, *more]
    result = CliRunner().invoke(main, list(map(str, options)))
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("end", ["", ".ordered", ".partial", ".partial.new", ".job"])
def test_an_input_that_the_job_would_write_to_is_refused(tmp_path, end):
    source = tmp_path / f"o.jsonl{end}"
    source.write_text(LINES)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "other").hardlink_to(source)
    for given in (source, tmp_path / "link", tmp_path / "other"):
        said = command(given, tmp_path / "o.jsonl")
        assert "same file" in said or "where a job keeps its progress" in said
    assert source.read_text() == LINES
    with pytest.raises(JobError):
        Beside(tmp_path / "o.jsonl").check_input(source)


@pytest.mark.parametrize("option", ["--trace", "--plot"])
@pytest.mark.parametrize("name", ["in.jsonl", "out.jsonl", "out.jsonl.ordered"])
def test_a_picture_does_not_write_over_the_jobs_files(source, tmp_path, option, name):
    said = command(source, tmp_path / "out.jsonl", option, tmp_path / name)
    assert "input or output" in said
    assert source.read_text() == LINES


@pytest.mark.parametrize("name", ["t.json", "p.png", "p.svg", "p.jpg"])
def test_a_picture_replaces_only_pictures_of_ours(source, tmp_path, name):
    """Of formats without room for a name none is known."""
    option, picture = "--trace" if name == "t.json" else "--plot", tmp_path / name
    picture.write_text("somebody's work with flexgen-jax\n")
    said = command(source, tmp_path / "out.jsonl", option, picture)
    assert "exists, and flexgen-jax has not written it" in said
    simulate = ["simulate", "--model", "facebook/opt-125m", "--hardware", "t4", option, picture]
    simulate += ["--percent", 0, 100, 0, 100, 0, 100, "--prompt-len", 8, "--gen-len", 2]

    def simulated(*more):
        return CliRunner().invoke(main, list(map(str, [*simulate, *more]))).exit_code

    assert simulated() == 2
    assert picture.read_text().startswith("somebody's work")
    assert simulated("--force") == 0
    assert simulated() == (2 if name == "p.jpg" else 0)
    picture.write_text("")  # nothing to lose
    assert simulated() == 0


def test_the_demo_and_profile_replace_only_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "flexgen_jax.machine.profile.profile", lambda *_, **__: Hardware.preset("t4")
    )
    commands = {
        "demo/timeline.png": ["demo", "--output-dir", tmp_path / "demo", "--max-tokens", 1],
        "demo/completions.jsonl": ["demo", "--output-dir", tmp_path / "demo", "--max-tokens", 1],
        "h.json": ["profile", "-o", tmp_path / "h.json"],
    }
    (tmp_path / "demo").mkdir()
    for name, arguments in commands.items():
        (tmp_path / name).write_text('{"somebody": "else"}\n')
        done = CliRunner().invoke(main, list(map(str, arguments)))
        assert (done.exit_code, "--force to" in done.stderr) == (2, True), done.output
        assert (tmp_path / name).read_text() == '{"somebody": "else"}\n'
        done = CliRunner().invoke(main, list(map(str, [*arguments, "--force"])))
        assert done.exit_code == 0, done.output
        if name != "demo/timeline.png":
            assert CliRunner().invoke(main, list(map(str, arguments))).exit_code == 0


@pytest.mark.parametrize("end", [".ordered", ".partial.new", ".job"])
@pytest.mark.parametrize("restart", [False, True])
def test_what_lies_where_the_output_grows_is_refused(llm, source, tmp_path, end, restart):
    foreign = tmp_path / f"out{end}"
    foreign.write_text("somebody's work\n")
    with (
        pytest.raises(JobError, match=rf"out{end} is in the way: .*; move it away"),
        FileResults(tmp_path / "out", restart=restart),
    ):
        pass
    assert foreign.read_text() == "somebody's work\n"
    assert "is in the way" in command(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", foreign.name]
    foreign.rename(tmp_path / "away")
    run(llm, source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes().count(b"\n") == 5


@pytest.mark.parametrize("end", [".ordered", ".partial", ".partial.new", ".job"])
@pytest.mark.parametrize("kind", ["directory", "pipe", "link"])
def test_what_is_no_file_is_refused(tmp_path, end, kind):
    place = tmp_path / f"out{end}"
    (tmp_path / "elsewhere").write_text("")
    make = {
        "directory": place.mkdir,
        "pipe": lambda: os.mkfifo(place),
        "link": lambda: place.symlink_to("elsewhere"),
    }
    make[kind]()
    with pytest.raises(JobError, match="is in the way"), FileResults(tmp_path / "out"):
        pass
    assert os.path.lexists(place)


def test_what_is_no_journal_is_kept_aside(llm, source, tmp_path, caplog):
    for number in range(3):
        (tmp_path / "out.partial").write_text(f"somebody's work {number}\n")
        (tmp_path / "out").unlink(missing_ok=True)
        run(llm, source, tmp_path / "out")
    kept = [(tmp_path / f"out.partial.old{n}").read_text() for n in ("", 2, 3)]
    assert kept == [f"somebody's work {n}\n" for n in range(3)]
    assert "kept aside" in caplog.text


class Stopped(BaseException):
    """The power goes."""


def stopped_at(llm, source, target, monkeypatch, owner, name):
    """A job that ends where ``name`` would be called; nothing is tidied up."""

    def stop(*_, **__):
        raise Stopped

    def close_only(self, *_):
        self._journal.close()
        self._out.close()

    with monkeypatch.context() as patch:
        patch.setattr(FileResults, "__exit__", close_only)
        patch.setattr(owner, name, stop)
        with pytest.raises(Stopped):
            run(llm, source, target)


def test_what_a_first_window_wrote_is_told_from_what_somebody_put_there(
    llm, source, tmp_path, monkeypatch
):
    """Both with a journal beside them that knows of no window yet."""
    target, ordered = tmp_path / "out", tmp_path / "out.ordered"
    stopped_at(llm, source, target, monkeypatch, FileResults, "end_window")
    ordered.write_text("somebody's work\n")
    with pytest.raises(JobError, match=r"out\.ordered is in the way"):
        run(llm, source, target)
    assert ordered.read_text() == "somebody's work\n"
    ordered.unlink()
    stopped_at(llm, source, target, monkeypatch, FileResults, "_replace_journal")
    assert ordered.read_bytes().count(b"\n") == 5  # written, and not counted yet
    run(llm, source, target)
    assert target.read_bytes().count(b"\n") == 5
    assert not ordered.exists()


def test_a_directory_of_somebody_else_is_no_checkpoint(llm, source, tmp_path):
    foreign = tmp_path / "out.checkpoint"
    foreign.mkdir()
    (foreign / "weights.pt").write_text("precious")
    with pytest.raises(StorageError, match=r"in the way of .*: it holds weights\.pt"):
        run(llm, source, tmp_path / "out", checkpoint_seconds=60)
    assert "weights.pt" in command(source, tmp_path / "out", "--checkpoint-minutes", 1)
    run(llm, source, tmp_path / "out")  # without checkpoints it is not in the way
    assert (foreign / "weights.pt").read_text() == "precious"


@pytest.mark.parametrize("name", ["weights.pt", "0abc", "007", "1" * 200])
def test_a_foreign_name_among_checkpoints_is_left_there(tmp_path, name):
    place = tmp_path / "out.checkpoint"
    kept = Snapshots(place, seconds=1).of(block=0)
    state = State([], None, [], {}, 0, Timeline(()), {})
    kept.save(state, iter(()))
    (place / name).mkdir()
    kept.save(state, iter(()))
    assert sorted(p.name for p in place.iterdir()) == sorted(["1", name, "flexgen_jax_checkpoint"])
    found = Snapshots(place, seconds=1).of(block=0).load()
    assert found is not None
    assert found[0] == state
    Snapshots(place, seconds=1).clear()
    assert [p.name for p in place.iterdir()] == [name]


def test_links_that_lead_in_a_circle_are_one_line(source, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "symbolic links" in command(loop, tmp_path / "out")
    assert "symbolic links" in command(source, loop)
    assert "symbolic links" in command(loop, loop)
