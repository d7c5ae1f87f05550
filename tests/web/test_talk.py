"""What the page does: films are watched as they come, talked about, kept apart from others' and removed."""

import re
import threading
import time

import pytest

from kangaroo_jax.corpus.scenes import COLOURS
from kangaroo_jax.errors import UserError
from kangaroo_jax.web import drawing
from kangaroo_jax.web.asking import Settings, Told
from kangaroo_jax.web.examples import KINDS, make_scene
from kangaroo_jax.web.sessions import shortened
from kangaroo_jax.web.talk import View
from kangaroo_jax.web.texts import EN, TEXTS, ZH, preferred
from tests.web.conftest import files_in, give
from tests.web.fake import FakeModel

GIVEN = (0, 0.0, 0)


def last(views: list[View], name: str):
    """The last state of a part of the page."""
    return next((getattr(view, name) for view in reversed(views) if getattr(view, name) is not None), None)


def test_a_film_is_watched_when_it_comes_and_not_again_for_the_questions(begin, films):
    talk = begin()
    session = talk.sessions.of("page")
    give(session, films / "a.mp4")
    views = list(talk.watch(session, *GIVEN))
    (turns, _, salt, silent) = talk.model.asked[0]
    assert silent and [m.name for m in turns[0].media] == ["a.mp4"] and salt == session.salt
    assert "Watching a.mp4" in "".join(v.progress or "" for v in views) and last(views, "progress") == ""
    strip = last(views, "stage")
    assert re.findall(r"<figcaption>(.*?)<", strip) == ["0:00", "0:01", "0:02", "0:03"]
    assert strip.count("data:image/jpeg;base64,") == 4 and "4 frames seen, 0:00 – 0:03" in strip
    first = list(talk.ask(session, "What is it?", *GIVEN))
    assert last(first, "chat") == [
        {"role": "user", "content": "▸ a.mp4\nWhat is it?"},
        {"role": "assistant", "content": "A red ring — 红色的环。"},
    ]
    assert "4 frames remembered, none watched again" in last(first, "note") and "12 ms" in last(first, "note")
    second = list(talk.ask(session, "  那么最后呢？ ", *GIVEN))
    assert last(second, "chat")[2] == {"role": "user", "content": "那么最后呢？"}
    turns, _, _, silent = talk.model.asked[-1]
    assert [turn.role for turn in turns] == ["user", "assistant", "user"] and not silent and not turns[2].media
    texts = [v.chat[-1]["content"] for v in first if v.chat and v.chat[-1]["role"] == "assistant"]
    assert texts[0] == "A red " and last(first, "busy") is False and first[0].busy is True


def test_several_media_go_with_the_next_question_and_a_bad_one_alone_is_dropped(begin, films):
    talk = begin()
    session = talk.sessions.of("page")
    for name in ("photo.png", "no.mp4", "b.mp4"):
        give(session, films / name)
    views = list(talk.watch(session, *GIVEN))
    assert "no.mp4: no video" in last(views, "alert") and files_in(talk) == 2
    assert [(m.kind, m.name) for m in session.waiting] == [("image", "photo.png"), ("video", "b.mp4")]
    assert last(views, "stage").count("<section") == 2 and "an image" in last(views, "stage")
    list(talk.ask(session, "What?", *GIVEN))
    assert [m.name for m in session.turns[0].media] == ["photo.png", "b.mp4"] and not session.waiting
    far = drawing.watching(session, session.shown, (0.25, 0.0))
    assert "Watching photo.png" in far and '[data-number="3"] figure:nth-child(n+1)' in far and "width:25%" in far
    far = drawing.watching(session, session.shown, (1.0, 0.75))
    assert "Watching b.mp4" in far and '[data-number="3"] figure:nth-child(n+4)' in far and "3 of 4 frames" in far
    list(talk.watch(session, 2, 0.0, 0))  # other settings: looked at anew, without the answer
    turns, settings, _, silent = talk.model.asked[-1]
    assert silent and len(turns) == 1 and settings == Settings(frames=2)
    assert session.shown[1].seconds == (0.0, 1.0)


