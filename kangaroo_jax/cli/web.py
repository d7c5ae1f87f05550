"""`kangaroo web`: a page in the browser on which a film is shown to the model and talked about."""

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

from kangaroo_jax.cli.arguments import Count, Natural, Number, listed
from kangaroo_jax.cli.keys import keys_in
from kangaroo_jax.errors import UserError


def web(
    *,
    checkpoint: str = "",
    server: str = "",
    host: str = "127.0.0.1",
    port: Natural = 7860,
    port_file: str = "",
    allowed_hosts: str = "",
    model: str = "",
    api_key_file: str = "",
    context: Natural = 0,
    slots: Count = 4,
    dtype: str | None = None,
    quantize: str | None = None,
    workers: Count = 2,
    media_folder: str = "",
    max_upload_mb: Count = 512,
    max_folder_mb: Count = 4096,
    max_files: Count = 16,
    max_sessions: Count = 64,
    max_idle_minutes: Number = 60.0,
) -> None:
    """Show a page on which a film is uploaded, watched and talked about.

        kangaroo web --checkpoint=runs/quickstart

    Args:
        checkpoint: folder that training or a conversion wrote: a curriculum, a stage or one step
        server: address of a server of OpenAI's protocol (kangaroo serve) that answers in place of a checkpoint
        host: address to listen at
        port: 0 takes a free one
        port_file: file to write the port to, once the page is there
        allowed_hosts: names under which a proxy asks for the page, by commas; a page on 127.0.0.1 answers to no other
        model: name of the server's model; its first
        api_key_file: file with the server's API key
        context: tokens that a conversation may have; 0 is as many as a sample in training
        slots: conversations of that length that are remembered on the device
        dtype: of the computation: float32, bfloat16 or float16; by default what suits the device
        quantize: int8 or int4, of the decoder's weights
        workers: processes that decode media
        media_folder: folder for uploads; the system's for temporary files
        max_upload_mb: of one file
        max_folder_mb: of all files of all users
        max_files: of one conversation
        max_sessions: pages that are open; the longest unused gives way
        max_idle_minutes: after which a page that nobody uses is forgotten, with its files
    """
    given = dict(locals())
    if bool(checkpoint) == bool(server):
        raise UserError("web: give either --checkpoint=DIR or --server=http://...")
    os.environ["GRADIO_ANALYTICS_ENABLED"], os.environ["HF_HUB_DISABLE_TELEMETRY"] = "False", "1"
    try:
        import gradio  # noqa: F401
        import openai  # noqa: F401
    except ImportError:
        from kangaroo_jax.system.installing import install_line

        raise UserError(f"web: packages are missing: {install_line('web')}") from None
    from kangaroo_jax.web.server import Options, serve
    from kangaroo_jax.web.sessions import Bounds

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("kangaroo_jax").setLevel(logging.INFO)
    bounds = Bounds(**{field.name: given[field.name] for field in dataclasses.fields(Bounds)})
    options = Options(host, port, port_file, tuple(listed(allowed_hosts)), media_folder)
    serve(options, bounds, lambda: _remote(server, model, api_key_file) if server else _local(given))


def _remote(server: str, model: str, api_key_file: str) -> Any:
    from kangaroo_jax.web.remote import RemoteModel

    if not server.startswith(("http://", "https://")):
        raise UserError(f"--server={server}: an address begins with http:// or https://")
    key = os.environ.get("OPENAI_API_KEY", "")
    keys = keys_in(api_key_file)
    if len(keys) > 1:
        raise UserError(f"--api-key-file={api_key_file}: has {len(keys)} keys; the page sends one")
    return RemoteModel(server, keys[0] if keys else key, model)


def _local(given: dict[str, Any]) -> Any:
    from kangaroo_jax.serving.backend import Choices, open_backend
    from kangaroo_jax.serving.limits import Limits
    from kangaroo_jax.web.local import LocalModel

    choices = Choices(**{f.name: given[f.name] for f in dataclasses.fields(Choices) if f.name in given})
    log = logging.getLogger("kangaroo_jax.web")
    limits = Limits(max_request_frames=sys.maxsize)  # what fits a conversation does
    backend = open_backend(choices, limits, lambda step: log.info("%s", step))
    return LocalModel(backend, Path(os.path.abspath(given["checkpoint"])).name)


COMMANDS = {"": web}
