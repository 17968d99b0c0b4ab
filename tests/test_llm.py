"""The main path: greedy tokens equal Hugging Face's, whatever the schedule and the placement."""

import dataclasses
import gc
import json
import threading
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flexgen_jax as fg
from flexgen_jax.planning.blocks import padded_length, padded_rows
from scheduling import FreeWeights, LoadWeights, ScheduleError, zigzag
from storage.disk import DiskStore
from storage.host import HostSequences
from storage.wrappers import Logged, Throttled

GOLDENS = Path(__file__).parent / "goldens"
EXPECTED = json.loads((GOLDENS / "expected.json").read_text())
PROMPTS = EXPECTED["prompts"]
NEW = 12
GREEDY = fg.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)

SPLITS = {
    "device": fg.Split(),
    "host": fg.Split(device=0, host=100),
    "disk": fg.Split(device=0, disk=100),
    "mixed": fg.Split(device=30, host=30, disk=40),
}


def policy(**changes):
    return fg.Policy(**{"device_batch_size": 4, "num_device_batches": 2} | changes)


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    return str(tmp_path_factory.mktemp("offload"))


def generate(variant, offload, prompts=PROMPTS, params=GREEDY, **options):
    """Token ids of every prompt, logits by (step, batch), and the report."""
    logits = {}

    def keep(step, batch, values):
        logits[step, batch] = np.asarray(values)

    options = {"policy": policy(), "offload_dir": offload} | options
    with fg.LLM(str(GOLDENS / variant), **options) as llm:
        outputs = llm.generate(prompts, params, on_logits=keep)
        assert [o.request_id for o in outputs] == [str(i) for i in range(len(prompts))]
        return [list(o.outputs[0].token_ids) for o in outputs], logits, llm.report


@pytest.mark.parametrize("variant", sorted(EXPECTED["variants"]))
def test_tokens_equal_transformers_and_logits_are_bit_equal(variant, offload):
    """Unequal prompts, of length 1 and with the pad token too; every placement and order.

    Each variant has all of both, and every order has every placement with one variant or another.
    """
    expected = [tokens[:NEW] for tokens in EXPECTED["variants"][variant]["tokens"]]
    orders = [*((name, True) for name in fg.SCHEDULES), ("zigzag", False)]
    splits, first = list(SPLITS.values()), sorted(EXPECTED["variants"]).index(variant)
    reference = None
    for number, (schedule, overlap) in enumerate(orders, first):
        tokens, logits, _ = generate(
            variant,
            offload,
            policy=policy(weights=splits[number % len(splits)], overlap=overlap),
            schedule=schedule,
        )
        assert tokens == expected
        reference = reference or logits
        assert logits.keys() == reference.keys()
        for place, values in logits.items():
            np.testing.assert_array_equal(values, reference[place])


def test_every_order_has_every_placement():
    """In the test above: there are as many variants as placements, or more."""
    assert len(EXPECTED["variants"]) >= len(SPLITS) <= len(fg.SCHEDULES) + 1


shares = st.tuples(st.integers(0, 100), st.integers(0, 100)).map(
    lambda s: fg.Split(device=s[0], host=min(s[1], 100 - s[0]), disk=max(0, 100 - s[0] - s[1]))
)


