"""What clients send: requests of OpenAI's chat completions, with what vLLM, lmms-eval and VLMEvalKit add for videos.

A request is read strictly: what would change the answer and is not understood is refused; what is unknown is named to
the log and dropped. Text stays text: a `<video>` that a user wrote is no video.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from kangaroo_jax.data.media.addresses import short
from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.forms import Form, form_of
from kangaroo_jax.serving.limits import MIB, Limits
from kangaroo_jax.serving.reading import Fields, as_numbers, as_text

MOST_STOPS, LONGEST_STOP = 16, 256  # strings, and characters of one
MOST_STOP_IDS = 64
MOST_LOGPROBS = 20
MOST_PARTS = 1024  # of one message
LONGEST_NAME = 256  # characters of a uuid, a salt, a model's name
LONGEST_ADDRESS = 8192  # characters of an address that holds no bytes
SEEDS = 2**32
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# Fields that mean nothing here, or nothing that changes an answer.
_WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier"),
    *("skip_special_tokens", "spaces_between_special_tokens", "priority", "request_id", "timeout", "detail"),
)
# Fields without which the answer would be another than the client wants: (name, values that ask for nothing).
_REFUSED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("tools", (None, [])),
    ("functions", (None, [])),
    ("tool_choice", (None, "none", "auto")),
    ("function_call", (None, "none", "auto")),
    ("guided_grammar", (None,)),
    ("modalities", (None, [], ["text"])),
    ("audio", (None,)),
    ("prediction", (None,)),
    ("web_search_options", (None,)),
    ("reasoning_effort", (None, "none")),
    ("use_beam_search", (None, False)),
    ("best_of", (None, 1)),
    ("echo", (None, False)),
    ("prompt_logprobs", (None, 0)),
    ("include_stop_str_in_output", (None, False)),
    ("min_tokens", (None, 0)),
    ("truncate_prompt_tokens", (None,)),
    ("chat_template", (None,)),
    ("chat_template_kwargs", (None, {}, {"enable_thinking": False})),
    ("documents", (None, [])),
)


@dataclasses.dataclass(frozen=True)
class MediaPart:
    """An image or a video as the request names it; one without addresses is named by its uuid alone."""

    kind: str  # "image" or "video"
    where: str  # in the request
    addresses: tuple[str, ...] = ()  # one, or those of the frames
    is_frames: bool = False
    times: tuple[float, ...] = ()  # seconds of the frames
    uuid: str = ""


Part = str | MediaPart


@dataclasses.dataclass(frozen=True)
class Message:
    """What one side says, in the order in which it was sent."""

    role: str  # "system", "user" or "assistant"
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class FrameWishes:
    """How many frames of each video a request wants; None: as in training. The server's own bounds go before."""

    fps: float | None = None
    nframes: int | None = None
    max_frames: int | None = None
    min_frames: int | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Messages and how they become a prompt."""

    model: str | None
    messages: tuple[Message, ...]
    frames: FrameWishes
    add_generation_prompt: bool
    continue_final_message: bool
    cache_salt: str
    unknown: tuple[str, ...]  # fields that were dropped

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """All media, in order."""
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, MediaPart))


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A request of /v1/chat/completions."""

    prompt: Prompt
    max_tokens: int | None  # None: as many as there is room for; 0: the prompt is read and nothing said
    n: int
    stream: bool
    include_usage: bool
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int | None
    logit_bias: tuple[tuple[int, float], ...]
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: int | None  # likeliest tokens to tell beside each; None: no log-probabilities
    form: Form | None  # of the answer


@dataclasses.dataclass(frozen=True)
class TokenizeRequest:
    """A request of /tokenize: a text, or messages."""

    text: str | None
    prompt: Prompt | None
    add_special_tokens: bool
    token_strings: bool
    unknown: tuple[str, ...]


