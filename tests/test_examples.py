"""The examples run, and say what they promise."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = str(Path(__file__).parent / "goldens" / "pre_norm")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXGEN_JAX_CACHE", str(tmp_path))


def test_own_schedule(capsys):
    runpy.run_path(str(EXAMPLES / "own_schedule.py"))["main"](MODEL)
    out = capsys.readouterr().out
    assert "back_and_forth: " in out
    assert "the same tokens" in out


def test_compare_schedules(capsys, tmp_path):
    picture = tmp_path / "five.svg"
    runpy.run_path(str(EXAMPLES / "compare_schedules.py"))["main"](str(picture))
    *lines, last = capsys.readouterr().out.splitlines()
    names = [line[:16].rstrip() for line in lines]
    assert names == ["zigzag", "back_and_forth", "diagonal", "row_by_row", "without overlap"]
    assert last.endswith("5 timelines")
    seconds = dict(zip(names, (float(line[16:].split()[0]) for line in lines), strict=True))
    assert seconds["zigzag"] < seconds["row_by_row"]
    assert seconds["zigzag"] < seconds["without overlap"]
    drawn = picture.read_text()
    assert all(f"<!-- {name} -->" in drawn for name in names)


def test_generate(capsys):
    runpy.run_path(str(EXAMPLES / "generate.py"))["main"](
        str(EXAMPLES.parent / "flexgen_jax" / "demo_model")
    )
    out = capsys.readouterr().out
    assert "'ROMEO:\\n' -> " in out
    assert "tokens/s" in out


LIKE_VLLM = EXAMPLES / "like_vllm"


@pytest.mark.parametrize(
    ("name", "lines"), [("basic", 4), ("chat", 4), ("structured_outputs", 4), ("batch", 4)]
)
def test_vllms_examples(name, lines, chatting_model, capsys, tmp_path):
    more = [str(tmp_path / "answers")] if name == "batch" else []
    runpy.run_path(str(LIKE_VLLM / f"{name}.py"))["main"](str(chatting_model), *more)
    out = capsys.readouterr().out
    if name in ("basic", "chat"):
        assert out.count("Prompt:") == lines
        return
    found = dict(line.split(" ", 1) for line in out.splitlines() if line)
    assert len(found) == lines
    if name == "batch":
        codes = {key: value.partition(" ")[0] for key, value in found.items()}
        assert codes == dict.fromkeys(list(found)[:3], "200") | {"request-4": "400"}
        assert '{\\"blue\\": ' in (tmp_path / "answers").read_text()
    else:
        assert found["choice:"] in ("Positive", "Negative")
        assert found["grammar:"].startswith("SELECT col_")
