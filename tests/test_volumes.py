"""One file <-> a `Volume`: what is read, how it is cut into slices, what is written back."""

import gzip
import itertools
import json
import os
import struct

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from scans import volumes
from scans.volumes import (LPS_TO_RAS, DataError, Volume, read_volume, resize_images, slicing)

# --------------------------------------------------------------------------------------------------
# Files made here


def write_nifti(path, array, affine=None, dtype=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.eye(4) if affine is None else affine
    nibabel.Nifti1Image(array.astype(dtype or array.dtype), affine).to_filename(path)
    return path


def write_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def marker():
    """(x, y, z) LPS array with a block at the patient's left, front, feet, and the affine.

    The voxels are 1 x 1 x 5 mm.
    """
    array = np.zeros((9, 11, 5), np.int16)
    array[6:8, 1:3, 0:2] = 700
    array[1, 9, 4] = 300
    return array, np.diag([-1.0, -1.0, 5.0, 1.0])


def reoriented(codes):
    array, affine = marker()
    move = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    return nibabel.Nifti1Image(array, affine).as_reoriented(move)


def plain(array, kind="nifti", **more):
    return Volume(array, np.eye(4), "x", kind, **more)


# --------------------------------------------------------------------------------------------------
# Slices, always the same way up

CODES = ("RAS", "LPS", "LAS", "RPI", "PSR", "SAL")


def test_every_orientation_gives_the_same_slices(tmp_path):
    array, affine = marker()
    # rows front to back, columns right to left, slices feet to head
    expected = array.transpose(2, 1, 0)
    assert expected[0, 1, 6] == 700 and expected[4, 9, 1] == 300
    files = []
    for codes in CODES:
        reoriented(codes).to_filename(tmp_path / f"{codes}.nii.gz")
        stored = read_volume(tmp_path / f"{codes}.nii.gz")
        image = sitk.GetImageFromArray(np.ascontiguousarray(stored.array.T))
        lps = LPS_TO_RAS @ stored.affine
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetOrigin(lps[:3, 3].tolist())
        image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        sitk.WriteImage(image, str(tmp_path / f"{codes}.mha"))
        sitk.WriteImage(image, str(tmp_path / f"{codes}.nrrd"))
        files += [tmp_path / f"{codes}{e}" for e in (".nii.gz", ".mha", ".nrrd")]
    for file in files:
        volume = read_volume(file)
        cut = slicing(volume)
        assert cut.axis == 2 and np.array_equal(cut.cut(volume.array), expected), file.name
        assert np.array_equal(cut.restore(cut.cut(volume.array)), volume.array), file.name
    picture = read_volume(write_png(tmp_path / "slice.png", expected[0].astype(np.uint16)))
    cut = slicing(picture)
    assert np.array_equal(cut.cut(picture.array)[0], expected[0])
    assert np.array_equal(cut.restore(cut.cut(picture.array)), picture.array)


def marked_volume():
    """(X, Y, Z) in LPS with spacing (1, 2, 3) and one bright voxel at left-anterior-superior."""
    array = np.zeros((5, 6, 7), np.float32)
    array[4, 0, 6] = 1
    return array


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_storage_order_gives_the_same_slices(order, tmp_path):
    lps = marked_volume()
    affine = LPS_TO_RAS @ np.diag([1.0, 2.0, 3.0, 1.0])
    for flips in itertools.product((1, -1), repeat=3):
        ornt = np.array([[o, f] for o, f in zip(order, flips)], float)
        stored = nibabel.Nifti1Image(lps, affine).as_reoriented(ornt)
        nibabel.save(stored, tmp_path / "v.nii")
        volume = read_volume(tmp_path / "v.nii")
        cut = slicing(volume)
        stack = cut.cut(volume.array)
        assert cut.axis == 2 and stack.shape == (7, 6, 5)
        assert stack[6, 0, 4] == 1  # superior, anterior, left (right of the picture)
        assert cut.spacing == pytest.approx((3, 2, 1))
        assert np.array_equal(cut.restore(stack), volume.array)


@pytest.mark.parametrize(
    "spacing,axis",
    (
        ((1, 1, 1), 2),
        ((1, 1, 5), 2),
        ((4, 1, 1), 0),
        ((1, 3, 1), 1),
        ((1.9, 1, 1), 2),
        ((3, 1, 2), 2),
        ((1, 1, 0.3), 2),
    ),
)
def test_slice_axis_is_the_coarsest_if_twice_as_coarse(spacing, axis):
    affine = LPS_TO_RAS @ np.diag([*map(float, spacing), 1])
    volume = Volume(np.zeros((3, 4, 5)), affine, "x", "nifti")
    cut = slicing(volume)
    assert cut.axis == axis and len(cut.cut(volume.array)) == (3, 4, 5)[axis]
    assert cut.spacing[0] == spacing[axis]
    if axis != 2:
        volume.array[:, :, 4] = 1  # superior is at the top
        assert (cut.cut(volume.array)[:, 0] == 1).all()
    assert np.array_equal(cut.restore(cut.cut(volume.array)), volume.array)


# --------------------------------------------------------------------------------------------------
# Intensities and sizes


def test_intensity_ranges():
    def unit(volume, modality):
        return volumes.to_unit(volume.array, volumes.intensity_range(volume, modality))

    ct = plain(np.array([-1000.0, -100, 50, 200, 3000]).reshape(5, 1, 1))
    assert unit(ct, "ct").ravel().tolist() == [0, 0, 0.5, 1, 1]
    assert volumes.guess_modality(ct) == "ct"
    mr = plain(np.arange(10_001.0).reshape(-1, 1, 1))
    assert volumes.intensity_range(mr, "mri") == (50, 9950)
    picture = plain(np.array([0, 51], np.uint8).reshape(2, 1, 1), "picture", eight_bit=True)
    assert unit(picture, "ultrasound").ravel().tolist() == pytest.approx([0, 0.2])
    flat = plain(np.full((4, 4, 4), 7.0))
    assert np.isfinite(unit(flat, "mri")).all()


def test_a_scaled_stack_is_the_scaled_array():
    stack = np.random.default_rng(0).integers(-1000, 1000, (3, 5, 4)).astype(np.int16)
    scaled = volumes.Scaled(stack, (-100.0, 200.0))
    assert len(scaled) == 3 and scaled.shape == (3, 5, 4)
    assert np.array_equal(np.stack(list(scaled)), volumes.to_unit(stack, (-100.0, 200.0)))


def test_labels_keep_their_classes_when_they_are_resized():
    labels = torch.tensor([[[0, 7], [200, 3]]], dtype=torch.uint8)
    grown = volumes.resize_labels(labels, (4, 6))
    assert grown.dtype == torch.uint8
    assert np.array_equal(grown[0].numpy(), np.kron(labels[0].numpy(), np.ones((2, 3), int)))
    assert volumes.resize_labels(grown, (4, 6)) is grown
    images = torch.full((2, 3, 9, 9), 0.25)
    assert torch.allclose(volumes.resize_images(images, (4, 5)), torch.full((2, 3, 4, 5), 0.25))


# --------------------------------------------------------------------------------------------------
# Headers and names as other programs write them


@pytest.mark.parametrize("name,zipped", (
    ("a.nii", False), ("A.NII", False), ("a.nii", True), ("a.nii.gz", False), ("C.Nii.gz", True)))
@pytest.mark.parametrize("kind", (nibabel.Nifti1Image, nibabel.Nifti2Image))
def test_the_content_of_a_nifti_decides_not_its_name(tmp_path, kind, name, zipped):
    array, affine = marker()
    content = kind(array, affine).to_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if zipped else content)
    volume = read_volume(tmp_path / name)
    assert np.array_equal(volume.array, array) and np.array_equal(volume.affine, affine)


