"""The versions that the studio made: a line of JSON for each request in `history.jsonl`, so that any can be taken up again."""

import json
import time
from pathlib import Path
from typing import Any

from stdit.web.studio_jobs import Job
from stdit.web.studio_problems import Refused
from stdit.web.studio_request import Request

_READ = 4 << 20  # bytes of the end of the file that are read
_LISTED = 200  # versions
_KINDS = {"files": list, "commands": list, "number": int, "time": float, "frames": int, "height": int, "width": int}


def made_with(version: dict[str, Any], written: int) -> bool:
    """Whether a version is of the model that was written then (microseconds), and not of what it was before."""
    recorded = version.get("model_written")  # which older lines do not have
    return version["time"] * 1e6 >= written if recorded is None else recorded == written


class History:
    """Versions in a folder, newest first. Files that are gone are left out."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "history.jsonl"

    def add(self, job: Job, names: list[str], *, facts: dict[str, Any]) -> None:
        """Append the versions of a job. facts: size, rate and notes of its clips, and when the model was written."""
        last = max((record["number"] + len(record["files"]) - 1 for record in self._records()), default=0)
        before = "" if self._whole() else "\n"  # a last line that is damaged is lost alone
        made = {"job": job.id, "request": job.request, "commands": job.commands, "files": names, "number": last + 1}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(before + json.dumps({"time": time.time(), **made, **facts}) + "\n")

    def versions(self) -> list[dict[str, Any]]:
        """The last versions of which the file is there, newest first. number: counts all that were made."""
        return self._there()[:_LISTED]

    def made_by(self, commands: list[list[str]]) -> dict[str, Any] | None:
        """The version that these commands have made; None if there is none."""
        return next((version for version in self._there() if version["commands"] == commands), None)

    def _there(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for record in self._records():
            for number, name in enumerate(record["files"], record["number"]):
                if not isinstance(name, str) or not (self.folder / name).is_file() or ".." in name:
                    continue
                version = {key: value for key, value in record.items() if key != "files"}
                found.append({**version, "name": name, "number": number})
        return found[::-1]

    def _whole(self) -> bool:
        """Whether the file ends with a line that was written to its end."""
        try:
            with open(self.path, "rb") as file:
                file.seek(-1, 2)
                return file.read() == b"\n"
        except OSError:  # there is none, or it is empty
            return True

    def _records(self) -> list[dict[str, Any]]:
        """The requests in the file; lines that are damaged, or of another hand, are left out."""
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
                if all(isinstance(record.get(key), kind) for key, kind in _KINDS.items()):
                    record = {**record, "request": Request.read(record.get("request")).as_json()}
                    json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # as it is sent to a page
                    found.append(record)
            except (Refused, ValueError, AttributeError, RecursionError):
                continue
        return found