def test_settings_reach_the_model_or_are_refused_in_a_line(begin):
    talk = begin()
    session = talk.sessions.of("page")
    list(talk.ask(session, "Hello", 6, 0.7, 5))
    assert talk.model.asked[-1][1] == Settings(6, 0.7, 5)
    for bad in ((65, 0, 0), (0, 2.5, 0), (0, float("nan"), 0), (0, 0, 2**32), ("x", 0, 0), (True, 0, 0), (-1, 0, 0)):
        views = list(talk.ask(session, "Hello", *bad))
        assert "must be a number from 0 to" in last(views, "alert")
    assert len(talk.model.asked) == 1


def test_an_error_gives_the_question_back_and_changes_nothing(begin, films, caplog):
    model = FakeModel()
    talk = begin(model)
    session = talk.sessions.of("page")
    model.error = UserError("the prompt has <b>9000</b> tokens")
    views = list(talk.ask(session, "What?", *GIVEN))
    assert last(views, "question") == "What?" and last(views, "chat") == [] and last(views, "busy") is False
    assert "the prompt has &lt;b&gt;9000&lt;/b&gt; tokens" in last(views, "alert")
    model.error = RuntimeError("secret detail")
    views = list(talk.ask(session, "What?", *GIVEN))
    assert EN.fault in last(views, "alert") and "secret" not in last(views, "alert") and "secret" in caplog.text
    model.error = None
    assert last(list(talk.ask(session, "What?", *GIVEN)), "alert") == "" and len(session.turns) == 2
    assert list(talk.ask(session, "   ", *GIVEN)) == [] == list(talk.ask(session, None, *GIVEN))


def test_what_is_no_files_fault_costs_no_file(begin, films):
    model = FakeModel()
    talk = begin(model)
    session = talk.sessions.of("page")
    give(session, films / "a.mp4")
    model.error = UserError("the server cannot be reached")
    assert "cannot be reached" in last(list(talk.watch(session, *GIVEN)), "alert") and len(session.waiting) == 1
    model.error = None
    assert last(list(talk.watch(session, *GIVEN)), "stage").count("<figure") == 4


def test_stop_ends_an_answer_and_what_there_is_of_it_stays(begin):
    model = FakeModel(["One ", "two ", "three"])
    talk = begin(model)
    session = talk.sessions.of("page")
    views = []
    for view in talk.ask(session, "Count", *GIVEN):
        views.append(view)
        if view.chat and view.chat[-1]["content"] == "One ":
            model.go.clear()
            busy = list(talk.ask(session, "And?", *GIVEN))
            threading.Timer(0.05, talk.stop, [session]).start()
    assert EN.still_answering in last(busy, "alert")
    assert last(views, "chat")[-1]["content"] == "One [stopped]" and session.turns[-1].parts == ("One",)
    model.go.clear()
    threading.Timer(0.05, talk.stop, [session]).start()
    views = list(talk.ask(session, "Again", *GIVEN))  # stopped before the first word: as if it had not been asked
    assert last(views, "question") == "Again" and len(session.turns) == 2


def test_a_conversation_that_is_forgotten_takes_no_answer(begin, films):
    model = FakeModel()
    talk = begin(model)
    session = talk.sessions.of("page")
    give(session, films / "a.mp4")
    answer = talk.ask(session, "What?", *GIVEN)
    assert next(view for view in answer if view.chat and view.chat[-1]["role"] == "assistant")
    assert last(list(talk.forget(session)), "chat") == []
    assert list(answer)[-1].chat == []
    assert session.turns == session.shown == session.partial == [] and files_in(talk) == 0