@pytest.mark.usefixtures("optimised")
@given(
    weights=shares,
    cache=shares,
    hidden=shares,
    schedule=st.sampled_from(sorted(fg.SCHEDULES)),
    overlap=st.booleans(),
    mode=st.sampled_from(["auto", "mapped", "direct", "tensorstore"]),
    spare=st.booleans(),
    chunk=st.sampled_from([1, 8, 32]),
    slots=st.fixed_dictionaries(
        {}, optional={f"{n}_slots": st.integers(2, 4) for n in ("weight", "cache", "hidden")}
    ),
    store_slots=st.integers(1, 3),
    throttled=st.sampled_from([None, *fg.Tier]),
    batches=st.integers(1, 3),
    stages=st.integers(1, 4),
    groups=st.sampled_from([None, 1, 3]),
    compression=st.sampled_from(
        [
            {},
            {"weight_bits": 4},
            {"weight_bits": 8, "cache_bits": 8},
            {"cache_bits": 4},
            {"attention_sparsity": 0.3},
            {"weight_bits": 4, "cache_bits": 4, "attention_sparsity": 0.3},
        ]
    ),
)
@settings(
    max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_policy_gives_the_same_bits(
    offload,
    weights,
    cache,
    hidden,
    schedule,
    overlap,
    mode,
    spare,
    chunk,
    slots,
    store_slots,
    throttled,
    batches,
    stages,
    groups,
    compression,
):
    """The crown: tokens and logits equal those of the serial run with all on the device."""

    def wrap(tier, store):
        return Throttled(store, 2e8) if tier is throttled else store

    tokens, logits, report = generate(
        "pre_norm",
        offload,
        policy=policy(
            weights=weights,
            cache=cache,
            hidden=hidden,
            overlap=overlap,
            num_device_batches=batches,
            num_stages=stages,
            num_groups=groups,
            refill=False,  # else an order in which batches end apart puts rows together sooner
            **compression,
        ),
        schedule=schedule,
        disk=fg.DiskContext(
            mode=mode,
            small_nbytes=2048 if spare else 0,
            cache_share=0.5 if spare else 0.0,
            chunk_positions=chunk,
        ),
        slots=slots | {"store_slots": store_slots},
        wrap_store=wrap,
    )
    key = (batches, *sorted(compression.items()))
    if key not in SERIAL:
        serial = policy(num_device_batches=batches, overlap=False, refill=False, **compression)
        SERIAL[key] = generate("pre_norm", offload, policy=serial)[:2]
    assert tokens == SERIAL[key][0]
    reference = SERIAL[key][1]
    assert logits.keys() == reference.keys()
    assert all(np.array_equal(values, reference[place]) for place, values in logits.items())
    for kind, split in (("weights", weights), ("cache", cache), ("hidden", hidden)):
        placed = report.placement[kind]
        total = placed.nbytes()
        assert sum(placed.nbytes(tier) for tier in fg.Tier) == total
        # whole cells of each stage: off by no more than the largest, and reported as it really is
        largest = max(cell.nbytes for cell in placed.cells)
        for tier, share in split.shares().items():
            assert abs(placed.nbytes(tier) - share / 100 * total) <= 2 * largest * stages


SERIAL = {}  # by batches of a block and compression: tokens and logits


@given(
    cache=shares,
    hidden=shares,
    schedule=st.sampled_from(sorted(fg.SCHEDULES)),
    overlap=st.booleans(),
)
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_attention_on_the_host_gives_the_same_tokens(offload, cache, hidden, schedule, overlap):
    tokens, _, _ = generate(
        "pre_norm",
        offload,
        policy=policy(cache=cache, hidden=hidden, overlap=overlap, host_attention=True),
        schedule=schedule,
    )
    assert tokens == [t[:NEW] for t in EXPECTED["variants"]["pre_norm"]["tokens"]]


def test_with_attention_on_the_host_the_cache_never_moves(offload):
    def run(host_attention):
        moves = []

        def wrap(tier, store):
            if tier is not fg.Tier.HOST or not isinstance(store, HostSequences):
                return store
            # A log makes loads visible that are free; what is free is the store's to say.
            logged = Logged(store, lambda verb, name, nbytes: moves.append((verb, name, nbytes)))
            logged.free_load = store.free_load
            return logged

        split = fg.Split(device=0, host=100)
        _, _, report = generate(
            "pre_norm",
            offload,
            policy=policy(cache=split, host_attention=host_attention),
            wrap_store=wrap,
        )
        return moves, report

    moves, report = run(host_attention=True)
    streams = {span.stream for span in report.timeline.spans}
    assert "load cache" not in streams
    appended = [nbytes for verb, name, nbytes in moves if verb == "append"]
    config = fg.OPTConfig.load(GOLDENS / "pre_norm")
    # what goes there is one position of keys and values a layer
    assert set(appended) == {2 * 4 * 4 * config.hidden_size}


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        ("cache", {"host": 100}),
        ("cache", {"disk": 100}),
        ("hidden", {"disk": 100}),
        ("hidden", {"host": 40, "disk": 60}),
        ("cache", {"host": 50, "disk": 50}),
    ],
)
def test_the_report_says_what_the_stores_held(offload, kind, split):
    """Planned, reported and really stored bytes are the same."""
    peak = {}

    class Watching(Logged):
        def put(self, name, arrays, capacity, **how):
            super().put(name, arrays, capacity, **how)
            if name.startswith(kind):
                peak[self.tier] = max(peak.get(self.tier, 0), self._store.nbytes)

    def wrap(tier, store):
        watching = Watching(store, lambda *_: None)
        watching.tier = tier
        return watching

    # With refill there is room for the longest prompt in every row, whoever may come.
    options = {kind: fg.Split(**{"device": 0} | split), "refill": False}
    _, _, report = generate("pre_norm", offload, policy=policy(**options), wrap_store=wrap)
    placed = report.placement[kind]
    for tier in fg.Tier:
        assert placed.nbytes(tier) == peak.get(tier, 0)
        assert report.to_json()["placement"][kind][tier.value]["nbytes"] == peak.get(tier, 0)
    if placed.nbytes(fg.Tier.DISK) and kind == "hidden":
        assert report.disk_bytes_written > 0
        assert report.disk_bytes > 0


