"""CoPA as its paper writes it, in plain torch and float64, against the library on the demo's images."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import peft_ncgeo
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.data import EpisodeSampler, load_few_shot_domains, load_image_demo
from peft_ncgeo.geometry import modality_gap, shared_head_gap_bound
from peft_ncgeo.geometry.heads import class_prototypes
from peft_ncgeo.training import fit_heads


@pytest.fixture(scope="module")
def episode():
    """Support and query of one any-way any-shot episode: images, labels, and features by the backbone's own output."""
    images = load_few_shot_domains()["digits"].images
    drawn = EpisodeSampler(images, max_support=80, seed=5)[2]
    demo = load_image_demo("resnet")
    found = {}
    for part in ("support", "query"):
        rows = images.select(getattr(drawn, part))
        pixels = demo.processor(images=rows["image"][:], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = demo.model.resnet(pixel_values=pixels).pooler_output.flatten(1).double()
        found[part] = rows["image"][:], torch.as_tensor(getattr(drawn, f"{part}_labels")), features
    return demo, found


def published(features, labels, steps):
    """Pseudo labels 0..N-1, a prototype for every image, and both directions of the N x N cross-entropy."""
    one_hot = F.one_hot(labels).double()
    of_class = (one_hot / one_hot.sum(0)).T @ features
    image, prototype = (torch.eye(features.shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([image, prototype], lr=1e-3, weight_decay=0.1)
    pseudo = torch.arange(len(features))
    for _ in range(steps):
        e = F.normalize(features @ image, dim=1)
        q = F.normalize(one_hot @ of_class @ prototype, dim=1)
        logits = math.exp(2) * e @ q.T
        loss = (F.cross_entropy(logits, pseudo) + F.cross_entropy(logits.T, pseudo)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return image.detach(), prototype.detach(), of_class


def test_adapting_is_the_published_algorithm(episode):
    demo, parts = episode
    (images, labels, features), (queries, _, asked) = parts["support"], parts["query"]
    classifier = peft_ncgeo.adapt(demo.model, images, labels, processor=demo.processor)
    image, prototype, of_class = published(features, labels, 50)
    torch.testing.assert_close(classifier.heads.image.double(), image, atol=2e-4, rtol=0)
    torch.testing.assert_close(classifier.heads.prototype.double(), prototype, atol=2e-4, rtol=0)
    scores = F.normalize(asked @ image, dim=1) @ F.normalize(of_class @ prototype, dim=1).T
    torch.testing.assert_close(
        classifier.predict_proba(queries).double(), (math.exp(2) * scores).softmax(1), atol=1e-4, rtol=0
    )
    assert classifier.predict(queries) == scores.argmax(1).tolist()


def test_in_float64_the_heads_agree_to_rounding(episode):
    _, labels, features = episode[1]["support"]
    heads = fit_heads(features, labels)
    image, prototype, _ = published(features, labels, 50)
    torch.testing.assert_close(heads.image, image, atol=1e-9, rtol=0)
    torch.testing.assert_close(heads.prototype, prototype, atol=1e-9, rtol=0)


def test_without_steps_it_is_the_nearest_prototype(episode):
    demo, parts = episode
    (images, labels, features), (queries, _, asked) = parts["support"], parts["query"]
    classifier = peft_ncgeo.adapt(demo.model, images, labels, steps=0, processor=demo.processor)
    means = torch.stack([features[labels == c].mean(0) for c in range(int(labels.max()) + 1)])
    assert classifier.predict(queries) == F.cosine_similarity(asked[:, None], means, dim=-1).argmax(1).tolist()
    read = ImageFeatures(demo.model, demo.processor).embed(queries)
    torch.testing.assert_close(read.double(), asked, atol=1e-5, rtol=1e-5)


def test_a_shared_head_keeps_the_posters_bound_before_normalisation(episode):
    _, labels, features = episode[1]["support"]
    prototypes = class_prototypes(features, labels, int(labels.max()) + 1)
    theta = fit_heads(features, labels, 40, 0.1, 0.0, shared=True, optimizer=torch.optim.Adadelta).image
    gap = torch.linalg.vector_norm((features @ theta).mean(0) - (prototypes @ theta).mean(0))
    bound = shared_head_gap_bound(features, prototypes, theta)
    assert 0 < gap < bound
    assert modality_gap(features @ theta, prototypes @ theta) > 0
