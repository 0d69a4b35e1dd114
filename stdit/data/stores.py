"""Stores that are named by a URL, such as s3://bucket/clips: what lies there, and parts of its files, through fsspec.

The path of a file there is its URL as a Path, which has one slash after the colon. Object stores are reached by obstore,
whose dependencies conflict with nothing, the others by what fsspec finds installed. A store is only asked for URLs that lie
below one that the user named (`allow`); others are names of files.
"""

import os
import posixpath
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from stdit.data.answers import LateError, first_line, status_in, status_of, timeout, within
from stdit.data.errors import NoAnswerError, StoreError
from stdit.data.object_store import ObjectStore
from stdit.data.packages import package

_URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+):/+(?P<rest>.*)", re.DOTALL)  # one letter is a drive of Windows
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "adl", "http", "https"}
_UNLISTED = ("http://", "https://")
_ATTEMPTS = 3
_ASKED_AT_ONCE = 16
_VERSIONS = ("e_tag", "ETag", "etag", "blob_id", "last_modified", "LastModified", "mtime", "created")
_DENIED = {401: "no credentials that it accepts", 403: "no permission"}
_TO_CHECK = {"hf": "check the name, and log in as one who may read it (hf auth login, or HF_TOKEN)"}
T = TypeVar("T")


class Entry(NamedTuple):
    """A file of a store: its size in bytes, and a text that changes with its content."""

    size: int
    version: str


# The URLs that a user named, in their order.
_allowed: dict[str, None] = {}
# What stores have said of files and folders, by URL: a process asks once, so that an epoch asks for nothing but data.
_entries: dict[str, Entry | None] = {}
_listings: dict[tuple[str, str], dict[str, Entry]] = {}  # by "find" (with all below) or "ls", and URL


def allow(*paths: str | os.PathLike) -> None:
    """Allow the reading of files at and below URLs, which a user named; paths of this machine are nothing to allow."""
    _allowed.update({url_of(path): None for path in paths if is_url(path)})


def allowed() -> list[str]:
    """The URLs at and below which files may be read."""
    return list(_allowed)


def with_urls(text: str) -> str:
    """A text with the URLs that a user named in place of their paths, which have lost a slash."""
    for url in _allowed:
        text = text.replace(str(Path(url)), url)
    return text


