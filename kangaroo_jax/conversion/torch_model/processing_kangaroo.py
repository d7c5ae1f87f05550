"""Turns user input (a video, an image, frames, text) into Kangaroo's input: token ids, pixels, seconds.

Frames are sampled, decoded and letterboxed exactly as in training. Text never becomes a special token.
"""

import dataclasses
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .media_kangaroo import IMAGE_SUFFIXES, load_media

TAG = re.compile(r"<(image|video)>")
NO_CLOCK = "{%- set strftime_now = no_clock -%}"  # undefined: a date would change the prompt from day to day
MARK, MARKS = "\ue000{}\ue001", re.compile("\ue000(\\d+)\ue001")  # stand in the contents' places in a template
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Inputs(BatchFeature):
    """Inputs of the model. `to` moves them; a dtype applies only to the pixels, as seconds need their 32 bits."""

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
        """Read the model's config and tokenizer."""
        from transformers import AutoConfig, AutoTokenizer

        known = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        path = pretrained_model_name_or_path
        config = AutoConfig.from_pretrained(path, trust_remote_code=True, **known)
        return cls(config, AutoTokenizer.from_pretrained(path, trust_remote_code=True, **known))

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the files that `AutoProcessor.from_pretrained` reads: the tokenizer, preprocessor_config.json, the
        code, and the config if no model has written one there."""
        if push_to_hub:
            raise ValueError("save to a folder, and push that")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        if not (folder / "config.json").is_file():
            self.config.save_pretrained(folder)
        code = [
            Path(str(sys.modules[kind.__module__].__file__)) for kind in (type(self.config), type(self), load_media)
        ]
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
        """Does nothing; transformers calls it, but the folder's auto_map already names the class."""

    @property
    def model_input_names(self) -> list[str]:
        """The keys that `apply_chat_template` returns."""
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
        {"type": "image", "image": path or PIL image}. A list of conversations gives a batch, with its rows' frames one
        after the other. With `tokenize=False` it returns the text, or a list of texts, for `processor(text=...)`.
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

        `videos` (files or lists of frames) and `images` (files or PIL images) are one or a list, for the tags `<video>`
        and `<image>` in order over all texts. Special tokens in the text are encoded as such here; pass a user's text
        as messages to `apply_chat_template`, which encodes them as ordinary text.
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
        if not self.headers:
            return self._templated(messages, add_generation_prompt)
        row = _Row(ids=[self.bos])
        for message in messages:
            row.ids += self._header(message["role"])
            for part in _parts(message["content"]):
                self._add(row, part, self._encode)
            row.ids.append(self.eot)
        if add_generation_prompt:
            row.ids += self._header("assistant")
        return row

    def _around(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> list[str]:
        """The chat template's text around the messages' contents."""
        marked = [{"role": message["role"], "content": MARK.format(i)} for i, message in enumerate(messages)]
        template = NO_CLOCK + self.tokenizer.get_chat_template()
        text = self.tokenizer.apply_chat_template(
            marked, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        pieces = MARKS.split(text)
        if pieces[1::2] != [str(i) for i in range(len(messages))]:
            raise ValueError("the chat template does not write these messages one after another, each once")
        return pieces[::2]

    def _templated(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> "_Row":
        """A prompt by the tokenizer's chat template: texts between special tokens and media are encoded as one."""
        row, waiting = _Row(), ""
        around = self._around(messages, add_generation_prompt)
        contents = [_parts(message["content"]) for message in messages]
        for frame, content in zip(around, [*contents, []], strict=True):
            for part in [*self._pieces(frame), *content]:
                if isinstance(part, str):
                    waiting += part
                    continue
                row.ids += self._encode(waiting) if waiting else []
                waiting = ""
                if isinstance(part, int):
                    row.ids.append(part)
                else:
                    self._add(row, part, self._encode)
        row.ids += self._encode(waiting) if waiting else []
        return row

    def _pieces(self, text: str) -> list[Any]:
        """Text of a template as special tokens and the texts between them."""
        special = {t.content: (i, t) for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        found: list[Any] = []
        strip = False
        for number, piece in enumerate(re.split(f"({pattern})", text)):
            if number % 2:
                token, flags = special[piece]
                if flags.lstrip and found and isinstance(found[-1], str):
                    found[-1] = found[-1].rstrip()
                found.append(token)
                strip = flags.rstrip
            elif piece:
                found.append(piece.lstrip() if strip else piece)
        return [piece for piece in found if piece != ""]

    def _add(self, row: "_Row", part: Any, encode: Callable[[str], Any]) -> None:
        if isinstance(part, str):
            row.ids += list(encode(part)) if part else []
            return
        pixels, seconds = load_media(part, self.sampling, self.frames_per_group)
        row.ids += self._block(len(seconds) // self.frames_per_group)
        row.frames.append(pixels)
        row.times.append(seconds)

    def _batch(self, rows: Sequence["_Row"], padding: bool | str, side: str) -> Inputs:
        """Rows as one batch, padded on the left, for generation, or on the right."""
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
        if not self.headers:
            around = self._around(messages, add_generation_prompt)
            contents = [
                "".join(part if isinstance(part, str) else f"<{part['type']}>" for part in _parts(message["content"]))
                for message in messages
            ]
            return "".join(f"{frame}{content}" for frame, content in zip(around, [*contents, ""], strict=True))
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
        """<vi_start>, each group's placeholders followed by <eof> (the last by <eov>), <vi_end>."""
        s, group = self.special, [self.special["vision"]] * self.tokens_per_group
        body = [token for _ in range(groups) for token in (*group, s["eof"])]
        return [s["vi_start"], *body[:-1], s["eov"], s["vi_end"]]


@dataclasses.dataclass
class _Row:
    """One prompt: its ids, and the frames and times of each of its media."""

    ids: list[int] = dataclasses.field(default_factory=list)
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)
    times: list[np.ndarray] = dataclasses.field(default_factory=list)


def _only(**arguments: tuple[Any, Any]) -> None:
    """Raise ValueError if an argument is neither None nor the only supported value."""
    for name, (given, done) in arguments.items():
        if given not in (done, None):
            raise ValueError(f"{name}={given!r}: only {done!r} is done here")


def _waiting(media: Any, kind: str) -> list[dict[str, Any]]:
    """One medium or a list of them as parts of messages."""
    if media is None:
        return []
    return [{"type": kind, kind: one} for one in (media if isinstance(media, (list, tuple)) else [media])]


def _parts(content: Any) -> list[Any]:
    """The pieces of a message in order: texts, and media as dictionaries. Media come before the text, a line each,
    unless `<video>` and `<image>` in the text give their positions."""
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
