"""Count how often a training step makes the host wait for the device; the CPU plays the device."""

from __future__ import annotations

import traceback
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from peft_ncgeo.geometry.checks import DeferredChecks, check, check_labels, maybe, number, refuse_unless
from peft_ncgeo.losses import (
    LDAM,
    GeometryBatch,
    ModalityIsomorphism,
    OTPreservation,
    PrototypeImageContrast,
    PrototypeSupCon,
    Regularizer,
    SpaceAlignment,
)
from peft_ncgeo.training import GradientProjection, SlerpAlignment, fit_heads

from .runs import Pointwise, lora_vit, prompted_clip, prototypes, trainer, weights, whole_family

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]

# what a GPU cannot do before the host knows a value or a shape that is computed there
WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "bincount", "masked_select", "equal"}
TEMPLATES = ["a photo of a {}.", "a photo of the {}, in black."]


class HostCopies(TorchDispatchMode):
    """Notes where a tensor of the pretended device is looked at. What `.cpu()` gave, and what is made of it, is free.

    Transformers' own looks (at the texts' attention mask) are not counted.
    """

    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    def called(self, function, args, kwargs):
        """The methods that no operator stands behind on a CPU."""
        name = getattr(function, "__name__", "")
        if name not in ("cpu", "tolist", "numpy", "to"):
            return function(*args, **kwargs)
        on_host = hasattr(args[0], "on_host")
        result = function(*args, **kwargs)
        if name == "to":
            if on_host and len(args) > 1 and isinstance(args[1], Tensor) and not hasattr(args[1], "on_host"):
                result = result.clone()  # back on the device
                del result.on_host
            return result
        if not on_host:
            self._note(name)
        if name == "cpu":
            result = result if on_host else result.clone()
            result.on_host = True
        return result

    def _note(self, name):
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        # Transformers' own, and what is looked at on a CPU that is one: packed texts and the lengths of rows
        if not frames[-1].filename.endswith(("masking_utils.py", "text_packing.py", "sphere.py")):
            self.places.append(f"{name} at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        given = [
            a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(a, Tensor)
        ]
        on_host = any(hasattr(tensor, "on_host") for tensor in given)
        masked = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if not on_host and (name in WAITING or masked):
            self._note(name)
        result = function(*args, **(kwargs or {}))
        if on_host:
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(tensor, Tensor):
                    tensor.on_host = True
        return result

    @contextmanager
    def counting(self):
        with self, Methods(self):
            yield


class Methods(TorchFunctionMode):
    """Hands what is called on tensors to the one who counts."""

    def __init__(self, copies: HostCopies) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.copies.called(function, args, kwargs or {})


class EachStep(TrainerCallback):
    """The copies of every step from the second on, with what the optimiser and the callbacks do."""

    def __init__(self, copies: HostCopies) -> None:
        self.copies, self.steps, self.open = copies, [], None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.copies.places = []
            self.open = self.copies.counting()
            self.open.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if self.open is not None:
            self.open.__exit__(None, None, None)
            self.open = None
            self.steps.append(self.copies.places)


def everything() -> list[Regularizer]:
    return [
        OTPreservation(budget=0.01, name="ot_exact"),  # passes 100, and warns
        OTPreservation(weight=1.0, modality="image", memory_size=12, name="ot_memory"),
        *whole_family(),
        ModalityIsomorphism(budget=0.5, max_step=1.0, name="isomorphism_mean"),
        SpaceAlignment(weight=0.5),
        PrototypeImageContrast(weight=0.1),
    ]


