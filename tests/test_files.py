"""scans/files.py: an image's label, a folder's images, the place and numbers of an answer."""

import os

import numpy as np
import pytest
import SimpleITK as sitk

from scans.files import answer_type, find_inputs, find_label, output_paths
from scans.volumes import DataError, Volume


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def source(path, kind="nifti", array=None, **more):
    array = np.zeros((3, 4, 5), np.uint8) if array is None else array
    return Volume(array, np.eye(4), path, kind, **more)


# -------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize("image,label", (
    ("a.nii", "a_label.nii"),
    ("a.nii.gz", "a_seg.nii.gz"),
    ("a.nii.gz", "a_gt.nii"),
    ("a.nii.gz", "a_segmentation.nii.gz"),
    ("a.nii.gz", "a_target.nii.gz"),
    ("a.png", "a-mask.png"),
    ("a.mhd", "a_labels.mha"),
    ("a.nrrd", "a.seg.nrrd"),
    ("a.dcm", "a_label.png"),
    ("BraTS-GLI-00001-000-t1c.nii.gz", "BraTS-GLI-00001-000-seg.nii.gz"),
    ("p_flair.nii", "p_seg.nii"),
    ("imagesTr/c_0000.nii.gz", "labelsTr/c.nii.gz"),
    ("imagesTr/c.nii.gz", "labelsTr/c.nii.gz"),
    ("imagesTs/c.nii.gz", "labelsTs/c.nii.gz"),
    ("x/lgemri.nrrd", "x/laendo.nrrd"),
    ("images/p.jpg", "masks/p.png"),
    ("images/p.jpg", "masks/p_mask.png"),
    ("Images/p.jpg", "Masks/p.png"),
    ("imgs/p_0000.png", "labels/p.png"),
))
def test_the_label_is_found_by_the_usual_names(tmp_path, image, label):
    touch(tmp_path / image, tmp_path / label)
    assert find_label(tmp_path / image) == tmp_path / label


@pytest.mark.parametrize("image,label", (("A.NII", "A_label.NII"), ("B.nii", "B_Label.nii")))
def test_small_and_capital_letters_are_alike(tmp_path, image, label):
    touch(tmp_path / image, tmp_path / label)
    assert find_label(tmp_path / image) == tmp_path / label


def test_several_labels_of_an_image_are_not_chosen_from(tmp_path):
    touch(tmp_path / "a.png", tmp_path / "a_mask.png", tmp_path / "a_mask_1.png")
    with pytest.raises(DataError, match="a_mask.png is one of several labels, beside a_mask_1.png"):
        find_label(tmp_path / "a.png")
    for n in (2, 20, 21):  # numbers of cases
        touch(tmp_path / f"imagesTr/spleen_{n}.nii", tmp_path / f"labelsTr/spleen_{n}.nii")
    assert find_label(tmp_path / "imagesTr/spleen_2.nii").name == "spleen_2.nii"


def test_a_label_of_the_images_own_kind_comes_first_and_none_is_an_error(tmp_path):
    touch(tmp_path / "a.nrrd", tmp_path / "a_seg.nii.gz", tmp_path / "a_seg.nrrd")
    assert find_label(tmp_path / "a.nrrd") == tmp_path / "a_seg.nrrd"
    touch(tmp_path / "lonely.nii.gz")
    with pytest.raises(DataError, match="looked for lonely_label, .*: pass --prompt_label"):
        find_label(tmp_path / "lonely.nii.gz")
    touch(tmp_path / "imagesTr" / "lonely.nii.gz", tmp_path / "labelsTr" / "other.nii.gz")
    with pytest.raises(DataError, match="no label beside it"):
        find_label(tmp_path / "imagesTr" / "lonely.nii.gz")


# -------------------------------------------------------------------------------------------------
# Inputs


def test_a_folder_stands_for_its_images(tmp_path):
    """Neither labels, answers, hidden files nor files of another kind; a file stands for itself."""
    images = [tmp_path / n for n in ("a.nii.gz", "b.nrrd", "c.png", "my_mask.nii")]
    touch(*images)
    touch(*(tmp_path / n for n in ("a_label.nii.gz", "b-seg.nrrd", "a_mvg.nii.gz", ".d.png",
                                   "a_mvg_confidence.nii.gz", "a_mvg_overlay.png", "note.txt")))
    assert find_inputs([tmp_path]) == images  # my_mask is no label: there is no "my"
    assert find_inputs([str(images[1]), tmp_path]) == [images[1], *images]
    assert find_inputs([tmp_path / "a_label.nii.gz"]) == [tmp_path / "a_label.nii.gz"]
    touch(tmp_path / "empty" / "note.txt")
    with pytest.raises(DataError, match="empty holds no image .*no DICOM series"):
        find_inputs([tmp_path / "empty"])


