"""The command with files: the right place, the right values, and one line for bad input."""

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
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

import infer
import mvg
from conftest import ROOT
from fakes import Echo, failure, fake, mask, volume, voxels, watch
from running import checkpoints
from scans import boxes
from scans.files import find_label
from scans.volumes import ITK, NIFTI, DataError, command_line, extension, read_volume


@pytest.fixture
def echo(monkeypatch):
    model = fake(Echo)
    monkeypatch.setattr(mvg, "load", lambda path, device="cpu": model)
    return model


@pytest.fixture
def wide_echo(monkeypatch):
    model = fake(Echo, 448)
    monkeypatch.setattr(mvg, "load", lambda path, device="cpu": model)
    return model


def command(checkpoint, *argv):
    infer.main([str(a) for a in (*argv, "--checkpoint", checkpoint)])


def answer(prompt, given, *argv, checkpoint="any"):
    """Run the command with one prompt and one input."""
    command(checkpoint, "--prompt", prompt, "--input", given, *argv)


def picture(path, array):
    Image.fromarray(array).save(path)
    return path


def values(path):
    """What a picture holds."""
    return np.array(Image.open(path))


# -------------------------------------------------------------------------------------------------
# An echo of the prompt's label must come back where it was


@pytest.mark.parametrize("codes", ("RAS", "LPS", "LAS", "PIR", "SLA"))
def test_the_answer_lies_on_the_inputs_grid(tmp_path, echo, codes):
    """The prompt stored as RAS, the input in another orientation and oblique: the echoed mask is in
    the same place."""
    label, base, tilt = mask(), np.diag([1.5, 1.5, 4, 1.0]), np.eye(4)
    tilt[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    volume(tmp_path / "a.nii.gz", affine=base)
    volume(tmp_path / "a_label.nii.gz", affine=base, label=label)
    noise = np.random.default_rng(1).normal(size=label.shape).astype(np.float32)
    plain = nibabel.Nifti1Image(noise, tilt @ base)
    move = ornt_transform(io_orientation(plain.affine), axcodes2ornt(codes))
    stored = plain.as_reoriented(move)
    stored.header["descrip"] = b"a scan"
    nibabel.save(stored, tmp_path / "b.nii.gz")
    answer(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    found = nibabel.load(tmp_path / "b_mvg.nii.gz")
    assert found.shape == stored.shape
    assert np.array_equal(found.affine, nibabel.load(tmp_path / "b.nii.gz").affine)
    assert found.header["descrip"] == stored.header["descrip"]
    assert found.get_data_dtype() == np.uint8
    expected = nibabel.Nifti1Image(label, tilt @ base).as_reoriented(move)
    assert np.array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
    for code in ("qform_code", "sform_code"):
        assert found.header[code] == stored.header[code]


AXES = itertools.permutations(("RL", "AP", "SI"))
ORDERS = ["".join(codes) for order in AXES for codes in itertools.product(*order)]


def blobs(shape, rng):
    """Three boxes of classes 1 to 3, each at least 20 voxels wide where the volume is."""
    label = np.zeros(shape, np.uint8)
    for c in (1, 2, 3):
        box = []
        for n in shape:
            first, length = int(rng.integers(0, max(1, n - 40))), int(rng.integers(20, 40))
            box.append(slice(first, first + max(1, min(n, length))))
        label[tuple(box)] = c
    return label


@pytest.mark.parametrize("shape", ((30, 41, 7), (21, 40, 1), (7, 513, 31)),
                         ids=lambda s: "x".join(map(str, s)))
def test_round_trips_of_all_storage_orders(tmp_path, wide_echo, shape):
    """The mask comes back voxel by voxel where a slice is no larger than the model's image.

    Else its objects are where they were, to half a pixel of the model (1.1 voxels here) and, being
    rounded to whole voxels, half a voxel.
    """
    pixel, apart, overlaps = max(1, max(shape[:2]) / 448), [], []
    rng = np.random.default_rng(0)
    tilt = np.linalg.qr(np.eye(3) + 0.15 * rng.normal(size=(3, 3)))[0]
    tilt *= np.sign(np.diag(tilt))
    assert len(set(ORDERS)) == 48 and "RAS" in ORDERS
    for n, codes in enumerate(ORDERS):
        label, affine = blobs(shape, rng), np.eye(4)
        spacing = np.diag([0.7, 0.8, 3.0])
        affine[:3, :3] = tilt @ spacing if n % 2 else spacing
        affine[:3, 3] = rng.normal(0, 50, 3)
        move = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
        noise = rng.normal(size=shape).astype(np.float32)
        for name, array in (("a", noise), ("a_label", label)):
            stored = nibabel.Nifti1Image(array, affine).as_reoriented(move)
            nibabel.save(stored, tmp_path / f"{name}.nii")
        answer(tmp_path / "a.nii", tmp_path / "a.nii")
        found, truth = voxels(tmp_path / "a_mvg.nii"), np.asarray(stored.dataobj)
        affines = [nibabel.load(tmp_path / f"{name}.nii").affine for name in ("a", "a_mvg")]
        assert np.array_equal(*affines) and found.shape == truth.shape, codes
        if max(shape[:2]) <= 448:
            assert np.array_equal(found, truth), codes
        for c in (1, 2, 3):
            a, b = np.argwhere(found == c), np.argwhere(truth == c)
            if len(b):
                apart.append(np.abs(a.mean(0) - b.mean(0)).max())
                common = ((found == c) & (truth == c)).sum()
                overlaps.append(2 * common / (len(a) + len(b)))
    print(f"{len(apart)} objects: centroids {np.mean(apart):.2f} voxels apart, at most "
          f"{max(apart):.2f}; Dice {np.mean(overlaps):.3f}, at least {min(overlaps):.3f}")
    assert max(apart) <= (pixel + 1) / 2 and np.mean(apart) < 0.25
    assert np.mean(overlaps) > 0.98 and min(overlaps) > 0.93


def test_the_slice_axis_can_be_chosen(tmp_path, echo, capsys):
    label = mask()
    volume(tmp_path / "a.nii")
    volume(tmp_path / "a_label.nii", label=label)
    for axis in ("sagittal", "coronal", "axial"):
        answer(tmp_path / "a.nii", tmp_path / "a.nii", "--axis", axis)
        assert f"{axis} slices; input" in capsys.readouterr().out
        assert np.array_equal(voxels(tmp_path / "a_mvg.nii"), label)


SHAPES = (((12, 1, 14), 1), ((1, 12, 14), 0), ((12, 14, 1), 2), ((12, 14), 2), ((12, 14, 3, 1), 2))


@pytest.mark.parametrize("shape,axis", SHAPES)
def test_single_slices_and_trailing_axes_come_back_in_their_shape(tmp_path, echo, shape, axis,
                                                                  capsys):
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(n // 3, n // 3 + 4) if n > 3 else slice(None) for n in shape)] = 1
    volume(tmp_path / "a.nii.gz", shape, np.eye(4))
    volume(tmp_path / "a_seg.nii.gz", label=label, affine=np.eye(4))
    answer(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz")
    assert ("sagittal", "coronal", "axial")[axis] in capsys.readouterr().out
    assert np.array_equal(voxels(tmp_path / "a_mvg.nii.gz"), label)


# -------------------------------------------------------------------------------------------------
# Kinds of files


def itk(array, direction=None):
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((10, -20, 5))
    if direction:
        image.SetDirection(direction)
    return image


def test_the_same_volume_in_three_kinds_of_file_gives_one_answer(tmp_path, checkpoint):
    rng, label = np.random.default_rng(0), mask()
    turned = (0, 1, 0, -1, 0, 0, 0, 0, 1)
    image = itk(rng.integers(0, 1000, label.shape, dtype=np.int16), turned)
    truth, answers = itk(label, turned), []
    for kind in (".nii.gz", ".nrrd", ".mhd"):
        scan = tmp_path / f"a{kind}"
        sitk.WriteImage(image, str(scan))
        sitk.WriteImage(truth, str(tmp_path / f"a_seg{kind}"))
        answer(scan, scan, "--prompt_label", tmp_path / f"a_seg{kind}", checkpoint=checkpoint)
        written = tmp_path / f"a_mvg{'.mha' if kind == '.mhd' else kind}"
        answers.append(sitk.ReadImage(str(written)))
    first, *others = [sitk.GetArrayFromImage(a) for a in answers]
    assert all(np.array_equal(a, first) for a in others)
    for a in answers:
        assert a.GetDirection() == pytest.approx(image.GetDirection(), abs=1e-6)


@pytest.mark.parametrize("kind", (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"))
def test_every_kind_of_volume(tmp_path, echo, kind):
    label = mask(values=(3, 200))
    noise = np.random.default_rng(0).normal(size=label.shape).astype(np.float32)
    for name, array in (("a", noise), ("a_seg", label)):
        sitk.WriteImage(itk(array), str(tmp_path / f"{name}{kind}"))
    answer(tmp_path / f"a{kind}", tmp_path / f"a{kind}")
    written = tmp_path / f"a_mvg{'.mha' if kind == '.mhd' else kind}"
    found, source = sitk.ReadImage(str(written)), sitk.ReadImage(str(tmp_path / f"a{kind}"))
    assert np.array_equal(sitk.GetArrayFromImage(found).T, label)
    for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(found, get)() == pytest.approx(getattr(source, get)(), abs=1e-5)


def write_dicom(folder, array, affine, uid="1", start=0):
    """A series of array (X, Y, Z) in HU, on an affine (LPS), as files in no order."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    for k in range(array.shape[2]):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array[:, :, k].T))
        image.SetSpacing(np.linalg.norm(affine[:3, :2], axis=0).tolist())
        place = affine[:3, 3] + k * affine[:3, 2]
        tags = {
            "0008|0060": "CT",
            "0020|000e": f"1.2.3.{uid}",
            "0020|000d": "1.2.3",
            "0008|0018": f"1.2.3.{uid}.{k + 1}",
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(f"{v:.6f}" for v in place),
            "0020|0037": "\\".join(f"{v:.8f}" for v in direction[:, :2].T.ravel()),
            "0028|1052": "-1024",
            "0028|1053": "1",
            "0018|0050": "3",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{(7 * k + start) % 101:03d}.dcm"))
        writer.Execute(image)


def oblique():
    """A right-handed affine (LPS), a little off the axes, 0.7 x 0.8 x 3 mm."""
    affine = np.diag([0.7, 0.8, 3.0, 1.0])
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(np.eye(3) + 0.1 * rng.normal(size=(3, 3)))[0]
    affine[:3, :3] = turn * np.sign(np.diag(turn)) @ affine[:3, :3]
    affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1]) / (0.7 * 0.8) * 3
    affine[:3, 3] = (-20, 30, 40)
    return affine


def test_a_dicom_folder_is_answered_as_nifti(tmp_path, echo, capsys):
    """Oblique, in HU, the files in no order: the answer lies where the prompt's label does; several
    series are listed."""
    label, affine = mask(), oblique()
    hu = np.random.default_rng(0).integers(-1000, 1000, label.shape, dtype=np.int16)
    write_dicom(tmp_path / "scan", hu, affine)
    ras = np.diag([-1, -1, 1, 1]) @ affine
    volume(tmp_path / "a.nii.gz", affine=ras, label=hu)
    volume(tmp_path / "a_label.nii.gz", affine=ras, label=label)
    answer(tmp_path / "a.nii.gz", tmp_path / "scan")
    found = nibabel.load(tmp_path / "scan_mvg.nii.gz")
    assert np.allclose(found.affine, ras, atol=1e-3)
    assert np.array_equal(np.asarray(found.dataobj), label)
    said = capsys.readouterr().out
    assert "prompt ct, 6 axial slices; input ct, 6 axial slices" in said  # in HU, so known as CT
    write_dicom(tmp_path / "scan", hu[:, :, :3], affine, "2", 50)
    argv = ["--prompt", tmp_path / "a.nii.gz", "--input", tmp_path / "scan", "--checkpoint", "any"]
    said = failure(capsys, infer.main, *argv)
    assert "has 2 series (1: 6 files" in said and "2: 3 files" in said
    assert "choose one with --series" in said
    infer.main([str(a) for a in argv] + ["--series", "1"])
    assert "has no series '3'" in failure(capsys, infer.main, *argv, "--series", 3)
    (tmp_path / "scan" / "014.dcm").unlink()  # a slice is missing
    assert "files are missing" in failure(capsys, infer.main, *argv, "--series", 1)


def test_pictures(tmp_path, echo):
    label = mask()[:, :, 3].T
    rng = np.random.default_rng(0)
    picture(tmp_path / "a.jpg", rng.integers(0, 255, (24, 20, 3), dtype=np.uint8))
    picture(tmp_path / "a_label.png", label * 100)
    picture(tmp_path / "b.png", rng.integers(0, 255, (48, 40), dtype=np.uint8))
    answer(tmp_path / "a.jpg", tmp_path / "b.png")
    found = values(tmp_path / "b_mvg.png")
    assert found.shape == (48, 40) and set(np.unique(found)) == {0, 100, 200}
    grown = np.kron(label * 100, np.ones((2, 2), np.uint8))
    assert (found == grown).mean() > 0.97


def test_large_labels_of_a_picture(tmp_path, echo):
    label = np.zeros((24, 20), np.uint16)
    label[14:20, 10:18] = 2035
    noise = np.random.default_rng(0).random((24, 20))
    picture(tmp_path / "a.png", (noise * 255).astype(np.uint8))
    picture(tmp_path / "a_label.png", label)
    answer(tmp_path / "a.png", tmp_path / "a.png")
    assert np.array_equal(values(tmp_path / "a_mvg.png"), label)


def test_a_jpeg_is_no_mask_and_a_palette_picture_is_one(tmp_path, echo, capsys):
    rng, label = np.random.default_rng(0), mask()[:, :, 3].T
    palette = Image.frombytes("P", label.shape[::-1], label.tobytes())
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [7] * 759)
    palette.save(tmp_path / "a_label.png")
    picture(tmp_path / "a.png", rng.integers(0, 255, label.shape, dtype=np.uint8))
    answer(tmp_path / "a.png", tmp_path / "a.png")
    assert np.array_equal(values(tmp_path / "a_mvg.png"), label)  # indices are the classes
    assert read_volume(tmp_path / "a_label.png").array.max() > 2  # as an image it is gray
    picture(tmp_path / "blurred.jpg", label * 100)
    said = failure(capsys, infer.main, "--prompt", tmp_path / "a.png", "--input",
                   tmp_path / "a.png", "--prompt_label", tmp_path / "blurred.jpg", "--task", "seg",
                   "--checkpoint", "any")
    assert "save the mask as PNG" in said


# -------------------------------------------------------------------------------------------------
# Images for images


def test_image_to_image_keeps_the_units_of_the_prompt_label(tmp_path, echo):
    volume(tmp_path / "a.nii.gz")
    x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in (20, 24, 6)), indexing="ij")
    # smooth: resampling must not matter
    target = (4000 + 1500 * np.sin(3 * x + z) * y).astype(np.float32)
    volume(tmp_path / "a_target.nii.gz", label=target)
    volume(tmp_path / "b.nii.gz", seed=5)
    answer(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", "--output", tmp_path / "out.nii.gz")
    found = voxels(tmp_path / "out.nii.gz")
    low, high = np.percentile(target, (0.5, 99.5))
    assert found.dtype == np.float32
    assert np.abs(found - target.clip(low, high)).mean() < 0.1 * target.std()


def test_ct_to_mri_is_in_the_units_of_the_mri(tmp_path, echo):
    x = np.linspace(-1000, 1000, 20)[:, None, None] * np.ones((20, 24, 6))
    volume(tmp_path / "a.nii.gz", label=x.astype(np.float32))
    volume(tmp_path / "a_target.nii.gz", label=(700 + x / 2.5).astype(np.float32))
    answer(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz")
    found = voxels(tmp_path / "a_mvg.nii.gz")
    assert found.min() < 330 and found.max() > 1070


KNOWN = [(5, 8, 20, 30), (40, 30, 59, 47)]


def boxed_files(folder, kind, known=KNOWN):
    """Two scans or pictures in the units of their kind, each beside itself with boxes on it.

    Returns the second one.
    """
    rng = np.random.default_rng(0)
    factor, lowest, top = {"ct": (1300, -1000, 300), "mri": (600, 0, 900), "png": (200, 0, 255),
                           "png16": (3000, 0, 65535)}[kind]
    for name in ("a", "b"):
        array = rng.random((64, 64)) * factor + lowest
        marked = np.where(boxes.draw(np.zeros((64, 64)), known) > 0, top, array)
        for end, numbers in (("", array), ("_label", marked)):
            if kind.startswith("png"):
                numbers = numbers.astype(np.uint8 if kind == "png" else np.uint16)
                picture(folder / f"{name}{end}.png", numbers)
            else:
                label = numbers.T[..., None].astype(np.int16)
                volume(folder / f"{name}{end}.nii.gz", label=label)
    return array


@pytest.mark.parametrize("kind", ("ct", "mri", "png", "png16"))
def test_boxes_of_files_come_back_in_the_units_of_the_input(echo, tmp_path, kind, capsys):
    """Drawn as bright as the prompt gets, or as its window does, whatever the range of the
    numbers."""
    echo.meta, kept = {"coloring": "binary", "boxes": "filled"}, boxed_files(tmp_path, kind)
    end = ".png" if kind.startswith("png") else ".nii.gz"
    answer(tmp_path / f"a{end}", tmp_path / f"b{end}", "--output", tmp_path / f"o{end}",
           "--task", "image", "--axis", "axial", checkpoint=tmp_path / "m.pt")
    assert "2 boxes are drawn on the prompts" in capsys.readouterr().out
    if end == ".png":
        found = values(tmp_path / "o.png")
    else:
        found = voxels(tmp_path / "o.nii.gz")[..., 0].T
    ranges = {"ct": (-100, 200), "png": (0, 255)}
    stored = kept.astype(np.int16 if kind == "mri" else np.uint16)
    low, high = ranges.get(kind) or np.percentile(stored, (0.5, 99.5))

    def unit(array):
        return ((array.clip(low, high) - low) / (high - low)).astype(np.float32)

    read = boxes.drawn(unit(found), unit(kept))
    assert np.abs(np.subtract(sorted(read), KNOWN)).max() <= 2
    wider = [(t - 1, l - 1, b + 1, r + 1) for t, l, b, r in KNOWN]
    far = boxes.draw(np.zeros((64, 64)), wider, 4) == 0
    assert np.abs(unit(found) - unit(kept))[far].max() < 0.02


def test_a_second_look_is_left_out_of_boxes_too(echo, tmp_path, monkeypatch):
    echo.meta = {"coloring": "binary", "boxes": "filled"}
    boxed_files(tmp_path, "png", KNOWN[:1])
    asked = watch(monkeypatch, echo)
    counts = []
    for looks in ((), ("--looks", "1"), ("--looks", "2")):
        asked.clear()
        answer(tmp_path / "a.png", tmp_path / "b.png", "--task", "image", *looks)
        counts.append(len(asked))
    assert counts == [2, 1, 2]


@pytest.mark.parametrize("several", (False, True))
def test_boxes_are_searched_for_once_on_every_slice_of_a_prompt(echo, tmp_path, several,
                                                                monkeypatch):
    """However many inputs there are."""
    echo.meta = {"coloring": "binary", "boxes": "filled"}
    boxed_files(tmp_path, "png")
    (tmp_path / "out").mkdir()
    count, drawn = [], boxes.drawn
    monkeypatch.setattr(boxes, "drawn", lambda *rest: count.append(1) or drawn(*rest))
    inputs = ["a.png", "b.png"] if several else ["b.png"]
    command("any", "--prompt", tmp_path / "a.png", "--task", "image", "--output", tmp_path / "out",
            "--input", *(tmp_path / name for name in inputs))
    assert len(count) == 1 and len(list((tmp_path / "out").iterdir())) == len(inputs)


# -------------------------------------------------------------------------------------------------
# Several prompts and inputs, and what else is written


def test_several_inputs_and_prompts(tmp_path, echo, capsys):
    """A folder of scans, answered into another; a bad one is named and the rest done; two prompts,
    each with its label."""
    scans, out, label = tmp_path / "in", tmp_path / "out", mask()
    scans.mkdir()
    out.mkdir()
    for name in "abc":
        volume(scans / f"{name}.nii.gz", seed=ord(name))
    volume(scans / "a_label.nii.gz", label=label)
    volume(tmp_path / "p.nii.gz", seed=9)
    volume(tmp_path / "p_seg.nii.gz", label=label)
    (scans / "bad.nii.gz").write_text("no scan")
    prompts = ["--prompt", scans / "a.nii.gz", tmp_path / "p.nii.gz", "--checkpoint", "any"]
    argv = [*prompts, "--input", scans, "--output", out]
    with pytest.raises(SystemExit) as stop:
        command_line(lambda: infer.main([str(a) for a in argv]))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "bad.nii.gz cannot be read" in said
    assert "1 of 4 inputs have no answer" in said
    assert sorted(p.name for p in out.iterdir()) == [f"{n}_mvg.nii.gz" for n in "abc"]
    assert np.array_equal(voxels(out / "c_mvg.nii.gz"), label)
    given = ["--prompt_label", tmp_path / "p_seg.nii.gz"]
    assert "2 prompts and 1 labels" in failure(capsys, infer.main, *argv, *given)
    argv[-1] = tmp_path / "nowhere"
    assert "is no folder" in failure(capsys, infer.main, *argv)


def test_inputs_of_one_name_have_answers_of_their_own(tmp_path, echo):
    volume(tmp_path / "p.nii.gz")
    volume(tmp_path / "p_seg.nii.gz", label=mask())
    for folder in ("s0", "s1", "out"):
        (tmp_path / folder).mkdir()
    scans = [volume(tmp_path / s / "ct.nii.gz", (20, 24, n)) for s, n in (("s0", 6), ("s1", 4))]
    command("any", "--prompt", tmp_path / "p.nii.gz", "--input", *scans, "--output",
            tmp_path / "out")
    for s, n in (("s0", 6), ("s1", 4)):
        assert voxels(tmp_path / "out" / f"{s}_ct_mvg.nii.gz").shape == (20, 24, n)


@pytest.mark.parametrize("k", (1, 4))
def test_a_single_slice_is_shown_the_fullest_slice_of_a_prompt(tmp_path, echo, capsys, k):
    """The paper's rule would show the first slice, which is empty here."""
    label = np.zeros((20, 24, 6), np.uint8)
    label[3:9, 4:12, 1:5] = 1
    label[12:14, 14:16, k] = 2  # of two classes one slice shows both
    volume(tmp_path / "p.nii.gz")
    volume(tmp_path / "p_seg.nii.gz", label=label)
    volume(tmp_path / "one.nii.gz", (20, 24, 1))
    answer(tmp_path / "p.nii.gz", tmp_path / "one.nii.gz")
    assert f"the slice of the prompt that shows the most ({k + 1})" in capsys.readouterr().out
    assert np.array_equal(voxels(tmp_path / "one_mvg.nii.gz")[:, :, 0], label[:, :, k])


def test_every_label_image_is_scaled_by_itself(tmp_path, echo, monkeypatch):
    """The second scanner counts in units four times as large: the model is shown the same."""
    asked = watch(monkeypatch, echo)
    volume(tmp_path / "p.nii.gz")
    target = np.random.default_rng(3).normal(50, 9, (20, 24, 6)).astype(np.float32)
    volume(tmp_path / "y.nii.gz", label=target)
    volume(tmp_path / "z.nii.gz", label=4 * target)
    command("any", "--prompt", *[tmp_path / "p.nii.gz"] * 2, "--prompt_label",
            tmp_path / "y.nii.gz", tmp_path / "z.nii.gz", "--input", tmp_path / "p.nii.gz")
    labels = torch.cat([y[0, :, 0] for _, y in asked])
    labels = labels.unflatten(0, (6, 2, -1))  # of every slice the windows of both prompts
    assert labels.max() > 0.9 and torch.allclose(labels[:, 0], labels[:, 1], atol=1e-5)
    assert abs(voxels(tmp_path / "p_mvg.nii.gz").mean() - 50) < 1  # in the units of the first


def test_masks_in_color(tmp_path, echo, capsys):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png", rng.integers(0, 255, (64, 64), dtype=np.uint8))
    numbers = np.zeros((64, 64), np.uint8)
    numbers[8:24, 8:40], numbers[32:48, 8:56] = 2, 1
    colors = np.array([(0, 0, 0), (0, 130, 0), (255, 0, 0)], np.uint8)
    picture(tmp_path / "a_label.png", colors[numbers])
    answer(tmp_path / "a.png", tmp_path / "b.png")
    assert "1 = #008200, 2 = #ff0000" in capsys.readouterr().out
    assert np.array_equal(values(tmp_path / "b_mvg.png"), numbers)


def test_a_name_that_a_terminal_cannot_print(tmp_path):
    label = mask()
    volume(tmp_path / "p.nii.gz")
    volume(tmp_path / "p_seg.nii.gz", label=label)
    odd = os.fsencode(tmp_path) + b"/\xff\xe9.nii.gz"
    os.rename(volume(tmp_path / "b.nii.gz"), odd)
    argv = [sys.executable, str(ROOT / "infer.py"), "--prompt", str(tmp_path / "p.nii.gz"),
            "--input", odd, "--looks", "1"]
    done = subprocess.run(argv, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert done.returncode == 0, done.stderr
    assert os.path.exists(odd.replace(b".nii", b"_mvg.nii"))


def test_prompts_with_labels_of_several_types(tmp_path, echo):
    """The first label has 8 bits, the second one does not fit into them."""
    label = mask().astype(np.int32)
    label[:, :, 5] = 0
    for name, values_ in (("p", (1, 2)), ("q", (1, 300))):
        volume(tmp_path / f"{name}.nii.gz", seed=ord(name))
        volume(tmp_path / f"{name}_seg.nii.gz", label=np.where(label == 2, values_[1], label))
    for order in ("pq", "qp"):
        command("any", "--prompt", *(tmp_path / f"{n}.nii.gz" for n in order), "--input",
                tmp_path / "p.nii.gz", "--output", tmp_path / "o.nii.gz")
        found = nibabel.load(tmp_path / "o.nii.gz")
        assert found.get_data_dtype() == np.int32
        found = np.asarray(found.dataobj)
        assert np.array_equal(found == 1, label == 1) and set(np.unique(found)) <= {0, 1, 2, 300}


def test_prompts_with_pictures_of_several_types(tmp_path, echo):
    """Labels of 8 and of 16 bits: the answer has 16."""
    noise, label = np.random.default_rng(0).integers(0, 255, (24, 20), np.uint8), mask()[:, :, 3].T
    for name, found in (("p", label * np.uint8(100)), ("q", label.astype(np.uint16) * 2000)):
        picture(tmp_path / f"{name}.png", noise)
        picture(tmp_path / f"{name}_seg.png", found)
    for order in ("pq", "qp"):
        command("any", "--prompt", *(tmp_path / f"{n}.png" for n in order), "--input",
                tmp_path / "p.png", "--output", tmp_path / "o.png")
        found = values(tmp_path / "o.png")
        assert found.dtype == np.uint16 and set(np.unique(found)) <= {0, 100, 200, 2000, 4000}
        assert ((found > 0) == (label > 0)).mean() > 0.9


def test_segmentations_and_images_are_not_mixed(tmp_path, echo, capsys):
    volume(tmp_path / "p.nii.gz")
    volume(tmp_path / "p_seg.nii.gz", label=mask())
    volume(tmp_path / "q.nii.gz")
    volume(tmp_path / "q_target.nii.gz", seed=3)
    said = failure(capsys, infer.main, "--prompt", tmp_path / "p.nii.gz", tmp_path / "q.nii.gz",
                   "--input", tmp_path / "p.nii.gz", "--checkpoint", "any")
    assert "some prompts are segmentations and some images" in said


def test_confidence_overlay_and_report(tmp_path, checkpoint):
    volume(tmp_path / "a.nii.gz")
    volume(tmp_path / "a_label.nii.gz", label=mask())
    volume(tmp_path / "b.nii.gz", (20, 24, 4), seed=1)
    answer(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", "--confidence", "--overlay", "--report",
           "--votes", "3", checkpoint=checkpoint)
    sure, found = (nibabel.load(tmp_path / f"b_mvg{n}.nii.gz") for n in ("_confidence", ""))
    assert sure.get_data_dtype() == np.float32 and np.array_equal(sure.affine, found.affine)
    assert sure.shape == found.shape
    sure, found = np.asarray(sure.dataobj), np.asarray(found.dataobj)
    assert 1 / 3 - 1e-5 <= sure.min() and sure.max() <= 1 + 1e-5
    said = json.loads((tmp_path / "b_mvg.json").read_text())
    assert said["prompt_slices"] == [[0], [1], [3], [4]] and said["options"]["votes"] == 3
    assert said["axis"] == "axial" and said["seconds"] > 0
    assert {int(c): v["voxels"] for c, v in said["classes"].items()} == {
        c: int((found == c).sum()) for c in np.unique(found) if c}
    for size in said["classes"].values():
        assert size["ml"] == pytest.approx(size["voxels"] * 3 / 1000, abs=1e-3)
    assert Image.open(tmp_path / "b_mvg_overlay.png").size[0] > 300


def test_the_confidence_of_a_picture_is_a_picture(tmp_path, echo):
    """255 is certain; the report has pixels, no milliliters."""
    label = mask()[:, :, 3].T
    picture(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, label.shape, np.uint8))
    picture(tmp_path / "a_label.png", label)
    answer(tmp_path / "a.png", tmp_path / "a.png", "--confidence", "--report")
    sure = values(tmp_path / "a_mvg_confidence.png")
    assert sure.dtype == np.uint8 and sure.shape == label.shape and sure[label == 2].max() > 250
    classes = json.loads((tmp_path / "a_mvg.json").read_text())["classes"]
    assert classes == {str(c): {"voxels": int((label == c).sum())} for c in (1, 2)}


def test_warnings_for_classes_that_the_matching_slices_lack(tmp_path, echo, capsys):
    label = mask()
    label[:, :, 5] = 9
    volume(tmp_path / "a.nii.gz")
    volume(tmp_path / "a_label.nii.gz", label=label)
    volume(tmp_path / "b.nii.gz", (20, 24, 2))
    answer(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    said = capsys.readouterr().out
    assert "classes shown: 1, 2" in said and "lack 9" in said


def test_what_is_assumed_is_said(tmp_path, echo, capsys):
    """Another modality, another axis, colors that mean something else, the window of CT."""
    volume(tmp_path / "a.nii.gz")
    volume(tmp_path / "a_label.nii.gz", label=mask())
    hu = np.random.default_rng(0).integers(-1000, 1000, (20, 6, 24)).astype(np.int16)
    volume(tmp_path / "ct.nii.gz", affine=np.diag([1, 3, 1, 1.0]), label=hu)
    echo.meta = {"coloring": "predefined", "predefined": [{"acdc": 0}, 3]}
    answer(tmp_path / "a.nii.gz", tmp_path / "ct.nii.gz")
    said = capsys.readouterr().out
    assert "warning: the prompt looks like mri and the input like ct" in said
    assert "warning: the prompt has axial slices and the input coronal ones" in said
    assert "warning: the model was trained on predefined colors" in said and "mode ar" in said
    volume(tmp_path / "ct_target.nii.gz", affine=np.diag([1, 3, 1, 1.0]), label=hu)
    answer(tmp_path / "ct.nii.gz", tmp_path / "ct.nii.gz", "--modality", "mri")
    assert "CT is seen through" not in capsys.readouterr().out
    answer(tmp_path / "ct.nii.gz", tmp_path / "ct.nii.gz")
    said = capsys.readouterr().out
    assert "note: CT is seen through the window [-100, 200] HU" in said and "mode canvas" in said


def test_options_are_passed_on(tmp_path, echo, monkeypatch):
    asked = []

    def predict_stack(model, prompts, stack, segmentation, options, slices):
        asked.append(options)
        yield list(range(len(stack))), np.zeros(stack.shape, np.uint8), np.ones(stack.shape)

    monkeypatch.setattr(infer, "predict_stack", predict_stack)
    volume(tmp_path / "a.nii.gz")
    volume(tmp_path / "a_label.nii.gz", label=mask())
    for flags, expected in (([], ("auto", 1, None, None)),
                            ("--mode canvas --votes 3 --each --looks 2".split(),
                             ("canvas", 3, True, 2)),
                            (["--no-each", "--looks", "1"], ("auto", 1, False, 1))):
        answer(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz", *flags)
        options = asked.pop()
        assert (options.mode, options.votes, options.each, options.looks) == expected


# -------------------------------------------------------------------------------------------------
# Bad input


def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path, checkpoint, capsys):
    good = volume(tmp_path / "a.nii.gz")
    volume(tmp_path / "a_label.nii.gz", label=mask())
    volume(tmp_path / "lonely.nii.gz")
    volume(tmp_path / "small.nii.gz", label=mask((20, 24, 5)))
    volume(tmp_path / "four.nii.gz", (8, 8, 4, 3))
    volume(tmp_path / "empty.nii.gz", label=np.zeros((20, 24, 6), np.uint8))
    nan = np.zeros((20, 24, 6), np.float32)
    nan[3, 3, 3] = np.nan
    volume(tmp_path / "nan.nii.gz", label=nan)
    volume(tmp_path / "float.nii.gz", label=mask() * np.float32(0.3))
    volume(tmp_path / "negative.nii.gz", label=mask().astype(np.int16) - 1)
    whole = good.read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.nii.gz").write_text("hello")
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "bad.nrrd").write_text("NRRD0004\ntype: short\n")
    (tmp_path / "no.pt").write_bytes(b"no checkpoint")
    volume(tmp_path / "rgb.nii.gz", label=np.zeros((4, 4, 4), [(c, "u1") for c in "RGB"]))
    (tmp_path / "emptied").mkdir()
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "1.dcm").write_bytes(b"no DICOM")
    before = sorted(p.name for p in tmp_path.iterdir())
    for changed, words in (
        ({"--input": "missing.nii.gz"}, "missing.nii.gz: no such file"),
        ({"--prompt": "lonely.nii.gz"}, "pass --prompt_label"),
        ({"--prompt_label": "small.nii.gz"}, "20x24x5 but its image is 20x24x6"),
        ({"--input": "four.nii.gz"}, "8x8x4x3"),
        ({"--input": "cut.nii.gz"}, "cut.nii.gz cannot be read"),
        ({"--input": "text.nii.gz"}, "text.nii.gz cannot be read"),
        ({"--input": "note.txt"}, "unknown kind"),
        ({"--input": "bad.png"}, "bad.png cannot be read"),
        ({"--input": "bad.nrrd"}, "bad.nrrd cannot be read"),
        ({"--input": "nan.nii.gz"}, "1 voxels that are NaN"),
        ({"--input": "rgb.nii.gz"}, "RGB"),
        ({"--prompt_label": "float.nii.gz", "--task": "seg"}, "0.3, which is no class"),
        ({"--prompt_label": "negative.nii.gz", "--task": "seg"}, "label -1"),
        ({"--prompt_label": "empty.nii.gz"}, "is empty"),
        ({"--checkpoint": "no.pt"}, "no.pt is not a checkpoint"),
        ({"--checkpoint": "none.pt"}, "none.pt: no such checkpoint"),
        ({"--output": "out.png"}, "cannot hold the answer"),
        ({"--output": "nowhere/out.nii.gz"}, "there is no folder"),
        ({"--output": "a.nii.gz"}, "is one of the inputs"),
        ({"--output": "a_label.nii.gz"}, "is one of the inputs"),
        ({"--output": "note.txt"}, "cannot hold the answer"),
        ({"--prompt_label": "a.nii.gz", "--task": "seg"}, "which is no class"),
        ({"--confidence": None, "--task": "image"}, "is of segmentations"),
        ({"--input": "emptied"}, "holds no image"),
        ({"--input": "series"}, "DICOM"),
        ({"--prompt_label": "negative.nii.gz"}, "label -1"),
        ({"--device": "cuda:7"}, "cuda:7"),
        ({"--votes": "0"}, "at least 1"),
    ):
        argv = {"--prompt": "a.nii.gz", "--input": "a.nii.gz", "--checkpoint": checkpoint}
        words_of_no_file = ("--task", "--device", "--votes")
        for flag, value in {**argv, **changed}.items():
            plain = value is None or flag in words_of_no_file
            argv[flag] = value if plain else tmp_path / value
        given = [x for pair in argv.items() for x in pair if x is not None]
        assert words in failure(capsys, infer.main, *given), changed
        assert sorted(p.name for p in tmp_path.iterdir()) == before, changed


def test_the_command_line_ends_with_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "infer.py"), "--prompt", "nothing.nii"]
    command += ["--input", "b.nii"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0
    assert "nothing.nii" in done.stderr and not list(tmp_path.iterdir())


def test_without_a_checkpoint_the_bundled_one_answers(tmp_path, monkeypatch):
    loaded, model = [], fake(Echo)
    monkeypatch.setattr(mvg, "load", lambda path, device="cpu": loaded.append(path) or model)
    volume(tmp_path / "a.nii.gz")
    volume(tmp_path / "a_label.nii.gz", label=mask())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "new").mkdir(parents=True)
    (tmp_path / "runs" / "new" / "last.pt").touch()
    infer.main(["--prompt", "a.nii.gz", "--input", "a.nii.gz"])
    assert [str(path) for path in loaded] == [str(ROOT / "checkpoints" / "demo.pt")]


def test_the_bundled_checkpoint_comes_first_whatever_lies_beside_it(tmp_path, monkeypatch):
    """Else that of the newest run, here or beside the code; else an error says what to do."""
    code, here = tmp_path / "code", tmp_path / "here"
    monkeypatch.setattr(checkpoints, "__file__", str(code / "running" / "checkpoints.py"))
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match="pass --checkpoint"):
        checkpoints.find_checkpoint()
    old, new = code / "runs" / "z" / "last.pt", here / "runs" / "a" / "last.pt"
    for n, path in enumerate((code / "checkpoints" / "a.pt", old, new)):
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (n, n))
    assert checkpoints.find_checkpoint() == new
    os.utime(old, (9, 9))
    assert checkpoints.find_checkpoint() == old
    (code / "checkpoints" / "demo.pt").touch()
    os.utime(code / "checkpoints" / "demo.pt", (0, 0))
    assert checkpoints.find_checkpoint() == code / "checkpoints" / "demo.pt"


def test_a_failed_write_leaves_nothing(tmp_path, echo, monkeypatch):
    volume(tmp_path / "a.nii.gz")
    volume(tmp_path / "a_label.nii.gz", label=mask())

    def fail(*rest):
        raise OSError("disk full")

    monkeypatch.setattr(nibabel, "save", fail)
    with pytest.raises(OSError):
        answer(tmp_path / "a.nii.gz", tmp_path / "a.nii.gz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "a_label.nii.gz"]


def test_ctrl_c_leaves_no_half_written_file(tmp_path, checkpoint):
    volume(tmp_path / "a.nii.gz", (64, 64, 400))
    volume(tmp_path / "a_label.nii.gz", label=blobs((64, 64, 400), np.random.default_rng(0)))
    before = sorted(p.name for p in tmp_path.iterdir())
    command = [sys.executable, ROOT / "infer.py", "--prompt", tmp_path / "a.nii.gz", "--input",
               tmp_path / "a.nii.gz", "--checkpoint", checkpoint, "--votes", "500", "--report"]
    run = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # a shell starts background jobs with it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while "classes shown" not in run.stdout.readline():
        assert run.poll() is None
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130 and sorted(p.name for p in tmp_path.iterdir()) == before


LARGE = """
import resource, sys
import torch
sys.path.insert(0, "tests")
import infer, mvg
from fakes import Echo
torch.set_num_threads(1)
model = Echo(mvg.build("demo", 64).config).eval()
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
        volume(tmp_path / f"{name}.nii", affine=np.diag([0.8, 0.8, 1, 1]), label=array)
    del scan
    command = [sys.executable, "-c", LARGE, "--prompt", tmp_path / "a.nii", "--input",
               tmp_path / "a.nii", "--output", tmp_path / "o.nii", "--checkpoint", "any",
               "--report"]
    said = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout
    print(said.splitlines()[-1])
    assert float(said.split("GiB")[1]) < 4
    found = voxels(tmp_path / "o.nii")
    common = ((found == label) & (label > 0)).sum()
    assert 2 * common / ((found > 0).sum() + (label > 0).sum()) > 0.95


# -------------------------------------------------------------------------------------------------
# Real scans


def one_of_each_form(real):
    """A volume of each dataset and kind of file that is no label."""
    files = {}
    for path in sorted(p for p in real.rglob("*") if extension(p) in NIFTI + ITK):
        form = path.relative_to(real).parts[0], extension(path)
        if "mask" not in path.name and "label" not in str(path).lower():
            files.setdefault(form, path)
    return list(files.values())


def test_every_real_volume_comes_back_on_its_grid(real, tmp_path, echo):
    """SimpleITK and nibabel read the answer with the geometry of the input."""
    files = one_of_each_form(real)
    assert len(files) >= 6
    volume(tmp_path / "p.nii.gz", (40, 40, 9))
    volume(tmp_path / "p_label.nii.gz", label=mask((40, 40, 9)))
    for path in files:
        try:
            read_volume(path)
        except DataError:
            continue  # the zoo of bad files has its own test
        ending = extension(path)
        if ending in ITK:
            ending = ".mha" if ending in (".mhd", ".mha") else ".nrrd"
        out = tmp_path / f"o{ending}"
        answer(tmp_path / "p.nii.gz", path, "--output", out)
        a, b = sitk.ReadImage(str(out)), sitk.ReadImage(str(path))
        for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(a, get)() == pytest.approx(getattr(b, get)(), abs=1e-5), (path, get)
        if extension(path) in NIFTI:
            a, b = nibabel.load(out), nibabel.load(path)
            assert a.shape == b.shape and np.array_equal(a.affine, b.affine), path


def test_a_held_out_acdc_patient_lies_on_the_inputs_grid(real, tmp_path, checkpoint):
    base = real / "ACDC" / "database"
    source = base / "testing" / "patient037" / "patient037_frame01.nii.gz"
    prompt = base / "training" / "patient001" / "patient001_frame01.nii.gz"
    answer(prompt, source, "--output", tmp_path / "o.nii.gz", checkpoint=checkpoint)
    found, image = nibabel.load(tmp_path / "o.nii.gz"), nibabel.load(source)
    assert found.shape == image.shape and np.array_equal(found.affine, image.affine)
    assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1, 2, 3}
    a, b = sitk.ReadImage(str(tmp_path / "o.nii.gz")), sitk.ReadImage(str(source))
    assert a.GetSize() == b.GetSize() and a.GetOrigin() == b.GetOrigin()
    assert a.GetDirection() == b.GetDirection()


def test_real_nrrd_and_pictures(real, tmp_path, echo):
    """An echo of a real prompt onto itself: LA (NRRD, 0/255) and the nerve ultrasound pictures."""
    folder = sorted((real / "LA2018" / "Training Set").iterdir())[0]
    scan = folder / "lgemri.nrrd"
    answer(scan, scan, "--output", tmp_path / "la.nrrd")
    a, b = (sitk.ReadImage(str(p)) for p in (tmp_path / "la.nrrd", folder / "laendo.nrrd"))
    x, y = (sitk.GetArrayFromImage(i) > 0 for i in (a, b))
    assert a.GetSpacing() == b.GetSpacing()
    assert 2 * (x & y).sum() / (x.sum() + y.sum()) > 0.95
    scan = sorted((real / "Dataset801_NerveUltrasound" / "imagesTr").iterdir())[0]
    answer(scan, scan, "--output", tmp_path / "us.png")
    truth, found = values(find_label(scan)), values(tmp_path / "us.png")
    assert found.shape == truth.shape and (found == truth).mean() > 0.98
