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
    i.allow_private = False  # True: addresses may lead to this machine and to private networks
    c.engine = e = ConfigDict()
    e.workers = 0  # processes; 0 is one a core
    e.item_seconds = 300.0  # time limit for one stage of one video; then the stage fails and its process is replaced
    e.memory_mib = 2048  # memory limit of a process; a stage that needs more fails
    e.shard_items = 64  # most items, on average, that are scored, written and resumed together
    e.actors = 0  # Ray actors, which keep the models of `actor_stages` between shards; 0: tasks run all stages
    e.actor_stages = ("embedding",)
    e.actor_cpus, e.actor_gpus = 1.0, 0.0  # CPUs and GPUs of each actor
    e.actor_resources = ()  # other resources, such as (("TPU", 4.0),)
    _set_media_stages(c)
    _set_model_stages(c)
    _set_choice(c)
    x = c.export = ConfigDict()
    x.media = "embed"  # embed: the clips' bytes; reference: paths and seconds; keyframes: paths of the JPEG files
    x.shard_samples = 1024
    return lock(c)


def _set_media_stages(c: ConfigDict) -> None:
    """Stages that decode videos: probe, cuts, key frames, motion."""
    c.probe = p = ConfigDict()
    p.max_pixels = 8192 * 4608  # largest frame that is decoded
    p.spans = 4  # positions at which decoding is tried
    p.span_frames = 4

    c.cuts = k = ConfigDict()
    k.threshold = 27.0  # threshold of PySceneDetect's ContentDetector
    k.min_scene_seconds = 0.6
    k.side = 160  # pixels of the longest side for the detector
    k.full_pass_pixels = 1e8  # width x height x frames + 100 x bytes; above it key frames and packet sizes decide
    k.whole_seconds = 60.0  # a longer video is split into clips at its cuts
    k.min_clip_seconds = 5.0  # scenes are joined until a clip has this length
    k.max_clip_seconds = 60.0  # a longer scene is divided evenly

    c.keyframes = f = ConfigDict()
    f.count = 5  # as in the paper
    f.side = 768  # pixels of the longest side
    f.quality = 90  # quality of the JPEG files
    f.candidates = 3  # frames of which the sharpest is taken; with the defaults, motion uses the same ones
    f.sharp_side = 256  # pixels of the shorter side, at which sharpness is compared
    f.reach_seconds = 0.4  # from the first to the last candidate
    f.cut_margin_seconds = 0.15  # smallest distance of a candidate to a cut

    c.motion = m = ConfigDict()
    m.places = 5
    m.pairs = 2  # consecutive pairs at each place
    m.gap_seconds = 0.2
    m.short_side = 256  # pixels
    m.quantile = 0.5  # over the pairs: 0.5 is the median, 1 the pair that moves most


def _set_model_stages(c: ConfigDict) -> None:
    """Stages that read the key frames or the caption."""
    c.text = t = ConfigDict()
    t.enabled = True
    t.side = 384  # pixels of the longest side for detection
    t.verify_above = 0.05  # mean coverage above which boxes are also read, so that boxes without text do not count
    t.min_score = 0.6  # lowest score of a reading that counts
    t.min_letters = 2

    c.face = a = ConfigDict()
    a.enabled = True
    a.width, a.height = 320, 192  # pixels
    a.min_score = 0.5

    c.fingerprint = h = ConfigDict()
    h.grid = 8  # rows of the difference hash: 8 is 64 bits
    h.min_step = 0  # grey levels by which neighbours must differ; use more for flat pictures
    h.trim_bars = True  # remove black bars first
    h.min_contrast = 3.0  # grey levels; a flatter frame has no fingerprint

    c.caption_language = ConfigDict(dict(enabled=True, min_probability=0.5))

    c.embedding = b = ConfigDict()
    b.checkpoint = ""  # Kangaroo checkpoint whose vision encoder embeds the key frames; "" leaves the stage out
    b.side = 0  # pixels of a frame; 0 is the checkpoint's own size
    b.batch = 8  # clips at a time
    b.frames = 5  # most key frames of a clip


def _set_choice(c: ConfigDict) -> None:
    """Thresholds, duplicates and balance."""
    c.select = s = ConfigDict()
    s.min_decodable = 0.9  # share of frames
    s.min_seconds, s.max_seconds = 2.0, 1200.0
    s.min_short_side = 144  # pixels
    s.max_text = 0.15  # share of the picture that is text, mean of the key frames
    s.max_face = 0.25
    s.min_motion = 0.015  # percent of the diagonal in 0.2 s
    s.languages = ()  # caption languages to keep, such as ("en", "zh"); () keeps all. No caption, no rule
    s.duplicates = True
    s.duplicate_bits = 14.0  # largest difference in bits of each 64 of a fingerprint
    s.duplicate_share = 0.5  # quantile over the key frames that duplicate_bits limits: 0.5 is the median, 1 all of them
    s.duplicate_mirror = True  # mirror images count as duplicates, too
    s.duplicate_flat = True  # ignore key frames that are flat in only one of two clips; False: they differ
    s.duplicate_seconds = 0.0  # largest difference in length of duplicates; 0 is any
    s.duplicate_tables = 12  # hash tables for each key frame, which find the pairs to compare
    s.duplicate_cosine = 0.0  # clips whose embeddings have at least this cosine are duplicates, too; 0: not compared
    s.category_cap = 0  # most clips of a category; 0: no cap
    s.source_quotas = ()  # such as (("webvid", 100_000),)
    s.seed = 0  # seed of the hash by which categories and sources are thinned
    s.category_keywords = ()  # for clips without a category: such as (("sport", ("football", "足球")),)
