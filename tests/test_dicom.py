"""scans/dicom.py: slices and frames are placed by what they say of themselves, or refused."""

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import convert_color_space
from pydicom.sequence import Sequence
from test_volumes import marker

from scans.dicom import choose_series, is_dicom, read_files
from scans.volumes import (LPS_TO_RAS, DataError, guess_modality, intensity_range, read_volume,
                           slicing)


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


# --------------------------------------------------------------------------------------------------
# A file a slice


def test_a_series_is_sorted_by_position(tmp_path):
    stack = marker()[0].transpose(2, 1, 0)
    expected = stack == 700
    files = write_dicom(tmp_path / "series", stack, order=(3, 0, 4, 1, 2))
    volume, heights = read_files(files, tmp_path)
    assert np.array_equal(slicing(volume).cut(volume.array) == 700, expected)
    assert heights == [-100, -95, -90, -85, -80]


def test_dicom_with_a_slope(tmp_path):
    hu = np.arange(24, dtype=float).reshape(1, 4, 6) / 2 - 6
    volume, _ = read_files(write_dicom(tmp_path / "s", hu, slope=0.5), tmp_path)
    assert np.array_equal(volume.array[:, :, 0].T, hu[0])


@pytest.mark.parametrize("suffix", (".dcm", ".IMA", ""))
def test_a_folder_of_slices_is_a_volume(tmp_path, suffix):
    hu = hounsfield(5)
    write_dicom(tmp_path, hu, order=(3, 0, 4, 1, 2), suffix=suffix)
    assert is_dicom(tmp_path)
    volume = read_volume(tmp_path)
    assert volume.kind == "nifti" and np.array_equal(volume.array, hu.transpose(2, 1, 0))
    assert np.allclose(LPS_TO_RAS @ volume.affine, np.array(
        [[1, 0, 0, -10], [0, 1, 0, -20], [0, 0, 5, -100], [0, 0, 0, 1]]))


def test_one_of_several_series_is_chosen(tmp_path):
    write_dicom(tmp_path, hounsfield(4))
    write_dicom(tmp_path, hounsfield(2), uid="2")
    with pytest.raises(DataError, match=r"has 2 series \(1: 4 files, .*; 2: 2 files, .*--series"):
        read_volume(tmp_path)
    with pytest.raises(DataError, match="has no series '3'"):
        read_volume(tmp_path, series="3")
    assert read_volume(tmp_path, series="2").array.shape == (7, 6, 2)
    uids = ["1.2.3", "4"]
    for wanted, chosen in (("4", "4"), ("1", "1.2.3"), ("2", "4"), ("1.2.3", "1.2.3")):
        assert choose_series(wanted, uids) == chosen
    for wanted in ("3", "0", "x", "", None):
        assert choose_series(wanted, uids) is None


def test_a_series_with_gaps_or_damaged_colors_is_refused(tmp_path):
    files = write_dicom(tmp_path / "gap", hounsfield(6))
    files[2].unlink()
    with pytest.raises(DataError, match="5 slices are 5.00 to 10.00 mm apart .*files are missing"):
        read_volume(tmp_path / "gap")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no DICOM series"):
        read_volume(tmp_path / "empty")
    files = write_dicom(tmp_path / "color", hounsfield(3), suffix="")  # as archives name them
    files[1].write_bytes(files[1].read_bytes().replace(b"MONOCHROME2 ", b"RGB         "))
    with pytest.raises(DataError, match="1-002 has 3 channels a voxel"):
        read_volume(tmp_path / "color")


