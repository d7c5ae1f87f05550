"""From what a user gives (a video, an image, frames, words) to what Kangaroo takes: token ids, pixels, seconds.

Frames are sampled, decoded and letterboxed exactly as in training. Text never becomes a special token.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TAG = re.compile(r"<(image|video)>")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ROUNDING = 1e-3  # seconds by which a requested time may fall short of the frame that it means


class KangarooProcessor:
    """Turns messages into model inputs. `config` is the model's `KangarooConfig`."""

    def __init__(self, config: Any, tokenizer: Any = None) -> None:
        self.tokenizer, self.sampling = tokenizer, dict(config.frame_sampling)
        self.special, self.headers, self.eot = dict(config.special_ids), list(config.header_ids), config.eot_token_id
        self.bos = config.bos_token_id
        joined = config.patchify_config["enabled"]
        kernel = config.patchify_config["kernel"] if joined else (1, 1, 1)
        grid = self.sampling["image_size"] // config.vision_config["patch_size"]
        self.frames_per_group, self.tokens_per_group = kernel[0], (grid // kernel[1]) * (grid // kernel[2])

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs: Any) -> "KangarooProcessor":
        """Reads the model's config and tokenizer."""
        from transformers import AutoConfig, AutoTokenizer

        known = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        config = AutoConfig.from_pretrained(path, trust_remote_code=True, **known)
        return cls(config, AutoTokenizer.from_pretrained(path, trust_remote_code=True, **known))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """transformers asks for it; the folder's auto_map names the class already."""

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Messages to inputs of `generate`: input_ids int64[1, T], attention_mask, pixel_values float32[F, 3, S, S],
        frame_times float32[F] (seconds); the last two only where there are media.

        A message is {"role", "content"}; content is text, or a list of {"type": "text", "text"},
        {"type": "video", "video": path or list of frames, "times": seconds, optional} and
        {"type": "image", "image": path or PIL image}.
        """
        ids, frames, times = [self.bos], [], []
        for message in messages:
            ids += self._header(message["role"])
            for part in _parts(message["content"]):
                if isinstance(part, str):
                    ids += self._encode(part)
                    continue
                pixels, seconds = load_media(part, self.sampling, self.frames_per_group)
                ids += self._block(len(seconds) // self.frames_per_group)
                frames.append(pixels)
                times.append(seconds)
            ids.append(self.eot)
        if add_generation_prompt:
            ids += self._header("assistant")
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if frames:
            inputs["pixel_values"] = normalise(np.concatenate(frames))
            inputs["frame_times"] = torch.from_numpy(np.concatenate(times).astype(np.float32))
        return inputs

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Ids to text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _header(self, role: str) -> list[int]:
        return [self.headers[0], *self._encode(role), self.headers[1], *self._encode("\n\n")]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _block(self, groups: int) -> list[int]:
        """<vi_start>, the groups' places each followed by <eof> (the last by <eov>), <vi_end>."""
        s, group = self.special, [self.special["vision"]] * self.tokens_per_group
        body = [token for _ in range(groups) for token in (*group, s["eof"])]
        return [s["vi_start"], *body[:-1], s["eov"], s["vi_end"]]


def _parts(content: Any) -> list[Any]:
    """The pieces of a message in order: texts, and media as dictionaries. Media stand before the text, a line each,
    unless the text says with `<video>` and `<image>` where."""
    if isinstance(content, str):
        return [content.strip()] if content.strip() else []
    media = [part for part in content if part["type"] != "text"]
    text = "\n".join(part["text"] for part in content if part["type"] == "text")
    tags = TAG.findall(text)
    if media and not tags:
        text = "".join(f"<{part['type']}>\n" for part in media) + text
        tags = [part["type"] for part in media]
    if tags != [part["type"] for part in media]:
        raise ValueError(f"the text has the tags {tags}, but the media are {[part['type'] for part in media]}")
    pieces, waiting = [], iter(media)
    for number, piece in enumerate(TAG.split(text.strip())):
        if number % 2:
            pieces.append(next(waiting))
        elif piece:
            pieces.append(piece)
    return pieces


def as_part(source: Any, times: Sequence[float] | None = None) -> dict[str, Any]:
    """A path, PIL image or list of frames as a part of a message."""
    if isinstance(source, (list, tuple)) or (isinstance(source, np.ndarray) and source.ndim == 4):
        part = {"type": "video", "video": list(source)}
        return part if times is None else {**part, "times": list(times)}
    if isinstance(source, (str, os.PathLike)):
        kind = "image" if Path(source).suffix.lower() in IMAGE_SUFFIXES else "video"
        return {"type": kind, kind: str(source)}
    return {"type": "image", "image": source}


