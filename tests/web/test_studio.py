"""The studio's server: requests become commands, what stands in their way has buttons, and jobs end when they are cancelled."""

import ast
import errno
import inspect
import io
import json
import os
import re
import shlex
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the extra [web] is not installed")
pytest.importorskip("httpx2", reason="the test client of starlette needs it")
from PIL import Image
from starlette.testclient import TestClient

from stdit.data import video_write
from stdit.data.inputs import read_input
from stdit.data.video_write import to_uint8
from stdit.model.stdit import STDiT
from stdit.recipes import sample
from stdit.recipes import studio as studio_command
from stdit.recipes.studio import chosen_model, make_studio
from stdit.sampling.pipeline import STDiTPipeline
from stdit.web import studio as studio_module
from stdit.web import studio_media
from stdit.web.server import make_app
from stdit.web.studio_history import made_with
from stdit.web.studio_jobs import Cancelled, Progress
from stdit.web.studio_models import Facts, Models
from stdit.web.studio_plan import Planner
from stdit.web.studio_request import Request
from stdit.web.studio_runs import METRICS, POINTS, Curve

LOOK = "height=32&width=32&fps=8"


@pytest.fixture
def studio(home, tmp_path):
    return make_studio(home / "models", tmp_path / "output" / "studio.v2", home / "output")


@pytest.fixture
def client(studio):
    app = make_app(studio.routes(), studio.worker, studio.close)
    with TestClient(app, base_url="http://127.0.0.1") as found:
        yield found


@pytest.fixture
def names(client, home):
    """The names under which some files were uploaded."""
    found = {}
    for name in ("clip.mp4", "other.mp4", "wide.mp4", "picture.png", "mask.png"):
        answer = client.post(f"/api/media?name={name}&{LOOK}", content=(home / name).read_bytes())
        assert answer.status_code == 200, answer.text
        found[name] = answer.json()["name"]
    return found


def ask(task, *parts, **more):
    """A request with parts of the timeline: a name of a file, or a number of new frames."""
    listed = [
        {"media": part, "frames": 0} if isinstance(part, str) else {"media": None, "frames": part} for part in parts
    ]
    return {"model": "tiny", "task": task, "parts": listed, "label": "red", "steps": 1, "seed": 3, **more}


def requests(names):
    """Each task as the page asks for it, and a part of its command."""
    clip, other, picture = names["clip.mp4"], names["other.mp4"], names["picture.png"]
    return {
        "generate": (ask("generate", 17), "--task generate --frames 17", 17),
        "animate": (ask("animate", picture, 8), "--task animate --input {picture} --frames 9", 9),
        "extend": (ask("extend", 8, clip, 8), "--task extend --input {clip} --before 8 --after 8", 25),
        "connect": (ask("connect", clip, 12, other), "--task connect --input {clip} {other} --frames 12", 34),
        "loop": (ask("loop", clip, 8), "--task loop --input {clip} --frames 8", 17),
        "interpolate": (ask("interpolate", clip, factor=2), "--task interpolate --input {clip} --factor 2", 17),
        "inpaint": (ask("inpaint", clip, mask=names["mask.png"]), "--task inpaint --input {clip} --mask {mask}", 9),
        "outpaint": (ask("outpaint", clip, width=64), "--task inpaint --input {clip} --class-label red --height 32 --width 64", 9),
        "edit": (ask("edit", clip, strength=0.5), "--task edit --input {clip} --strength 0.5", 9),
    }  # fmt: skip


def finished(client, job, state="done", patience=20.0):
    """The job when it has ended, as a tab is told."""
    with client.websocket_connect("/events", headers={"host": "127.0.0.1"}) as events:
        until = time.time() + patience
        found = next((one for one in events.receive_json()["jobs"] if one["id"] == job), None)
        while time.time() < until and (found is None or found["state"] in ("waiting", "running")):
            message = events.receive_json()
            if message["type"] == "job" and message["job"]["id"] == job:
                found = message["job"]
    assert found["state"] == state, found
    return found


