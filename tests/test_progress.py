"""The bar fits its terminal, and does not get in the way of what is said before it."""

import io

import jax
import jax.monitoring
import pytest
from rich.console import Console

import flexgen_jax as fg
from flexgen_jax import progress
from flexgen_jax.engine.compiling import Beginning


def terminal(monkeypatch, width=80):
    """What is written to a terminal from now on."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, soft_wrap=True, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    return out


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_it_fits_the_terminal(width, monkeypatch):
    out = terminal(monkeypatch, width)
    console = progress.console
    with progress.count(None, "generating", "tokens", first="prefill 12 of 64") as bar:
        console.print("what is said first")
        said = out.getvalue()
        bar.expect(123456, exactly=False)
        bar._bar.refresh()
        before = out.getvalue()[len(said) :]
        bar(12345)
        bar._bar.refresh()
    after = out.getvalue()[len(said) + len(before) :]
    assert "0/" not in said
    assert "prefill 12 of 64 0/~123456 tokens" in " ".join(before.split()) or width >= 100
    assert "generating" in after
    assert "12345/~123456 tokens" in after
    for line in out.getvalue().replace("\r", "\n").split("\n"):
        plain = "".join(part.partition("K")[2] or part for part in line.split("\x1b[2"))
        plain = plain.replace("\x1b[?25l", "").replace("\x1b[?25h", "").replace("\x1b[1A", "")
        assert len(plain) <= width, repr(plain)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    policy = fg.Policy(device_batch_size=2, num_device_batches=2)
    offload = str(tmp_path_factory.mktemp("offload"))
    with fg.LLM("tests/goldens/pre_norm", policy=policy, offload_dir=offload) as llm:
        yield llm


PROMPTS = [[5, 6], [7], [8, 9], [5]]
PARAMS = fg.SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


def test_calls_in_python_have_a_bar_at_a_terminal(llm, monkeypatch):
    llm.generate(PROMPTS, PARAMS)
    out = terminal(monkeypatch)
    llm.generate(PROMPTS, PARAMS)
    assert "generating 12/12 tokens" in " ".join(out.getvalue().split())
    out = terminal(monkeypatch)
    counts = []
    llm.generate(PROMPTS, PARAMS, progress=counts.append)  # who has something of their own
    llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert sum(counts) == 12
    assert out.getvalue() == ""
    with pytest.raises(ValueError, match="use_tqdm must be True or False, got 1"):
        llm.generate(PROMPTS, PARAMS, use_tqdm=1)


def test_they_are_quiet_elsewhere(llm, capfd):
    llm.generate(PROMPTS, PARAMS)
    assert capfd.readouterr() == ("", "")


def test_prefill_is_counted_layer_by_layer(llm):
    told = []
    requests = [llm.request(i, prompt, PARAMS) for i, prompt in enumerate(PROMPTS)]
    llm.run(requests, on_prefill=lambda done, of: told.append((done, of)))
    of = 2 * len(llm.config.units)  # two batches
    assert told == [(done, of) for done in range(1, of + 1)]


def test_what_a_run_does_before_its_first_tokens():
    beginning, seen = Beginning(), []
    assert str(beginning) == "loading"
    beginning.prefilled(12, 64)
    listener = lambda event, seconds, **_: seen.append((event.rpartition("/")[2], str(beginning)))  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    jax.jit(lambda x: x * 3 + len(seen))(1.0)
    jax.monitoring.unregister_event_duration_listener(listener)
    assert ("jaxpr_to_mlir_module_duration", "compiling") in seen
    assert seen[-1] == ("backend_compile_duration", "prefill 12 of 64")
