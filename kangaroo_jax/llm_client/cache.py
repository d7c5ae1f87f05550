"""A cache of models' answers in an SQLite file, so that no answer is paid for twice."""

import dataclasses
import sqlite3
from pathlib import Path

from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.requests import Reply

_TABLE = """
create table if not exists replies (
    key text primary key,
    model text not null,
    prompt text not null,
    outcome text not null,
    text text not null,
    reason text not null,
    attempts integer not null,
    prompt_tokens integer not null,
    completion_tokens integer not null,
    spent_prompt_tokens integer not null,
    spent_completion_tokens integer not null,
    seconds real not null
) without rowid
"""
_COLUMNS = (
    "outcome",
    "text",
    "reason",
    "attempts",
    "prompt_tokens",
    "completion_tokens",
    "spent_prompt_tokens",
    "spent_completion_tokens",
    "seconds",
)


class ReplyCache:
    """Replies by `requests.key_of`. Once `put` has returned, a kill of the process does not lose the reply.

    Only one process may use a file: give each shard of a large set its own.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises UserError if that fails, or the file is not such a cache."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, isolation_level=None, timeout=30)
            self._base.execute("pragma journal_mode = wal")
            self._base.execute("pragma synchronous = normal")
            self._base.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{path}: cannot be used as cache of answers ({error})") from None

    def get(self, key: str) -> Reply | None:
        """The reply stored under a key, with 0 attempts; None if there is none."""
        row = self._base.execute(f"select {', '.join(_COLUMNS)} from replies where key = ?", (key,)).fetchone()
        if row is None:
            return None
        return Reply(**(dict(zip(_COLUMNS, row, strict=True)) | {"attempts": 0}))

    def put(self, key: str, model: str, prompt: str, reply: Reply) -> None:
        """Store a reply. Raises ValueError for an error, which another run may not have."""
        if reply.outcome == "error":
            raise ValueError("an error is no answer to keep")
        values = dataclasses.asdict(reply)
        names = ("key", "model", "prompt", *_COLUMNS)
        row = (key, model, prompt, *(values[name] for name in _COLUMNS))
        marks = ", ".join("?" * len(names))
        self._base.execute(f"insert or replace into replies ({', '.join(names)}) values ({marks})", row)

    def __len__(self) -> int:
        return int(self._base.execute("select count(*) from replies").fetchone()[0])

    def totals(self) -> dict[str, dict[str, int]]:
        """For each model: stored answers, attempts, and tokens spent on them in all runs."""
        rows = self._base.execute(
            "select model, count(*), sum(attempts), sum(spent_prompt_tokens), sum(spent_completion_tokens) "
            "from replies group by model order by model"
        )
        names = ("answers", "attempts", "prompt_tokens", "completion_tokens")
        return {model: dict(zip(names, numbers, strict=True)) for model, *numbers in rows}

    def close(self) -> None:
        """Close the file, with everything written into it."""
        self._base.close()