def chat_request(body: Any, limits: Limits) -> ChatRequest:
    """What a body of /v1/chat/completions asks for. Raises ApiError."""
    fields = Fields(body)
    for name, nothing in _REFUSED:
        if fields.take(name) not in nothing:
            raise ApiError(
                f"{name} is not supported by this server: leave it out (the answer would not be what it asks for)",
                param=name,
                code="unsupported_parameter",
            )
    fields.ignore(*_WITHOUT_EFFECT)
    stream = fields.flag("stream")
    options = fields.object("stream_options")
    include_usage = options.flag("include_usage")
    if "stream_options" in fields and not stream:
        raise fields.fail("stream_options", "belongs to a request with stream=true")
    most = fields.whole("max_completion_tokens", 0)
    old = fields.whole("max_tokens", 0)
    wants = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if top and not wants:
        raise fields.fail("top_logprobs", "needs logprobs=true")
    seed = fields.whole("seed", -(2**63), 2**64 - 1)
    top_k = fields.whole("top_k", -1, 2**31 - 1)
    choices = fields.whole("n", 1, limits.max_choices)
    request = ChatRequest(
        prompt=Prompt(None, (), FrameWishes(), True, False, "", ()),
        max_tokens=old if most is None else most,
        n=1 if choices is None else choices,
        stream=stream,
        include_usage=include_usage,
        temperature=_or(fields.number("temperature", 0.0, 100.0), 1.0),
        top_p=_or(fields.number("top_p", 0.0, 1.0, above=True), 1.0),
        top_k=max(top_k or 0, 0),
        min_p=_or(fields.number("min_p", 0.0, 1.0), 0.0),
        presence_penalty=_or(fields.number("presence_penalty", -2.0, 2.0), 0.0),
        frequency_penalty=_or(fields.number("frequency_penalty", -2.0, 2.0), 0.0),
        repetition_penalty=_or(fields.number("repetition_penalty", 0.0, 100.0, above=True), 1.0),
        seed=None if seed is None else seed % SEEDS,
        logit_bias=_biases(fields),
        stop=_stops(fields),
        stop_ids=_ids(fields, "stop_token_ids", MOST_STOP_IDS),
        ignore_eos=fields.flag("ignore_eos"),
        logprobs=(top or 0) if wants else None,
        form=form_of(fields),
    )
    return dataclasses.replace(request, prompt=_prompt(fields, limits, (*options.unknown(),)))


def tokenize_request(body: Any, limits: Limits) -> TokenizeRequest:
    """What a body of /tokenize asks for. Raises ApiError."""
    fields = Fields(body)
    add_special, strings = fields.flag("add_special_tokens", True), fields.flag("return_token_strs")
    if "prompt" in fields:
        text = fields.text("prompt", limits.max_body_mb * MIB)
        fields.text("model", LONGEST_NAME)
        return TokenizeRequest(text, None, add_special, strings, tuple(fields.unknown()))
    prompt = _prompt(fields, limits)
    return TokenizeRequest(None, prompt, add_special, strings, prompt.unknown)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    texts = fields.items("stop", MOST_STOPS) if isinstance(value, list) else [value] if value is not None else []
    stops = tuple(as_text(text, f"stop[{place}]", LONGEST_STOP) for place, text in enumerate(texts or ()))
    if "" in stops:
        raise ApiError("stop: an empty string would end every answer", param="stop")
    return stops


def _ids(fields: Fields, name: str, most: int) -> tuple[int, ...]:
    items = fields.items(name, most) or []
    inner = Fields({str(place): item for place, item in enumerate(items)}, fields.at(name))
    return tuple(inner.whole(str(place), 0, 2**31 - 1) or 0 for place in range(len(items)))


def _biases(fields: Fields) -> tuple[tuple[int, float], ...]:
    value = fields.take("logit_bias")
    if value is None:
        return ()
    inner = Fields(value, "logit_bias")
    if len(value) > 300:
        raise fields.fail("logit_bias", f"has {len(value)} tokens, and may have 300")
    if not all(name.isascii() and name.isdigit() and len(name) < 10 for name in value):
        raise fields.fail("logit_bias", "must be an object whose names are ids of tokens")
    return tuple((int(name), _or(inner.number(name, -100.0, 100.0), 0.0)) for name in value)


# ------------------------------------------------------------------------------------ messages


