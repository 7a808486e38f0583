"""Inference: the right place, the right values, and one line for bad input."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

import boxes
import data
import infer
import mvg
import readers
from conftest import ROOT
from test_train import failure


class Echo(mvg.MVG):
    """A model that answers with the label of its first prompt."""

    def encode_prompts(self, images, labels):
        return labels[:, 0]

    def predict(self, cache, image):
        return cache.expand_as(image).clone()

    def predict_canvas(self, prompt_image, prompt_label, image):
        return prompt_label.expand_as(image).clone()


@pytest.fixture
def echo(monkeypatch):
    model = Echo(mvg.build("demo", 64).config).eval()
    monkeypatch.setattr(mvg, "load", lambda path, device="cpu": model)
    return model


def volume(path, shape=(20, 24, 6), affine=None, seed=0, label=None):
    """A NIfTI with noise, or with the label given."""
    array = np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32) if label is None else label
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 3, 1.0]) if affine is None else affine), path)
    return path


def mask(shape=(20, 24, 6), values=(1, 2)):
    label = np.zeros(shape, np.uint8)
    label[3:9, 4:12, 1:] = values[0]
    label[12:17, 14:20] = values[-1]
    return label


def command(checkpoint, *argv):
    infer.main([str(a) for a in argv] + (["--checkpoint", str(checkpoint)] if checkpoint else []))


# ---- from Python

def test_predict_follows_the_type_of_the_label():
    model, rng = mvg.build("demo", 32), np.random.default_rng(0)
    image, new = rng.random((20, 24)), rng.random((50, 40))
    label = np.zeros((20, 24), np.int16)
    label[5:12, 5:15], label[14:18, 3:20] = 7, 300
    answer = infer.predict(model, [(image, label)], new)
    assert answer.shape == (50, 40) and answer.dtype == np.int16 and set(np.unique(answer)) <= {0, 7, 300}
    answer = infer.predict(model, [(image, image.astype(np.float32))], new)
    assert answer.shape == (50, 40) and answer.dtype == np.float32 and 0 <= answer.min() and answer.max() <= 1
    assert infer.predict(model, [(image, label > 0)], new).max() <= 1
    assert infer.predict(model, [(image, label), (new, np.zeros(new.shape, np.int16))], new).shape == (50, 40)


def test_predict_from_a_path_equals_predict_from_a_model(checkpoint):
    rng = np.random.default_rng(0)
    image, label = rng.random((32, 32)), rng.integers(0, 3, (32, 32))
    model = mvg.load(checkpoint)
    assert np.array_equal(infer.predict(checkpoint, [(image, label)], image), infer.predict(model, [(image, label)], image))
    assert np.array_equal(infer.predict(model, [(image, label)], image, votes=3), infer.predict(model, [(image, label)], image, votes=3))


@pytest.mark.parametrize("prompts,image,words", (
    ([], np.zeros((8, 8)), "no prompts"),
    ([(np.zeros((8, 8)), np.zeros((8, 9), int))], np.zeros((8, 8)), "8x9 but its image is 8x8"),
    ([(np.zeros((8, 8)), np.zeros((8, 8), int))], np.zeros((8, 8, 3)), "8x8x3"),
    ([(np.zeros((8, 8)), np.zeros((8, 8), int))], np.full((8, 8), 255.0), "scale it to"),
    ([(np.zeros((8, 8)), np.full((8, 8), -1))], np.zeros((8, 8)), "holds -1"),
    ([(np.zeros((8, 8)), np.zeros((8, 8), int)), (np.zeros((8, 8)), np.zeros((8, 8)))], np.zeros((8, 8)), "some floats"),
))
def test_predict_says_what_is_wrong(prompts, image, words):
    with pytest.raises(ValueError, match=words):
        infer.predict(mvg.build("demo", 32), prompts, image)


def test_more_prompts_than_trained_are_averaged():
    model, rng = mvg.build("demo", 32), np.random.default_rng(0)  # trained with one
    images, labels = torch.rand(3, 1, 32, 32), torch.rand(3, 1, 32, 32)
    answers = infer.paint(model, images, labels, torch.rand(2, 1, 32, 32), "ar")
    assert len(answers) == 3
    model.config.max_prompts = 3
    assert len(infer.paint(model, images, labels, torch.rand(2, 1, 32, 32), "ar")) == 1


@pytest.mark.parametrize("mode", ("ar", "canvas"))
def test_a_model_that_copies_answers_images_at_their_own_resolution(mode):
    """An untrained head copies what the filter explains, here all of the image, pixel by pixel, whatever the prompts' sizes."""
    model, rng = mvg.build("pocket", 32, width=48, heads=4, depth=4).eval(), np.random.default_rng(0)
    with torch.no_grad():
        model.head.out.weight.zero_()
    a, b, new = (rng.random(s, dtype=np.float32) for s in ((40, 60), (33, 21), (3, 75, 50)))
    for prompts in ([(a, a)], [(a, a), (b, b)]):
        answer = np.stack([infer.predict(model, prompts, x, mode) for x in new])
        assert np.allclose(answer, new, atol=0.01)
        stacks = [(x[None], y[None]) for x, y in prompts]
        assert np.allclose(infer.predict(model, stacks, new, mode), answer, atol=1e-6)
    assert infer.predict(model, [(a, a)], new[0], mode, tile=True).shape == (75, 50)
    assert infer.predict(model, [(a, (a > 0.5).astype(np.uint8))], new[0], mode).dtype == np.uint8


def test_painted_and_filtered_answers_are_mixed_as_was_best_for_the_prompt():
    """Where they differ by 0.02 the filter was right of the prompt, by 0.15 the truth lay halfway, by 0.5 the paint was; what the prompt left alone is not asked."""
    paint = torch.full((1, 1, 4, 4), 0.3)
    apart = torch.tensor([0.02, 0.15, 0.5, 0.5]).view(4, 1).expand(1, 1, 4, 4)
    label = paint + apart * torch.tensor([1.0, 0.5, 0.0, 1.0]).view(4, 1)
    image = torch.cat([torch.zeros(1, 1, 3, 4), label[:, :, 3:]], 2)  # the last row is as it was
    mixed = infer.mix(paint.flip(2), (paint + apart).flip(2), [(paint, paint + apart, image, label)])
    assert torch.allclose(mixed.flip(2)[0, 0, :, 0], torch.tensor([0.32, 0.375, 0.3, 0.3]), atol=1e-6)


def test_a_batch_answers_as_one_by_one():
    model, rng = mvg.build("demo", 32), np.random.default_rng(0)
    stack, label = rng.random((5, 32, 32)).astype(np.float32), rng.random((1, 32, 32)).astype(np.float32)
    whole = infer.predict_stack(model, [(stack[:1], label)], stack, False, "ar")
    single = np.concatenate([infer.predict_stack(model, [(stack[:1], label)], stack[k:k + 1], False, "ar") for k in range(5)])
    assert np.abs(whole - single).max() < 1e-5


