"""What a client is told when something is wrong: one JSON object of the field's form."""

from itertools import takewhile
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from vlcache_jax.errors import short

LONGEST = 600
"""Characters of a message."""

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}
"""Types of errors by their status; of other ones below 500 "invalid_request_error"."""


_TYPES = {"str", "int", "float", "bool", "constrained-str"}


class ApiError(HTTPException):
    """An error for the client.

    Args:
        status: of HTTP.
        message: one line that says what to do.
        param: the field that is wrong.
        code: what programs look at, "model_not_found" for instance.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: object,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, short(str(message), LONGEST), headers)
        self.param, self.code = param, code


def busy(message: object) -> ApiError:
    """Nothing is wrong but the time."""
    return ApiError(503, message, code="overloaded", headers={"Retry-After": "2"})


def failure() -> ApiError:
    """Something failed here; the log says what, the client is not told."""
    return ApiError(500, "the server failed to answer: try again", code="internal_error")


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON object of an error."""
    own = "invalid_request_error" if error.status_code < 500 else "server_error"
    told = {
        "message": error.detail,
        "type": TYPES.get(error.status_code, own),
        "param": error.param,
        "code": error.code,
    }
    return {"error": told}


def response(error: ApiError) -> JSONResponse:
    """The response of an error."""
    return JSONResponse(error_body(error), error.status_code, error.headers)


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """The response of an exception that a route has raised."""
    match error:
        case ApiError():
            return response(error)
        case RequestValidationError():
            return response(_invalid(error))
        case HTTPException(status_code=404):
            return response(ApiError(404, "there is no such route", code="not_found"))
        case HTTPException(status_code=405):
            message = "this route has another method"
            return response(ApiError(405, message, headers=dict(error.headers or {})))
        case HTTPException():
            message = "the body cannot be read: send one JSON object"
            return response(ApiError(error.status_code, message))
    return response(failure())


def _invalid(error: RequestValidationError) -> ApiError:
    """Of the first field that is wrong."""
    first = error.errors()[0]
    # Of a field that may have one of several types, these stand behind its name.
    where = [
        *takewhile(lambda part: part not in _TYPES and "[" not in part, map(str, first["loc"][1:]))
    ]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}")
    if first["type"] in ("missing", "model_attributes_type") and not where:
        return ApiError(400, "send one JSON object, with Content-Type: application/json")
    param = ".".join(where)
    given = "" if first["type"] == "missing" else f", not {short(repr(first.get('input')))}"
    return ApiError(400, f"{param}: {first['msg']}{given}", param=param)
