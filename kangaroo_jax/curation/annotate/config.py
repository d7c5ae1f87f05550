"""The configuration of annotation: every key once, with its default and unit. The paper publishes none of these.

`configs/annotation.py` and `configs/instruct.py` start from these defaults.
"""

from ml_collections import ConfigDict

PRESETS = ("endpoint", "own", "corpus")
CAPTIONERS = ("captioner_a", "captioner_b", "captioner_c")


def backend(kind: str = "endpoint", port: int = 8000) -> ConfigDict:
    """A model backend: `endpoint` (an OpenAI-compatible server), `kangaroo` (ours) or `scenes` (rules).

    Raises ValueError for another kind.
    """
    if kind not in ("endpoint", "kangaroo", "scenes"):
        raise ValueError(f"unknown kind of backend {kind!r}: one of endpoint, kangaroo, scenes")
    c = ConfigDict()
    c.kind = kind
    c.base_url = f"http://127.0.0.1:{port}/v1"  # endpoint
    c.model = ""  # endpoint: the model's name on the server
    c.api_key_env = ""  # endpoint: the environment variable that holds the API key
    c.structured = True  # endpoint, kangaroo: whether answers are given their schema's form, not only checked
    c.timeout = 120.0  # endpoint: seconds before a call fails
    c.checkpoint = ""  # kangaroo: a folder that training wrote
    c.batch_size = 16  # kangaroo: answers under way at a time
    c.corpus = ""  # scenes: a folder that kangaroo_jax.corpus.make wrote
    c.view = "all"  # scenes: all, or thing (less detail)
    c.temperature = 0.0
    c.top_p = 1.0
    c.seed = 0
    c.concurrency = 64  # requests in flight
    c.requests_per_minute = 0.0  # limit; 0 is none
    c.tokens_per_minute = 0.0  # limit on the tokens requested; 0 is none
    c.retries = 6  # further calls after one that failed
    c.answer_retries = 4  # further questions after an answer that was truncated, refused or malformed
    c.first_wait = 0.5  # seconds before the second call, doubled for each further one
    c.longest_wait = 60.0  # seconds
    c.longest_answer = 4096  # tokens; a retry of a truncated answer may ask for up to so many
    c.image_tokens = 1000  # tokens assumed for one image by --dry-run
    c.price_in = 0.0  # for a million tokens, in any currency
    c.price_out = 0.0
    return c


def annotation_config(preset: str = "endpoint") -> ConfigDict:
    """The config of `kangaroo annotate`.

    Presets: `endpoint` (three captioners and a writer behind four addresses), `own` (the captioners are a
    Kangaroo in this process), `corpus` (rules on a generated corpus). Raises ValueError for another.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: one of {', '.join(PRESETS)}")
    kinds = {"endpoint": ("endpoint", "endpoint"), "own": ("kangaroo", "endpoint"), "corpus": ("scenes", "scenes")}
    captioner, writer = kinds[preset]
    c = ConfigDict()
    c.languages = ("en", "zh")  # languages of the video captions
    c.frame_language = "en"  # language of the frame captions
    c.captioners = CAPTIONERS  # names of backends
    c.writer = "writer"
    c.backends = ConfigDict({name: backend(captioner, 8001 + i) for i, name in enumerate(CAPTIONERS)})
    c.backends.writer = backend(writer, 8000)
    c.prompts = ""  # a folder of prompts that replaces the package's own
    c.frame_tokens = 256  # longest frame caption
    c.caption_tokens = 800  # longest video caption
    c.source_caption = True  # show the writer the text that came with the video
    c.part_clips = 1000  # clips in a part, which is written at once
    c.refine = _refine()
    c.choose = ConfigDict(
        dict(
            share=0.1,  # share of the clips; the paper's 6M of 60M
            at_least=100,  # clips; the share never selects fewer, so that small sets are not thinned
            count=0,  # clips; replaces the share if not 0
            min_score=0.0,  # mean score from 0 to 1
            balance=True,  # the same cap for every category
        )
    )
    if preset == "own":
        c.captioners = CAPTIONERS[:1]
        del c.backends.captioner_b, c.backends.captioner_c
        c.backends.captioner_a.update(concurrency=16, answer_retries=0)
    if preset == "corpus":
        c.backends.captioner_b.view = c.backends.captioner_c.view = "thing"
        c.refine.update(min_words=2, min_sentence_support=0.0, repeat_iou=1.0)
    return c


def _refine() -> ConfigDict:
    return ConfigDict(
        dict(
            repeat_iou=0.6,  # inferred; word-set overlap above which a sentence repeats another; 1 keeps all
            min_language=0.6,  # share of words in the language's script
            min_words=8.0,  # words of the detailed caption; two Chinese characters count as one
            max_words=300.0,  # words; further sentences are cut
            min_sentence_support=0.15,  # share of a sentence's content words that some frame caption has
            min_frames=0.5,  # share of key frames that at least one captioner described
            support_weight=0.5,  # weight of support by frame captions in the score
            consensus_weight=0.3,  # weight of agreement between captioners in the score
            length_weight=0.2,  # weight of length in the score
            full_length=60.0,  # words at which the length score is 1
        )
    )
