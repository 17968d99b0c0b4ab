"""Runs the command line in processes of its own and kills them: forked after the imports, which
take most of a start, and before JAX has threads.

Reads a JSON line a run, ``{"arguments": [...], "kill_after": seconds or null}``; answers with what
``waitpid`` says and the seconds that it took.
"""

import contextlib
import json
import os
import signal
import sys
import time

from flexgen_jax.cli.app import main


def child(arguments: list[str]) -> None:
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
        os._exit(code)


for line in sys.stdin:
    asked = json.loads(line)
    started = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        child(asked["arguments"])
    if asked["kill_after"] is not None:
        time.sleep(asked["kill_after"])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    print(json.dumps({"code": code, "seconds": time.perf_counter() - started}), flush=True)
