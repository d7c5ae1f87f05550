"""What tests of annotation share: clips with key frames, and servers that answer for models."""

from tests.llm_client.fixtures import honest_server, make_clips, make_config, server

__all__ = ["honest_server", "make_clips", "make_config", "server"]