@pytest.mark.parametrize("name", ("a.MHA", "a.Nrrd"))
def test_upper_case_endings(tmp_path, name):
    sitk.WriteImage(sitk.GetImageFromArray(marker()[0].T), str(tmp_path / name.lower()))
    (tmp_path / name.lower()).rename(tmp_path / name)
    assert np.array_equal(read_volume(tmp_path / name).array, marker()[0])


@pytest.mark.parametrize("half", (".hdr", ".img"))
def test_a_pair_is_refused_by_its_name(tmp_path, half):
    nibabel.save(nibabel.Nifti1Pair(*marker()), tmp_path / "a.img")
    with pytest.raises(DataError, match="is a half of a pair .hdr and .img"):
        read_volume(tmp_path / f"a{half}")


def with_header(path, sform=2, qform=1, **fields):
    array, affine = marker()
    image = nibabel.Nifti1Image(array, affine)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    for name, value in fields.items():
        image.header[name] = value
    image.to_filename(path)
    return path


@pytest.mark.parametrize("value", (0.0, float("nan")))
def test_a_header_whose_sform_is_useless_is_placed_by_its_qform(tmp_path, value):
    file = with_header(tmp_path / "a.nii")
    raw = bytearray(file.read_bytes())
    struct.pack_into("<12f", raw, 280, *[value] * 12)
    file.write_bytes(raw)
    volume = read_volume(file)
    assert np.allclose(volume.affine, marker()[1]) and "qform is used" in volume.note
    volumes.write_like(tmp_path / "b.nii", volume.array, volume)
    assert np.allclose(nibabel.load(tmp_path / "b.nii").affine, marker()[1])
    struct.pack_into("<h", raw, 252, 0)  # no qform either
    file.write_bytes(raw)
    with pytest.raises(DataError, match="affine that cannot be inverted"):
        read_volume(file)


