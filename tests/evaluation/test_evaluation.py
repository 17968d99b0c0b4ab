"""The real lm_eval counts the same with an LLM as with its own Hugging Face model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flexgen_jax as fg

from .harness import NAMES, TASKS, figures

pytest.importorskip("lm_eval", exc_type=ImportError)

MODEL = "flexgen_jax/demo_model"
GOLDENS = json.loads((Path(__file__).parent / "goldens.json").read_text())
# lm_eval, datasets and what they import warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _offline(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


def model(offload, **arguments):
    from flexgen_jax.evaluation import FlexGenLM

    return FlexGenLM(MODEL, offload_dir=offload, **({"dtype": "float32"} | arguments))


def assert_same(found, expected=GOLDENS, tasks=NAMES):
    for task in tasks:
        assert found[task]["metrics"] == pytest.approx(expected[task]["metrics"], rel=1e-4)
        answers, wanted = found[task]["answers"], expected[task]["answers"]
        assert len(answers) == len(wanted)
        for answer, right in zip(answers, wanted, strict=True):
            flat, same = flatten(answer), flatten(right)
            assert [x for x in flat if not isinstance(x, float)] == [
                x for x in same if not isinstance(x, float)
            ]
            numbers = [x for x in flat if isinstance(x, float)]
            assert numbers == pytest.approx([x for x in same if isinstance(x, float)], rel=1e-4)


def flatten(value):
    return [x for v in value for x in flatten(v)] if isinstance(value, (list, tuple)) else [value]


PLACED = {
    "auto": {},
    "on the device": {"percent": "100/0/100/0/100/0", "gpu_batch_size": 4, "num_gpu_batches": 2},
    "on disk": {"percent": "0/0/0/0/0/0", "batch_size": 4, "num_gpu_batches": 3},
}


@pytest.mark.parametrize("name", PLACED)
def test_the_figures_are_those_of_the_hugging_face_model(offload, name):
    lm = model(offload, **PLACED[name])
    try:
        assert_same(figures(lm))
        if name == "on disk":
            assert lm.llm.policy.weights.disk == 100
            assert lm.llm.policy.device_batch_size == 4
    finally:
        lm.llm.close()


def test_goldens_say_something():
    assert 0 < GOLDENS["flexgen_choice"]["metrics"]["acc"] < 1
    assert any("the" not in a[0][0] and a[0][0] for a in GOLDENS["flexgen_until"]["answers"])


def test_live_parity(offload):
    """With what is installed now, not with what the goldens were made with."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    expected = figures("hf", pretrained=MODEL, dtype="float32", device="cpu", max_length=64)
    lm = model(offload, max_length=64)
    assert_same(figures(lm), expected)
    lm.llm.close()


def test_the_command_line(offload, tmp_path):
    arguments = f"pretrained={MODEL},offload_dir={offload},percent=0/100/0/100/0/100"
    command = [
        *(sys.executable, "-W", "ignore", "-m", "flexgen_jax", "eval", "--model_args", arguments),
        *("--tasks", "flexgen_choice", "--include_path", str(TASKS)),
        *("--output_path", str(tmp_path / "out")),
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(Path.cwd()),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results*.json")
    acc = json.loads(file.read_text())["results"]["flexgen_choice"]["acc,none"]
    assert acc == pytest.approx(GOLDENS["flexgen_choice"]["metrics"]["acc"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"peft": "x"}, "unknown model argument peft"),
        ({"percent": "0,100"}, "percent must be six numbers"),
        ({"experts_percent": "100"}, "experts_percent must be two numbers"),
        ({"experts_percent": "0/100"}, "the model has none"),
        ({"max_length": 10_000}, "max_length must be from 2 to 512"),
        ({"max_batch_size": 4}, "the policy decides"),
        ({"device": "tpu"}, "JAX runs on cpu here"),
    ],
)
def test_what_cannot_be_met_is_refused(offload, arguments, words):
    with pytest.raises(ValueError, match=words):
        model(offload, **arguments)


def test_unknown_generation_arguments_are_refused(offload):
    from lm_eval.api.instance import Instance

    lm = model(offload)
    asked = ("Once", {"until": ["\n"], "num_beams": 4, "do_sample": False})
    request = Instance("generate_until", {}, asked, 0)
    with pytest.raises(ValueError, match="generation argument num_beams is not supported"):
        lm.generate_until([request])
    long = Instance("generate_until", {}, ("Once", {"max_gen_toks": 512}), 0)
    with pytest.raises(ValueError, match="must be less than max_length"):
        lm.generate_until([long])
    lm.llm.close()


ROWS = fg.Policy(device_batch_size=8)


def test_an_llm_of_ones_own(offload):
    from flexgen_jax.evaluation import FlexGenLM

    with fg.LLM(MODEL, policy=ROWS, dtype="float32", offload_dir=offload) as llm:
        found = figures(FlexGenLM(llm), tasks=["flexgen_choice"])
        assert_same(found, tasks=["flexgen_choice"])
        assert llm.report.requests > 24


def test_a_model_whose_texts_no_token_ends(tmp_path, offload):
    from lm_eval.api.instance import Instance

    from flexgen_jax.evaluation import FlexGenLM

    endless = Path(shutil.copytree(MODEL, tmp_path / "endless"))
    (endless / "generation_config.json").write_text('{"eos_token_id": null}')
    lm = FlexGenLM(str(endless), offload_dir=offload)
    asked = ("To be", {"until": ["\n"], "max_gen_toks": 4})
    (text,) = lm.generate_until([Instance("generate_until", {}, asked, 0)])
    assert text
    with pytest.raises(ValueError, match=r"no token ends a text of .* give prefix_token_id"):
        _ = lm.eot_token_id