def test_every_task_is_a_command_whose_clip_has_the_frames_of_the_timeline(client, studio, names):
    paths = {
        "clip": names["clip.mp4"],
        "other": names["other.mp4"],
        "picture": names["picture.png"],
        "mask": names["mask.png"],
    }
    full = {key: str(studio.output / name) for key, name in paths.items()}
    for task, (request, expected, frames) in requests(names).items():
        plan = client.post("/api/plan", json=request).json()
        assert [problem for problem in plan["problems"] if problem["stops"]] == [], task
        (command,) = plan["commands"]
        assert expected.format(**full) in command, task
        assert "--seed 3" in command and sample.parse(shlex.split(command)[2:]).seed == 3
        job = client.post("/api/jobs", json=request)
        assert job.status_code == 202, job.text
        (made,) = finished(client, job.json()["id"])["versions"]
        view = client.get(f"/api/view/{made}").json()
        assert view["frames"] == plan["frames"] == frames, task
        assert [view["height"], view["width"]] == plan["size"], task


def test_the_command_that_is_shown_writes_the_same_clip(client, studio, names, tmp_path, monkeypatch):
    request = ask("extend", names["clip.mp4"], 8, steps=2)
    command = client.post("/api/plan", json=request).json()["commands"][0]
    (made,) = finished(client, client.post("/api/jobs", json=request).json()["id"])["versions"]
    argv = shlex.split(command)[2:]
    argv[argv.index("--output") + 1] = str(tmp_path / "again")
    sample.main(argv)
    (again,) = (tmp_path / "again").glob("*.mp4")
    assert again.name == made
    assert again.read_bytes() == (studio.output / made).read_bytes()


def test_a_scale_that_only_one_guider_has_learnt_is_asked_of_that_one(home, tmp_path):
    pipe = STDiTPipeline.from_pretrained(home / "models" / "tiny")
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    learnt = {"flow_map": True, "extra_conditions": {"guidance": {"scales": {"cfg": 5.0, "auto": 3.0}}}}
    few = STDiTPipeline(STDiT(**{**config, **learnt}), pipe.vae, pipe.scheduler, 17, 32, 32, 8.0, "flow")
    facts = Facts.of("few", tmp_path, few, 0)
    assert facts.as_json()["scales"] == {"auto": 3.0, "cfg": 5.0} and facts.guidance == 2.0
    planner = Planner(facts, lambda part: {}, str, tmp_path)
    for scale, guider in ((2.0, []), (4.0, ["--guider", "cfg"]), (3.0000001, ["--guider", "cfg"])):
        command = list(planner._settings(Request.read({"task": "generate", "label": "red", "guidance": scale})))
        at = command.index("--guidance")
        assert float(command[at + 1]) == scale and command[at + 2 : -2] == guider
    for scale, nearest in ((5.0, None), (6.0, 5.0), (0.5, 1.0)):
        request = Request.read({"task": "generate", "label": facts.classes[0], "guidance": scale})
        fixes = [fix.change for problem in planner._of_model(request) for fix in problem.fixes]
        assert fixes == ([] if nearest is None else [{"guidance": nearest}])


def test_a_label_may_be_a_number_as_on_the_command_line(client):
    for label, fits in (("2", True), ("3", False), ("-1", False), ("²", False)):
        problems = client.post("/api/plan", json=ask("generate", 17, label=label)).json()["problems"]
        assert (problems == []) == fits, label


def test_settings_that_made_a_version_are_not_sampled_again(client):
    request = ask("generate", 17)
    (made,) = finished(client, client.post("/api/jobs", json=request).json()["id"])["versions"]
    problem = client.post("/api/jobs", json=request).json()["problem"]
    assert problem["message"] == "These settings and this seed made v1 already."
    assert {"label": "Show it", "change": {"show": made}} in problem["fixes"]
    assert client.post("/api/jobs", json={**request, "seed": None}).status_code == 202


