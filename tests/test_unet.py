"""The specialist: its loss against hand-written ones, its answers, its checkpoints."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mvg
from common import make_batch
from lab import unet
from recipe import Recipe
from scans.store import Store
from scans.volumes import DataError, resize_images


def specialist(classes, size=32):
    torch.manual_seed(0)
    return unet.UNet(unet.Config(classes, size, channels=4)).eval()


def samples(classes, B=3, size=32):
    """A `Batch` of two pairs, with classes or images as labels and a truth at most places."""
    torch.manual_seed(1)
    images, labels = torch.rand(2, B, 2, 1, size, size).unbind()
    if classes:
        labels = (labels * (classes + 1)).floor()
    valid = (torch.rand(labels.shape) < 0.8).to(torch.uint8)
    batch = make_batch(images, labels, colored=classes > 0, valid=valid)
    batch.palette = torch.rand(B, 256)
    return batch


# -------------------------------------------------------------------------------------------------
# The network

def test_the_answer_has_the_images_side_and_a_score_a_class():
    for classes in (0, 3):
        assert specialist(classes)(torch.rand(2, 1, 32, 32)).shape == (2, classes + 1, 32, 32)
    assert specialist(2)(torch.rand(1, 1, 48, 16)).shape == (1, 3, 48, 16)
    with pytest.raises(ValueError, match="image_size is 40: it must be a multiple of 16"):
        unet.UNet(unet.Config(1, 40))


def test_every_weight_learns_and_pixels_far_apart_are_connected():
    model, batch = specialist(2), samples(2)
    unet.loss(model, batch, None, Recipe()).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    image = torch.rand(1, 1, 32, 32, requires_grad=True)
    model(image)[0, 1, 0, 0].backward()
    assert image.grad[0, 0, -1, -1] != 0


# -------------------------------------------------------------------------------------------------
# The loss

def test_the_loss_of_classes_is_cross_entropy_and_dice():
    """Written by numpy, sample by sample and class by class."""
    model, batch = specialist(2), samples(2)
    with torch.no_grad():
        got = unet.loss(model, batch, None, Recipe())
        scores = model(batch.images[:, -1]).double().numpy()
    assert got.shape == (3,)
    for b in range(3):
        truth, valid = batch.labels[b, -1, 0].numpy(), batch.valid[b, -1, 0].numpy() > 0
        odds = np.exp(scores[b]) / np.exp(scores[b]).sum(0)
        entropy = np.mean([-np.log(odds[int(t), y, x]) for (y, x), t in np.ndenumerate(truth)
                           if valid[y, x]])
        dice = []
        for c in (1, 2):
            guess, mask = odds[c] * valid, (truth == c) & valid
            dice.append((2 * (guess * mask).sum() + 1) / (guess.sum() + mask.sum() + 1))
        assert got[b].item() == pytest.approx(entropy + 1 - np.mean(dice), rel=1e-5)


@pytest.mark.parametrize("loss", ("smooth_l1", "l1", "l2"))
def test_the_loss_of_images_is_the_recipes_where_there_is_a_truth(loss):
    model, batch = specialist(0), samples(0)
    with torch.no_grad():
        got = unet.loss(model, batch, None, Recipe(loss=loss, beta=0.1))
        painted = model(batch.images[:, -1])[:, 0]
    functions = {"smooth_l1": lambda a, b: F.smooth_l1_loss(a, b, beta=0.1), "l1": F.l1_loss,
                 "l2": F.mse_loss}
    for b in range(3):
        there = batch.valid[b, -1, 0] > 0
        expected = functions[loss](painted[b][there], batch.labels[b, -1, 0][there])
        assert got[b].item() == pytest.approx(expected.item(), rel=1e-5)


def test_prompts_colors_and_what_has_no_truth_are_not_used():
    model, batch = specialist(2), samples(2)
    before = unet.loss(model, batch, None, Recipe())
    batch.images[:, 0], batch.labels[:, 0], batch.valid[:, 0] = 0, 1, 0
    batch.palette = torch.zeros(3, 256)
    missing = batch.valid[:, -1] == 0
    batch.labels[:, -1][missing] = 2 - batch.labels[:, -1][missing]
    assert torch.equal(unet.loss(model, batch, torch.rand(3, 2, 1, 32, 32), Recipe()), before)
    batch.valid[:, -1] = 0
    entropy_is_gone = unet.loss(model, batch, None, Recipe())
    assert torch.allclose(entropy_is_gone, torch.zeros(3))


def test_a_wrapped_model_has_the_same_loss():
    """DistributedDataParallel hides the config behind .module."""
    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, images):
            return self.module(images)

    for classes in (0, 2):
        model, batch = specialist(classes), samples(classes)
        assert torch.equal(unet.loss(Wrapped(model), batch, None, Recipe()),
                           unet.loss(model, batch, None, Recipe()))


# -------------------------------------------------------------------------------------------------
# Answers

@pytest.mark.parametrize("classes", (0, 3))
def test_a_stack_is_answered_slice_by_slice_at_its_own_size(classes):
    model = specialist(classes)
    stack = np.random.default_rng(0).random((5, 24, 40))[:, ::-1]  # of negative strides
    answer = unet.predict_stack(model, stack, batch=2)
    assert answer.shape == stack.shape and answer.dtype == (np.uint8 if classes else np.float32)
    for k, image in enumerate(stack):
        x = torch.from_numpy(image.copy()).float()[None, None]
        with torch.no_grad():
            painted = model(resize_images(x, (32, 32)))
        if classes:
            expected = resize_images(painted.softmax(1), (24, 40)).argmax(1)[0].numpy()
            assert np.mean(answer[k] == expected) > 0.999
        else:
            expected = resize_images(painted, (24, 40))[0, 0].clamp(0, 1).numpy()
            assert np.abs(answer[k] - expected).max() < 1e-5


def test_a_sample_is_answered_in_its_own_colors():
    model, batch = specialist(2), samples(2)
    answer = unet.answer_sample(model, batch)
    classes = model(batch.images[:, -1]).argmax(1)
    assert answer.shape == (3, 1, 32, 32)
    for b in range(3):
        assert torch.equal(answer[b, 0], batch.palette[b][classes[b]])
    model, batch = specialist(0), samples(0)
    assert torch.equal(unet.answer_sample(model, batch), model(batch.images[:, -1]))


# -------------------------------------------------------------------------------------------------
# Making and loading

def test_a_u_net_is_made_for_one_dataset(store):
    for name, classes in (("acdc", 3), ("la", 1), ("Dataset802_MsT1ToFlair", 0)):
        recipe = Recipe(model="unet", image_size=32)
        model = unet.build_for(Store(store.root, [name]), recipe)
        assert model.config.classes == classes and model.config.image_size == 32
        assert recipe.objective == "ar"
    assert unet.build(store.datasets["acdc"]).config.image_size == 448
    for there, settings in ((store, {}), (None, {"datasets": ("synthetic",)}),
                            (Store(store.root, ["la"]), {"synthetic_share": 0.1}),
                            (Store(store.root, ["la"]), {"init": "mae.pth"})):
        with pytest.raises(DataError, match="--model unet learns one task: name one of"):
            unet.build_for(there, Recipe(model="unet", **settings))
    for settings in ({"augment": 0.1}, {"superpixels": 0.1}, {"boxes": "filled"}):
        with pytest.raises(DataError, match="a U-Net learns its task as it is"):
            unet.build_for(Store(store.root, ["la"]), Recipe(model="unet", **settings))


def test_a_checkpoint_gives_the_model_that_it_holds(tmp_path, checkpoint):
    model = specialist(2)
    model.meta = {"datasets": ["la"]}
    mvg.save(tmp_path / "u.pt", model)
    loaded, image = unet.load_any(tmp_path / "u.pt"), torch.rand(1, 1, 32, 32)
    assert isinstance(loaded, unet.UNet) and loaded.meta == model.meta and not loaded.training
    assert loaded.config == model.config and torch.equal(loaded(image), model(image))
    assert isinstance(unet.load_any(checkpoint), mvg.MVG)
    saved = torch.load(tmp_path / "u.pt")
    torch.save({**saved, "config": {**saved["config"], "levels": 3}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt does not fit this code"):
        unet.load_any(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        unet.load_any(tmp_path / "nothing.pt")
