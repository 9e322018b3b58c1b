"""Structured logs: a JSON object on each line, with the id of the request that it belongs to."""

import contextvars
import json
import logging
from typing import Any

LOG = logging.getLogger("vlcache.serve")

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
"""Of the request that is served."""


def log(event: str, level: int = logging.INFO, *, exc_info: Any = None, **fields: Any) -> None:
    """One line.

    Args:
        event: what happened, one word.
        level: of the logging module.
        exc_info: an exception, whose traceback is written.
        **fields: plain values.
    """
    LOG.log(level, event, extra={"fields": fields}, exc_info=exc_info)


class JsonLines(logging.Formatter):
    """Log lines as JSON objects."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "request_id": request_id.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
