"""Access to models: towers, heads, adapters, and the encoding of images and texts."""

from .description import ModelDescription, describe
from .image_encoder import encode_images
from .text_encoder import encode_texts

__all__ = ["ModelDescription", "describe", "encode_images", "encode_texts"]
