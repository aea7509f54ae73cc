"""Progress bars for a build, as a listener: one bar per stage, with cells, bytes and the time left."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from annbatch_dask.events import Callback
from annbatch_dask.formatting import format_bytes

if TYPE_CHECKING:
    from annbatch_dask.events import BuildEnd, BuildStart, StageEnd, StageStart, TaskEnd

__all__ = ["ProgressBars", "default_callbacks"]


class ProgressBars(Callback):
    """Shows the engine and the dashboard's link, then one bar per stage, on standard error.

    A stage that knows its rows counts cells, any other counts tasks.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._n_bytes = 0
        self._n_bytes_total = 0
        self._counts_rows = False

    def on_build_start(self, event: BuildStart) -> None:
        """Say where the build runs and where to watch it."""
        text = f"{event.target}: building on {event.engine}"
        if event.dashboard:
            text += f", dashboard {event.dashboard}"
        _tqdm().write(text, file=sys.stderr)

    def on_stage_start(self, event: StageStart) -> None:
        """Open the stage's bar."""
        self._close()
        self._counts_rows = event.n_rows > 0
        self._n_bytes, self._n_bytes_total = 0, event.n_bytes
        self._bar = _tqdm()(
            desc=f"{event.stage:<8}",
            total=event.n_rows if self._counts_rows else event.n_tasks,
            unit=" cells" if self._counts_rows else " tasks",
            unit_scale=self._counts_rows,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def on_task_end(self, event: TaskEnd) -> None:
        """Advance the bar."""
        if self._bar is None:
            return
        self._n_bytes += event.n_bytes
        self._bar.set_postfix_str(self._bytes_text(), refresh=False)
        self._bar.update(event.n_rows if self._counts_rows else 1)

    def on_stage_end(self, event: StageEnd) -> None:
        """Close the stage's bar."""
        self._close()

    def on_build_end(self, event: BuildEnd) -> None:
        """Close whatever bar a failure left open."""
        self._close()

    def _bytes_text(self) -> str:
        if not self._n_bytes:
            return ""
        done = format_bytes(self._n_bytes)
        return f"{done} of {format_bytes(self._n_bytes_total)}" if self._n_bytes_total else done

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def default_callbacks(*, progress: bool | None) -> list[Callback]:
    """Return the listeners a build has when the caller names none.

    Parameters
    ----------
    progress
        True or False to force the bars on or off; None shows them on a terminal and in a notebook.
    """
    wanted = (_is_terminal() or _in_notebook()) if progress is None else progress
    return [ProgressBars()] if wanted else []


def _tqdm() -> Any:
    with warnings.catch_warnings():
        # A notebook without ipywidgets gets the text bar: not worth a warning in the middle of a build.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # a daemon may have none


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")
