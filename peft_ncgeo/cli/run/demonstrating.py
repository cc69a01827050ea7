"""Page that classifies images in a browser."""

from __future__ import annotations

from ...demo_app import build_app
from .classifiers import load_classifier


def demo(adapter: str, base_model: str | None, share: bool, port: int | None) -> None:
    """Serve the page until it is stopped."""
    build_app(load_classifier(adapter, base_model)).launch(share=share, server_port=port)
