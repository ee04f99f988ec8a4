"""The folders that a run writes to: held for one process, and looked for at each step.

A file that is removed while it is open takes what is written to it without a word. So a run looks at each step whether
its folders are still those that it began with. Where one is gone, the run saves what it can and stops.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from indraquantum.errors import UserError
from indraquantum.files import folder_lock, is_locked, make_folder
from indraquantum.metrics import MetricsLog
from indraquantum.training.checkpoint import remove_leftovers
from indraquantum.training.record import output_of_record


class FolderRemoved(UserError):
    """A folder was removed while the run wrote to it."""


class HeldFolders:
    """The output and the log folder of a run, kept from other runs for as long as `stack` is open.

    Args:
        output: for checkpoints.
        logs: for metrics.
        stack: lets go of them.

    Raises:
        UserError: they can't be written, another run has them, or the logs are of a run with another output folder.
    """

    def __init__(self, output: Path, logs: Path, stack: contextlib.ExitStack) -> None:
        if (other := output_of_record(logs)) and other.resolve() != output.resolve() and other.exists():
            raise UserError(
                "--logs", logs, f"holds the metrics of {other}; give another, or an --output of another name"
            )
        make_folder("--output", output)
        make_folder("--logs", logs)
        stack.enter_context(folder_lock("--output", output))
        if logs.resolve() != output.resolve():
            stack.enter_context(folder_lock("--logs", logs))
        remove_leftovers(output)
        self._output, self._as_held = output, output.stat()

    def check(self, log: MetricsLog) -> None:
        """Check that the output folder, and the file that `log` writes to, are still there.

        Raises:
            FolderRemoved: one is not.
        """
        if not self._is_there():
            raise FolderRemoved("--output", self._output, "was removed or replaced while the run wrote to it")
        if not log.is_there():
            raise FolderRemoved("--logs", log.path, "was removed or replaced while the run wrote to it")

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(self._output.stat(), self._as_held)
        except OSError:
            return False

    def make_again(self, log: MetricsLog) -> list[str]:
        """Put back what was removed, but never over what stands there now.

        Returns:
            What became of the metrics, if they were concerned.

        Raises:
            UserError: it can't be; the output folder is another run's now.
        """
        said = []
        if not log.is_there():
            said.append(f"the metrics are in {log.put_back()}")
        if not self._is_there():
            taken = self._output.exists() and (is_locked(self._output) or any(self._output.glob("checkpoint_v4_*")))
            if taken:
                allowed = "was replaced by another run's folder while the run wrote to it; nothing more was saved"
                raise UserError("--output", self._output, ", ".join([allowed, *said]))
            make_folder("--output", self._output)
        return said
