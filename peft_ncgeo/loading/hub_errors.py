"""Errors of the Hub and of the network, in one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import errors


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn any error of the Hub or of the network into one `OSError`, whose message starts with `what`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: the download of a large file broke off
        raise OSError(f"{what}: {_reason(error)}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        raise OSError(f"{what}: the Hub cannot be reached ({_first_line(error)}).") from error


def _reason(error: Any) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return "no valid token; log in with `hf auth login` or pass token. A private or misspelt name gives this too."
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated; ask for access on its page."
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or the token has no access to it."
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):  # an EntryNotFoundError too
        return f"it is not in the cache and the Hub cannot be reached ({_first_line(error)})."
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no such file."
    if status == 403:
        return "the token has no permission to write there."
    return _first_line(error)


def _first_line(error: Any) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