def normalise(frames: np.ndarray) -> torch.Tensor:
    """uint8[F, S, S, 3] -> float32[F, 3, S, S] with CLIP's mean and deviation."""
    scale = (1 / (255 * np.asarray(STD))).astype(np.float32)
    offset = (np.asarray(MEAN) / np.asarray(STD)).astype(np.float32)
    pixels = torch.from_numpy(frames).float() * torch.from_numpy(scale) - torch.from_numpy(offset)
    return pixels.permute(0, 3, 1, 2).contiguous()


# ------------------------------------------------------------------------------------- media


def load_media(part: dict[str, Any], sampling: dict[str, Any], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """A part of a message -> frames uint8[F, S, S, 3] and their seconds float64[F]; F is a multiple of `multiple`."""
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
    """A path, an array uint8[height, width, 3] or a PIL image, turned upright, transparency laid on white."""
    image = Image.fromarray(source) if isinstance(source, np.ndarray) else source
    image = Image.open(image) if isinstance(image, (str, os.PathLike)) else image
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def letterbox(image: Image.Image, side: int) -> np.ndarray:
    """Resize the longest side to `side` (bicubic) and centre on black: uint8[S, S, 3]."""
    size = fitted(image.width / image.height, side)
    return on_black(np.asarray(image.resize(size, Image.Resampling.BICUBIC) if image.size != size else image), side)


def fitted(aspect: float, side: int) -> tuple[int, int]:
    """Width and height of a picture of that aspect (width over height), its longest side `side`."""
    return (side, max(1, round(side / aspect))) if aspect >= 1 else (max(1, round(side * aspect)), side)


def on_black(image: np.ndarray, side: int) -> np.ndarray:
    """The picture in the middle of uint8[S, S, 3]."""
    canvas = np.zeros((side, side, 3), np.uint8)
    top, left = (side - image.shape[0]) // 2, (side - image.shape[1]) // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def sample_times(seconds: float, sampling: dict[str, Any], multiple: int) -> np.ndarray:
    """The middles of n equal segments: n is `fps` a second, clipped to the range for that length, and a multiple."""
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
    # Since PyAV 19 text that is not UTF-8 is no error anyhow.
    metadata: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
    with av.open(str(path), **metadata) as container:
        cover = av.stream.Disposition.attached_pic.value
        stream = next(s for s in container.streams.video if not s.disposition.value & cover)
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
    """(frame, seconds since the first) in the order of display."""
    zero = None if stream.start_time is None else float(stream.start_time * stream.time_base)
    last = -interval
    for frame in container.decode(stream):
        stamp = frame.pts if frame.pts is not None else frame.dts
        absolute = last + interval if stamp is None else stamp * float(frame.time_base or stream.time_base)
        zero = absolute if zero is None else zero
        last = absolute
        yield frame, absolute - zero


def _duration(path: str | os.PathLike, container: Any, stream: Any) -> float:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if tag := stream.metadata.get("DURATION"):
        hours, minutes, rest = tag.split(":")
        start = float((stream.start_time or 0) * stream.time_base)
        return int(hours) * 3600 + int(minutes) * 60 + float(rest) - start
    if container.duration:
        return container.duration / 1_000_000
    raise ValueError(f"{path}: does not say how long it is; give a list of frames")


def _pixels(frame: Any, scaler: Any, converter: Any, ratio: float, side: int) -> np.ndarray:
    aspect = frame.width * ratio / frame.height
    quarter_turns = round(frame.rotation / 90) % 4
    if quarter_turns % 2:
        height, width = fitted(1 / aspect, side)
    else:
        width, height = fitted(aspect, side)
    form, shrink = frame.format, max(frame.width / width, frame.height / height)
    if form.is_rgb or len(form.components) != 3 or min(width, height) < 16 or shrink > 32:
        rgb = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        rgb = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))
    else:
        full = "yuvj444p" if form.name.startswith("yuvj") else "yuv444p"
        small = scaler.reformat(frame, width=width, height=height, format=full, interpolation="BICUBIC", threads=1)
        rgb = converter.reformat(small, format="rgb24", threads=1).to_ndarray()
    return on_black(np.rot90(rgb, quarter_turns), side)
