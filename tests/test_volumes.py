"""One file <-> a `Volume`: what is read, how it is cut into slices, what is written back."""

import itertools
import json
import os

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from scans import volumes
from scans.volumes import LPS_TO_RAS, DataError, Volume, read_volume, slicing

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


def write_dicom(folder, hu, order=None, slope=1, step=5.0, uid="1", suffix=".dcm"):
    """(z, y, x) HU -> a file a slice, the lowest at -100 mm.

    order: the number in the name of every slice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for k, number in enumerate(order or range(len(hu))):
        image = sitk.GetImageFromArray(hu[k].astype(np.float64 if slope != 1 else np.int16))
        tags = {
            "0008|0060": "CT",
            "0020|000e": f"1.2.3.{uid}",
            "0008|0018": f"1.2.3.{uid}.{k + 1}",
            "0020|0032": f"-10\\-20\\{k * step - 100}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|0030": "1\\1",
            "0028|1052": "-1024",
            "0028|1053": str(slope),
            "0028|0100": "16",
            "0028|0101": "16",
            "0028|0102": "15",
            "0028|0103": "1",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetImageIO("GDCMImageIO")
        file = folder / f"{uid}-{number + 1:03d}.dcm"
        writer.SetFileName(str(file))
        writer.Execute(image)
        files.append(file.rename(file.with_suffix(suffix)))
    return sorted(files)


def hounsfield(slices):
    """(z, y, x) HU of a scan with another value in every slice, from air to bone."""
    return np.random.default_rng(0).integers(-1024, 2000, (slices, 6, 7)).astype(np.int16)


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
# DICOM series


def test_a_series_is_sorted_by_position(tmp_path):
    expected = marker()[0].transpose(2, 1, 0) == 700
    stack = marker()[0].transpose(2, 1, 0)
    files = write_dicom(tmp_path / "series", stack, order=(3, 0, 4, 1, 2))
    volume, heights = volumes.read_series(files)
    assert np.array_equal(slicing(volume).cut(volume.array) == 700, expected)
    assert heights == [-100, -95, -90, -85, -80]


def test_dicom_with_a_slope(tmp_path):
    hu = np.arange(24, dtype=float).reshape(1, 4, 6) / 2 - 6
    volume, _ = volumes.read_series(write_dicom(tmp_path / "s", hu, slope=0.5))
    assert np.array_equal(volume.array[:, :, 0].T, hu[0])


@pytest.mark.parametrize("suffix", (".dcm", ".IMA", ""))
def test_a_folder_of_slices_is_a_volume(tmp_path, suffix):
    hu = hounsfield(5)
    write_dicom(tmp_path, hu, order=(3, 0, 4, 1, 2), suffix=suffix)
    assert volumes.is_dicom(tmp_path)
    volume = volumes.read_image(tmp_path)
    assert volume.kind == "nifti" and np.array_equal(volume.array, hu.transpose(2, 1, 0))
    assert np.allclose(LPS_TO_RAS @ volume.affine, np.array(
        [[1, 0, 0, -10], [0, 1, 0, -20], [0, 0, 5, -100], [0, 0, 0, 1]]))


def test_one_of_several_series_is_chosen(tmp_path):
    write_dicom(tmp_path, hounsfield(4))
    write_dicom(tmp_path, hounsfield(2), uid="2")
    with pytest.raises(DataError, match=r"has 2 series \(1: 4 files, .*; 2: 2 files, .*--series"):
        volumes.read_image(tmp_path)
    with pytest.raises(DataError, match="has no series '3'"):
        volumes.read_image(tmp_path, "3")
    assert volumes.read_image(tmp_path, "2").array.shape == (7, 6, 2)
    uids = ["1.2.3", "4"]
    for wanted, chosen in (("4", "4"), ("1", "1.2.3"), ("2", "4"), ("1.2.3", "1.2.3")):
        assert volumes.choose_series(wanted, uids) == chosen
    for wanted in ("3", "0", "x", "", None):
        assert volumes.choose_series(wanted, uids) is None


def test_a_series_with_gaps_or_in_color_is_refused(tmp_path):
    files = write_dicom(tmp_path / "gap", hounsfield(6))
    files[2].unlink()
    with pytest.raises(DataError, match="5 slices are 5.00 to 10.00 mm apart: files are missing"):
        volumes.read_image(tmp_path / "gap")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no DICOM series"):
        volumes.read_image(tmp_path / "empty")
    files = write_dicom(tmp_path / "color", hounsfield(3), suffix="")  # as archives name them
    files[1].write_bytes(files[1].read_bytes().replace(b"MONOCHROME2 ", b"RGB         "))
    with pytest.raises(DataError, match="1-002 has 3 channels a voxel"):
        volumes.read_image(tmp_path / "color")


def test_a_folder_of_pictures_is_no_series(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    (tmp_path / ".dcm").touch()
    assert not volumes.is_dicom(tmp_path)
    (tmp_path / "b").write_bytes(bytes(128) + b"DICM")
    assert volumes.is_dicom(tmp_path)


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
        volumes.check_fit(plain(np.zeros((3, 4, 6))), image)
    turned = plain(np.zeros((3, 4, 5)))
    turned.affine = np.diag([-1.0, 1, 1, 1])
    with pytest.raises(DataError, match="is stored as LAS but its image as RAS"):
        volumes.check_fit(turned, image)
    turned.affine = np.diag([1.2, 1, 1, 1])
    volumes.check_fit(turned, image)  # slips of spacing are common


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
