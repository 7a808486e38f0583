"""Files of weights, and the device that they go to.

They are written whole or not at all, and read without running anything of theirs.

`mvg.save` and `mvg.load` go through here; `load_vit` starts from a public MAE or timm ViT.
"""

import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from vit import PIXEL_MEAN, PIXEL_STD

FORMAT = 1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def first_line(error):
    """The first 80 characters of what an error says."""
    return (str(error).splitlines() or ["empty"])[0][:80]


def write_checkpoint(path, content):
    """Write a dictionary of tensors and plain values to a temporary file, then rename it.

    Raises OSError where it cannot be written; the file that was there before stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(path.name + f".tmp{os.getpid()}")
    try:
        torch.save({"mvg": FORMAT, **content}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        raise OSError(f"{path} cannot be written ({first_line(error)}): "
                      "is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, device="cpu"):
    """The dictionary that `write_checkpoint` wrote.

    Raises FileNotFoundError, or ValueError where the file is anything else.
    """
    path, hint = Path(path), "pass a file that train.py wrote, such as last.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint: {hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError, ValueError,
            AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a checkpoint of tensors ({first_line(error)}): "
                         f"{hint}") from None
    if not isinstance(checkpoint, dict) or not {"mvg", "config", "model"} <= set(checkpoint):
        raise ValueError(f"{path} holds tensors but no MVG model: {hint}")
    if checkpoint["mvg"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {checkpoint['mvg']}, this code reads "
                         f"{FORMAT}: update the code")
    weights = checkpoint["model"]
    if isinstance(weights, dict) and not all(v.isfinite().all() for v in weights.values()
                                             if isinstance(v, torch.Tensor)):
        raise ValueError(f"{path} has weights that are NaN or infinite: take an earlier one")
    return checkpoint


def resized(model, image_size):
    """An MVG with the same weights for images of another side, a multiple of the patch size.

    Rotary positions stay as they are, learned ones are resized. None: the model as it is.
    """
    if image_size in (None, model.config.image_size):
        return model
    other = type(model)(replace(model.config, image_size=image_size))
    state, size = model.state_dict(), (other.side, other.side)
    state["position"] = F.interpolate(state["position"], size=size, mode="bicubic",
                                      align_corners=False)
    other.load_state_dict(state)
    other.meta = model.meta
    return other


def load_vit(model, path):
    """Start the trunk from a plain ViT's state dict (MAE's or timm's names).

    The three input channels become one, which answers to a gray picture as they did together to
    that picture normalised as for ImageNet. The class token is dropped and the positions are
    resized. The head and what a plain ViT does not have stay as they are. Raises ValueError
    where width, depth or patch differ, or the file is no ViT.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state.get("state_dict", state))
        kernel, position = state["patch_embed.proj.weight"], state["pos_embed"]
        bias = state["patch_embed.proj.bias"]
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError,
            TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{path} is no ViT's state dict ({what}): "
                         "pass a MAE or timm ViT saved with torch.save") from None
    c = model.config
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    there = {"width": kernel.shape[0], "depth": depth, "patch": kernel.shape[-1]}
    for name, value in there.items():
        if value != getattr(c, name):
            raise ValueError(f"{path} has {name} {value}, this model {getattr(c, name)}: "
                             "choose the --model of its size")
    mean, std = (torch.tensor(v[:kernel.shape[1]]).view(1, -1, 1, 1)
                 for v in (IMAGENET_MEAN, IMAGENET_STD))
    side = int(position.shape[1] ** 0.5)  # a class token makes it one more than a square
    grid = position[:, -side * side:].transpose(1, 2).unflatten(2, (side, side))
    if side != model.side:
        size = (model.side, model.side)
        grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    ours = {"embed.weight": (kernel * PIXEL_STD / std).sum(1, keepdim=True),
            "embed.bias": bias + (kernel * (PIXEL_MEAN - mean) / std).sum((1, 2, 3)),
            "position": grid}
    for name, value in state.items():
        if name.startswith("blocks."):
            ours[name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")] = value
    ours = {name: value.float() for name, value in ours.items()}
    try:
        unknown = model.load_state_dict(ours, strict=False).unexpected_keys
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise ValueError(f"{path} does not fit ({reason}): "
                         "choose the --model of its size") from None
    if unknown:
        raise ValueError(f"{path} has {unknown[0]}, which a plain ViT has not: "
                         "pass a MAE or timm ViT")


def find_checkpoint():
    """The bundled checkpoint, else the newest run's. Raises ValueError where there is none."""
    here = Path(__file__).parents[1]
    bundled = here / "checkpoints" / "demo.pt"
    if bundled.is_file():
        return bundled
    runs = {p.resolve() for place in (Path("runs"), here / "runs") for p in place.glob("*/last.pt")}
    if not runs:
        raise ValueError("no checkpoint in checkpoints/ or runs/*/last.pt: "
                         "train one (runs/cpu.sh), or pass --checkpoint")
    return max(runs, key=lambda p: p.stat().st_mtime)


def pick_device(name=None, local_rank=0):
    """The device (the one named, or the best there is) and the reason, for the reader.

    Raises ValueError for a device that is not there.
    """
    if name:
        try:
            device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {name!r} cannot be used ({first_line(error)}): "
                             "try cpu") from None
        return device, "asked for"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(local_rank)
        return torch.device("cuda", local_rank), f"CUDA is there ({name})"
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU is there"
    return torch.device("cpu"), f"no GPU is there, {torch.get_num_threads()} threads"
