"""Python takes the care of the command line: what is wrong is one clear ValueError, at once; what
is dropped is freed at once; what a caller's own function raises is the caller's."""

import gc
import weakref
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexgen_jax as fg
from flexgen_jax.engine.effects import BlockEffects
from flexgen_jax.models import opt

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "tests" / "goldens" / "pre_norm")
GREEDY = fg.SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
IDS = [5, 6, 7]


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def llm(offload):
    with fg.LLM(MODEL, policy=fg.Policy(device_batch_size=2), offload_dir=offload) as llm:
        yield llm


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"prompt_token_ids": IDS, "max_tokens": 1, "typo": 1}, "unknown field 'max_tokens', 'ty"),
        ({"prompt_token_ids": IDS, "prompt": "x"}, "both given: give one"),
        ({"prompt": None}, "found neither"),
        ({}, "found neither"),
        ([5.0, 6.0], "expected a text or a list of token ids"),
        ([True, False], "expected a text or a list of token ids"),
    ],
)
def test_a_prompt_says_one_thing_and_no_other(llm, prompt, said):
    with pytest.raises(fg.RequestError, match=f"prompt 0: .*{said}"):
        llm.generate([prompt], GREEDY)
    with pytest.raises(fg.RequestError, match=said):
        list(llm.generate_iter([prompt], GREEDY))


@pytest.mark.parametrize("prompts", [None, 5, b"abc", {5, 6}, 1.5])
def test_what_is_no_prompts_is_said_at_once(llm, prompts):
    for call in (llm.generate, llm.generate_iter, lambda p: llm.score(p, p)):
        with pytest.raises(fg.RequestError, match="prompts must be a text"):
            call(prompts)


@pytest.mark.parametrize("params", [{"max_tokens": 1}, "greedy", 5])
def test_parameters_of_the_wrong_type(llm, params):
    for call in (llm.generate, llm.generate_iter):
        with pytest.raises(fg.RequestError, match="sampling_params must be SamplingParams"):
            call([IDS], params)
    with pytest.raises(fg.RequestError, match=r"got <generator .*generator"):
        llm.generate([IDS], (GREEDY for _ in range(1)))


def test_one_prompt_is_one_prompt_in_a_stream(llm):
    expected = llm.generate([IDS], GREEDY)
    for one in (IDS, tuple(IDS), {"prompt_token_ids": IDS}, np.array(IDS), list(np.array(IDS))):
        assert list(llm.generate_iter(one, GREEDY)) == expected
    with pytest.raises(fg.RequestError, match="prompt 0: this model has no tokenizer"):
        next(llm.generate_iter("Hello", GREEDY))


def test_a_bad_prompt_is_recorded_if_asked(llm):
    prompts = [[5], "text", [6], [10**9], {"prompt": "x", "typo": 1}, [7]]
    good = llm.generate([[5], [6], [7]], GREEDY)
    for found in (
        llm.generate(prompts, GREEDY, on_error="record"),
        list(llm.generate_iter(iter(prompts), GREEDY, window=2, on_error="record")),
    ):
        assert [o.request_id for o in found] == list("012345")
        assert [o.outputs for o in found if o.error is None] == [o.outputs for o in good]
        errors = {o.request_id: o.error for o in found if o.error is not None}
        assert list(errors) == ["1", "3", "4"]
        assert "no tokenizer" in errors["1"]
        assert (found[1].prompt, found[4].prompt) == ("text", "x")
        assert all(found[int(i)].outputs == () for i in errors)
    for call in (llm.generate, llm.generate_iter):
        with pytest.raises(ValueError, match="on_error must be 'raise' or 'record'"):
            call(prompts, on_error="ignore")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": {"embed": np.zeros(3)}}, "model must be a path or a hub name .*save_params"),
        ({"model": None}, "model must be a path"),
        ({"schedule": ["zigzag"]}, "schedule must be one of cgopipe.* or a function"),
        ({"schedule": None}, "schedule must be one of"),
        ({"policy": {"device_batch_size": 2}}, "policy must be 'auto' or a Policy"),
        ({"policy": "zigzag"}, "policy must be 'auto' or a Policy"),
        ({"hardware": "t4"}, "hardware must be a Hardware"),
        ({"slots": 3}, "slots must be a dict"),
        ({"fixed": ["x"]}, "fixed must be a dict"),
        ({"allow": "weight_bits"}, r"allow must be a list of names, got a text: give \['weight"),
        ({"lengths": 5}, "lengths must be numbers of tokens, or a path"),
        ({"device_memory": 1.5}, "expected a size such as '12GiB'"),
        ({"offload_dir": 5}, "offload_dir must be a path"),
        ({"say": "x"}, "say must be a function"),
        ({"wrap_store": 5}, "wrap_store must be a function"),
        ({"disk": "direct"}, "disk must be a DiskContext"),
    ],
)
def test_an_llm_of_the_wrong_types(arguments, said, offload):
    with pytest.raises(ValueError, match=said):
        fg.LLM(**{"model": MODEL, "offload_dir": offload, **arguments})


