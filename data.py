"""Section 4.1, one training sample: its task, slices, the view of them, hidden patches.

A sample's numbers come from one generator, keyed by (seed, step, number of the sample): a run can
be resumed, and split over any number of processes. batches.py makes the pixels of a whole batch.

    python data.py --data_root DIR      what is found there, and what is wrong with it (the doctor)
"""

from heapq import nsmallest

import numpy as np
import torch
from torch.utils.data import Dataset

from batches import (Slices, draw_crop, draw_image_task, draw_moves, draw_other_task,
                     draw_rest, make_batch)
from coloring import predefined_offsets
from lab import synthetic
from objectives import draw_hidden, switch
from scans import boxes, doctor
from scans.datasets import DATASETS, SYNTHETIC
from scans.volumes import DataError, command_line
from windows import draw_windows

SYNTHETIC_EPOCH = 10_000  # samples that count as an epoch of the procedural tasks (ours)


# -------------------------------------------------------------------------------------------------
# Samples

class ContextSamples(Dataset):
    """Training samples by number: `samples[step, i]` is sample i of the global batch of a step.

    store       a `scans.store.Store`, or None for the procedural tasks alone
    recipe      the `Recipe` of train.py
    config      the model's: image_size, patch, depth
    pool        a `lab.synthetic.Pool` for the procedural tasks; drawn here where there is none
    Of every dataset's training cases those of the last `validate_cases` patients, at most a fifth,
    are kept in `held`. Of the rest `data_fraction`, or at most `recipe.cases`, are drawn from: the
    same ones whatever the seed. Raises DataError where nothing can be drawn or read.
    """

    def __init__(self, store, recipe, config, pool=None):
        self.store, self.recipe, self.seed = store, recipe, recipe.seed
        self.image_size, self.patch, self.depth = config.image_size, config.patch, config.depth
        self.datasets = store.datasets if store else {}
        self.pool = pool
        if recipe.synthetic and pool is None:
            self.pool = synthetic.draw_pool(recipe.pool, self.image_size)
        self.cases, self.slices, self.held, self.excluded = {}, {}, {}, []
        for name in self.datasets:
            self.choose_cases(name)
        if not self.cases and not recipe.synthetic:
            raise DataError(f"{store.root} has no training slices with foreground: "
                            "check the labels")
        self.names = sorted(self.datasets) + [SYNTHETIC] * recipe.synthetic
        others = [self.datasets[n] for n in sorted(set(self.datasets) - set(DATASETS))]
        self.predefined = predefined_offsets([*DATASETS.values(), *others])
        drawn = [n for n in self.names if n == SYNTHETIC or n in self.cases]
        self.segmentation = [n for n in drawn if n == SYNTHETIC or self.asks_for_masks(n)]
        self.others = [n for n in drawn if n == SYNTHETIC or not self.asks_for_masks(n)]
        self.segmentation_share = recipe.seg_share
        if not self.others:  # a group that is not there leaves its share to the other one
            self.segmentation_share = 1.0
        elif not self.segmentation:
            self.segmentation_share = 0.0

    def choose_cases(self, name):
        """Which training cases of a dataset are drawn from, and which are held out."""
        recipe = self.recipe
        cases = [c for c in self.store.split(name, "train") if c.foreground]
        patients = list(dict.fromkeys(c.patient for c in cases))
        away = set(patients[len(patients) - min(recipe.validate_cases, len(patients) // 5):])
        self.held[name] = [c for c in cases if c.patient in away]
        cases = [c for c in cases if c.patient not in away]
        count = min(max(1, round(recipe.data_fraction * len(cases))), recipe.cases or len(cases))
        if count < len(cases):
            order = np.random.default_rng(0).permutation(len(cases))
            cases = [cases[i] for i in sorted(order[:count])]
        if not cases:
            self.excluded.append(name)
            return
        self.cases[name] = cases
        slices = [(i, k) for i, c in enumerate(cases) for k in c.foreground]
        self.slices[name] = np.array(slices, np.int32)

    def asks_for_masks(self, name):
        """Are the labels of a dataset masks, to be colored? Those of filled boxes are, too."""
        dataset = self.datasets[name]
        return dataset.colored or self.fills_boxes(name)

    def fills_boxes(self, name):
        return self.recipe.boxes == "filled" and self.datasets[name].task == "detection"

    def __len__(self):
        """Samples an epoch: the training slices."""
        return sum(self.size(n) for n in self.names if n not in self.excluded)

    def size(self, name):
        return SYNTHETIC_EPOCH if name == SYNTHETIC else len(self.slices[name])

    def switch(self, step):
        return switch(self.recipe, step, self.segmentation_share)

    def shares(self, names):
        """How likely each dataset of a group is (the paper is silent): equally, or by size."""
        by_size = self.recipe.dataset_weights == "size"
        weights = np.array([self.size(n) if by_size else 1.0 for n in names])
        share = self.recipe.synthetic_share
        if share is not None and SYNTHETIC in names and len(names) > 1:  # it is the last one
            weights = np.append(weights[:-1] / weights[:-1].sum() * (1 - share), share)
        return weights / weights.sum()

    def draw(self, step, i):
        """(objective, prompt pairs, dataset, is it segmentation?, generator for the rest)"""
        objective, prompts, p_segmentation = self.switch(step)
        rng = np.random.default_rng([self.seed, step, i])
        colored = bool(rng.random() < p_segmentation)
        group = self.segmentation if colored else self.others
        name = group[rng.choice(len(group), p=self.shares(group))]
        return objective, prompts, name, colored, rng

    def __getitem__(self, key):
        step, i = key
        objective, prompts, name, colored, rng = self.draw(step, i)
        case, k, source = step, i, name
        if name == SYNTHETIC and self.cases and not colored and rng.random() < 0.5:
            source = rng.choice(sorted(self.cases))  # an image task that is made of real slices
        if source == SYNTHETIC:
            sample = synthetic.draw_sample(self.pool, self.image_size, prompts + 1, colored, rng)
        else:
            slices, chosen = self.slices[source], []
            case, k = (int(v) for v in slices[rng.integers(len(slices))])
            for _ in range(prompts):
                chosen.append(self.draw_prompt(source, case, k, rng, shown=chosen))
            chosen.append((self.cases[source][case], k))
            try:
                sample = self.read(source, chosen, colored, rng) if source == name else \
                    self.read_image_task(chosen, rng)
            except Exception as error:  # whatever a damaged store brings about
                cases = ", ".join(f"{c.name} slice {s}" for c, s in chosen)
                raise DataError(f"sample {i} of step {step} cannot be read, {source} {cases}: "
                                f"{type(error).__name__}: {error}") from error
        offsets, total = self.predefined
        sample = {**draw_rest(rng, prompts + 1, self.image_size, colored), **sample,
                  "offset": np.float32([offsets.get(name, 0), total]),
                  "drop": rng.random((self.depth, 2), dtype=np.float32),
                  "drawn": np.array([self.names.index(name),
                                     *((case, k) if source == name else (step, i))])}
        if objective == "mim":
            tokens = (self.image_size // self.patch) ** 2
            sample["hidden"] = draw_hidden(rng, tokens, self.recipe.mask_ratio,
                                           self.recipe.hide_label)
        return sample

    def make(self, slices, step, part=0, rank=0):
        """The `Batch` of `Slices`, on their device; its noise is keyed by the other numbers."""
        key = np.random.SeedSequence([self.seed, step, part, rank]).generate_state(1)[0]
        with torch.autocast(slices.images.device.type, enabled=False):  # pixels are float32
            return make_batch(slices, self.image_size, self.recipe, int(key))

    def draw_prompt(self, name, case, k, rng, jitter=0.05, shown=()):
        """A prompt for slice k of a training case: (stored case, slice), of another patient.

        Ours: the paper says how to prompt at inference only. The slice with foreground nearest to
        the same relative height, plus jitter, among those that share a class with slice k, if any
        does. A single case prompts itself, with another slice where one shares a class.
        shown: prompts that the sample has already; other patients come first.
        """
        cases, target = self.cases[name], self.cases[name][case]
        others = prompt_cases(cases, target) or [
            c for c in cases if c.kind == target.kind and c is not target] or [target]
        seen = [c.patient for c, _ in shown]
        others = [c for c in others if c.patient not in seen] or others
        prompt = others[rng.integers(len(others))]
        height = (k + 0.5) / target.slices + rng.uniform(-jitter, jitter)
        wanted = set(target.classes[k])
        slices = [s for s in prompt.foreground if wanted & set(prompt.classes[s])]
        slices = slices or prompt.foreground
        if prompt is target and len(slices) > 1:
            slices = [s for s in slices if s != k]
            return prompt, int(slices[rng.integers(len(slices))])
        return prompt, min(slices, key=lambda s: abs((s + 0.5) / prompt.slices - height))

    def read(self, name, chosen, colored, rng):
        """What is drawn for the chosen slices [(case, k)] of a dataset, and the slices."""
        recipe, S, sample = self.recipe, len(chosen), {}
        pairs = [case.stored(k) for case, k in chosen]  # (image, label, valid), (H, W) each
        if self.fills_boxes(name):
            pairs = [(image, boxes.fill(case.index["boxes"], image.shape), valid)
                     for (image, _, valid), (case, _) in zip(pairs, chosen)]
        alone = all(case is chosen[-1][0] for case, _ in chosen)
        changed = recipe.augment and rng.random() < recipe.augment
        if colored and recipe.superpixels and rng.random() < recipe.superpixels:
            image, alone, changed = pairs[-1][0], True, True  # the slice prompts itself
            pairs = [(image, synthetic.superpixels(image, rng), None)] * S
        if colored:
            views = [draw_crop(self.image_size, rng) for _ in pairs]
        else:
            views = draw_windows(pairs, self.image_size, rng)  # ours: at full resolution
        if changed:
            views = views @ draw_moves(rng, S, colored, apart=4 if alone else 1)
        if changed and colored:
            sample |= draw_other_task(rng, S)
        return {"pairs": pairs, "views": np.stack(views), **sample}

    def read_image_task(self, chosen, rng):
        """An image task made of the chosen slices [(case, k)], whatever their labels are."""
        images = [case.stored(k)[0] for case, k in chosen]
        pairs = [(image, image, None) for image in images]
        views = draw_windows(pairs, self.image_size, rng)
        return {"pairs": pairs, "views": views @ draw_moves(rng, len(chosen), False),
                "looks": draw_image_task(rng, len(chosen))}

    collate = staticmethod(Slices.collate)

    def describe(self, dataset, case, k):
        """What the three numbers of `Batch.drawn` stand for, as text."""
        name = self.names[dataset]
        if name == SYNTHETIC:
            return f"{name} step {case} sample {k}"
        return f"{name} {self.cases[name][case].name} slice {k}"


class BatchSampler:
    """The numbers of one rank's samples: for every step from `start` on `parts` batches."""

    def __init__(self, start, stop, batch_size, parts=1, rank=0, ranks=1):
        self.steps, self.batch_size, self.parts = range(start, stop), batch_size, parts
        self.rank, self.ranks = rank, ranks

    def __len__(self):
        return len(self.steps) * self.parts

    def __iter__(self):
        for step in self.steps:
            for part in range(self.rank * self.parts, (self.rank + 1) * self.parts):
                first = part * self.batch_size
                yield [(step, i) for i in range(first, first + self.batch_size)]


# -------------------------------------------------------------------------------------------------
# Prompts (section 3.3, "Inference"), for training and for evaluation

def prompt_cases(cases, target, nearest=16):
    """The cases that may prompt a case: of its kind and of another patient.

    For a single slice whose height in the body is known: the `nearest` in height (ours).
    """
    cases = [c for c in cases if c.kind == target.kind and c.patient != target.patient]
    if target.slices > 1 or target.height is None:
        return cases
    known = [c for c in cases if c.height is not None]
    return nsmallest(nearest, known, key=lambda c: abs(c.height - target.height)) or cases


def evaluation_prompt(cases, target, rng, slices="foreground"):
    """The paper's prompt for a case: a random one of the training cases, of another patient."""
    others = prompt_cases([c for c in cases if c.kept(slices)], target)
    return others[rng.integers(len(others))]


def matching_slice(k, count, prompt_count):
    """The prompt slice for slice k of count: floor(k * N_TR / N_TE) (paper)."""
    return k * prompt_count // count


if __name__ == "__main__":  # what is found below a data root, and what is wrong with it
    from figures import draw_datasets
    command_line(lambda: doctor.main(draw=draw_datasets))
