"""Requests as clients send them: what is understood, what is refused and in which words."""

import base64
import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.limits import Limits
from kangaroo_jax.serving.protocol import FrameWishes, MediaPart, chat_request, tokenize_request
from kangaroo_jax.serving.reading import parsed
from kangaroo_jax.system.json_text import parse_json

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
LIMITS = Limits(max_media=4, max_listed_frames=8, max_choices=4)
HELLO = [{"role": "user", "content": "Hello"}]


def chat(messages=HELLO, **fields):
    return chat_request({"model": "kangaroo", "messages": messages} | fields, LIMITS)


def parts(*content):
    """The parts of a user's message."""
    return chat([{"role": "user", "content": list(content)}]).prompt.messages[0].parts


def refused(**fields) -> ApiError:
    messages = fields.pop("messages", HELLO)
    with pytest.raises(ApiError) as caught:
        chat(messages, **fields)
    error = caught.value
    assert error.body()["error"].keys() == {"message", "type", "param", "code"}
    assert "\n" not in error.body()["error"]["message"] and len(error.body()["error"]["message"]) < 600
    return error


def test_defaults_are_those_of_openai() -> None:
    request = chat()
    assert (request.temperature, request.top_p, request.n, request.stream) == (1.0, 1.0, 1, False)
    assert (request.max_tokens, request.logprobs, request.seed, request.stop) == (None, None, None, ())
    assert request.prompt.add_generation_prompt and not request.prompt.continue_final_message


def test_what_the_page_sends_by_curl_is_understood(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(bytes(range(256)) * 1000)  # more than the system takes as one argument
    (tmp_path / "curl").write_text("#!/bin/sh\ncat\n")
    (tmp_path / "curl").chmod(0o755)
    [command] = re.findall(r"```bash\n(echo .*? curl .*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    sent = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=True)
    text, video = chat_request(parsed(sent.stdout), LIMITS).prompt.messages[0].parts
    assert text == "What comes first?" and isinstance(video, MediaPart) and video.kind == "video"
    assert base64.b64decode(video.addresses[0].partition(",")[2]) == (tmp_path / "clip.mp4").read_bytes()


def test_what_lmms_eval_and_vlmevalkit_send() -> None:
    lmms = chat(
        [
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": "file:///data/a.mp4"}},
                    {"type": "text", "text": "What happens?"},
                ],
            }
        ],
        max_tokens=1024,
        temperature=0,
        response_format={"type": "text"},
    )
    assert lmms.prompt.messages[0].parts[1] == "What happens?" and lmms.max_tokens == 1024 and lmms.temperature == 0
    kit = chat(
        [
            {"role": "system", "content": "Answer with a letter."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,AAAA", "detail": "low"}},
                    {"type": "text", "text": "Which?"},
                ],
            },
            {"role": "assistant", "content": "Best option:("},
        ],
        add_generation_prompt=False,
        continue_final_message=True,
        max_completion_tokens=4,
        max_tokens=9,
        n=1,
    )
    assert kit.prompt.continue_final_message and not kit.prompt.add_generation_prompt and kit.max_tokens == 4
    assert [message.role for message in kit.prompt.messages] == ["system", "user", "assistant"]


def test_the_order_of_parts_is_kept_and_text_is_no_tag() -> None:
    text = "What is <video> and <image>, and <|eot_id|>?"
    found = parts(
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": "data:image/png;base64,AA=="},
        "between",
        {"type": "video_url", "video_url": {"url": "https://h/a.mp4"}, "uuid": "v1"},
    )
    assert found[0] == text and found[2] == "between"
    assert found[1] == MediaPart("image", "messages[0].content[1].image_url", ("data:image/png;base64,AA==",))
    assert found[3] == MediaPart("video", "messages[0].content[3].video_url.url", ("https://h/a.mp4",), uuid="v1")


