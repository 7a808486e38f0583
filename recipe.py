"""The recipe: what changes what is learned, as one dataclass, and train.py's command line.

A comment says where a default comes from: the paper, the authors' released code, or us. The length
of a run (--epochs, --steps) is no part of the recipe, so that a run can be made longer.
These comments are the help of `python train.py --help`. A resumed run has the recipe of its
checkpoint and refuses another one; a fine-tuned one starts from it.

    Recipe(coloring="binary", lr=5e-4)
    python train.py --coloring binary --lr 5e-4 --set loss=l2 drop_path=0
"""

import argparse
import inspect
import re
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from coloring import COLORINGS
from mvg import LAYOUTS, SIZES
from running.checkpoints import load_checkpoint
from scans.datasets import SYNTHETIC
from scans.volumes import DataError


@dataclass
class Recipe:
    """What changes what is learned; saved in every checkpoint. The comments are the help."""
    # The model
    model: str = "large"               # authors: large; a size of mvg.py, or unet: a specialist
    image_size: int | None = None      # paper: 448, the crop in pixels; demo has 96, pocket 128
    layout: str = "fused"              # authors; also sequence (paper's text), paper (preset)
    positions: str = "rope"            # ours, beside learned ones; learned: the paper's plain ViT
    qk_norm: bool = True               # ours: queries and keys are normalised
    gate: bool = False                 # ours: a label's pixel may be copied from its image
    drop_path: float = 0.1             # authors: largest drop rate of a block's branches
    init: str | None = None            # authors: a MAE; file with a plain ViT's weights
    # The objective
    objective: str = "hybrid"          # paper; ar or mim alone: its ablations
    seg_share: float = 0.5             # paper: share of segmentation samples
    mim_share: float = 0.9             # paper: share of mim among the other tasks
    mask_ratio: float = 0.75           # ours; the paper tries 0.5 and 0.75: canvas patches hidden
    hide_label: float = 0.1            # ours: share of canvases with exactly Y hidden
    num_prompts: str = "1"             # paper: 1; prompt pairs, a number or a range such as 1-4
    coloring: str = "random"           # paper: random; predefined, binary: its Table 4
    loss: str = "smooth_l1"            # paper; also l1, l2
    mask_loss: str | None = None       # ours: the loss of masks, where images have another one
    beta: float = 0.01                 # authors: where smooth L1 turns from square to straight
    background_weight: float = 0.1     # authors: weight of the background of colored labels
    boxes: str = "lines"               # paper: boxes drawn on the image; filled: masks (ours)
    augment: float = 0.0               # paper: none; share of samples made into other tasks
    superpixels: float = 0.0           # ours: share of masks that are regions of like gray
    # The data
    datasets: tuple = ()               # only these; synthetic adds the procedural tasks
    brats_pairs: tuple = ()            # authors: t1c:t2w t2w:t1c; what BraTS-GLI translates
    data_fraction: float = 1.0         # paper, Figure 7: share of every dataset's training cases
    cases: int | None = None           # at most so many training cases of every dataset
    validate_cases: int = 0            # ours: patients of every dataset kept to be scored
    dataset_weights: str = "equal"     # ours: equal or size; how datasets share their group
    synthetic_share: float | None = None  # paper: none; share of procedural tasks
    pool: int = 1000                   # ours: how many procedural tasks there are
    strict: bool = False               # do not start where a case cannot be used
    # The optimisation
    optimizer: str = "adamw"           # paper; muon: on the blocks' matrices (ours)
    batch_size: int = 16               # authors: 16 samples on each of 8 GPUs
    accumulate: int = 1                # ours: batches of a process in a step
    lr: float = 1e-3                   # paper: peak learning rate
    layer_decay: float | None = None   # authors: 0.8 a block with --init, else 1
    warmup: float = 0.05               # paper: 5 of 100 epochs
    weight_decay: float = 0.05         # paper: 0.05; on matrices alone (ours)
    clip: float = 1.0                  # ours: largest norm of the gradient
    average: float = 0.0               # ours: decay of the weights' moving average, which is kept
    bf16: bool | None = None           # ours: bfloat16 autocast; default: with CUDA
    seed: int = 0                      # of the weights and of every draw

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise DataError(f"--{name} is {getattr(self, name)!r}: "
                                f"choose one of {', '.join(map(str, choices))}")
        for names, low, high, words in RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    raise DataError(f"--{name} is {value}: {words}")
        if self.coloring == "predefined" and (self.synthetic or self.boxes == "filled"):
            raise DataError("--coloring predefined needs datasets with classes of their own: "
                            "leave synthetic and boxes=filled out")
        if not re.fullmatch(r"\d+(-\d+)?", self.num_prompts) or not \
                1 <= self.prompt_range[0] <= self.prompt_range[1]:
            raise DataError(f"--num_prompts is {self.num_prompts!r}: "
                            "write a number such as 1 or a range such as 1-4")

    @property
    def prompt_range(self):
        words = self.num_prompts.split("-")
        return int(words[0]), int(words[-1])

    @property
    def synthetic(self):
        """Are the procedural tasks among the datasets?"""
        return SYNTHETIC in self.datasets or bool(self.synthetic_share)


