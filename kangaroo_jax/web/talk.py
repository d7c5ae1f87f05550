"""What the page does when something is done on it: generators of what changes, without a word of Gradio."""

import dataclasses
import functools
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kangaroo_jax.data.media.decode import Decoder
from kangaroo_jax.errors import UserError
from kangaroo_jax.web import drawing
from kangaroo_jax.web.asking import Answering, Medium, Model, Settings, Told, Turn
from kangaroo_jax.web.examples import KINDS, make_clip
from kangaroo_jax.web.sessions import Session, Sessions, Shown
from kangaroo_jax.web.texts import LANGUAGES, texts
from kangaroo_jax.web.thumbnails import thumbnails

log = logging.getLogger(__name__)
_TICK = 0.1  # seconds between two looks at how far a medium is seen
_PAUSE = 0.04  # at least, between two states of an answer on the page
_LONGEST_QUESTION = 8000  # characters
_WATCHED = 16  # films at a time


@dataclasses.dataclass(frozen=True)
class View:
    """What changes on the page; None stays as it is."""

    chat: list[dict[str, str]] | None = None
    stage: str | None = None
    progress: str | None = None
    note: str | None = None
    alert: str | None = None
    question: str | None = None
    busy: bool | None = None


def told_to_the_page(action: Callable[..., Iterator[View]]) -> Callable[..., Iterator[View]]:
    """Errors of an action become one line on the page."""

    @functools.wraps(action)
    def wrapped(self: "Talk", *args: Any) -> Iterator[View]:
        try:
            yield from action(self, *args)
        except UserError as error:
            yield View(alert=drawing.alert(str(error)), progress="", busy=False)
        except Exception:
            log.exception("an error of the page")
            language = next((arg.language for arg in args if isinstance(arg, Session)), "en")
            yield View(alert=drawing.alert(texts(language).fault), progress="", busy=False)

    return wrapped


