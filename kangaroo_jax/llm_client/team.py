"""The clients of a config's backends."""

import collections
import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.config_files import nearest
from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.cache import ReplyCache
from kangaroo_jax.llm_client.client import Client, Limits
from kangaroo_jax.llm_client.requests import Backend


class Clients:
    """One client for each named backend of `config.backends`."""

    def __init__(self, backends: ConfigDict, names: Iterable[str], cache: ReplyCache | None = None) -> None:
        """Make the backends in `names`. Raises UserError for a wrong name or setting."""
        self.clients: dict[str, Client] = {}
        self._configs: dict[str, ConfigDict] = {}
        configs = {name: backend_config(backends, name) for name in names}
        _check_settings(configs)
        for name, config in configs.items():
            limits = {field.name: config[field.name] for field in dataclasses.fields(Limits)}
            self._configs[name] = config
            self.clients[name] = Client(make_backend(name, config), Limits(**limits), cache)

    def __getitem__(self, name: str) -> Client:
        return self.clients[name]

    def identity(self) -> dict[str, Any]:
        """The model and settings of each name, on which the answers depend."""
        return {n: [c.backend.model, dict(c.backend.settings)] for n, c in self.clients.items()}

    def summary(self) -> dict[str, Any]:
        """Counts of each client, and the cost of its tokens in this run."""
        summaries = {}
        for name, client in self.clients.items():
            counts = client.counts
            money = cost(self._configs[name], counts["prompt_tokens"], counts["completion_tokens"])
            summaries[name] = client.summary() | {"cost": round(money, 6)}
        return summaries

    def line(self) -> str:
        """The counts of all clients for a line of progress."""
        counts = [client.counts for client in self.clients.values()]
        total = {key: sum(count[key] for count in counts) for key in ("calls", "from_cache", "error")}
        faults = sum(sum(client.faults.values()) for client in self.clients.values())
        tokens = sum(count["completion_tokens"] for count in counts)
        return (
            f"{total['calls']:,} calls, {total['from_cache']:,} from the cache, {faults:,} faults, "
            f"{total['error']:,} errors, {tokens:,} tokens written"
        )

    async def close(self) -> None:
        """Close all backends."""
        for client in self.clients.values():
            await client.backend.close()


def backend_config(backends: ConfigDict, name: str) -> ConfigDict:
    """The config of a backend. Raises UserError if there is none with the name."""
    if name not in backends:
        known = ", ".join(backends)
        raise UserError(f"no backend {name!r}{nearest(name, backends)}: config.backends has {known}")
    return backends[name]


def cost(config: ConfigDict, prompt_tokens: float, completion_tokens: float) -> float:
    """The cost of so many tokens, in the currency of the prices."""
    return float(prompt_tokens * config.price_in + completion_tokens * config.price_out) / 1e6


# kind -> the key that every backend of this kind needs, and its meaning
_NEEDED = {
    "endpoint": ("model", "the name that its server knows a model by"),
    "kangaroo": ("checkpoint", "a folder that training wrote"),
    "scenes": ("corpus", "a folder that kangaroo quickstart generated"),
}


def _check_settings(configs: Mapping[str, ConfigDict]) -> None:
    """Raise a UserError that names all missing settings of backends."""
    lacking = collections.defaultdict(list)
    for name, config in configs.items():
        if config.kind not in _NEEDED:
            raise UserError(f"backend {name}: no kind {config.kind!r}; there are {', '.join(_NEEDED)}")
        key, what = _NEEDED[config.kind]
        if not config[key]:
            lacking[what].append(f"--config.backends.{name}.{key}=...")
        if config.kind == "endpoint" and config.api_key_env and not os.environ.get(config.api_key_env):
            lacking["the API key, in the environment"].append(f"{config.api_key_env} (of {name})")
    if lacking:
        missing = "; ".join(f"{' '.join(flags)} ({what})" for what, flags in lacking.items())
        raise UserError(f"the config does not name all models yet: give {missing}; docs/annotation.md has the presets")


def make_backend(name: str, config: ConfigDict) -> Backend:
    """The backend that a config with all needed settings describes. Raises UserError."""
    sampling: Mapping[str, Any] = {key: config[key] for key in ("temperature", "top_p", "seed")}
    if config.kind == "endpoint":
        from kangaroo_jax.llm_client.endpoint import Endpoint

        return Endpoint(
            name,
            config.base_url,
            config.model,
            api_key_env=config.api_key_env,
            timeout=config.timeout,
            structured=config.structured,
            settings=sampling,
        )
    if config.kind == "kangaroo":
        from kangaroo_jax.llm_client.own_model import OwnModel

        structured = config.structured
        return OwnModel(name, config.checkpoint, batch_size=config.batch_size, structured=structured, settings=sampling)
    from kangaroo_jax.llm_client.corpus_rules import SceneRules

    return SceneRules(name, config.corpus, settings={"view": config.view})
