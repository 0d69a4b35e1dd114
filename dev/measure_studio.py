"""Measure the studio as somebody has it: its own process, and Debian's chromium on the same machine.

python dev/measure_studio.py models/NAME [--requests 200] [--steps 2]

It prints the first contentful paint and the time until the page can be used (second load), the time from Esc to the end of
a request, the growth of the server's memory over so many requests after 20 others, what was asked of other hosts, and
whether a page finds a server again that was killed while it sampled.
"""

import argparse
import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from playwright.sync_api import Page, sync_playwright

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
IDLE = "![...window.studio.jobs.values()].some((job) => ['waiting', 'running'].includes(job.state))"


def start(model: str, output: str, port: int = 0) -> tuple[subprocess.Popen, str]:
    """The server, and the address of its page."""
    command = [sys.executable, "-m", "stdit", "studio", model, "--output", output, "--port", str(port), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    atexit.register(server.kill)  # also after an error
    assert server.stdout is not None
    return server, next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))


def memory(server: subprocess.Popen) -> float:
    """Resident megabytes of the server."""
    with open(f"/proc/{server.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def steps(page: Page, count: int) -> None:
    """Set the number of steps, and wait until the command has it."""
    page.fill("#steps", str(count))
    page.press("#steps", "Tab")
    page.wait_for_function(f"window.studio.plan?.commands[0]?.includes('--steps {count} ')")


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    output = tempfile.mkdtemp(prefix="studio-")
    server, url = start(args.model, output)
    with sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS).new_page(bypass_csp=True)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for load in ("first", "second"):
            page.goto(url)
            page.wait_for_selector("#fill:enabled", timeout=60_000)
            usable = page.evaluate("performance.now()")
            paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            print(f"{load} load: first contentful paint {paint:.0f} ms, usable after {usable:.0f} ms")
        steps(page, 1000)
        for _ in range(3):
            page.click("#fill")
            page.wait_for_function("[...window.studio.jobs.values()].at(-1).step[0] > 3", timeout=60_000)
            first = page.evaluate("[...window.studio.jobs.values()].at(-1)")
            began = time.perf_counter()
            page.keyboard.press("Escape")
            page.wait_for_function(IDLE)
            took = 1000 * (time.perf_counter() - began)
            last = page.evaluate("[...window.studio.jobs.values()].at(-1)")
            pace = 1000 * last["seconds"] / max(1, last["step"][0])
            print(f"Esc at step {first['step'][0]} or later: over after {took:.0f} ms; a step takes {pace:.0f} ms")
        steps(page, args.steps)
        for number in range(20 + args.requests):
            if number in (20, 20 + args.requests // 2):
                print(f"after {number} requests: {memory(server):.1f} MB")
            before = page.evaluate("window.studio.versions[0]?.number ?? 0")
            page.click("#fill")
            page.wait_for_function(f"window.studio.versions[0]?.number > {before} && {IDLE}", timeout=60_000)
        print(f"after {20 + args.requests} requests: {memory(server):.1f} MB")
        elsewhere = [one for one in asked if not one.startswith((url, "data:", "blob:"))]
        print(f"{len(asked)} requests of the page, {len(elsewhere)} to other hosts")
        steps(page, 1000)
        page.click("#fill")
        page.wait_for_function("[...window.studio.jobs.values()].at(-1).step[0] > 3", timeout=60_000)
        server.send_signal(signal.SIGKILL)
        server.wait()
        page.wait_for_selector("#banner:visible")
        print(f"killed: {page.inner_text('#banner')}")
        server, _ = start(args.model, output, int(url.rstrip("/").rpartition(":")[2]))
        page.wait_for_selector("#again", timeout=60_000)
        print(f"started again: {page.inner_text('#banner')}")
        server.terminate()
        server.wait(30)
    shutil.rmtree(output)


if __name__ == "__main__":
    main()
