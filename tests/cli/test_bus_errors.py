"""A mapped file that becomes shorter under a computation: the process ends with its name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import mmap, os, sys, threading
import numpy as np
from flexgen_jax import logs
from flexgen_jax.cli import bus_errors

path, where, form = sys.argv[1:]
if form == "json":
    logs.set_up("info", "json")
bus_errors.name_the_file()
bus_errors.name_the_file()
with open(path, "wb") as file:
    file.write(bytes(64 * 4096))
with open(path, "rb") as file:
    region = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
view = np.frombuffer(region, np.float32).reshape(256, 256)
os.truncate(path, 4096)
if where == "here":
    view.sum()
elif where == "in a thread":
    thread = threading.Thread(target=view.sum)
    thread.start()
    thread.join()
else:
    import jax
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.device_put(view)))
print("not reached")
"""


@pytest.mark.parametrize(
    ("where", "form"),
    [("here", "text"), ("in a thread", "text"), ("in XLA", "text"), ("here", "json")],
)
def test_the_file_is_named_in_one_line(tmp_path, where, form):
    path = tmp_path / "a file"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path, where, form],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    said = done.stderr.removeprefix("Error: ")
    if form == "json":
        said = json.loads(done.stderr)["message"]
    assert said.startswith(f"cannot read {path}: it became shorter while it was in use")


def test_who_handles_the_signal_already_keeps_it():
    program = (
        "import faulthandler, os, signal\n"
        "from flexgen_jax.cli import bus_errors\n"
        "faulthandler.enable(); bus_errors.name_the_file(); os.kill(os.getpid(), signal.SIGBUS)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Fatal Python error: Bus error" in done.stderr
