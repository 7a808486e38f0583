"""The specialist to compare with: a plain 2-D U-Net (Ronneberger et al. 2015).

What is notable:
- it learns one dataset and sees no prompt
- segmentation: a score for every class, trained with cross-entropy and Dice
- image tasks: the image itself, trained with the loss of the recipe (smooth L1)
- data, crops, budget, loop and scores are those of MVG

    python train.py --model unet --data_root DIR --datasets acdc
    python eval.py --checkpoint runs/mvg/last.pt --data_root DIR

Shapes: B batch, S pairs of a sample, K slices of a stack, C classes with the background.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import mvg
from coloring import color
from objectives import pixel_loss
from running.checkpoints import first_line, load_checkpoint
from scans.volumes import DataError, resize_images
from vit import PIXEL_MEAN, PIXEL_STD

# -------------------------------------------------------------------------------------------------
# The network


@dataclass
class Config:
    """All that is needed to make the same model again; stored in every checkpoint."""
    classes: int            # of the dataset, without background; 0: an image task
    image_size: int = 448
    channels: int = 32      # of the finest level; twice as many at every coarser one
    levels: int = 4         # halvings of the image
    patch: int = 16         # the side must be a multiple of it, as of 2 ** levels
    depth: int = 1          # drop path's numbers are drawn for so many blocks, and not used


def convolve_twice(channels, outputs):
    """Two 3x3 convolutions. Groups of 16 channels are normalised together, whatever the batch."""
    layers = []
    for inputs in (channels, outputs):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                   nn.GroupNorm(max(1, outputs // 16), outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """An encoder and a decoder with a skip at every level.

    Raises ValueError where the image's side cannot be halved as often as there are levels.
    """

    def __init__(self, config):
        super().__init__()
        if config.image_size % 2 ** config.levels:
            raise ValueError(f"image_size is {config.image_size}: "
                             f"it must be a multiple of {2 ** config.levels}")
        self.config = config
        self.meta = {}          # what a checkpoint says of its training, as of MVG's
        self.recompute = False  # never: its activations are few
        widths = [config.channels * 2 ** level for level in range(config.levels + 1)]
        self.down = nn.ModuleList(convolve_twice(a, b) for a, b in zip([1, *widths], widths))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2)
                                  for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(convolve_twice(2 * a, a) for a in widths[:-1])
        self.out = nn.Conv2d(widths[0], config.classes + 1, 1)

    def forward(self, images):
        """Images (B, 1, H, W) in [0, 1] -> class scores (B, C, H, W), or answers (B, 1, H, W)."""
        x, skips = (images - PIXEL_MEAN) / PIXEL_STD, []
        for level, block in enumerate(self.down):
            if level:
                x = F.max_pool2d(x, 2)                # (B, w, H, W) -> (B, w, H / 2, W / 2)
            x = block(x)
            skips.append(x)
        for level in reversed(range(len(self.up))):
            x = self.grow[level](x)                   # (B, 2 w, H / 2, W / 2) -> (B, w, H, W)
            x = torch.cat([x, skips[level]], 1)       # (B, 2 w, H, W)
            x = self.up[level](x)                     # (B, w, H, W)
        return self.out(x)


# -------------------------------------------------------------------------------------------------
# The loss

def loss(model, batch, labels, recipe):
    """The loss of every sample (B,), like those of objectives.py, of the task's pair alone.

    labels, the colored ones, are ignored: the truth is batch.labels (B, S, 1, H, W), which holds
    classes, or images in [0, 1]. batch.valid is 0 where there is no truth.
    """
    target = batch.labels[:, -1, 0]                       # (B, H, W)
    weight = batch.valid[:, -1, 0].to(target.dtype)       # (B, H, W)
    painted = model(batch.images[:, -1]).float()          # (B, C or 1, H, W)
    if getattr(model, "module", model).config.classes:    # .module: of DistributedDataParallel
        return class_loss(painted, target.long(), weight)
    return mean_error(pixel_loss(painted[:, 0], target, recipe.loss, recipe.beta), weight)


def mean_error(error, weight):
    """The weighted mean of every sample: 2 x (B, H, W) -> (B,)."""
    return (error * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)


def class_loss(scores, classes, weight):
    """Cross-entropy and soft Dice: (B, C, H, W), classes (B, H, W), weight (B, H, W) -> (B,)."""
    truth = F.one_hot(classes, scores.shape[1]).permute(0, 3, 1, 2) * weight[:, None]
    guess = scores.softmax(1) * weight[:, None]           # (B, C, H, W)
    common = (guess * truth).sum((2, 3))                  # (B, C)
    dice = (2 * common + 1) / (guess.sum((2, 3)) + truth.sum((2, 3)) + 1)
    entropy = F.cross_entropy(scores, classes, reduction="none")
    return mean_error(entropy, weight) + 1 - dice[:, 1:].mean(1)


# -------------------------------------------------------------------------------------------------
# Answers

@torch.no_grad()
def predict_stack(model: UNet, stack: np.ndarray, batch: int = 16) -> np.ndarray:
    """Every slice of a stack (K, H, W) in [0, 1] -> (K, H, W).

    The answer is classes, uint8, or an image, float32 in [0, 1].
    """
    side, device, answers = (model.config.image_size,) * 2, model.out.weight.device, []
    stack = torch.from_numpy(np.ascontiguousarray(stack)).float()[:, None]  # (K, 1, H, W)
    for part in stack.split(batch):
        painted = model(resize_images(part, side).to(device)).float().cpu()
        if model.config.classes:
            scores = resize_images(painted.softmax(1), stack.shape[2:])     # (B, C, H, W)
            answers.append(scores.argmax(1).to(torch.uint8))
        else:
            painted = resize_images(painted, stack.shape[2:])               # (B, 1, H, W)
            answers.append(painted[:, 0].clamp(0, 1))
    return torch.cat(answers).numpy()


@torch.no_grad()
def answer_sample(model: UNet, batch) -> torch.Tensor:
    """The answer to a `Batch`'s task images in the colors of its samples, (B, 1, H, W)."""
    answer = model(batch.images[:, -1]).float()            # (B, C or 1, H, W)
    if model.config.classes:
        answer = answer.argmax(1, keepdim=True).to(batch.labels.dtype)
    return color(answer, batch.palette, batch.colored)


