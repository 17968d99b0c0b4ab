"""Says what ended a process that JAX's runtime ends without a word to Python.

The runtime aborts a process that cannot join, and all others when the coordinator is lost. Each of
them has this file run beside it, as a small process of its own, and tells it, line by line, what is
to be said should its standard input end: ``- SENTENCE``, or ``HOST:PORT SENTENCE`` to say it only
if nothing answers there, or ``-`` for nothing.
"""

from __future__ import annotations

import socket
import subprocess
import sys

_SECONDS = 2.0


class Sentry:
    """The process that is told; one for the life of this one."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the process it watches
            text=True,
        )

    def expect(self, sentence: str = "", *, unless: str = "-") -> None:
        """If this process ends now, ``sentence`` is why, unless somebody answers at an address."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{unless} {' '.join(sentence.split())}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """Ends it; nothing is to be said."""
        self.expect()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def answers(address: str) -> bool:
    """Whether anybody listens at ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
    except OSError:
        return False
    return True


def main() -> None:
    """Waits for the end of the standard input."""
    last = ""
    for line in sys.stdin:
        last = line
    unless, _, sentence = last.strip().partition(" ")
    if sentence and (unless == "-" or not answers(unless)):
        print(f"Error: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
