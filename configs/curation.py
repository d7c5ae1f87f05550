"""Curation: how raw videos and images are scored, and which are kept.

The paper names the filters (text coverage, face coverage, optical flow, category balance) and publishes no
threshold. Every number here is ours, chosen on the videos of docs/curation.md; change them and run
`kangaroo curate select`, which recomputes no score.
"""

from ml_collections import ConfigDict

from kangaroo_jax.config import lock


def get_config() -> ConfigDict:
    """The config of `kangaroo curate` and its jobs."""
    c = ConfigDict()
    c.input = i = ConfigDict(dict(media_root="", fetch=False))  # fetch: also http(s):// addresses of a manifest
    i.allow_private = False  # True: they may lead to this machine and to private networks
    c.engine = e = ConfigDict()
    e.workers = 0  # processes; 0 is one a core
    e.item_seconds = 300.0  # for one stage of one video, then it is given up and its process replaced
    e.memory_mib = 2048  # for one process; a video that needs more is given up
    e.shard_items = 64  # at most so many of the input are scored, written and resumed together, on average
    e.actors = 0  # of Ray, which keep the models of `actor_stages` from shard to shard; 0: tasks do all
    e.actor_stages = ("embedding",)
    e.actor_cpus, e.actor_gpus = 1.0, 0.0  # of each actor
    e.actor_resources = ()  # others, such as (("TPU", 4.0),)
    _set_media_stages(c)
    _set_model_stages(c)
    _set_choice(c)
    x = c.export = ConfigDict()
    x.media = "embed"  # the clips' bytes; reference: paths and seconds; keyframes: the JPEG files, by path
    x.shard_samples = 1024
    return lock(c)


def _set_media_stages(c: ConfigDict) -> None:
    """Stages that decode: what a file is, where its scenes end, which frames stand for it, how much it moves."""
    c.probe = p = ConfigDict()
    p.max_pixels = 8192 * 4608  # of a frame; larger is not decoded
    p.spans = 4  # places where frames are decoded to see whether they can be
    p.span_frames = 4

    c.cuts = k = ConfigDict()
    k.threshold = 27.0  # PySceneDetect's ContentDetector
    k.min_scene_seconds = 0.6
    k.side = 160  # pixels of the longest side of what it looks at
    k.full_pass_pixels = 1e8  # width x height x frames, a byte counted as 100; beyond it, key frames and sizes tell
    k.whole_seconds = 60.0  # a longer video is split into clips at its cuts
    k.min_clip_seconds = 5.0  # scenes are joined until a clip is so long
    k.max_clip_seconds = 60.0  # and a longer scene is divided evenly

    c.keyframes = f = ConfigDict()
    f.count = 5  # as the paper has it
    f.side = 768  # pixels of the longest side
    f.quality = 90  # of the JPEG files
    f.candidates = 3  # frames of which the sharpest is taken; with the defaults, those that motion looks at, too
    f.sharp_side = 256  # pixels of the shorter side, at which sharpness is compared
    f.reach_seconds = 0.4  # from the first to the last of them
    f.cut_margin_seconds = 0.15  # and how far from any cut

    c.motion = m = ConfigDict()
    m.places = 5
    m.pairs = 2  # at each place, one after the other
    m.gap_seconds = 0.2
    m.short_side = 256  # pixels
    m.quantile = 0.5  # over the pairs: 0.5 is the median, 1 the pair that moves most


def _set_model_stages(c: ConfigDict) -> None:
    """Stages that look at the key frames, or at the caption."""
    c.text = t = ConfigDict()
    t.enabled = True
    t.side = 384  # pixels of the longest side for detection
    t.verify_above = 0.05  # mean coverage from which boxes are read, too: those that hold no text do not count
    t.min_score = 0.6  # of a reading that counts
    t.min_letters = 2

    c.face = a = ConfigDict()
    a.enabled = True
    a.width, a.height = 320, 192  # pixels
    a.min_score = 0.5

    c.fingerprint = h = ConfigDict()
    h.grid = 8  # rows of the difference hash: 8 is 64 bits
    h.min_step = 0  # grey levels by which neighbours differ at least; more for pictures that are flat by nature
    h.trim_bars = True  # cut black bars off first
    h.min_contrast = 3.0  # grey levels; a flatter frame has no fingerprint

    c.caption_language = ConfigDict(dict(enabled=True, min_probability=0.5))

    c.embedding = b = ConfigDict()
    b.checkpoint = ""  # of a Kangaroo, whose vision encoder looks at the key frames; "" leaves the stage out
    b.side = 0  # pixels of a frame; 0 is what the checkpoint was trained with
    b.batch = 8  # clips at a time
    b.frames = 5  # key frames that a clip has at most


def _set_choice(c: ConfigDict) -> None:
    """Thresholds, duplicates and balance."""
    c.select = s = ConfigDict()
    s.min_decodable = 0.9  # share of frames
    s.min_seconds, s.max_seconds = 2.0, 1200.0
    s.min_short_side = 144  # pixels
    s.max_text = 0.15  # share of the picture that is text, mean of the key frames
    s.max_face = 0.25
    s.min_motion = 0.015  # percent of the diagonal in 0.2 s
    s.languages = ()  # of captions, such as ("en", "zh"); () keeps all. No caption, no rule
    s.duplicates = True
    s.duplicate_bits = 14.0  # of each 64 of a fingerprint
    s.duplicate_share = 0.5  # quantile over the key frames which that is for: 0.5 is the median, 1 all of them
    s.duplicate_mirror = True  # mirror images count as duplicates, too
    s.duplicate_flat = True  # pass over key frames that are flat in one of two clips; False: they differ
    s.duplicate_seconds = 0.0  # by which the lengths of duplicates differ at most; 0 is any
    s.duplicate_tables = 12  # for each key frame: what finds the pairs that are compared
    s.duplicate_cosine = 0.0  # clips whose embeddings are nearer than this are duplicates, too; 0: not looked at
    s.category_cap = 0  # most of a category; 0: no cap
    s.source_quotas = ()  # such as (("webvid", 100_000),)
    s.seed = 0  # of the hash by which categories and sources are thinned
    s.category_keywords = ()  # for what names none: such as (("sport", ("football", "足球")),)
