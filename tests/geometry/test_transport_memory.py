"""Transport keeps only the plan for its backward pass, however many iterations the solver took."""

from __future__ import annotations

import torch

from peft_ncgeo.geometry import transport_cost


def kept(epsilon: float, solver: str = "entropic", n: int = 64) -> tuple[int, float]:
    """Bytes of distinct storages that autograd holds, and the value."""
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = transport_cost(cost, solver, None if solver == "exact" else epsilon)
    value.backward()
    return sum(sizes.values()), value.item()


def test_memory_does_not_grow_with_the_iterations():
    few, quick = kept(epsilon=1.0)
    many, slow = kept(epsilon=0.02)  # takes many more
    assert quick > slow > 0
    assert few == many <= 3 * 64 * 64 * 4  # plan and cost
    assert kept(0.0, "exact")[0] == few
