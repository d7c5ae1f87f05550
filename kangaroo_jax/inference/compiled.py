"""Compiled programs that stay between runs."""

import jax

from kangaroo_jax.system.files import user_cache

_SECONDS = 0.2  # what took less to compile is not worth a file


def keep_programs() -> None:
    """Keep what is compiled from now on in `~/.cache/kangaroo/programs`, so that the next process need not compile it.

    Where JAX was told a folder (JAX_COMPILATION_CACHE_DIR), that one is used, by JAX's rules. A folder that cannot be
    written is a warning of JAX's. To be called before anything is compiled.
    """
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_compilation_cache_dir", str(user_cache("programs")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)
