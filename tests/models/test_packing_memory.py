"""Texts are read again where they changed, and laid out once where they did not; what packing saves."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peft_ncgeo.models.families import EndOfText
from peft_ncgeo.models.text_encoder import encode_texts, text_features
from peft_ncgeo.models.text_packing import lay_out, read_texts

from ..conftest import EOT
from .packed_texts import CONFIGS, adapted, class_texts, passes, prompted

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def longer_name(texts: dict[str, torch.Tensor]) -> None:
    """Change the first text in place."""
    texts["input_ids"][0, 5:12] = torch.tensor([30, 31, 32, 33, 34, 35, EOT])
    texts["attention_mask"][0, 5:12] = 1


def test_texts_changed_in_place_are_read_again():
    texts = class_texts()
    packed, padded = (prompted(CONFIGS["coop"], pack, dtype=torch.float64) for pack in (True, False))
    passes(packed, texts)
    longer_name(texts)
    torch.testing.assert_close(passes(packed, texts), passes(padded, texts), atol=1e-12, rtol=1e-12)
    texts["input_ids"].data[1] = texts["input_ids"][4]  # which leaves no trace in the tensor's version
    texts["attention_mask"].numpy()[1] = texts["attention_mask"][4].numpy()
    torch.testing.assert_close(passes(packed, texts), passes(padded, texts), atol=1e-12, rtol=1e-12)


def test_lists_take_turns_and_each_is_laid_out_once():
    rule, lists = EndOfText(EOT), [class_texts()["input_ids"], class_texts(classes=5)["input_ids"]]
    first = [read_texts(ids, rule, packed=True) for ids in lists]
    for _ in range(3):
        assert all(read_texts(ids, rule, packed=True) is texts for ids, texts in zip(lists, first, strict=True))
    with torch.inference_mode():
        assert read_texts(lists[0].clone(), rule, packed=True) is first[0]  # the same by value
    assert read_texts(lists[0], EndOfText(None), packed=True).ends != first[0].ends  # another rule is another reading


def test_texts_changed_in_inference_mode_are_read_again():
    model = prompted(CONFIGS["coop"], True)
    with torch.inference_mode():
        inside = {key: value.clone() for key, value in class_texts().items()}
        encode_texts(model, **inside)
        longer_name(inside)
        expected = encode_texts(prompted(CONFIGS["coop"], False), **inside)
        torch.testing.assert_close(encode_texts(model, **inside), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_texts_first_read_in_inference_mode_can_be_trained_on(attention):
    packed, padded = (prompted(CONFIGS["ivlp"], pack, attention, torch.float64) for pack in (True, False))
    texts = class_texts()
    with torch.inference_mode():
        encode_texts(packed, **texts)
        inside = {key: value.clone() for key, value in texts.items()}
        encode_texts(packed, **inside)
    for seen in (texts, {key: value.clone() for key, value in inside.items()}):
        torch.testing.assert_close(passes(packed, seen), passes(padded, seen), atol=1e-5, rtol=1e-6)


def test_memory_freed_and_taken_by_other_texts():
    model, padded = prompted(CONFIGS["coop"], True), prompted(CONFIGS["coop"], False)
    for seed in range(20):
        texts = class_texts()
        texts = {key: value.roll(seed % 3, 0).clone() for key, value in texts.items()}
        with torch.no_grad():
            torch.testing.assert_close(encode_texts(model, **texts), encode_texts(padded, **texts))


def test_flops_fall_with_the_tokens():
    texts = class_texts(classes=16)
    counts = []
    for pack in (True, False):
        model = prompted(CONFIGS["ivlp"], pack)
        with FlopCounterMode(display=False) as counter:
            passes(model, texts)
        # of the layers' products: newer torch counts attention on CPU too, which packed rows are longer in
        flops = counter.get_flop_counts()["Global"]
        counts.append(flops[torch.ops.aten.addmm] + flops[torch.ops.aten.mm])
    assert counts[0] < 0.45 * counts[1]  # 4 tokens of 14 on average are a text's own


def test_flops_under_lora_at_100_classes():
    """Names of 1 to 5 tokens in "a photo of a {}.", through the text tower and back."""
    texts = class_texts(slots=4, classes=100)
    longest = int(texts["attention_mask"].sum(1).max())
    texts = {key: value[:, :longest] for key, value in texts.items()}
    model, counts = adapted("lora", dtype=torch.float32), []
    for encode in (encode_texts, text_features):
        with FlopCounterMode(display=False) as counter:
            encode(model, **texts).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] <= 0.55 * counts[1]


def test_what_backward_keeps_falls_too_and_grows_with_the_classes():
    def kept(classes: int, pack: bool) -> int:
        seen: dict[int, int] = {}

        def note(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = prompted(CONFIGS["ivlp"], pack)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            features = encode_texts(model, **class_texts(classes=classes))
        del features
        return sum(size for place, size in seen.items() if place not in weights)

    assert kept(100, True) < 0.55 * kept(100, False)
    assert kept(200, True) == pytest.approx(2 * kept(100, True), rel=0.15)


def test_rows_are_balanced_and_whole():
    ends = [5 + k % 7 for k in range(300)]
    ids = torch.arange(5).repeat(300, 3)[:, :14] + 0
    ids[:, 5:] = 100 + torch.arange(300)[:, None] * 14 + torch.arange(5, 14)  # every token is another
    layout = lay_out(ids, ends, 5)
    assert layout is not None
    rows, width = layout.input_ids.shape
    own = sum(end - 4 for end in ends)
    assert rows * width < 1.1 * (own + 5 * rows)
    seen, tokens = layout.mask[:, 0], layout.input_ids
    for k, end in enumerate(ends):
        row, place = divmod(int(layout.ends[k]), width)
        visible = seen[row, place]
        assert tokens[row][visible].tolist() == ids[k, : end + 1].tolist()
        assert layout.positions[row][visible].tolist() == list(range(end + 1))
    assert lay_out(ids[:2], [13, 13], 0) is None  # nothing in common and nothing to cut