def test_bfloat16_is_bit_equal_among_placements(offload):
    runs = [
        generate("pre_norm", offload, policy=policy(weights=split), dtype="bfloat16")[1]
        for split in SPLITS.values()
    ]
    for run in runs[1:]:
        assert all(np.array_equal(run[place], runs[0][place]) for place in runs[0])


def test_what_is_on_disk_is_read_once_per_pass(offload):
    _, _, report = generate("untied_projected", offload, policy=policy(weights=SPLITS["disk"]))
    assert report.placement["weights"].percent(fg.Tier.DISK) == 100
    # two batches share each pass of zig-zag; of the token table come only the tokens' rows
    config = fg.OPTConfig.load(GOLDENS / "untied_projected")
    row = 4 * config.word_embed_proj_dim
    rows = (report.padded_tokens + 8 * (NEW - 1)) * row
    weights = report.placement["weights"].nbytes() - config.vocab_size * row
    assert report.disk_bytes == NEW * weights + rows
    _, _, report = generate(
        "untied_projected", offload, policy=policy(weights=SPLITS["disk"]), schedule="row_by_row"
    )
    assert report.disk_bytes == 2 * NEW * weights + rows
    _, _, report = generate("untied_projected", offload)
    assert report.disk_bytes == 0


def test_the_next_layer_is_read_while_this_one_computes(offload, monkeypatch):
    """Each prefill of a layer waits until the next layer is being read: overlap or a failure."""
    from flexgen_jax.engine import kernels

    config = fg.OPTConfig.load(GOLDENS / "pre_norm")
    begun = {unit: threading.Event() for unit in config.units}

    class Announcing:
        def __init__(self, store):
            self._store = store

        def __getattr__(self, name):
            return getattr(self._store, name)

        def load(self, names, slot):
            begun["head" if "head.norm.scale" in names else names[0].split(".")[0]].set()
            return self._store.load(names, slot)

    original = kernels.prefill_layer
    waited = []

    def after_the_next_read_began(*args, **options):
        following = config.units[len(waited) + 2]
        waited.append(begun[following].wait(timeout=60))
        return original(*args, **options)

    after_the_next_read_began._cache_size = original._cache_size  # for the report
    monkeypatch.setattr(kernels, "prefill_layer", after_the_next_read_began)
    one_batch = policy(num_device_batches=1, weights=SPLITS["disk"])
    generate(
        "pre_norm",
        offload,
        prompts=PROMPTS[:2],
        policy=one_batch,
        wrap_store=lambda tier, store: Announcing(store) if isinstance(store, DiskStore) else store,
    )
    assert waited == [True] * config.num_hidden_layers


