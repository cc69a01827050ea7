"""Pure tensor functions: no modules, no Transformers."""

from .transport import transport_cost, transport_plan

__all__ = ["transport_cost", "transport_plan"]
