"""Stores that are named by a URL, such as s3://bucket/clips: what lies there, and parts of its files, through fsspec.

The path of a file there is its URL as a Path, which has one slash after the colon. Object stores are reached by obstore,
whose dependencies conflict with nothing, the others by what fsspec finds installed. A store is only asked for URLs that lie
below one that the user named (`allow`); others are names of files.
"""

import atexit
import os
import posixpath
import re
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from stdit.data.errors import NoAnswerError, StoreError
from stdit.data.packages import package

_URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+):/+(?P<rest>.*)", re.DOTALL)  # one letter is a drive of Windows
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "adl", "http", "https"}
_UNLISTED = ("http://", "https://")
_ATTEMPTS = 3
_ASKED_AT_ONCE = 16
# As clients write what a store answers; other numbers may be part of a file's name.
_STATUS = re.compile(r"\bstatus(?: code)?:? (40[134])\b|(?:^|: )(40[134])\b")
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


def timeout() -> float:
    """The seconds in which a store must answer: $STDIT_STORE_TIMEOUT, or 30."""
    given = os.environ.get("STDIT_STORE_TIMEOUT", "30")
    try:
        seconds = float(given)
        if seconds > 0:
            return seconds
    except ValueError:
        pass
    raise ValueError(f"STDIT_STORE_TIMEOUT={given!r} is no number of seconds; set one above 0, or unset it.")


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
        return _ObjectStore(protocol)
    try:
        return package("fsspec", "stores", "URLs of data").filesystem(protocol)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"{protocol}:// is no store that can be read ({_first_line(error)}); install what fsspec needs for it, or copy the data here."
        ) from error


class _ObjectStore:
    """What is asked of fsspec's file systems, by the calls of obstore that wait.

    obstore's own file system awaits its answers. A thread of Rust then hands them to Python, and aborts the process if that
    ends before the thread is done.
    """

    def __init__(self, protocol: str):
        self.protocol = protocol
        self.obstore = package("obstore", "stores", f"Data at {protocol}:// URLs")
        self.connect = package("obstore.store", "stores", f"Data at {protocol}:// URLs").from_url
        self.options: dict[str, Any] = {"timeout": f"{timeout():g}s", "connect_timeout": f"{timeout():g}s"}
        # Options that are given take the place of all that the environment gives.
        if protocol == "http" or os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"):
            self.options["allow_http"] = True
        self.buckets: dict[str, Any] = {}

    def _strip_protocol(self, url: str) -> str:
        return url.partition("://")[2]

    def _split(self, path: str) -> tuple[str, Any, str]:
        """The name of the bucket of a URL or of a path without a protocol, the bucket, and the path in it."""
        name, _, key = self._strip_protocol(path).partition("/") if "://" in path else path.partition("/")
        if name not in self.buckets:
            retries = {"max_retries": 0}  # we ask again, and say so
            scheme = "gs" if self.protocol == "gcs" else self.protocol
            self.buckets[name] = self.connect(f"{scheme}://{name}", client_options=self.options, retry_config=retries)
        return name, self.buckets[name], key

    def info(self, url: str) -> dict[str, Any]:
        _, bucket, key = self._split(url)
        if not key:
            raise FileNotFoundError(f"{url} is a whole bucket, not a file")
        return {**self.obstore.head(bucket, key), "type": "file"}

    def cat_file(self, url: str, start: int, end: int) -> Any:
        _, bucket, key = self._split(url)
        return self.obstore.get_range(bucket, key, start=start, end=end)

    def ls(self, url: str, detail: bool = True) -> list[dict[str, Any]]:
        """The files of a folder."""
        name, bucket, key = self._split(url)
        objects = self.obstore.list_with_delimiter(bucket, key)["objects"]
        return [{**one, "name": f"{name}/{one['path']}", "type": "file"} for one in objects]

    def find(self, url: str, detail: bool = True) -> list[dict[str, Any]]:
        """The files of a folder and of those below it."""
        name, bucket, key = self._split(url)
        found = []
        for some in self.obstore.list(bucket, key):  # a thousand at a time
            _answered_in_part()
            found += [{**one, "name": f"{name}/{one['path']}", "type": "file"} for one in some]
        return found


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
            return _within(timeout(), lambda: question(store))
        except NotImplementedError:
            raise
        except Exception as error:  # each file system raises its own types
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            # Of what it may not read the hub's client says that it is not there.
            status = _answered(error.__cause__) if missing else _status(error)
            if status in _DENIED:
                check = _TO_CHECK.get(url.partition("://")[0], "check the credentials, the region and the name")
                raise StoreError(f"{url}: the store answers {status}, {_DENIED[status]}; {check}.") from error
            if missing:
                raise
            if status == 404:
                raise FileNotFoundError(url) from error
            late = isinstance(error, _LateError)
            reason = f"no answer within {timeout():g} s" if late else _first_line(error) or type(error).__name__
    remedy = ", or give it more time with STDIT_STORE_TIMEOUT=SECONDS" if late else ""
    raise (NoAnswerError if late else StoreError)(
        f"{url}: the store cannot be read ({reason}, {_ATTEMPTS} times); check the network and the address{remedy}."
    )


