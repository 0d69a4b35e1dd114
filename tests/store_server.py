"""A store on this machine that speaks S3: objects from a folder, by range and in listings; it can refuse or be silent."""

import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Store(ThreadingHTTPServer):
    """The folders below `root` are its buckets. requests: (method, key, range) of each; status: what it answers, 0: nothing."""

    daemon_threads = True

    def __init__(self, root: Path, handler: type | None = None):
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.root, self.status, self.requests = root, 200, []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def answer(self):
        url = urlsplit(self.path)
        self.server.requests.append((self.command, unquote(url.path), self.headers.get("Range")))
        if self.server.status == 0:
            time.sleep(20)
            return
        if self.server.status != 200:
            return self.say(self.server.status, b"<Error><Code>AccessDenied</Code></Error>")
        self.find(unquote(url.path).strip("/"), parse_qs(url.query))

    def find(self, key, query):
        if "list-type" in query:
            return self.say(200, self.listing(key, query))
        self.give(self.server.root / key)

    def give(self, file):
        """A file, or the part of it that is asked for."""
        if not file.is_file():
            return self.say(404, b"<Error><Code>NoSuchKey</Code></Error>")
        data = file.read_bytes()
        headers = {"ETag": f'"{md5(data).hexdigest()}"', "Last-Modified": formatdate(file.stat().st_mtime, usegmt=True)}
        if (part := self.headers.get("Range")) is None:
            return self.say(200, data, headers)
        begin, end = (int(number) for number in part.removeprefix("bytes=").split("-"))
        end = min(end, len(data) - 1)
        self.say(206, data[begin : end + 1], {**headers, "Content-Range": f"bytes {begin}-{end}/{len(data)}"})

    def listing(self, bucket, query):
        prefix = query.get("prefix", [""])[0]
        folder = self.server.root / bucket / prefix
        below = folder.iterdir() if "delimiter" in query else (file for file in folder.rglob("*") if file.is_file())
        found = sorted(below) if folder.is_dir() else []
        parts = []
        for file in found:
            key = escape(str(file.relative_to(self.server.root / bucket)))
            if file.is_dir():
                parts.append(f"<CommonPrefixes><Prefix>{key}/</Prefix></CommonPrefixes>")
                continue
            data = file.read_bytes()
            parts.append(
                f"<Contents><Key>{key}</Key><Size>{len(data)}</Size><ETag>&quot;{md5(data).hexdigest()}&quot;</ETag>"
                "<LastModified>2026-11-26T00:00:00.000Z</LastModified></Contents>"
            )
        return f"<ListBucketResult><Name>{bucket}</Name>{''.join(parts)}</ListBucketResult>".encode()

    def say(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(root: Path, handler: type | None = None):
    """A store of a folder; handler: of another kind of store than S3."""
    server = Store(root, handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def environment(server: Store) -> dict[str, str]:
    """The variables with which a client of S3 reaches a store."""
    return {
        "AWS_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "here",
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
    }  # fmt: skip