class Talk:
    """Actions of the page."""

    def __init__(self, model: Model, decoder: Decoder, sessions: Sessions) -> None:
        """`decoder` makes the pictures of the strip; it is its maker's to close."""
        self.model, self.sessions, self._decoder = model, sessions, decoder
        self._threads = ThreadPoolExecutor(_WATCHED, thread_name_prefix="watch")

    def close(self) -> None:
        """Send everybody away, and end threads."""
        self.sessions.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def settings(self, frames: Any, temperature: Any, seed: Any) -> Settings:
        """Settings as the page sends them. Raises UserError."""
        return Settings.given(frames, temperature, seed, self.model.most_frames)

    # ------------------------------------------------------------------------------- actions

    def speak(self, session: Session, language: str) -> View:
        """The page in another language."""
        session.language = language if language in LANGUAGES else "en"
        return View(chat=chat_of(session), stage=drawing.stage(session), alert="", note="")

    @told_to_the_page
    def watch(self, session: Session, *given: Any) -> Iterator[View]:
        """Look at what has been shown and not been asked about yet; `given` are settings."""
        yield View(alert="")
        with session.lock:
            shown, turns = list(session.shown), list(session.turns)
            waiting = tuple(session.waiting)
        settings = self.settings(*given)
        while shown:
            asked = [*turns, Turn("user", waiting)] if waiting else turns[:-1]  # without its answer
            try:
                yield from self._watched(session, shown, asked, settings)
                return
            except UserError as error:
                bad = [medium for medium in waiting if medium.name in str(error)]
                if not bad:  # no file's fault
                    raise
                for medium in bad:
                    session.drop(medium)
                shown = [one for one in shown if one.medium not in bad]
                waiting = tuple(medium for medium in waiting if medium not in bad)
                yield View(stage=drawing.stage(session), progress="", alert=drawing.alert(str(error)))
            if not waiting:
                return

    @told_to_the_page
    def example(self, session: Session, kind: str, *given: Any) -> Iterator[View]:
        """Begin a conversation about a clip that is made now."""
        if kind not in KINDS:
            raise UserError(f"there is no example {kind!r}")
        yield from self.forget(session)
        with session.receiving(f"{session.texts.example_names[kind]}.mp4") as receiver:
            path = self.sessions.folder / f"{session.token}.mp4"
            try:
                make_clip(kind, random.randrange(2**32), path)
                receiver.write(path.read_bytes())
            finally:
                path.unlink(missing_ok=True)
        yield View(stage=drawing.stage(session))
        yield from self.watch(session, *given)

    @told_to_the_page
    def ask(self, session: Session, question: Any, *given: Any) -> Iterator[View]:
        """Answer a question as the answer comes."""
        text = question.strip()[:_LONGEST_QUESTION] if isinstance(question, str) else ""
        if not text:
            return
        settings = self.settings(*given)
        with session.asking():
            with session.lock:
                turn = Turn("user", (*session.waiting, text))
                asked = [*session.turns, turn]
                session.partial = [("user", said(turn))]
            yield View(chat=chat_of(session), question="", alert="", note="", busy=True)
            try:
                yield from self._answered(session, asked, settings)
            except UserError:
                session.partial = []
                yield View(chat=chat_of(session), question=text)
                raise

    def stop(self, session: Session) -> None:
        """The answer, or the look at a film, is not wanted to its end."""
        session.stop()

    def forget(self, session: Session) -> Iterator[View]:
        """A new conversation."""
        session.forget()
        yield View(chat=[], stage=drawing.stage(session), progress="", note="", alert="", busy=False)

    # ------------------------------------------------------------------------------- how

    def _watched(
        self, session: Session, shown: Sequence[Shown], asked: Sequence[Turn], settings: Settings
    ) -> Iterator[View]:
        yield View(progress=drawing.watching(session, shown, None))
        answering = self.model.ask(asked, settings, session.salt, silent=True)
        with session.under_way(answering):
            if answering.planned:
                self._note_frames(shown, answering.planned)
                yield View(stage=drawing.stage(session), progress=drawing.watching(session, shown, answering.seen()))
            reading = self._threads.submit(lambda: list(answering.pieces()))
            yield from self._progress(session, shown, answering, reading)
            reading.result()
            told = answering.told()
        if told.finish_reason != "cancelled":
            self._note_frames(shown, told.seconds)
        yield View(stage=drawing.stage(session), progress="")

    def _progress(
        self, session: Session, shown: Sequence[Shown], answering: Answering, reading: "Future[list[str]]"
    ) -> Iterator[View]:
        last = ""
        while not reading.done():
            time.sleep(_TICK)
            session.used = time.monotonic()
            now = drawing.watching(session, shown, answering.seen())
            if now != last and not reading.done():
                last = now
                yield View(progress=now)

    def _note_frames(self, shown: Sequence[Shown], seconds: Sequence[Sequence[float]]) -> None:
        """Make the pictures of the frames of each medium, where they are not there."""
        for one, times in zip(shown, seconds, strict=False):
            wanted = tuple(times)
            if wanted != one.seconds and one.medium.kind == "video":
                one.thumbnails = self._pictures(one.medium, wanted) if wanted else ()
                one.seconds = wanted

    def _pictures(self, medium: Medium, seconds: tuple[float, ...]) -> tuple[str, ...]:
        try:
            return thumbnails(self._decoder, medium, seconds)
        except UserError as error:  # the model may see what the page cannot show
            log.warning("no pictures of frames: %s", error)
            return ()

    def _answered(self, session: Session, asked: list[Turn], settings: Settings) -> Iterator[View]:
        answering = self.model.ask(asked, settings, session.salt)
        text, due, role_text = "", 0.0, session.partial[0]
        with session.under_way(answering):
            for piece in answering.pieces():
                text += piece
                session.used = now = time.monotonic()
                if now >= due:
                    due = now + _PAUSE
                    session.partial = [role_text, ("assistant", text)]
                    yield View(chat=chat_of(session))
            told = answering.told()
        if not text and told.finish_reason == "cancelled":  # as if nothing had been asked
            session.partial = []
            yield View(chat=chat_of(session), question=asked[-1].parts[-1], busy=False)  # type: ignore[arg-type]
            return
        self._keep(session, asked, text.strip(), told)
        yield View(
            chat=chat_of(session),
            stage=drawing.stage(session),
            note=drawing.note(session.texts, told),
            busy=False,
        )

    def _keep(self, session: Session, asked: list[Turn], text: str, told: Told) -> None:
        """Put a round into the conversation, unless that was forgotten meanwhile."""
        media = [medium for turn in asked for medium in turn.media]
        with session.lock:
            session.partial = []
            if session.turns != asked[:-1] or not _are_there(media, session.shown):
                return
            session.turns = [*asked, Turn("assistant", (text,))]
            session.waiting = [medium for medium in session.waiting if medium not in asked[-1].media]
            if told.finish_reason in ("cancelled", "length"):
                session.endings[len(session.turns) - 1] = told.finish_reason
            shown = [one for one in session.shown if one.medium in media]
        if told.finish_reason != "cancelled":
            self._note_frames(shown, told.seconds)


def _are_there(media: Sequence[Medium], shown: Sequence[Shown]) -> bool:
    return all(any(one.medium is medium for one in shown) for medium in media)


def said(turn: Turn) -> str:
    """A turn as it stands on the page."""
    return "\n".join(f"▸ {part.name}" if isinstance(part, Medium) else part for part in turn.parts)


def chat_of(session: Session) -> list[dict[str, str]]:
    """The conversation as it stands on the page."""
    words = session.texts
    endings = {"cancelled": words.stopped, "length": words.cut_short}
    with session.lock:
        spoken = [(turn.role, said(turn) or words.no_answer * (turn.role == "assistant")) for turn in session.turns]
        for place, reason in session.endings.items():
            role, text = spoken[place]
            spoken[place] = role, f"{text} {endings[reason]}"
        return [{"role": role, "content": text} for role, text in (*spoken, *session.partial)]