def test_a_plan_takes_names(offload):
    sizes = {"prompt_len": 16, "gen_len": 4}
    named = fg.plan("facebook/opt-125m", fg.Policy(), "t4", **sizes, schedule="zigzag")
    pair = ("zigzag", fg.SCHEDULES["zigzag"])
    hardware = fg.Hardware.preset("t4")
    by_hand = fg.plan("facebook/opt-125m", fg.Policy(), hardware, **sizes, schedule=pair)
    assert named.to_json() == by_hand.to_json()
    for arguments, said in (
        (("facebook/opt-125m", "t4"), "hardware must be a Hardware, or a preset's name"),
        (("facebook/opt-125m", "t4", "t4"), "policy must be 'auto' or a Policy"),
        (("facebook/opt-125m", fg.Policy(), "t5"), "no hardware preset|t5"),
        ((5, fg.Policy(), "t4"), "model must be a preset"),
    ):
        with pytest.raises(ValueError, match=said):
            fg.plan(*arguments, **sizes)
    with pytest.raises(ValueError, match="gen_len must be an integer"):
        fg.plan("facebook/opt-125m", fg.Policy(), "t4", prompt_len=16, gen_len="4")
    for call in (fg.simulate, fg.validate):
        with pytest.raises(ValueError, match="expected a Workload, got 5"):
            call("zigzag", 5, *[hardware] * (call is fg.simulate))


class OwnError(Exception):
    """Of a caller's function."""


@pytest.mark.parametrize("name", ["progress", "on_logits", "on_block"])
def test_what_a_callback_raises_is_raised(llm, name):
    def fail(*_):
        raise OwnError("mine")

    with pytest.raises(OwnError, match="mine"):
        llm.generate([IDS], GREEDY, **{name: fail})
    assert llm.generate([IDS], GREEDY)[0].error is None  # the LLM is as good as before
    with pytest.raises(ValueError, match="progress must be a function, got 5"):
        llm.generate([IDS], GREEDY, progress=5)


@pytest.mark.parametrize("how", ["done", "auto", "disk", "streamed", "raised", "logits", "failed"])
def test_a_dropped_llm_frees_its_weights_at_once(how, offload, monkeypatch):
    """Without ``close()``, and without waiting for the collector of cycles."""
    disk = fg.Split(device=0, disk=100)
    policy = {"auto": "auto", "disk": fg.Policy(weights=disk, cache=disk, hidden=disk)}
    llm = fg.LLM(MODEL, policy=policy.get(how, fg.Policy()), offload_dir=offload)

    def fail(*_):
        raise OwnError("mine")

    gc.collect()
    gc.disable()
    try:
        if how == "streamed":
            next(llm.generate_iter([IDS] * 3, GREEDY, window=1))
        elif how in ("raised", "logits"):
            callback = {"raised": "progress", "logits": "on_logits"}[how]
            with suppress(OwnError):
                llm.generate([IDS], GREEDY, **{callback: fail})
        elif how == "failed":
            monkeypatch.setattr(BlockEffects, "_compute", fail)
            with suppress(fg.ExecutionError):
                llm.generate([IDS], GREEDY)
        else:
            outputs, report = llm.generate([IDS] * 3, GREEDY), llm.report
        runner = llm.runner
        parts = [llm, runner, *(stage.weights for stage in runner._stages.values())]
        left = [weakref.ref(part) for part in parts]
        assert len(left) == 3
        del llm, runner, parts
        assert [ref() for ref in left] == [None] * 3
    finally:
        gc.enable()
    if how == "done":
        assert outputs[0].outputs
        assert report.predicted.seconds > 0  # and a report can still be asked


def test_pure_functions_take_numpy_and_refuse_what_cannot_be():
    config = fg.load_config(MODEL)
    params = fg.load_params(MODEL)
    plain = jax.tree.map(np.asarray, params)
    tokens = jnp.array([[5, 6, 7, 8], [9, 10, 11, 12]], jnp.int32)
    expected = opt.forward(params, tokens, config)
    np.testing.assert_array_equal(opt.forward(plain, tokens, config), expected)
    by_row = jax.vmap(lambda row: opt.forward(plain, row[None], config)[0])(tokens)
    np.testing.assert_allclose(by_row, expected, atol=1e-5)
    jitted = jax.jit(lambda t: opt.forward(plain, t, config))(tokens)
    np.testing.assert_allclose(jitted, expected, atol=1e-5)
    logits, caches = jax.jit(lambda t: opt.prefill(plain, t, config, cache_len=8))(tokens)
    np.testing.assert_allclose(logits, expected[:, -1], atol=1e-5)
    step = jax.jit(lambda t: opt.decode(plain, t, caches, 4, config)[0])
    assert step(tokens[:, 0]).shape == logits.shape
    for wrong, padding, said in (
        (tokens + config.vocab_size, None, r"tokens must lie in 0\.\.79, found 92"),
        (-tokens, None, "tokens must lie in .*found -12"),
        (tokens, jnp.array([0, 4]), r"padding must lie in 0\.\.3, found 4"),
        (tokens, jnp.array([-1, 0]), "padding must lie in .*found -1"),
        (tokens[:, :0], None, "tokens must be an array"),
        (jnp.zeros((1, 5000), jnp.int32), None, "5000 tokens exceed the model's"),
    ):
        with pytest.raises(ValueError, match=said):
            opt.forward(params, wrong, config, padding)
        with pytest.raises(ValueError, match=said):
            opt.prefill(params, wrong, config, cache_len=8192, padding=padding)
    with pytest.raises(ValueError, match="cache_len 3 has no room for 4 tokens"):
        opt.prefill(params, tokens, config, cache_len=3)
