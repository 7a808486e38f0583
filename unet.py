"""The specialist to compare with: a plain 2-D U-Net (Ronneberger et al. 2015), one dataset, no prompt.

    python train.py --model unet --data_root DIR --datasets acdc          the same data, crops, budget and loop as MVG
    python eval.py --checkpoint runs/mvg/last.pt --data_root DIR          the same scores

Segmentation gives a score for every class and is trained with cross-entropy and Dice; image tasks give the image and are trained with smooth L1.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import mvg


@dataclass
class Config:
    classes: int            # of the dataset, without background; 0: an image task
    image_size: int = 448
    channels: int = 32      # of the finest level; twice as many at every coarser one
    levels: int = 4         # halvings of the image
    patch: int = 16         # the side must be a multiple of it, as of 2 ** levels
    depth: int = 1          # drop path's numbers are drawn for so many blocks, and not used


class UNet(nn.Module):
    """Images (B, 1, H, W) in [0, 1] -> class scores (B, classes + 1, H, W), or the answer (B, 1, H, W)."""

    def __init__(self, config):
        super().__init__()
        if config.image_size % 2 ** config.levels:
            raise ValueError(f"image_size is {config.image_size}: it must be a multiple of {2 ** config.levels}")
        self.config, self.meta, self.recompute = config, {}, False
        widths = [config.channels * 2 ** level for level in range(config.levels + 1)]
        self.down = nn.ModuleList(self._pair(a, b) for a, b in zip([1, *widths], widths))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(self._pair(2 * a, a) for a in widths[:-1])
        self.out = nn.Conv2d(widths[0], config.classes + 1, 1)

    @staticmethod
    def _pair(a, b):
        """Two 3x3 convolutions; groups of 16 channels are normalised together, whatever the batch."""
        half = lambda a: [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.GroupNorm(max(1, b // 16), b), nn.ReLU(inplace=True)]
        return nn.Sequential(*half(a), *half(b))

    def paint(self, x):
        kept = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else (x - mvg.PIXEL_MEAN) / mvg.PIXEL_STD)
            kept.append(x)
        for grow, block, skip in reversed(list(zip(self.grow, self.up, kept))):
            x = block(torch.cat([grow(x), skip], 1))
        return self.out(x)

    def forward(self, images, labels, objective, hidden=None, colored=None, valid=None, first=None, drop=None,
                loss="smooth_l1", beta=0.01, background_weight=0.1, balance=False, image_weight=1.0):
        """The loss of a batch of MVG's samples, of which the prompts and what concerns them are not used.

        images, labels (B, S, 1, H, W), the last pair is the task; labels are classes, or images in [0, 1].
        Returns (loss, loss of every sample (B,) detached, {}).
        """
        image, target = images[:, -1], labels[:, -1, 0]
        weight = torch.ones_like(target) if valid is None else valid[:, -1, 0].to(target.dtype)
        painted = self.paint(image).float()
        mean = lambda error: (error * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)
        if self.config.classes:
            target = target.long()
            truth = F.one_hot(target, self.config.classes + 1).permute(0, 3, 1, 2) * weight[:, None]
            guess = painted.softmax(1) * weight[:, None]
            dice = (2 * (guess * truth).sum((2, 3)) + 1) / (guess.sum((2, 3)) + truth.sum((2, 3)) + 1)
            sample = mean(F.cross_entropy(painted, target, reduction="none")) + 1 - dice[:, 1:].mean(1)
        else:
            sample = mean(mvg.pixel_loss(painted[:, 0], target, loss, beta))
        return sample.mean(), sample.detach(), {}


@torch.no_grad()
def predict_stack(model, stack, batch=16):
    """Every slice of a stack (K, H, W) in [0, 1] -> (K, H, W): classes, uint8, or an image, float32 in [0, 1]."""
    side, device, answers = (model.config.image_size,) * 2, model.out.weight.device, []
    for part in torch.from_numpy(np.ascontiguousarray(stack)).float()[:, None].split(batch):
        painted = model.paint(data.resize_images(part, side).to(device)).float().cpu()
        painted = data.resize_images(painted.softmax(1) if model.config.classes else painted, stack.shape[1:])
        answers.append(painted.argmax(1).to(torch.uint8) if model.config.classes else painted[:, 0].clamp(0, 1))
    return torch.cat(answers).numpy()


def build(dataset, image_size=None):
    """A U-Net for one data.Dataset, with fresh weights."""
    return UNet(Config(len(dataset.labels) if dataset.colored else 0, image_size or Config.image_size))


def load(path, device="cpu"):
    """Whichever model a checkpoint holds, MVG or UNet, in evaluation mode. Raises what mvg.load_checkpoint raises."""
    checkpoint = mvg.load_checkpoint(path)
    if not isinstance(checkpoint.get("config"), dict) or "classes" not in checkpoint["config"]:
        return mvg.load(path, device)
    try:
        model = UNet(Config(**checkpoint["config"]))
        model.load_state_dict({k: v.float() for k, v in checkpoint["model"].items()})
    except (TypeError, RuntimeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this code ({str(error).splitlines()[0][:80]}): train it again") from None
    model.meta = checkpoint["meta"]
    return model.to(device).eval()