# ---- files: an echo of the prompt's label must come back where it was

@pytest.mark.parametrize("codes", ("RAS", "LPS", "LAS", "PIR", "SLA"))
def test_the_answer_lies_on_the_inputs_grid(tmp_path, echo, codes):
    """The prompt stored as RAS, the input in another orientation and oblique: the echoed mask is in the same place."""
    label = mask()
    base = np.diag([1.5, 1.5, 4, 1.0])
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    volume(tmp_path / "a.nii.gz", affine=base)
    volume(tmp_path / "a_label.nii.gz", affine=base, label=label)
    plain = nibabel.Nifti1Image(np.random.default_rng(1).normal(size=label.shape).astype(np.float32), tilt @ base)
    move = nibabel.orientations.ornt_transform(nibabel.io_orientation(plain.affine), nibabel.orientations.axcodes2ornt(codes))
    stored = plain.as_reoriented(move)
    stored.header["descrip"] = b"a scan"
    nibabel.save(stored, tmp_path / "b.nii.gz")
    command("any", "--prompt", tmp_path / "a.nii.gz", "--input", tmp_path / "b.nii.gz")
    answer = nibabel.load(tmp_path / "b_mvg.nii.gz")
    assert answer.shape == stored.shape and np.array_equal(answer.affine, nibabel.load(tmp_path / "b.nii.gz").affine)
    assert answer.header["descrip"] == stored.header["descrip"] and answer.get_data_dtype() == np.uint8
    expected = nibabel.Nifti1Image(label, tilt @ base).as_reoriented(move)
    assert np.array_equal(np.asarray(answer.dataobj), np.asarray(expected.dataobj))
    assert (answer.header["qform_code"], answer.header["sform_code"]) == (stored.header["qform_code"], stored.header["sform_code"])


ORDERS = ["".join(c) for order in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*order)]


@pytest.fixture
def wide_echo(monkeypatch):
    model = Echo(mvg.Config(width=8, depth=4, heads=1, head_channels=1, patch=16, image_size=448)).eval()
    monkeypatch.setattr(mvg, "load", lambda path, device="cpu": model)
    return model


def blobs(shape, rng):
    """Three boxes of classes 1 to 3, each at least 20 voxels wide where the volume is."""
    label = np.zeros(shape, np.uint8)
    for c in (1, 2, 3):
        box = [slice(a := int(rng.integers(0, max(1, n - 40))), a + max(1, min(n, int(rng.integers(20, 40))))) for n in shape]
        label[tuple(box)] = c
    return label


@pytest.mark.parametrize("shape", ((30, 41, 7), (21, 40, 1), (7, 513, 31)), ids=lambda s: "x".join(map(str, s)))
def test_round_trips_of_all_storage_orders(tmp_path, wide_echo, shape, monkeypatch):
    """The mask comes back voxel by voxel where a slice is no larger than the model's image, else its objects are where they were, to half a pixel of the
    model (1.1 voxels here) and, being rounded to whole voxels, half a voxel."""
    pixel, apart, overlaps = max(1, max(shape[:2]) / 448), [], []
    rng = np.random.default_rng(0)
    tilt = np.linalg.qr(np.eye(3) + 0.15 * rng.normal(size=(3, 3)))[0]
    tilt *= np.sign(np.diag(tilt))
    assert len(set(ORDERS)) == 48 and "RAS" in ORDERS
    for n, codes in enumerate(ORDERS):
        label, affine = blobs(shape, rng), np.eye(4)
        affine[:3, :3] = tilt @ np.diag([0.7, 0.8, 3.0]) if n % 2 else np.diag([0.7, 0.8, 3.0])
        affine[:3, 3] = rng.normal(0, 50, 3)
        move = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes))
        stored = [nibabel.Nifti1Image(a, affine).as_reoriented(move) for a in (rng.normal(size=shape).astype(np.float32), label)]
        nibabel.save(stored[0], tmp_path / "a.nii"), nibabel.save(stored[1], tmp_path / "a_label.nii")
        command("any", "--prompt", tmp_path / "a.nii", "--input", tmp_path / "a.nii")
        answer, truth = nibabel.load(tmp_path / "a_mvg.nii"), np.asarray(stored[1].dataobj)
        assert np.array_equal(answer.affine, nibabel.load(tmp_path / "a.nii").affine) and answer.shape == truth.shape, codes
        found = np.asarray(answer.dataobj)
        if max(shape[:2]) <= 448:
            assert np.array_equal(found, truth), codes
        for c in (1, 2, 3):
            a, b = np.argwhere(found == c), np.argwhere(truth == c)
            if len(b):
                apart.append(np.abs(a.mean(0) - b.mean(0)).max())
                overlaps.append(2 * ((found == c) & (truth == c)).sum() / (len(a) + len(b)))
    print(f"{len(apart)} objects: centroids {np.mean(apart):.2f} voxels apart, at most {max(apart):.2f}; Dice {np.mean(overlaps):.3f}, at least {min(overlaps):.3f}")
    assert max(apart) <= (pixel + 1) / 2 and np.mean(apart) < 0.25 and np.mean(overlaps) > 0.98 and min(overlaps) > 0.93


def test_the_slice_axis_can_be_chosen(tmp_path, echo, capsys):
    label = mask()
    volume(tmp_path / "a.nii"), volume(tmp_path / "a_label.nii", label=label)
    for axis in ("sagittal", "coronal", "axial"):
        command("any", "--prompt", tmp_path / "a.nii", "--input", tmp_path / "a.nii", "--axis", axis)
        assert f"{axis} slices; input" in capsys.readouterr().out
        assert np.array_equal(np.asarray(nibabel.load(tmp_path / "a_mvg.nii").dataobj), label)


def test_the_same_volume_in_three_kinds_of_file_gives_one_answer(tmp_path, checkpoint):
    rng, label = np.random.default_rng(0), mask()
    image = sitk.GetImageFromArray(np.ascontiguousarray(rng.integers(0, 1000, label.shape, dtype=np.int16).T))
    truth = sitk.GetImageFromArray(np.ascontiguousarray(label.T))
    for x in (image, truth):
        x.SetSpacing((0.7, 0.8, 2.5)), x.SetOrigin((10, -20, 5)), x.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    answers = []
    for kind in (".nii.gz", ".nrrd", ".mhd"):
        sitk.WriteImage(image, str(tmp_path / f"a{kind}")), sitk.WriteImage(truth, str(tmp_path / f"a_seg{kind}"))
        command(checkpoint, "--prompt", tmp_path / f"a{kind}", "--input", tmp_path / f"a{kind}", "--prompt_label", tmp_path / f"a_seg{kind}")
        answers.append(sitk.ReadImage(str(tmp_path / f"a_mvg{'.mha' if kind == '.mhd' else kind}")))
    assert all(np.array_equal(sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(answers[0])) for a in answers[1:])
    assert all(a.GetDirection() == pytest.approx(image.GetDirection(), abs=1e-6) for a in answers)


