import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from storage.array_file import METADATA_NAME, StoreError, create_array, describe_array

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.uint8]


def opened(directory, **spec):
    kvstore = {"driver": "file", "path": f"{directory}/"}
    return ts.open({"driver": "zarr3", "kvstore": kvstore, **spec}).result()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (7, 3), (2, 3, 4), ()])
def test_what_is_appended_is_what_tensorstore_reads(tmp_path, dtype, shape):
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    with create_array(tmp_path / "a", shape, np.dtype(dtype)) as writer:
        flat = values.reshape(-1)
        writer.append(flat[:2])
        writer.append(flat[2:])
    np.testing.assert_array_equal(opened(tmp_path / "a").read().result(), values)
    array = describe_array(tmp_path / "a")
    assert array == writer.file
    assert (array.raw, array.shape, array.dtype) == (True, shape, np.dtype(dtype))
    assert array.chunk.read_bytes() == values.tobytes()


def test_rows_that_are_not_contiguous_are_written_in_c_order(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    with create_array(tmp_path / "a", (4, 3), np.dtype(np.float32)) as writer:
        writer.append(values.T[:1])
        writer.append(values.T[1:])
    np.testing.assert_array_equal(opened(tmp_path / "a").read().result(), values.T)


def test_the_writer_insists_on_its_dtype_and_number_of_bytes(tmp_path):
    row = np.zeros(4, np.float32)
    writer = create_array(tmp_path / "a", (2, 4), row.dtype)
    with pytest.raises(StoreError, match="rows of float64"):
        writer.append(row.astype(np.float64))
    writer.append(row)
    with pytest.raises(StoreError, match="more than the 32 bytes"):
        writer.append(np.zeros(5, np.float32))
    with pytest.raises(StoreError, match=r"16 bytes were written.* takes 32"):
        writer.close()
    with pytest.raises(StoreError, match="truncated: it has 16 bytes, expected 32"):
        describe_array(tmp_path / "a")


def test_an_error_while_writing_is_not_hidden_by_the_missing_bytes(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        create_array(tmp_path / "a", (2,), np.dtype(np.float32)) as writer,
    ):
        raise ZeroDivisionError
    writer.close()


@pytest.mark.parametrize(
    ("codecs", "chunk_shape"),
    [
        ([{"name": "bytes", "configuration": {"endian": "little"}}], [2, 4]),
        ([{"name": "bytes", "configuration": {"endian": "big"}}], [4, 4]),
        ([{"name": "zstd", "configuration": {"level": 1}}], [4, 4]),
        ([{"name": "transpose", "configuration": {"order": [1, 0]}}], [4, 4]),
        (
            [
                {
                    "name": "sharding_indexed",
                    "configuration": {"chunk_shape": [4, 4], "codecs": [{"name": "bytes"}]},
                }
            ],
            [4, 4],
        ),
    ],
)
def test_other_layouts_are_described_but_not_raw(tmp_path, codecs, chunk_shape):
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}
    metadata = {"shape": [4, 4], "data_type": "float32", "codecs": codecs, "chunk_grid": grid}
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    opened(tmp_path / "a", metadata=metadata, create=True).write(values).result()
    array = describe_array(tmp_path / "a")
    assert (array.raw, array.shape, array.nbytes) == (False, (4, 4), 64)


def test_a_missing_array_chunk_or_metadata_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"nothing/zarr\.json: No such file.*convert the model"):
        describe_array(tmp_path / "nothing")
    with create_array(tmp_path / "a", (2, 2), np.dtype(np.float32)) as writer:
        writer.append(np.zeros(4, np.float32))
    writer.file.chunk.unlink()
    with pytest.raises(StoreError, match=r"c/0/0: No such file.*expected 16 bytes"):
        describe_array(tmp_path / "a")
    (tmp_path / "a" / METADATA_NAME).write_text("{")
    with pytest.raises(StoreError, match="not valid JSON"):
        describe_array(tmp_path / "a")


@pytest.mark.parametrize(
    "change", [{"zarr_format": 2}, {"node_type": "group"}, {"data_type": "r16"}, {"shape": None}]
)
def test_foreign_metadata_are_refused(tmp_path, change):
    with create_array(tmp_path / "a", (2,), np.dtype(np.float32)) as writer:
        writer.append(np.zeros(2, np.float32))
    file = tmp_path / "a" / METADATA_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(StoreError, match="expected a zarr version 3 array"):
        describe_array(tmp_path / "a")


def test_a_file_in_the_way_is_an_os_error(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError, match="a") as caught:
        create_array(tmp_path / "a", (2,), np.dtype(np.float32))
    assert caught.value.errno == errno.EEXIST
    (tmp_path / "b" / METADATA_NAME).mkdir(parents=True)
    with pytest.raises(OSError, match=os.strerror(errno.EISDIR)):
        create_array(tmp_path / "b", (2,), np.dtype(np.float32))
