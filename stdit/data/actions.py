"""The space of the actions that a manifest's rows have."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from stdit.conditions import Actions, ActionSpace


def actions_of_rows(rows: Sequence[Mapping[str, Any]]) -> ActionSpace | None:
    """The space of the actions of all rows; None if no row has any.

    It is their column `action_space` (the fields of `ActionSpace`), or what the actions are: whole numbers below the largest
    of them, or lists of numbers. ValueError if only some rows have actions, or if the rows differ.
    """
    has = [bool(row.get("actions")) for row in rows]
    if not any(has):
        return None
    if not all(has):
        raise ValueError(
            f"row {has.index(False) + 1} of the manifest has no actions, but others do; give them for all, or for none."
        )
    spaces = {_text(row.get("action_space")) for row in rows}
    if len(spaces) > 1:
        raise ValueError(
            f"the rows of the manifest differ in action_space ({' and '.join(sorted(map(str, spaces))[:2])}); give one."
        )
    (text,) = spaces
    if text is not None:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError(
                f"action_space {text[:60]} is no object; give {', '.join(field.name for field in fields(ActionSpace))}."
            )
        space = ActionSpace.of(given, "action_space")
        for number, row in enumerate(rows, 1):
            _check_row(space, _values(row), number)
        return space
    return _found([_values(row) for row in rows])


def _check_row(space: ActionSpace, actions: Sequence[Any], number: int) -> None:
    """Raise ValueError for an action of a row that is none of its space."""
    for action in actions:
        if space.count is not None:
            fits = isinstance(action, int) and 0 <= action < space.count
        else:
            fits = isinstance(action, Sequence) and len(action) == space.width
        if not fits:
            wanted = f"0 to {space.count - 1}" if space.count is not None else f"a list of {space.width} numbers"
            raise ValueError(f"row {number} of the manifest: action {str(action)[:40]} is out of range; use {wanted}.")


def _text(space: Any) -> str | None:
    return space if isinstance(space, str) or space is None else json.dumps(space, sort_keys=True)


def _values(row: Mapping[str, Any]) -> list[Any]:
    return [one for one in Actions.listed(row["actions"]) if one is not None]


def _found(clips: Sequence[Sequence[Any]]) -> ActionSpace:
    flat = [one for clip in clips for one in clip]
    widths = {len(one) if isinstance(one, Sequence) and not isinstance(one, str) else None for one in flat}
    if len(widths) > 1 or not flat:
        raise ValueError(
            "the actions of the manifest are of several kinds, or none; give whole numbers, or lists of one length."
        )
    (width,) = widths
    if width is not None:
        return ActionSpace(width=width)
    if not all(isinstance(one, int) and one >= 0 for one in flat):
        wrong = next(one for one in flat if not isinstance(one, int) or one < 0)
        raise ValueError(
            f"the action {wrong!r} is no whole number from 0; number the actions, or give lists of numbers."
        )
    return ActionSpace(count=max(flat) + 1)
