"""`kangaroo serve`: answers requests of OpenAI's protocol about videos and images."""

import logging
import sys

from kangaroo_jax.cli.arguments import Count, Natural, Number, listed
from kangaroo_jax.cli.keys import keys_in
from kangaroo_jax.errors import UserError


def serve(
    *,
    checkpoint: str,
    host: str = "127.0.0.1",
    port: Natural = 8000,
    port_file: str = "",
    served_model_name: list[str] | None = None,
    lora: list[str] | None = None,
    ema: bool = False,
    api_key: list[str] | None = None,
    api_key_file: str = "",
    allowed_media_root: str = "",
    allowed_media_hosts: str = "",
    context: Natural = 0,
    slots: Count = 4,
    dtype: str | None = None,
    quantize: str | None = None,
    kv_dtype: str | None = None,
    host_cache_gib: Number = 4.0,
    vision_cache_gib: Number = 2.0,
    share_cache: bool = False,
    workers: Count = 2,
    media_folder: str = "",
    cors_origins: str = "",
    root_path: str = "",
    drain_seconds: Number = 60.0,
    max_requests: Count = 64,
    max_key_requests: Count = 16,
    max_choices: Count = 8,
    max_body_mb: Count = 64,
    max_bodies_mb: Count = 512,
    max_body_seconds: Number = 60.0,
    max_messages: Count = 512,
    max_media: Count = 16,
    max_listed_frames: Count = 512,
    max_media_mb: Count = 1024,
    max_folder_mb: Count = 8192,
    max_named_mb: Natural = 1024,
    max_frames: Natural = 0,
    max_request_frames: Count = 512,
    max_frames_in_flight: Count = 2048,
    max_fetch_seconds: Number = 30.0,
    max_decode_seconds: Number = 120.0,
    max_decoder_mb: Natural = 4096,
    max_request_seconds: Number = 900.0,
) -> None:
    """Answer requests of OpenAI's protocol: /v1/chat/completions with text, images and videos.

        kangaroo serve --checkpoint=runs/quickstart --port=8000

    Args:
        checkpoint: folder that training or a conversion wrote: a curriculum, a stage or one step
        host: address to listen at
        port: 0 takes a free one
        port_file: file to write the port to, once the server listens
        served_model_name: name of the model in requests, several times for several; "kangaroo"
        lora: NAME=FOLDER of an adapter beside the checkpoint, which answers as model NAME; several times for several
        ema: take the average of the weights, or of the adapters of --lora, where training kept one
        api_key: key that clients must send, several times for several; without one everybody may ask
        api_key_file: file with a key a line, which no list of processes shows
        allowed_media_root: folder below which file:// addresses of requests may lie; none may
        allowed_media_hosts: hosts (host or host:port, by commas) that are read from for http(s):// addresses; none
        context: tokens that a conversation may have; 0 is as many as a sample in training
        slots: conversations of that length at the same time
        dtype: of the computation: float32, bfloat16 or float16; by default what suits the device
        quantize: int8 or int4, of the decoder's weights
        kv_dtype: int8 halves the memory of what is remembered; by default it is of the computation's dtype
        host_cache_gib: memory for conversations that lost their place on the device
        vision_cache_gib: memory for what was seen of media
        share_cache: let what one API key's requests left serve another's
        workers: processes that decode media
        media_folder: folder for media of requests; the system's for temporary files
        cors_origins: origins of pages that may ask from a browser, by commas
        root_path: what a proxy puts before all addresses
        drain_seconds: how long requests under way may go on after SIGTERM
        max_requests: requests under way or waiting
        max_key_requests: of these, by one API key
        max_choices: n of a request
        max_body_mb: of a request
        max_bodies_mb: of all requests that are being read
        max_body_seconds: until a request's body is there
        max_messages: of a request
        max_media: images and videos of a request
        max_listed_frames: of a video that is a list or a folder of images
        max_media_mb: of one file
        max_folder_mb: of all files written for requests under way
        max_named_mb: of media that clients gave a uuid
        max_frames: of one video; 0 is as in training
        max_request_frames: of all media of a request
        max_frames_in_flight: frames that are being decoded at the same time
        max_fetch_seconds: for one address
        max_decode_seconds: for one file
        max_decoder_mb: memory of a process that decodes, 0 without a bound
        max_request_seconds: from a request to the end of its answer
    """
    given = dict(locals())
    import dataclasses

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        from kangaroo_jax.system.installing import install_line

        raise UserError(f"serve: packages are missing: {install_line('serve')}") from None
    from kangaroo_jax.serving.backend import Choices, open_backend
    from kangaroo_jax.serving.limits import Limits
    from kangaroo_jax.serving.server import Options
    from kangaroo_jax.serving.server import serve as run

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("kangaroo_jax").setLevel(logging.INFO)
    limits = Limits(**{field.name: given[field.name] for field in dataclasses.fields(Limits)})
    loras = tuple(_named(one) for one in lora or ())
    held = {field.name: given[field.name] for field in dataclasses.fields(Choices) if field.name in given}
    choices = Choices(**held, loras=loras)
    options = Options(
        host=host,
        port=port,
        port_file=port_file,
        names=_names(served_model_name or ["kangaroo"], [name for name, _ in loras]),
        keys=(*(api_key or ()), *keys_in(api_key_file)),
        share_cache=share_cache,
        origins=tuple(listed(cors_origins)),
        root_path=root_path,
        media_root=allowed_media_root,
        media_hosts=tuple(listed(allowed_media_hosts)),
        media_folder=media_folder,
        drain_seconds=drain_seconds,
    )
    if any(not key.strip() for key in options.keys):
        raise UserError("serve: an API key is empty")
    code = run(options, limits, lambda step: open_backend(choices, limits, step))
    if code:
        raise SystemExit(code)


def _named(lora: str) -> tuple[str, str]:
    """(name, folder) of `NAME=FOLDER`. Raises UserError."""
    name, _, folder = lora.partition("=")
    if not (name and folder):
        raise UserError(f"--lora={lora}: give the name of the model and the adapter's folder, --lora=NAME=FOLDER")
    return name, folder


def _names(own: list[str], adapters: list[str]) -> tuple[str, ...]:
    """The names of all models. Raises UserError for one that two have."""
    names = [*own, *adapters]
    if twice := [name for name in adapters if names.count(name) > 1]:
        raise UserError(f"--lora={twice[0]}=...: another model has this name; give one of its own")
    return tuple(names)


COMMANDS = {"": serve}
