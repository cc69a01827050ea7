"""Access to models: towers, heads, adapters, and the encoding of images and texts."""

from .image_encoder import encode_images
from .text_encoder import encode_texts

__all__ = ["encode_images", "encode_texts"]