def test_requests_stop_by_themselves_and_the_block_stops_with_them(offload):
    """Token 12 ends most sequences early: what comes after it is neither returned nor computed."""
    expected = EXPECTED["variants"]["pre_norm"]["tokens"]
    params = fg.SamplingParams(
        temperature=0.0, max_tokens=24, ignore_eos=True, stop_token_ids=[12, 61]
    )
    steps = []
    blocks = policy(refill=False)
    with fg.LLM(str(GOLDENS / "pre_norm"), policy=blocks, offload_dir=offload) as llm:
        outputs = llm.generate(PROMPTS, params, on_logits=lambda s, b, _: steps.append((s, b)))
    for output, tokens in zip(outputs, expected, strict=True):
        ends = [i for i, t in enumerate(tokens) if t in (12, 61)]
        got = output.outputs[0]
        assert list(got.token_ids) == tokens[: ends[0] + 1]
        assert got.finish_reason == "stop"
        assert got.stop_reason == tokens[ends[0]]
    # batches of 4, longest prompts first: the batch of 3 short ones comes second
    order = sorted(range(len(PROMPTS)), key=lambda i: -len(PROMPTS[i]))
    for batch, members in enumerate((order[:4], order[4:])):
        longest = max(len(outputs[i].outputs[0].token_ids) for i in members)
        assert max(s for s, b in steps if b == batch) == longest - 1


