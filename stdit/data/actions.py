"""The space of the actions that a manifest's rows have."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from stdit.conditions import Actions, ActionSpace


def known_actions(dataset: object) -> ActionSpace | None:
    """The actions of a dataset's clips; None if it has none, or if what it calls actions is something else.

    A run that needs them asks `dataset.action_space` itself, which raises ValueError with the reason.
    """
    try:
        return getattr(dataset, "action_space", None)
    except ValueError:
        return None


def check_flip(flip: bool, dataset: object) -> None:
    """Raise ValueError for clips with actions that are to be mirrored, after which the actions would be wrong."""
    if flip and known_actions(dataset) is not None:
        raise ValueError("data.flip=true mirrors the clips but not their actions; set data.flip=false.")


def with_numbers(columns: Mapping[str, Any], space: ActionSpace | None) -> Mapping[str, Any]:
    """The columns of a row with the numbers of actions that are given by name or as whole floats."""
    if space is None or space.count is None:
        return columns
    actions = [None if one is None else space.number(one) for one in Actions.listed(columns["actions"])]
    return {**columns, "actions": actions}


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
    values = [_values(row, number) for number, row in enumerate(rows, 1)]
    if text is None:
        return _found(values)
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise ValueError(
            f"action_space {text[:60]} is no object; give {', '.join(field.name for field in fields(ActionSpace))}."
        )
    space = ActionSpace.of(given, "action_space")
    check = Actions(**space.plain)
    for number, actions in enumerate(values, 1):
        for action in {str(one): one for one in actions}.values():
            try:
                check.number(action)
            except ValueError as error:
                raise ValueError(f"row {number} of the manifest: {error}") from error
    return space


def _text(space: Any) -> str | None:
    return space if isinstance(space, str) or space is None else json.dumps(space, sort_keys=True)


def _values(row: Mapping[str, Any], number: int) -> list[Any]:
    """The actions of a row, without those that are missing."""
    try:
        return [one for one in Actions.listed(row["actions"]) if one is not None]
    except ValueError as error:
        raise ValueError(f"row {number} of the manifest: {error}") from error


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