def test_users_share_nothing(begin, films):
    talk = begin()
    one, other = talk.sessions.of("one"), talk.sessions.of("other")
    give(one, films / "a.mp4")
    give(other, films / "a.mp4", "mine.mp4")
    assert files_in(talk) == 1  # equal bytes are one file
    for session in (one, other):
        list(talk.watch(session, *GIVEN))
    assert talk.model.asked[0][2] != talk.model.asked[1][2] and one.token != other.token
    assert talk.sessions.of("one") is one and talk.sessions.opened(one.token) is one
    talk.sessions.leave("one")
    assert one.closed and talk.sessions.opened(one.token) is None and files_in(talk) == 1
    assert EN.gone in last(list(talk.ask(one, "What?", *GIVEN)), "alert")
    assert list(talk.ask(other, "What?", *GIVEN))[-1].chat[0]["content"] == "▸ mine.mp4\nWhat?"
    talk.sessions.leave("other")
    assert files_in(talk) == 0


def test_a_page_that_goes_ends_its_answer(begin):
    model = FakeModel()
    model.go.clear()
    talk = begin(model)
    session = talk.sessions.of("page")
    asking = threading.Thread(target=lambda: list(talk.ask(session, "What?", *GIVEN)))
    asking.start()
    while not model.answers:
        time.sleep(0.01)
    talk.sessions.leave("page")
    asking.join(5)
    assert not asking.is_alive() and model.answers[0].cancelled


def test_what_users_bring_is_bounded(begin, films):
    talk = begin(max_upload_mb=1, max_folder_mb=1, max_files=2, max_sessions=2)
    session = talk.sessions.of("page")
    with pytest.raises(UserError, match="big.mp4: larger than 1 MB"), session.receiving("big.mp4") as receiver:
        for _ in range(5):
            receiver.write(bytes(300_000))
    with pytest.raises(UserError, match="empty.mp4: the file is empty"), session.receiving("empty.mp4"):
        pass
    assert files_in(talk) == 0 and not session.shown
    with session.receiving("half.mp4") as receiver:
        receiver.write(bytes(700_000))
    other = talk.sessions.of("other")
    with pytest.raises(UserError, match="folder of media is full"), other.receiving("x.mp4") as receiver:
        receiver.write(bytes(700_000))
    give(session, films / "a.mp4")
    with pytest.raises(UserError, match="b.mp4: a conversation has at most 2 files"):
        give(session, films / "b.mp4")
    talk.sessions.of("third")  # the longest unused gives way
    assert session.closed and not other.closed and files_in(talk) == 0
    give(other, films / "a.mp4")  # and its room is free again
    with pytest.raises(UserError, match="load it again"):
        talk.sessions.of(None)


def test_a_file_that_is_being_sent_stays_until_then(begin, films):
    talk = begin()
    session = talk.sessions.of("page")
    give(session, films / "a.mp4")
    shown, release = session.held(1)
    talk.sessions.leave("page")
    assert shown.medium.path.read_bytes() == (films / "a.mp4").read_bytes()
    release()
    assert files_in(talk) == 0 and session.held(1) is None


def test_pages_that_nobody_uses_are_forgotten(begin, films, monkeypatch):
    talk = begin(max_idle_minutes=1.0)
    session = talk.sessions.of("page")
    give(session, films / "a.mp4")
    assert talk.sessions.sweep() == 0
    session.used -= 61
    assert talk.sessions.sweep() == 1 and session.closed and files_in(talk) == 0


def test_a_full_disk_is_one_line(begin, films, monkeypatch):
    talk = begin()
    session = talk.sessions.of("page")
    with pytest.raises(UserError, match="a.mp4: the file cannot be stored"), session.receiving("a.mp4") as receiver:
        receiver.write(b"1234")
        raise OSError(28, "No space left on device")
    assert files_in(talk) == 0 and talk.sessions._store.written == 0


def test_example_clips_are_made_on_the_spot(begin):
    talk = begin()
    session = talk.sessions.of("page")
    views = list(talk.example(session, "order", *GIVEN))
    assert [m.name for m in session.waiting] == ["One after another.mp4"] and files_in(talk) == 1
    assert last(views, "stage").count("<figure") == 4 and talk.model.asked[0][3]
    list(talk.example(session, "count", *GIVEN))  # begins anew
    assert len(session.shown) == 1 and files_in(talk) == 1
    assert "no example" in last(list(talk.example(session, "../x", *GIVEN)), "alert")
    for kind in KINDS:
        scene = make_scene(kind, 3)
        assert scene == make_scene(kind, 3) != make_scene(kind, 4) and scene.seconds >= 6
        assert all(event.thing.colour in COLOURS for event in scene.events)


