"""`kangaroo bench data`: the speed of turning videos into batches, against torchcodec, decord and OpenCV.

Every reader gets the same files and frame numbers, resizes to the same letterboxed size and fills a uint8 batch, in two
worker processes; the readers take turns. The others resize with torch's antialiased bicubic filter, or with
`--own-resize` in their fastest way (decord bilinear, OpenCV bicubic without averaging). `--costs` measures the costs by
which `picker` chooses between seeking and decoding on. Readers that are not installed are left out.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from kangaroo_jax.data.media.decode import ProcessDecoder
from kangaroo_jax.data.media.image import centre, fitted
from kangaroo_jax.data.media.picker import open_video
from kangaroo_jax.data.media.video import Clip, MediaRef, load_video
from kangaroo_jax.data.media.writing import write_h264
from kangaroo_jax.system.files import make_folder

SIDE, RATE, SIZE = 448, 30, (854, 480)
LENGTHS = {"10s": 10, "3min": 180, "20min": 1200}
# Frames a second that a v5p chip takes at stage 5's shape: a pack of 26,624 tokens and 204 frames costs about 2.0e15
# FLOPs (6 a token and parameter of the LLM, causal attention, the frozen ViT forward), at 40% of 459 TFLOP/s.
V5P_FRAMES = 18.5
_ENCODED_SECONDS = 60  # longer videos repeat the encoded packets


def make_video(path: Path, seconds: int, seed: int) -> Path:
    """A moving picture with cuts, H.264 at 480p and 30 frames a second, with x264's key frame every 250 frames."""
    if seconds > _ENCODED_SECONDS:
        return _repeated(make_video(path.with_name(f"part-{seed}.mp4"), _ENCODED_SECONDS, seed), path, seconds)
    if path.exists():
        return path
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (SIZE[1] // 8 + 64, SIZE[0] // 8 + 64, 3), np.uint8)
    field = np.asarray(letterboxless(small, 8))
    temporary = path.with_suffix(".tmp.mp4")

    def picture(i: int) -> np.ndarray:
        nonlocal field
        x, y = int(256 + 250 * np.sin(i / 97)), int(256 + 250 * np.cos(i / 61))
        if i % 200 == 0:
            field = np.roll(field, int(rng.integers(64, 400)), axis=int(rng.integers(2)))  # a cut
        return np.ascontiguousarray(field[y : y + SIZE[1], x : x + SIZE[0]])

    write_h264(temporary, map(picture, range(seconds * RATE)), RATE, {"preset": "veryfast", "crf": "26"})
    temporary.rename(path)
    return path


def _repeated(part: Path, path: Path, seconds: int) -> Path:
    temporary = path.with_suffix(".tmp.mp4")
    with av.open(str(temporary), "w") as output, av.open(str(part)) as first:
        stream = output.add_stream_from_template(first.streams.video[0])
        for i in range(seconds // _ENCODED_SECONDS):
            with av.open(str(part)) as container:
                for packet in container.demux(video=0):
                    if packet.pts is not None and packet.dts is not None and packet.size:
                        shift = round(i * _ENCODED_SECONDS / packet.time_base)
                        packet.pts, packet.dts, packet.stream = (packet.pts or 0) + shift, packet.dts + shift, stream
                        output.mux(packet)
    temporary.rename(path)
    return path


def letterboxless(image: np.ndarray, factor: int) -> Any:
    """The image enlarged smoothly."""
    from PIL import Image

    whole = Image.fromarray(image)
    return whole.resize((whole.width * factor, whole.height * factor), Image.Resampling.BICUBIC)


# --------------------------------------------------------------------------------- readers

Job = tuple[str, tuple[int, ...]]  # file and frame numbers


def fit(frame: Any) -> np.ndarray:
    """A frame uint8[height, width, 3] as uint8[S, S, 3], by torch's antialiased bicubic filter (torchvision's)."""
    import torch

    height, width = _inside(frame.shape[0], frame.shape[1])
    whole = torch.as_tensor(frame).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(whole, size=(height, width), mode="bicubic", antialias=True)
    return _on_black(small[0].permute(1, 2, 0).numpy())


def read_torchcodec(job: Job, own: bool) -> np.ndarray:
    """uint8[n, S, S, 3] by torchcodec with approximate seeks (its fast mode), one thread; its filter is no faster."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(job[0], seek_mode="approximate", num_ffmpeg_threads=1, dimension_order="NHWC")
    return np.stack([fit(frame) for frame in decoder.get_frames_at(list(job[1])).data])


def read_decord(job: Job, own: bool) -> np.ndarray:
    """uint8[n, S, S, 3] by decord with one thread; it resizes with FFmpeg's bilinear filter."""
    import decord

    if own:
        height, width = _inside(SIZE[1], SIZE[0])
        reader = decord.VideoReader(job[0], num_threads=1, width=width, height=height)
    else:
        reader = decord.VideoReader(job[0], num_threads=1)
    frames = reader.get_batch(list(job[1])).asnumpy()
    return np.stack([_on_black(frame) if own else fit(frame) for frame in frames])


def read_opencv(job: Job, own: bool) -> np.ndarray:
    """uint8[n, S, S, 3] by OpenCV: it seeks to distant frames and grabs near ones, as usual in its users' code.

    Its own resizing is bicubic without averaging, which is fast and aliases.
    """
    import cv2

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(job[0], cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames, position = [], 0
    for number in job[1]:
        if number - position > 250:
            capture.set(cv2.CAP_PROP_POS_FRAMES, number)
            position = number
        while position < number:
            capture.grab()
            position += 1
        _, frame = capture.read()
        position += 1
        if own:
            height, width = _inside(frame.shape[0], frame.shape[1])
            frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC)
            frames.append(_on_black(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
        else:
            frames.append(fit(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
    capture.release()
    return np.stack(frames)


def _inside(height: int, width: int) -> tuple[int, int]:
    """The height and width of the frame when its longest side is S."""
    return fitted(width / height, SIDE)[::-1]


def _on_black(frame: np.ndarray) -> np.ndarray:
    canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
    centre(frame, canvas)
    return canvas


Reader = Callable[[Job, bool], np.ndarray]
READERS: dict[str, Reader] = {"torchcodec": read_torchcodec, "decord": read_decord, "opencv": read_opencv}


class Jobs:
    """A PyTorch dataset with a clip for each job."""

    def __init__(self, jobs: Sequence[Job], name: str, own: bool) -> None:
        self._jobs, self._name, self._own = jobs, name, own

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, index: int) -> Any:
        import torch

        return torch.from_numpy(READERS[self._name](self._jobs[index], self._own))


class Peer:
    """A reader behind a PyTorch DataLoader whose workers have started and finished imports, as ours have."""

    def __init__(self, name: str, jobs: Sequence[Job], workers: int, own: bool) -> None:
        """Start the workers with a tiny video each."""
        import torch.utils.data

        self._order: list[int] = list(range(workers))  # the indices of an epoch: the loader's sampler
        self._shape = (len(jobs), len(jobs[0][1]), SIDE, SIDE, 3)
        first = (_tiny_video(Path(jobs[0][0]).parent), (0,))
        dataset: Any = Jobs([first] * workers + list(jobs), name, own)  # any sequence works; torch types it as Dataset
        self._loader: Any = torch.utils.data.DataLoader(
            dataset, batch_size=None, sampler=self._order, num_workers=workers, persistent_workers=True,
            multiprocessing_context="spawn", prefetch_factor=2,
        )  # fmt: skip
        for _ in self._loader:
            pass
        self._order[:] = range(workers, workers + len(jobs))

    def run(self) -> np.ndarray:
        """Read all jobs into a batch."""
        batch = np.zeros(self._shape, np.uint8)
        for i, clip in enumerate(self._loader):
            batch[i] = clip.numpy()
        return batch


def run_ours(decoder: ProcessDecoder, jobs: Sequence[Job]) -> np.ndarray:
    """Read all jobs into a batch with our decoder."""
    refs = [MediaRef("video", path, tuple((n + 0.5) / RATE for n in numbers)) for path, numbers in jobs]
    batch = np.zeros((len(jobs), len(jobs[0][1]), SIDE, SIDE, 3), np.uint8)
    for i, outcome in enumerate(decoder.decode(refs, SIDE)):
        if not isinstance(outcome, Clip):
            raise outcome
        batch[i] = outcome.pixels
    return batch


def bare_seconds(job: Job) -> float:
    """CPU seconds of FFmpeg's decoding alone: seek to each key frame, decode up to the frames, convert nothing."""
    start = time.process_time()
    with open_video(job[0]) as (container, stream):
        tick = float(stream.time_base)
        keys = [e.timestamp * tick for e in stream.index_entries if e.is_keyframe]
        position, frames = -1.0, container.decode(stream)
        for number in job[1]:
            time_ = (number + 0.5) / RATE
            key = max((k for k in keys if k <= time_), default=0.0)
            if key > position:
                container.seek(int(time_ / tick), stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                position = float(frame.pts * tick)
                if position + 1 / RATE > time_:
                    break
    return time.process_time() - start


def compare(
    folder: Path, lengths: Sequence[str], counts: Sequence[int], rounds: int, workers: int, own: bool = False
) -> list[dict[str, Any]]:
    """A row for each length and number of frames: frames a second of each reader (best round), and ratios.

    With `own` the other readers resize in their fastest way, not with an antialiased bicubic filter.
    """
    peers = [name for name in READERS if _installed(name)]
    decoder, rows = ProcessDecoder(workers, 600.0), []
    make_folder(folder)
    for length in lengths:
        paths = [folder / f"{length}-{i}.mp4" for i in range(workers)]
        for i, path in enumerate(paths):
            if not path.exists():
                make_video(path, LENGTHS[length], i)
        for count in counts:
            total = LENGTHS[length] * RATE
            numbers = tuple(int((i + 0.5) * total / count) for i in range(count))
            jobs = [(str(path), numbers) for path in paths for _ in range(1 if length == "20min" else 2)]
            rows.append(_compare_one(decoder, peers, jobs, rounds, workers, own) | {"video": length, "frames": count})
            print(json.dumps(rows[-1]), flush=True)
    decoder.close()
    return rows


def _compare_one(
    decoder: ProcessDecoder, peers: Sequence[str], jobs: Sequence[Job], rounds: int, workers: int, own: bool
) -> dict[str, Any]:
    frames = len(jobs) * len(jobs[0][1])
    run_ours(decoder, jobs[:workers])  # starts the processes
    runs: dict[str, Callable[[], np.ndarray]] = {"ours": lambda: run_ours(decoder, jobs)}
    runs |= {name: Peer(name, jobs, workers, own).run for name in peers}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in seconds.items()}
    usual = {name: statistics.median(values) for name, values in seconds.items()}
    result: dict[str, Any] = {f"{name}_frames_per_second": round(frames / value, 1) for name, value in best.items()}
    if peers:
        result["ratio_to_best"] = round(min(best[name] for name in peers) / best["ours"], 2)
        result["ratio_of_medians"] = round(min(usual[name] for name in peers) / usual["ours"], 2)
    readers: dict[str, Reader] = {"ours": _read_ours} | {name: READERS[name] for name in peers}
    cpu = {name: _cpu_seconds(reader, jobs[0], own) for name, reader in readers.items()}
    result |= {f"{name}_cpu_ms_per_frame": round(1000 * value / len(jobs[0][1]), 2) for name, value in cpu.items()}
    if peers:
        result["cpu_ratio_to_best"] = round(min(cpu[name] for name in peers) / cpu["ours"], 2)
    return result | {"decode_over_bare_ffmpeg": round(_decode_seconds(jobs[0]) / bare_seconds(jobs[0]), 3)}


def _read_ours(job: Job, _: bool) -> np.ndarray:
    return load_video(job[0], image_size=SIDE, times=[(n + 0.5) / RATE for n in job[1]]).pixels


def _cpu_seconds(reader: Reader, job: Job, own: bool) -> float:
    """CPU seconds for one clip in this process, the smaller of two runs: other work disturbs that little."""
    seconds = []
    for _ in range(2):
        start = time.process_time()
        reader(job, own)
        seconds.append(time.process_time() - start)
    return min(seconds)


def _decode_seconds(job: Job) -> float:
    """CPU seconds of our decoding alone: the pixels are not converted or resized."""
    from kangaroo_jax.data.media.picker import FramePicker

    class Bare(FramePicker):
        def _write_pixels(self, frame: Any, canvas: np.ndarray) -> None:
            pass

    start = time.process_time()
    with open_video(job[0]) as (container, stream):
        Bare(job[0], container, stream, 2).pick(np.array([(n + 0.5) / RATE for n in job[1]]))
    return time.process_time() - start


def _tiny_video(folder: Path) -> str:
    """A video of one second, made once, beside the measured videos."""
    path = folder / "1s.mp4"
    if not path.exists():
        make_video(path, 1, 0)
    return str(path)


def _installed(name: str) -> bool:
    try:
        __import__({"opencv": "cv2"}.get(name, name))
        import torch  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def costs(folder: Path) -> dict[str, float]:
    """Microseconds of a seek and nanoseconds of decoding a pixel: the source of `picker`'s constants."""
    make_folder(folder)
    path = folder / "10s-0.mp4"
    if not path.exists():
        make_video(path, 10, 0)
    start = time.process_time()
    with open_video(path) as (container, stream):
        frames = sum(1 for _ in container.decode(stream))
    each = (time.process_time() - start) / frames
    with open_video(path) as (container, stream):
        next(container.decode(stream))
        start = time.process_time()
        for i in range(50):
            container.seek(int(i % 8 / float(stream.time_base)), stream=stream)
            next(container.decode(stream))
        seek = (time.process_time() - start) / 50
    return {"seek_us": round(1e6 * seek), "decode_ns_per_pixel": round(1e9 * each / (SIZE[0] * SIZE[1]), 2)}


def summary(rows: Sequence[dict[str, Any]], workers: int) -> str:
    """A line with the number of such cores that a chip needs in the slowest row of `compare`."""
    worst = min(row["ours_frames_per_second"] for row in rows) / workers
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"a v5p chip at stage 5's shape takes about {V5P_FRAMES:.0f} frames/s: {V5P_FRAMES / worst:.2f} cores like "
        f"these for the slowest row here; {peak:.0f} MiB in the parent"
    )
