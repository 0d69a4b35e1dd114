"""Progress of long loops: a bar on a terminal, and in a log a line now and then."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between two lines of a log
_LINE = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_LINE_WITHOUT_TOTAL = "{desc} {n_fmt} [{elapsed}, {rate_fmt}{postfix}]"


def _is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


class Progress(tqdm):
    """tqdm's bar where stderr is a terminal. Elsewhere whole lines, `SECONDS` apart, and one at the end of a loop that is left."""

    disable: bool

    def __init__(self, *args: Any, **kwargs: Any):
        stream = kwargs.setdefault("file", sys.stderr)
        self.in_lines = not _is_terminal(stream)
        if self.in_lines:
            total = kwargs.get("total", args[2] if len(args) > 2 else None)
            has_total = total is not None or hasattr(args[0] if args else kwargs.get("iterable"), "__len__")
            kwargs |= {
                "mininterval": SECONDS, "miniters": 1, "delay": SECONDS, "dynamic_ncols": False, "ncols": None,
                "bar_format": _LINE if has_total else _LINE_WITHOUT_TOTAL,
            }  # fmt: skip
        super().__init__(*args, **kwargs)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What writes the bar: over the last one on a terminal, else as a line."""
        if _is_terminal(file):
            return tqdm.status_printer(file)

        def write_line(text: str) -> None:
            if text.strip():
                file.write(f"{text.strip()}\n")
                file.flush()

        return write_line

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """Write a text above the bar; in a log it is one more line."""
        if _is_terminal(sys.stderr):
            super().write(s, file=file, end=end, nolock=nolock)
        else:
            print(s, file=file or sys.stdout, end=end, flush=True)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Set what stands behind the bar; a log shows it in its next line."""
        super().set_postfix_str(s, refresh=refresh and not self.in_lines)

    def close(self) -> None:
        """End the bar, or write the last line."""
        if not self.in_lines or self.disable:
            super().close()
            return
        if self.leave and self.n > self.initial and self.last_print_n != self.n:
            self.display(pos=0)
        self.disable = True
        self._decr_instances(self)
