# %% [markdown]
# # From a folder of images to the Hub
#
# Tune CLIP on images of your own, see what that does to trained classes, to new ones and to the geometry of the
# features, and share the result. Every cell runs as it stands, on drawings that the package carries and without a
# network; the cells that push want a token (`hf auth login`). All at once: `python examples/walkthrough.py`.

# %%
from pathlib import Path

import peft_ncgeo
from peft_ncgeo.data import base_new_split, few_shot, load_demo

folder = "outputs/walkthrough"
images_folder = f"{folder}/images"  # yours, with train/<class>/*.png and test/<class>/*.png
base_model = None  # yours, "openai/clip-vit-base-patch16" for instance. None: the demo's mini-CLIP
base_repo, adapter_repo = "mini-clip", "emoji-prompts"  # yours: "user/name". A model of the Hub is not pushed
shots, epochs = 8, 10  # images a class; with a CLIP of full size 16 and 40 are usual

# %% [markdown]
# ## The images
#
# The next cell makes a folder of the demo's drawings, 16 of each base class, where there is none. `datasets` reads it
# in one line; the classes are called as their folders.

# %%
if not Path(images_folder).exists():
    drawings = load_demo(shots=16).splits
    unfinished = Path(f"{images_folder}.part")  # the folder is there as a whole or not at all
    some, others = range(0, 1440, 6), [i for i in range(1440) if i % 6 == 1]  # of 48 views a class
    parts = {"train": [drawings["train"], drawings["new"].select(some)]}
    parts["test"] = [drawings["base"].select(some), drawings["new"].select(others)]
    for part, sets in parts.items():
        for dataset in sets:
            for i, sample in enumerate(dataset):
                file = unfinished / part / dataset.features["label"].int2str(sample["label"]) / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                sample["image"].save(file)
    unfinished.rename(images_folder)

# %%
from datasets import load_dataset

images = load_dataset("imagefolder", data_dir=images_folder)
print(images)

# %% [markdown]
# The first half of the classes is "base": a few images of each are trained on. The other half is "new", and only named
# when the tuned model is tested. With all classes in hand, train on `images["train"]` as it is.

# %%
train = few_shot(base_new_split(images["train"])["base"], shots=shots, seed=1)
test = base_new_split(images["test"])
names = {half: test[half].features["label"].names for half in test}
print(f"{len(train)} images of {len(names['base'])} classes; new ones are {', '.join(names['new'][:3])} ...")

# %% [markdown]
# ## Prompts
#
# Four learned vectors in each layer of both towers, and nothing else, are trained.

# %%
from peft import get_peft_model
from transformers import CLIPModel, CLIPProcessor

from peft_ncgeo import NPTConfig

if base_model is None:
    _, processor, model = load_demo()
else:
    model, processor = CLIPModel.from_pretrained(base_model), CLIPProcessor.from_pretrained(base_model)
model = get_peft_model(model, NPTConfig(num_text_tokens=4, num_vision_tokens=4, text_depth=3, vision_depth=4))
model.print_trainable_parameters()

# %% [markdown]
# ## Training
#
# Cross-entropy, and a limit to how far the features may drift from the frozen model's (optimal transport with a
# budget). `GeometryMonitor` measures neural collapse at every evaluation. Every term shows in the log, and where
# `report_to` sends it: "tensorboard", "wandb" or "trackio".

# %%
from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments
from peft_ncgeo.losses import OTPreservation
from peft_ncgeo.training import GeometryMonitor

trainer = GeometryTrainer(
    model=model,
    args=GeometryTrainingArguments(
        output_dir=f"{folder}/run",
        num_train_epochs=epochs,
        per_device_train_batch_size=60,
        per_device_eval_batch_size=120,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=1,
    ),
    train_dataset=train,
    eval_dataset=dict(test),
    processing_class=processor,
    losses=[OTPreservation(budget=0.02)],
    callbacks=[GeometryMonitor()],
)
trainer.train()

# %% [markdown]
# ## What it changed
#
# A record evaluates every set with the adapter off and on. Its numbers, and a figure of class means and texts, are
# what the model card will tell.

# %%
from peft_ncgeo.hub import draw_geometry

record = trainer.record()
before, after = record.row("before"), record.row()
for key in ("base", "new", "H"):
    print(f"{key:5} {before[key]:.1f} -> {after[key]:.1f} %")
geometry = record.sets["base"]
for key in ("nc1", "alignment", "modality_gap"):
    print(f"{key:13} {geometry['before'][key]:.3f} -> {geometry['after'][key]:.3f}")
print("figure:", draw_geometry(record, folder))

# %% [markdown]
# ## Other names
#
# The classifier takes any names: those of training, new ones, or both together.

# %%
samples = test["new"].select(range(0, len(test["new"]), len(test["new"]) // 4))
classifier = peft_ncgeo.ZeroShotClassifier(trainer.model, processor)
for label, name in zip(samples["label"], classifier.predict(samples["image"][:], names["new"]), strict=True):
    print(f"{names['new'][label]}: {name}")

# %% [markdown]
# ## Sharing
#
# The card, the processor and the adapter go to the Hub in one commit. Without a token they are written to a folder,
# which loads in the same way.

# %%
from huggingface_hub import get_token, whoami

from peft_ncgeo.hub import push_adapter, save_adapter

if get_token():
    user = whoami()["name"]
    if base_model is None:  # others lack the mini-CLIP
        base_model = f"{user}/{base_repo}"
        base = load_demo().model
        base.push_to_hub(base_model)
        processor.push_to_hub(base_model)
    source = f"{user}/{adapter_repo}"
    push_adapter(trainer.model, source, processor, base_model_id=base_model, record=record)
else:
    source = f"{folder}/adapter"
    save_adapter(trainer.model, source, processor, base_model, record)
print("adapter in", source)

# %% [markdown]
# Anyone can now load it, and give it names of their own. A base model without an id is passed along.

# %%
base = load_demo().model if base_model is None else None
loaded = peft_ncgeo.ZeroShotClassifier.from_pretrained(source, base_model=base, processor=processor)
same = loaded.predict(samples["image"][:], names["new"]) == classifier.predict(samples["image"][:], names["new"])
print("the loaded adapter predicts the same:", same)

# %% [markdown]
# ## Without this package
#
# For fixed names the text tower is not needed any more: `export_classifier` writes the image tower, the prompts and
# the texts' features as safetensors, with a file that runs them and needs `torch` and `transformers` only.

# %%
import shutil

from peft_ncgeo.hub import export_classifier

exported = f"{folder}/exported"
shutil.rmtree(exported, ignore_errors=True)  # of an earlier run, which an export does not overwrite
print("exported to", export_classifier(trainer.model, names["new"], exported, processor))