CASES = {  # one copy of the trainer's own, and one for each transport problem
    "nothing": (lambda: [], prompted_clip, {}, 0),
    "exact": (lambda: [OTPreservation(weight=1.0)], prompted_clip, {}, 1),
    "separate": (lambda: [OTPreservation(weight=1.0, modality="separate")], prompted_clip, {}, 2),
    "entropic": (
        lambda: [OTPreservation(weight=1.0, solver="entropic", epsilon=1.0, memory_size=12)],
        prompted_clip,
        {},
        2,
    ),
    "everything": (
        everything,
        prompted_clip,
        {
            "classification_loss": LDAM(max_margin=0.1, reweight_after=0.3),
            "student_templates": TEMPLATES,
            "callbacks": [GradientProjection()],
        },
        3,
    ),
    "accumulated": (lambda: [Pointwise(budget=0.1)], prompted_clip, {"gradient_accumulation_steps": 2}, 1),
    "head": (
        lambda: [SpaceAlignment(weight=0.5, detach_means=False), PrototypeImageContrast(weight=0.1)],
        lora_vit,
        {"callbacks": [SlerpAlignment(alpha=2e-5), GradientProjection()]},
        0,
    ),
    "prototypes": (lambda: [PrototypeSupCon(budget=2.0)], lambda: prototypes(trainable=True), {}, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_copies_once_and_once_for_each_transport_problem(tmp_path, name):
    losses, build, options, problems = CASES[name]
    steps = EachStep(HostCopies())
    callbacks = [*options.get("callbacks", []), steps]
    arguments = {**options, "callbacks": callbacks, "max_steps": 4, "logging_steps": 100, "num_train_epochs": 9}
    run = trainer(tmp_path, build(), losses(), **arguments)
    run.train()
    assert len(steps.steps) == 3
    for places in steps.steps:
        assert len(places) == 1 + problems, places


def test_the_count_would_notice():
    copies = HostCopies()
    x = torch.arange(3.0)
    with copies.counting():
        x.sum().item()
        bool(x.any())
        x[x > 1]
        x.tolist()
        host = x.cpu()
        host.sum().item()
        host.numpy()
        back = (2 * host).to(x)
        back.sum().item()
        float((back + x).sum())
    assert len(copies.places) == 7, copies.places


def test_the_first_thing_wrong_is_named_whatever_it_breaks_later(tmp_path):
    class Poisoned(OTPreservation):
        def forward(self, batch: GeometryBatch) -> Tensor:
            batch.image_features = batch.image_features * float("nan")
            return super().forward(batch)  # the solver refuses the cost

    run = trainer(tmp_path, losses=[Poisoned(weight=1.0)])
    before = weights(run.model)
    with pytest.raises(ValueError, match="image_features has non-finite values"):
        run.train()
    torch.testing.assert_close(weights(run.model), before)


def test_a_budget_out_of_reach_is_warned_of_also_after_the_last_step(tmp_path):
    run = trainer(tmp_path, losses=[Pointwise(budget=1e-6)], max_steps=1)
    with pytest.warns(UserWarning, match="lambda/pointwise passed 100"):
        run.train()


def test_a_constrained_part_that_is_not_finite_is_refused_before_the_step(tmp_path):
    class Odd(Pointwise):
        def constrained(self, value: Tensor) -> Tensor:
            return value * float("inf")

    run = trainer(tmp_path, losses=[Odd(budget=1.0)])
    before = weights(run.model)
    with pytest.raises(ValueError, match="pointwise is (inf|nan); its multiplier stays at 1"):
        run.train()
    torch.testing.assert_close(weights(run.model), before)
    assert float(run.losses[0].factor()) == 1


def test_a_sum_of_finite_terms_that_is_not_finite_is_refused_before_the_step(tmp_path):
    class Large(Pointwise):
        def forward(self, batch: GeometryBatch) -> Tensor:
            return 10 + super().forward(batch)

    run = trainer(tmp_path, losses=[Large(weight=3e38)])
    before = weights(run.model)
    with pytest.raises(FloatingPointError, match="weighted.*1.*Lower"):
        run.train()
    torch.testing.assert_close(weights(run.model), before)


def test_checks_tell_in_their_order_and_once():
    told: list[str] = []
    wrong, right = torch.tensor(False), torch.tensor(True)
    with DeferredChecks() as checks:
        assert maybe(wrong)
        assert isinstance(number(wrong), Tensor)
        check(right, lambda: told.append("never"))
        check(wrong, lambda: told.append("first"))
        check(wrong, lambda: told.append("second"))
        assert told == []
    checks.read()
    checks.read()
    assert told == ["first", "second"]
    check(wrong, lambda: told.append("at once"))
    assert told[-1] == "at once"
    assert isinstance(number(wrong), float)
    assert not maybe(wrong)
    assert maybe(right)


def test_refusals_name_what_was_wrong_now_or_later():
    def named(labels):
        return lambda: check_labels(torch.tensor(labels), 4, lowest=-1)

    calls = {
        "a {} name is 2.5": lambda: refuse_unless(
            torch.tensor(False), ValueError, "{} is {:.3g}", "a {} name", torch.tensor(2.5, requires_grad=True)
        ),
        "-1..3, got -2": named([0, -2, 3]),
        "-1..3, got 4": named([[-1, 4], [0, 3]]),
    }
    named([])()
    named([-1, 0, 3])()
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words.replace("{", "[{]")):
            call()
        copies = HostCopies()
        with copies.counting(), DeferredChecks() as checks:
            call()
        assert copies.places == []
        with pytest.raises(ValueError, match=words.replace("{", "[{]")):
            checks.read()


@pytest.mark.parametrize("anew", [False, True])
def test_heads_are_fitted_without_a_copy_in_any_step(anew):
    torch.manual_seed(0)
    features, labels = torch.randn(12, 6), torch.arange(12) % 3
    found = []
    for steps in (2, 9):
        copies = HostCopies()
        with copies.counting():
            embed = (lambda: features * 1.0) if anew else None
            fit_heads(features, labels, steps, optimizer=torch.optim.SGD, embed=embed)
        found.append(copies.places)
    assert len(found[0]) == len(found[1]), found


def test_heads_that_diverge_are_refused_after_the_last_step():
    features, labels = 1e3 * torch.randn(12, 6), torch.arange(12) % 3
    with pytest.raises(FloatingPointError, match="The contrast is not finite"):
        fit_heads(features, labels, 5, lr=1e38, optimizer=torch.optim.SGD)
