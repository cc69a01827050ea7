"""A head on cached features on the Hub: pushed by one user, loaded by another in a fresh process with other names."""

from __future__ import annotations

import pytest

from .user import UserError

pytestmark = pytest.mark.slow

PUSH = """
from peft_ncgeo import adapt
from peft_ncgeo.few_shot import GaussianDiscriminant, LPPlusPlus, TipAdapter

images, labels = tuned.tiny_images(9, tuned.THREE)["image"][:], [i % 3 for i in range(9)]
def fit(head, model=None):
    model, processor = model or tuned.base(tuned.CLIP), tuned.tiny_processor()
    return adapt(model, images, labels, class_names=tuned.THREE, head=head, num_views=2, processor=processor)
"""


def test_a_head_is_pushed_and_loaded(hub, author, reader):
    author.run(PUSH)
    for i, head in enumerate(("TipAdapter(True, epochs=2)", "GaussianDiscriminant()", "LPPlusPlus()")):
        names = "tuned.THREE" if head.startswith("LP") else "tuned.NEW"
        said = author.run(f"""
        classifier = fit({head})
        push_adapter(classifier, "user/cached-{i}")
        result = classifier.predict_proba(tuned.IMAGES, class_names={names}).tolist()
        """)
        found = reader.run(f"""
        classifier = FewShotClassifier.from_pretrained("user/cached-{i}")
        result = classifier.predict_proba(tuned.IMAGES, class_names={names}).tolist()
        """)
        for one, other in zip(found, said, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_a_head_never_joins_an_adapter(hub, author, pushed):
    author.run(PUSH)
    repo_id, _ = pushed["lora", False]
    with pytest.raises(UserError, match=r"ValueError.*holds an adapter"):
        author.run(f"push_adapter(fit(TipAdapter()), {repo_id!r})")
    with pytest.raises(UserError, match=r"ValueError.*tuned model"):
        author.run(f"push_adapter(fit(TipAdapter(), load_adapter({repo_id!r})), 'user/cached-tuned')")


def test_a_folder_of_adapter_and_head_is_loaded_whole(hub, author, reader, pushed):
    author.run(PUSH)
    repo_id, _ = pushed["lora", False]
    said = author.run(f"""
    import huggingface_hub as hf
    from peft_ncgeo.hub import save_adapter
    classifier = fit(TipAdapter(alpha=3, beta=20), load_adapter({repo_id!r}))
    save_adapter(classifier.model, "both", tuned.tiny_processor())
    classifier.save_pretrained("both/head")
    hf.create_repo("user/both")
    hf.upload_folder(repo_id="user/both", folder_path="both")
    result = classifier.predict_proba(tuned.IMAGES, class_names=tuned.NEW).tolist()
    """)
    found = reader.run("""
    classifier = FewShotClassifier.from_pretrained("user/both")
    result = classifier.predict_proba(tuned.IMAGES, class_names=tuned.NEW).tolist()
    """)
    for one, other in zip(found, said, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