def test_a_header_without_orientation_is_said(tmp_path):
    assert "has no orientation" in read_volume(with_header(tmp_path / "a.nii", 0, 0)).note
    assert read_volume(with_header(tmp_path / "b.nii", 0, 1)).note == ""


@pytest.mark.parametrize("unit,factor,said", ((1, 1000, "metres"), (2, 1, ""),
                                              (3, 0.001, "micrometres"), (0, 1, "")))
def test_units_of_a_header_become_millimetres(tmp_path, unit, factor, said):
    volume = read_volume(with_header(tmp_path / "a.nii", xyzt_units=unit))
    assert np.allclose(volume.affine[:3], factor * marker()[1][:3]) and said in volume.note
    assert slicing(volume).spacing == pytest.approx((5 * factor, factor, factor))
    volumes.write_like(tmp_path / "b.nii", volume.array, volume)  # in the units of the file
    assert np.array_equal(nibabel.load(tmp_path / "b.nii").affine, marker()[1])
    assert np.array_equal(read_volume(tmp_path / "b.nii").affine, volume.affine)


# --------------------------------------------------------------------------------------------------
# Pictures as cameras and drawing programs write them


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", (".png", ".jpg", ".tif"))
def test_a_picture_is_read_as_viewers_show_it(tmp_path, ending, orientation):
    upright = np.zeros((24, 32), np.uint8)
    upright[2:12, 4:20], upright[20:, 28:] = 200, 100
    turned = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.T, 6: np.rot90(upright), 7: np.rot90(upright, 2).T,
              8: np.rot90(upright, 3)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"quality": 100} if ending == ".jpg" else {}
    Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / f"a{ending}", exif=exif, **how)
    volume = read_volume(tmp_path / f"a{ending}")
    assert volume.array.shape == (32, 24, 1)
    assert np.abs(volume.array[:, :, 0].T.astype(int) - upright).max() <= 6
    assert ("EXIF" in volume.note) == (orientation != 1)