def test_a_model_that_was_trained_on_makes_a_version_of_its_own_and_overwrites_none(home, tmp_path):
    shutil.copytree(home / "models", tmp_path / "models")
    studio = make_studio(tmp_path / "models", tmp_path / "output", tmp_path)
    with TestClient(make_app(studio.routes(), studio.worker, studio.close), base_url="http://127.0.0.1") as client:
        request, made = ask("generate", 1), []
        for _ in range(3):
            command = client.post("/api/plan", json=request).json()["commands"][0]
            made += finished(client, client.post("/api/jobs", json=request).json()["id"])["versions"]
            assert str(studio.output / made[-1]).startswith(shlex.split(command)[-1])
            problem = client.post("/api/jobs", json=request).json()["problem"]
            assert problem["message"] == f"These settings and this seed made v{len(made)} already."
            changed = int(time.time()) + 10 * len(made)
            os.utime(tmp_path / "models" / "tiny" / "model_index.json", (changed, changed))
        assert len(set(made)) == 3 and all((studio.output / name).is_file() for name in made)
        assert [one["name"] for one in studio.history.versions()] == made[::-1]


def test_a_version_of_before_the_model_was_noted_is_of_the_model_that_was_there():
    assert made_with({"time": 5.0}, 4_000_000) and not made_with({"time": 5.0}, 6_000_000)


def test_a_timeline_of_several_clips_is_filled_by_commands_that_continue_each_other(client, names):
    clip = names["clip.mp4"]
    request = ask("extend", 5, clip, 12, names["picture.png"], 8, clip, 8)
    plan = client.post("/api/plan", json=request).json()
    tasks = [shlex.split(command)[5] for command in plan["commands"]]
    assert tasks == ["connect", "connect", "extend"]
    written = [shlex.split(command)[shlex.split(command).index("--output") + 1] for command in plan["commands"]]
    for command, before in zip(plan["commands"][1:], written[:-1], strict=True):
        assert f"--input {before}" in command
    (made,) = finished(client, client.post("/api/jobs", json=request).json()["id"])["versions"]
    assert client.get(f"/api/view/{made}").json()["frames"] == plan["frames"] == 5 + 9 + 12 + 1 + 8 + 9 + 8


def change(client, request, changes):
    """What the page does when a button is pressed."""
    request = {**request, "parts": [dict(part) for part in request["parts"]]}
    for name, value in changes.items():
        if name == "gap":
            request["parts"][value[0]]["frames"] = value[1]
        elif name == "append":
            request["parts"].append({"media": None, "frames": value})
        elif name == "insert":
            request["parts"].insert(value[0], {"media": None, "frames": value[1]})
        elif name == "cut":
            at, begin, end = value
            body = {"name": request["parts"][at]["media"], "begin": begin, "end": end}
            found = client.post(f"/api/cut?{LOOK}", json=body).json()
            request["parts"][at]["media"] = found["name"]
        elif name == "size":
            request["height"], request["width"] = value
        elif name == "remove":
            request["parts"] = [part for i, part in enumerate(request["parts"]) if i not in value]
        elif name == "before":
            request["parts"][0]["frames"] = value
        else:
            request[name] = value
    return request


def test_the_page_knows_every_change_that_a_button_asks_for():
    folder, asked = Path(inspect.getfile(Planner)).parent, set()
    for path in folder.glob("studio*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(call, ast.Call)
                and getattr(call.func, "id", "") == "Fix"
                and isinstance(call.args[1], ast.Dict)
            ):
                asked |= {key.value for key in call.args[1].keys}
    script = (folder / "static/studio/settings.js").read_text().split("const CHANGES = {")[1].split("};")[0]
    known = set(re.findall(r"^  (\w+):", script, re.MULTILINE))
    assert {"label", "guidance"} <= asked <= known


