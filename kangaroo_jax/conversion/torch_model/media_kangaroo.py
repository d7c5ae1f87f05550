"""Decodes videos and images to letterboxed frames and their times, sampled and decoded as in training."""

import math
import os
import re
import struct
from typing import Any

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Formats that Pillow may read: others run programs (EPS). Playlists make FFmpeg open other files.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
PLAYLISTS = {"concat", "concatf", "dash", "hls", "imf", "rtsp", "sap", "sdp", "webm_dash_manifest"}
ROUNDING = 1e-3  # seconds by which a requested time may fall short of the frame that it means


def load_media(part: dict[str, Any], sampling: dict[str, Any], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """A part of a message -> frames uint8[F, S, S, 3] and their times float64[F] (s); F is a multiple of `multiple`."""
    side = sampling["image_size"]
    if part["type"] == "image":
        frames, times = letterbox(open_image(part["image"]), side)[None], np.zeros(1)
    elif isinstance(part["video"], (str, os.PathLike)):
        frames, times = load_video(part["video"], sampling, multiple)
    else:
        frames = np.stack([letterbox(open_image(frame), side) for frame in part["video"]])
        times = np.asarray(part.get("times", range(len(frames))), np.float64)  # by default one a second
        if len(times) != len(frames):
            raise ValueError(f"{len(frames)} frames, but {len(times)} times")
    missing = -len(frames) % multiple
    return np.concatenate([frames, *[frames[-1:]] * missing]), np.concatenate([times, *[times[-1:]] * missing])


def open_image(source: Any) -> Image.Image:
    """A path, an array uint8[height, width, 3] or a PIL image as an upright image; transparency becomes white."""
    image = Image.fromarray(source) if isinstance(source, np.ndarray) else source
    if isinstance(image, (str, os.PathLike)):
        _check_file(image)
        Image.init()
        image = Image.open(image, formats=tuple(name for name in FORMATS if name in Image.OPEN))
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _deep_grey(image)
    if image.has_transparency_data:
        image = _on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """A grey of more than 8 bits, scaled to 8: 16 bits by its mode, others by the brightest pixel."""
    grey = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=np.inf, neginf=0.0)
    top = float(np.max(grey, where=np.isfinite(grey), initial=0.0))
    divisor, factor = 1.0, 1.0
    if image.mode.startswith("I;16") or 255 < top <= 65_535:
        divisor = 257.0
    elif image.mode == "F" and top <= 1.0:
        factor = 255.0
    elif top > 65_535:
        divisor, factor = top, 255.0
    return Image.fromarray((grey / divisor * factor).round().clip(0, 255).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _check_file(path: str | os.PathLike) -> None:
    """Raise ValueError for a path that is no regular file, such as a pipe, whose reading may never end."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file, or no regular one")


def letterbox(image: Image.Image, side: int) -> np.ndarray:
    """Resize the longest side to `side` (bicubic) and centre on black: uint8[S, S, 3]."""
    size = fitted(image.width / image.height, side)
    return on_black(np.asarray(image.resize(size, Image.Resampling.BICUBIC) if image.size != size else image), side)


def fitted(aspect: float, side: int) -> tuple[int, int]:
    """Width and height of a picture of that aspect (width over height), its longest side `side`."""
    return (side, max(1, round(side / aspect))) if aspect >= 1 else (max(1, round(side * aspect)), side)


def on_black(image: np.ndarray, side: int) -> np.ndarray:
    """The picture centred on black: uint8[S, S, 3]."""
    canvas = np.zeros((side, side, 3), np.uint8)
    top, left = (side - image.shape[0]) // 2, (side - image.shape[1]) // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def sample_times(seconds: float, sampling: dict[str, Any], multiple: int) -> np.ndarray:
    """The middles of n equal segments: n is `fps` a second, clipped to the length's range, rounded to a multiple."""
    prefix = "long_" if seconds > sampling["long_seconds"] else ""
    least, most = sampling[prefix + "min_frames"], sampling[prefix + "max_frames"]
    count = round(min(max(seconds * sampling["fps"], least), most))
    count = max(1, math.ceil(count / multiple)) * multiple
    if count > most:
        count = max(count - multiple, multiple)
    return (np.arange(count) + 0.5) * (seconds / count)


def load_video(path: str | os.PathLike, sampling: dict[str, Any], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """The frames on display at the sampled times, and the times at which each of them appeared."""
    try:
        import av
        from av.video.reformatter import VideoReformatter
    except ImportError as error:
        raise ImportError("videos are read by PyAV: pip install av (or give a list of frames)") from error
    # PyAV 19 and later ignore text that is not UTF-8 by default.
    metadata: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
    _check_file(path)
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": ",".join(sorted(av.formats_available - PLAYLISTS)),
    }
    with av.open(f"file:{os.fspath(path)}", options=options, **metadata) as container:
        cover = av.stream.Disposition.attached_pic.value
        streams = [s for s in container.streams.video if not s.disposition.value & cover and s.codec_context]
        if not streams:
            raise ValueError(f"{path}: no video stream that can be decoded")
        best = container.streams.best("video")
        stream = next((s for s in streams if s.index == best.index), streams[0])
        interval = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        times = sample_times(_duration(path, container, stream), sampling, multiple)
        scaler, converter, ratio = VideoReformatter(), VideoReformatter(), float(stream.sample_aspect_ratio or 1) or 1.0
        slack = min(ROUNDING, interval / 4)
        pixels: list[np.ndarray] = []
        seen: list[float] = []
        shown: Any = None
        ahead: Any = None
        frames = _frames(container, stream, interval)
        shown, ahead = next(frames, None), next(frames, None)
        for time in times:
            fresh = not pixels
            while ahead is not None and ahead[1] <= time + slack:
                shown, ahead, fresh = ahead, next(frames, None), True
            if shown is None:
                raise ValueError(f"{path}: no frame can be decoded")
            if fresh:
                pixels.append(_pixels(shown[0], scaler, converter, ratio, sampling["image_size"]))
            else:
                pixels.append(pixels[-1])
            seen.append(max(shown[1], 0.0))
    return np.stack(pixels), np.asarray(seen)


def _frames(container: Any, stream: Any, interval: float) -> Any:
    """(frame, seconds since the first) in display order."""
    guesses = container.format.name == "avi" and stream.codec_context.has_b_frames  # AVI has only decoding times
    known = stream.start_time is not None and not guesses
    zero = float(stream.start_time * stream.time_base) if known else None
    last = -interval
    for frame in container.decode(stream):
        stamp = frame.pts if frame.pts is not None and not guesses else frame.dts
        absolute = last + interval if stamp is None else stamp * float(frame.time_base or stream.time_base)
        zero = absolute if zero is None else zero
        last = absolute
        yield frame, absolute - zero


def _duration(path: str | os.PathLike, container: Any, stream: Any) -> float:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:[.,]\d*)?)", stream.metadata.get("DURATION", "").strip()):
        start = float((stream.start_time or 0) * stream.time_base)
        return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3].replace(",", ".")) - start
    if container.duration:
        return container.duration / 1_000_000
    raise ValueError(f"{path}: does not say how long it is; give a list of frames")