# -------------------------------------------------------------------------------------------------
# Making and loading

def build(dataset, image_size=None) -> UNet:
    """A U-Net with fresh weights for one `scans.datasets.Dataset`."""
    classes = len(dataset.labels) if dataset.colored else 0
    return UNet(Config(classes, image_size or Config.image_size))


def build_for(store, recipe) -> UNet:
    """A U-Net with fresh weights for the one dataset of a store.

    It has a single objective, so recipe.objective becomes "ar". Raises DataError where the store
    holds several datasets, or none (store is None), and what `check` raises.
    """
    if recipe.synthetic or store is None or len(store.datasets) != 1 or recipe.init:
        names = " ".join(store.datasets) if store else ""
        raise DataError(f"--model unet learns one task: name one of --datasets {names}, "
                        "without synthetic and --init")
    check(recipe)
    recipe.objective = "ar"
    dataset, = store.datasets.values()
    return build(dataset, recipe.image_size)


def check(recipe):
    """Raises DataError where a recipe asks for what only a prompted model can learn."""
    if recipe.augment or recipe.superpixels or recipe.boxes == "filled":
        raise DataError("a U-Net learns its task as it is: "
                        "leave --augment, superpixels and boxes out")


def load_any(path, device="cpu"):
    """Whichever model a checkpoint holds, MVG or UNet, in evaluation mode, float32.

    Raises what `load_checkpoint` raises, and ValueError where the file does not fit this code.
    """
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint["config"], dict) or "classes" not in checkpoint["config"]:
        return mvg.load(path, device)
    try:
        model = UNet(Config(**checkpoint["config"]))
        model.load_state_dict({k: v.float() for k, v in checkpoint["model"].items()})
    except (TypeError, RuntimeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this code ({first_line(error)}): "
                         "train it again") from None
    model.meta = checkpoint["meta"]
    return model.to(device).eval()
