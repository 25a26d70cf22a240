"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}} with an HTTP status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.errors import (
    BaseMismatchError,
    ContextOverflowError,
    EdgeloraError,
    EngineBusyError,
    ModelFileError,
    SettingsError,
)

BUSY_SECONDS = 1


class ApiError(Exception):
    """What a client is told.

    Args:
        param: the field of the body that is wrong.
        code: what programs look at; type and code are OpenAI's where it has one.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def unknown_model(name: str) -> ApiError:
    """An adapter that does not exist, or that is not this key's: the two look alike."""
    return ApiError(404, f"The model {name!r} does not exist", param="model", code="model_not_found")


def of_error(error: EdgeloraError) -> ApiError:
    """What a client may know of an error of the engine's. Paths and numbers of the machine stay in the log."""
    if isinstance(error, EngineBusyError):
        return ApiError(
            429,
            "Too many requests wait already; try again later",
            type="requests",
            code="queue_full",
            headers={"Retry-After": str(BUSY_SECONDS)},
        )
    if isinstance(error, ContextOverflowError):
        return ApiError(400, error.message, param="messages", code="context_length_exceeded")
    if isinstance(error, SettingsError):
        return ApiError(400, error.message)
    if isinstance(error, BaseMismatchError):
        return ApiError(400, "The adapter was made for another base", code="base_mismatch")
    if isinstance(error, ModelFileError):
        return ApiError(500, "The adapter's file cannot be used any more", type="server_error", code="adapter_unusable")
    return ApiError(500, "The server could not finish this", type="server_error", code="engine_error")
