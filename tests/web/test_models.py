"""The page's questions reach an engine in this process, and a server, as the same prompt."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.requests import EngineError
from kangaroo_jax.serving.limits import Limits
from kangaroo_jax.web.asking import Medium, Settings, Turn
from kangaroo_jax.web.local import LocalModel
from tests.serving.conftest import start, tokenizer, tokenizer_file  # noqa: F401
from tests.serving.fake import FakeEngine, fake_backend


def medium(path: Path, kind: str = "video") -> Medium:
    data = path.read_bytes()
    return Medium(kind, path, path.name, hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def model(engine, tokenizer, make_micro_config) -> LocalModel:  # noqa: F811
    return LocalModel(fake_backend(engine, tokenizer, make_micro_config().data, Limits()), "micro")


def talk_of(films: Path) -> list[Turn]:
    shown = (medium(films / "photo.png", "image"), medium(films / "a.mp4"), "What is <video>?")
    return [Turn("user", shown), Turn("assistant", ("A ring.",)), Turn("user", ("然后呢？",))]


def test_an_answer_of_the_engine(model, engine, films):
    answering = model.ask(talk_of(films), Settings(4, 0.5, 7), "salt")
    assert [len(times) for times in answering.planned] == [2, 4] and model.most_frames == 8
    assert "".join(answering.pieces()) == "Hello 世界"
    told = answering.told()
    assert told.finish_reason == "stop" and told.new_tokens == 3 and told.cached_tokens == 3
    assert told.seconds == answering.planned and answering.seen() == ()
    request = engine.tickets[0].request
    assert (request.sampling.temperature, request.sampling.seed, request.max_new_tokens) == (0.5, 7, 512)
    silent = model.ask(talk_of(films)[:1], Settings(), "salt", silent=True)
    assert list(silent.pieces()) == [] and engine.tickets[1].request.max_new_tokens == 1


def test_what_is_remembered_is_one_pages_own(model, engine, films):
    for salt in ("one", "one", "other"):
        model.ask(talk_of(films)[:1], Settings(), salt)
    spaces = [ticket.request.namespace for ticket in engine.tickets]
    assert spaces[0] == spaces[1] != spaces[2] and all(len(space) == 32 for space in spaces)


def test_errors_name_files_as_their_user_knows_them(model, engine, films, tmp_path):
    bad = Medium("video", films / "no.mp4", "my film.mp4", "0", 1)
    with pytest.raises(UserError, match="my film.mp4") as caught:
        model.ask([Turn("user", (bad, "What?"))], Settings(), "")
    assert str(films) not in str(caught.value)
    engine.error = UserError(f"{films / 'a.mp4'}: the decoder crashed on this file")
    with pytest.raises(UserError, match=r"^a.mp4: the decoder crashed"):
        list(model.ask(talk_of(films)[:1], Settings(), "").pieces())
    engine.error = EngineError("lost")
    with pytest.raises(UserError, match="the model failed on this question"):
        list(model.ask(talk_of(films)[:1], Settings(), "").pieces())


def test_a_cancelled_answer_of_the_engine(model, engine, films):
    engine.go.clear()
    answering = model.ask(talk_of(films)[:1], Settings(), "")
    answering.cancel()
    assert list(answering.pieces()) == [] and answering.told().finish_reason == "cancelled"


# ------------------------------------------------------------------------------------ a server


@pytest.fixture
def remote(start: Callable, engine: FakeEngine):  # noqa: F811
    pytest.importorskip("openai")
    from kangaroo_jax.web.remote import RemoteModel

    server = start(engine=engine)
    return RemoteModel(server.url), server


def test_an_answer_of_a_server_is_of_the_same_prompt(model, remote, engine, films):
    there, _ = remote
    assert there.name == "kangaroo"
    answering = there.ask(talk_of(films), Settings(4, 0.5, 7), "salt")
    assert "".join(answering.pieces()) == "Hello 世界" and answering.seen() is None
    told = answering.told()
    assert told.finish_reason == "stop" and told.new_tokens == 3 and told.first_token == 0.01
    assert [len(times) for times in told.seconds] == [0, 4]  # of an image there is none
    model.ask(talk_of(films), Settings(4, 0.5, 7), "salt")
    first, second = (ticket.request for ticket in engine.tickets)
    assert first.tokens.tolist() == second.tokens.tolist() and first.sampling == second.sampling
    assert [ref.times for ref in first.media] == [ref.times for ref in second.media]


def test_a_film_is_sent_to_a_server_once(remote, films):
    there, server = remote
    sent: list[int] = []
    create = there._client.chat.completions.create

    def counting(*, messages, **options):
        sent.append(len(str(messages)))
        return create(messages=messages, **options)

    there._client.chat.completions.create = counting
    assert list(there.ask(talk_of(films)[:1], Settings(), "one", silent=True).pieces()) == []
    assert "".join(there.ask(talk_of(films), Settings(), "one").pieces())
    assert sent[1] < 1000 < sent[0]
    server.service.store.close()  # the server has forgotten: it is sent again
    assert "".join(there.ask(talk_of(films), Settings(), "one").pieces()) and len(sent) == 4 and sent[3] > 1000
    assert "".join(there.ask(talk_of(films), Settings(), "other").pieces()) and sent[4] > 1000


def test_what_a_server_says_is_one_line(remote, films):
    from kangaroo_jax.web.remote import RemoteModel

    there, server = remote
    with pytest.raises(UserError, match=r"the server says: no\.mp4: .* \(400\)"):
        there.ask([Turn("user", (medium(films / "no.mp4"), "What?"))], Settings(), "")
    with pytest.raises(UserError, match="cannot be reached"):
        RemoteModel("http://127.0.0.1:1/v1")
    server.service.backend = None
    with pytest.raises(UserError, match=r"the model is not ready.*\(503\)"):
        there.ask([Turn("user", ("What?",))], Settings(), "")


def test_an_answer_of_a_server_is_left_when_it_is_not_wanted(remote, engine, films):
    there, server = remote
    engine.pieces, engine.pause = ("a",) * 200, 0.02
    answering = there.ask([Turn("user", ("What?",))], Settings(), "")
    pieces = answering.pieces()
    assert next(pieces) == "a"
    answering.cancel()
    assert len(list(pieces)) < 5 and answering.told().finish_reason == "cancelled"


def test_a_key_is_asked_for(start):  # noqa: F811
    pytest.importorskip("openai")
    from kangaroo_jax.web.remote import RemoteModel

    server = start(keys=("word",))
    with pytest.raises(UserError, match=r"\(401\)"):
        RemoteModel(server.url)
    assert "".join(RemoteModel(server.url, "word").ask([Turn("user", ("Hi",))], Settings(), "").pieces())