def dicom(folder, array, affine, uid="1", start=0):
    """A series of array (X, Y, Z) in HU, on an affine (LPS), as files in no order."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    for k in range(array.shape[2]):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array[:, :, k].T))
        image.SetSpacing(np.linalg.norm(affine[:3, :2], axis=0).tolist())
        place = affine[:3, 3] + k * affine[:3, 2]
        for tag, value in (("0008|0060", "CT"), ("0020|000e", f"1.2.3.{uid}"), ("0020|000d", "1.2.3"), ("0008|0018", f"1.2.3.{uid}.{k + 1}"), ("0020|0013", str(k + 1)),
                           ("0020|0032", "\\".join(f"{v:.6f}" for v in place)), ("0020|0037", "\\".join(f"{v:.8f}" for v in direction[:, :2].T.ravel())),
                           ("0028|1052", "-1024"), ("0028|1053", "1"), ("0018|0050", "3")):
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{(7 * k + start) % 101:03d}.dcm"))
        writer.Execute(image)


def test_a_dicom_folder_is_answered_as_nifti(tmp_path, echo, capsys):
    """Oblique, in HU, the files in no order: the answer lies where the prompt's label does; several series are listed."""
    label, rng = mask(), np.random.default_rng(0)
    hu = rng.integers(-1000, 1000, label.shape, dtype=np.int16)
    affine = np.diag([0.7, 0.8, 3.0, 1.0])
    affine[:3, :3] = np.linalg.qr(np.eye(3) + 0.1 * rng.normal(size=(3, 3)))[0] * np.sign(np.linalg.qr(np.eye(3))[0].diagonal()) @ affine[:3, :3]
    affine[:3, :3] *= np.sign(np.diag(affine[:3, :3]))
    if np.linalg.det(affine[:3, :3]) < 0:
        affine[:3, 2] *= -1
    affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1]) / (0.7 * 0.8) * 3
    affine[:3, 3] = (-20, 30, 40)
    dicom(tmp_path / "scan", hu, affine)
    ras = np.diag([-1, -1, 1, 1]) @ affine
    volume(tmp_path / "a.nii.gz", affine=ras, label=hu), volume(tmp_path / "a_label.nii.gz", affine=ras, label=label)
    command("any", "--prompt", tmp_path / "a.nii.gz", "--input", tmp_path / "scan")
    answer = nibabel.load(tmp_path / "scan_mvg.nii.gz")
    assert np.allclose(answer.affine, ras, atol=1e-3) and np.array_equal(np.asarray(answer.dataobj), label)
    assert "prompt ct, 6 axial slices; input ct, 6 axial slices" in capsys.readouterr().out  # in HU, so known as CT
    dicom(tmp_path / "scan", hu[:, :, :3], affine, "2", 50)
    argv = ["--prompt", tmp_path / "a.nii.gz", "--input", tmp_path / "scan", "--checkpoint", "any"]
    said = failure(capsys, infer.main, *argv)
    assert "has 2 series (1: 6 files" in said and "2: 3 files" in said and "choose one with --series" in said
    infer.main([str(a) for a in argv] + ["--series", "1"])
    assert "has no series '3'" in failure(capsys, infer.main, *argv, "--series", 3)
    (tmp_path / "scan" / f"{14:03d}.dcm").unlink()  # a slice is missing
    assert "files are missing" in failure(capsys, infer.main, *argv, "--series", 1)


def test_several_inputs_and_prompts(tmp_path, echo, capsys):
    """A folder of scans, answered into another; a bad one is named and the rest done; two prompts, each with its label."""
    (tmp_path / "in").mkdir(), (tmp_path / "out").mkdir()
    label = mask()
    for name in "abc":
        volume(tmp_path / "in" / f"{name}.nii.gz", seed=ord(name))
    volume(tmp_path / "in" / "a_label.nii.gz", label=label), volume(tmp_path / "p.nii.gz", seed=9), volume(tmp_path / "p_seg.nii.gz", label=label)
    (tmp_path / "in" / "bad.nii.gz").write_text("no scan")
    argv = ["--prompt", tmp_path / "in" / "a.nii.gz", tmp_path / "p.nii.gz", "--input", tmp_path / "in", "--output", tmp_path / "out", "--checkpoint", "any"]
    with pytest.raises(SystemExit) as stop:
        data.command_line(lambda: infer.main([str(a) for a in argv]))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "bad.nii.gz cannot be read" in said and "1 of 4 inputs have no answer" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{n}_mvg.nii.gz" for n in "abc"]
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "out" / "c_mvg.nii.gz").dataobj), label)
    assert "2 prompts and 1 labels" in failure(capsys, infer.main, *argv, "--prompt_label", tmp_path / "p_seg.nii.gz")
    assert "is no folder" in failure(capsys, infer.main, *argv[:-4], "--output", tmp_path / "nowhere", "--checkpoint", "any")


def test_confidence_overlay_and_report(tmp_path, checkpoint):
    volume(tmp_path / "a.nii.gz"), volume(tmp_path / "a_label.nii.gz", label=mask()), volume(tmp_path / "b.nii.gz", (20, 24, 4), seed=1)
    command(checkpoint, "--prompt", tmp_path / "a.nii.gz", "--input", tmp_path / "b.nii.gz", "--confidence", "--overlay", "--report", "--votes", "3")
    sure, answer = (nibabel.load(tmp_path / f"b_mvg{n}.nii.gz") for n in ("_confidence", ""))
    assert sure.get_data_dtype() == np.float32 and np.array_equal(sure.affine, answer.affine) and sure.shape == answer.shape
    values = np.asarray(sure.dataobj)
    assert 1 / 3 - 1e-5 <= values.min() and values.max() <= 1 + 1e-5
    said, found = json.loads((tmp_path / "b_mvg.json").read_text()), np.asarray(answer.dataobj)
    assert said["prompt_slices"] == [[0], [1], [3], [4]] and said["options"]["votes"] == 3 and said["axis"] == "axial" and said["seconds"] > 0
    assert {int(c): v["voxels"] for c, v in said["classes"].items()} == {c: int((found == c).sum()) for c in np.unique(found) if c}
    assert all(v["ml"] == pytest.approx(v["voxels"] * 3 / 1000, abs=1e-3) for v in said["classes"].values())
    assert Image.open(tmp_path / "b_mvg_overlay.png").size[0] > 300


# ---- other ways to ask