def test_a_button_removes_the_problem_that_it_stands_beside(client, names):
    clip, picture, wide = names["clip.mp4"], names["picture.png"], names["wide.mp4"]
    cases = {
        "1 frame, or that and whole groups": ask("generate", 16),
        "Choose a label": ask("generate", 17, label=None),
        "has no label": ask("generate", 17, label="pink"),
        "takes no text": ask("generate", 17, caption="a boat"),
        "but this clip has 9 frames": ask("animate", clip, 8),
        "this is a picture": ask("interpolate", picture),
        "starts from nothing": ask("generate", clip),
        "6 new frames are not whole groups": ask("extend", clip, 6),
        "There is nothing to fill": ask("extend", clip),
        "nothing comes before it": ask("loop", 4, clip, 8),
        "takes one clip, but": ask("edit", clip, clip),
        "need new frames between": ask("connect", clip, clip),
        "filled once at a time": ask("connect", clip, 12, clip, count=2),
        "does not fit: height": ask("generate", 17, height=40),
        "no room around": ask("outpaint", clip, width=32),
        "is cropped to 32 x 32": ask("extend", wide, 8),
        "only goes forward": ask("extend", 4, clip, 8, model="forward"),
        "277 frames of 256 x 256 are more than a page can hold; use at most 256": ask(
            "generate", 277, height=256, width=256
        ),
        "8 clips of 253 frames of 256 x 256 are more": ask("generate", 253, height=256, width=256, count=8),
    }
    for message, request in cases.items():
        problems = client.post("/api/plan", json=request).json()["problems"]
        found = [problem for problem in problems if message in problem["message"]]
        assert len(found) == 1, (message, problems)
        assert found[0]["fixes"], message
        for fix in found[0]["fixes"]:
            after = client.post("/api/plan", json=change(client, request, fix["change"])).json()
            left = [problem["message"] for problem in after["problems"]]
            assert not any(message in text for text in left), (message, fix, left)


def test_a_cancelled_request_ends_within_one_step_and_leaves_nothing(client, studio, monkeypatch):
    calls, forward = [], STDiT.forward

    def counted(self, *arguments, **more):
        calls.append(1)
        return forward(self, *arguments, **more)

    monkeypatch.setattr(STDiT, "forward", counted)
    for request in (ask("generate", 17, steps=1000), ask("generate", 65, steps=1000, model="forward")):
        calls.clear()
        job = client.post("/api/jobs", json=request).json()["id"]
        until = time.time() + 20
        while time.time() < until and len(calls) < 4:
            time.sleep(0.01)
        assert client.delete(f"/api/jobs/{job}").status_code == 200
        before = len(calls)
        finished(client, job, "cancelled", patience=5)
        assert len(calls) - before <= 1
        assert len(calls) < 500
    assert [path.name for path in studio.output.rglob("*.mp4")] == []
    assert client.delete("/api/jobs/none").status_code == 409


def test_a_folder_that_is_removed_while_sampling_is_made_again_and_its_versions_are_not_listed(
    client, studio, monkeypatch
):
    (gone,) = finished(client, client.post("/api/jobs", json=ask("generate", 17)).json()["id"])["versions"]
    forward = STDiT.forward

    def removing(self, *arguments, **more):
        shutil.rmtree(studio.output, ignore_errors=True)
        return forward(self, *arguments, **more)

    with client.websocket_connect("/events", headers={"host": "127.0.0.1"}) as events:
        assert [one["name"] for one in events.receive_json()["versions"]] == [gone]
        shutil.rmtree(studio.output)
        assert client.get(f"/api/view/{gone}").status_code == 409
        assert events.receive_json() == {"type": "versions", "versions": []}
    for model in ("tiny", "forward"):
        monkeypatch.setattr(STDiT, "forward", removing)
        job = client.post("/api/jobs", json=ask("generate", 17, seed=8, model=model)).json()["id"]
        (made,) = finished(client, job)["versions"]
        monkeypatch.undo()
        assert [one["name"] for one in studio.history.versions()] == [made]


def few_frames(studio, monkeypatch, count):
    """From now on a page holds so few frames of 32 x 32."""
    monkeypatch.setattr(studio_media, "VIEW_PIXELS", count * 32 * 32)
    studio.media._views.clear()


def test_tabs_are_not_told_of_versions_for_a_clip_that_is_there_and_cannot_be_shown(client, studio, monkeypatch):
    request = ask("generate", 17)
    (made,) = finished(client, client.post("/api/jobs", json=request).json()["id"])["versions"]
    few_frames(studio, monkeypatch, 16)
    with client.websocket_connect("/events", headers={"host": "127.0.0.1"}) as events:
        events.receive_json()
        problem = client.get(f"/api/view/{made}").json()["problem"]
        assert "17 frames of 32 x 32, more than a page can hold; use at most 16" in problem["message"]
        client.post("/api/jobs", json={**request, "seed": 4})
        assert events.receive_json()["type"] == "job"