@pytest.mark.parametrize("kind", (np.uint8, np.uint16))
def test_a_tiff_whose_white_is_zero_is_inverted(tmp_path, kind):
    array = np.arange(12, dtype=kind).reshape(3, 4)
    top = np.iinfo(kind).max
    stored = top - array if kind == np.uint16 else array  # Pillow inverts 8 bits when it saves
    Image.fromarray(stored).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as picture:
        assert picture.tag_v2[262] == 0
    volume = read_volume(tmp_path / "a.tif")
    assert np.array_equal(volume.array[:, :, 0].T, array)


def test_transparent_is_black(tmp_path):
    alpha = np.array([[0, 255], [128, 255]], np.uint8)
    color = np.full((2, 2, 3), 200, np.uint8)
    Image.fromarray(np.dstack([color, alpha])).save(tmp_path / "a.png")
    Image.fromarray(np.dstack([color[..., 0], alpha])).save(tmp_path / "b.png")
    for name in "ab":
        volume = read_volume(tmp_path / f"{name}.png")
        assert volume.array[:, :, 0].T.tolist() == [[0, 200], [100, 200]]
        assert "alpha" in volume.note
    Image.fromarray(np.dstack([color, alpha * 0 + 255])).save(tmp_path / "c.png")
    assert read_volume(tmp_path / "c.png").note == ""


def test_colors_of_masks_are_classes(tmp_path):
    red, green, white = (255, 0, 0), (0, 130, 0), (255, 255, 255)
    one = np.array([[(0, 0, 0), red], [green, red]], np.uint8)
    two = np.array([[(0, 0, 0), red], [white, white]], np.uint8)
    files = [write_png(tmp_path / f"{n}.png", a) for n, a in enumerate((one, two))]
    labels = [read_volume(file, mask=True) for file in files]
    said = volumes.number_colors(labels)
    assert said.startswith("colors become classes: 1 = #008200, 2 = #ff0000, 3 = #ffffff")
    assert labels[0].array[:, :, 0].T.tolist() == [[0, 2], [1, 2]]
    assert labels[1].array[:, :, 0].T.tolist() == [[0, 2], [3, 3]]
    assert labels[0].array.dtype == np.uint8
    gray = read_volume(write_png(tmp_path / "g.png", one[..., 0]), mask=True)
    assert volumes.number_colors([gray]) == ""
    with pytest.raises(DataError, match="holds grays and another label colors"):
        volumes.number_colors([gray, read_volume(files[0], mask=True)])
    as_image = read_volume(files[0])
    assert not as_image.colors and as_image.array.max() < 256 and "gray" in as_image.note


# --------------------------------------------------------------------------------------------------
# Classes or an image, CT or MRI


