"""Bodies that nobody thought of: whatever they are, the server answers or says what is wrong, and goes on."""

import http.client
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kangaroo_jax.serving.limits import Limits
from tests.serving.test_app import HELLO, NOTHING, photo, send, soon

pytest.importorskip("openai")
ODD = [0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 1e308, float("nan"), float("inf"), -0.0, 0.5, True, None]
ODD += ["", "a", "\0", "\ud800", "data:", "data:image/png;base64,", "data:video/jpeg;base64,,,", "file://", "file:///"]
ODD += ["http://[", [], {}, [[]], [None], {"": {}}, {"url": None}, {"type": "text"}, {"type": "video", "video": []}]
ODD += ["x" * 5000, photo()]
FIELDS = (
    "model messages max_tokens max_completion_tokens n stream stream_options temperature top_p top_k min_p seed stop "
    "presence_penalty frequency_penalty repetition_penalty logit_bias stop_token_ids ignore_eos logprobs top_logprobs "
    "media_io_kwargs mm_processor_kwargs add_generation_prompt continue_final_message cache_salt tools response_format "
    "structured_outputs guided_json guided_regex guided_choice "
    "prompt add_special_tokens return_token_strs metadata colour"
).split()
INNER = "role content type text image_url video_url video url uuid frame_times include_usage fps num_frames 5".split()
LEAVES = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=4),
    max_leaves=8,
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "video_url", "video", "input_image"])},
    optional={name: VALUES for name in ("text", "image_url", "video_url", "video", "uuid", "frame_times")},
)
ROLES = st.sampled_from(["user", "assistant", "system", "developer", "tool"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=9) | st.lists(PARTS | VALUES, max_size=3)}),
    max_size=3,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4).flatmap(
    lambda fields: MESSAGES.map(lambda said: {"messages": said} | fields) | st.just({"messages": HELLO} | fields)
)


def test_no_body_is_an_error_of_the_server(start) -> None:
    server = start(Limits(max_media_mb=1, max_listed_frames=4))
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)

    @settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(["/v1/chat/completions", "/tokenize"]), BODIES | VALUES)
    def asked(path: str, body: Any) -> None:
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        said = response.read()
        assert response.status < 500, (body, said)
        if response.status >= 400:
            assert json.loads(said)["error"].keys() == {"message", "type", "param", "code"}
        elif response.headers["content-type"].startswith("text/event-stream"):
            assert said.endswith(b"data: [DONE]\n\n") and b"error of the server" not in said
        else:
            json.loads(said)

    asked()
    connection.close()
    soon(server.left, NOTHING)
    assert send(server.port, "GET", "/health")[0] == 200


def test_the_page_of_requests_names_what_is_read(start) -> None:
    status, _, body = send(start().port, "GET", "/openapi.json")
    page = json.loads(body)
    told = page["paths"]["/v1/chat/completions"]["post"]
    assert status == 200 and told["operationId"] == "createChatCompletion" and "4XX" in told["responses"]
    asked = told["requestBody"]["content"]["application/json"]["schema"]
    assert asked["required"] == ["messages"] and set(asked["properties"]) <= set(FIELDS)
    assert len(page["paths"]["/tokenize"]["post"]["requestBody"]["content"]["application/json"]["schema"]["anyOf"]) == 2


@pytest.mark.slow
@pytest.mark.alone
def test_schemathesis_finds_no_error_of_the_server(start) -> None:
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent)) or shutil.which("schemathesis")
    if program is None:
        pytest.skip("schemathesis is not installed")
    server = start(Limits(max_media_mb=1, max_listed_frames=4))
    words = [f"{server.url}/openapi.json", "--max-examples=25", "--seed=1"]
    checks = "not_a_server_error,response_schema_conformance,content_type_conformance,status_code_conformance"
    done = subprocess.run([program, "run", *words, f"--checks={checks}"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:]
    soon(server.left, NOTHING)