def test_neighbours_tiles_and_propagation(echo, monkeypatch):
    """Which prompts each slice sees: those beside it; quarters of the same place; the answer before, once there is one."""
    rng, stack = np.random.default_rng(0), np.random.default_rng(1).random((4, 64, 64)).astype(np.float32)
    label = np.zeros((4, 64, 64), np.uint8)
    for k in range(4):
        label[k, 8 * k:8 * k + 20, 10:40] = 1
    asked, plain = [], infer.segment
    monkeypatch.setattr(infer, "segment", lambda model, images, labels, x, *rest: asked.append((images.clone(), labels.clone(), x.clone())) or plain(model, images, labels, x, *rest))
    assert np.array_equal(infer.predict(echo, [(stack, label)], stack), label) and [len(a[0]) for a in asked] == [1] * 4
    asked.clear()
    infer.predict(echo, [(stack, label)], stack, neighbours=1)
    assert [len(a[0]) for a in asked] == [2, 3, 3, 2]  # at the ends there is one beside it
    assert torch.equal(asked[1][1][:, 0], torch.from_numpy(label[:3]).long())
    asked.clear()
    assert np.array_equal(infer.predict(echo, [(stack, label)], stack, tile=True), label)  # an echo of all quarters is the whole
    assert len(asked) == 36 and all(a[2].shape[-2:] == (64, 64) for a in asked)
    asked.clear()
    still = [(stack, label[[2, 2, 2, 2]])]
    assert np.array_equal(infer.predict(echo, still, stack, propagate=True), still[0][1])
    assert [torch.equal(a[1][0, 0], torch.from_numpy(label[2]).long()) for a in asked] == [True] * 7  # from the second slice on, two questions
    assert torch.equal(asked[2][0][0, 0], torch.from_numpy(stack[0])) and torch.equal(asked[2][2][0, 0], torch.from_numpy(stack[1]))


def test_twice_the_same_and_a_batch_as_one_by_one(checkpoint, monkeypatch):
    model, rng = mvg.load(checkpoint), np.random.default_rng(0)
    stack, label = rng.random((20, 32, 32)).astype(np.float32), np.zeros((1, 32, 32), np.uint8)
    label[0, 5:20, 5:20], label[0, 22:30, 8:30] = 1, 2
    sure = [np.zeros(stack.shape, np.float32) for _ in range(3)]
    answers = []
    for batch, fit in zip((16, 16, 1), sure):
        monkeypatch.setattr(infer, "BATCH", batch)
        answers.append(infer.predict(model, [(stack[:1], label)], stack, votes=2, confidence=fit))
    assert np.array_equal(answers[0], answers[1]) and np.array_equal(sure[0], sure[1])
    assert np.abs(sure[0] - sure[2]).max() < 1e-4 and (answers[0] == answers[2])[sure[0] > 0.51].all()


LARGE = """
import resource, sys
import numpy as np, nibabel, torch
import infer, mvg
torch.set_num_threads(1)
class Quick(mvg.MVG):
    def encode_prompts(self, images, labels):
        return labels[:, 0]
    def predict(self, cache, image):
        return cache.expand_as(image).clone()
model = Quick(mvg.Config(width=192, depth=8, heads=6, head_channels=16, patch=8, image_size=64)).eval()
mvg.load = lambda path, device="cpu": model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
infer.main(sys.argv[1:])
print("GiB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20)
"""


