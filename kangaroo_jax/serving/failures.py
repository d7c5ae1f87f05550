"""What a client is told when its request is not answered, in OpenAI's form."""

from collections.abc import Mapping
from typing import Any

from kangaroo_jax.errors import printable

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
    507: "server_error",
}
_LONGEST = 500  # characters of a message


class ApiError(Exception):
    """A request that is refused; `param` is where in it, `code` what a program may look at."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`retry_after` in seconds."""
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.retry_after = message, param, status, code, retry_after

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`."""
        text = printable(self.message)
        text = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code or kind}}

    def headers(self) -> Mapping[str, str]:
        """Those that go with it."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def too_large(what: str, size: float, limit: float, flag: str, param: str | None = None) -> ApiError:
    """413 that names the flag to change; sizes in MiB."""
    return ApiError(
        f"{what} of {size:.0f} MB, limit {limit:.0f} MB (--{flag.replace('_', '-')})",
        param=param,
        status=413,
        code="too_large",
    )
