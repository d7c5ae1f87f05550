"""The one way to a server of OpenAI's protocol that answers questions or marks answers: greedily."""

from typing import Protocol

from kangaroo_jax.llm_client.endpoint import Endpoint


class Served(Protocol):
    """A model at an address."""

    @property
    def url(self) -> str:
        """The address, with /v1."""

    @property
    def model(self) -> str:
        """Its name there."""

    @property
    def api_key_env(self) -> str:
        """The variable of the environment that holds the key, "" for none."""

    @property
    def timeout(self) -> float:
        """Seconds of a call."""


def endpoint_of(name: str, served: Served) -> Endpoint:
    """The endpoint `name` of a model. Raises UserError as `Endpoint` does."""
    settings = {"temperature": 0.0}
    key, timeout = served.api_key_env, served.timeout
    return Endpoint(name, served.url, served.model, api_key_env=key, timeout=timeout, settings=settings)