@pytest.mark.slow
def test_a_thousand_slices_fit_four_gibibytes(tmp_path):
    """512 x 512 x 1,000, 16 bits, as prompt and as input."""
    rng = np.random.default_rng(0)
    scan = np.tile(rng.integers(-1000, 1000, (512, 512, 1), dtype=np.int16), (1, 1, 1000))
    label = np.zeros(scan.shape, np.uint8)
    label[100:300, 100:300, 100:] = 1
    label[320:400, 100:300, 100:] = 2
    for name, array in (("a", scan), ("a_label", label)):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([0.8, 0.8, 1, 1])), tmp_path / f"{name}.nii")
    del scan
    said = subprocess.run([sys.executable, "-c", LARGE, "--prompt", str(tmp_path / "a.nii"), "--input", str(tmp_path / "a.nii"), "--output", str(tmp_path / "o.nii"),
                           "--checkpoint", "any", "--report"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    print(said.splitlines()[-1])
    assert float(said.split("GiB")[1]) < 4
    found = np.asarray(nibabel.load(tmp_path / "o.nii").dataobj)
    assert 2 * ((found == label) & (label > 0)).sum() / ((found > 0).sum() + (label > 0).sum()) > 0.95


def test_ctrl_c_leaves_no_half_written_file(tmp_path, checkpoint):
    rng = np.random.default_rng(0)
    volume(tmp_path / "a.nii.gz", (64, 64, 400)), volume(tmp_path / "a_label.nii.gz", label=blobs((64, 64, 400), rng))
    before = sorted(p.name for p in tmp_path.iterdir())
    run = subprocess.Popen([sys.executable, str(ROOT / "infer.py"), "--prompt", str(tmp_path / "a.nii.gz"), "--input", str(tmp_path / "a.nii.gz"), "--checkpoint", str(checkpoint),
                            "--votes", "500", "--report"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell starts background jobs with it ignored
    while "classes shown" not in run.stdout.readline():
        assert run.poll() is None
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130 and sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"))
def test_every_kind_of_volume(tmp_path, echo, kind):
    label = mask(values=(3, 200))
    for name, array in (("a", np.random.default_rng(0).normal(size=label.shape).astype(np.float32)), ("a_seg", label)):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        image.SetSpacing((0.7, 0.8, 2.5)), image.SetOrigin((10, -20, 5))
        sitk.WriteImage(image, str(tmp_path / f"{name}{kind}"))
    command("any", "--prompt", tmp_path / f"a{kind}", "--input", tmp_path / f"a{kind}")
    written = tmp_path / f"a_mvg{'.mha' if kind == '.mhd' else kind}"
    answer, source = sitk.ReadImage(str(written)), sitk.ReadImage(str(tmp_path / f"a{kind}"))
    assert np.array_equal(sitk.GetArrayFromImage(answer).T, label)
    for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(answer, get)() == pytest.approx(getattr(source, get)(), abs=1e-5)


def test_pictures(tmp_path, echo):
    label = mask()[:, :, 3].T
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    Image.fromarray(label * 100).save(tmp_path / "a_label.png")
    Image.fromarray(rng.integers(0, 255, (48, 40), dtype=np.uint8)).save(tmp_path / "b.png")
    command("any", "--prompt", tmp_path / "a.jpg", "--input", tmp_path / "b.png")
    answer = np.array(Image.open(tmp_path / "b_mvg.png"))
    assert answer.shape == (48, 40) and set(np.unique(answer)) == {0, 100, 200}
    grown = np.kron(label * 100, np.ones((2, 2), np.uint8))
    assert (answer == grown).mean() > 0.97


def test_image_to_image_keeps_the_units_of_the_prompt_label(tmp_path, echo):
    volume(tmp_path / "a.nii.gz")
    x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in (20, 24, 6)), indexing="ij")
    target = (4000 + 1500 * np.sin(3 * x + z) * y).astype(np.float32)  # smooth: resampling must not matter
    volume(tmp_path / "a_target.nii.gz", label=target)
    volume(tmp_path / "b.nii.gz", seed=5)
    command("any", "--prompt", tmp_path / "a.nii.gz", "--input", tmp_path / "b.nii.gz", "--output", tmp_path / "out.nii.gz")
    answer = np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj)
    low, high = np.percentile(target, (0.5, 99.5))
    assert answer.dtype == np.float32 and np.abs(answer - target.clip(low, high)).mean() < 0.1 * target.std()


@pytest.mark.parametrize("image,label", (("a.nii", "a_label.nii"), ("a.nii.gz", "a_seg.nii.gz"), ("a.nii.gz", "a_gt.nii"), ("a.png", "a-mask.png"),
                                         ("imagesTr/c_0000.nii.gz", "labelsTr/c.nii.gz"), ("imagesTr/c.nii.gz", "labelsTr/c.nii.gz"),
                                         ("x/lgemri.nrrd", "x/laendo.nrrd"), ("images/p.jpg", "masks/p.png")))
def test_the_label_is_found_by_the_usual_names(tmp_path, image, label):
    for name in (image, label):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert infer.find_label(tmp_path / image) == tmp_path / label


def test_warnings_for_classes_that_the_matching_slices_lack(tmp_path, echo, capsys):
    label = mask()
    label[:, :, 5] = 9
    volume(tmp_path / "a.nii.gz"), volume(tmp_path / "a_label.nii.gz", label=label), volume(tmp_path / "b.nii.gz", (20, 24, 2))
    command("any", "--prompt", tmp_path / "a.nii.gz", "--input", tmp_path / "b.nii.gz")
    said = capsys.readouterr().out
    assert "classes shown: 1, 2" in said and "lack 9" in said


# ---- bad input

def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path, checkpoint, capsys):
    good = [volume(tmp_path / "a.nii.gz"), volume(tmp_path / "a_label.nii.gz", label=mask())]
    volume(tmp_path / "lonely.nii.gz")
    volume(tmp_path / "small.nii.gz", label=mask((20, 24, 5)))
    volume(tmp_path / "four.nii.gz", (8, 8, 4, 3))
    volume(tmp_path / "empty.nii.gz", label=np.zeros((20, 24, 6), np.uint8))
    nan = np.zeros((20, 24, 6), np.float32)
    nan[3, 3, 3] = np.nan
    volume(tmp_path / "nan.nii.gz", label=nan)
    volume(tmp_path / "float.nii.gz", label=mask() * np.float32(0.3))
    volume(tmp_path / "negative.nii.gz", label=mask().astype(np.int16) - 1)
    whole = good[0].read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.nii.gz").write_text("hello")
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "bad.nrrd").write_text("NRRD0004\ntype: short\n")
    (tmp_path / "no.pt").write_bytes(b"no checkpoint")
    rgb = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), tmp_path / "rgb.nii.gz")
    (tmp_path / "emptied").mkdir(), (tmp_path / "series").mkdir()
    (tmp_path / "series" / "1.dcm").write_bytes(b"no DICOM")
    before = sorted(p.name for p in tmp_path.iterdir())
    t = lambda name: tmp_path / name
    for changed, words in (
        ({"--input": t("missing.nii.gz")}, "missing.nii.gz: no such file"),
        ({"--prompt": t("lonely.nii.gz")}, "pass --prompt_label"),
        ({"--prompt_label": t("small.nii.gz")}, "20x24x5 but its image is 20x24x6"),
        ({"--input": t("four.nii.gz")}, "8x8x4x3"),
        ({"--input": t("cut.nii.gz")}, "cut.nii.gz cannot be read"),
        ({"--input": t("text.nii.gz")}, "text.nii.gz cannot be read"),
        ({"--input": t("note.txt")}, "unknown kind"),
        ({"--input": t("bad.png")}, "bad.png cannot be read"),
        ({"--input": t("bad.nrrd")}, "bad.nrrd cannot be read"),
        ({"--input": t("nan.nii.gz")}, "1 voxels that are NaN"),
        ({"--input": t("rgb.nii.gz")}, "RGB"),
        ({"--prompt_label": t("float.nii.gz"), "--task": "seg"}, "0.3, which is no class"),
        ({"--prompt_label": t("negative.nii.gz"), "--task": "seg"}, "label -1"),
        ({"--prompt_label": t("empty.nii.gz")}, "is empty"),
        ({"--checkpoint": t("no.pt")}, "no.pt is not a checkpoint"),
        ({"--checkpoint": t("none.pt")}, "none.pt: no such checkpoint"),
        ({"--output": t("out.png")}, "cannot hold the answer"),
        ({"--output": t("nowhere/out.nii.gz")}, "there is no folder"),
        ({"--output": t("a.nii.gz")}, "is one of the inputs"),
        ({"--output": t("a_label.nii.gz")}, "is one of the inputs"),
        ({"--output": t("note.txt")}, "cannot hold the answer"),
        ({"--prompt_label": t("a.nii.gz"), "--task": "seg"}, "which is no class"),
        ({"--confidence": None, "--task": "image"}, "are of segmentations"),
        ({"--neighbours": "-1"}, "not below 0"),
        ({"--input": t("emptied")}, "holds no image"),
        ({"--input": t("series")}, "DICOM"),
        ({"--prompt_label": t("negative.nii.gz")}, "label -1"),
        ({"--device": "cuda:7"}, "cuda:7"),
        ({"--votes": "0"}, "at least 1"),
    ):
        argv = {"--prompt": good[0], "--input": good[0], "--checkpoint": checkpoint, **changed}
        assert words in failure(capsys, infer.main, *[x for pair in argv.items() for x in pair if x is not None]), changed
        assert sorted(p.name for p in tmp_path.iterdir()) == before, changed


@pytest.mark.parametrize("shape,axis", (((12, 1, 14), 1), ((1, 12, 14), 0), ((12, 14, 1), 2), ((12, 14), 2), ((12, 14, 3, 1), 2)))
def test_single_slices_and_trailing_axes_come_back_in_their_shape(tmp_path, echo, shape, axis, capsys):
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(n // 3, n // 3 + 4) if n > 3 else slice(None) for n in shape)] = 1
    volume(tmp_path / "a.nii.gz", shape, np.diag([1, 1, 1, 1.0])), volume(tmp_path / "a_seg.nii.gz", label=label, affine=np.diag([1, 1, 1, 1.0]))
    command("any", "--prompt", tmp_path / "a.nii.gz", "--input", tmp_path / "a.nii.gz")
    assert ("sagittal", "coronal", "axial")[axis] in capsys.readouterr().out
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "a_mvg.nii.gz").dataobj), label)