def test_example_clips_need_no_digits(begin, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind in KINDS:
        assert all(event.thing.scan < 0 for event in make_scene(kind, 1).events)


def test_the_page_speaks_two_languages(begin, films):
    assert [
        preferred(text) for text in ("zh-CN,zh;q=0.9,en;q=0.8", "en-US", "fr, zh;q=0.2, en;q=0.1", "", "x;q=y")
    ] == [*("zh", "en", "zh", "en", "en")]
    talk = begin()
    session = talk.sessions.of("page")
    assert ZH.nothing_shown in talk.speak(session, "zh").stage and session.language == "zh"
    give(session, films / "a.mp4")
    assert "正在观看 a.mp4" in "".join(v.progress or "" for v in talk.watch(session, *GIVEN))
    views = list(talk.ask(session, "最后出现什么？", *GIVEN))
    assert "记得 4 帧，没有重看" in last(views, "note")
    assert talk.speak(session, "xx").stage == drawing.stage(session) and session.language == "en"
    for name in vars(EN):
        ours, theirs = getattr(EN, name), getattr(ZH, name)
        filled = re.findall(r"\{\w+\}", str(ours).replace("{s}", ""))  # Chinese has no plural
        assert sorted(filled) == sorted(re.findall(r"\{\w+\}", str(theirs))), name
        assert type(ours) is type(theirs) and len(ours) > 0 < len(theirs)
    assert len({len(words.suggestions) for words in TEXTS.values()}) == 1


def test_a_film_without_pictures_is_talked_about_all_the_same(begin, films):
    talk = begin()
    session = talk.sessions.of("page")
    give(session, films / "a.mp4")
    views = list(talk.watch(session, 9, 0.0, 0))  # seconds that the film does not have
    assert "9 frames seen" in last(views, "stage") and "<figure" not in last(views, "stage")
    assert last(views, "alert") == "" and session.waiting


def test_names_and_times_for_eyes(begin, films):
    assert [drawing.clock(t) for t in (0, 7.04, 7.5, 59.96, 61, 3723.2)] == [
        *("0:00", "0:07", "0:07.5", "1:00", "1:01", "1:02:03.2")
    ]
    assert shortened("../../etc/a\n.mp4") == "a\\n.mp4" and shortened("C:\\x\\y.mp4") == "y.mp4" == shortened("y.mp4 ")
    assert len(shortened("ü" * 300 + ".mp4")) <= 60 and shortened("..") and shortened("") == "file"
    talk = begin()
    session = talk.sessions.of("page")
    give(session, films / "photo.png", "<img src=x onerror=alert(1)>.png")
    list(talk.watch(session, *GIVEN))
    assert "<img src=x" not in drawing.stage(session) and "&lt;img src=x" in drawing.stage(session)
    assert drawing.note(EN, Told(first_token=2.31, new_tokens=4, frames_encoded=9)).count("9 frames watched") == 1
    assert "1 frame watched" in drawing.note(EN, Told(first_token=2.31, new_tokens=4, frames_encoded=1))
    assert "1 frame remembered" in drawing.note(EN, Told(first_token=2.31, new_tokens=4, frames_reused=1))


def test_frames_are_shown_without_the_bars_that_made_them_square(films):
    import numpy as np

    from kangaroo_jax.web.thumbnails import _without_bars

    pixels = np.zeros((2, 12, 12, 3), np.uint8)
    pixels[:, 3:9] = 9
    assert _without_bars(pixels).shape == (2, 6, 12, 3)
    assert _without_bars(pixels.transpose(0, 2, 1, 3)).shape == (2, 12, 6, 3)
    assert _without_bars(pixels * 0).shape == _without_bars(pixels * 0 + 1).shape == (2, 12, 12, 3)
