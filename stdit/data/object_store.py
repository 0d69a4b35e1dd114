"""Object stores (S3, Google, Azure, web servers), which are asked as fsspec's file systems are."""

import os
from typing import Any

from stdit.data.answers import answered_in_part, timeout
from stdit.data.packages import package


class ObjectStore:
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
        """The size and version of a file."""
        _, bucket, key = self._split(url)
        if not key:
            raise FileNotFoundError(f"{url} is a whole bucket, not a file")
        return {**self.obstore.head(bucket, key), "type": "file"}

    def cat_file(self, url: str, start: int, end: int) -> Any:
        """The bytes of a file from `start` to `end`."""
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
            answered_in_part()
            found += [{**one, "name": f"{name}/{one['path']}", "type": "file"} for one in some]
        return found
