"""Files that are compressed, by the end of their name: ``.gz`` and ``.zst``."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import IO, Any

ENDS = (".gz", ".zst")
# Bytes uncompressed at a time: four of them may stand for 128 KiB.
_PACKED = 512


def plain_suffix(path: Path) -> str:
    """What a file's name ends in, compression aside: ``.txt`` of ``prompts.txt.gz``."""
    return Path(path.stem if path.suffix in ENDS else path.name).suffix


def reader(file: IO[bytes], path: Path) -> IO[bytes]:
    """What ``file`` holds, uncompressed on the fly.

    Raises:
        EOFError: nothing; not even an archive of nothing.

    Raises on reading:
        OSError, EOFError: damaged or cut off. :func:`errors` has all of them.
    """
    if path.suffix in ENDS and isinstance(file, io.BufferedReader) and not file.peek(1):
        raise EOFError("it is empty")
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_Frames(file), 1 << 20)
    return file


def errors(path: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    found: tuple[type[Exception], ...] = (EOFError,)
    if path.suffix == ".gz":
        import zlib

        found += (zlib.error,)
    if path.suffix == ".zst":
        import zstandard

        found += (zstandard.ZstdError,)
    return found


class _Frames(io.RawIOBase):
    """What the Zstandard frames of a file hold. Unlike the library's own reader, it notices an end
    in the middle of a frame."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file, self._decompressor = file, zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._packed, self._plain = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._file.read(_PACKED)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._plain = memoryview(self._frame.decompress(self._packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count


class Packer:
    """Compresses what is appended to the file ``path``: a member of its own each time.

    Members one after another are one valid file, so that a file can grow by whole members; the same
    pieces give the same bytes.
    """

    def __init__(self, path: Path) -> None:
        self._suffix = path.suffix

    def member(self, file: IO[bytes]) -> IO[bytes]:
        """A file that writes one member into ``file``; closing it ends the member only."""
        if self._suffix == ".gz":
            return gzip.GzipFile("", "wb", 6, _Held(file), mtime=0)  # type: ignore[return-value]
        if self._suffix == ".zst":
            import zstandard

            return zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False)
        return _Held(file)  # type: ignore[return-value]


class _Held:
    """A file that others may write to and not close."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        pass

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
