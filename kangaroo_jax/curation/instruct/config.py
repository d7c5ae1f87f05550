"""The configuration of instruction sets: every key once, with its default and unit."""

from ml_collections import ConfigDict

from kangaroo_jax.curation.annotate.config import backend

PRESETS = ("endpoint", "corpus", "captions")


def instruct_config(preset: str = "endpoint") -> ConfigDict:
    """All of `kangaroo instruct`.

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
    c.keep_shares = True  # rather fewer samples than other shares, where a share cannot be filled
    c.types = ()  # question types; by default all of taxonomy.TYPES
    c.options = 4  # of a multiple-choice question
    c.letter_instruction = True  # say that the letter alone is wanted
    c.min_rounds = 2  # of a multi-round conversation
    c.max_rounds = 4
    c.min_score = 0.0  # of the captions that are used
    c.seed = 0
    c.generator = "writer"  # names of backends
    c.blind = "blind"  # asks without the video; "" asks nothing
    c.verifier = "writer"  # answers multiple choice from the caption; "" asks nothing
    c.blind_rotations = 4  # orders of the options in which a multiple-choice question is asked blind
    c.blind_max_right = 2  # right answers of these, above which a question is dropped
    c.blind_open = True  # ask open questions blind too
    c.blind_iou = 0.5  # word overlap of a blind answer with the true one, from which an open question is dropped
    c.answer_tokens = 700  # longest answer of the generator
    c.prompts = ""  # a folder of prompts, in place of the package's own
    c.backends = ConfigDict(dict(writer=backend(kind, 8000), blind=backend(kind, 8000)))
    if preset == "corpus":
        c.types = ("object", "attribute", "count", "motion", "action", "order", "moment", "change", "duration")
        c.update(blind="", verifier="", letter_instruction=False)
    if preset == "captions":
        c.update(generator="", blind="", verifier="", samples=1_000_000_000)
    return c


def paper_shares() -> dict[str, float]:
    """Thousands of conversations by task and language, measured off the paper's chart (2.24M together).

    That the Chinese captions are half short and half detailed, and all of the video QA English, is inferred.
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
    """As many detailed as short captions, in both languages."""
    shares = dict.fromkeys(paper_shares(), 0.0)
    return shares | {f"{task}_{lang}": 1.0 for task in ("detailed_caption", "short_caption") for lang in ("en", "zh")}
