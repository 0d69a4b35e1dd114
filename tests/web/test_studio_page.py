"""The studio in a browser without a screen: every task by clicks and keys, and what goes wrong in front of somebody."""

import shutil
import socket
import threading
from contextlib import closing, contextmanager

import pytest

pytest.importorskip("starlette", reason="the extra [web] is not installed")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
import uvicorn
from playwright import sync_api as playwright

from stdit.recipes.studio import make_studio
from stdit.web.server import make_app
from stdit.web.studio_jobs import Progress
from stdit.web.studio_problems import Refused

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if BROWSER is None:
    pytest.skip("no browser is installed (Debian: apt-get install chromium)", allow_module_level=True)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
TASKS = ("generate", "animate", "extend", "connect", "loop", "interpolate", "inpaint", "outpaint", "edit")


@contextmanager
def serving(home, output, port=0):
    """A server in a thread, which ends as one that is stopped: without waiting for what it samples."""
    studio = make_studio(home / "models", output, home / "output", {"tiny": home / "models" / "tiny"})
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.bind(("127.0.0.1", port))
    app = make_app(studio.routes(), studio.worker, studio.close)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="websockets-sansio"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    try:
        yield studio, f"http://127.0.0.1:{opened.getsockname()[1]}/"
    finally:
        server.force_exit = server.should_exit = True
        thread.join(20)
        studio.close()
        opened.close()


@pytest.fixture(scope="module")
def address(home, tmp_path_factory):
    with serving(home, tmp_path_factory.mktemp("studio") / "output") as (_, url):
        yield url


@pytest.fixture
def brake(monkeypatch):
    """While this is set, sampling stops after a tenth of its steps until it is cancelled.

    Without it a thousand steps of a tiny model may be over before a page is loaded.
    """
    pressed, check = threading.Event(), Progress.check
    pressed.set()

    def wait(progress, *_):
        while pressed.is_set() and progress.share > 0.1 and not progress._stop.wait(0.02):
            pass
        check(progress)

    monkeypatch.setattr(Progress, "check", wait)
    yield pressed
    pressed.clear()


@pytest.fixture(scope="module")
def browser():
    with (
        playwright.sync_playwright() as driver,
        closing(driver.chromium.launch(executable_path=BROWSER, args=FLAGS)) as found,
    ):
        yield found


@contextmanager
def opened(browser, url, policy=False, width=1280):
    """A page that can be used; what its console says as errors fails the test. policy: whether that of the page holds."""
    context = browser.new_context(viewport={"width": width, "height": 800}, bypass_csp=not policy)
    page, said = context.new_page(), []
    page.set_default_timeout(15_000)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.wait_for_selector("#fill")
    try:
        yield page
    finally:
        context.close()
    expected = ("409", "WebSocket", "ERR_CONNECTION_REFUSED")  # answers that refuse, and a server that is away
    assert [text for text in said if not any(part in text for part in expected)] == []


class Hand:
    """Somebody at the page, whose clicks, keys and files are counted."""

    def __init__(self, page):
        self.page, self.actions = page, 0

    def click(self, what):
        self.actions += 1
        self.page.click(what)

    def key(self, what):
        self.actions += 1
        self.page.keyboard.press(what)

    def files(self, *paths):
        self.actions += 1
        self.page.set_input_files("#file", paths)
        self.page.wait_for_function(
            "!window.studio.uploading && window.studio.parts.some((part) => part.media && part.frames)"
        )

    def paint(self):
        self.actions += 1
        box = self.page.wait_for_selector("#paint").bounding_box()
        self.page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.4)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6, steps=4)
        self.page.mouse.up()
        self.page.wait_for_function("window.studio.mask")


def ready(page):
    page.wait_for_selector("#fill:enabled")


def made(page, count):
    """Wait until there are so many versions, and nothing is at work -> the newest."""
    page.wait_for_function(f"window.studio.versions.length >= {count}")
    page.wait_for_function(
        "![...window.studio.jobs.values()].some((job) => ['waiting', 'running'].includes(job.state))"
    )
    return page.evaluate("window.studio.versions[0]")


def few_steps(page):
    page.fill("#steps", "2")
    page.evaluate("document.activeElement.blur()")


