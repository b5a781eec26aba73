"""The page in a real browser, served by the real command."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from urllib.parse import urlsplit

import psutil
import pytest
import torch
from pictures import BAD, ODD, digit, on_paper
from test_rooms import SOURCES

from noprop_dist import Card, NoPropModel, demo
from noprop_dist.trained import load
from noprop_dist.viewing import MOMENTS

pytest.importorskip("gradio", reason="no gradio: pip install 'noprop_dist[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browsed = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
PATIENCE = 60_000  # milliseconds: of a page, on a busy machine
LOOPBACK = ("127.0.0.1", "localhost", "::1")
WATCHMAN = f"""
import os, sys
def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in {LOOPBACK}:
        print(event, arguments[1], file=open(os.environ["WATCHED"], "a"))
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "", *{LOOPBACK}):
        print(event, arguments[0], file=open(os.environ["WATCHED"], "a"))
sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The file where a started page's process leaves whom else it asked."""
    home = tmp_path_factory.mktemp("watched")
    (home / "sitecustomize.py").write_text(WATCHMAN)
    return home / "asked.txt"


@contextmanager
def serve(watched, *argv):
    """A page's process and address, in an environment that would send others out into the world."""
    lures = {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ANALYTICS_ENABLED": "True"}
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://192.0.2.1:9")
    path = os.pathsep.join([str(watched.parent), *filter(None, sys.path)])
    environment = os.environ | lures | proxies | {"WATCHED": str(watched), "PYTHONPATH": path}
    command = [sys.executable, "-m", "noprop_dist.demo", *argv]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, preexec_fn=heard, **pipes) as process:
        try:
            said = process.stdout.readline()
            assert said, process.stderr.read()
            yield process, re.fullmatch(r"(http://127\.0\.0\.1:\d+/)  \(Ctrl-C ends it\)\n", said)[1]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def served(watched):
    with serve(watched) as (process, url):
        yield process, url


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as player:
        started = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, served, tmp_path):
    """The page; afterwards it must have asked nobody but its own server, and shown no error of its scripts."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    asked, broken = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: broken.append(error))
    page.goto(served[1])
    yield page
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.close()
    hosts = {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"} and not broken


def draw(page, *points):
    """A stroke through these points, in shares of the paper."""
    canvas = page.locator("#paper canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for number, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def answers(page, text):
    playwright.expect(page.locator("#answer h2")).to_have_text(text, timeout=PATIENCE)


def label_so_far(page):
    """Shares of the classes, in percent."""
    return [int(text.rstrip("%")) for text in page.locator("#beliefs .bar span").all_inner_texts()]


@browsed
def test_a_drawn_digit_is_answered_and_its_label_grows_out_of_nothing(page):
    draw(page, (0.3, 0.25), (0.7, 0.25), (0.45, 0.8))
    answers(page, "7")
    blocks = page.locator("#beliefs tr:nth-child(2) th:not(:empty)")
    playwright.expect(blocks.last).to_have_class("now", timeout=PATIENCE)  # it has been played to the end
    assert blocks.all_inner_texts() == ["0", "1", "2", "3"]  # as everywhere, blocks count from 0
    end = label_so_far(page)
    assert end.index(max(end)) == 7 and end[7] > 80
    steps = page.locator("#step input[type=range]")
    steps.fill("0")
    playwright.expect(page.locator("#beliefs .now")).to_have_count(0)
    assert max(label_so_far(page)) < 20
    steps.fill("2")
    playwright.expect(blocks.nth(1)).to_have_class("now")
    assert 20 < label_so_far(page)[7] <= end[7]
    with page.expect_request(re.compile("queue/join")):
        page.get_by_role("button", name="play").click()
    playwright.expect(blocks.last).to_have_class("now", timeout=PATIENCE)
    page.get_by_role("button", name="clear").click()
    playwright.expect(page.locator("#beliefs table")).to_have_count(0)
    draw(page, (0.5, 0.2), (0.5, 0.8))
    answers(page, "1")


@browsed
def test_a_picture_file_is_answered_and_a_broken_one_told(page, tmp_path):
    BAD["cut short.png"][1](tmp_path / "cut short.png")
    ODD["CMYK.tif"][1](tmp_path / "fine.tif")
    on_paper(digit(0)).save(tmp_path / "fine.png")
    page.get_by_role("tab", name="Drop a picture").click()
    file = page.locator("#file input[type=file]")
    file.set_input_files(tmp_path / "fine.png")
    answers(page, "0")
    page.get_by_role("button", name="Remove this file").or_(page.get_by_label("Clear")).first.click()
    playwright.expect(page.locator("#beliefs table")).to_have_count(0)
    file.set_input_files(tmp_path / "cut short.png")
    told = page.get_by_role("alert").filter(has_text="cut short.png")
    playwright.expect(told).to_contain_text("cut short.png: not a readable picture (image file is truncated")
    assert "Traceback" not in page.content() and "/tmp" not in told.inner_text()
    playwright.expect(page.locator("#answer h2")).to_have_count(0)
    page.get_by_role("button", name="Remove this file").or_(page.get_by_label("Clear")).first.click()
    playwright.expect(told).to_have_count(0)
    file.set_input_files(tmp_path / "fine.tif")
    answers(page, "9")


@pytest.mark.parametrize(
    ("method", "blocks", "steps"),
    [("dt", 4, ["0", "1", "2", "3"]), ("dt", 15, [str(block) for block in range(15)]), ("ct", 2, None), ("fm", 1, None),
     ("cnn", 1, []), ("backprop", 3, [])],
)  # fmt: skip
def test_beliefs_grow_from_nothing_to_the_answer(method, blocks, steps):
    model = NoPropModel(Card(method={"name": method}, model={"blocks": blocks}), load("digits").info)
    image = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    answer = model(image[None])[0].exp().tolist()
    beliefs = demo.believe(model, image, answer)
    assert beliefs.steps == steps if steps is not None else 5 <= len(beliefs.steps) <= MOMENTS
    assert (len(beliefs.told), len(beliefs.said)) == (len(beliefs.steps) + 1, len(beliefs.steps))
    for shares in (*beliefs.told, *beliefs.said):
        assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert beliefs.told[-1] == answer
    for step in range(len(beliefs.told)):
        table = demo.draw(beliefs, model.info.classes, step)
        seen = [float(share) for share in re.findall(r"opacity: ([0-9.]+)", table)]
        assert len(seen) == 10 * len(beliefs.steps)
        assert sum(seen) == pytest.approx(step, abs=0.02), "what is not said yet is seen"
        heads = re.findall(r'<th class="(?:now)?">([^<]+)</th>', table)
        assert sum(map(len, heads)) <= demo.LETTERS + 4 and heads[:1] == beliefs.steps[:1], "names run into each other"


def test_of_many_classes_those_most_believed_in_are_drawn_and_names_are_no_html():
    names = [f"class <{number}>" for number in range(100)]
    shares = torch.arange(100.0).softmax(0).tolist()
    table = demo.draw(demo.Beliefs("by time", ["0"], [[0.01] * 100, shares], [shares]), names, 1)
    assert re.findall("class &lt;([0-9]+)&gt;", table) == [str(number) for number in range(90, 100)]


@browsed
def test_on_a_phone_nothing_hangs_over_the_edge(page):
    page.set_viewport_size({"width": 390, "height": 844})
    draw(page, (0.5, 0.2), (0.5, 0.8))
    answers(page, "1")
    playwright.expect(page.locator("#beliefs table")).to_be_visible()
    table = page.locator("#beliefs table").bounding_box()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390 and table["x"] + table["width"] <= 390


def test_gradio_is_imported_where_it_is_used_alone():
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert "gradio" not in ast.unparse(node) or not isinstance(node, ast.Import | ast.ImportFrom), path


def test_at_last_it_has_served_this_machine_alone_asked_nobody_and_ends_quietly(served, watched):
    process, _ = served
    listening = [at.laddr.ip for at in psutil.Process(process.pid).net_connections() if at.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
    assert not watched.exists(), watched.read_text()
