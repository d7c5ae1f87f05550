"""The configuration of instruction sets: every key once, with its default and unit."""

from ml_collections import ConfigDict

from kangaroo_jax.curation.annotate.config import backend

PRESETS = ("endpoint", "corpus", "captions")


def instruct_config(preset: str = "endpoint") -> ConfigDict:
    """The config of `kangaroo instruct`.

    Presets: `endpoint` (the paper's mix, questions by a model behind an address), `corpus` (the same mix by the
    rules of a generated corpus), `captions` (only captions, which needs no model: stages 2 and 3).

    Raises ValueError for another.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: one of {', '.join(PRESETS)}")
    kind = "scenes" if preset == "corpus" else "endpoint"
    c = ConfigDict()
    c.samples = 2000  # conversations, if there are enough captions for them
    c.shares = ConfigDict(captions_only() if preset == "captions" else paper_shares())
    c.keep_shares = True  # where a share cannot be filled, make fewer samples rather than change the shares
    c.types = ()  # question types; by default all of taxonomy.TYPES
    c.options = 4  # options of a multiple-choice question
    c.letter_instruction = True  # ask for the letter alone
    c.min_rounds = 2  # rounds of a multi-round conversation
    c.max_rounds = 4
    c.min_score = 0.0  # lowest score of a caption that is used
    c.seed = 0
    c.generator = "writer"  # name of a backend, as blind and verifier are
    c.blind = "blind"  # answers questions without the video; "" skips the check
    c.verifier = "writer"  # answers multiple choice from the caption; "" skips the check
    c.blind_rotations = 4  # a multiple-choice question is asked blind with so many orders of the options
    c.blind_max_right = 2  # a question with more right blind answers is dropped
    c.blind_open = True  # ask open questions blind too
    c.blind_iou = 0.5  # an open question is dropped from this word overlap of its blind and true answers
    c.answer_tokens = 700  # longest answer of the generator
    c.prompts = ""  # a folder of prompts that replaces the package's own
    c.backends = ConfigDict(dict(writer=backend(kind, 8000), blind=backend(kind, 8000)))
    if preset == "corpus":
        c.types = ("object", "attribute", "count", "motion", "action", "order", "moment", "change", "duration")
        c.update(blind="", verifier="", letter_instruction=False)
    if preset == "captions":
        c.update(generator="", blind="", verifier="", samples=1_000_000_000)
    return c


def paper_shares() -> dict[str, float]:
    """Thousands of conversations by task and language, measured in the paper's chart (2.24M in total).

    It is inferred that half of the Chinese captions are short, half detailed, and that all video QA is English.
    """
    return {
        "detailed_caption_en": 348.0,
        "short_caption_en": 66.0,
        "detailed_caption_zh": 30.0,
        "short_caption_zh": 30.0,
        "mcq_en": 615.0,
        "mcq_zh": 0.0,
        "open_en": 211.0,
        "open_zh": 0.0,
        "single_en": 361.0,
        "single_zh": 404.0,
        "multi_en": 87.0,
        "multi_zh": 88.0,
    }


def captions_only() -> dict[str, float]:
    """Equal shares of detailed and short captions in both languages."""
    shares = dict.fromkeys(paper_shares(), 0.0)
    return shares | {f"{task}_{lang}": 1.0 for task in ("detailed_caption", "short_caption") for lang in ("en", "zh")}