@pytest.mark.parametrize("kind", ("RGB", "YBR_FULL"))
def test_ultrasound_in_color_becomes_gray_and_its_header_says_what_it_is(tmp_path, kind):
    rgb = np.random.default_rng(0).integers(0, 256, (8, 10, 3)).astype(np.uint8)
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.3"
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.Modality, header.Rows, header.Columns, header.SamplesPerPixel = "US", 8, 10, 3
    header.PhotometricInterpretation, header.PlanarConfiguration = kind, 0
    header.BitsAllocated, header.BitsStored, header.HighBit = 8, 8, 7
    header.PixelRepresentation = 0
    stored = rgb if kind == "RGB" else convert_color_space(rgb, "RGB", kind)
    header.PixelData = stored.tobytes()
    header.save_as(tmp_path / "us.dcm", enforce_file_format=True)
    volume = read_volume(tmp_path / "us.dcm")
    assert np.abs(volume.array[:, :, 0].T - rgb @ [0.299, 0.587, 0.114]).max() <= 1
    assert volume.modality == guess_modality(volume) == "ultrasound" and not volume.sized
    assert "read as gray" in volume.note and "pixel" in volume.note
    assert intensity_range(volume, "ultrasound") == (0, 255)


def test_a_scan_that_does_not_say_how_its_slices_are_turned_is_refused(tmp_path):
    for file in write_dicom(tmp_path, hounsfield(3)):
        header = pydicom.dcmread(file)
        del header.ImageOrientationPatient
        header.save_as(file)
    with pytest.raises(DataError, match="where its slices lie but not how they are turned"):
        read_volume(tmp_path)


def test_a_scan_that_does_not_say_how_large_its_pixels_are_has_a_note(tmp_path):
    (file,) = write_dicom(tmp_path, hounsfield(1))
    assert read_volume(file).sized and "pixel" not in read_volume(file).note
    header = pydicom.dcmread(file)
    del header.PixelSpacing
    header.save_as(file)
    volume = read_volume(file)
    assert "does not say how large a pixel is, 1 mm is assumed" in volume.note and not volume.sized


@pytest.mark.parametrize("tag,modality", (("MR", "mri"), ("DX", "xray"), ("OT", "ct")))
def test_the_header_says_the_modality(tmp_path, tag, modality):
    """Whatever the values look like; without a word of it they decide."""
    (file,) = write_dicom(tmp_path, hounsfield(1))
    header = pydicom.dcmread(file)
    header.Modality = tag
    header.save_as(file)
    assert guess_modality(read_volume(file)) == modality


def test_a_folder_of_pictures_is_no_series(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / ".dcm").touch()
    assert not is_dicom(tmp_path)
    (tmp_path / "b").write_bytes(bytes(128) + b"DICM")
    assert is_dicom(tmp_path)


# --------------------------------------------------------------------------------------------------
# What a folder of slices may hold beside a sound series


def change(file, **tags):
    """Other values for some tags of a file; None takes a tag out."""
    header = pydicom.dcmread(file)
    for name, value in tags.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    header.save_as(file)


def test_other_files_do_not_hide_a_series(tmp_path):
    hu = hounsfield(3)
    write_dicom(tmp_path, hu, suffix="")
    (tmp_path / "LICENSE").write_text("terms " * 100)  # the first by name
    assert np.array_equal(read_volume(tmp_path).array, hu.transpose(2, 1, 0))


def test_the_only_series_needs_no_choice(tmp_path):
    write_dicom(tmp_path, hounsfield(3))
    assert read_volume(tmp_path, series="2").array.shape == (7, 6, 3)


@pytest.mark.parametrize("lost", (30, 500))  # in the pixels, in the header
@pytest.mark.parametrize("k", (0, 2, 4))
def test_a_file_that_is_cut_short_is_named(tmp_path, k, lost):
    file = write_dicom(tmp_path, hounsfield(5))[k]
    file.write_bytes(file.read_bytes()[:-lost])
    with pytest.raises(DataError, match=file.name):
        read_volume(tmp_path)


@pytest.mark.parametrize("z,words", (
    ((0, 5, 10, 15, 22.5, 30), "5.00 to 7.50 mm apart"),
    ((0, 5, 10, 15, 21, 26), "5.00 to 6.00 mm apart"),  # one slice is a millimetre off
    ((0, 5, 5, 10, 15, 20), "0.00 to 5.00 mm apart"),
    ((0, 0, 0, 5, 5, 5), "0.00 to 5.00 mm apart"),      # three echoes of two slices
))
def test_slices_that_are_not_even_are_refused(tmp_path, z, words):
    for k, file in enumerate(write_dicom(tmp_path, hounsfield(6))):
        change(file, ImagePositionPatient=[0, 0, z[k]])
    with pytest.raises(DataError, match=words):
        read_volume(tmp_path)