def test_the_button_beside_a_clip_that_is_too_long_cuts_that_clip(client, studio, names, monkeypatch):
    request = ask("connect", names["clip.mp4"], 12, names["other.mp4"])
    few_frames(studio, monkeypatch, 10)
    problem = client.post("/api/plan", json=request).json()["problem"]
    assert problem["fixes"] == [{"label": "Use its first 10 frames", "change": {"cut": [2, 0, 10]}}]
    after = change(client, request, problem["fixes"][0]["change"])
    assert client.post("/api/plan", json=after).json()["frames"] == 9 + 12 + 10


def test_the_beginning_of_an_upload_that_is_too_long_for_the_page_is_kept_by_its_button(
    client, studio, home, monkeypatch
):
    few_frames(studio, monkeypatch, 10)
    for name, said in (("other.mp4", "has 13 frames of 32 x 32, more than a page"), ("long.mp4", "lasts 88 s")):
        url, content = f"/api/media?name={name}&{LOOK}", (home / name).read_bytes()
        problem = client.post(url, content=content).json()["problem"]
        assert said in problem["message"] and not list(studio.media.inputs.iterdir())
        (fix,) = problem["fixes"]
        assert fix["label"] == "Use its first 1.25 seconds"
        kept = client.post(f"{url}&first={fix['change']['upload']['first']}", content=content).json()
        assert kept["frames"] == client.get(f"/api/view/{kept['name']}?{LOOK}").json()["frames"] == 10
        (studio.output / kept["name"]).unlink()


def test_a_clip_that_cannot_be_written_names_its_file_and_a_remedy(client, studio, monkeypatch):
    def full(path, *arguments, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"file:{path}")

    monkeypatch.setattr(video_write, "_Mp4Encoder", full)
    job = client.post("/api/jobs", json=ask("generate", 17)).json()
    message = finished(client, job["id"], "failed")["problem"]["message"]
    assert message.startswith(f"'{studio.output}/000-red") and "free some room" in message, message


def test_an_upload_that_a_full_disk_ends_names_the_folder_and_not_the_hidden_file(client, studio, home, monkeypatch):
    class Full(io.FileIO):
        def write(self, part):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(studio_media, "open", lambda path, mode: Full(path, mode), raising=False)
    answer = client.post(f"/api/media?name=clip.mp4&{LOOK}", content=(home / "clip.mp4").read_bytes())
    message = answer.json()["problem"]["message"]
    assert answer.status_code == 409 and "Errno" not in message and ".part" not in message
    assert message.startswith(f"{studio.media.inputs}: No space left") and not list(studio.media.inputs.iterdir())


