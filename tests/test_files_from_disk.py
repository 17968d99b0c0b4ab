"""Whatever lies on the disk is read, or refused in one line: there is no other error."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flexgen_jax as fg
from flexgen_jax.engine.snapshots import Snapshots, State
from flexgen_jax.jobs.job import check_same, recorded_policy
from flexgen_jax.jobs.job_input import JobError
from flexgen_jax.jobs.results import FileResults, Position
from flexgen_jax.models.family import ConfigError
from flexgen_jax.models.params import param_records
from flexgen_jax.models.registry import load_config
from flexgen_jax.weights.checkpoint import SourceError, StoreError, convert, open_store
from flexgen_jax.weights.huggingface import HuggingFaceModel
from flexgen_jax.weights.manifest import with_seal
from scheduling.timeline import Timeline
from storage.array_file import describe_array
from storage.json_text import sealed
from storage.store import StorageError

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = sorted((GOLDENS / "families").glob("*/config.json"))

# The same examples each time, and few: what they found once is among them, or a test by itself.
quick = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

numbers = st.one_of(
    st.integers(-3, 10),
    st.sampled_from(
        [-1, 2**31, 2**63, 10**30, 10**400, 1e9, 1e12, 0.5, float("nan"), float("inf")]
    ),
)
leaves = st.one_of(
    st.none(), st.booleans(), numbers, st.sampled_from(["", "a", "2", "/", "..", "\0", "bfloat16"])
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["", "a", "name"]), inner)
    ),
    max_leaves=4,
)
junk = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"{}", b"[]", b"null", b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe{"]),
)


def places(tree, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def put(tree, path, value):
    """A copy with another value in one place; ``...``: without it."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if value is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = put(copy[path[0]], path[1:], value)
    return copy


@st.composite
def mutants(draw, tree):
    """A JSON text with one or two values changed, bytes changed, or all of it."""
    if draw(st.integers(0, 7)) == 0:
        return draw(junk)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(tree))[1:] or [()]))
        tree = put(tree, path, draw(st.one_of(st.just(...), values)) if path else draw(values))
    text = json.dumps(tree).encode()
    if draw(st.integers(0, 5)) == 0 and text:
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + draw(st.binary(max_size=2)) + text[at + draw(st.integers(0, 3)) :]
    return text