def _pixels(frame: Any, scaler: Any, converter: Any, ratio: float, side: int) -> np.ndarray:
    aspect = frame.width * ratio / frame.height
    a, b, c, d = _display_matrix(frame)
    turned = abs(b) > abs(a)
    if turned:
        height, width = fitted(1 / aspect, side)
    else:
        width, height = fitted(aspect, side)
    form, shrink = frame.format, max(frame.width / width, frame.height / height)
    if any(component.is_alpha for component in form.components):
        rgba = Image.fromarray(converter.reformat(frame, format="rgba", threads=1).to_ndarray())
        rgb = np.asarray(_on_white(rgba).resize((width, height), Image.Resampling.BICUBIC))
    elif form.is_rgb or len(form.components) != 3 or min(width, height) < 16 or shrink > 32:
        rgb = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        rgb = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))
    else:
        full = "yuvj444p" if form.name.startswith("yuvj") else "yuv444p"
        small = scaler.reformat(frame, width=width, height=height, format=full, interpolation="BICUBIC", threads=1)
        rgb = converter.reformat(small, format="rgb24", threads=1).to_ndarray()
    right, down = (c, b) if turned else (a, d)  # directions of the picture's columns and rows on display
    rgb = rgb.swapaxes(0, 1) if turned else rgb
    return on_black(rgb[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1], side)


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """Where a frame's x axis and y axis point on display, (x, y) each."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # the frame has side data unknown to PyAV, such as EXIF
        return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[round(frame.rotation / 90) % 4]
    if not matrix:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix)[:36])[:5]
    return a, b, c, d
