"""A hub on this machine: data sets OWNER/NAME that are folders, listed and read by range as huggingface_hub asks for them.

An owner that is a number stands for data sets for which the hub answers with that status.
"""

import json
from hashlib import sha1

from store_server import Handler, Store


class Hub(Handler):
    """Answers below /api/datasets and /datasets, of one revision, `main`."""

    def find(self, key, query):
        parts = key.removeprefix("api/").split("/")
        if parts[0] != "datasets" or len(parts) < 3:
            return self.say(404, b"{}")
        owner, name, *rest = parts[1:]
        folder = self.server.root / owner / name
        if owner.isdigit() or not folder.is_dir():
            # Of a data set that is private, and one that is not there, the hub says the same.
            code = "GatedRepo" if owner == "403" else "RepoNotFound"
            return self.say(int(owner) if owner.isdigit() else 404, b"{}", {"X-Error-Code": code})
        if rest[:2] == ["resolve", "main"]:
            return self.give(folder.joinpath(*rest[2:]))
        if rest[:2] == ["tree", "main"]:
            inside = folder.joinpath(*rest[2:])
            if not inside.is_dir():
                return self.say(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            below = inside.rglob("*") if query["recursive"] == ["true"] else inside.iterdir()
            return self.json([self.entry(file, folder) for file in sorted(below)])
        self.json({"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": []})

    def entry(self, file, folder):
        size = 0 if file.is_dir() else file.stat().st_size
        oid = sha1(b"" if file.is_dir() else file.read_bytes()).hexdigest()
        kind = "directory" if file.is_dir() else "file"
        return {"type": kind, "path": file.relative_to(folder).as_posix(), "size": size, "oid": oid}

    def json(self, value):
        self.say(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def environment(server: Store) -> dict[str, str]:
    """The variables with which huggingface_hub reaches a hub; it reads them when it is imported."""
    return {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