def test_a_picture_beyond_what_the_documents_say_is_refused(client, monkeypatch):
    for height, fits in ((46, True), (47, False)):
        monkeypatch.setattr(studio_media, "LARGEST_PICTURE", (46, 82))
        stream = io.BytesIO()
        Image.new("RGB", (82, height)).save(stream, "png")
        answer = client.post(f"/api/media?name=large.png&{LOOK}", content=stream.getvalue())
        assert (answer.status_code == 200) == fits, height
    assert "has 82 x 47 pixels, and 82 x 46 are the most" in answer.json()["problem"]["message"]
    text = (Path(__file__).parents[2] / "docs" / "studio.md").read_text()
    monkeypatch.undo()
    for height, width in (studio_media.LARGEST_PICTURE, (2304, studio_media.MOST_PIXELS // 2304)):
        assert f"{width} x {height}" in text


def test_uploads_beyond_the_bounds_are_refused_in_one_line_and_nothing_is_left(client, studio, home, monkeypatch):
    def refused(name, content, more=""):
        answer = client.post(f"/api/media?name={name}&{LOOK}{more}", content=content)
        assert answer.status_code == 409, name
        problem = answer.json()["problem"]
        assert "\n" not in problem["message"] and len(problem["message"]) < 400
        assert not [path for path in studio.output.rglob("*") if path.is_file()], name
        return problem

    refused("broken.mp4", (home / "broken.mp4").read_bytes())
    refused("empty.png", b"")
    refused("page.html", b"<script>")
    refused("..%2F..%2Fevil", b"x")
    long = refused("long.mp4", (home / "long.mp4").read_bytes())
    assert "lasts 88 s, and 60 are the most" in long["message"]
    assert long["fixes"] == [{"label": "Use its first 60 seconds", "change": {"upload": {"first": 60.0}}}]
    monkeypatch.setattr(studio_media, "LARGEST_UPLOAD", 1000)
    assert "are taken" in refused("clip.mp4", (home / "clip.mp4").read_bytes())["message"]
    monkeypatch.undo()
    kept = client.post(f"/api/media?name=long.mp4&{LOOK}&first=60", content=(home / "long.mp4").read_bytes())
    assert kept.json()["frames"] == 480


@pytest.mark.parametrize("first", ["-1", "0", "nan", "inf", "61", "x", "0.5"])
def test_a_file_that_was_there_stays_whatever_is_kept_of_it(client, studio, home, first):
    url, content = f"/api/media?name=clip.mp4&{LOOK}", (home / "clip.mp4").read_bytes()
    name = client.post(url, content=content).json()["name"]
    again = client.post(f"{url}&first={first}", content=content)
    assert (studio.output / name).read_bytes() == content
    if first == "0.5":  # a clip of its own
        assert again.json()["frames"] == 4 and again.json()["name"] != name
    else:
        assert again.status_code == 409 and f"first={first}" in again.json()["problem"]["message"]


@pytest.mark.parametrize("url", ["/", "/static/studio.html", "/api/runs", "/api/view/none.mp4", "/static/none"])
def test_no_other_site_asks_or_shows_the_page_in_a_frame(client, url):
    answer = client.get(url, headers={"sec-fetch-site": "same-origin"})
    assert answer.status_code != 403 and answer.headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    for site in ("cross-site", "same-site"):
        for mode, dest in (("no-cors", "image"), ("cors", "empty"), ("navigate", "iframe"), ("navigate", "document")):
            headers = {"sec-fetch-site": site, "sec-fetch-mode": mode, "sec-fetch-dest": dest}
            follows_a_link = url == "/" and dest == "document"
            assert (client.get(url, headers=headers).status_code == 403) != follows_a_link, (site, dest)


def test_names_that_lead_elsewhere_are_refused(client, home, names):
    (home / "secret.png").write_bytes((home / "picture.png").read_bytes())
    for url in (
        "/api/view/..%2Fsecret.png", "/api/view/%2Fetc%2Fpasswd", "/download/mp4/..%2F..%2Fsecret.png", "/sheet/0/inputs%2F..%2F..%2Fsecret.png",
        "/api/runs/..%2Frun", "/preview/run/..%2Ftraining_metrics.csv", "/preview/..%2Frun/step-0000100.png", f"/download/py/{names['clip.mp4']}",
    ):  # fmt: skip
        assert client.get(url).status_code in (404, 409), url


@pytest.mark.parametrize(
    "body",
    [
        "", "{", "[1]", "null", '{"task": "fly"}', '{"task": "edit", "parts": 3}', '{"task": "edit", "parts": [{"media": 3}]}', '{"task": "edit", "model": "tiny", "parts": [{"media": "none.mp4"}]}',
        '{"task": "generate", "steps": 0}', '{"task": "generate", "guidance": NaN}', '{"task": "generate", "model": "../x"}', '{"task": "edit", "seed": -1}', "[" * 9000, '{"task": "edit", "x": "' + "y" * 70000 + '"}',
    ],
)  # fmt: skip
def test_a_request_that_is_none_is_refused_in_one_line(client, body):
    for url in ("/api/plan", "/api/jobs"):
        answer = client.post(url, content=body)
        assert answer.status_code == 409
        assert "\n" not in answer.json()["problem"]["message"]


@pytest.mark.parametrize("name", ["caption", "label", "model", "mask", "steps"])
def test_half_of_a_character_is_refused_and_the_studio_goes_on(client, studio, name):
    body = json.dumps({**ask("generate", 17), "model": "texts", "label": None, "caption": "a boat", name: "a \ud800"})
    answer = client.post("/api/jobs", content=body)
    assert answer.status_code == 409 and name in answer.json()["problem"]["message"]
    assert not studio.jobs.listing() and not studio.history.path.exists()
    with client.websocket_connect("/events", headers={"host": "127.0.0.1"}) as events:
        assert events.receive_json()["type"] == "hello"


def test_a_folder_whose_name_is_no_text_is_listed(tmp_path, home):
    (tmp_path / os.fsdecode(b"half-\xff")).symlink_to(home / "models" / "tiny")
    studio = make_studio(tmp_path, tmp_path / "output", tmp_path)
    with (
        TestClient(make_app(studio.routes(), studio.worker, studio.close), base_url="http://127.0.0.1") as client,
        client.websocket_connect("/events", headers={"host": "127.0.0.1"}) as events,
    ):
        said = events.receive_text()
        assert said.encode() and len(json.loads(said)["models"]) == 1


def test_a_model_folder_that_vanishes_is_one_line_and_another_model(client, home, tmp_path):
    shutil.copytree(home / "models", tmp_path / "models")
    studio = make_studio(tmp_path / "models", tmp_path / "output", tmp_path)
    with TestClient(make_app(studio.routes(), studio.worker, studio.close), base_url="http://127.0.0.1") as found:
        assert found.post("/api/plan", json=ask("generate", 17)).json()["commands"]
        shutil.rmtree(tmp_path / "models" / "tiny")
        for url in ("/api/plan", "/api/jobs"):
            problem = found.post(url, json=ask("generate", 17)).json()["problem"]
            assert "tiny is gone; choose another" in problem["message"]
            assert {"label": "Use forward", "change": {"model": "forward"}} in problem["fixes"]


def test_frames_travel_exactly(client, home, names):
    view = client.get(f"/api/view/{names['clip.mp4']}?{LOOK}").json()
    sheet = np.asarray(
        Image.open(io.BytesIO(client.get(f"/sheet/0/{names['clip.mp4']}?{LOOK}").content)).convert("RGB")
    )
    frames = to_uint8(read_input(home / "clip.mp4", (32, 32), 8).pixels[0])
    for i, frame in enumerate(frames):
        y, x = i // view["columns"] * 32, i % view["columns"] * 32
        assert (sheet[y : y + 32, x : x + 32] == frame).all()


def test_tabs_are_told_what_others_do_and_more_than_the_limit_are_told_so(client, monkeypatch):
    monkeypatch.setattr(studio_module, "TABS", 2)
    local = {"host": "127.0.0.1"}
    with (
        client.websocket_connect("/events", headers=local) as one,
        client.websocket_connect("/events", headers=local) as two,
    ):
        assert one.receive_json()["boot"] == two.receive_json()["boot"]
        with client.websocket_connect("/events", headers=local) as three:
            assert three.receive_json()["type"] == "full"
        job = client.post("/api/jobs", json=ask("generate", 17, steps=3)).json()["id"]
        for tab in (one, two):
            told = []
            while not told or told[-1]["state"] in ("waiting", "running"):
                message = tab.receive_json()
                told += [message["job"]] if message["type"] == "job" else []
            assert told[-1]["state"] == "done" and told[-1]["id"] == job


def test_nested_loops_add_up_to_one_share():
    told, steps, stop = [], [], threading.Event()
    progress = Progress(lambda share, step: (told.append(share), steps.append(step)), stop)
    for _ in progress(range(2)):
        for _ in progress(range(2)):
            for _ in progress(iter(range(5)), total=5):
                pass
    assert told == sorted(told) and told[-1] == 1.0 and len(told) == 20 + 4 + 2
    assert told[4] == pytest.approx(0.25)
    assert [step for step in steps if step] == [(done, 5) for done in range(1, 6)] * 4
    loop = progress(range(9))
    assert [next(loop), next(loop)] == [0, 1]
    stop.set()
    with pytest.raises(Cancelled):
        next(loop)


def test_a_curve_grows_in_constant_memory_and_begins_again_when_its_file_is_written_anew(tmp_path):
    path = tmp_path / METRICS
    with open(path, "w") as file:
        file.write("step,loss,lr\n" + "".join(f"{step},{step % 7},nan\n" for step in range(1, 9001)) + "9001,5,0.0")
    curve = Curve(path).update()
    found = curve.as_json()
    assert curve.step == 9000  # the last line is not complete yet
    assert len(found["step"]) <= 2 * POINTS and "lr" not in found
    assert np.mean(found["loss"]) == pytest.approx(3, abs=0.05)
    with open(path, "a") as file:
        file.write("1\n9002,5,0.1\ndamaged\n")
    assert curve.update().step == 9002 and "lr" in curve.as_json()
    path.unlink()
    path.write_text("step,loss\n1,4\n")
    assert curve.update().as_json() == {"step": [1], "loss": [4.0]}


def test_runs_have_curves_and_previews(client):
    assert client.get("/api/runs").json()["runs"][0]["name"] == "run"
    run = client.get("/api/runs/run").json()
    assert run["step"] == 3000 and run["previews"] == ["step-0000100.png", "step-0000200.png"]
    assert client.get("/preview/run/step-0000200.png").headers["content-type"] == "image/png"
    assert client.get("/api/runs/other").status_code == 409


def test_a_folder_without_models_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no model under models/"):
        studio_command.main(["--port", "0", "--no-browser"])


def test_a_path_that_is_no_model_ends_in_one_line(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(home / "models")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model_index.json").write_text("{")
    for path, said in (("models/typo", "holds no model .* and no checkpoint"), ("damaged", "cannot be read: .*JSON")):
        with pytest.raises(ValueError, match=f"{path}.* {said}"):
            studio_command.main([path, "--port", "0", "--no-browser"])


def test_the_model_of_a_path_is_served_under_its_name_as_is_the_newest_of_checkpoints(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home / "models" / "tiny")
    assert chosen_model(Path(".")) == {"tiny": Path(".")}
    monkeypatch.chdir(tmp_path)
    loaded = []

    def load(path):
        loaded.append(path)
        return STDiTPipeline.from_pretrained(home / "models" / "tiny")

    for step in (2, 4):
        folder = tmp_path / "checkpoints" / "run" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "info.json").write_text("{}")
        for given in ("models/run", "checkpoints/run"):  # the first is not exported yet
            assert chosen_model(Path(given)) == {"run": Path("checkpoints/run")}
        if step == 2:
            models = Models(home / "models", load, chosen_model(Path("models/run")))
        assert models.listing()[0] == {"name": "run", "text": "its newest checkpoint"}
        assert models.known("run") is None and models.facts("run").name == "run" and models.known("run") is not None
    assert loaded == [Path("checkpoints/run")] * 2
    shutil.rmtree("checkpoints")
    with pytest.raises(ValueError, match="is gone"):
        models.facts("run")


def test_a_damaged_history_loses_its_damaged_lines_alone(client, studio):
    finished(client, client.post("/api/jobs", json=ask("generate", 17, count=2)).json()["id"])
    whole = studio.history.path.read_text()
    damaged = [
        "{",
        "[1]",
        '{"files": ["../x.mp4"]}',
        whole[: len(whole) // 2],
        whole.replace('"generate"', '"fly"').strip(),
        whole.replace('"red"', '"\\ud800"').strip(),
        whole.replace('"fps": 8.0', '"fps": NaN').strip(),
        whole.replace('"fps": 8.0', '"fps": 1e999').strip(),
        whole.replace('"warnings": []', '"warnings": ["\\udfff"]').strip(),
    ]
    assert whole not in [line + "\n" for line in damaged]
    studio.history.path.write_text("\n".join(damaged) + "\n" + whole + whole[: len(whole) // 2])
    finished(client, client.post("/api/jobs", json=ask("generate", 17, seed=4)).json()["id"])
    versions = studio.history.versions()
    assert [version["number"] for version in versions] == [3, 2, 1]
    (studio.output / versions[1]["name"]).unlink()
    assert [version["number"] for version in studio.history.versions()] == [3, 1]
