"""What a caller gives to be called back: its errors are its own, not those of an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

C = TypeVar("C", bound=Callable[..., Any])


class Callbacks:
    """Keeps the first error that one of them raises, for the caller to see."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def noted(self, function: C | None) -> C | None:
        """``function``, whose error is kept."""
        if function is None:
            return None

        def call(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except BaseException as error:
                self._error = self._error or error
                raise

        return call  # type: ignore[return-value] # called alike

    @property
    def failed(self) -> bool:
        """Whether there is one."""
        return self._error is not None

    def raise_noted(self) -> None:
        """Raises it, in place of the failure of the operation in which it came; if there is one."""
        if self._error is not None:
            try:
                raise self._error from None
            finally:
                self._error = None  # or its traceback would hold itself, and all that ran