def test_integers_that_make_regions_are_classes():
    rng = np.random.default_rng(0)
    many = np.kron(np.arange(1, 118).reshape(9, 13), np.ones((6, 6), int))[:, :, None]
    assert volumes.holds_classes(many) and volumes.holds_classes(many.astype(float))
    assert volumes.holds_classes(np.pad(many, ((40, 40), (40, 40), (0, 0))))
    assert not volumes.holds_classes(many + 0.5)
    noisy = rng.integers(1, 200, (40, 40, 1))
    assert not volumes.holds_classes(noisy)
    smooth = (np.add.outer(np.arange(150), np.arange(150)) // 2)[:, :, None]
    assert not volumes.holds_classes(smooth)  # half of its neighbours are equal
    assert not volumes.holds_classes(np.pad(noisy, ((90, 90), (90, 90), (0, 0))))  # much air
    assert volumes.holds_classes(rng.integers(0, 3, (40, 40, 1)))  # few values are classes


def test_a_few_voxels_do_not_make_a_ct():
    rng = np.random.default_rng(0)
    ct = rng.integers(-1000, 1000, (20, 20, 5))
    mri = rng.integers(0, 1400, (20, 20, 5))
    padded, spot = mri.copy(), mri.copy()
    padded[:6], spot[0, 0, 0] = -1000, -1000
    assert volumes.guess_modality(plain(ct)) == "ct"
    for array in (mri, padded, spot, mri - 100):
        assert volumes.guess_modality(plain(array)) == "mri"
    assert "taken for MRI" in volumes.odd_values(plain(spot), "mri")
    assert "not in HU" in volumes.odd_values(plain(ct + 1024), "ct")
    assert volumes.odd_values(plain(ct), "ct") == volumes.odd_values(plain(mri), "mri") == ""


# --------------------------------------------------------------------------------------------------
# What is wrong with a file is said in one line


def test_bad_files_are_named(tmp_path):
    whole = write_nifti(tmp_path / "a.nii.gz", np.ones((9, 8, 7), np.int16)).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "bad.nrrd").write_text("NRRD0004\ntype: short\n")
    nan = np.zeros((4, 4, 4), np.float32)
    nan[1, 2, 3] = np.nan
    write_nifti(tmp_path / "nan.nii", nan)
    write_nifti(tmp_path / "four.nii", np.ones((8, 8, 4, 3), np.float32))
    write_nifti(tmp_path / "empty.nii", np.ones((4, 0, 3), np.float32))
    huge = bytearray(write_nifti(tmp_path / "huge.nii", np.ones((4, 4, 4), np.int16)).read_bytes())
    huge[42:48] = np.full(3, 32_000, np.int16).tobytes()
    (tmp_path / "huge.nii").write_bytes(huge)
    for name, words in (
        ("missing.nii", "no such file"),
        ("note.txt", "unknown kind '.txt'"),
        ("cut.nii.gz", "cannot be read"),
        ("bad.png", "cannot be read"),
        ("bad.nrrd", "cannot be read"),
        ("nan.nii", "1 voxels that are NaN"),
        ("four.nii", r"4-D \(8x8x4x3\)"),
        ("empty.nii", r"is empty \(4x0x3\)"),
        ("huge.nii", "claims 32000x32000x32000 voxels"),
    ):
        with pytest.raises(DataError, match=words) as raised:
            read_volume(tmp_path / name)
        assert str(raised.value).startswith(str(tmp_path / name)) and "\n" not in str(raised.value)


def test_a_channel_of_a_4d_file(tmp_path):
    array = np.random.default_rng(0).normal(size=(5, 4, 3, 2)).astype(np.float32)
    path = write_nifti(tmp_path / "a.nii.gz", array)
    for channel, used in ((0, 0), (1, 1), (7, 1)):
        volume = read_volume(path, channel)
        assert np.array_equal(volume.array, array[..., used])
        assert volume.note == f"channel {used + 1} of 2 is used"


def test_labels_are_integers_whatever_they_are_stored_as():
    for value, dtype in ((255, np.uint8), (256, np.int32), (2**31, np.int64)):
        labels = volumes.integer_labels(np.array([0, value + 1e-5]), "x")
        assert labels.dtype == dtype and labels.tolist() == [0, value]
    for value, words in ((0.3, "holds 0.3, which is no class"), (-1, "holds the label -1")):
        with pytest.raises(DataError, match=words):
            volumes.integer_labels(np.array([0, value]), "x")


def test_a_label_has_to_lie_as_its_image_does():
    image = plain(np.zeros((3, 4, 5)))
    with pytest.raises(DataError, match="is 3x4x6 but its image is 3x4x5"):
        volumes.lay_on(plain(np.zeros((3, 4, 6))), image)
    turned = plain(np.zeros((3, 4, 5)))
    turned.affine = np.diag([-1.0, 1, 1, 1])
    with pytest.raises(DataError, match=r"up to 4 mm: LAS from \(.*, the image RAS from \(0, 0"):
        volumes.lay_on(turned, image)
    image.affine = turned.affine = np.diag([2.0, 3, 4, 1])
    assert volumes.lay_on(turned, image) == ""
    for scale, shift in ((1.01, 1), (1.2, 0), (1, 3.9)):  # up to a voxel at the last corner
        turned.affine = image.affine * scale
        turned.affine[:3, 3] = shift, 0, 0
        assert volumes.lay_on(turned, image) == ""
    for scale, shift in ((1.3, 0), (1, 4.1), (2, 60)):
        turned.affine = image.affine * scale
        turned.affine[:3, 3] = shift, 0, 0
        with pytest.raises(DataError, match="lies elsewhere than its image"):
            volumes.lay_on(turned, image)
    for silent in (np.eye(4), LPS_TO_RAS):
        turned.affine = silent
        assert "does not say where it lies" in volumes.lay_on(turned, image)
        assert "does not say where it lies" in volumes.lay_on(image, turned)