CHOICES = {"model": (*SIZES, "unet"), "layout": tuple(LAYOUTS), "coloring": COLORINGS,
           "positions": ("rope", "learned"), "objective": ("hybrid", "ar", "mim"),
           "loss": ("smooth_l1", "l1", "l2"), "mask_loss": (None, "smooth_l1", "l1", "l2"),
           "boxes": ("lines", "filled"),
           "optimizer": ("adamw", "muon"), "dataset_weights": ("equal", "size")}
TINY, HUGE = 1e-12, 1e12
RANGES = (("seg_share mim_share hide_label warmup synthetic_share augment superpixels",
           0, 1, "a share is from 0 to 1"),
          ("mask_ratio data_fraction layer_decay", TINY, 1, "above 0, at most 1"),
          ("drop_path average", 0, 0.99999, "a rate is from 0 to 0.99999"),
          ("image_size batch_size accumulate cases pool lr beta clip", TINY, HUGE,
           "it must be above 0"),
          ("seed weight_decay background_weight validate_cases", 0, HUGE,
           "it must not be below 0"))
# Fields that are flags; the others go by --set alone.
FLAGS = ("datasets model image_size layout init objective coloring mask_ratio num_prompts "
         "seg_share mim_share data_fraction cases augment synthetic_share batch_size accumulate "
         "lr optimizer seed validate_cases").split()
# --finetune takes the first from its model, and the second, as the image's side, unless something
# else is asked for. What adds other tasks to a broad training begins anew: augment, superpixels.
OF_THE_MODEL = "model layout positions qk_norm gate drop_path init".split()
OF_THE_METHOD = ("objective seg_share mim_share mask_ratio hide_label coloring loss mask_loss beta "
                 "background_weight boxes optimizer average").split()


RUN = {"data_root": None, "store": None, "out": "runs/mvg", "epochs": 100.0, "steps": None,
       "minutes": None, "workers": None, "recompute": None, "compile": None, "log_every": 20,
       "save_every": 500}
LENGTHS = ("epochs", "steps", "minutes")


def make_parser():
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Recipe), re.M))
    others = [f"{f.name}={f.default} ({comments[f.name]})" for f in fields(Recipe)
              if f.name not in FLAGS]
    p = argparse.ArgumentParser(description="Train one model on every dataset found.",
                                allow_abbrev=False,
                                epilog="Fields for --set alone: " + "; ".join(others))
    add = p.add_argument
    add("--data_root", help="folder that holds the datasets as they were downloaded")
    add("--store", help="prepared store, written on first use (default: store/<data_root>-<hash>)")
    add("--out", help="run folder (default: runs/mvg; with --resume that of the checkpoint)")
    for f in fields(Recipe):
        if f.name in FLAGS:
            add(f"--{f.name}", help=f"{comments[f.name]} (default: {f.default})".replace("%", "%%"),
                **({"nargs": "+"} if f.type is tuple else {}))
    add("--set", nargs="+", default=[], action="extend", metavar="NAME=VALUE",
        help="any field of the recipe")
    add("--epochs", type=float, help="an epoch is all training slices once (default: 100, paper)")
    add("--steps", type=int, help="number of steps, instead of --epochs")
    add("--minutes", type=float, help="wall time, instead of --epochs; the schedule follows it")
    add("--stop_at", type=int, help="stop after this step, the schedule unchanged")
    add("--resume", nargs="?", const="", metavar="CKPT",
        help="go on from the last.pt of --out, or from this one")
    add("--finetune", metavar="CKPT",
        help="start from this model, with its way of learning and --steps 300")
    add("--device", help="cpu, mps, cuda ... (default: the best there is)")
    add("--workers", type=int, help="loader processes a rank (default: 8 with CUDA, else 0)")
    add("--recompute", action=argparse.BooleanOptionalAction,
        help="compute activations again (default: where a GPU's memory is too small)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile every block: faster steps on a GPU (default: with CUDA)")
    add("--log_every", type=int, help="steps between log lines (default: 20)")
    add("--save_every", type=int, help="steps between checkpoints (default: 500)")
    add("--dry_run", action="store_true", help="say what the run draws, needs and takes, then stop")
    return p


