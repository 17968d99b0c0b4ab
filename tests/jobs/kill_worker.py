"""Runs the command line in processes of its own, which kill themselves: forked after the imports,
which take most of a start, and before JAX has threads.

Reads a JSON line a run, ``{"arguments": [...], "kill_at": number or null}``; answers with what
``waitpid`` says and, of a run that came to its end, how many moments it had. A moment is before or
after a call by which a job keeps something, or tokens are booked: the process is killed at the one
of that number, wherever the machine's speed has brought its other threads by then.
"""

import contextlib
import functools
import itertools
import json
import os
import signal
import sys

# Imported where they are wanted first, which a process that is forked would do again each time.
import flexgen_jax.llm  # noqa: F401
from flexgen_jax.cli.app import main
from flexgen_jax.engine.effects import BlockEffects
from flexgen_jax.jobs.results import FileResults

CALLS = [
    *((os, name) for name in ("fsync", "replace", "unlink")),
    *((FileResults, name) for name in ("begin", "begin_window", "add_part", "end_window")),
    (FileResults, "finish"),
    (BlockEffects, "_book"),
]


def child(arguments: list[str], kill_at: int | None, moments: int) -> None:
    numbers = itertools.count(1)  # drawn by one thread at a time, and by no two the same

    def moment():
        if next(numbers) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def noticed(call):
        @functools.wraps(call)
        def noticing(*given, **options):
            moment()
            result = call(*given, **options)
            moment()
            return result

        return noticing

    for owner, name in CALLS:
        setattr(owner, name, noticed(getattr(owner, name)))
    with open("stderr", "a") as log:
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
        code = 1
        with contextlib.suppress(BaseException):
            try:
                main(arguments)
            except SystemExit as error:
                code = error.code
            sys.stderr.flush()
        os.write(moments, str(next(numbers) - 1).encode())
        os._exit(code)


for line in sys.stdin:
    asked = json.loads(line)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(asked["arguments"], asked["kill_at"], writing)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reading) as pipe:
        moments = int(pipe.read() or 0)
    code = os.waitstatus_to_exitcode(status)
    print(json.dumps({"code": code, "moments": moments}), flush=True)