@pytest.mark.parametrize("codes", CODES)
def test_a_label_whose_axes_are_stored_otherwise_is_turned(tmp_path, codes):
    """As dcm2niix writes them. Every voxel keeps its place."""
    array, affine = marker()
    image = Volume(array, affine, tmp_path / "image.nii", "nifti", nibabel.Nifti1Image(
        array, affine).header)
    reoriented(codes).to_filename(tmp_path / "label.nii")
    label = read_volume(tmp_path / "label.nii")
    assert volumes.lay_on(label, image) == ""
    assert np.array_equal(label.array, array) and np.allclose(label.affine, affine)
    silent = read_volume(tmp_path / "label.nii")
    silent.header.set_sform(None, 0)
    silent.header.set_qform(None, 0)  # its affine is then an invention
    if silent.array.shape == array.shape:
        kept = silent.array.copy()
        assert codes == "LPS" or "does not say where" in volumes.lay_on(silent, image)
        assert np.array_equal(silent.array, kept)


def test_a_label_that_fits_is_not_turned():
    """At 45 degrees, where rounding decides which axis is the first."""
    turn, rng = np.eye(4), np.random.default_rng(0)
    turn[:2, :2] = np.array([[1, -1], [1, 1]]) / 2 ** 0.5
    image = plain(np.zeros((40, 30, 5)))
    image.affine = turn
    for _ in range(20):
        label = plain(np.zeros((40, 30, 5)))
        label.affine = turn + rng.normal(0, 1e-6, (4, 4)) * [[1], [1], [1], [0]]
        assert volumes.lay_on(label, image) == "" and label.array.shape == (40, 30, 5)


def test_colors_become_gray_but_not_those_of_a_mask(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(rgb, isVector=True), str(tmp_path / "a.nrrd"))
    volume = read_volume(tmp_path / "a.nrrd")
    assert volume.array.shape == (6, 5, 4) and "read as gray" in volume.note
    assert np.abs(volume.array.T - rgb @ [0.299, 0.587, 0.114]).max() <= 1
    with pytest.raises(DataError, match="3 channels"):
        read_volume(tmp_path / "a.nrrd", mask=True)


@pytest.mark.parametrize("error,said", (
    (MemoryError(), "it does not fit in memory: take smaller"),
    (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), "it does not fit in memory"),
    (DataError("/data/memory_clinic/a.nii: no such file"), "error: /data/memory_clinic/a.nii: no"),
    (RuntimeError("CUDA error: an illegal memory access"), None)))
def test_a_lack_of_memory_ends_with_one_line(error, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit if said else RuntimeError):
        volumes.command_line(main)
    assert said is None or said in capsys.readouterr().err


def test_a_mask_with_soft_edges_is_told_from_many_classes():
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 20:50] = 255
    soft = resize_images(torch.from_numpy(mask)[None].float(), (150, 150)).numpy().astype(np.uint8)
    organs = np.arange(1, 65, dtype=np.uint8).reshape(8, 8).repeat(8, 0).repeat(8, 1)
    organs[:4], organs[40:] = 0, 80  # the last class is the body
    assert volumes.has_soft_edges(soft.T) and len(np.unique(soft)) > 16
    assert not any(map(volumes.has_soft_edges, (mask, organs, np.zeros((4, 4), np.uint8))))


