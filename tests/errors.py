"""Messages of errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def message(call: Callable, error: type[Exception] | tuple[type[Exception], ...] = ValueError) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(error) as info:
        call()
    text = str(info.value)
    assert text
    assert "\n" not in text
    return text
