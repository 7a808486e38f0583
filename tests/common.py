"""What several test files share: small models, pictures, batches and samples made by hand."""

from types import SimpleNamespace

import torch

import mvg
from batches import Batch
from data import ContextSamples
from recipe import Recipe

LAYOUTS = ("fused", "sequence")
VARIANTS = (*LAYOUTS, "gate")  # fused, with a head that may copy pixels


def small(layout, size=32, **config):
    """A small model whose random weights are large enough for every input to leave a trace."""
    torch.manual_seed(0)
    if layout == "gate":
        layout, config = "fused", {"gate": True, **config}
    sizes = dict(width=48, depth=6, heads=4, head_channels=4)
    model = mvg.build("demo", size, layout=layout, **sizes, **config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(3)
    return model


def pairs(B, S, size=32, seed=1):
    """Images and labels (B, S, 1, H, W) of noise."""
    g = torch.Generator().manual_seed(seed)
    images, labels = (torch.rand(B, S, 1, size, size, generator=g) for _ in range(2))
    return images, labels


def make_batch(images, labels, colored=False, valid=None, hidden=None, drop=None):
    """A `Batch` of images and labels (B, S, 1, H, W) whose labels are colored already."""
    B = len(images)
    colored = torch.as_tensor(colored)
    return Batch(
        images=images,
        labels=labels,
        valid=torch.ones(labels.shape, dtype=torch.uint8) if valid is None else valid,
        palette=torch.zeros(B, 256),
        colored=colored.expand(B),
        drop=drop,
        drawn=torch.zeros(B, 3, dtype=torch.long),
        hidden=hidden,
    )


def context(store, size=64, patch=8, depth=8, **recipe):
    """`ContextSamples` of a store for a model of this image size, patch and depth."""
    config = SimpleNamespace(image_size=size, patch=patch, depth=depth)
    return ContextSamples(store, Recipe(**{"pool": 8, **recipe}), config)


def batch_of(samples, *keys):
    """The `Batch` of the samples [(step, i)], whose noise is that of the first one's step."""
    return samples.make(samples.collate([samples[key] for key in keys]), keys[0][0])


def shown(samples, step, i):
    """One sample as it is shown: {field of `Batch`: its value without the batch's dimension}."""
    return {name: value[0] for name, value in vars(batch_of(samples, (step, i))).items()
            if value is not None}


def same(a, b):
    """Are two samples of `shown` equal in every entry?"""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
