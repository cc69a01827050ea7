# %% [markdown]
# # From a folder of images to the Hub
#
# Tune CLIP on your own images; see how this changes trained classes, new classes and the geometry of the features; and
# share the result. You can run every cell as it is: the images are drawings in the package, and no network is needed.
# Only pushing to the Hub needs a token (`hf auth login`). To run all cells: `python examples/walkthrough.py`.

# %%
from pathlib import Path

import peft_ncgeo
from peft_ncgeo.data import base_new_split, few_shot, load_demo

folder = "outputs/walkthrough"
images_folder = f"{folder}/images"  # yours, with train/<class>/*.png and test/<class>/*.png
base_model = None  # yours, "openai/clip-vit-base-patch16" for instance. None: the demo's mini-CLIP
base_repo, adapter_repo = "mini-clip", "emoji-prompts"  # yours: "user/name". A base model from the Hub is not pushed
shots, epochs = 8, 10  # images of each class, and epochs; 16 and 40 are usual for a full-size CLIP

# %% [markdown]
# ## The images
#
# If there is no folder of images, the next cell makes one of the demo's drawings, with 16 of each base class.
# `datasets` reads it in one line; the names of the classes are the names of their folders.

# %%
if not Path(images_folder).exists():
    drawings = load_demo(shots=16).splits
    unfinished = Path(f"{images_folder}.part")  # renamed when complete, so that the folder is never half full
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
# The first half of the classes is "base": we train on a few images of each. The other half is "new": the tuned model
# gets only their names, in the test. If you want to train all classes, use `images["train"]` itself.

# %%
train = few_shot(base_new_split(images["train"])["base"], shots=shots, seed=1)
test = base_new_split(images["test"])
names = {half: test[half].features["label"].names for half in test}
print(f"{len(train)} images of {len(names['base'])} classes; new ones are {', '.join(names['new'][:3])} ...")

# %% [markdown]
# ## Prompts
#
# Only prompts are trained: four vectors in each layer of both towers.

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
# The loss is cross-entropy, with a limit on the drift of the features from those of the frozen model (optimal
# transport with a budget). `GeometryMonitor` measures neural collapse at every evaluation. Every term is in the log,
# and goes to the tracker that `report_to` names: "tensorboard", "wandb" or "trackio".

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
# A record evaluates every set without and with the adapter. The model card will show its numbers, and a figure of
# class means and texts.

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
# The classifier accepts any names: trained ones, new ones, or both together.

# %%
samples = test["new"].select(range(0, len(test["new"]), len(test["new"]) // 4))
classifier = peft_ncgeo.ZeroShotClassifier(trainer.model, processor)
for label, name in zip(samples["label"], classifier.predict(samples["image"][:], names["new"]), strict=True):
    print(f"{names['new'][label]}: {name}")

# %% [markdown]
# ## Sharing
#
# The card, the processor and the adapter go to the Hub in one commit. Without a token they are written to a folder,
# which you can load in the same way.

# %%
from huggingface_hub import get_token, whoami

from peft_ncgeo.hub import push_adapter, save_adapter

if get_token():
    user = whoami()["name"]
    if base_model is None:  # the mini-CLIP is not on the Hub yet
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
# Anyone can now load the adapter and use it with other names. A base model that has no id on the Hub is passed to
# `from_pretrained`.

# %%
base = load_demo().model if base_model is None else None
loaded = peft_ncgeo.ZeroShotClassifier.from_pretrained(source, base_model=base, processor=processor)
same = loaded.predict(samples["image"][:], names["new"]) == classifier.predict(samples["image"][:], names["new"])
print("the loaded adapter predicts the same:", same)

# %% [markdown]
# ## Without this package
#
# For fixed names the text tower is no longer needed: `export_classifier` writes the image tower, the prompts and the
# features of the texts as safetensors, with a Python file that runs them and needs only `torch` and `transformers`.

# %%
import shutil

from peft_ncgeo.hub import export_classifier

exported = f"{folder}/exported"
shutil.rmtree(exported, ignore_errors=True)  # from an earlier run; an export does not overwrite a folder
print("exported to", export_classifier(trainer.model, names["new"], exported, processor))