def test_8_bit_pictures_of_ct_are_not_odd():
    picture = plain(np.zeros((3, 4, 1), np.uint8), "picture", eight_bit=True)
    assert volumes.odd_values(picture, "ct") == ""
    assert "not in HU" in volumes.odd_values(plain(np.ones((3, 4, 1))), "ct")


@pytest.mark.parametrize("damage", ("cut", "checksum"))
def test_a_gzipped_file_is_read_to_its_checksum(tmp_path, damage):
    """nibabel stops at the last voxel, before it."""
    path = write_nifti(tmp_path / "a.nii.gz", np.arange(2000, dtype=np.int16).reshape(10, 10, 20))
    content = path.read_bytes()
    path.write_bytes(content[:-8] if damage == "cut" else content[:-8] + b"1234" + content[-4:])
    with pytest.raises(DataError, match="a.nii.gz cannot be read .*damaged or cut short"):
        read_volume(path)


def test_values_that_no_float_can_span_are_named():
    with pytest.raises(DataError, match="reaches from -3e.38 to 3e.38: replace such values"):
        volumes.intensity_range(plain(np.float32([[[-3e38, 3e38]]])), "mri")


# --------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("kind", (".nii", ".nii.gz", ".nrrd", ".mha", ".png", ".tif"))
def test_an_answer_has_the_grid_of_its_scan(tmp_path, kind):
    rng = np.random.default_rng(0)
    if kind in volumes.PICTURE:
        source = write_png(tmp_path / f"a{kind}", rng.integers(0, 255, (6, 7), dtype=np.uint8))
    else:
        image = sitk.GetImageFromArray(rng.normal(size=(5, 6, 7)).astype(np.float32))
        image.SetSpacing((0.7, 0.8, 2.5))
        image.SetOrigin((10, -20, 5))
        image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
        source = tmp_path / f"a{kind}"
        sitk.WriteImage(image, str(source))
    volume = read_volume(source)
    answer = rng.integers(0, 200, volume.array.shape, dtype=np.uint8)
    volumes.write_like(tmp_path / f"b{kind}", answer, volume)
    back = read_volume(tmp_path / f"b{kind}")
    assert back.array.dtype == np.uint8 and np.array_equal(back.array, answer)
    assert np.allclose(back.affine, volume.affine, atol=1e-5)
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / f"b{kind}").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    volume = read_volume(write_nifti(tmp_path / "a.nii", np.ones((3, 4, 5), np.int16)))
    before = (tmp_path / "a.nii").read_bytes()

    def fail(*rest):
        raise OSError("disk full")

    monkeypatch.setattr(nibabel, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        volumes.write_like(tmp_path / "a.nii", volume.array, volume)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]
    assert (tmp_path / "a.nii").read_bytes() == before


def test_json_is_written_whole(tmp_path):
    volumes.write_json(tmp_path / "a.json", {"a": [1, None]})
    assert volumes.read_json(tmp_path / "a.json") == {"a": [1, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(TypeError):
        volumes.write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(DataError, match="b.json is no JSON"):
        volumes.read_json(tmp_path / "b.json")


@pytest.mark.parametrize("raised,status", ((DataError("a\nb"), 2), (KeyboardInterrupt(), 130)))
def test_the_command_line_ends_with_one_line(raised, status, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as stop:
        volumes.command_line(main)
    assert stop.value.code == status
    assert capsys.readouterr().err == ("error: a b\n" if status == 2 else "")


def test_names_of_files(tmp_path):
    assert volumes.extension("a/B.NII.GZ") == ".nii.gz" and volumes.stem("a/B.NII.GZ") == "B"
    assert volumes.extension("a.tar.gz") == "" and volumes.stem("a.tar.gz") == "a.tar.gz"
    names = ["case10", "case2", "._case1", ".DS_Store", "__MACOSX"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "case3").touch()
    assert [p.name for p in volumes.clean(tmp_path.iterdir())] == ["case2", "case3", "case10"]
    assert [p.name for p in volumes.folders(tmp_path.iterdir())] == ["case2", "case10"]
