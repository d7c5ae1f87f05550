"""Answers of a checkpoint in JAX and of its export in PyTorch, side by side."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from kangaroo_jax.conversion.files import import_torch
from kangaroo_jax.conversion.runners import InTorch, turn
from kangaroo_jax.conversion.sources import open_source
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.inference.history import conversation
from kangaroo_jax.quickstart.recipe import ANSWERS_DTYPE
from kangaroo_jax.system.progress import Tell, silent


def compare_chats(
    checkpoint: str | Path,
    videos_and_questions: Sequence[tuple[str | Path, str]],
    *,
    max_new_tokens: int = 16,
    tell: Tell = print,
) -> int:
    """Export a checkpoint, ask both PyTorch and JAX every question, and count the equal greedy answers.

    Args:
        checkpoint: folder that training wrote.
        videos_and_questions: (video or image file, question).
        max_new_tokens: longest answer.
        tell: prints a line, also for every question that the two answer differently.

    Returns:
        How many of the answers are equal, character for character.

    Raises:
        UserError: torch or transformers is not installed, or a file cannot be read.
    """
    import_torch("the comparison is run in torch")
    from kangaroo_jax.conversion.convert import convert

    with tempfile.TemporaryDirectory() as scratch:
        exported = convert([checkpoint], Path(scratch) / "export", format="hf", tell=silent)
        theirs = InTorch(open_source(exported), Path(scratch))
        kangaroo = Kangaroo.load(checkpoint, dtype=ANSWERS_DTYPE)
        asked = [(Path(media), question) for media, question in videos_and_questions]
        conversations = [conversation([turn(media, question)]) for media, question in asked]
        jax_answers = kangaroo.answer_many(conversations, max_new_tokens=max_new_tokens)
        same = 0
        for (media, question), answer in zip(asked, jax_answers, strict=True):
            torch_answer = theirs.chat(media, question, max_new_tokens)
            same += torch_answer == answer
            if torch_answer != answer:
                tell(f"{media.name}, {question!r}: JAX says {answer!r}, PyTorch {torch_answer!r}")
    tell(f"PyTorch and JAX give the same answer to {same} of {len(asked)} questions")
    return same