def test_large_label_values(tmp_path, echo):
    image, label = np.random.default_rng(0).random((24, 20)), np.zeros((24, 20), np.int64)
    label[4:12, 4:12], label[14:20, 10:18] = 614454277, 2035
    assert np.array_equal(infer.predict(echo, [(image, label)], image), label)
    Image.fromarray((image * 255).astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.where(label == 2035, 2035, 0).astype(np.uint16)).save(tmp_path / "a_label.png")
    command("any", "--prompt", tmp_path / "a.png", "--input", tmp_path / "a.png")
    assert np.array_equal(np.array(Image.open(tmp_path / "a_mvg.png")), np.where(label == 2035, 2035, 0))


def test_a_jpeg_is_no_mask_and_a_palette_picture_is_one(tmp_path, echo, capsys):
    rng, label = np.random.default_rng(0), mask()[:, :, 3].T
    palette = Image.fromarray(label, "L").convert("P")
    palette = Image.frombytes("P", palette.size, label.tobytes())
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [7] * 759)
    palette.save(tmp_path / "a_label.png")
    Image.fromarray(rng.integers(0, 255, label.shape, dtype=np.uint8)).save(tmp_path / "a.png")
    command("any", "--prompt", tmp_path / "a.png", "--input", tmp_path / "a.png")
    assert np.array_equal(np.array(Image.open(tmp_path / "a_mvg.png")), label)  # indices are the classes
    assert readers.read_volume(tmp_path / "a_label.png").array.max() > 2  # as an image it is gray
    Image.fromarray(label * 100).save(tmp_path / "blurred.jpg")
    said = failure(capsys, infer.main, "--prompt", tmp_path / "a.png", "--prompt_label", tmp_path / "blurred.jpg", "--input", tmp_path / "a.png", "--task", "seg", "--checkpoint", "any")
    assert "save the mask as PNG" in said


def test_binary_coloring_averages_over_prompts(echo):
    echo.meta = {"coloring": "binary"}
    image, label = np.random.default_rng(0).random((64, 64)), np.zeros((64, 64), int)
    label[10:40, 10:40] = 5
    empty = np.zeros((64, 64), int)
    assert np.array_equal(infer.predict(echo, [(image, label)], image), label)
    half = infer.segment(echo, torch.zeros(2, 1, 64, 64), torch.from_numpy(np.stack([label, empty]))[:, None], torch.zeros(1, 1, 64, 64), [5])
    assert half[0, :, 20, 20].tolist() == pytest.approx([0.65 / 1.65, 1 / 1.65]) and half[0, 0, 50, 50] == 1 and torch.allclose(half.sum(1), torch.ones(1, 64, 64))


def test_votes_of_a_binary_model_are_views(echo, monkeypatch):
    """Eight mirrored and turned views of the same pictures, and every answer is turned back."""
    echo.meta, seen = {"coloring": "binary"}, []
    encode = echo.encode_prompts
    monkeypatch.setattr(echo, "encode_prompts", lambda images, labels: seen.append(labels.clone()) or encode(images, labels))
    image, label = np.random.default_rng(0).random((64, 64)), np.zeros((64, 64), int)
    label[4:30, 10:20] = 5
    assert np.array_equal(infer.predict(echo, [(image, label)], image, votes=8), label)
    assert len({tuple(view.flatten().tolist()) for s in seen for view in s}) == 8
    many = infer.segment(echo, *(torch.rand(1, 1, 64, 64), torch.from_numpy(label)[None, None], torch.rand(6, 1, 64, 64)), [5], votes=3)
    few = infer.segment(echo, *(torch.rand(1, 1, 64, 64), torch.from_numpy(label)[None, None], torch.rand(2, 1, 64, 64)), [5], votes=3)
    assert torch.equal(many[:2], few)  # one by one, or side by side


def test_a_second_look_from_near(echo, monkeypatch):
    """Where a class was seen, the same question is asked once more around it, on the prompt's side around the prompt's; else nothing is."""
    echo.meta, asked = {"coloring": "binary", "close_up": 0.3}, []
    encode, predict = echo.encode_prompts, echo.predict
    monkeypatch.setattr(echo, "encode_prompts", lambda images, labels: asked.append((images.clone(), labels.clone())) or encode(images, labels))
    rng = np.random.default_rng(0)
    image, label = rng.random((128, 128)), np.zeros((128, 128), int)
    label[20:36, 30:50], label[80:90, 90:94], label[110:, :] = 5, 7, 9  # the last one spans the picture
    assert np.array_equal(infer.predict(echo, [(image, label)], image), label)
    first, second = asked
    assert len(first[1]) == 3 and len(second[1]) == 2  # classes looked at, and looked at again
    for shown, labels, value in zip(*second, (5, 7)):
        rows, columns = data.window(data.extent(label == value)[0], max(0.25, infer.NEAR * data.extent(label == value)[1]), label.shape)
        assert torch.allclose(shown[0], infer.look([image[rows, columns]], 64, data.resize_images)[0].float())
        assert torch.equal(labels[0], infer.look([(label == value)[rows, columns]], 64, data.resize_labels)[0].float())

    for options, looks in (({"close_up": False}, 1), ({"tile": True}, 9), ({}, 2)):
        asked.clear()
        infer.predict(echo, [(image, label)], image, **options)
        assert len(asked) == looks
    monkeypatch.setattr(echo, "predict", lambda cache, x: torch.zeros_like(x))  # sees nothing
    asked.clear()
    assert not infer.predict(echo, [(image, label)], image).any() and len(asked) == 1
    with pytest.raises(ValueError, match="not with tile"):
        infer.predict(echo, [(image, label)], image, tile=True, close_up=True)
    echo.meta = {"coloring": "random", "close_up": 0.3}  # all classes in one picture: there is no near
    asked.clear()
    infer.predict(echo, [(image, label)], image)
    assert len(asked) == 1
    with pytest.raises(ValueError, match="--coloring binary"):
        infer.predict(echo, [(image, label)], image, close_up=True)
    assert infer.predict(echo, [(image, image)], image, close_up=True).shape == image.shape  # eval.py asks for both kinds in one go