def test_requests_of_one_batch_have_their_own_parameters(offload):
    expected = EXPECTED["variants"]["pre_norm"]["tokens"]
    params = [
        fg.SamplingParams(temperature=0.0, max_tokens=1 + 3 * i, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    tokens, _, report = generate("pre_norm", offload, params=params)
    assert tokens == [e[: 1 + 3 * i] for i, e in enumerate(expected)]
    assert report.generated_tokens == sum(map(len, tokens))


def test_min_tokens_and_eos(offload):
    """The model's end-of-text token ends a request unless it is ignored or comes too early."""
    eos, room = 2, 40
    hot = {"temperature": 9.0, "max_tokens": room}
    seeds = [fg.SamplingParams(**hot, seed=i, ignore_eos=True) for i in range(16)]
    tokens, _, _ = generate("pre_norm", offload, prompts=[PROMPTS[0]] * 16, params=seeds)
    seed = next(i for i, t in enumerate(tokens) if eos in t[: room - 5])
    place = tokens[seed].index(eos)
    stopping = fg.SamplingParams(**hot, seed=seed)
    held = fg.SamplingParams(**hot, seed=seed, min_tokens=place + 3)
    (stopped, later), _, _ = generate(
        "pre_norm", offload, prompts=[PROMPTS[0]] * 2, params=[stopping, held]
    )
    assert stopped == tokens[seed][: place + 1]
    assert later[:place] == tokens[seed][:place]
    assert len(later) >= place + 3
    assert eos not in later[: place + 2]


def test_sampled_tokens_do_not_depend_on_neighbours_or_schedule(offload):
    params = fg.SamplingParams(temperature=1.0, seed=11, max_tokens=NEW, ignore_eos=True)
    together, _, _ = generate("pre_norm", offload, params=params)
    disk = policy(weights=SPLITS["disk"])
    again, _, _ = generate("pre_norm", offload, params=params, schedule="row_by_row", policy=disk)
    assert together == again
    for i, prompt in enumerate(PROMPTS):
        alone, _, _ = generate("pre_norm", offload, prompts=[prompt], params=params)
        assert alone == [together[i]]
    unseeded = fg.SamplingParams(temperature=1.0, max_tokens=NEW, ignore_eos=True)
    first, _, _ = generate("pre_norm", offload, params=unseeded)
    assert first == generate("pre_norm", offload, params=unseeded)[0]
    assert first != generate("pre_norm", offload, params=unseeded, seed=1)[0]


def test_logprobs(offload):
    params = [
        fg.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=k)
        for k in (None, 0, 2, None, 5, 0, 1)
    ]
    with fg.LLM(str(GOLDENS / "pre_norm"), policy=policy(), offload_dir=offload) as llm:
        outputs = llm.generate(PROMPTS, params)
    for output, p in zip(outputs, params, strict=True):
        got = output.outputs[0]
        if p.logprobs is None:
            assert got.logprobs is None
            assert got.cumulative_logprob is None
            continue
        assert len(got.logprobs) == 3
        total = 0.0
        for token, entry in zip(got.token_ids, got.logprobs, strict=True):
            assert len(entry) == max(1, p.logprobs)  # greedy: the chosen one is the likeliest
            assert entry[token].rank == 1
            assert sorted(e.rank for e in entry.values()) == list(range(1, len(entry) + 1))
            assert all(e.logprob < 0 for e in entry.values())
            total += entry[token].logprob
        assert got.cumulative_logprob == pytest.approx(total)


def test_blocks_and_padding_are_reported(offload):
    prompts = [[5] * n for n in (3, 30, 17, 4, 5, 16, 2, 1, 1)]
    params = fg.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    small = policy(device_batch_size=2, num_device_batches=2, refill=False)
    _, _, report = generate("pre_norm", offload, prompts=prompts, params=params, policy=small)
    assert report.requests == 9
    assert report.batches == 5
    assert report.blocks == 3
    assert report.prompt_tokens == 79
    # sorted by length: (30, 17) in 32, then pairs in 16, and one alone
    assert report.padded_tokens == 2 * 32 + 3 * 2 * 16 + 16
    assert report.padding == pytest.approx(1 - 79 / 176)
    assert report.generated_tokens == 18
    again = generate("pre_norm", offload, prompts=prompts, params=params, policy=small)[2]
    assert again.compilations == 0


def test_bucketed_lengths():
    lengths = (1, 16, 17, 64, 65, 128, 129, 256, 257, 512, 600, 2000)
    expected = [16, 16, 32, 64, 80, 128, 160, 256, 320, 512, 640, 2048]
    assert [padded_length(n) for n in lengths] == expected
    for n in range(1, 2049):
        assert n <= padded_length(n) <= n + max(15, n / 4)
    assert len({padded_length(n) for n in range(1, 2049)}) <= 32
    assert [padded_rows(n, 6) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]


def test_a_users_own_schedule(offload):
    def all_at_once(w):
        """Zig-zag with the steps' loads first: any function from a workload to ops will do."""
        yield from zigzag(w)

    tokens, _, report = generate("pre_norm", offload, schedule=all_at_once)
    assert tokens == [t[:NEW] for t in EXPECTED["variants"]["pre_norm"]["tokens"]]
    assert report.schedule == "all_at_once"


def test_an_invalid_schedule_is_refused_before_anything_runs(offload):
    def forgetful(w):
        return (op for op in zigzag(w) if op != LoadWeights(w.num_steps - 1, 2))

    def greedy(w):
        return (op for op in zigzag(w) if not isinstance(op, FreeWeights))

    ran = []
    for schedule, missing in ((forgetful, LoadWeights(NEW - 1, 2)), (greedy, FreeWeights(0))):
        with (
            fg.LLM(
                str(GOLDENS / "pre_norm"), policy=policy(), offload_dir=offload, schedule=schedule
            ) as llm,
            pytest.raises(ScheduleError) as caught,
        ):
            llm.generate(PROMPTS, GREEDY, on_logits=lambda *a: ran.append(a))
        assert caught.value.missing == missing
        assert str(missing) in str(caught.value)
        assert str(caught.value.op) in str(caught.value)
    assert not ran


def test_prompts_come_in_several_forms(offload):
    with fg.LLM(str(GOLDENS / "pre_norm"), policy=policy(), offload_dir=offload) as llm:
        several = llm.generate([PROMPTS[2], {"prompt_token_ids": PROMPTS[2]}], GREEDY)
        (one,) = llm.generate(PROMPTS[2], GREEDY)
        (as_dict,) = llm.generate({"prompt_token_ids": PROMPTS[2]}, GREEDY)
        assert llm.generate([], GREEDY) == []
    tokens = {o.outputs[0].token_ids for o in (*several, one, as_dict)}
    assert len(tokens) == 1
    assert one.prompt_token_ids == tuple(PROMPTS[2])
    assert one.outputs[0].text == ""  # no tokenizer


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "no tokens"),
        ([1, 9999], {}, "token id 9999 is outside the vocabulary"),
        ([1, -1], {}, "token id -1"),
        ([1] * 5000, {}, "too long: 5000 prompt tokens"),
        ([1], {"max_tokens": 5000}, "max_tokens 5000"),
        ([1], {"stop_token_ids": [9999]}, "stop token id 9999"),
        ("text", {}, "no tokenizer"),
        ({"text": "x"}, {}, "unknown field 'text'"),
        ({"prompt": 3}, {}, "a text or a list of token ids, got 3"),
        ({"prompt_token_ids": ["a"]}, {}, "list of token ids"),
        (None, {}, "got None"),
    ],
)
def test_bad_prompts_are_named_all_at_once(offload, prompt, params, words):
    with fg.LLM(str(GOLDENS / "pre_norm"), policy=policy(), offload_dir=offload) as llm:
        with pytest.raises(fg.RequestError, match="prompt 1: ") as caught:
            llm.generate([PROMPTS[0], prompt, prompt], fg.SamplingParams(**params))
        assert words in str(caught.value)
        assert "prompt 2: " in str(caught.value)


