"""A cache of text features that several threads can share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

from torch import Tensor, nn

from ..models.adapters import AdapterSnapshot

_MOST_LISTS = 64
_MOST_BYTES = 2**29  # of all lists' features together: 262,144 names at 512 numbers each


class TextFeatureCache:
    """Cache of the text features of the last lists of names, each computed by the first thread that asks for it.

    The lock is held while lists are looked up, never while features are computed; other threads that ask for the
    same list wait for the first one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lists: dict[tuple[str, ...], Future[Tensor]] = {}  # in the order of last use
        self._snapshot: AdapterSnapshot | None = None

    def get(self, names: tuple[str, ...], model: nn.Module, settings: Any, encode: Callable[[], Tensor]) -> Tensor:
        """Return the features (K, d) of these names.

        Args:
            model: lists computed with other adapters or weights are dropped.
            settings: everything else that features depend on.
            encode: a function that computes the features.
        """
        with self._lock:
            if self._snapshot is None or not self._snapshot.matches(model, settings):
                self._snapshot, self._lists = AdapterSnapshot(model, settings), {}
            known = self._lists.pop(names, None)
            future = self._lists[names] = known or Future()
            self._make_room(names)
        if known is None:
            try:
                future.set_result(encode())
            except BaseException as error:
                with self._lock:
                    if self._lists.get(names) is future:
                        del self._lists[names]
                if isinstance(error, Exception):
                    future.set_exception(error)
                else:  # such as Ctrl-C, which must not reach the waiting threads
                    future.cancel()
                raise
            with self._lock:  # again, because the size is now known
                self._make_room(names)
        try:
            return future.result()
        except CancelledError:
            return self.get(names, model, settings, encode)

    def _make_room(self, kept: tuple[str, ...]) -> None:
        """Drop the least recently used lists, but never `kept`, until the rest is small enough."""
        sizes = {names: _nbytes(future) for names, future in self._lists.items()}
        held = sum(sizes.values())
        for names in list(self._lists):
            if names != kept and (held > _MOST_BYTES or len(self._lists) > _MOST_LISTS):
                held -= sizes[names]
                del self._lists[names]

    def __reduce__(self) -> tuple[Any, ...]:
        return TextFeatureCache, ()  # a copy starts empty: locks cannot be copied


def _nbytes(future: Future[Tensor]) -> int:
    """Return the memory of the features in bytes; 0 before they are computed."""
    done = future.done() and not future.cancelled() and future.exception() is None
    return future.result().nbytes if done else 0