def _answered(error: BaseException | None) -> int | None:
    """The HTTP status that an error of a client keeps as a number."""
    values = (getattr(error, "status", None), getattr(getattr(error, "response", None), "status_code", None))
    return next((value for value in values if isinstance(value, int)), None)


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error, None if it has none."""
    if (status := _answered(error)) is not None:
        return status
    name = type(error).__name__
    if isinstance(error, PermissionError) or "Permission" in name or "Forbidden" in name:
        return 403
    if "Unauthenticated" in name or "Unauthorized" in name or "NoCredentials" in name:
        return 401
    found = _STATUS.search(str(error))
    return int(found[1] or found[2]) if found else None


def _first_line(error: BaseException) -> str:
    """The reason in an error of a client: the status that a store answers, else its first line."""
    text = " ".join(str(error).split("\n")[0].split())
    if answered := re.search(r"\bstatus(?: code)?:? (\d{3}(?: [A-Za-z][A-Za-z' -]*)?)", text):
        return f"it answers {answered[1].strip()}"
    text = re.split(r" in [0-9.]+(?:ns|µs|ms|s) - ", text)[-1]  # after the request and its time
    return text if len(text) <= 160 else f"...{text[-160:]}"  # causes come last


class _LateError(TimeoutError):
    """A store has not answered in time."""


class _Asking(threading.Thread):
    """A thread that asks a store. answered: when the store answered last, in part."""

    answered = 0.0


def _answered_in_part() -> None:
    """Note that a store has answered in part, so that the rest gets the same time again."""
    thread = threading.current_thread()
    if isinstance(thread, _Asking):
        thread.answered = time.monotonic()


# Threads that ask a store. One that is in a library's own code aborts a process that ends before it comes back.
_asking: set[threading.Thread] = set()
_ends = threading.Event()
_AT_EXIT = 2.0  # seconds that the end of a process waits for them


@atexit.register
def _await_answers() -> None:
    _ends.set()
    until = time.monotonic() + _AT_EXIT
    while _asking and time.monotonic() < until:
        time.sleep(0.01)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; _LateError if it takes longer, whatever a library does to wait for ever.

    A call that is answered in parts may take that long for each.
    """
    done: list[Any] = []

    def run() -> None:
        try:
            done.append((True, call()))
        except BaseException as error:
            done.append((False, error))
        finally:
            _asking.discard(threading.current_thread())

    if _ends.is_set():
        raise TimeoutError("the program ends")
    thread = _Asking(target=run, daemon=True)  # a process ends although it waits
    thread.answered = time.monotonic()
    _asking.add(thread)
    thread.start()
    while thread.is_alive() and (left := thread.answered + seconds + 1 - time.monotonic()) > 0:
        thread.join(left)  # libraries that keep the time themselves say more
    if not done:
        raise _LateError
    good, value = done[0]
    if good:
        return value
    if time.monotonic() - thread.answered >= seconds:
        raise _LateError from value
    raise value