def many_steps(page, count=1000):
    page.fill("#steps", str(count))
    page.press("#steps", "Tab")
    page.wait_for_function(f"window.studio.plan?.commands[0]?.includes('--steps {count} ')")
    ready(page)


def test_each_task_takes_at_most_five_actions(browser, address, home):
    frames = {
        "generate": 17,
        "animate": 17,
        "extend": 17,
        "connect": 34,
        "loop": 21,
        "interpolate": 17,
        "inpaint": 9,
        "outpaint": 9,
        "edit": 9,
    }
    for number, task in enumerate(TASKS):
        with opened(browser, address) as page:
            few_steps(page)
            before, hand = page.evaluate("window.studio.versions.length"), Hand(page)
            hand.key(str(number + 1)) if number % 2 else hand.click(f"#task-{task}")
            assert page.locator(f"#task-{task}").get_attribute("aria-pressed") == "true"
            if task == "connect":
                hand.files(home / "clip.mp4", home / "other.mp4")
            elif task != "generate":
                hand.files(home / ("picture.png" if task == "animate" else "clip.mp4"))
            if task == "inpaint":
                hand.paint()
            hand.click(".chip:text('blue')")
            ready(page)
            shown = page.inner_text("#command code")
            hand.key("Control+Enter") if number % 2 else hand.click("#fill")
            version = made(page, before + 1)
            assert hand.actions <= 5, task
            assert version["request"]["task"] == task and version["request"]["label"] == "blue"
            assert version["frames"] == frames[task], task
            assert f"--seed {version['request']['seed']}" in shown
            page.wait_for_function("window.player.playing && window.player.frame > 0")  # the result is on the stage
            for format, head in (("mp4", b"ftyp"), ("gif", b"GIF8")) if task == "outpaint" else ():
                with page.expect_download() as download:
                    page.click(f"#saves a:text('{format}')")
                assert head in download.value.path().read_bytes()[:12]


def test_only_this_machine_is_asked_and_the_page_is_there_at_once(browser, address):
    with opened(browser, address, policy=True) as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.reload()
        page.wait_for_selector("#fill:enabled")
        usable = page.evaluate("performance.now()")
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        page.click("#fill")
        page.wait_for_selector(".version")
        page.click("#tab-runs")
        page.wait_for_selector(".previews img")
        assert len(asked) > 5
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
        assert paint <= 2000 and usable <= 6000, (paint, usable)


def test_a_model_of_texts_has_a_box_and_another_model_takes_none(browser, address):
    with opened(browser, address) as page:
        page.select_option("#model", "texts")
        page.wait_for_selector("#caption")
        few_steps(page)
        page.fill("#caption", "-a boat; $(touch x) 'drifts'")
        page.wait_for_function("window.studio.plan?.commands[0]?.includes('boat')")
        ready(page)
        before = page.evaluate("window.studio.versions.length")
        page.click("#fill")
        assert made(page, before + 1)["request"]["caption"] == "-a boat; $(touch x) 'drifts'"
        page.select_option("#model", "tiny")
        page.wait_for_selector(".notice:has-text('takes no text')")
        page.click(".fix:text('Leave the text out')")
        page.click(".chip:text('green')")
        ready(page)


def test_a_version_can_be_taken_up_again_with_its_mask_and_seed(browser, address, home):
    with opened(browser, address) as page:
        few_steps(page)
        before = page.evaluate("window.studio.versions.length")
        page.click("#task-inpaint")
        Hand(page).files(home / "clip.mp4")
        Hand(page).paint()
        page.click(".chip:text('green')")
        page.wait_for_selector("#command code:has-text('green')")
        shown = page.inner_text("#command code")
        page.click("#fill")
        made(page, before + 1)
        page.wait_for_selector("#paint", state="hidden")
        page.click("#compare")  # what was there before, with what was painted over it
        page.wait_for_selector("#paint")
        page.reload()
        page.wait_for_selector("#fill")
        page.click(".version .restore")
        page.wait_for_function("window.studio.mask && window.studio.plan")
        # The plan of before the version was taken up may still be shown.
        page.wait_for_function("text => document.querySelector('#command code').innerText === text", arg=shown)
        ready(page)


