"""The page of a world: its protocol, and the page itself in a browser without a screen."""

import argparse
import asyncio
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import fill

from stdit.recipes.entry import child_environment
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import TinyVAE

pytest.importorskip("starlette", reason="the extra [web] is not installed")
pytest.importorskip("httpx2", reason="the test client of starlette needs it")
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from stdit.conditions import Actions
from stdit.recipes.play import Beginnings
from stdit.sampling.checks import check_world
from stdit.sampling.options import SamplingOptions
from stdit.web.play import Session, Stage
from stdit.web.server import Worker, make_app, open_port
from stdit.worlds.environments import make_environment

LOCAL = {"host": "127.0.0.1:80"}
SHOWN = {"type": "shown", "epoch": 1}


def make_pipe(tiny_model, environment=None):
    actions = {"stride": 4, "count": 5, "names": ["stay", "up", "down", "left", "right"], "repeat": 4}
    actions |= {} if environment is None else {"environment": environment}
    model = tiny_model(
        in_channels=16, num_classes=0, learn_sigma=False, sample_size=(5, 4, 4), extra_conditions={"actions": actions},
        causal=True, window=3, position_encoding="rope",
    )  # fmt: skip
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    return STDiTPipeline(
        model, vae, STDiTScheduler("flow"), 17, 32, 32, 16.0, "flow", mask_strategies=["teacher_forcing"]
    )


@pytest.fixture
def stage(tiny_model, tmp_path):
    pipe, options = make_pipe(tiny_model), SamplingOptions(num_inference_steps=1, precision="fp32")
    start = torch.zeros(1, 3, 1, 32, 32)

    def begin(seed, truth):
        return pipe.world(start, options=options), np.full((1, 32, 32, 3), 127, np.uint8), None

    actions = check_world(pipe.engine, options)
    return Stage(begin, actions, fps=16.0, evaluations=2, title="t", recordings=tmp_path / "played", sessions=1)


@pytest.fixture
def client(stage):
    worker = Worker()
    with TestClient(make_app(stage.routes(worker), worker), base_url="http://127.0.0.1") as found:
        yield found


def group(play) -> tuple[int, int]:
    """The number of the first frame of the next group, and of its frames."""
    first, count, both = struct.unpack("<IHH", play.receive_bytes()[:8])
    assert both == 0
    return first, count


def begin(play):
    assert play.receive_json()["names"][1] == "up"
    assert play.receive_json()["type"] == "reset"
    assert group(play) == (0, 1)


def test_each_group_is_made_when_the_last_one_is_shown_and_not_before(client, stage):
    with client.websocket_connect("/play", headers=LOCAL) as play:
        begin(play)
        play.send_json({"type": "act", "action": 1})
        for first in (1, 5, 9):
            play.send_json(SHOWN)
            assert group(play) == (first, 4)
        time.sleep(0.2)
        play.send_json({"type": "restart", "seed": 4})
        assert play.receive_json() == {"type": "reset", "epoch": 2, "seed": 4, "truth": False}  # no group came unasked
        assert group(play) == (0, 1)
    assert stage.open == 0


@pytest.mark.parametrize(
    "message",
    [
        "", "{", "[1]", "null", '{"type": "jump"}', '{"type": "act"}', '{"type": "act", "action": 9}',
        '{"type": "act", "action": [1]}', '{"type": "act", "action": 1e999}', '{"type": "act", "action": NaN}', '{"type": "restart", "seed": "x"}', '{"type": "restart", "seed": -1}',
        '{"type": "rewind", "groups": 1.5}', '{"type": "record"}', '{"type": "record", "on": 1}', '{"type": "shown"}', "[" * 5000,
    ],
)  # fmt: skip
def test_a_message_that_is_no_action_is_refused_and_the_connection_stays(client, message):
    with client.websocket_connect("/play", headers=LOCAL) as play:
        begin(play)
        play.send_text(message)
        answer = play.receive_json()
        assert answer["type"] == "error" and "\n" not in answer["message"] and len(answer["message"]) > 30
        play.send_json(SHOWN)
        assert group(play) == (1, 4)


def test_frames_of_before_a_restart_or_rewind_that_are_shown_late_ask_for_nothing(client):
    with client.websocket_connect("/play", headers=LOCAL) as play:
        begin(play)
        play.send_json({"type": "restart", "seed": 4})
        assert play.receive_json()["epoch"] == 2
        assert group(play) == (0, 1)
        play.send_json(SHOWN)
        time.sleep(0.2)
        play.send_json({"type": "rewind", "groups": 0})
        assert play.receive_json()["type"] == "rewound"  # and no group before it
        assert group(play) == (1, 4)
        play.send_json({"type": "shown", "epoch": 2})
        time.sleep(0.2)
        play.send_json({"type": "restart", "seed": 5})
        assert play.receive_json()["epoch"] == 4


def test_a_world_that_cannot_begin_can_be_restarted_and_says_so_when_it_is_taken_back(client, stage):
    begins = stage.begin

    def fail(seed, truth):
        raise ValueError("there is no display")

    stage.begin = fail
    with client.websocket_connect("/play", headers=LOCAL) as play:
        play.receive_json()
        assert play.receive_json()["message"] == "there is no display"
        play.send_json({"type": "rewind", "groups": 1})
        assert "none could begin" in play.receive_json()["message"]
        stage.begin = begins
        play.send_json({"type": "restart", "seed": 0})
        assert play.receive_json()["type"] == "reset"


