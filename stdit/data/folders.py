"""Folders and files, of this machine or of a store, looked at in the same way."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from stdit.data import stores
from stdit.data.stores import is_remote


def is_file(path: Path) -> bool:
    """Whether there is a file of a path."""
    return stores.entry_of(path) is not None if is_remote(path) else os.path.isfile(path)


def is_folder(path: Path) -> bool:
    """Whether there is a folder of a path, or of a store with anything in it."""
    return bool(stores.files_below(path)) if is_remote(path) else os.path.isdir(path)


def names_in(folder: Path) -> list[str]:
    """The names in a folder, in order (of a store: those of its files); none if there is no such folder."""
    if is_remote(folder):
        return stores.names_in(folder)
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def resolved(path: Path) -> Path:
    """A path without links and relative parts."""
    return Path(os.path.normpath(path)) if is_remote(path) else path.resolve()


def absolute(path: Path) -> Path:
    """A path that is the same wherever a process runs."""
    return path if is_remote(path) else path.absolute()


def named_from(path: Path, folder: Path) -> str:
    """The name of a file in a list that lies in a folder: relative to it, with slashes, or the URL of a store."""
    return stores.url_of(path) if is_remote(path) else Path(os.path.relpath(path, folder)).as_posix()


def walk(root: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk: the folders at and below a root, each with the names of its folders and files."""
    if not is_remote(root):
        yield from os.walk(root, onerror=onerror)  # follows no links: they may form a loop
        return
    tree: dict[str, tuple[set[str], list[str]]] = {"": (set(), [])}
    for name in stores.files_below(root):
        above, folder = "", ""
        for part in name.split("/")[:-1]:
            folder = f"{above}/{part}".lstrip("/")
            tree[above][0].add(part)
            tree.setdefault(folder, (set(), []))
            above = folder
        tree[above][1].append(name.rpartition("/")[2])
    todo = [""]
    while todo:
        folder = todo.pop()
        folders, files = sorted(tree[folder][0]), tree[folder][1]
        yield str(root / folder), folders, files
        todo += [f"{folder}/{name}".lstrip("/") for name in reversed(folders)]  # those that are left of them