@pytest.mark.parametrize("names,images", (
    ("x-t1c.nii.gz x-t2w.nii.gz x-seg.nii.gz", "x-t1c.nii.gz x-t2w.nii.gz"),  # BraTS
    ("p.nrrd p.seg.nrrd", "p.nrrd"),                                          # 3D Slicer
    ("ct.nii.gz seg.nii.gz", "ct.nii.gz"),
    ("seg.nii.gz", "seg.nii.gz"),
    ("a_seg.nii b_seg.nii", "a_seg.nii b_seg.nii"),
    ("b(1).png b(1)_mask.png b(1)_mask_1.png", "b(1).png"),                   # BUSI
    ("frame_0000.png frame_0001.png", "frame_0000.png frame_0001.png"),
    ("s_target_01.nii s_target_02.nii s_control_01.nii",
     "s_control_01.nii s_target_01.nii s_target_02.nii"),
    ("p_label_2024.nii p_scan_2024.nii", "p_label_2024.nii p_scan_2024.nii"),
    ("c_seg_0000.nii c_ct_0000.nii", "c_ct_0000.nii c_seg_0000.nii"),
))
def test_labels_of_a_folder_are_no_inputs(tmp_path, names, images):
    touch(*(tmp_path / name for name in names.split()))
    assert [p.name for p in find_inputs([tmp_path])] == images.split()


def test_of_several_channels_the_first_is_the_input(tmp_path):
    names = "x_0000.nii x_0001.nii y_0000.nii y_0001.nii".split()
    touch(*(tmp_path / "imagesTs" / name for name in names))
    assert [p.name for p in find_inputs([tmp_path / "imagesTs"])] == ["x_0000.nii", "y_0000.nii"]


def test_a_folder_with_a_dicom_series_is_one_input(tmp_path):
    (tmp_path / "scan").mkdir()
    image = sitk.GetImageFromArray(np.zeros((4, 5), np.int16))
    sitk.WriteImage(image, str(tmp_path / "scan" / "1.dcm"))
    assert find_inputs([tmp_path / "scan"]) == [tmp_path / "scan"]
    touch(tmp_path / "scan_label.nii.gz", tmp_path / "other.nii.gz")  # a patient's folder
    assert [p.name for p in find_inputs([tmp_path])] == ["other.nii.gz", "scan"]
    assert find_inputs([tmp_path], [tmp_path / "other.nii.gz"]) == [tmp_path / "scan"]
    touch(tmp_path / "scan" / "label.nii.gz", tmp_path / "scan" / "scan_mvg.nii.gz",
          tmp_path / "scan" / "Segmentation.seg.nrrd")
    assert find_inputs([tmp_path / "scan"]) == [tmp_path / "scan"]
    touch(tmp_path / "scan" / "x1.nii.gz")
    with pytest.raises(DataError, match="a DICOM series and other images .x1.nii.gz.: name what"):
        find_inputs([tmp_path / "scan"])
    with pytest.raises(DataError, match="an input is empty: is a variable not set"):
        find_inputs([""])


# -------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("name,answer", (
    ("a.nii", "a_mvg.nii"), ("a.nii.gz", "a_mvg.nii.gz"), ("A.NII.GZ", "A_mvg.nii.gz"),
    ("a.mha", "a_mvg.mha"), ("a.mhd", "a_mvg.mha"), ("a.nrrd", "a_mvg.nrrd"),
    ("a.nhdr", "a_mvg.nrrd"), ("a.jpg", "a_mvg.png"),
    ("a.tif", "a_mvg.png"), ("scan", "scan_mvg.nii.gz"), ("a.dcm", "a_mvg.nii.gz"),
    ("1.2.840.7", "1.2.840.7_mvg.nii.gz"),
))
def test_without_a_name_the_answer_lies_beside_its_input(tmp_path, name, answer):
    scan, other = tmp_path / name, tmp_path / "other.nii"
    assert output_paths(None, [scan], []) == [tmp_path / answer]
    (tmp_path / "out").mkdir()
    assert output_paths(tmp_path / "out", [scan], []) == [tmp_path / "out" / answer]
    assert output_paths(tmp_path / "out", [scan, other], [])[0] == tmp_path / "out" / answer