def test_a_version_of_another_model_is_taken_up_with_its_task_text_and_seed(browser, address, home):
    with opened(browser, address) as page:
        before = page.evaluate("window.studio.versions.length")
        page.select_option("#model", "texts")
        page.wait_for_selector("#caption")
        page.fill("#caption", "a red boat")
        page.wait_for_function("window.studio.plan?.commands[0]?.includes('red boat')")
        many_steps(page, 3)
        shown = page.inner_text("#command code")
        page.click("#fill")
        made(page, before + 1)
        page.select_option("#model", "tiny")
        page.wait_for_selector(".chip")
        page.click("#task-extend")
        page.click(".version .restore")
        page.wait_for_function("window.studio.model === 'texts' && window.studio.task === 'generate'")
        page.wait_for_selector("#command code:has-text('red boat')")
        ready(page)
        assert page.inner_text("#command code") == shown and page.input_value("#caption") == "a red boat"


def test_a_page_that_is_loaded_again_keeps_its_mask_its_seed_and_its_request(browser, address, home, brake):
    with opened(browser, address) as page:
        page.click("#task-inpaint")
        Hand(page).files(home / "clip.mp4")
        Hand(page).paint()
        page.fill("#seed", "77")
        page.click(".chip:text('green')")
        many_steps(page)
        shown = page.inner_text("#command code")
        assert "--mask" in shown and "--seed 77" in shown
        page.click("#fill")
        page.wait_for_selector(".job:has-text('left')")
        page.reload()
        page.wait_for_selector(".job:has-text('left')")
        page.wait_for_function("window.studio.mask")
        ready(page)
        assert page.inner_text("#command code") == shown
        assert "another tab" not in page.inner_text(".job")
        page.keyboard.press("Escape")
        page.wait_for_selector(".job", state="detached")
        assert page.evaluate("[...window.studio.jobs.values()].at(-1).state") == "cancelled"
        many_steps(page, 60)
        page.click("#fill")
        page.wait_for_selector(".job")
        page.reload()
        page.wait_for_selector(".job")
        brake.clear()
        page.wait_for_function("window.studio.filled === window.studio.versions[0]?.name && window.player.playing")


def test_a_version_that_cannot_be_shown_is_told_and_asked_for_once(browser, home, tmp_path, monkeypatch):
    with serving(home, tmp_path / "output") as (studio, url), opened(browser, url) as page:
        few_steps(page)
        ready(page)
        page.click("#fill")
        made(page, 1)

        def refused(path, look):
            raise Refused("it has more frames than a page can hold")

        monkeypatch.setattr(studio.media, "view", refused)
        page.reload()
        ready(page)
        asked = []
        page.on("request", lambda request: asked.append(request.url) if "/api/view/" in request.url else None)
        page.click(".version .face")
        for place in ("#notices", "#empty"):
            page.wait_for_selector(f"{place}:has-text('more frames than a page can hold')")
        before = len(asked)
        page.evaluate("window.player.playing = true")
        page.wait_for_timeout(1000)
        assert len(asked) == before <= 3


def test_esc_right_after_generate_cancels_it(browser, address, brake):
    with opened(browser, address) as page:
        many_steps(page)
        page.evaluate(
            "document.querySelector('#fill').click(); dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))"
        )
        page.wait_for_function("[...window.studio.jobs.values()].at(-1)?.state === 'cancelled'")


# Points of an element, besides its round corners, at which something else is clicked.
COVERED = """(name) => {
  const box = document.querySelector(name).getBoundingClientRect(), found = [];
  for (let y = box.top + 3; y < box.bottom - 3; y += 4) for (let x = box.left + 3; x < box.right - 3; x += 4)
    if (!document.elementFromPoint(x, y)?.closest(name)) found.push([x, y]);
  return found;
}"""


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_all_of_the_picture_can_be_painted(browser, address, home, width):
    with opened(browser, address, width=width) as page:
        page.click("#task-inpaint")
        Hand(page).files(home / "clip.mp4")
        page.wait_for_selector("#paint")
        page.wait_for_selector("#brush")
        page.evaluate("document.querySelector('#paint').scrollIntoView({ block: 'end' })")
        assert page.evaluate(COVERED, "#paint") == []
        page.evaluate("document.querySelector('#brush').scrollIntoView({ block: 'center' })")
        assert page.evaluate(COVERED, "#clear") == []