def test_rounded_positions_are_even(tmp_path):
    z = (0, 1.25, 2.5, 3.8, 5, 6.25)  # one is rounded
    for k, file in enumerate(write_dicom(tmp_path, hounsfield(6))):
        change(file, ImagePositionPatient=[0, 0, z[k]])
    assert read_volume(tmp_path).affine[2, 2] == pytest.approx(1.25)


def test_slices_without_positions_are_refused(tmp_path):
    files = write_dicom(tmp_path, hounsfield(3))
    change(files[1], ImagePositionPatient=None)
    with pytest.raises(DataError, match="some of its slices do not say where they lie"):
        read_volume(tmp_path)
    for file in (files[0], files[2]):
        change(file, ImagePositionPatient=None)
    with pytest.raises(DataError, match="3 files do not say where their slices lie"):
        read_volume(tmp_path)


def test_a_localizer_of_the_same_series_is_refused(tmp_path):
    files = write_dicom(tmp_path, hounsfield(4))
    change(files[0], ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    with pytest.raises(DataError, match="different sizes or directions"):
        read_volume(tmp_path)


# --------------------------------------------------------------------------------------------------
# One file


@pytest.mark.parametrize("suffix", (".dcm", ".DCM", ""))
def test_one_file_is_a_volume(tmp_path, suffix):
    file = write_dicom(tmp_path, hounsfield(1), suffix=suffix)[0]
    change(file, SliceThickness=2.5, PixelSpacing=[0.5, 2])  # of rows, of columns
    for place in (file, tmp_path):
        volume = read_volume(place)
        assert np.array_equal(volume.array[:, :, 0].T, hounsfield(1)[0])
        assert np.allclose(np.abs(volume.affine[:3, :3]), np.diag([2, 0.5, 2.5]))
        assert volume.note == ""


def test_an_unknown_thickness_is_said(tmp_path):
    file = write_dicom(tmp_path, hounsfield(1))[0]
    change(file, SpacingBetweenSlices=None)
    volume = read_volume(file)
    assert volume.affine[2, 2] == 1 and "how thick a slice is, 1 mm is assumed" in volume.note


def item(**tags):
    """A sequence of one item."""
    one = Dataset()
    for name, value in tags.items():
        setattr(one, name, value)
    return Sequence([one])


def enhanced(path, frames, z, spacing=(3, 3), thickness=3, **more):
    """A multi-frame file of uint16 frames (K, H, W) at the heights z; -1024 is added to them."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = more.pop("sop", "1.2.840.10008.5.1.4.1.1.2.1")
    meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = "1.2", "1.2.840.10008.1.2.1"
    file = Dataset()
    file.file_meta, file.SOPClassUID, file.SOPInstanceUID = meta, meta[2, 2].value, "1.2"
    file.Modality, file.SeriesInstanceUID, file.NumberOfFrames = "CT", "1.2.3", len(frames)
    file.Rows, file.Columns = frames.shape[1:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation = 15, 0
    shared = item(
        PlaneOrientationSequence=item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelMeasuresSequence=item(PixelSpacing=list(spacing), SliceThickness=thickness),
        PixelValueTransformationSequence=item(RescaleIntercept=-1024, RescaleSlope=1,
                                              RescaleType="HU"))
    file.SharedFunctionalGroupsSequence = shared
    file.PerFrameFunctionalGroupsSequence = Sequence(
        [item(PlanePositionSequence=item(ImagePositionPatient=[-7, 5, height]))[0]
         for height in z])
    for name, value in more.items():
        setattr(file, name, value)
    file.PixelData = frames.astype("<u2").tobytes()
    file.save_as(path, enforce_file_format=True)
    return path


def test_frames_are_sorted_by_their_own_positions(tmp_path):
    hu = hounsfield(5)
    order = [2, 0, 4, 1, 3]
    file = enhanced(tmp_path / "e.dcm", hu[order] + 1024, [4 * k for k in order],
                    spacing=(0.5, 2), thickness=3)  # slices of 3 mm, 4 mm apart
    for place in (file, tmp_path):
        volume = read_volume(place)
        assert np.array_equal(volume.array, hu.transpose(2, 1, 0))
        assert np.allclose(LPS_TO_RAS @ volume.affine,
                           [[2, 0, 0, -7], [0, 0.5, 0, 5], [0, 0, 4, 0], [0, 0, 0, 1]])
    enhanced(file, hu + 1024, (0, 4, 8, 12, 20))
    with pytest.raises(DataError, match="4.00 to 8.00 mm apart"):
        read_volume(file)


def test_frames_of_several_scales_are_refused(tmp_path):
    file = enhanced(tmp_path / "e.dcm", hounsfield(2) + 1024, (0, 3))
    header = pydicom.dcmread(file)
    for k, group in enumerate(header.PerFrameFunctionalGroupsSequence):
        group.PixelValueTransformationSequence = item(RescaleIntercept=0, RescaleSlope=k + 1)
    header.save_as(file)
    with pytest.raises(DataError, match="scales every frame in its own way"):
        read_volume(file)


@pytest.mark.parametrize("uid,name", (
    ("1.2.840.10008.5.1.4.1.1.66.4", "Segmentation Storage"),
    ("1.2.840.10008.5.1.4.1.1.481.3", "RT Structure Set Storage"),
    ("1.2.840.10008.5.1.4.1.1.88.11", "Basic Text SR Storage"),
))
def test_what_is_no_scan_is_refused_by_its_name(tmp_path, uid, name):
    file = enhanced(tmp_path / "x.dcm", hounsfield(2) + 1024, (0, 3), sop=uid)
    if not uid.endswith(".66.4"):
        change(file, Rows=None, Columns=None, PixelData=None)
    with pytest.raises(DataError, match=f"x.dcm is no scan but DICOM {name}"):
        read_volume(file, mask=True)
    hu = hounsfield(3)
    write_dicom(tmp_path, hu)  # beside a series it is passed over
    assert np.array_equal(read_volume(tmp_path).array, hu.transpose(2, 1, 0))


# --------------------------------------------------------------------------------------------------
# Every format


@pytest.mark.parametrize("kind", (
    "a.nii", "a.nii.gz", "two.nii", "a.nrrd", "a.nhdr", "a.mha", "a.mhd", "series",
    "e.dcm"))
def test_a_scan_is_the_same_in_every_format(tmp_path, kind):
    hu = hounsfield(5)
    lps = np.array([[2, 0, 0, -7], [0, 0.5, 0, 5], [0, 0, 4, 0], [0, 0, 0, 1.0]])
    array, affine, path = hu.transpose(2, 1, 0), LPS_TO_RAS @ lps, tmp_path / kind
    if kind == "series":
        for k, file in enumerate(write_dicom(path, hu)):
            change(file, ImagePositionPatient=[-7, 5, 4 * k], PixelSpacing=[0.5, 2])
    elif kind == "e.dcm":
        enhanced(path, hu + 1024, 4 * np.arange(5), spacing=(0.5, 2))
    elif kind.endswith((".nii", ".nii.gz")):
        form = nibabel.Nifti2Image if kind == "two.nii" else nibabel.Nifti1Image
        nibabel.save(form(array, affine), path)
    else:
        image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        image.SetSpacing((2, 0.5, 4))
        image.SetOrigin((-7, 5, 0))
        sitk.WriteImage(image, str(path))
    volume = read_volume(path)
    assert np.array_equal(volume.array, array) and volume.note == ""
    assert np.allclose(volume.affine, affine, atol=1e-5)
    assert np.array_equal(slicing(volume).cut(volume.array), hu)