def test_no_two_inputs_have_one_answer(tmp_path):
    scans = [tmp_path / "s0" / "ct.nii.gz", tmp_path / "s1" / "ct.nii.gz", tmp_path / "b.nii"]
    touch(*scans)
    (tmp_path / "out").mkdir()
    assert [p.name for p in output_paths(tmp_path / "out", scans, [])] == \
        ["s0_ct_mvg.nii.gz", "s1_ct_mvg.nii.gz", "b_mvg.nii"]
    assert [p.parent for p in output_paths(None, scans, [])] == [p.parent for p in scans]
    (tmp_path / "link.nii").symlink_to(scans[2])  # has a name of its own
    assert [p.name for p in output_paths(tmp_path / "out", [scans[2], tmp_path / "link.nii"], [])] \
        == ["b_mvg.nii", "link_mvg.nii"]
    for twin in ("a.jpg", "a.tif"), ("a.nii", "a.nii.gz"), ("a.mhd", "a.nrrd"):
        with pytest.raises(DataError, match="would both be answered under"):
            output_paths(None, [tmp_path / name for name in twin], [])
    with pytest.raises(DataError, match="would both be answered under"):  # the same file twice
        output_paths(tmp_path / "out", [scans[2], scans[2]], [])


def test_an_answer_goes_where_it_was_asked_to(tmp_path):
    scan = tmp_path / "a.nii.gz"
    touch(tmp_path / "old.nii.gz", scan)
    for name in ("x.nii", "old.nii.gz"):  # an answer may be written again
        assert output_paths(tmp_path / name, [scan], []) == [tmp_path / name]
    for name, words in (("x.png", r"cannot hold the answer to a.nii.gz: end it in .nii or .nii.gz"),
                        ("x", "cannot hold the answer"),
                        ("no/x.nii", "there is no folder"),
                        ("a.nii.gz", "is one of the inputs")):
        with pytest.raises(DataError, match=words):
            output_paths(tmp_path / name, [scan], [])
    prompt = tmp_path / "p_label.nii.gz"
    touch(prompt, tmp_path / "x_overlay.png")
    (tmp_path / "link.nii.gz").symlink_to(prompt)
    for name in ("./p_label.nii.gz", "link.nii.gz"):  # by whatever name it is called
        with pytest.raises(DataError, match="is one of the inputs"):
            output_paths(tmp_path / name, [scan], [prompt])
    with pytest.raises(DataError, match="x_overlay.png is one of the inputs"):  # --overlay's
        output_paths(tmp_path / "x.nii.gz", [scan], [tmp_path / "x_overlay.png"])
    (tmp_path / "folder.nii").mkdir()
    assert output_paths(tmp_path / "folder.nii", [scan], [])[0].parent == tmp_path / "folder.nii"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match="cannot be written there"):
        output_paths(tmp_path / "locked" / "x.nii", [tmp_path / "a.nii"], [])


def test_the_numbers_of_a_mask_hold_its_largest_class(tmp_path):
    scan, picture = source(tmp_path / "a.nii"), source(tmp_path / "a.png", "picture")
    for label, largest, output, kind in (
        (scan, 3, "o.nii", np.uint8), (scan, 255, "o.nii", np.uint8),
        (scan, 256, "o.nii", np.int32),
        (scan, 2 ** 31, "o.nii", np.int64), (picture, 255, "o.png", np.uint8),
        (picture, 256, "o.png", np.uint16), (picture, 65535, "o.tif", np.uint16),
        (picture, 65535, "o.nii", np.uint16),
    ):
        assert answer_type(label, largest, True, tmp_path / output) == kind, (largest, output)
        assert largest <= np.iinfo(kind).max
    with pytest.raises(DataError, match="holds the label 65536, too large for a picture"):
        answer_type(scan, 65536, True, tmp_path / "o.png")


def test_the_numbers_of_an_image_are_those_of_its_label(tmp_path):
    integers = np.zeros((3, 4, 1), np.uint16)
    bright = source(tmp_path / "a.png", "picture", integers, eight_bit=False)
    plain = source(tmp_path / "a.png", "picture", integers.astype(np.uint8), eight_bit=True)
    scan = source(tmp_path / "a.nii", array=integers.astype(np.float32))
    assert answer_type(plain, 200, False, tmp_path / "o.png") == np.uint8
    assert answer_type(bright, 200, False, tmp_path / "o.png") == np.uint16
    for output in ("o.nii", "o.tif"):
        assert answer_type(scan, 200, False, tmp_path / output) == np.float32
    with pytest.raises(DataError, match="cannot hold the numbers of .*end it in .tif"):
        answer_type(scan, 200, False, tmp_path / "o.png")