def test_boxes_drawn_on_a_prompt_are_asked_for_as_a_mask(echo, monkeypatch):
    """By a model that was trained so: the mask of the prompt's boxes goes in, and boxes around the answer's parts come out, drawn on the input."""
    rng, asked = np.random.default_rng(0), []
    image, other = (rng.random((2, 64, 64)) * 0.8).astype(np.float32)
    known = [(5, 8, 20, 30), (40, 30, 59, 47)]
    encode = echo.encode_prompts
    monkeypatch.setattr(echo, "encode_prompts", lambda images, labels: asked.append(labels.clone()) or encode(images, labels))
    echo.meta = {"coloring": "binary", "boxes": "filled"}
    answer = infer.predict(echo, [(image, boxes.draw(image, known))], other)
    read = boxes.read(boxes.draw(image, known), image)
    assert np.abs(np.subtract(sorted(read), known)).max() <= 1 and np.array_equal(asked[0][0, 0, 0], boxes.fill(read, (64, 64)))
    assert np.array_equal(answer, boxes.draw(other, read))
    stack = infer.predict(echo, [(np.stack([image, other]), np.stack([boxes.draw(image, known), other]))], np.stack([other, other, image, image]))
    assert np.array_equal(stack, [boxes.draw(other, read)] * 2 + [image] * 2)  # the prompt's second slice has none
    for meta, label in (({"coloring": "binary", "boxes": "lines"}, boxes.draw(image, known)), ({"coloring": "binary"}, boxes.draw(image, known)), (echo.meta, other),
                        (echo.meta, image), (echo.meta, np.where(boxes.fill(known, (64, 64)), 0, image)), (echo.meta, np.where(boxes.draw(image * 0, known), other, image))):
        echo.meta = meta
        asked.clear()
        infer.predict(echo, [(image, label.astype(np.float32))], other)
        assert not asked  # an image, painted on the canvas
    echo.meta, found = {"coloring": "binary", "boxes": "filled"}, []  # an example without a finding beside one with two
    infer.predict(echo, [(other, other + np.float32(1e-4)), (image, boxes.draw(image, known))], other, found=found)
    assert [a.sum() > 0 for a in asked] == [False, True] and len(found[0]) == 2


@pytest.mark.parametrize("kind", ["ct", "mri", "png", "png16"])
def test_boxes_of_files_come_back_in_the_units_of_the_input(echo, tmp_path, kind, capsys):
    """Drawn as bright as the prompt gets, or as its window does, whatever the range of the numbers."""
    echo.meta, rng, known = {"coloring": "binary", "boxes": "filled"}, np.random.default_rng(0), [(5, 8, 20, 30), (40, 30, 59, 47)]
    scale = {"ct": lambda a: a * 1300 - 1000, "mri": lambda a: a * 600, "png": lambda a: a * 200, "png16": lambda a: a * 3000}[kind]
    top = {"ct": 300, "mri": 900, "png": 255, "png16": 65535}[kind]
    for n, name in enumerate(("a", "b")):
        array = scale(rng.random((64, 64)))
        marked = np.where(boxes.draw(np.zeros((64, 64)), known) > 0, top, array)
        for end, values in (("", array), ("_label", marked)):
            if kind.startswith("png"):
                Image.fromarray(values.astype(np.uint8 if kind == "png" else np.uint16)).save(tmp_path / f"{name}{end}.png")
            else:
                volume(tmp_path / f"{name}{end}.nii.gz", label=values.T[..., None].astype(np.int16))
        if n:
            kept = array
    end = ".png" if kind.startswith("png") else ".nii.gz"
    command(tmp_path / "m.pt", "--prompt", tmp_path / f"a{end}", "--input", tmp_path / f"b{end}", "--output", tmp_path / f"o{end}", "--task", "image", "--axis", "axial")
    assert "2 boxes are drawn on the prompts" in capsys.readouterr().out
    answer = np.array(Image.open(tmp_path / f"o{end}")) if kind.startswith("png") else np.asarray(nibabel.load(tmp_path / f"o{end}").dataobj)[..., 0].T
    low, high = {"ct": (-100, 200), "png": (0, 255)}.get(kind, np.percentile(kept.astype(np.int16 if kind == "mri" else np.uint16), (0.5, 99.5)))
    unit = lambda a: ((a.clip(low, high) - low) / (high - low)).astype(np.float32)
    assert np.abs(np.subtract(sorted(boxes.drawn(unit(answer), unit(kept))), known)).max() <= 2
    far = boxes.draw(np.zeros((64, 64)), [(t - 1, l - 1, b + 1, r + 1) for t, l, b, r in known], 4) == 0
    assert np.abs(unit(answer) - unit(kept))[far].max() < 0.02


def test_a_second_look_with_propagation(echo):
    """The slice before may lack a class that the prompt has."""
    echo.meta = {"coloring": "binary", "close_up": 0.3}
    stack, label = np.random.default_rng(0).random((3, 64, 64)), np.zeros((3, 64, 64), int)
    label[:, 10:20, 10:20], label[1:, 40:50, 30:40] = 1, 2
    answer = infer.predict(echo, [(stack, label)], stack, propagate=True)
    assert np.array_equal(answer[0], label[0]) and (answer[1:] == 1).any()


def test_a_second_look_moves_what_the_first_one_saw(echo):
    """Two prompts of which one lacks the class, pictures of other shapes than the prompts', and a part that is as the second look says."""
    echo.meta = {"coloring": "binary", "close_up": 0.3}
    label, empty = np.zeros((100, 50), int), np.zeros((30, 40), int)
    label[10:20, 5:10] = 3
    images = np.random.default_rng(0).random((2, 60, 90))
    gray = torch.zeros(2, 1, 60, 90)
    gray[1, 0, 30:36, 45:54] = 1  # the second image only
    before = gray.clone()
    infer.look_again(echo, [(label * 0.1, label), (empty * 0.1, empty)], images, gray, [3], "ar", 8)
    assert torch.equal(gray[0], before[0])
    rows, columns = data.window((0.55, 0.55), 0.25, (60, 90))
    outside = torch.ones(60, 90, dtype=torch.bool)
    outside[rows, columns] = False
    assert gray[1, 0][outside].abs().max() == 0 and before[1, 0][outside].abs().max() == 0
    near = data.resize_images(infer.look([(label == 3)[data.window((0.15, 0.15), 0.25, (100, 50))]], 64, data.resize_labels).float() / 2, (15, 22))[0, 0]
    old = before[1, 0, rows, columns]
    assert torch.allclose(gray[1, 0, rows, columns], old + infer.SECOND * (near - old), atol=1e-5)