def test_parameters_must_match_the_prompts(offload):
    with (
        fg.LLM(str(GOLDENS / "pre_norm"), policy=policy(), offload_dir=offload) as llm,
        pytest.raises(fg.RequestError, match="7 prompts but 2"),
    ):
        llm.generate(PROMPTS, [GREEDY, GREEDY])


def test_closing_gives_the_weights_back_at_once(offload):
    """Two models in a row must not take the memory of two."""

    def alive():
        return {id(array): array.nbytes for array in jax.live_arrays()}

    others = alive()  # what earlier tests have left to the garbage collector
    with fg.LLM(str(GOLDENS / "pre_norm"), policy=policy(), offload_dir=offload) as llm:
        weights = llm.placement.nbytes()
        held = {key: nbytes for key, nbytes in alive().items() if key not in others}
        assert sum(held.values()) >= weights
    left = sum(nbytes for key, nbytes in alive().items() if key in held)
    assert left < weights / 10


def test_dropping_it_gives_the_weights_back_at_once(offload):
    """Nothing waits for the garbage collector, reports that are kept included."""
    llm = fg.LLM(str(GOLDENS / "pre_norm"), policy=policy(), offload_dir=offload)
    gc.collect()
    gc.disable()
    try:
        outputs = llm.generate(PROMPTS, GREEDY)
        report = llm.report
        loader = llm.runner._stages[0].weights
        (array, *_) = jax.tree.leaves(loader.resident(1))
        watched = [weakref.ref(kept) for kept in (llm, llm.runner, loader, array)]
        del llm, loader, array, _
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()
    assert report.predicted.seconds > 0
    assert report.observations
    assert len(outputs) == len(PROMPTS)


