"""Bytes that change by themselves: each is reported before it changes an answer, or has no part."""

import dataclasses
import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import flexgen_jax as fg
from flexgen_jax.cli.app import main
from flexgen_jax.engine.snapshots import Snapshots, State
from flexgen_jax.jobs.job_input import JobError
from flexgen_jax.jobs.results import FileResults
from flexgen_jax.models.family import ConfigError
from flexgen_jax.weights.checkpoint import (
    SourceError,
    StoreError,
    convert,
    open_model,
    open_store,
)
from flexgen_jax.weights.verifying import verify
from scheduling.timeline import Timeline
from storage.disk import DiskContext, DiskStore
from storage.slots import Slot
from storage.store import StorageError

MODEL = Path(__file__).parent / "goldens" / "pre_norm"
DEMO = Path(fg.__file__).parent / "demo_model"
FLIPS = 200
# What is read of a store beside its arrays.
BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A store of a tiny model with a tokenizer."""
    source = shutil.copytree(MODEL, tmp_path_factory.mktemp("source") / "model")
    for name in BESIDE[:2]:
        shutil.copy(DEMO / name, source)
    return convert(source, tmp_path_factory.mktemp("sound") / "store", dtype="bfloat16")


@pytest.fixture
def store(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "store")


def files_in(directory):
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def flips(directory, seed):
    """Flips one bit after the other, and back; yields (file, byte) meanwhile.

    Every other one in a file chosen evenly: else nearly all would fall into the largest.
    """
    random = np.random.default_rng(seed)
    files = files_in(directory)
    sizes = np.array([path.stat().st_size for path in files])
    files, sizes = [f for f, s in zip(files, sizes, strict=True) if s], sizes[sizes > 0]
    for number in range(FLIPS):
        share = sizes / sizes.sum() if number % 2 else None
        index = random.choice(len(files), p=share)
        at, bit = int(random.integers(sizes[index])), int(random.integers(8))
        path = files[index]
        before = path.read_bytes()
        after = bytearray(before)
        after[at] ^= 1 << bit
        path.write_bytes(after)
        yield path, at
        path.write_bytes(before)


def content_of(store):
    """All that an answer comes from."""
    model = open_store(store)
    # Both ways of reading, whichever the file is chosen for.
    for mode in ("direct", "mapped"):
        names, slot = tuple(model.arrays), Slot()
        with closing(DiskStore(model.arrays, DiskContext(mode=mode, small_nbytes=0))) as disk:
            slot.begin(disk.slot_nbytes(names))
            arrays = {n: np.asarray(a).tobytes() for n, a in disk.load(names, slot).items()}
    beside = {n: (store / n).read_bytes() for n in BESIDE if (store / n).exists()}
    return model.config, model.format, arrays, beside


def test_a_bit_of_a_store(sound, store):
    expected, reported = content_of(sound), 0
    for path, at in flips(store, seed=1):
        try:
            found = content_of(store)
        except (StoreError, StorageError, ConfigError):
            reported += 1
        else:
            assert found == expected, (path, at)
    assert reported > FLIPS // 2  # the rest is what nobody reads: Orbax's own files


def test_a_bit_of_a_shard(tmp_path):
    """Of which checksums were taken: in its header, its tensors, or the file of checksums."""
    model = shutil.copytree(MODEL, tmp_path / "model")
    (model / "generation_config.json").unlink()
    assert verify(model, record=True).recorded

    def content():
        opened = open_model(model)
        names, slot = tuple(opened.arrays), Slot()
        context = DiskContext(mode="direct", small_nbytes=0)
        with closing(DiskStore(opened.arrays, context)) as disk:
            slot.begin(disk.slot_nbytes(names))
            arrays = {n: np.asarray(a).tobytes() for n, a in disk.load(names, slot).items()}
        return dataclasses.replace(opened.config, eos_token_id=None), arrays

    expected, reported, hit = content(), 0, set()
    (model / "config.json").rename(tmp_path / "config.json")  # which has no checksum
    for path, at in flips(model, seed=6):
        shutil.copy(tmp_path / "config.json", model)
        try:
            found = content()
        except (SourceError, StoreError, StorageError):
            reported += 1
        else:
            assert found == expected, (path, at)
        hit.add(path.name)
        (model / "config.json").unlink()
    assert reported > FLIPS // 2
    assert hit == {"model.safetensors", "flexgen_checksums.json"}


def test_a_bit_of_an_interrupted_conversion(tmp_path):
    """Whatever it was, the store is sound in the end, or is not there."""

    def stop(done, total, name):
        if name.startswith("layer_1.q"):
            raise InterruptedError

    expected = content_of(convert(MODEL, tmp_path / "expected"))[2]
    target = tmp_path / "store"
    with pytest.raises(InterruptedError):
        convert(MODEL, target, progress=stop)
    begun = tmp_path / ".store.partial"
    kept, damaged = shutil.copytree(begun, tmp_path / "kept"), 0
    for number, _ in enumerate(flips(kept, seed=5)):
        if number % 10:  # each is a conversion
            continue
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(begun, ignore_errors=True)
        shutil.copytree(kept, begun)
        try:
            convert(MODEL, target)
            model = open_store(target)
            disk = DiskStore(model.arrays)
            found = disk.load(tuple(model.arrays), Slot())
        except (StoreError, StorageError):
            damaged += 1
            continue
        assert {n: np.asarray(a).tobytes() for n, a in found.items()} == expected
        disk.close()
    assert damaged


def cells():
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        yield name, {"keys": rng.standard_normal((2, 3), np.float32).astype(ml_dtypes.bfloat16)}


def test_a_bit_of_a_snapshot(tmp_path):
    state = State([{"rows": [None]}], (1, 2, 3), [], {"seconds": 1.5}, 4, Timeline(()), {"disk": 3})
    place = tmp_path / "out.checkpoint"
    Snapshots(place, seconds=1).of(block=0).save(state, cells())

    def load():
        kept = Snapshots(place, seconds=1).of(block=0).load()
        if kept is None:
            return None
        saved = {n: {k: a.tobytes() for k, a in arrays.items()} for n, arrays in kept[1]}
        return kept[0], saved

    expected, reported = load(), 0
    assert expected[0] == dataclasses.replace(state, room=[1, 2, 3])
    for path, at in flips(place, seed=2):
        try:
            found = load()
        except StorageError:
            reported += 1
        else:
            assert found in (None, expected), (path, at)  # None: the block begins anew
            reported += found is None
    assert reported > FLIPS * 9 // 10  # all but the mark


def test_a_bit_of_a_journal(tmp_path):
    records = {line: b'{"id": %d, "text": "so much"}\n' % line for line in range(1, 5)}
    job = tmp_path / "job"
    job.mkdir()
    output = job / "out.jsonl"
    with FileResults(output) as results:
        results.begin({"identity": {"input": {"bytes": 3}}, "policy": None})
        position = results.position
        for window, lines in enumerate(((1, 2), (3, 4))):
            results.begin_window(window, lines[-1], "ab")
            results.add_part({n: records[n] for n in lines}, {"requests": 2})
        results.end_window(
            {}, dataclasses.replace(position, windows=1, line=2, digest="ab", requests=2)
        )
        begun = results.begun
    kept = shutil.copytree(job, tmp_path / "kept")
    reported = 0
    for path, at in flips(kept, seed=3):
        shutil.rmtree(job)
        shutil.copytree(kept, job)
        try:
            with FileResults(output) as results:
                if results.header is None:  # begins anew
                    reported += 1
                    continue
                assert results.begun in (begun, []), (path, at)
                have = {n: results.has(n) for n in (3, 4)}
                reported += not all(have.values())  # computed again
                spool = results._spool.after(results._journal, 2)
        except JobError:
            reported += 1
        else:
            assert all(spool[n] == records[n] for n, there in have.items() if there), (path, at)
            done = (job / "out.jsonl.ordered").read_bytes()
            assert done == records[1] + records[2], (path, at)
    assert reported > FLIPS * 9 // 10


def chunk_of(store, name):
    return next(path for path in files_in(store / name / "c"))


def flip(path, at=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_a_run_says_what_is_damaged_wherever_it_lies(store, tier):
    flip(chunk_of(store, "layer_1.v.weight"), 7)
    shares = {"device": 0, "host": 0, "disk": 0, tier: 100}
    policy = fg.Policy(device_batch_size=1, weights=fg.Split(**shares))
    prompt = {"prompt_token_ids": [3, 4, 5]}
    params = fg.SamplingParams(max_tokens=1)
    with (
        pytest.raises(Exception, match=r"layer_1\.v\.weight is damaged.*flexgen-jax verify"),
        fg.LLM(str(store), policy=policy, dtype="bfloat16") as llm,
    ):
        llm.generate([prompt], params)
    unchecked = DiskContext(verify=False)
    with fg.LLM(str(store), policy=policy, dtype="bfloat16", disk=unchecked) as llm:
        assert llm.generate([prompt], params)


def test_rows_that_are_looked_up_are_of_a_sound_table(store):
    flip(chunk_of(store, "embed.tokens"), 999)
    disk = DiskStore(open_store(store).arrays)
    with pytest.raises(StorageError, match=r"embed\.tokens is damaged"):
        disk.take("embed.tokens", np.array([0]))
    disk.close()


@pytest.mark.parametrize("mode", ["mapped", "direct"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_change_during_a_run_is_noticed(store, mode, replaced):
    model = open_store(store)
    disk = DiskStore(model.arrays, DiskContext(mode=mode, small_nbytes=0))
    name = "layer_0.fc1.weight"
    slot = Slot()
    slot.begin(disk.slot_nbytes((name,)))
    jax.block_until_ready(disk.load((name,), slot))
    chunk = chunk_of(store, name)
    before = chunk.stat()
    if replaced:  # by another file of the same size and time
        shutil.copy2(chunk, store / "new")
        os.replace(store / "new", chunk)
        assert chunk.stat().st_mtime_ns == before.st_mtime_ns
    else:
        flip(chunk)
        os.utime(chunk, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    slot.begin(disk.slot_nbytes((name,)))
    with pytest.raises(StorageError, match=rf"{name} was changed or replaced while .*{chunk}"):
        disk.load((name,), slot)
    with pytest.raises(StorageError, match="was changed or replaced"):
        disk.take(name, np.array([0]))
    disk.close()


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)


def test_verify_names_what_is_wrong(store):
    sound = run("verify", store, "--quiet")
    assert sound.exit_code == 0, sound.output
    assert "nothing is wrong" in sound.output
    flip(chunk_of(store, "layer_0.fc1.weight"))
    chunk_of(store, "layer_0.q.bias").unlink()
    flip(store / "tokenizer_config.json", 20)
    found = run("verify", store, "--quiet", "--json")
    assert found.exit_code == 1
    values = json.loads(found.stdout)
    first, second, third = values["problems"]
    assert "layer_0.q.bias" in first
    assert "layer_0.fc1.weight: the bytes are not" in second
    assert "tokenizer_config.json" in third
    assert not values["sound"]


def test_a_tokenizer_that_was_changed_on_purpose(store):
    (store / "tokenizer_config.json").write_text("{}")
    with pytest.raises(StoreError, match=r"tokenizer_config\.json was changed after.*verify --rec"):
        open_store(store)
    assert verify(store, record=True).recorded
    open_store(store)
    assert verify(store).sound


def test_a_store_of_before_there_were_checksums(sound, store):
    manifest = store / "flexgen_manifest.json"
    values = json.loads(manifest.read_text())
    for key in ("seal", "files"):
        del values[key]
    for entry in values["tensors"].values():
        del entry["checksum"]
    manifest.write_text(json.dumps({**values, "format_version": 3}))
    assert content_of(store) == content_of(sound)
    found = verify(store)
    assert found.sound
    assert found.checked == 0
    assert "carries no checksums" in found.summary()
    assert verify(store, record=True).recorded
    assert verify(store).checked == len(values["tensors"])
    flip(chunk_of(store, "layer_0.fc1.weight"))
    assert not verify(store).sound


def test_a_damaged_store_is_not_quantised(store, tmp_path):
    flip(chunk_of(store, "layer_0.fc1.weight"))
    with pytest.raises(SourceError, match=r"layer_0\.fc1\.weight.* is damaged"):
        convert(store, tmp_path / "codes", dtype="bfloat16", weight_bits=8)
    assert not (tmp_path / "codes").exists()