def _prompt(fields: Fields, limits: Limits, unknown: Sequence[str] = ()) -> Prompt:
    """The messages of a request, and what says how they are read. All other fields have been taken."""
    messages = tuple(_message(item, place, limits) for place, item in enumerate(_required(fields, limits)))
    count = sum(isinstance(part, MediaPart) for message in messages for part in message.parts)
    if count > limits.max_media:
        raise ApiError(
            f"messages: {count} images and videos, limit {limits.max_media} (--max-media)",
            param="messages",
            status=413,
            code="too_large",
        )
    proceed = fields.flag("continue_final_message")
    generate = fields.flag("add_generation_prompt", not proceed)
    if proceed and generate:
        raise fields.fail("continue_final_message", "and add_generation_prompt cannot both be true")
    if proceed and messages[-1].role != "assistant":
        raise fields.fail("continue_final_message", "needs a last message of the assistant")
    wishes = _frame_wishes(fields)
    return Prompt(
        model=fields.text("model", LONGEST_NAME),
        messages=messages,
        frames=wishes,
        add_generation_prompt=generate,
        continue_final_message=proceed,
        cache_salt=fields.text("cache_salt", LONGEST_NAME) or "",
        unknown=(*fields.unknown(), *unknown),
    )


def _required(fields: Fields, limits: Limits) -> list[Any]:
    messages = fields.items("messages", limits.max_messages)
    if not messages:
        raise fields.fail("messages", "is missing or empty")
    return messages


def _message(value: Any, place: int, limits: Limits) -> Message:
    fields = Fields(value, f"messages[{place}]")
    named = fields.text("role", 32)
    role = _ROLES.get(named or "")
    if role is None:
        raise fields.fail("role", f"must be one of {', '.join(_ROLES)}, not {named!r}")
    if fields.take("tool_calls") or fields.take("function_call"):
        raise fields.fail("tool_calls", "is not supported by this server")
    content = fields.take("content")
    if content is None and role == "assistant":
        return Message(role, ())
    if not isinstance(content, list):
        return Message(role, (as_text(content, fields.at("content"), limits.max_body_mb * MIB),))
    items = fields.items("content", MOST_PARTS) or []
    parts = tuple(_part(item, f"{fields.at('content')}[{number}]", limits) for number, item in enumerate(items))
    if role != "user" and not all(isinstance(part, str) for part in parts):
        raise fields.fail("content", f"of the {named}: images and videos stand in messages of the user")
    return Message(role, parts)


def _part(value: Any, where: str, limits: Limits) -> Part:
    if isinstance(value, str):
        return as_text(value, where, limits.max_body_mb * MIB)
    fields = Fields(value, where)
    forms = {"image_url": "image", "input_image": "image", "image": "image", "video_url": "video", "video": "video"}
    kind = fields.text("type", 32) or next((name for name in (*forms, "text") if name in fields), "")
    if kind in ("text", "input_text", "output_text", "refusal"):
        text = fields.text("refusal" if kind == "refusal" else "text", limits.max_body_mb * MIB)
        if text is None:
            raise fields.fail("text", "is missing")
        return text
    if kind not in forms:
        raise fields.fail("type", f"is {kind!r}: this server reads text, image_url, video_url and video")
    return _medium(fields, forms[kind], "image_url" if kind == "input_image" else kind, limits)


def _medium(fields: Fields, kind: str, name: str, limits: Limits) -> MediaPart:
    """An image or video part: an address, in an object or by itself, or a list of frames' addresses."""
    uuid = fields.text("uuid", LONGEST_NAME) or ""
    value = fields.take(name)
    inner = fields
    if isinstance(value, dict):
        inner = Fields(value, fields.at(name))
        uuid = inner.text("uuid", LONGEST_NAME) or uuid
        value = inner.take("url")
    where = inner.at("url") if inner is not fields else fields.at(name)
    times_in = inner if "frame_times" in inner else fields
    times = times_in.take("frame_times")
    if value is None and uuid:
        return MediaPart(kind, where, uuid=uuid)
    if value is None:
        raise ApiError(f"{where} is missing", param=where)
    addresses, is_frames = _addresses(value, kind, where, limits)
    seconds: tuple[float, ...] = ()
    if times is not None:
        if not is_frames:
            raise times_in.fail("frame_times", "belongs to a video that is given as a list of frames")
        seconds = as_numbers(times, times_in.at("frame_times"), limits.max_listed_frames)
        if len(seconds) != len(addresses):
            raise times_in.fail("frame_times", f"has {len(seconds)} times for {len(addresses)} frames")
        if any(after < before for before, after in zip(seconds, seconds[1:], strict=False)):
            raise times_in.fail("frame_times", "must not decrease")
    return MediaPart(kind, where, addresses, is_frames, seconds, uuid)


