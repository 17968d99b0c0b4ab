"""The command line, in a process that kills itself where it is told, however fast the machine is.

Called as ``killing.py MODULE FUNCTION NUMBER ARGUMENTS...``: instead of the so-many-th call of that
function comes SIGKILL.
"""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def killed(module, function, number, arguments):
    """Runs the command line with ``arguments`` until it is killed at that call."""
    command = [sys.executable, __file__, module, function, str(number), *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL


def _main():
    from flexgen_jax.cli.app import main

    module, name, number = sys.argv[1:4]
    owner, calls = importlib.import_module(module), 0
    function = getattr(owner, name)

    def counting(*given, **options):
        nonlocal calls
        calls += 1
        if calls == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **options)

    setattr(owner, name, counting)
    main(sys.argv[4:])


if __name__ == "__main__":
    _main()