def test_a_report_is_of_the_policy_of_its_run(offload):
    with fg.LLM(str(GOLDENS / "pre_norm"), policy=policy(), offload_dir=offload) as llm:
        llm.generate(PROMPTS, GREEDY)
        before = llm.report
        llm.policy = policy(cache=SPLITS["disk"], hidden=SPLITS["disk"], overlap=False)
    assert before.policy == policy()
    assert not any("cache" in name for name in before.predicted.summary())


def test_wrong_kinds_of_arguments_are_named(offload):
    model = str(GOLDENS / "pre_norm")
    for options, words in (
        ({"policy": "autoo"}, "policy must be 'auto' or a Policy, got 'autoo'"),
        ({"policy": None}, "policy must be 'auto' or a Policy"),
        ({"seed": "a"}, "seed must be an integer of at least 0, got 'a'"),
        ({"disk": "direct"}, "disk must be a DiskContext, got 'direct'"),
        ({"slots": {"cash_slots": 3}}, "no slots 'cash_slots'; known: weight_slots"),
    ):
        with pytest.raises(ValueError, match=r"got|known") as caught:
            fg.LLM(model, offload_dir=offload, **options)
        assert words in str(caught.value)
    with fg.LLM(model, policy=policy(), offload_dir=offload) as llm:
        with pytest.raises(fg.RequestError, match="sampling parameters must be SamplingParams"):
            llm.generate([[5], [6]], ["x", "y"])
        llm.generate([5], GREEDY)
        assert len(repr(llm.report)) < 200
        assert len(repr(llm.report.timeline)) + len(repr(llm.report.placement)) < 500
    with pytest.raises(ValueError, match="this LLM is closed"):
        llm.generate([5], GREEDY)


def test_wrong_schedule_and_model_names(offload, tmp_path):
    known = "known: cgopipe, diagonal, lock_step, neo, row_by_row"
    with pytest.raises(ValueError, match=rf"no schedule 'zigzga'; did you mean zigzag\?; {known}"):
        fg.LLM(str(GOLDENS / "pre_norm"), schedule="zigzga", offload_dir=offload)
    with pytest.raises(ValueError, match="nowhere"):
        fg.LLM(str(tmp_path / "nowhere"), offload_dir=offload)


@pytest.fixture
def limited(offload, allowing):
    """An ``LLM`` that has so many bytes to place; None: as many as there are."""

    def made(nbytes, **more):
        memory = None if nbytes is None else allowing(nbytes)
        model = str(GOLDENS / "pre_norm")
        return fg.LLM(model, offload_dir=offload, device_memory=memory, **more)

    return made


def test_auto_is_the_default_and_keeps_to_the_memory(offload, limited):
    with fg.LLM(str(GOLDENS / "pre_norm"), offload_dir=offload) as llm:
        assert llm.policy.weights == fg.Split()
        assert llm.why.startswith("best of")
        total = llm.placement.nbytes()
        llm.generate(PROMPTS, GREEDY)
        whole = llm.report.peak_bytes[fg.Tier.DEVICE]
    for nbytes in (whole * 5 // 4, whole, whole * 3 // 4):
        with limited(nbytes) as llm:
            tokens = [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, GREEDY)]
            report = llm.report
        assert tokens == [t[:NEW] for t in EXPECTED["variants"]["pre_norm"]["tokens"]]
        held = report.peak_bytes
        assert held[fg.Tier.DEVICE] + held[fg.Tier.HOST] <= nbytes
        assert report.why is not None
        assert report.placement["weights"].nbytes() == total
    assert whole > report.peak_bytes[fg.Tier.DEVICE]
    aside = r"nothing fits within device .* \(.* of it are set aside\), disk .*; nearest"
    with pytest.raises(ValueError, match=aside):
        limited(10_000).generate(PROMPTS, GREEDY)
    with pytest.raises(ValueError, match="such as '12GiB'"):
        fg.LLM(str(GOLDENS / "pre_norm"), device_memory="lots", offload_dir=offload)


