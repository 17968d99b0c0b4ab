"""Models as each tool wants them, below one folder, made when they are first asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SMOLLM2 = "SmolLM2-135M-Instruct"


class Models:
    """``python`` gives the interpreter of an environment."""

    def __init__(self, work: Path, python: Callable[[str], str]) -> None:
        self._work, self._python = work, python

    def path(self, model: str, kind: str, stored: str) -> Path:
        """The files of ``model`` of a kind and precision.

        Raises:
            RuntimeError: they cannot be made; the message says why.
        """
        if kind == "hf":
            return self._hf(model, stored)
        target = self._work / f"{model.rpartition('/')[2]}-{kind}-{stored}"
        if kind == "gguf":
            target = target.with_name(f"{target.name}.gguf")
        if not target.exists():
            # The most exact there is.
            source = str(self._hf(model, "float32" if model == SMOLLM2 else "bfloat16"))
            part = target.with_name(f".{target.name}")
            environment, module = {
                "ct2": ("ctranslate2", "peers.ct2_model"),
                "gguf": ("llama.cpp", "peers.gguf_model"),
            }[kind]
            command = [self._python(environment), "-m", module, source, str(part)]
            _call([*command, *([] if stored == "float32" else [stored])], HERE.parent)
            part.rename(target)
        return target

    def _hf(self, model: str, stored: str) -> Path:
        if model == SMOLLM2:
            target = self._work / f"{model}-{stored}"
            if not target.exists():
                script = str(ROOT / "examples" / "smollm2.py")
                _call([self._python("models"), script, str(target), "--dtype", stored], ROOT)
            return target
        # Random weights of a preset's shapes, in bfloat16 whatever they are computed in.
        name = model.rpartition("/")[2]
        store, target = self._work / f"{name}-store", self._work / f"{name}-hf"
        ours = [sys.executable, "-m", "flexgen_jax"]
        if not store.exists():
            _call([*ours, "convert", "--dummy", model, str(store), "--dtype", "bfloat16"], ROOT)
        if not target.exists():
            _call([*ours, "export", str(store), str(target)], ROOT)
        return target


def _call(command: list[str], folder: Path) -> None:
    paths = f"{ROOT}{os.pathsep}{HERE.parent}"
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-1:])[:400] or "failed")
