"""From what a user gives (a video, an image, frames, words) to what Kangaroo takes: token ids, pixels, seconds.

Frames are sampled, decoded and letterboxed exactly as in training. Text never becomes a special token.
"""

import dataclasses
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What Pillow may read: others run programs (EPS). Playlists make FFmpeg open other files.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
PLAYLISTS = {"concat", "concatf", "dash", "hls", "imf", "rtsp", "sap", "sdp", "webm_dash_manifest"}
TAG = re.compile(r"<(image|video)>")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ROUNDING = 1e-3  # seconds by which a requested time may fall short of the frame that it means


class Inputs(BatchFeature):
    """Inputs of the model. `to` moves them; a type is that of the pixels alone, as seconds need their 32 bits."""

    def to(self, *args: Any, **kwargs: Any) -> "Inputs":
        """See `BatchFeature.to`."""
        times = self.data.get("frame_times")
        super().to(*args, **kwargs)
        if times is not None:
            self.data["frame_times"] = times.to(self.data["frame_times"].device)
        return self


class KangarooProcessor(ProcessorMixin):
    """Turns messages into model inputs. `config` is the model's `KangarooConfig`."""

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, config: Any, tokenizer: Any = None) -> None:
        self.config, self.tokenizer, self.sampling = config, tokenizer, dict(config.frame_sampling)
        self.chat_template = getattr(tokenizer, "chat_template", None)
        self.special, self.headers, self.eot = dict(config.special_ids), list(config.header_ids), config.eot_token_id
        self.bos, self.pad = config.bos_token_id, config.pad_token_id
        joined = config.patchify_config["enabled"]
        kernel = config.patchify_config["kernel"] if joined else (1, 1, 1)
        grid = self.sampling["image_size"] // config.vision_config["patch_size"]
        self.frames_per_group, self.tokens_per_group = kernel[0], (grid // kernel[1]) * (grid // kernel[2])

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "KangarooProcessor":
        """Reads the model's config and tokenizer."""
        from transformers import AutoConfig, AutoTokenizer

        known = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        path = pretrained_model_name_or_path
        config = AutoConfig.from_pretrained(path, trust_remote_code=True, **known)
        return cls(config, AutoTokenizer.from_pretrained(path, trust_remote_code=True, **known))

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write what `AutoProcessor.from_pretrained` reads: the tokenizer, preprocessor_config.json, the code, and
        the config where no model has written one there."""
        if push_to_hub:
            raise ValueError("save to a folder, and push that")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        if not (folder / "config.json").is_file():
            self.config.save_pretrained(folder)
        code = [Path(str(sys.modules[kind.__module__].__file__)) for kind in (type(self.config), type(self))]
        for file in code:
            if file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)
        self.to_json_file(folder / "preprocessor_config.json")
        return [str(folder / "preprocessor_config.json")]

    def to_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """The keys of preprocessor_config.json."""
        name = type(self).__name__
        auto_map = {"AutoProcessor": f"{type(self).__module__.split('.')[-1]}.{name}"}
        return {"processor_class": name, "auto_map": auto_map, "frame_sampling": self.sampling}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoProcessor") -> None:
        """transformers asks for it; the folder's auto_map names the class already."""

    @property
    def model_input_names(self) -> list[str]:
        """What `apply_chat_template` returns."""
        return ["input_ids", "attention_mask", "pixel_values", "frame_times"]

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str = "pt",
        padding: bool | str = True,
        padding_side: str = "left",
    ) -> Any:
        """Messages to inputs of `generate`: input_ids int64[1, T], attention_mask, pixel_values float32[F, 3, S, S],
        frame_times float32[F] (seconds); the last two only where there are media.

        A message is {"role", "content"}; content is text, or a list of {"type": "text", "text"},
        {"type": "video", "video": path or list of frames, "times": seconds, optional} and
        {"type": "image", "image": path or PIL image}. A list of conversations gives a batch, its frames one row's
        after the other's. With `tokenize=False` it is the text, or a list of them, as `processor(text=...)` takes it.
        """
        _only(return_dict=(return_dict, True), return_tensors=(return_tensors, "pt"))
        is_batch = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = list(conversation) if is_batch else [conversation]
        if not tokenize:
            texts = [self._text(messages, add_generation_prompt) for messages in conversations]
            return texts if is_batch else texts[0]
        return self._batch([self._row(c, add_generation_prompt) for c in conversations], padding, padding_side)

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        return_tensors: str = "pt",
        padding: bool | str = True,
        padding_side: str = "left",
        add_special_tokens: bool = False,
    ) -> Inputs:
        """Whole prompts with special tokens in them (`apply_chat_template(..., tokenize=False)`) to inputs.

        `videos` and `images` are one or a list, those of the tags `<video>` and `<image>` in order over all the texts:
        files or lists of frames, and files or PIL images. A special token that is spelled in the text is one here:
        text of a user goes through `apply_chat_template` with its messages, which spells it out.
        """
        _only(return_tensors=(return_tensors, "pt"), add_special_tokens=(add_special_tokens, False))
        if text is None:
            raise ValueError("give text: prompts with <video> and <image> where the media stand")
        waiting = {"image": _waiting(images, "image"), "video": _waiting(videos, "video")}
        rows = []
        for prompt in [text] if isinstance(text, str) else text:
            pieces = TAG.split(prompt)
            if any(not waiting[tag] for tag in pieces[1::2]):
                raise ValueError(f"more tags than media in {prompt[:80]!r}")
            parts = [waiting[piece].pop(0) if i % 2 else piece for i, piece in enumerate(pieces)]
            row = _Row()
            for part in parts:
                self._add(row, part, lambda t: self.tokenizer(t, add_special_tokens=False)["input_ids"])
            rows.append(row)
        if left := {tag: len(media) for tag, media in waiting.items() if media}:
            raise ValueError(f"media without a tag in the text: {left}")
        return self._batch(rows, padding, padding_side)

    def decode(self, ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """Ids to text, by default without special tokens."""
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """`decode` of every row."""
        return [self.decode(ids, skip_special_tokens, **kwargs) for ids in sequences]

    def _row(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> "_Row":
        row = _Row(ids=[self.bos])
        for message in messages:
            row.ids += self._header(message["role"])
            for part in _parts(message["content"]):
                self._add(row, part, self._encode)
            row.ids.append(self.eot)
        if add_generation_prompt:
            row.ids += self._header("assistant")
        return row

    def _add(self, row: "_Row", part: Any, encode: Callable[[str], Any]) -> None:
        if isinstance(part, str):
            row.ids += list(encode(part)) if part else []
            return
        pixels, seconds = load_media(part, self.sampling, self.frames_per_group)
        row.ids += self._block(len(seconds) // self.frames_per_group)
        row.frames.append(pixels)
        row.times.append(seconds)

    def _batch(self, rows: Sequence["_Row"], padding: bool | str, side: str) -> Inputs:
        """Rows as one batch, filled up on the left, where answers go on, or on the right."""
        longest = max(len(row.ids) for row in rows)
        if padding not in (True, "longest") and any(len(row.ids) != longest for row in rows):
            raise ValueError(f"padding={padding!r}: rows of different lengths need padding=True")
        if side not in ("left", "right"):
            raise ValueError(f"padding_side={side!r}: left or right")
        empty = [longest - len(row.ids) for row in rows]
        pairs = [([self.pad] * n, row.ids, [0] * n, [1] * len(row.ids)) for n, row in zip(empty, rows, strict=True)]
        ids = [pad + ids if side == "left" else ids + pad for pad, ids, _, _ in pairs]
        mask = [no + yes if side == "left" else yes + no for _, _, no, yes in pairs]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if frames := [pixels for row in rows for pixels in row.frames]:
            inputs["pixel_values"] = normalise(np.concatenate(frames))
            times = np.concatenate([seconds for row in rows for seconds in row.times])
            inputs["frame_times"] = torch.from_numpy(times.astype(np.float32))
        return Inputs(inputs)

    def _text(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        name = self.tokenizer.convert_ids_to_tokens
        begin, end, eot = name(self.headers[0]), name(self.headers[1]), name(self.eot)
        text = name(self.bos)
        for message in messages:
            parts = [part if isinstance(part, str) else f"<{part['type']}>" for part in _parts(message["content"])]
            text += f"{begin}{message['role']}{end}\n\n{''.join(parts)}{eot}"
        return text + (f"{begin}assistant{end}\n\n" if add_generation_prompt else "")

    def _header(self, role: str) -> list[int]:
        return [self.headers[0], *self._encode(role), self.headers[1], *self._encode("\n\n")]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _block(self, groups: int) -> list[int]:
        """<vi_start>, the groups' places each followed by <eof> (the last by <eov>), <vi_end>."""
        s, group = self.special, [self.special["vision"]] * self.tokens_per_group
        body = [token for _ in range(groups) for token in (*group, s["eof"])]
        return [s["vi_start"], *body[:-1], s["eov"], s["vi_end"]]


@dataclasses.dataclass
class _Row:
    """One prompt: its ids, and the frames and their seconds of each of its media."""

    ids: list[int] = dataclasses.field(default_factory=list)
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)
    times: list[np.ndarray] = dataclasses.field(default_factory=list)


def _only(**arguments: tuple[Any, Any]) -> None:
    """Raise ValueError where an argument is not the one thing that is done here (None stands for it)."""
    for name, (given, done) in arguments.items():
        if given not in (done, None):
            raise ValueError(f"{name}={given!r}: only {done!r} is done here")


def _waiting(media: Any, kind: str) -> list[dict[str, Any]]:
    """One medium or a list of them as parts of messages."""
    if media is None:
        return []
    return [{"type": kind, kind: one} for one in (media if isinstance(media, (list, tuple)) else [media])]


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
    """A grey of more than 8 bits: of 16 bits by its mode, else by its brightest pixel."""
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
    """Refuse what is no regular file, such as a pipe, which would be waited for without end."""
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
    """(frame, seconds since the first) in the order of display."""
    guesses = container.format.name == "avi" and stream.codec_context.has_b_frames  # it has decoding times alone
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
    right, down = (c, b) if turned else (a, d)  # where the picture's columns and rows go on display
    rgb = rgb.swapaxes(0, 1) if turned else rgb
    return on_black(rgb[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1], side)


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """Where a frame's x axis and y axis point on display, (x, y) each."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside it lies what PyAV has no name for, as EXIF
        return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[round(frame.rotation / 90) % 4]
    if not matrix:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix)[:36])[:5]
    return a, b, c, d
