"""What is said when a mapped file turns out to be shorter, or unreadable, while it is read.

The system then sends SIGBUS to the thread that reads, which may be one of XLA's: there is no error
to be caught, and the process ends without a word. So a handler names the file, and ends it. Nothing
is lost by that: what is finished is on disk.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from flexgen_jax import logs

_ADDRESS = 16  # of the fault, in bytes from the beginning of Linux' siginfo_t
_SA_SIGINFO = 4
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """``struct sigaction`` of the C libraries of 64-bit Linux."""

    _fields_ = [  # as ctypes wants it
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


_first = threading.Lock()
_kept: list[Callable[..., Any]] = []  # what C calls must not be freed


def name_the_file() -> None:
    """From now on, until the process ends; nothing where others handle the signal, or on macOS."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return
    sigaction = ctypes.CDLL(None, use_errno=True).sigaction
    before = _Action()
    if sigaction(signal.SIGBUS, None, ctypes.byref(before)) or before.handler:
        return
    handler = _Handler(_told)
    _kept.append(handler)
    action = _Action(ctypes.cast(handler, ctypes.c_void_p), flags=_SA_SIGINFO)
    sigaction(signal.SIGBUS, ctypes.byref(action), None)


def _told(number: int, info: int, context: int) -> NoReturn:
    while not _first.acquire(blocking=False):
        time.sleep(1)  # another thread says it, and ends this one
    try:
        address = ctypes.c_void_p.from_address(info + _ADDRESS).value or 0
        path = _mapped_at(address) or "a file that is mapped into memory"
        text = (
            f"cannot read {path}: it became shorter while it was in use, or its disk failed. What "
            "is finished is kept; put the file right and run the same command again"
        )
        if logs.in_json():
            line = json.dumps({"level": "error", "logger": "flexgen_jax", "message": text})
        else:
            line = f"Error: {text}"
        os.write(2, line.encode() + b"\n")
    finally:
        os._exit(1)


def _mapped_at(address: int) -> str | None:
    """The file at an address of this process."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            fields = line.rstrip("\n").split(None, 5)
            begin, end = (int(part, 16) for part in fields[0].split("-"))
            if begin <= address < end:
                return fields[5] if len(fields) == 6 else None
    return None
