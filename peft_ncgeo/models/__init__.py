"""Models: their towers, heads and adapters, and how images and texts become features."""

from .image_encoder import encode_images
from .text_encoder import encode_texts

__all__ = ["encode_images", "encode_texts"]