class Tab:
    """A socket to which a test says messages, and the types of what is answered."""

    def __init__(self):
        self.waiting, self.answers = asyncio.Queue(), []

    def say(self, **message):
        self.waiting.put_nowait({"type": "websocket.receive", "text": json.dumps(message)})

    async def receive(self):
        return await self.waiting.get()

    async def send_json(self, message):
        self.answers.append(message["type"])

    async def send_bytes(self, data):
        self.answers.append("group")


def test_an_action_that_is_let_go_at_once_ends_nothing_where_no_action_is_idle(tmp_path):
    env = make_environment("room", {"size": 32})
    env.reset(0)
    pixels = torch.zeros(1, 3, 4, 32, 32)

    def begin(seed, truth):
        world = types.SimpleNamespace(frames=1, group=4, rewindable=0, step=lambda action: pixels)
        return world, np.zeros((1, 32, 32, 3), np.uint8), env

    async def play():
        stage = Stage(begin, Actions(stride=4, count=5), fps=16.0, evaluations=2, title="t", recordings=tmp_path)
        tab = Tab()
        task = asyncio.create_task(Session(stage, tab, Worker()).run())

        async def until(count):
            while len(tab.answers) < count and not task.done():
                await asyncio.sleep(0.01)

        await until(3)
        for count in (4, 5):
            tab.say(**SHOWN)
            await asyncio.sleep(0.05)
            tab.say(type="act", action=1)
            tab.say(type="act", action=None)
            await asyncio.sleep(0.05)
            tab.say(type="act", action=1)
            await until(count)
            tab.say(type="act", action=None)
        assert not task.done() and tab.answers == ["hello", "reset", "group", "group", "group"]
        tab.waiting.put_nowait({"type": "websocket.disconnect"})
        await task

    asyncio.run(asyncio.wait_for(play(), 20))


def test_restart_begins_with_another_picture_where_there_is_no_environment(tiny_model):
    options = SamplingOptions(num_inference_steps=1, precision="fp32")
    pipe = make_pipe(tiny_model)
    args = argparse.Namespace(class_label=None, input=None)
    begins = Beginnings(pipe, options, check_world(pipe.engine, options), args)
    first, second, again = (begins(seed)[0].step(None) for seed in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_more_tabs_than_worlds_are_told_so_and_a_closed_tab_makes_room(client):
    with client.websocket_connect("/play", headers=LOCAL) as play:
        begin(play)
        with client.websocket_connect("/play", headers=LOCAL) as second:
            assert "1 worlds are open" in second.receive_json()["message"]
            with pytest.raises(WebSocketDisconnect):
                second.receive_json()
    for _ in range(50):
        with client.websocket_connect("/play", headers=LOCAL) as play:
            if play.receive_json()["type"] == "hello":
                return
        time.sleep(0.05)
    raise AssertionError("the closed tab still holds its world")


def test_a_world_can_be_taken_back_and_recorded(client, stage):
    with client.websocket_connect("/play", headers=LOCAL) as play:
        begin(play)
        play.send_json({"type": "record", "on": True})
        assert play.receive_json()["type"] == "recording"
        for first in (1, 5):
            play.send_json(SHOWN)
            assert group(play) == (first, 4)
        play.send_json({"type": "record", "on": False})
        url = play.receive_json()["url"]
        play.send_json({"type": "rewind", "groups": 2})
        assert play.receive_json() == {"type": "rewound", "epoch": 2, "frames": 1}
        assert group(play) == (1, 4)
    assert client.get(url).content[4:8] == b"ftyp"
    assert client.get("/recordings/..%2Fsecret").status_code == 404
    assert [path.suffix for path in stage.recordings.iterdir()] == [".mp4"]


@pytest.mark.parametrize(
    "headers", [{"host": "evil.example"}, {"host": "127.0.0.1:80", "origin": "http://evil.example"}]
)
def test_pages_of_other_sites_get_nothing(client, headers):
    assert client.get("/", headers=headers).status_code == 403
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/play", headers=headers) as play:
        play.receive_json()


def test_a_port_that_is_in_use_is_refused_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="cannot be used"):
            open_port(taken.getsockname()[1])


def test_keys_change_the_picture_in_a_real_browser(tiny_model, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser is installed (Debian: apt-get install chromium)")
    make_pipe(tiny_model, {"name": "room", "options": {"size": 32}}).save_pretrained(tmp_path / "models" / "t")
    command = [sys.executable, "-m", "stdit", "play", "models/t", "--steps", "1", "--port", "0", "--no-browser"]
    server = subprocess.Popen(
        command, cwd=tmp_path, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = iter(server.stdout.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://\S+", line)))
        flags = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ]
        with playwright.sync_playwright() as driver:
            page = driver.chromium.launch(executable_path=browser, args=flags).new_page(bypass_csp=True)
            said = []
            page.on(
                "console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None
            )
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(url)
            page.wait_for_function("window.stdit.frames > 5")
            picture = "document.getElementById('{}').toDataURL()"
            before = [page.evaluate(picture.format(name)) for name in ("dream", "truth")]
            page.keyboard.down("ArrowLeft")
            assert page.locator(".key.pressed").inner_text().endswith("left")
            page.wait_for_function(f"window.stdit.frames > {page.evaluate('window.stdit.frames') + 30}")
            after = [page.evaluate(picture.format(name)) for name in ("dream", "truth")]
            page.keyboard.up("ArrowLeft")
            assert not page.locator(".key.pressed").count()
            assert before[0] != after[0] and before[1] != after[1]
            assert page.evaluate("window.stdit.fps") > 5
            page.screenshot(path=tmp_path / "play.png")
            assert said == []
    finally:
        server.terminate()
        server.wait(30)