def test_auto_goes_down_to_the_disk(offload, allowing):
    demo = "flexgen_jax/demo_model"
    with fg.LLM(demo, offload_dir=offload) as llm:
        whole = [o.outputs[0].token_ids for o in llm.generate([[5, 6, 7]] * 4, GREEDY)]
        total = llm.placement.nbytes()
    with fg.LLM(demo, offload_dir=offload, device_memory=allowing(total * 3 // 4)) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate([[5, 6, 7]] * 4, GREEDY)] == whole
        report = llm.report
    assert report.placement["weights"].nbytes(fg.Tier.DISK) > 0.2 * total
    assert 0 < report.peak_bytes[fg.Tier.DEVICE] <= total * 3 // 4
    assert report.disk_bytes > 0


def test_auto_chooses_anew_for_other_jobs_around_weights_in_place(offload):
    with fg.LLM(str(GOLDENS / "pre_norm"), offload_dir=offload) as llm:
        llm.generate([[5, 6]], GREEDY)
        first = llm.policy
        assert first.block_size == 1
        llm.generate([[5, 6, 7]], GREEDY)
        assert llm.policy is first  # a job of the same kind
        llm.generate([[5, 6]] * 9, GREEDY)
        assert llm.policy.block_size >= 8
        assert llm.policy.weights == first.weights
        llm.policy = dataclasses.replace(first, device_batch_size=2)
        llm.generate([[5, 6]] * 9, GREEDY)
        assert llm.policy.device_batch_size == 2  # setting it ends the choosing


def test_auto_keeps_what_is_fixed_and_uses_what_is_allowed(offload, limited):
    with limited(None, fixed={"device_batch_size": 3, "cache_bits": 8}) as llm:
        assert (llm.policy.device_batch_size, llm.policy.cache_bits) == (3, 8)
    slow = dataclasses.replace(fg.Hardware.preset("laptop"), disk_to_host=1e3)
    small = {"nbytes": 80_000, "hardware": slow, "fixed": {"device_batch_size": 1}}
    with limited(**small, allow=["weight_bits"]) as llm:
        llm.generate([[5, 6]], GREEDY)
        assert llm.policy.weight_bits in (4, 8)
        assert llm.store.name != str(GOLDENS / "pre_norm")
        assert llm.report.placement["weights"].nbytes(fg.Tier.DISK) < 200_000
    for wrong, words in (
        ({"fixed": {"speed": 1}}, "no policy field speed; known: device_batch_size"),
        ({"fixed": {"cache_bits": 3}}, "cache_bits must be None, 4 or 8"),
        ({"allow": ["magic"]}, "nothing to allow by magic"),
        ({"forbid": ["cache_bits"]}, "nothing to forbid by cache_bits; known: host_attention"),
        ({"policy": fg.Policy(), "forbid": ["host_attention"]}, "are for policy='auto'"),
        ({"policy": fg.Policy(), "allow": ["cache_bits"]}, "are for policy='auto'"),
    ):
        with pytest.raises(ValueError, match=words):
            fg.LLM(str(GOLDENS / "pre_norm"), offload_dir=offload, **wrong)


def test_a_run_says_why_it_waited(offload):
    disk = fg.Policy(weights=fg.Split(device=0, disk=100))
    with fg.LLM(str(GOLDENS / "pre_norm"), policy=disk, offload_dir=offload) as llm:
        llm.generate(PROMPTS, GREEDY)
        streams = llm.report.to_json()["streams"]
    reasons = set(streams["compute"]["waited_seconds"])
    assert "weights" in reasons
    assert reasons <= {"weights", "cache", "hidden", "stores", "barrier", "slot"}
    assert "slot" in streams["load weights"]["waited_seconds"]


def test_conversion_is_announced_once_and_reused(tmp_path):
    said = []
    for _ in range(2):
        smaller = {"dtype": "bfloat16", "offload_dir": str(tmp_path)}  # it is published in float32
        fg.LLM(str(GOLDENS / "pre_norm"), **smaller, say=said.append).close()
    assert len(said) == 1
    assert "pre_norm" in said[0]
