"""The package's log, and what it says only once."""

import logging

import torch

LOG = logging.getLogger("mfa")
said: set[str] = set()


def once(message: str, level: int = logging.WARNING) -> None:
    """Logs a message that hasn't been logged yet; nothing where torch.compile traces the caller, for it can't log."""
    if torch.compiler.is_dynamo_compiling() or message in said:
        return
    said.add(message)
    LOG.log(level, "%s", message)
