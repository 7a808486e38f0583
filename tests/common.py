"""What several test files share: small models, pictures, batches and samples made by hand."""

from types import SimpleNamespace

import torch

import mvg
from data import Batch, ContextSamples
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
    return ContextSamples(store, Recipe(**recipe), config)


def same(a, b):
    """Are two samples equal in every entry?"""
    if a.keys() != b.keys():
        return False
    return all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
