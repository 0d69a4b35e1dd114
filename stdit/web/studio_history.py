"""The versions that the studio made: a line of JSON for each request in `history.jsonl`, so that any can be taken up again."""

import json
import time
from pathlib import Path
from typing import Any

from stdit.web.studio_jobs import Job

_READ = 4 << 20  # bytes of the end of the file that are read
_LISTED = 200  # versions


class History:
    """Versions in a folder, newest first. Files that are gone are left out."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "history.jsonl"

    def add(self, job: Job, names: list[str], *, facts: dict[str, Any]) -> None:
        """Append the versions of a job. facts: size, rate and notes of its clips."""
        line = {
            "time": time.time(),
            "job": job.id,
            "request": job.request,
            "commands": job.commands,
            "files": names,
            **facts,
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def versions(self) -> list[dict[str, Any]]:
        """The versions of which the file is there, newest first. number: counts all that were made."""
        found: list[dict[str, Any]] = []
        number = 0
        for record in self._records():
            for name in record["files"]:
                number += 1
                if not isinstance(name, str) or not (self.folder / name).is_file() or ".." in name:
                    continue
                version = {key: value for key, value in record.items() if key != "files"}
                found.append({**version, "name": name, "number": number})
        return found[::-1][:_LISTED]

    def made_by(self, commands: list[list[str]]) -> dict[str, Any] | None:
        """The version that these commands have made; None if there is none."""
        return next((version for version in self.versions() if version.get("commands") == commands), None)

    def _records(self) -> list[dict[str, Any]]:
        """The requests in the file; damaged lines are left out."""
        try:
            with open(self.path, "rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - _READ))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if (
                isinstance(record, dict)
                and isinstance(record.get("files"), list)
                and isinstance(record.get("request"), dict)
            ):
                found.append(record)
        return found