def _addresses(value: Any, kind: str, where: str, limits: Limits) -> tuple[tuple[str, ...], bool]:
    """The addresses that a part names, and whether they are those of frames. Frames are counted before any is read."""
    jpegs = "data:video/jpeg;base64,"
    if isinstance(value, str) and value[: len(jpegs)].lower() == jpegs and kind == "video":
        _count_frames(value.count(",", len(jpegs)) + 1, where, limits)
        return tuple(f"data:image/jpeg;base64,{one}" for one in value[len(jpegs) :].split(",")), True
    if isinstance(value, list) and kind == "video":
        _count_frames(len(value), where, limits)
        return tuple(_address(item, f"{where}[{place}]", limits) for place, item in enumerate(value)), True
    return (_address(value, where, limits),), False


def _count_frames(count: int, where: str, limits: Limits) -> None:
    if not 1 <= count <= limits.max_listed_frames:
        raise ApiError(
            f"{where}: {count} frames, limit {limits.max_listed_frames} (--max-listed-frames)"
            if count
            else f"{where}: the list of frames is empty",
            param=where,
            status=413 if count else 400,
            code="too_large" if count else None,
        )


def _address(value: Any, where: str, limits: Limits) -> str:
    if isinstance(value, dict):  # {"url": ...}, as in a part, or {"image": ...}
        inner = Fields(value, where)
        value = inner.take("url") or inner.take("image")
    address = as_text(value, where, limits.max_body_mb * MIB)
    if not address.startswith("data:") and len(address) > LONGEST_ADDRESS:
        raise ApiError(f"{where}: {short(address)}: an address of {len(address)} characters", param=where)
    return address


# ---------------------------------------------------------------------------- numbers of frames


def _frame_wishes(fields: Fields) -> FrameWishes:
    """How many frames are wanted: `media_io_kwargs.video` goes before `mm_processor_kwargs`, as in vLLM.

    Of both a rate and a number in one place, the number is the most that the rate may give.
    """
    outer = fields.object("media_io_kwargs")
    outer.object("image")
    first = _wishes_in(outer.object("video"))
    processor = fields.object("mm_processor_kwargs")
    processor.ignore("max_pixels", "min_pixels", "size", "do_resize", "total_pixels", "num_crops")
    samples = processor.flag("do_sample_frames", True)
    second = _wishes_in(processor)
    if not samples:  # frames as they were chosen before
        second = FrameWishes()
    chosen = first if first.fps is not None or first.nframes is not None else second
    return FrameWishes(
        fps=chosen.fps,
        nframes=chosen.nframes,
        max_frames=second.max_frames if first.max_frames is None else first.max_frames,
        min_frames=second.min_frames if first.min_frames is None else first.min_frames,
    )


def _wishes_in(fields: Fields) -> FrameWishes:
    fps = fields.number("fps", -1.0, math.inf)
    count = fields.whole("num_frames", -1)
    most, least = fields.whole("max_frames", 1), fields.whole("min_frames", 1)
    if fps is not None and fps != -1.0 and fps <= 0.0:
        raise fields.fail("fps", "must be above 0")
    if count == 0:
        raise fields.fail("num_frames", "must be 1 or more (-1: as many as the server allows)")
    rate = None if fps == -1.0 else fps
    if count == -1:
        count = None if rate is not None else 2**31
    if rate is not None and count is not None:
        return FrameWishes(fps=rate, max_frames=count if most is None else min(most, count), min_frames=least)
    return FrameWishes(rate, count, most, least)