def test_frames_are_a_list_or_jpegs_in_one_address() -> None:
    listed, jpegs = parts(
        {"type": "video", "video": ["data:image/png;base64,AA==", {"url": "file:///b.png"}], "frame_times": [0, 2.5]},
        {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAAA,BBBB,CCCC"}},
    )
    assert listed.addresses == ("data:image/png;base64,AA==", "file:///b.png") and listed.times == (0.0, 2.5)
    assert jpegs.is_frames and jpegs.addresses[2] == "data:image/jpeg;base64,CCCC" and jpegs.times == ()


def test_a_medium_may_be_named_by_its_uuid_alone() -> None:
    (part,) = parts({"type": "video_url", "video_url": None, "uuid": "film"})
    assert (part.addresses, part.uuid) == ((), "film")


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e309", "-1", '"1"', "true", "[1]", "1" + "0" * 400]
)
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_numbers_are_finite_and_in_their_range(name: str, value: str) -> None:
    error = refused(**json.loads(f'{{"{name}": {value}}}'))
    assert error.param == name and error.status == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": "x" * 257}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"seed": "a"}, "seed"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            "messages[0].content",
        ),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(fields: dict, param: str) -> None:
    assert refused(**fields).param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"guided_grammar": "start: /a/"},
        {"echo": True},
        {"use_beam_search": True},
        {"modalities": ["audio"]},
        {"tool_choice": "required"},
    ],
)
def test_what_would_change_the_answer_is_refused_and_not_ignored(fields: dict) -> None:
    error = refused(**fields)
    assert error.code == "unsupported_parameter" and error.param in fields and "not supported" in str(error)


