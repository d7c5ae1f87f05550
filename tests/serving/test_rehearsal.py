"""What a server answers before it is ready: as much as its slots hold, each as short as a question, then forgotten."""

import pytest

from kangaroo_jax.config import stage_config
from kangaroo_jax.serving.limits import Limits

pytest.importorskip("fastapi")

from kangaroo_jax.serving.rehearsal import rehearse  # noqa: E402
from tests.serving.fake import CONTEXT, FakeEngine, fake_backend  # noqa: E402


class Forgetting(FakeEngine):
    forgotten = 0

    def forget(self) -> None:
        assert all(ticket.done for ticket in self.tickets)
        self.forgotten += 1


def test_many_slots_are_filled_with_short_questions(tokenizer):
    engine, limits = Forgetting(), Limits()
    prompts = fake_backend(engine, tokenizer, stage_config("tiny").data, limits).prompts
    rehearse([engine], prompts, limits, CONTEXT, 40)  # type: ignore[list-item]
    asked = [ticket.request for ticket in engine.tickets]
    assert len(asked) == 3 * 40 and engine.forgotten == 1
    assert max(len(request.tokens) for request in asked) < 300
    assert [len(request.media) for request in asked[:3]] == [0, 1, 1]