def parse(argv=None):
    """(settings of the run, Recipe) of a command line; those of a resumed run are the defaults.

    Raises DataError for a value that cannot be, or that a resumed run did not begin with.
    """
    args = make_parser().parse_args(argv)
    typed = {name: value for name, value in vars(args).items() if value is not None}
    changes = {name: value for name, value in typed.items() if name in FLAGS}
    for word in args.set:
        name, sign, value = word.partition("=")
        if not sign:
            raise DataError(f"--set {word}: write NAME=VALUE")
        changes[name] = value
    changes = {name: converted(name, value) for name, value in changes.items()}
    if changes.get("layout") == "paper":  # a preset of the layout alone
        changes = {"positions": "learned", "qk_norm": False, **changes, "layout": "sequence"}
    lengths = [name for name in LENGTHS if name in typed]
    if len(lengths) > 1:
        raise DataError(f"--{lengths[0]} and --{lengths[1]} both say how long: pass one of them")
    if args.resume is not None:
        path = args.resume or str(Path(args.out or RUN["out"]) / "last.pt")
        saved = load_checkpoint(path)
        recipe = resumed_recipe(path, saved, changes)
        before = {name: value for name, value in saved["run"].items()
                  if name in RUN and not (lengths and name in LENGTHS)}
        run = {**RUN, **before, "out": str(Path(path).parent), **typed, "resume": path}
    elif args.finetune:
        recipe = finetuned_recipe(args.finetune, changes)
        run = {**RUN, **({} if lengths else {"steps": 300}), **typed}
    else:
        recipe, run = Recipe(**changes), {**RUN, **typed}
    for name in ("epochs", "steps", "minutes", "stop_at", "log_every", "save_every"):
        if run.get(name) is not None and not 0 < run[name] < HUGE:
            raise DataError(f"--{name} is {run[name]}: it must be a number above 0")
    run = {name: value for name, value in run.items() if name not in FLAGS and name != "set"}
    return argparse.Namespace(**{"stop_at": None, "resume": None, "finetune": None,
                                 "device": None, **run}), recipe


def converted(name, value):
    """What was written for a field of the Recipe, as its type. Raises DataError."""
    kinds = typing.get_type_hints(Recipe)
    if name not in kinds:
        raise DataError(f"--set {name}: the recipe has no such field, it has {', '.join(kinds)}")
    if kinds[name] is tuple:
        return tuple(value if isinstance(value, list) else value.split(","))
    kind = (typing.get_args(kinds[name]) or (kinds[name],))[0]
    if value.lower() == "none" and kind is not kinds[name]:
        return None
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise DataError(f"--{name} is {value!r}: write a {kind.__name__}") from None


def resumed_recipe(path, saved, changes):
    """The Recipe that a run began with. Raises DataError where something else is asked for."""
    if not {"optimizers", "recipe", "run", "ranks", "step", "best"} <= set(saved):
        raise DataError(f"{path} holds a model but no run to go on with: "
                        "pass the last.pt of a run folder")
    unknown = sorted(set(saved["recipe"]) - {f.name for f in fields(Recipe)})
    if unknown:
        raise DataError(f"{path} is of other code, whose recipe had {', '.join(unknown)}: "
                        "go on with that code, or --finetune it")
    recipe = Recipe(**saved["recipe"])
    for name, value in asdict(replace(recipe, **changes)).items():
        before = getattr(recipe, name)
        if value != before:
            raise DataError(f"{path} was trained with --{name} {before}, now {value}: "
                            f"drop --{name}, or start anew with another --out")
    return recipe


def finetuned_recipe(path, changes):
    """The Recipe of another model as far as it concerns the method. Raises DataError."""
    saved = load_checkpoint(path)
    for name in OF_THE_MODEL:
        if name in changes:
            raise DataError(f"--finetune takes the model of {path} as it is: drop --{name}")
    kept = [name for name in OF_THE_MODEL + OF_THE_METHOD if name != "init"]
    before = {k: v for k, v in saved.get("recipe", {}).items() if k in kept}
    before["image_size"] = saved["config"]["image_size"]
    if "classes" in saved["config"] and "image_size" in changes:
        raise DataError(f"--finetune takes the U-Net of {path} as it is: drop --image_size")
    prompts = f"1-{saved['config'].get('max_prompts', 1)}"
    return Recipe(**{**before, "num_prompts": prompts, **changes})
