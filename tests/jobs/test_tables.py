"""Inputs that are no lines of JSON: they work, or are one error before a model is looked for."""

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from flexgen_jax.cli.app import main
from flexgen_jax.jobs.dialects import LineError, parse_line
from flexgen_jax.jobs.job_input import JobError, JobInput


def rows(path):
    with JobInput(path) as source:
        return [(line.number, json.loads(line.raw)) for line in source.lines()]


def test_a_table_has_fields_for_columns(tmp_path):
    table = (
        "\ufeffid,prompt,max_tokens,temperature,stop,ignore_eos\r\n"
        '007,"Two lines,\nand a ""quote""",5,0.5,1,TRUE\r\n'
        "\r\n"
        ",12,,,,\r\n"
        "c,short\r\n"
        "d,long,1,1,1,1,1,1\r\n"
    )
    expected = [
        (3, {"id": "007", "prompt": 'Two lines,\nand a "quote"', "max_tokens": 5,
             "temperature": 0.5, "stop": "1", "ignore_eos": True}),
        (5, {"prompt": "12"}),
        (6, {"id": "c", "prompt": "short"}),
        (7, ["d", "long", "1", "1", "1", "1", "1", "1"]),
    ]  # fmt: skip
    for name, text in (("t.csv", table), ("t.csv.gz", table)):
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        assert rows(tmp_path / name) == expected
    (tmp_path / "t.tsv").write_text("prompt_token_ids\tprompt_logprobs\n[1, 2]\t0\n")
    assert rows(tmp_path / "t.tsv") == [(2, {"prompt_token_ids": [1, 2], "prompt_logprobs": 0})]


@pytest.mark.parametrize("name", ["in.json", "in.jsonl", "in.json.gz"])
def test_a_list_has_items(tmp_path, name):
    items = [{"prompt": "a"}, 5, {"prompt": "ü", "max_tokens": 2}]
    data = json.dumps(items, indent=1).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert rows(tmp_path / name) == list(enumerate(items, 1))


def test_lines_under_the_name_of_a_list_stay_lines(tmp_path):
    (tmp_path / "in.json").write_text('\n{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [number for number, _ in rows(tmp_path / "in.json")] == [2, 3]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("in.csv", b"text,label\nx,1\n", "no column is called 'prompt' .*'text', 'label'"),
        ("in.csv", b"prompt,prompt\nx,1\n", "two columns"),
        ("in.csv", b"prompt\n\xff\n", "not UTF-8"),
        ("in.json", b'[{"prompt": "x"},\n {"prompt"', "not a JSON list: .* line 2 column"),
        ("in.jsonl", b"PK\x03\x04...", "a zip archive"),
        ("in.jsonl", b"\x1f\x8b...", "must end in .gz"),
    ],
)
def test_what_cannot_be_rows_is_one_error(tmp_path, name, data, said):
    source = tmp_path / name
    source.write_bytes(data)
    with pytest.raises(JobError, match=said), JobInput(source) as opened:
        opened.check_rows()
    options = ["generate", "--model", "no/such-model", "-i", source, "-o", tmp_path / "out"]
    result = CliRunner().invoke(main, list(map(str, options)))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"Error: cannot read {source}: ")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_parquet_table_without_prompts_is_one_error(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "in.parquet")
    with (
        pytest.raises(JobError, match="no column is called 'prompt'"),
        JobInput(tmp_path / "in.parquet") as opened,
    ):
        opened.check_rows()


def test_an_error_of_json_counts_no_lines_of_its_own():
    with pytest.raises(LineError, match=r"not JSON: Expecting value \(column 12\)") as found:
        parse_line(b'{"prompt": }', 7)
    assert "line" not in str(found.value)


def test_the_whole_job(tmp_path):
    model = str(Path(__file__).parents[1] / "goldens" / "pre_norm")
    (tmp_path / "in.csv").write_text("prompt_token_ids,max_tokens\n[5],1\n[5],no\n[6],2\n")
    options = ["generate", "--model", model, "--offload-dir", tmp_path / "offload", "--ignore-eos"]
    options += ["-i", tmp_path / "in.csv", "-o", tmp_path / "out"]
    result = CliRunner().invoke(main, list(map(str, options)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [r["id"] for r in records] == [2, 3, 4]
    assert [len(r.get("token_ids", ())) for r in records] == [1, 0, 2]
    assert records[1]["error"]["message"].startswith("max_tokens must be")