def test_what_a_narrow_page_shows_is_not_cut_off(browser, address, home, tmp_path):
    named = tmp_path / f"{'a-rather-long-name-of-a-clip-' * 2}.mp4"
    shutil.copy(home / "clip.mp4", named)
    with opened(browser, address, width=390) as page:
        few_steps(page)
        before = page.evaluate("window.studio.versions.length")
        page.click("#task-connect")
        for name in ("#add-clip", "#add-gap"):
            page.evaluate("document.querySelector('#timeline').scrollIntoView({ block: 'center' })")
            assert page.evaluate(COVERED, name) == [], name
        Hand(page).files(named, home / "picture.png")
        page.wait_for_function("window.studio.parts.filter((part) => part.media && part.frames).length === 2")
        page.evaluate("document.querySelector('#timeline').scrollIntoView({ block: 'center' })")
        assert page.evaluate(COVERED, "#add-gap") == []
        page.click(".chip:text('green')")
        ready(page)
        page.click("#fill")
        made(page, before + 1)
        line = page.locator(".version .made").first
        line.scroll_into_view_if_needed()
        assert "22 frames · just now" in line.inner_text()
        end = line.locator("span").last.bounding_box()
        assert end["x"] + end["width"] <= 390 - 8


def test_a_text_that_is_as_long_as_it_may_be_says_so(browser, address):
    with opened(browser, address) as page:
        page.select_option("#model", "texts")
        page.fill("#caption", "a boat")
        assert page.locator("#full").is_hidden()
        page.focus("#caption")
        page.keyboard.insert_text("x" * 2500)
        page.wait_for_selector("#full:has-text('at most 2000 characters')")
        assert len(page.input_value("#caption")) == 2000


def test_a_timeline_is_laid_moved_and_taken_apart_by_keys(browser, address, home):
    with opened(browser, address) as page:
        few_steps(page)
        page.click("#task-extend")
        Hand(page).files(home / "clip.mp4")
        page.click(".insert")  # new frames before the clip
        page.wait_for_selector(".part.gap >> nth=1")
        page.focus(".part.gap >> nth=1")
        page.keyboard.press("+")
        Hand(page).files(home / "picture.png")
        media = "window.studio.parts.filter((part) => part.media).map((part) => part.frames).join()"
        page.wait_for_function(f"{media} === '9,1'")
        page.focus(".part.clip >> nth=1")
        page.keyboard.press("Alt+ArrowLeft")
        page.wait_for_function(f"{media} === '1,9'")
        page.click(".fix:text('Use 5')")  # four new frames fitted before the clip alone
        ready(page)
        assert "--input" in page.inner_text("#command code")
        page.focus(".part.clip >> nth=0")
        page.keyboard.press("Delete")
        page.wait_for_function(f"{media} === '9'")


def test_a_run_is_watched_while_it_trains(browser, home, tmp_path):
    shutil.copytree(home / "output" / "run", tmp_path / "output" / "run")
    (tmp_path / "models").symlink_to(home / "models")
    with serving(tmp_path, tmp_path / "output" / "studio") as (_, url), opened(browser, url) as page:
        page.click("#tab-runs")
        page.wait_for_selector(".steps:has-text('step 3,000')")
        page.wait_for_selector(".previews:has-text('preview at step 200')")
        (tmp_path / "output" / "run" / "running.txt").touch()
        with open(tmp_path / "output" / "run" / "training_metrics.csv", "a") as file:
            file.write("3001,0.25,0.001\n")
        page.wait_for_selector(".steps:has-text('step 3,001')")
        page.wait_for_selector(".live")


def test_a_broken_upload_is_one_line_and_the_page_goes_on(browser, address, home):
    with opened(browser, address) as page:
        page.click("#task-extend")
        for name, line in (("broken.mp4", "broken"), ("long.mp4", "lasts 88 s, and 60 are the most")):
            page.set_input_files("#file", home / name)
            page.wait_for_selector(f".notice:has-text('{line}')")
            assert page.locator(".part.clip").count() == 0
        page.click(".fix:text('Use its first 60 seconds')")
        page.wait_for_selector(".part.clip")
        assert page.evaluate("window.studio.parts.find((part) => part.media).frames") == 480
        ready(page)