def test_a_less_sure_second_look_lets_no_haze_through(echo, monkeypatch):
    """What the first look left below its threshold, outside the window, stays background however faint the class is from near."""
    echo.meta = {"coloring": "binary", "close_up": 0.3}
    label = np.zeros((64, 64), int)
    label[10:20, 10:20] = 5
    faint = iter((1.0, 0.4))
    def predict(cache, x):
        k = next(faint)
        return cache.expand_as(x) * k + (cache == 0) * 0.5 * (k == 1)
    monkeypatch.setattr(echo, "predict", predict)
    assert np.array_equal(infer.predict(echo, [(label * 0.1, label)], label * 0.1) > 0, label > 0)
    stray = torch.zeros(1, 1, 64, 64)
    stray[0, 0, 10:20, 10:20], stray[0, 0, 60, 60] = 1, 1  # one far pixel of a hundred does not widen the window
    monkeypatch.setattr(echo, "predict", lambda cache, x: cache.expand_as(x).clone())
    infer.look_again(echo, [(label * 0.1, label)], np.zeros((1, 64, 64)), stray, [5], "ar")
    assert stray[0, 0, 60, 60] == 0 and stray[0, 0, 12:18, 12:18].min() > 0.9


def test_predefined_colors_are_those_of_the_class_whatever_else_is_shown(tmp_path, echo, monkeypatch):
    """Classes 1 and 3 without 2 keep their own grays, from Python and from the command line."""
    echo.meta, seen = {"coloring": "predefined", "predefined": [{"acdc": 10}, 20]}, []
    monkeypatch.setattr(echo, "encode_prompts", lambda images, labels: seen.append(labels.unique().tolist()) or labels[:, 0])
    image, label = np.random.default_rng(0).random((64, 64)), np.zeros((64, 64), np.uint8)
    label[4:20, 4:20], label[30:50, 30:50] = 1, 3
    assert np.array_equal(infer.predict(echo, [(image, label)], image, dataset="acdc"), label)
    Image.fromarray((image * 255).astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(label).save(tmp_path / "a_label.png")
    command("any", "--prompt", tmp_path / "a.png", "--input", tmp_path / "a.png", "--dataset", "acdc")
    assert np.array_equal(np.array(Image.open(tmp_path / "a_mvg.png")), label)
    assert len(seen) == 2 and all(grays == pytest.approx([0, 11 / 20, 13 / 20]) for grays in seen)


def test_ct_to_mri_is_in_the_units_of_the_mri(tmp_path, echo):
    x = np.linspace(-1000, 1000, 20)[:, None, None] * np.ones((20, 24, 6))
    volume(tmp_path / "a.nii.gz", label=x.astype(np.float32)), volume(tmp_path / "a_target.nii.gz", label=(700 + x / 2.5).astype(np.float32))
    command("any", "--prompt", tmp_path / "a.nii.gz", "--input", tmp_path / "a.nii.gz")
    answer = np.asarray(nibabel.load(tmp_path / "a_mvg.nii.gz").dataobj)
    assert answer.min() < 330 and answer.max() > 1070


def test_the_command_line_ends_with_status_2(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "infer.py"), "--prompt", "nothing.nii", "--input", "b.nii"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0 and "nothing.nii" in done.stderr and not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path, echo, monkeypatch):
    volume(tmp_path / "a.nii.gz"), volume(tmp_path / "a_label.nii.gz", label=mask())
    monkeypatch.setattr(nibabel, "save", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        command("any", "--prompt", tmp_path / "a.nii.gz", "--input", tmp_path / "a.nii.gz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "a_label.nii.gz"]


# ---- real scans

def test_every_real_volume_comes_back_on_its_grid(real, tmp_path, echo):
    """One file of each form and dataset: SimpleITK and nibabel read the answer with the geometry of the input."""
    files, seen = [], set()
    for path in sorted(p for p in real.rglob("*") if readers.extension(p) in readers.NIFTI + readers.ITK):
        form = path.relative_to(real).parts[0], readers.extension(path)
        if form not in seen and "mask" not in path.name and "label" not in str(path).lower():
            seen.add(form)
            files.append(path)
    assert len(files) >= 6
    rng = np.random.default_rng(0)
    volume(tmp_path / "p.nii.gz", (40, 40, 9)), volume(tmp_path / "p_label.nii.gz", label=mask((40, 40, 9)))
    for path in files:
        try:
            shape = readers.read_volume(path).array.shape
        except readers.DataError:
            continue  # the zoo of bad files has its own test
        out = tmp_path / f"o{'.mha' if readers.extension(path) in ('.mhd', '.mha') else '.nrrd' if readers.extension(path) in readers.ITK else readers.extension(path)}"
        command("any", "--prompt", tmp_path / "p.nii.gz", "--input", path, "--output", out)
        a, b = sitk.ReadImage(str(out)), sitk.ReadImage(str(path))
        for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(a, get)() == pytest.approx(getattr(b, get)(), abs=1e-5), (path, get)
        if readers.extension(path) in readers.NIFTI:
            a, b = nibabel.load(out), nibabel.load(path)
            assert a.shape == b.shape and np.array_equal(a.affine, b.affine), path


def test_a_held_out_acdc_patient_lies_on_the_inputs_grid(real, tmp_path, checkpoint):
    base = real / "ACDC" / "database"
    source = base / "testing" / "patient037" / "patient037_frame01.nii.gz"
    command(checkpoint, "--prompt", base / "training" / "patient001" / "patient001_frame01.nii.gz", "--input", source, "--output", tmp_path / "o.nii.gz")
    answer, image = nibabel.load(tmp_path / "o.nii.gz"), nibabel.load(source)
    assert answer.shape == image.shape and np.array_equal(answer.affine, image.affine)
    assert set(np.unique(np.asarray(answer.dataobj))) <= {0, 1, 2, 3}
    a, b = sitk.ReadImage(str(tmp_path / "o.nii.gz")), sitk.ReadImage(str(source))
    assert a.GetSize() == b.GetSize() and a.GetOrigin() == b.GetOrigin() and a.GetDirection() == b.GetDirection()


def test_real_nrrd_and_pictures(real, tmp_path, echo):
    """An echo of a real prompt onto itself: LA (NRRD, 0/255) and the nerve ultrasound pictures."""
    folder = sorted((real / "LA2018" / "Training Set").iterdir())[0]
    command("any", "--prompt", folder / "lgemri.nrrd", "--input", folder / "lgemri.nrrd", "--output", tmp_path / "la.nrrd")
    a, b = (sitk.ReadImage(str(p)) for p in (tmp_path / "la.nrrd", folder / "laendo.nrrd"))
    x, y = (sitk.GetArrayFromImage(i) > 0 for i in (a, b))
    assert a.GetSpacing() == b.GetSpacing() and 2 * (x & y).sum() / (x.sum() + y.sum()) > 0.95
    picture = sorted((real / "Dataset801_NerveUltrasound" / "imagesTr").iterdir())[0]
    command("any", "--prompt", picture, "--input", picture, "--output", tmp_path / "us.png")
    truth = np.array(Image.open(infer.find_label(picture)))
    answer = np.array(Image.open(tmp_path / "us.png"))
    assert answer.shape == truth.shape and (answer == truth).mean() > 0.98
