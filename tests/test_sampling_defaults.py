"""Sampling parameters as vLLM has them: limits, texts, defaults, a fresh seed for every call."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import flexgen_jax as fg
from flexgen_jax.models.family import eos_token_ids

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "flexgen_jax" / "demo_model")
POLICY = fg.Policy(device_batch_size=4)


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def llm(offload):
    with fg.LLM(DEMO, policy=POLICY, offload_dir=offload) as llm:
        yield llm


def tokens(outputs):
    return [c.token_ids for output in outputs for c in output.outputs]


def test_three_unseeded_calls_are_three_samples(offload):
    params = fg.SamplingParams(max_tokens=8, ignore_eos=True)
    prompts = ["The tide", "Once more"]
    found, seeds = [], []
    with fg.LLM(DEMO, policy=POLICY, offload_dir=offload, seed=5) as llm:
        for _ in range(2):
            found.append(tokens(llm.generate(prompts, params)))
            seeds.append(llm.report.seed)
        found.append(tokens(llm.generate_iter(prompts, params)))
        seeds.append(llm.report.seed)
        own = [tokens(llm.generate(prompts, fg.SamplingParams(max_tokens=8, seed=3))) for _ in "ab"]
        assert llm.report.to_json()["seed"] == llm.report.seed
    assert len({str(f) for f in found}) == 3
    assert own[0] == own[1]  # one's own seed is one's own
    assert len(set(seeds)) == 3
    assert seeds[0] == 5
    # A call can be repeated by the seed that was reported, and a script by that of its LLM.
    with fg.LLM(DEMO, policy=POLICY, offload_dir=offload, seed=seeds[1]) as again:
        assert tokens(again.generate(prompts, params)) == found[1]
    with fg.LLM(DEMO, policy=POLICY, offload_dir=offload, seed=np.int64(5)) as again:
        assert [tokens(again.generate(prompts, params)) for _ in "ab"] == found[:2]


def test_no_limit_is_the_models(llm):
    params = fg.SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    most = llm.config.max_position_embeddings
    (output,) = llm.generate([[5] * (most - 3)], params)
    assert len(output.outputs[0].token_ids) == 3
    with pytest.raises(fg.RequestError, match="leave no room for 1 new ones"):
        llm.generate([[5] * most], params)
    with pytest.raises(fg.RequestError, match="leave no room for 4 new ones"):
        llm.generate([[5] * (most - 3)], fg.SamplingParams(max_tokens=None, min_tokens=4))


def test_what_the_text_has(llm):
    greedy = {"temperature": 0.0, "max_tokens": 12}
    eos = eos_token_ids(llm.config)[0]

    def text(**fields):
        return llm.generate("The tide", fg.SamplingParams(**greedy, **fields))[0].outputs[0]

    whole = text()
    stop = whole.text[4:7]
    assert text(stop=stop).text == whole.text[: whole.text.index(stop)]
    with_stop = text(stop=stop, include_stop_str_in_output=True)
    assert with_stop.text == whole.text[: whole.text.index(stop) + 3]
    assert (with_stop.finish_reason, with_stop.stop_reason) == ("stop", stop)
    none = text(detokenize=False)
    assert (none.text, none.token_ids) == ("", whole.token_ids)
    token = whole.token_ids[2]
    ended = {"stop_token_ids": [token]}
    decode = llm.get_tokenizer().decode
    place = whole.token_ids.index(token)
    assert text(**ended).text == decode(whole.token_ids[:place])
    assert text(**ended, include_stop_str_in_output=True).text == decode(
        whole.token_ids[: place + 1]
    )
    forced = {"logit_bias": {eos: 100.0}, "ignore_eos": True}
    special = llm.get_tokenizer().token(eos)
    assert text(**forced).text == ""
    assert text(**forced, skip_special_tokens=False).text.strip().startswith(special)
    with pytest.raises(ValueError, match="stop needs the text"):
        fg.SamplingParams(stop="x", detokenize=False)
    with pytest.raises(ValueError, match="skip_special_tokens must be true or false"):
        fg.SamplingParams(skip_special_tokens="no")


def test_numpys_numbers_are_numbers():
    given = fg.SamplingParams(
        max_tokens=np.int64(3),
        top_k=np.uint8(4),
        seed=np.int32(5),
        temperature=np.float32(0.5),
        top_p=np.float64(0.5),
        stop_token_ids=list(np.array([5, 6])),
        logit_bias={np.int64(7): np.float32(1)},
    )
    plain = fg.SamplingParams(
        max_tokens=3,
        top_k=4,
        seed=5,
        temperature=0.5,
        top_p=0.5,
        stop_token_ids=[5, 6],
        logit_bias={7: 1.0},
    )
    assert given == plain
    assert json.dumps(vars(given), default=list) == json.dumps(vars(plain), default=list)
    for wrong in (np.float32(3), np.True_, "3", 3.0):
        with pytest.raises(ValueError, match="max_tokens must be an integer"):
            fg.SamplingParams(max_tokens=wrong)


def test_defaults_come_from_the_models_generation_config(tmp_path, offload):
    model = shutil.copytree(DEMO, tmp_path / "model")
    config = model / "generation_config.json"
    values = {**json.loads(config.read_text()), "temperature": 0.25, "top_k": 7}
    config.write_text(json.dumps({**values, "max_new_tokens": 3, "do_sample": True}))

    def made(**options):
        return fg.LLM(str(model), policy=POLICY, offload_dir=str(tmp_path / "stores"), **options)

    with made() as llm:
        found = llm.get_default_sampling_params()
        assert found == fg.SamplingParams(temperature=0.25, top_k=7, max_tokens=3)
        assert len(llm.generate("The tide")[0].outputs[0].token_ids) == 3
        assert tokens(llm.generate("x", fg.SamplingParams(temperature=0.0)))  # its own
    assert made(generation_config="vllm").get_default_sampling_params() == fg.SamplingParams()
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text('{"min_p": 0.5}')
    by_directory = made(generation_config=str(other)).get_default_sampling_params()
    assert by_directory == fg.SamplingParams(min_p=0.5)
    (other / "generation_config.json").write_text('{"min_p": 5}')
    for directory in (other, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"cannot take sampling defaults from .*_config.json"):
            made(generation_config=str(directory))