def test_a_clip_of_the_wrong_kind_has_a_button_that_makes_it_fit(browser, address, home):
    with opened(browser, address) as page:
        few_steps(page)
        page.click("#task-animate")
        Hand(page).files(home / "wide.mp4")
        page.wait_for_selector(".notice.stops:has-text('Animate starts from a picture, but this clip has 9 frames')")
        assert page.locator("#fill").is_disabled()
        page.click(".fix:text('Use its first frame')")
        page.wait_for_selector(".notice.stops", state="detached")
        page.wait_for_function("window.studio.parts[0].frames === 1")
        ready(page)
        page.click("#task-outpaint")
        page.wait_for_function("window.studio.plan?.inner")
        assert page.locator(".notice:has-text('cropped')").count() == 0


def test_two_tabs_see_each_other_and_esc_cancels(browser, address, brake):
    with opened(browser, address) as one, opened(browser, address) as two:
        brake.clear()
        before = two.evaluate("window.studio.versions.length")
        few_steps(one)
        ready(one)
        one.dblclick("#fill")  # two clips, of two seeds
        before += 1
        assert made(two, before + 1)["number"] == made(one, before + 1)["number"]
        seeds = two.evaluate("window.studio.versions.slice(0, 2).map((version) => version.request.seed)")
        assert seeds[0] != seeds[1]
        assert one.evaluate("window.studio.filled") and not two.evaluate("window.studio.filled")
        brake.set()
        two.fill("#steps", "1000")
        two.press("#steps", "Tab")
        two.wait_for_function("window.studio.plan?.commands[0]?.includes('--steps 1000')")
        two.click("#fill")
        two.wait_for_selector(".job")
        two.keyboard.press("Escape")
        for tab in (one, two):
            tab.wait_for_function("[...window.studio.jobs.values()].at(-1)?.state === 'cancelled'")
            tab.wait_for_selector(".job", state="detached")
        assert one.evaluate("window.studio.versions.length") == before + 1


def test_a_server_that_ends_while_sampling_is_told_and_taken_up_again(browser, home, tmp_path, brake):
    with serving(home, tmp_path / "output") as (_, url):
        context = opened(browser, url)
        page = context.__enter__()
        page.fill("#steps", "1000")
        page.press("#steps", "Tab")
        page.wait_for_function("window.studio.plan?.commands[0]?.includes('--steps 1000')")
        page.click("#fill")
        page.wait_for_selector(".job:has-text('left')")
    page.wait_for_selector("#banner:has-text('The server has stopped while it was sampling')")
    assert page.locator("#fill").is_disabled()
    assert page.inner_text("#status") == "the server has stopped"
    with serving(home, tmp_path / "output", int(url.rstrip("/").rpartition(":")[2])):
        page.wait_for_selector("#banner:has-text('what it was sampling is lost')")
        assert page.input_value("#steps") == "1000"
        page.click("#again")
        page.wait_for_selector(".job:has-text('left')")
        page.keyboard.press("Escape")
        page.wait_for_selector(".job", state="detached")
        context.__exit__(None, None, None)


def test_a_model_that_waits_for_a_request_says_so(browser, home, tmp_path, brake):
    with serving(home, tmp_path / "output") as (_, url), opened(browser, url) as page:
        many_steps(page)
        page.click("#fill")
        page.wait_for_selector(".job:has-text('left')")
        page.select_option("#model", "texts")
        for place in ("#status", "#empty"):
            page.wait_for_selector(f"{place}:has-text('when what is at work is over')")
        page.keyboard.press("Escape")
        page.wait_for_selector("#caption")
        page.wait_for_selector("#status:has-text('ready')")


def test_a_model_that_vanishes_is_told_where_one_looks(browser, home, tmp_path):
    shutil.copytree(home / "models", tmp_path / "models")
    (tmp_path / "output").mkdir()
    with serving(tmp_path, tmp_path / "output" / "studio") as (_, url), opened(browser, url) as page:
        ready(page)
        shutil.move(tmp_path / "models" / "tiny", tmp_path / "elsewhere")
        page.click("#fill")
        page.wait_for_selector(".notice:has-text('tiny is gone; choose another')")
        page.click(".fix:text('Use forward')")
        page.wait_for_function("window.studio.facts?.name === 'forward'")
        few_steps(page)
        ready(page)
        page.click("#fill")
        assert made(page, 1)["request"]["model"] == "forward"
