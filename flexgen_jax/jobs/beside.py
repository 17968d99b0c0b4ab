"""What lies beside an output: which files, and whether a job put them there.

A journal begins with :data:`MARK`; what is found under the same name without it is somebody else's
and is never removed. Knows nothing of what a journal says.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from flexgen_jax.jobs.job_input import JobError

MARK = "flexgen_jax_job"  # the first key of a journal
_BEGIN = f'{{"{MARK}": '.encode()


class Beside:
    """The files of the job with the output ``output``.

    Attributes:
        output: With its links followed: a link stays one.
        partial: The journal. ``new``: the next one, until it takes that name.
        ordered: What will be the output.
        snapshots: The directory of a running block's state.
        finished: What job the output is the result of, when it is done.

    Raises:
        JobError: the output's links lead in a circle.
    """

    def __init__(self, output: Path) -> None:
        try:
            self.output = output.resolve()
            circle: Exception | None = None
        except (RuntimeError, OSError) as error:  # the former up to Python 3.12
            circle = error
        if circle is not None or self.output.is_symlink():  # which is all that 3.13 leaves of one
            raise JobError(
                f"cannot write {output}: its symbolic links lead in a circle"
            ) from circle
        ends = (".partial", ".partial.new", ".ordered", ".checkpoint", ".job")
        self.partial, self.new, self.ordered, self.snapshots, self.finished = (
            self.output.with_name(self.output.name + end) for end in ends
        )

    def check_input(self, source: Path) -> None:
        """Refuses an input that the job itself would write to, or remove.

        Raises:
            JobError: it is the output, or one of the files beside it.
        """
        if same_file(source, self.output):
            raise JobError(f"input and output are the same file, {source}")
        for path in (self.partial, self.new, self.ordered, self.finished):
            if same_file(source, path):
                raise JobError(
                    f"the input {source} is where a job keeps its progress towards the output "
                    f"{self.output.name}; give another output, or move the input away"
                )

    def check_files(self) -> None:
        """Refuses what no job has put where this one would have its files; to be locked before.

        Raises:
            JobError: a directory, a link, a pipe or the like; or a file that no job has written.
        """
        for path in (self.partial, self.new, self.ordered, self.finished):
            check_regular(path)
        for path in (self.new, self.finished):
            if path.exists() and not _begun(path):
                raise in_the_way(path, "no job has written it")

    def has_journal(self) -> bool:
        """Whether a job has written what is called like its journal."""
        try:
            with self.partial.open("rb") as file:
                return file.read(len(_BEGIN)) == _BEGIN
        except FileNotFoundError:
            return False
        except OSError as error:
            raise JobError(f"cannot read {self.partial}: {error.strerror}") from error

    def keep_aside(self) -> Path:
        """Renames a file that only is called like a journal; returns its new name."""
        aside, number = self.partial.with_name(f"{self.partial.name}.old"), 1
        while os.path.lexists(aside):
            number += 1
            aside = self.partial.with_name(f"{self.partial.name}.old{number}")
        self.partial.rename(aside)
        return aside


def check_regular(path: Path) -> None:
    """Refuses whatever is there and is no regular file: opening it may wait for ever.

    Raises:
        JobError: what it is not.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise in_the_way(path, "it is not a regular file")


def in_the_way(path: Path, why: str) -> JobError:
    """What to say of ``path``."""
    return JobError(f"{path} is in the way: {why}; move it away, or give another output")


def _begun(path: Path) -> bool:
    """Whether it may be the beginning of a journal: a power cut leaves nothing, or zeros."""
    with path.open("rb") as file:
        first = file.read(len(_BEGIN))
    return _BEGIN.startswith(first) or not first.strip(b"\0")


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths, of files that need not exist, are one file."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return os.path.abspath(one) == os.path.abspath(other)
