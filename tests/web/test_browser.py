"""The page in a browser: headless Chromium, where there is one."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kangaroo_jax.data.media.decode import ThreadDecoder
from kangaroo_jax.serving.folder import WorkFolder
from kangaroo_jax.serving.store import MediaStore
from kangaroo_jax.web.sessions import Bounds, Sessions
from kangaroo_jax.web.talk import Talk
from tests.web.conftest import Shown, files_in, showing
from tests.web.fake import FakeModel

pytestmark = pytest.mark.slow
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    pytest.importorskip("gradio")
    decoder = ThreadDecoder(2)
    with WorkFolder(tmp_path_factory.mktemp("work")) as folder:
        sessions = Sessions(lambda limits: MediaStore(folder, limits), Bounds(max_upload_mb=1))
        with showing(Talk(FakeModel(), decoder, sessions)) as shown:
            yield shown
    decoder.close()


@pytest.fixture
def visit(browser: Any, page: Shown) -> Iterator[Callable[..., "User"]]:
    """Opens the page in a browser's language."""
    users = []

    def open_page(language: str = "en-US") -> "User":
        users.append(User(browser, page, language))
        return users[-1]

    yield open_page
    for user in users:
        user.context.close()


class User:
    """A person at the page."""

    def __init__(self, browser: Any, page: Shown, language: str) -> None:
        self.context = browser.new_context(locale=language, viewport={"width": 1280, "height": 860})
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(90_000)
        self.elsewhere: list[str] = []
        self.faults: list[str] = []
        own = (page.url, "data:", f"blob:{page.url}")
        self.tab.on("request", lambda r: None if r.url.startswith(own) else self.elsewhere.append(r.url))
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.goto(page.url)
        self.tab.wait_for_selector(".k-drop")

    def show(self, *files: Path) -> None:
        self.tab.set_input_files(".k-drop input", [str(file) for file in files])

    def ask(self, question: str) -> None:
        self.tab.fill("#k-question textarea", question)
        self.tab.press("#k-question textarea", "Enter")

    def wait(self, said: str) -> None:
        """Until the last answer has these words."""
        self.tab.locator("#k-chat .bot", has_text=said).last.wait_for()

    def spoken(self, side: str) -> list[str]:
        return [text.strip() for text in self.tab.locator(f"#k-chat .message.{side}").all_inner_texts()]


def test_a_film_is_shown_and_talked_about(visit, page, films):
    user = visit()
    user.show(films / "a.mp4")
    user.tab.wait_for_selector(".k-strip figure")
    assert user.tab.locator(".k-strip figcaption").all_inner_texts() == ["0:00", "0:01", "0:02", "0:03"]
    assert user.tab.locator(".k-card header").inner_text().split("\n")[0] == "a.mp4"
    user.tab.locator(".k-strip figure").nth(2).click()
    user.tab.wait_for_function("document.querySelector('.k-card video').currentTime > 1.9")
    user.ask("What comes first?")
    user.tab.wait_for_function("document.querySelector('#k-note .k-note')")
    assert "4 frames remembered, none watched again" in user.tab.inner_text("#k-note")
    user.ask("最后出现什么？")
    user.tab.wait_for_function("document.querySelectorAll('#k-chat .message.bot').length == 2")
    user.wait("红色的环")
    assert user.spoken("user") == ["▸ a.mp4\nWhat comes first?", "最后出现什么？"]
    assert user.spoken("bot") == ["A red ring — 红色的环。"] * 2
    assert user.tab.locator("#k-question textarea").input_value() == ""
    assert user.elsewhere == [] and user.faults == []
    user.tab.click("#k-anew")
    user.tab.wait_for_selector(".k-empty")
    assert user.spoken("user") == [] and files_in(page.talk) == 0


def test_frames_are_pale_until_they_are_seen(visit, page, films):
    page.model.go.clear()
    try:
        user = visit()
        user.show(films / "b.mp4")
        user.tab.locator(".k-watch", has_text="2 of 4 frames").wait_for()
        shown = "[...document.querySelectorAll('.k-strip figure')].map((one) => getComputedStyle(one).opacity).join()"
        user.tab.wait_for_function(f"{shown} == '1,1,0.3,0.3'")
        page.model.go.set()
        user.tab.wait_for_function(f"!document.querySelector('.k-watch') && {shown} == '1,1,1,1'")
    finally:
        page.model.go.set()
    assert user.faults == []


def test_the_page_is_chinese_for_a_chinese_browser_and_by_its_switch(visit, page):
    user = visit("zh-CN")
    user.tab.get_by_text("把视频或图片拖到这里，或点击选择").wait_for()
    user.tab.click("#k-example-order")
    user.tab.wait_for_selector(".k-strip figure")
    assert "先后出现.mp4" in user.tab.inner_text(".k-card header")
    user.tab.get_by_role("button", name="最先出现什么？").click()
    user.tab.wait_for_function("document.querySelector('#k-note .k-note')")
    assert "记得 4 帧，没有重看" in user.tab.inner_text("#k-note")
    user.tab.locator(".k-language label", has_text="English").click()
    user.tab.get_by_text("Drop a video or images here, or click to choose").wait_for()
    assert user.spoken("user")[0].endswith("最先出现什么？") and user.faults == []


def test_mistakes_are_a_line_on_the_page_and_stop_ends_an_answer(visit, page, films, tmp_path):
    user = visit()
    user.show(films / "no.mp4")
    user.tab.locator("#k-alert .k-alert", has_text="no.mp4: no video").wait_for()
    (tmp_path / "big.mp4").write_bytes(bytes(2 << 20))
    (tmp_path / "empty.mp4").write_bytes(b"")
    user.show(tmp_path / "big.mp4", tmp_path / "empty.mp4")
    user.tab.locator(".k-drop .k-alert", has_text="big.mp4: larger than 1 MB").wait_for()
    user.tab.locator(".k-drop .k-alert", has_text="empty.mp4: the file is empty").wait_for()
    page.model.go.clear()
    try:
        user.ask("What?")
        user.tab.locator("#k-question .stop-button").click()
        user.tab.locator("#k-question .submit-button").wait_for()
        assert user.tab.locator("#k-question textarea").input_value() == "What?"  # nothing came: it may be asked again
    finally:
        page.model.go.set()
    assert user.faults == []


def test_files_go_with_the_tab(visit, page, films):
    user = visit()
    user.show(films / "b.mp4")
    user.tab.wait_for_selector(".k-strip figure")
    held = files_in(page.talk)
    user.context.close()
    end = time.monotonic() + 30
    while files_in(page.talk) >= held and time.monotonic() < end:
        time.sleep(0.1)
    assert files_in(page.talk) < held