def is_url(path: str | os.PathLike) -> bool:
    """Whether a path looks like that of a store."""
    return _URL.match(_with_slashes(path)) is not None


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is that of a store and may be read; any other address is taken for the name of a file of this machine."""
    return bool(_allowed) and is_url(path) and any(f"{url_of(path)}/".startswith(f"{url}/") for url in _allowed)


def url_of(path: str | os.PathLike) -> str:
    """The URL of a path of a store, with its two slashes and without relative parts."""
    found = _URL.match(_with_slashes(path))
    assert found is not None
    root = "/" if found["protocol"] == "file" else ""
    rest = posixpath.normpath(found["rest"]) if found["rest"] else ""
    return f"{found['protocol']}://{root}{rest}"


def _with_slashes(path: str | os.PathLike) -> str:
    return os.fspath(path).replace(os.sep, "/")


def entry_of(path: str | os.PathLike) -> Entry | None:
    """The size and version of a file of a store; None if there is none. StoreError if the store refuses or is silent."""
    url = url_of(path)
    if url not in _entries and (_listed_above(url) is not None or ("ls", url.rpartition("/")[0]) in _listings):
        _entries[url] = None  # where folders may be listed, files that are not there may be answered with 403
    if url not in _entries:
        try:
            info = _ask(url, lambda store: store.info(url))
            _entries[url] = _entry(info) if info.get("type") == "file" else None
        except FileNotFoundError:
            _entries[url] = None
    return _entries[url]


def read_part(path: str | os.PathLike, begin: int, end: int) -> bytes:
    """The bytes of a file of a store from `begin` to `end`."""
    url = url_of(path)
    try:
        data = _ask(url, lambda store: store.cat_file(url, start=begin, end=end, **_how_to_read(store)))
    except FileNotFoundError as error:
        raise StoreError(f"{url} is no longer in its store; put it back, or leave it out.") from error
    if len(data) != end - begin:
        raise StoreError(f"{url} has changed while it was read; start again.")
    return bytes(data)


def _how_to_read(store: Any) -> dict[str, str]:
    """Options for reading a part: a store that opens the file for it would read 5 MB ahead, and forget them."""
    default = package("fsspec", "stores", "URLs of data").AbstractFileSystem.cat_file
    return {"cache_type": "none"} if getattr(store.cat_file, "__func__", None) is default else {}


def files_below(root: str | os.PathLike) -> dict[str, Entry]:
    """All files below a folder of a store, by their names below it."""
    return _listed(url_of(root), "find")


def names_in(folder: str | os.PathLike) -> list[str]:
    """The names of the files in a folder of a store, in order; none if there is no such folder."""
    return list(_listed(url_of(folder), "ls"))


def remember(paths: Sequence[Path]) -> None:
    """Ask for the sizes and versions of files of stores at once: a folder's in one listing, else side by side.

    StoreError if the store refuses or is silent.
    """
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(url_of(path.parent), []).append(url_of(path))
    unlisted = []
    for folder, urls in folders.items():
        if all(url in _entries for url in urls):
            continue
        try:
            found = _listed(folder, "ls")
        except NoAnswerError:
            raise  # which would be silent for every other folder as well
        except StoreError:
            found = {}  # files may be read where folders must not be listed
        if not found:
            unlisted += urls
            continue
        for url in urls:
            _entries[url] = found.get(url.rpartition("/")[2])
    if unlisted:
        entry_of(unlisted[0])  # what refuses all files refuses the first one
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            list(pool.map(entry_of, unlisted))


def forget() -> None:
    """Forget what stores have said, so that they are asked again."""
    _entries.clear()
    _listings.clear()


def _listed(url: str, how: str) -> dict[str, Entry]:
    """The files of a folder (`ls`), or also of those below it (`find`), by name; none if there is no such folder."""
    key = (how, url)
    if key not in _listings:
        if url.startswith(_UNLISTED):
            raise StoreError(
                f"{url}: the folders of a web server cannot be listed; name its files in a manifest (data.manifest)."
            )
        above = _listed_above(url)
        if above is not None:
            below = f"{url}/"[len(above) + 1 :]
            inside = {
                name[len(below) :]: one for name, one in _listings["find", above].items() if name.startswith(below)
            }
            _listings[key] = {name: one for name, one in inside.items() if how == "find" or "/" not in name}
            return _listings[key]
        try:
            _listings[key] = _ask(url, lambda store: _names(store, url, getattr(store, how)(url, detail=True)))
        except (FileNotFoundError, NotADirectoryError):
            _listings[key] = {}
        for name, entry in _listings[key].items():
            _entries[f"{url}/{name}"] = entry
    return _listings[key]


def _listed_above(url: str) -> str | None:
    """The folder of which all files are known, and that a folder or file lies in; None if there is none."""
    return next((above for how, above in _listings if how == "find" and f"{url}/".startswith(f"{above}/")), None)


def _names(store: Any, url: str, found: Any) -> dict[str, Entry]:
    infos: Iterable[dict[str, Any]] = found.values() if isinstance(found, dict) else found
    above = store._strip_protocol(url).rstrip("/") + "/"
    entries = {
        info["name"][len(above) :]: _entry(info)
        for info in infos
        if info.get("type") == "file" and info["name"].startswith(above)
    }
    names = sorted(name for name in entries if name)
    return {name: entries[name] for name in names if entries[name].size or not _is_folder_of(name, names)}


def _is_folder_of(name: str, names: Sequence[str]) -> bool:
    """Whether names, in order, go on from one: some tools mark a folder by an empty object of its name."""
    next_one = bisect_left(names, f"{name}/")
    return next_one < len(names) and names[next_one].startswith(f"{name}/")


def _entry(info: dict[str, Any]) -> Entry:
    version = next((info[name] for name in _VERSIONS if info.get(name) is not None), "")
    return Entry(int(info["size"]), str(version))


@lru_cache(maxsize=16)
def _store(protocol: str) -> Any:
    """The file system of a protocol."""
    if protocol == "hf" and package("huggingface_hub.constants", "stores", "Data at hf:// URLs").HF_HUB_OFFLINE:
        raise StoreError("hf:// URLs cannot be read while HF_HUB_OFFLINE is set; unset it, or copy the data here.")
    if protocol in _OBJECT_STORES:
        return ObjectStore(protocol)
    try:
        return package("fsspec", "stores", "URLs of data").filesystem(protocol)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"{protocol}:// is no store that can be read ({first_line(error)}); install what fsspec needs for it, or copy the data here."
        ) from error


def _ask(url: str, question: Callable[[Any], T]) -> T:
    """The answer of a store, asked again if it failed; FileNotFoundError, or StoreError in one line."""
    if not is_remote(url):
        raise StoreError(f"{url} lies below no URL that was named; set data.root to one.")
    store = _store(url.partition("://")[0])
    reason, late = "", False
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(min(attempt, timeout() / 4))
        try:
            return within(timeout(), lambda: question(store))
        except NotImplementedError:
            raise
        except Exception as error:  # each file system raises its own types
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            # Of what it may not read the hub's client says that it is not there.
            status = status_in(error.__cause__) if missing else status_of(error)
            if status in _DENIED:
                check = _TO_CHECK.get(url.partition("://")[0], "check the credentials, the region and the name")
                raise StoreError(f"{url}: the store answers {status}, {_DENIED[status]}; {check}.") from error
            if missing:
                raise
            if status == 404:
                raise FileNotFoundError(url) from error
            late = isinstance(error, LateError)
            reason = f"no answer within {timeout():g} s" if late else first_line(error) or type(error).__name__
    remedy = ", or give it more time with STDIT_STORE_TIMEOUT=SECONDS" if late else ""
    raise (NoAnswerError if late else StoreError)(
        f"{url}: the store cannot be read ({reason}, {_ATTEMPTS} times); check the network and the address{remedy}."
    )