@pytest.mark.parametrize(
    "fields, kind, text",
    [
        ({"response_format": {"type": "text"}}, None, None),
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
            "json_schema",
            '{"type": "object"}',
        ),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["红", "b"]}}, "choice", '["红", "b"]'),
        ({"guided_choice": ["a"]}, "choice", '["a"]'),
        ({"guided_json": '{"type": "integer"}'}, "json_schema", '{"type": "integer"}'),
    ],
)
def test_forms_of_answers(fields: dict, kind: str | None, text: str | None) -> None:
    form = chat(**fields).form
    assert (None, None) == (kind, text) if form is None else (form.kind, form.text) == (kind, text)


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": "json"}, "response_format"),
        ({"structured_outputs": {"grammar": "a"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": {"a": "b" * 70_000}}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "b"}, "guided_regex"),
    ],
)
def test_forms_that_are_none_are_refused_by_name(fields: dict, param: str) -> None:
    assert refused(**fields).param == param


def test_what_asks_for_nothing_is_accepted_and_unknown_fields_are_dropped_by_name() -> None:
    request = chat(tools=[], best_of=1, echo=False, user="u", tool_choice="none", response_format=None, colour=1)
    assert chat(chat_template_kwargs={"enable_thinking": False}).prompt.unknown == ()
    assert request.prompt.unknown == ("colour",)


def test_seeds_and_top_k_of_other_servers() -> None:
    assert chat(seed=-1).seed == 2**32 - 1 and chat(top_k=-1).top_k == 0 and chat(top_k=20, min_p=0.1).top_k == 20


def test_halves_of_surrogate_pairs_become_a_sign_that_utf8_has() -> None:
    assert chat([{"role": "user", "content": "a\ud800b"}]).prompt.messages[0].parts == ("a\ufffdb",)


@pytest.mark.parametrize(
    ("fields", "wishes"),
    [
        ({}, FrameWishes()),
        ({"media_io_kwargs": {"video": {"num_frames": 8}}}, FrameWishes(nframes=8)),
        ({"media_io_kwargs": {"video": {"fps": 2.0}}}, FrameWishes(fps=2.0)),
        ({"media_io_kwargs": {"video": {"fps": 2, "max_frames": 32}}}, FrameWishes(fps=2.0, max_frames=32)),
        ({"media_io_kwargs": {"video": {"fps": 2, "num_frames": 32}}}, FrameWishes(fps=2.0, max_frames=32)),
        ({"media_io_kwargs": {"video": {"num_frames": -1}}}, FrameWishes(nframes=2**31)),
        ({"media_io_kwargs": {"video": {"num_frames": -1, "fps": -1}}}, FrameWishes(nframes=2**31)),
        ({"mm_processor_kwargs": {"fps": 1, "max_frames": 9, "max_pixels": 5}}, FrameWishes(fps=1.0, max_frames=9)),
        ({"mm_processor_kwargs": {"fps": 1, "do_sample_frames": False}}, FrameWishes()),
        (
            {"media_io_kwargs": {"video": {"num_frames": 8}}, "mm_processor_kwargs": {"fps": 1, "max_frames": 9}},
            FrameWishes(nframes=8, max_frames=9),
        ),
    ],
)
def test_a_request_says_how_many_frames_it_wants(fields: dict, wishes: FrameWishes) -> None:
    assert chat(**fields).prompt.frames == wishes


@pytest.mark.parametrize("place", ["media_io_kwargs", "mm_processor_kwargs"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e309", "-2", "0", '"8"', "true", "[8]", "{}"])
@pytest.mark.parametrize("name", ["fps", "num_frames", "max_frames"])
def test_numbers_of_frames_are_numbers(place: str, name: str, value: str) -> None:
    inner = json.loads(f'{{"{name}": {value}}}')
    error = refused(**{place: {"video": inner} if place == "media_io_kwargs" else inner})
    assert error.param is not None and error.param.endswith(name)


def test_lists_of_frames_and_media_are_counted_before_any_is_read() -> None:
    frames = [{"type": "video", "video": ["data:image/png;base64,AA=="] * 9}]
    error = refused(messages=[{"role": "user", "content": frames}])
    assert error.status == 413 and "--max-listed-frames" in str(error)
    address = "data:video/jpeg;base64," + "," * 3_000_000
    begun = time.process_time()
    error = refused(messages=[{"role": "user", "content": [{"type": "video_url", "video_url": {"url": address}}]}])
    assert error.status == 413 and time.process_time() - begun < 1
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    error = refused(messages=[{"role": "user", "content": [image] * 5}])
    assert error.status == 413 and "--max-media" in str(error)


@pytest.mark.parametrize("times", [[0], [0, 1, 2], [1, 0], [0, float("inf")], ["0", "1"], 5, [0, -1]])
def test_times_of_frames_are_as_many_and_ascend(times: object) -> None:
    part = {"type": "video", "video": ["data:image/png;base64,AA=="] * 2, "frame_times": times}
    assert "frame_times" in (refused(messages=[{"role": "user", "content": [part]}]).param or "")


def test_times_belong_to_frames() -> None:
    part = {"type": "video_url", "video_url": {"url": "file:///a.mp4"}, "frame_times": [0]}
    assert "list of frames" in str(refused(messages=[{"role": "user", "content": [part]}]))


def test_tokenize_takes_a_text_or_messages() -> None:
    text = tokenize_request({"prompt": "a", "add_special_tokens": False, "return_token_strs": True}, LIMITS)
    assert (text.text, text.add_special_tokens, text.token_strings) == ("a", False, True)
    assert tokenize_request({"messages": HELLO}, LIMITS).prompt.messages[0].parts == ("Hello",)
    with pytest.raises(ApiError, match="max_frames"):
        tokenize_request({"messages": HELLO, "media_io_kwargs": {"video": {"max_frames": float("nan")}}}, LIMITS)


@pytest.mark.parametrize("body", [b"[" * 5_000_000, b'{"a":' * 100_000, b"[1]", b"1e5", b"null", b"\xff\xfe", b""])
def test_bodies_that_are_no_requests_are_refused_soon(body: bytes) -> None:
    begun = time.process_time()
    with pytest.raises(Exception) as caught:
        chat_request(parse_json(body, "the body"), LIMITS)
    assert type(caught.value).__name__ in ("ApiError", "UserError") and time.process_time() - begun < 2


@pytest.mark.parametrize("value", [b"{}", b"[]", b"1", b'{"a":1}'])
def test_a_body_of_millions_of_values_is_refused_before_it_is_parsed(value: bytes) -> None:
    begun = time.process_time()
    with pytest.raises(ApiError) as caught:
        parsed(bytearray(b'{"messages": [' + (value + b",") * 2_000_000 + b"1]}"))
    assert caught.value.status == 413 and time.process_time() - begun < 1
    assert parsed(b'{"a": ["' + b"," * 100_000 + b'"]}') == {"a": ["," * 100_000]}


def test_errors_shorten_what_they_repeat() -> None:
    error = refused(stream="x" * 1_000_000)
    assert len(str(error)) < 200
    assert len(refused(messages=[{"role": "a\n\x1b" * 5, "content": ""}]).body()["error"]["message"]) < 200
