"""What the tests of inference share: fake models, small files, and programs that fail."""

import nibabel
import numpy as np
import pytest
import torch

import mvg
from scans.volumes import command_line


class Echo(mvg.MVG):
    """A model that answers with the label of its first prompt."""

    def encode_prompts(self, images, labels):
        return labels[:, 0]

    def predict(self, cache, image):
        return cache.expand_as(image).clone()

    def predict_canvas(self, prompt_image, prompt_label, image):
        return prompt_label.expand_as(image).clone()


class Identity(mvg.MVG):
    """A model that answers with the image, whatever its prompts are."""

    def encode_prompts(self, images, labels):
        return None

    def predict(self, cache, image):
        return image.clone()

    def predict_canvas(self, prompt_image, prompt_label, image):
        return image.clone()


def fake(kind, side=64, **meta):
    """A fake model of a side in pixels; meta: what its training is said to have been."""
    model = kind(mvg.Config(8, 4, 1, 1, patch=8 if side % 16 else 16, image_size=side)).eval()
    model.meta = meta
    return model


def watch(monkeypatch, model):
    """A list that grows by (prompt images, prompt labels), (1, n, 1, s, s), at every question."""
    asked, encode, canvas = [], model.encode_prompts, model.predict_canvas

    def encode_prompts(images, labels):
        asked.append((images.clone(), labels.clone()))
        return encode(images, labels)

    def predict_canvas(prompt_image, prompt_label, image):
        for x, y in zip(prompt_image, prompt_label):  # one for every image, or one for all
            asked.append((x[None, None].clone(), y[None, None].clone()))
        return canvas(prompt_image, prompt_label, image)

    monkeypatch.setattr(model, "encode_prompts", encode_prompts)
    monkeypatch.setattr(model, "predict_canvas", predict_canvas)
    return asked


def rand(*shape, seed=0):
    """Noise in [0, 1], float32."""
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def at_side(picture, side, resize):
    """A picture (H, W) as a model sees it: (side, side)."""
    return resize(torch.from_numpy(np.ascontiguousarray(picture))[None].float(), (side, side))[0]


def volume(path, shape=(20, 24, 6), affine=None, seed=0, label=None):
    """A NIfTI with noise, or with the label given."""
    array = label
    if label is None:
        array = np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)
    affine = np.diag([1, 1, 3, 1.0]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def voxels(path):
    """What a NIfTI holds."""
    return np.asarray(nibabel.load(path).dataobj)


def mask(shape=(20, 24, 6), values=(1, 2)):
    """Two blocks; the first slice has the second one only."""
    label = np.zeros(shape, np.uint8)
    label[3:9, 4:12, 1:] = values[0]
    label[12:17, 14:20] = values[-1]
    return label


def failure(capsys, main, *argv):
    """Run a program as its command line does; the one line it says, and its exit status 2."""
    with pytest.raises(SystemExit) as stop:
        command_line(lambda: main([str(a) for a in argv]))
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said.startswith("error: ") and "\n" not in said, said
    return said
