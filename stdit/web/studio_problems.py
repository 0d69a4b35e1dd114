"""What stands in the way of a task on the page: one line each, and changes that remove it, each a button."""

from typing import Any, NamedTuple

from stdit.files import printable


class Fix(NamedTuple):
    """A button. label: what it says. change: of the page's settings, by name."""

    label: str
    change: dict[str, Any]


class Problem(NamedTuple):
    """One line, and its buttons. stops: whether nothing can be generated before it is removed."""

    message: str
    fixes: tuple[Fix, ...] = ()
    stops: bool = True

    def as_json(self) -> dict[str, Any]:
        """As the page gets it."""
        fixes = [{"label": fix.label, "change": fix.change} for fix in self.fixes]
        return {"message": printable(self.message), "fixes": fixes, "stops": self.stops}


def said_of(error: Exception) -> str:
    """An error of a file or of the system in one line."""
    text = str(error)
    if isinstance(error, OSError) and text.startswith("[Errno"):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}; check the path, and the room on its disk."
    return " ".join(text.split())[:300]


class Refused(ValueError):
    """A request that cannot be done: its message in one line, and buttons that change it."""

    def __init__(self, message: str, *fixes: Fix):
        super().__init__(message)
        self.problem = Problem(message, fixes)
