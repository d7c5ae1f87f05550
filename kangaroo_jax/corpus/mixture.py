"""How much of what a corpus has."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class CorpusMixture:
    """How much of what. Counts are for scale 1; shares are from 0 to 1; kinds have relative weights."""

    # Media
    images: int = 12_000
    shorts: int = 3000
    longs: int = 400
    held_images: int = 60
    held_shorts: int = 120
    held_longs: int = 60
    short_fps: int = 4
    long_fps: int = 2
    image_kinds: tuple[tuple[str, float], ...] = (("image", 5), ("image_aside", 2), ("image_count", 3))
    short_kinds: tuple[tuple[str, float], ...] = (
        ("still", 1),
        ("count", 4),
        ("move", 5),
        ("order", 7),
        ("recolour", 1),
        ("transform", 1),
        ("appear", 1),
        ("disappear", 1),
    )
    # Conversations
    rounds: int = 6  # questions about one image or video in one conversation, at most
    long_rounds: int = 9  # about a long video, whose frames cost much more than its questions
    multiple_choice: float = 0.4  # share of the questions; the others are open
    describe_last: float = 0.15  # share of conversations that end with a description
    stage1_captions: int = 4000  # captions of images that stage 1 begins with; conversations on images follow,
    stage1_more: int = 3000  # and so many captions among them
    stage1_chats: int = 12_000  # images with such a conversation
    encoder_captions: int = 0  # captions of images in a file of their own, for the warm-up of an encoder
    bare_captions: bool = False  # what is a caption alone has an empty system turn, not the template's own
    stage2_per_short: int = 4  # conversations of a short clip in stages 2 and 3; languages take turns
    stage4_per_short: int = 6
    some_images: int = 2500  # images with a conversation, again, in each of stages 2 to 4
    some_text: int = 700  # conversations without media in each of stages 1 to 4, of the last lesson of the warm-up
    stage5_per_long: int = 10
    stage5_again: int = 5000  # conversations of stage 4 repeated in stage 5
    phrased: float = 0.01  # for this share of the conversations on videos in stages 4 and 5 one more in others' words
    chinese: tuple[float, ...] = (0.5, 0.5, 0.5, 0.5, 0.5)  # share of the conversations of each stage
    sentences: bool = False  # questions and answers are whole sentences
    every_fact: bool = False  # easy facts are asked as often as others
    times_from: int = 1  # the stage from which texts have times: moments, durations, descriptions with times
    # Text warm-up
    warmup: float = 1.0  # times the records of `corpus_warmup.LESSONS`
    # Evaluation: questions in both languages together
    eval_image: tuple[int, int] = (80, 40)  # multiple choice, open
    eval_short: tuple[int, int] = (400, 200)
    eval_long: tuple[int, int] = (160, 80)

    def scaled(self, scale: float) -> "CorpusMixture":
        """The same mixture with every count multiplied, never below a handful; what is left out stays left out."""
        media = ("images", "shorts", "longs", "held_images", "held_shorts", "held_longs")
        records = (
            "encoder_captions",
            "stage1_captions",
            "stage1_more",
            "stage1_chats",
            "some_images",
            "some_text",
            "stage5_again",
        )
        given = {name: getattr(self, name) for name in (*media, *records)}
        counts: dict[str, Any] = {name: max(round(n * scale), 4) if n else 0 for name, n in given.items()}
        for name in ("eval_image", "eval_short", "eval_long"):
            counts[name] = tuple(max(round(n * scale / 8) * 8, 8) for n in getattr(self, name))
        return dataclasses.replace(self, warmup=self.warmup * scale, **counts)