def one_line(call, *errors):
    """Whether it goes; what it raises is one of ``errors``, in one line that is no flood."""
    found = ""
    try:
        call()
    except errors as error:
        found = str(error)
    else:
        return True
    assert found
    assert "\n" not in found
    assert len(found) < 2000
    return False


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A weight store of the smallest golden model."""
    return convert(GOLDENS / "pre_norm", tmp_path_factory.mktemp("sound") / "store")


@pytest.fixture
def store(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "store")


@pytest.mark.parametrize("file", FAMILIES, ids=lambda file: file.parent.name)
@settings(quick, max_examples=25)
@given(data=st.data())
def test_config(file, tmp_path, data):
    (tmp_path / "config.json").write_bytes(data.draw(mutants(json.loads(file.read_text()))))
    one_line(lambda: param_records(load_config(tmp_path)), ConfigError)


@quick
@given(data=st.data())
def test_opt_config_and_generation_config(tmp_path, data):
    tree = json.loads((GOLDENS / "pre_norm" / "config.json").read_text())
    (tmp_path / "config.json").write_bytes(data.draw(mutants(tree)))
    (tmp_path / "generation_config.json").write_bytes(data.draw(mutants({"eos_token_id": [2]})))
    one_line(lambda: param_records(load_config(tmp_path)), ConfigError)


@quick
@given(data=st.data())
def test_manifest(sound, store, data):
    tree = json.loads((sound / "flexgen_manifest.json").read_text())
    first, *_ = tree["tensors"]
    tree = {**tree, "tensors": {first: tree["tensors"][first], **tree["tensors"]}}
    text = data.draw(mutants(tree))
    # Also one whose seal is right, whoever has written it.
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        text = json.dumps(with_seal(json.loads(text))).encode()
    (store / "flexgen_manifest.json").write_bytes(text)
    one_line(lambda: open_store(store), StoreError, ConfigError)


@quick
@given(data=st.data())
def test_array_metadata(sound, store, data):
    name = "layer_0.fc1.kernel"
    metadata = store / name / "zarr.json"
    metadata.write_bytes(data.draw(mutants(json.loads((sound / name / "zarr.json").read_text()))))
    one_line(lambda: describe_array(store / name), StoreError)
    one_line(lambda: open_store(store), StoreError)


@quick
@given(data=st.data())
def test_safetensors_header(tmp_path, data):
    content = (GOLDENS / "pre_norm" / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = data.draw(mutants(json.loads(content[8 : 8 + size])))
    said = data.draw(st.sampled_from([len(header), len(header), 0, 2**33, 2**64 - 1]))
    shutil.copy(GOLDENS / "pre_norm" / "config.json", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(said.to_bytes(8, "little") + header + content[8 + size :])
    one_line(lambda: HuggingFaceModel(tmp_path), SourceError)


@quick
@given(data=st.data())
def test_shard_index(tmp_path, data):
    shutil.copy(GOLDENS / "pre_norm" / "config.json", tmp_path)
    shutil.copy(GOLDENS / "pre_norm" / "model.safetensors", tmp_path / "one.safetensors")
    tree = {"metadata": {}, "weight_map": {"model.decoder.embed_tokens.weight": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_bytes(data.draw(mutants(tree)))
    one_line(lambda: HuggingFaceModel(tmp_path), SourceError)


HEADER = {
    "flexgen_jax_job": 2,
    "identity": {"input": {"bytes": 3}},
    "policy": fg.Policy().to_json(),
}
ENTRIES = [
    {"window": 0, "last_line": 1, "digest": "ab"},
    {"block": 0, "lines": [1], "sizes": [3], "crc32": 891568578, "sums": {"requests": 1}},
]


@pytest.mark.parametrize("seal", [sealed, lambda tree: json.dumps(tree).encode() + b"\n"])
@quick
@given(data=st.data())
def test_journal(tmp_path, seal, data):
    """Also one whose checksums are right, whoever has written it."""
    output = tmp_path / "out"
    position = json.loads(json.dumps({"position": vars(Position()), "done": False}))
    lines = [HEADER, position, *ENTRIES]
    at = data.draw(st.integers(0, len(lines) - 1))
    texts = [sealed(line) for line in lines]
    mutant = data.draw(mutants(lines[at]))
    try:
        texts[at] = seal(json.loads(mutant))
    except (ValueError, TypeError, RecursionError):
        texts[at] = mutant
    content = b"".join([*texts, b"abc"])
    output.with_name("out.partial").write_bytes(content)

    def read():
        with FileResults(output) as results:
            assert results.requests_finished in (0, 1)
            check_same(results, {"input": {"bytes": 3}})
            recorded_policy(results)

    one_line(read, JobError)
    output.with_name("out.partial").unlink(missing_ok=True)


@quick
@given(data=st.data())
def test_state_of_a_snapshot(tmp_path, data):
    place = tmp_path / "out.checkpoint"
    shutil.rmtree(place, ignore_errors=True)
    batches, counts = [{"rows": [None]}], {"seconds": 1.0}
    state = State(batches, (1, 2, 3), [], counts, 4, Timeline(()), {"disk": 3})
    Snapshots(place, seconds=1).of(block=0).save(state, iter(()))
    file = place / "0" / "state.json"
    tree = json.loads(file.read_text())
    text = data.draw(mutants(tree))
    file.write_bytes(text)
    found = []
    assert one_line(lambda: found.append(Snapshots(place, 1).of(block=0).load()), StorageError)
    # A text that says the same in other words is not what was saved either.
    assert found == [None] or json.loads(text) == tree
