"""A model in this process: the engine and the decoding processes of `serving`, without its HTTP."""

import hashlib
from collections.abc import Iterator, Sequence

from kangaroo_jax.data.annotations.conversation import Media
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.requests import EngineError, Request, Ticket, Usage
from kangaroo_jax.inference.sampling import Sampling
from kangaroo_jax.serving.backend import Backend
from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.prompts import without_paths
from kangaroo_jax.serving.protocol import FrameWishes, MediaPart, Message, Prompt
from kangaroo_jax.web.asking import MOST_TOKENS, Medium, Settings, Told, Turn

TOP_P = 0.9


class LocalModel:
    """Answers through an engine. It is the owner of its backend."""

    def __init__(self, backend: Backend, name: str) -> None:
        self.name, self._backend = name, backend
        policy = backend.prompts.policy
        self.most_frames = max(policy.max_frames, policy.long_max_frames)

    def ask(self, turns: Sequence[Turn], settings: Settings, salt: str, *, silent: bool = False) -> "LocalAnswer":
        """See `Model`."""
        media = [medium for turn in turns for medium in turn.media]
        names = {str(medium.path): medium.name for medium in media}
        prompt = Prompt(
            model=None,
            messages=tuple(_message(turn) for turn in turns),
            frames=FrameWishes(nframes=settings.frames or None),
            add_generation_prompt=True,
            continue_final_message=False,
            cache_salt="",
            unknown=(),
        )
        found = [(Media(medium.kind, str(medium.path)), ()) for medium in media]
        try:
            recipe = self._backend.prompts.render(prompt, found, names).recipe
            request = Request(
                tokens=recipe.tokens,
                is_vision=recipe.is_vision,
                media=recipe.media,
                max_new_tokens=1 if silent else MOST_TOKENS,
                sampling=Sampling(settings.temperature, TOP_P, seed=settings.seed),
                stop_ids=self._backend.tokenizer.stop_ids,
                namespace=hashlib.sha256(b"kangaroo page 1\0" + salt.encode()).digest(),
            )
            return LocalAnswer(self._backend.engine.submit(request), names, silent)
        except UserError as error:
            raise UserError(without_paths(error, names).message) from None
        except ApiError as error:
            raise UserError(error.message) from None
        except EngineError as error:
            raise UserError(f"the model takes no questions any more: {error}") from None

    def close(self) -> None:
        """See `Model`."""
        self._backend.close()


class LocalAnswer:
    """See `Answering`."""

    def __init__(self, ticket: Ticket, names: dict[str, str], silent: bool) -> None:
        self._ticket, self._names, self._silent = ticket, names, silent

    @property
    def planned(self) -> tuple[tuple[float, ...], ...]:
        """See `Answering`."""
        return tuple(ref.times for ref in self._ticket.request.media)

    def seen(self) -> tuple[float, ...]:
        """See `Answering`."""
        return self._ticket.seen

    def pieces(self) -> Iterator[str]:
        """See `Answering`."""
        try:
            for event in self._ticket:
                if event.text and not self._silent:
                    yield event.text
        except UserError as error:
            raise UserError(without_paths(error, self._names).message) from None
        except EngineError as error:
            raise UserError(f"the model failed on this question: {error}") from None
        finally:
            self.cancel()

    def told(self) -> Told:
        """See `Answering`."""
        answer = self._ticket.result()
        return told_of(answer.usage, answer.finish_reason)

    def cancel(self) -> None:
        """See `Answering`."""
        if not self._ticket.done:
            self._ticket.cancel()


def told_of(usage: Usage, finish_reason: str) -> Told:
    """What the page tells of an answer of the engine."""
    return Told(
        finish_reason=finish_reason,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        new_tokens=usage.completion_tokens,
        frames_encoded=usage.frames_encoded,
        frames_reused=usage.frames_reused,
        first_token=usage.first_token,
        total=usage.total,
        seconds=usage.frame_times,
    )


def _message(turn: Turn) -> Message:
    parts = [MediaPart(part.kind, part.name) if isinstance(part, Medium) else part for part in turn.parts]
    return Message(turn.role, tuple(parts))
