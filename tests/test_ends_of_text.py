"""A text ends where transformers ends it, from whatever form of the model it is generated."""

import json
import shutil
from pathlib import Path

import pytest

import flexgen_jax as fg
from flexgen_jax.models.family import eos_token_ids
from flexgen_jax.models.registry import load_config
from flexgen_jax.weights.checkpoint import convert

GOLDENS = Path(__file__).parent / "goldens"
EXPECTED = json.loads((GOLDENS / "expected.json").read_text())
PROMPT = EXPECTED["prompts"][0]
TOKENS = EXPECTED["variants"]["pre_norm"]["tokens"][0]
NEVER, ENDS, PLACE = 77, 41, 3  # TOKENS[PLACE] is the first 41


@pytest.fixture
def model(tmp_path):
    """A copy whose files may be edited."""
    return Path(shutil.copytree(GOLDENS / "pre_norm", tmp_path / "model"))


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def generated(model, tmp_path, **options):
    params = fg.SamplingParams(temperature=0.0, max_tokens=8)
    policy = fg.Policy(device_batch_size=1, num_device_batches=1, **options)
    with fg.LLM(str(model), policy=policy, offload_dir=str(tmp_path / "offload")) as llm:
        ((completion,),) = (output.outputs for output in llm.generate([PROMPT], params))
        return list(completion.token_ids), completion.finish_reason


def test_every_id_of_a_list_ends_a_text_in_every_form_of_the_model(model, tmp_path):
    """``config.json`` says otherwise, and is not asked."""
    edit(model / "config.json", eos_token_id=TOKENS[0])
    edit(model / "generation_config.json", eos_token_id=[NEVER, ENDS])
    store = convert(model, tmp_path / "store")
    forms = {
        "the checkpoint": model,
        "a store of it": store,
        "what a store is exported to": fg.export(store, tmp_path / "exported"),
    }
    for what, form in forms.items():
        assert generated(form, tmp_path) == (TOKENS[: PLACE + 1], "stop"), what
    for source in (store, model):
        quantised = convert(source, tmp_path / f"{source.name}-8", weight_bits=8)
        assert eos_token_ids(load_config(quantised)) == (NEVER, ENDS)


@pytest.mark.parametrize("of_generation", [None, {"eos_token_id": None}, {}], ids=str)
def test_nothing_ends_a_text_where_nothing_is_said_to(model, tmp_path, of_generation):
    """In ``generation_config.json``; without that file, in ``config.json``."""
    edit(model / "config.json", eos_token_id=None if of_generation is None else ENDS)
    (model / "generation_config.json").unlink()
    if of_generation is not None:
        (model / "generation_config.json").write_text(json.dumps(of_generation))
    store = convert(model, tmp_path / "store")
    assert generated(store, tmp_path) == (TOKENS[:8], "length")


def test_config_json_is_asked_where_there_is_nothing_else(model, tmp_path):
    edit(model / "config.json", eos_token_id=[NEVER, ENDS])
    (model / "generation_config.json").unlink()
    assert generated(convert(model, tmp_path / "store"), tmp_path)[0] == TOKENS[: PLACE + 1]


WRONG = {
    "a text": ("2", "must be a token id, a list of them or null, got '2'"),
    "true": (True, "must be a token id, a list of them or null, got True"),
    "a fraction": (2.0, r"must be a token id, a list of them or null, got 2\.0"),
    "texts": ([2, "3"], r"must be a token id, a list of them or null, got \[2, '3'\]"),
    "no id": ([], "is an empty list; give null where no token ends a text"),
    "beyond the vocabulary": (10**30, r"10{30} is outside the vocabulary \(0 to 79\); give ids"),
    "negative": ([2, -1], r"-1 is outside the vocabulary \(0 to 79\); give ids"),
}


@pytest.mark.parametrize(("value", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_token_is_named_with_its_file(model, tmp_path, name, value, message):
    edit(model / name, eos_token_id=value)
    with pytest.raises(ValueError, match=rf"{name}: eos_token_id {message}"):
        fg.LLM(str(model), offload_dir=str(tmp_path))


def test_a_long_wrong_value_makes_no_long_message(model, tmp_path):
    edit(model / "config.json", eos_token_id="2" * 10_000)
    with pytest.raises(ValueError, match=r"got '2+\.\.\.2+'$"):
        fg.LLM(str(model), offload_dir=str(tmp_path))
