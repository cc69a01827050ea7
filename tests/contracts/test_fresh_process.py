"""Every model trains, saves, and is loaded by Transformers itself in a process that knows nothing but the files."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from peft import get_peft_model

from ..cases import TUNERS
from ..conftest import pixels, texts
from .tuned import outputs

pytestmark = pytest.mark.slow

LOADER = """
import sys, warnings
warnings.simplefilter("ignore", UserWarning)
import peft, torch, transformers
from pathlib import Path
try:
    peft.PeftConfig.from_pretrained(next(Path(sys.argv[1]).iterdir()) / "adapter")
except KeyError as error:
    assert "NCGEO_" in str(error)
else:
    raise AssertionError("The types are known before the package is imported.")
import peft_ncgeo
for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected = torch.load(folder / "expected.pt")
    cls = getattr(transformers, expected["class"])
    model = cls.from_pretrained(folder / "adapter").eval()
    with torch.no_grad():
        inputs = expected["inputs"]
        for kind, value in expected["outputs"].items():
            call = model if kind == "forward" else getattr(model, kind)
            out = call(**inputs[kind])
            names = ("logits", "text_embeds", "image_embeds", "pooler_output", "last_hidden_state")
            got = next(out[name] for name in names if out.get(name) is not None)
            assert torch.allclose(got, value, atol=2e-6), (folder.name, kind, float((got - value).abs().max()))
    print(folder.name)
"""


def first_output(out) -> torch.Tensor:
    names = ("logits", "text_embeds", "image_embeds", "pooler_output", "last_hidden_state")
    return next(out[name] for name in names if out.get(name) is not None)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_model_trains_and_loads_in_a_fresh_process(tmp_path):
    """Before `import peft_ncgeo`, with which README and cards open, a user sees a KeyError with the type's name."""
    for name, case in TUNERS.items():
        case.build().save_pretrained(tmp_path / "bases" / name)
        torch.manual_seed(1)
        model = get_peft_model(type(case.build()).from_pretrained(tmp_path / "bases" / name), case.config())
        target = torch.randn_like(outputs(model, case.slots).detach())
        lr = 0.002 if case.prefix == "ncgeo_copa_" else 0.02  # all of a d x d map moves in every step
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        losses = []
        for _ in range(6):
            loss = (outputs(model, case.slots) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0], name
        folder = tmp_path / "adapters" / name
        model.eval().save_pretrained(folder / "adapter")
        base = model.get_base_model()
        image, text = {"pixel_values": pixels()}, texts(max(case.slots, 4))
        if hasattr(base, "get_image_features"):
            calls = {"get_image_features": image}
            calls |= {} if "siglip" in name else {"get_text_features": text}
        else:
            calls = {"forward": text if "text" in name else image}
        with torch.no_grad():
            results = {
                kind: first_output((base if kind == "forward" else getattr(base, kind))(**inputs))
                for kind, inputs in calls.items()
            }
        torch.save({"class": type(base).__name__, "inputs": calls, "outputs": results}, folder / "expected.pt")
    command = [sys.executable, "-c", LOADER, str(tmp_path / "adapters")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == sorted(TUNERS)
