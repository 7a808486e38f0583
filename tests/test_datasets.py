"""Every dataset's reader: on its stand-in, on real files where they are, and on files made here.

Then finding, joining, splitting and the table. The stand-ins are those of lab/phantom.py, the real
files those of ../shared/data/real.
"""

import csv
import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

import data
import metrics
import mvg
from common import batch_of, context
from conftest import FIVE, REAL, ROOT
from objectives import LOSSES
from recipe import Recipe
from scans import datasets
from scans.datasets import DATASETS, Found, find
from scans.store import Store, StoredCase, open_store, prepare, prepare_case
from scans.dicom import read_files
from scans.volumes import DataError, natural, read_volume, resize_labels, slicing
from test_volumes import CODES, marker, reoriented, write_nifti, write_png


def quiet(line):
    pass


@pytest.fixture(scope="module")
def found(sixteen):
    return find(sixteen)


@pytest.fixture(scope="module")
def filled(found, tmp_path_factory):
    """The prepared store of all sixteen stand-ins."""
    root = tmp_path_factory.mktemp("filled")
    assert prepare(found, root, quiet) == {}
    return Store(root)


@pytest.fixture(scope="module")
def real_found():
    if not REAL.is_dir():
        pytest.skip("no real files: ../shared/data/real is not there")
    return find(REAL)


def names(cases, split):
    return [c.name for c in cases if c.split == split]


def write_pair(folder, name, shape=(40, 40, 6), value=1, seed=0, **about):
    """A case of an nnU-Net folder, and its dataset.json."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[10:20, 12:30] = value
    image = rng.normal(size=shape).astype(np.float32) + label
    affine = np.diag([1, 1, 4, 1.0])
    write_nifti(folder / "imagesTr" / f"{name}_0000.nii.gz", image, affine)
    write_nifti(folder / "labelsTr" / f"{name}.nii.gz", label, affine)
    labels = {"background": 0, "thing": 1}
    write_about(folder, **{"channel_names": {"0": "MRI"}, "labels": labels, **about})


def write_about(folder, **about):
    """A dataset.json."""
    (folder / "dataset.json").write_text(json.dumps(about))


# ------------------------------------------------------------------------------------------------
# Listing: names and splits, against the lists that lab/phantom.py plants

LISTED = {  # training, test, inference
    "amos_ct": (
        "amos_0001 amos_0004 amos_0005 amos_0009 amos_0015", "amos_0008 amos_0013", ""),
    "amos_mri": (
        "amos_0507 amos_0508 amos_0510 amos_0514 amos_0600", "amos_0575 amos_0583", ""),
    "word": (
        "word_0002 word_0003 word_0004 word_0006 word_0009", "word_0001 word_0007", ""),
    "btcv": (
        "img0001 img0002 img0005 img0021 img0024", "img0035 img0038", ""),
    "microsegnet": (
        "microUS_train_01 microUS_train_02 microUS_train_03 microUS_train_05 microUS_train_08",
        "microUS_test_01 microUS_test_02", ""),
    "promise12": (
        "training_Case00 training_Case02 training_Case07 training_Case13 training_Case26",
        "test_Case00 test_Case01", "test_Case02"),
    "brats_local": (
        "BraTS-GLI-00000-000 BraTS-GLI-00002-000 BraTS-GLI-00003-000 BraTS-GLI-00005-000 "
        "BraTS-GLI-00005-001 BraTS-GLI-00006-000", "BraTS-GLI-00008-000", "BraTS-GLI-00001-000"),
    "ldct": (
        "C052 L004 N012", "L006", ""),
    "chest_xray": (
        "CHNCXR_0001_0 CHNCXR_0004_0 CHNCXR_0010_0 CHNCXR_0327_1 MCUCXR_0001_0 MCUCXR_0002_0 "
        "MCUCXR_0003_0 MCUCXR_0005_0 MCUCXR_0104_1 MCUCXR_0108_1",
        "CHNCXR_0330_1 MCUCXR_0141_1 MCUCXR_0150_1", "CHNCXR_0025_0"),
    "msd_liver": (
        "liver_0 liver_1 liver_2 liver_5 liver_10 liver_11", "liver_23", ""),
    "msd_lung": (
        "lung_001 lung_003 lung_004 lung_005 lung_006 lung_009", "lung_010", "lung_014"),
    "msd_spleen": (
        "spleen_2 spleen_3 spleen_6 spleen_8 spleen_9 spleen_10", "spleen_12", "")}


@pytest.mark.parametrize("name", LISTED)
def test_lists_and_splits_its_stand_in(found, name):
    for split, expected in zip(("train", "test", "inference"), LISTED[name]):
        assert sorted(names(found[name].cases, split)) == sorted(expected.split()), split


def test_all_sixteen_are_found(found):
    assert list(found) == sorted(DATASETS)


def test_acdc_la_brats_gli_and_deeplesion_are_listed(sixteen, found):
    acdc = found["acdc"].cases
    assert {c.patient for c in acdc if c.split == "test"} == {"patient101", "patient104"}
    assert "patient003_frame04" in names(acdc, "train")  # ED is not always frame 01
    assert len(acdc) == 14
    la_test = {"4498CA6DZWELOXCBRYRF", "67W9VHOSUK9Z2UDA96WQ"}
    assert set(names(found["la"].cases, "test")) == la_test
    gli = found["brats_gli"].cases
    folders = {p.name for p in sixteen.glob("*-GLI-*/**/BraTS-GLI-*") if p.is_dir()}
    expected = sorted(f"{n}-{pair}" for n in folders for pair in ("t1c-t2w", "t2w-t1c"))
    assert sorted(c.name for c in gli) == expected
    gli_test = {"BraTS-GLI-00001", "BraTS-GLI-00013"}
    assert {c.patient for c in gli if c.split == "test"} == gli_test
    lesion_test = {f"{p:06d}" for p in (11, 13, 14, 17, 19, 20)}
    assert {c.patient for c in found["deeplesion"].cases if c.split == "test"} == lesion_test


def test_patients_never_part(found):
    for name, hit in found.items():
        train, test = ({c.patient for c in hit.cases if c.split == s} for s in ("train", "test"))
        assert test and not train & test, name
        assert len({c.name for c in hit.cases}) == len(hit.cases), name


def test_splits_keep_patients_apart(stand_ins):
    for name, hit in find(stand_ins).items():
        train, test = ({c.patient for c in hit.cases if c.split == s} for s in ("train", "test"))
        assert train and test and not train & test, name


def test_case_names_and_patients_of_the_repeaters(found):
    local, promise = found["brats_local"].cases, found["promise12"].cases
    assert {c.patient for c in local if "00005" in c.name} == {"BraTS-GLI-00005"}
    first = {c.patient for c in promise if c.name.endswith("Case00")}
    assert first == {"training_Case00", "test_Case00"}


def test_the_stand_ins_load_as_they_should(found):
    for name, hit in found.items():
        for case in hit.cases[::2]:
            if case.split == "inference":
                continue
            pair = case.load()
            assert pair.image.array.shape == pair.label.array.shape and pair.image.array.ndim == 3
            if hit.dataset.colored:
                assert pair.label.array.dtype == np.uint8, case.name
                assert 0 < pair.label.array.max() <= len(hit.dataset.labels), case.name
            if hit.dataset.modality == "ct":
                assert pair.image.array.min() < -900, case.name


@pytest.mark.parametrize("name", [
    "amos_ct", "amos_mri", "word", "btcv", "microsegnet", "acdc", "msd_liver", "msd_lung",
    "msd_spleen", "promise12", "la"])
def test_labels_are_the_files_numbers(found, name):
    """Against SimpleITK reading the label that belongs to the image by the dataset's own naming."""
    cases = found[name].cases
    case = cases[-1] if cases[-1].split != "inference" else cases[0]
    pair = case.load()
    image, label = (sitk.GetArrayFromImage(sitk.ReadImage(str(f))).T for f in case.files)
    assert np.allclose(pair.image.array, image, atol=1e-3)
    expected = label > 0 if len(found[name].dataset.labels) == 1 else label
    assert np.array_equal(pair.label.array, expected)


def test_store_holds_every_case_once(found, filled):
    for name, hit in found.items():
        stored = {c.name for c in filled.cases[name]}
        assert stored == {c.name for c in hit.cases if c.split != "inference"}
        assert all(c.foreground for c in filled.cases[name]), name


def test_unchanged_cases_are_not_read_again(found, filled, monkeypatch):
    def read_again(case, *rest):
        pytest.fail(f"{case.name} was read again")

    monkeypatch.setattr("scans.store.write_case", read_again)
    prepare(found, filled.root, quiet)


def test_slices_run_from_foot_to_head_and_axial(filled):
    assert {c.index["axis"] for cases in filled.cases.values() for c in cases} == {2}


# ------------------------------------------------------------------------------------------------
# Orientation

def test_orientation_holds_down_to_the_store(tmp_path):
    """The marker in every orientation as one nnU-Net dataset, and through the DICOM reader."""
    folder = tmp_path / "Dataset001_Marker"
    for codes in CODES:
        image = reoriented(codes)
        values = image.get_fdata()
        write_nifti(folder / f"imagesTr/{codes}_0000.nii.gz", values, image.affine, np.int16)
        write_nifti(folder / f"labelsTr/{codes}.nii.gz", values > 500, image.affine, np.int16)
    write_about(folder, channel_names={"0": "MRI"}, labels={"background": 0, "block": 1})
    prepare(find(tmp_path), tmp_path / "store", quiet)
    expected = marker()[0].transpose(2, 1, 0) == 700
    for case in Store(tmp_path / "store").cases["Dataset001_Marker"]:
        assert np.array_equal(np.load(case.folder / "label.npy"), expected), case.name
        assert np.array_equal(np.load(case.folder / "image.npy") == 65535, expected), case.name

    hu = marker()[0].transpose(2, 1, 0)
    files = write_dicom(tmp_path / "series", hu, order=(3, 0, 4, 1, 2))
    volume, heights = read_files(files, tmp_path)
    assert np.array_equal(slicing(volume).cut(volume.array) == 700, expected)
    assert heights == [-100, -95, -90, -85, -80]


def test_the_liver_is_on_the_left_of_the_picture_in_all_stand_ins(filled):
    """Every stand-in shows the same anatomy, whatever its files' orientation: liver left, spleen
    right, spine below."""
    for name in ("amos_ct", "amos_mri", "word", "btcv"):
        labels = filled.datasets[name].labels
        for case in filled.cases[name]:
            stack = np.load(case.folder / "label.npy")
            liver, spleen = (np.nonzero(stack == labels.index(n) + 1) for n in ("liver", "spleen"))
            assert liver[2].mean() < spleen[2].mean(), (name, case.name)
            if name not in ("amos_mri", "btcv"):
                assert liver[0].mean() > len(stack) / 2, (name, case.name)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR"])
def test_microsegnet_slices_are_frames_whatever_the_header_says(tmp_path, codes):
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (6, 5, 9), dtype=np.uint8)  # (frame, row, column)
    affine = np.linalg.inv(inv_ornt_aff(axcodes2ornt(codes), (9, 5, 6)))
    image = tmp_path / "train/micro_ultrasound_scans/microUS_train_01.nii.gz"
    label = tmp_path / "train/expert_annotations/expert_annotation_train_01.nii.gz"
    write_nifti(image, frames.T, affine)
    write_nifti(label, (frames.T > 99) * 255, affine, np.uint8)
    case, = datasets.microsegnet(tmp_path)
    pair = case.load()
    cut = slicing(pair.image)
    assert np.array_equal(cut.cut(pair.image.array), frames)
    assert np.array_equal(cut.cut(pair.label.array), frames > 99)
    assert cut.spacing[1:] == (0.033586, 0.033586)


# ------------------------------------------------------------------------------------------------
# Hounsfield units

def write_dicom(folder, hu, order=None, description="Full Dose Images", intercepts=(-1024,),
                step=5.0, suffix=".dcm"):
    """(z, y, x) HU -> a file a slice, the lowest at -100 mm.

    order: the number in the name of every slice.
    """
    folder.mkdir(parents=True)
    files = []
    for k, number in enumerate(order or range(len(hu))):
        image = sitk.GetImageFromArray(hu[k].astype(np.int16))
        tags = {
            "0008|0060": "CT", "0008|103e": description,
            "0020|0032": f"-10\\-20\\{k * step - 100}", "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|0030": "1\\1", "0028|1052": str(intercepts[k % len(intercepts)]),
            "0028|1053": "1", "0028|0100": "16", "0028|0101": "16", "0028|0102": "15",
            "0028|0103": "1"}
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(folder / f"1-{number + 1:03d}.dcm"))
        writer.Execute(image)
        files.append(folder / f"1-{number + 1:03d}{suffix}")
        (folder / f"1-{number + 1:03d}.dcm").rename(files[-1])
    return sorted(files)


HU = np.array([-1000, -100, -50, 0, 35, 50, 199, 200, 1500])
UNIT = np.array([0, 0, 50 / 300, 100 / 300, 135 / 300, 150 / 300, 299 / 300, 1, 1])


def test_window_of_a_dicom_nifti_and_deeplesion_voxel(tmp_path):
    """A row of known HU as DICOM (another intercept in every file), as NIfTI (slope, intercept), as
    a 16-bit picture + 32768."""
    row = np.broadcast_to(HU, (4, 6, 9))  # (z, y, x)
    study = tmp_path / "D/L001/1-1-2000"
    write_dicom(study / "1.0-FULL DOSE images-1", row, intercepts=(-1024, -1000, 0))
    write_dicom(study / "1.1-low dose IMAGES-2", row, description="low dose IMAGES",
                intercepts=(0,))
    stored = ((np.ascontiguousarray(row.T) + 1024) * 2).astype(np.uint16)
    affine = np.diag([-1, -1, 5, 1])
    image = nibabel.Nifti1Image(stored, affine)
    image.header.set_slope_inter(0.5, -1024)
    (tmp_path / "B/Training/img").mkdir(parents=True)
    image.to_filename(tmp_path / "B/Training/img/img0001.nii.gz")
    label = (row.T > 0).astype(np.uint8)
    write_nifti(tmp_path / "B/Training/label/label0001.nii.gz", label, affine)
    lesion = dict(File_name="000001_01_01_005.png", Bounding_boxes="2, 2, 3, 3")
    lesions(tmp_path / "L", [lesion], picture=row[0] + 32768)
    hits = find(tmp_path)
    for hit in hits.values():
        arrays, index = prepare_case(hit.cases[0], hit.dataset)
        assert np.array_equal(arrays["image"][-1, -1], np.rint(UNIT * 65535)), hit.dataset.name
        assert index["scale"] == (-100, 200) and arrays["image"].shape[1:] == (6, 9)
    assert np.array_equal(hits["btcv"].cases[0].load().image.array[:, 0, 0], HU)
    assert np.array_equal(hits["ldct"].cases[0].load().label.array[:, 0, 0], HU)
    assert np.array_equal(hits["deeplesion"].cases[0].load().image.array[:, 0, 0], HU)


# ------------------------------------------------------------------------------------------------
# Low-dose CT

def test_ldct_pairs_by_description_and_sorts_by_position(found):
    hit = found["ldct"]
    assert hit.notes == ["1 patients have one dose only (GE scanners have no low dose images) "
                         "and are left out"]
    for case in hit.cases:
        assert not any("rojection" in f.parent.name for f in case.files)
        low = [f for f in case.files if "low" in f.parent.name.lower()]
        heights = {}
        for f in low:  # independently: the tag, file by file
            reader = sitk.ImageFileReader()
            reader.SetFileName(str(f))
            image = reader.Execute()
            z = float(reader.GetMetaData("0020|0032").split("\\")[2])
            heights[z] = sitk.GetArrayFromImage(image)[0]
        pair = case.load()
        stack = slicing(pair.image).cut(pair.image.array)
        assert np.array_equal(stack, np.stack([heights[z] for z in sorted(heights)]))
        noise = [np.abs(np.diff(v.array.astype(float), axis=0)).mean()
                 for v in (pair.image, pair.label)]
        assert noise[0] > noise[1], case.name


def test_ldct_refuses_doses_at_other_heights(tmp_path):
    hu = np.zeros((3, 4, 4))
    low, full = write_dicom(tmp_path / "a", hu), write_dicom(tmp_path / "b", hu, step=4.0)
    with pytest.raises(DataError, match="heights"):
        datasets.load_series(low, full)
    with pytest.raises(DataError, match="2"):
        datasets.load_series(low[:2], write_dicom(tmp_path / "c", hu))


def test_ldct_also_reads_mayo_2016(tmp_path):
    for part in ("full_1mm", "quarter_1mm", "full_3mm", "quarter_3mm"):
        hu = np.full((2, 4, 4), 10 if part == "full_1mm" else 20)
        write_dicom(tmp_path / "L067" / part, hu, description="", suffix=".IMA")
    cases, notes = datasets.ldct(tmp_path)
    pair = cases[0].load()
    assert pair.label.array.max() == 10 and pair.image.array.max() == 20 and "several" in notes[0]


# ------------------------------------------------------------------------------------------------
# BraTS

def test_brats_local_is_scored_in_healthy_voxels_and_kept_outside_of_the_holes(found, filled):
    for case in found["brats_local"].cases:
        if case.split == "inference":
            continue
        pair = case.load()
        files = {f.name[len(case.name) + 1:-7]: np.asarray(nibabel.load(f).dataobj)
                 for f in case.files}
        assert sorted(files) == ["mask-healthy", "t1n", "t1n-voided"]
        healthy, label = files["mask-healthy"] > 0, pair.label.array
        assert healthy.any() and np.array_equal(pair.valid == 1, healthy)
        outside = files["t1n"] == files["t1n-voided"]
        assert np.array_equal(pair.valid == 2, outside & ~healthy)
        assert 0 < (pair.valid == 0).sum() < 0.2 * pair.valid.size  # the hole over the tumour
        assert (files["t1n-voided"][pair.valid == 0] == 0).all()
        assert np.array_equal(label, files["t1n"])
        assert np.array_equal(pair.image.array, files["t1n-voided"])
    for case in filled.cases["brats_local"]:
        slices = [case.read(k) for k in range(case.slices)]
        images, labels, valid = (np.stack(arrays) for arrays in zip(*slices))
        assert np.array_equal(images[valid == 2], labels[valid == 2])  # in one scale
        assert (valid == 0).any() and (labels[valid == 0] > 0).all()  # no hole in what is shown
        scored = valid == 1
        assert case.foreground == [k for k in range(case.slices) if scored[k].any()]


def test_a_case_without_a_healthy_mask_is_for_inference_and_said(sixteen, tmp_path, capsys):
    prepare(find(sixteen, ["brats_local"]), tmp_path)
    said = capsys.readouterr().out
    assert said.count("BraTS-GLI-00001-000: BraTS-GLI-00001-000-t1n.nii.gz, "
                      "BraTS-GLI-00001-000-mask-healthy.nii.gz is missing") == 1
    assert not (tmp_path / "brats_local/BraTS-GLI-00001-000").exists()


def test_brats_pairs(sixteen, found):
    hit = find(sixteen, brats_pairs=["t1n:t2f"])["brats_gli"]
    assert {c.kind for c in hit.cases} == {"t1n->t2f"}
    assert {f.name[-10:-7] for c in hit.cases for f in c.files} == {"t1n", "t2f"}
    pair = next(c for c in found["brats_gli"].cases if c.kind == "t2w->t1c").load()
    assert pair.image.path.name.endswith("-t2w.nii.gz")
    assert pair.label.path.name.endswith("-t1c.nii.gz")
    for bad in ("t1c", "t1c:t1c", "t1c:seg", "t1c:t2w:t2f", "t1:t2"):
        with pytest.raises(DataError, match="brats_pairs"):
            find(sixteen, brats_pairs=[bad])


# ------------------------------------------------------------------------------------------------
# Chest X-ray, LA

def test_chest_masks_are_joined_and_resized(sixteen, found):
    cases = {c.name: c for c in found["chest_xray"].cases}
    pair = cases["MCUCXR_0104_1"].load()
    masks = sixteen / "MontgomerySet/ManualMask"
    left, right = (np.array(Image.open(masks / side / "MCUCXR_0104_1.png")) > 0
                   for side in ("leftMask", "rightMask"))
    assert left.any() and right.any()
    assert np.array_equal(pair.label.array[:, :, 0].T, left | right)
    small = sixteen / "Lung Segmentation/masks/CHNCXR_0010_0_mask.png"  # half the picture's size
    pair = cases["CHNCXR_0010_0"].load()
    assert pair.label.array.shape == pair.image.array.shape
    assert np.array_equal(pair.label.array[::2, ::2, 0].T, np.array(Image.open(small)) > 0)
    assert cases["CHNCXR_0004_0"].load().image.array.ndim == 3  # a color picture
    index = prepare_case(cases["CHNCXR_0004_0"], DATASETS["chest_xray"])[1]
    assert index["scale"] == (0, 255)


def test_overlapping_lungs_do_not_cancel(tmp_path):
    lung = np.eye(4) * 255
    for place, mask in (("CXR_png", np.full((4, 4), 9)), ("ManualMask/leftMask", lung),
                        ("ManualMask/rightMask", lung)):
        write_png(tmp_path / place / "MCUCXR_0001_0.png", mask.astype(np.uint8))
    case, = datasets.chest_xray(tmp_path)
    assert np.array_equal(case.load().label.array[:, :, 0], np.eye(4))


def test_the_uamt_form_of_la(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py", reason="h5py, which this form needs, is not installed")
    rng = np.random.default_rng(0)
    folder = tmp_path / "2018LA_Seg_Training Set"
    for name in ("AAA", "BBB", "CCC"):
        (folder / name).mkdir(parents=True)
        with h5py.File(folder / name / "mri_norm2.h5", "w") as f:
            f["image"] = rng.standard_normal((7, 5, 4)).astype(np.float32)
            f["label"] = (rng.random((7, 5, 4)) > 0.5).astype(np.uint8)
    (tmp_path / "test.list").write_text("BBB\n")
    hit = find(tmp_path)["la"]
    assert names(hit.cases, "test") == ["BBB"] and names(hit.cases, "train") == ["AAA", "CCC"]
    pair = hit.cases[0].load()
    with h5py.File(folder / "AAA/mri_norm2.h5") as f:
        assert np.array_equal(pair.image.array, f["image"][()])
        assert np.array_equal(pair.label.array, f["label"][()])
    assert np.allclose(np.abs(np.linalg.det(pair.image.affine[:3, :3])), 0.625 ** 3)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match="pip install h5py"):
        hit.cases[0].load()


def test_h5_files_with_nan_are_named(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py, which this form needs, is not installed")
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["image"], f["label"] = np.full((3, 4, 5), np.nan, np.float32), np.ones((3, 4, 5))
    with pytest.raises(DataError, match="a.h5 has 60 voxels that are NaN"):
        datasets.load_h5(tmp_path / "a.h5")


def test_la_scans_with_the_same_mask_are_one_patient(tmp_path):
    for name, value in (("A", 1), ("B", 2), ("C", 1)):
        folder = tmp_path / "Training Set" / name
        folder.mkdir(parents=True)
        for file, array in (("lgemri", np.arange(24)), ("laendo", np.full(24, 255 * (value == 1)))):
            image = sitk.GetImageFromArray(array.reshape(2, 3, 4).astype(np.uint8))
            sitk.WriteImage(image, str(folder / f"{file}.nrrd"))
    a, b, c = datasets.la(tmp_path)
    assert a.patient == c.patient != b.patient
    pair = a.load()
    assert np.allclose(np.linalg.norm(pair.image.affine[:3, :3], axis=0), 0.625)
    assert pair.label.array.max() == 1


# ------------------------------------------------------------------------------------------------
# DeepLesion

def lesions(folder, rows, picture=None):
    """A DeepLesion folder with these rows; every column that they lack is empty."""
    columns = ["File_name", "Bounding_boxes", "Normalized_lesion_location", "Possibly_noisy",
               "Spacing_mm_px_", "Train_Val_Test"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "DL_info.csv", "w", newline="") as handle:
        table = csv.DictWriter(handle, columns)
        table.writeheader()
        for row in rows:
            table.writerow({"Bounding_boxes": "3, 4, 9, 8", "Train_Val_Test": 1, **row})
    picture = np.full((16, 20), 32768) if picture is None else picture
    for row in rows:
        name = row["File_name"]
        if "/" not in name and "\\" not in name:
            write_png(folder / "Images_png" / name[:12] / name[13:], picture.astype(np.uint16))
    return folder


def check_boxes(root, case):
    """Painted pixels lie within one pixel of a box of the table, and along every line of it: an
    independent reading."""
    pair = case.load()
    image, label = (v.array[:, :, 0].T.astype(int) for v in (pair.image, pair.label))
    with open(root / "DL_info.csv", newline="") as handle:
        rows = [r for r in csv.DictReader(handle)
                if r["File_name"] == case.name + ".png" and r["Possibly_noisy"] != "1"]
    assert rows
    ys, xs = np.mgrid[:image.shape[0], :image.shape[1]]
    near = np.zeros(image.shape, bool)
    for row in rows:
        x1, y1, x2, y2 = (float(v) - 1 for v in row["Bounding_boxes"].split(","))
        across, along = (xs >= x1 - 1) & (xs <= x2 + 1), (ys >= y1 - 1) & (ys <= y2 + 1)
        sides = [(np.abs(xs - x) <= 1) & along for x in (x1, x2)]
        sides += [(np.abs(ys - y) <= 1) & across for y in (y1, y2)]
        for side in sides:
            near |= side
        for side, axis in zip(sides, (1, 1, 0, 0)):  # a row, or column, of a side has two pixels
            painted = ((label == 200) & side).sum(axis)
            inner = (side & across & along).any(axis)
            assert (painted[inner][1:-1] >= 2).all()
    assert (label[~near] == image[~near]).all()
    assert ((label == image) | (label == 200)).all() and (label != image).any()
    assert np.array_equal(image + 32768, np.array(Image.open(case.files[0])).astype(int))


def test_deeplesion_boxes_are_within_a_pixel_of_the_table(sixteen, found):
    assert any(len(c.load.keywords["boxes"]) > 1 for c in found["deeplesion"].cases)
    for case in found["deeplesion"].cases:
        check_boxes(sixteen / "DeepLesion", case)


def test_deeplesion_drops_noisy_rows_and_says_how_many(sixteen, found):
    hit = found["deeplesion"]
    with open(sixteen / "DeepLesion/DL_info.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    noisy = {r["File_name"] for r in rows if r["Possibly_noisy"] == "1"}
    count = sum(r["Possibly_noisy"] == "1" for r in rows)
    assert count and f"{count} lesions marked Possibly_noisy are dropped" in hit.notes
    assert {c.name + ".png" for c in hit.cases} == {r["File_name"] for r in rows} - noisy


def test_deeplesion_box_of_a_known_table(tmp_path):
    name = "000001_01_01_005.png"
    root = lesions(tmp_path, [
        dict(File_name=name, Bounding_boxes="3, 4, 9.5, 8",
             Normalized_lesion_location="0.1, 0.2, 0.4"),
        dict(File_name=name, Bounding_boxes="-5, 12, 4, 40",
             Normalized_lesion_location="0.1, 0.2, 0.6"),
        dict(File_name=name, Bounding_boxes="1, 1, 20, 16", Possibly_noisy=1)])
    (case,), notes = datasets.deeplesion(root)
    check_boxes(root, case)
    pair = case.load()
    label = pair.label.array[:, :, 0].T
    assert label[3:5, 2:10].tolist() == [[200] * 8] * 2  # 1-based: x 3 is column 2
    assert label[5, 2:10].tolist() == [200, 200, 0, 0, 0, 0, 200, 200]
    assert label[14, 0:6].tolist() == [0, 0, 0, 200, 200, 0]  # cut off by the edge
    assert label[11, 0:6].tolist() == [200] * 5 + [0]
    assert pair.boxes == ((2, 3, 9, 8), (0, 11, 4, 15))  # what is painted, first to last
    index = prepare_case(case, DATASETS["deeplesion"])[1]
    assert index["boxes"] == [[3, 2, 8, 9], [11, 0, 15, 4]]  # top, left, bottom, right
    assert case.height == pytest.approx(0.5)
    assert notes == ["1 lesions marked Possibly_noisy are dropped"]


def test_deeplesion_splits(tmp_path):
    def row(patient, part, number=1):
        return dict(File_name=f"{patient:06d}_01_01_{number:03d}.png", Train_Val_Test=part)

    root = lesions(tmp_path, [row(1, 1), row(2, 2), row(3, 3), row(4, ""), row(5, ""), row(6, 1),
                              row(6, 3, 2), row(7, ""), row(7, 1, 2)])
    cases, notes = datasets.deeplesion(root)
    assert {c.patient[-1] for c in cases if c.split == "test"} == {"2", "3", "5", "6"}
    assert {c.patient[-1] for c in cases if c.split == "train"} == {"1", "4", "7"}
    assert notes == ["1 patients have slices of both train and test in the table and count as test"]
    (root / "Images_png/000001_01_01/001.png").unlink()
    note = datasets.deeplesion(root)[1][0]
    assert note == "1 key slices have no picture here and are left out"


@pytest.mark.parametrize("name", [
    "../../000001_01_01_109.png", "/etc/000001_01_01_109.png", "000001_01_01_../secret.png",
    "..\\000001_01_01_1.png", "000001_01_01/109.png", "", "000001_01_01_109.png/../../x.png"])
def test_deeplesion_names_cannot_leave_the_root(tmp_path, name):
    rows = [dict(File_name="000001_01_01_109.png")]
    if name:
        rows.append(dict(File_name=name))
    root = lesions(tmp_path / "DeepLesion", rows)
    if not name:
        with open(root / "DL_info.csv", "a") as handle:
            handle.write(',"1, 2, 3, 4",,,,1\n')
    with pytest.raises(DataError, match="line 3 names"):
        find(tmp_path)


@pytest.mark.parametrize("row", [
    dict(Bounding_boxes="1, 2, 3"), dict(Bounding_boxes="a, b, c, d"), dict(Train_Val_Test="7")])
def test_deeplesion_broken_rows_are_named(tmp_path, row):
    root = lesions(tmp_path, [dict(File_name="000001_01_01_109.png", **row)])
    with pytest.raises(DataError, match="DL_info.csv line 2 cannot be read"):
        datasets.deeplesion(root)


def test_a_box_outside_of_its_picture_costs_its_case_and_is_named(tmp_path, capsys):
    rows = [dict(File_name=f"00000{i}_01_01_109.png", Train_Val_Test=1) for i in (1, 2)]
    rows[1]["Bounding_boxes"] = "90, 91, 95, 99"
    store = open_store(lesions(tmp_path / "DeepLesion", rows).parent, tmp_path / "store")
    assert [c.name for c in store.cases["deeplesion"]] == ["000001_01_01_109"]
    assert "000002_01_01_109" in (said := capsys.readouterr().out) and "lies outside of its" in said


def test_deeplesion_of_8_bits_is_refused(tmp_path):
    root = lesions(tmp_path, [dict(File_name="000001_01_01_109.png")])
    write_png(root / "Images_png/000001_01_01/109.png", np.zeros((16, 20), np.uint8))
    with pytest.raises(DataError, match="8 bits"):
        datasets.deeplesion(root)[0][0].load()


# ------------------------------------------------------------------------------------------------
# dataset.json

def test_two_cases_of_one_name_are_a_problem(tmp_path):
    folder = tmp_path / "Dataset900_X"
    for name in "abc":
        write_pair(folder, name)
    second = folder / "imagesTr" / "b_0000.png"
    write_png(second, np.ones((4, 4), np.uint8))
    hit = find(tmp_path)["Dataset900_X"]
    assert [c.name for c in hit.cases] == ["a", "b", "c"]
    assert "b is the name of 2 cases" in str(hit.problems)


@pytest.mark.parametrize("channels,modality", (
    ({"0": "CT"}, "ct"), (["CT"], "ct"), ({"0": " CT "}, "ct"),
    ({"0": "Computed Tomography"}, "ct"), ("CT", "ct"), ({"0": "T2"}, "mri"),
    ({"CT": 0}, None), ({"1": "CT"}, None), ({}, None), (3, None)))
def test_the_first_channel_names_the_modality(tmp_path, channels, modality):
    write_pair(tmp_path / "Dataset900_X", "a", channel_names=channels)
    if modality:
        assert find(tmp_path)["Dataset900_X"].dataset.modality == modality
    else:
        with pytest.raises(DataError, match="do not name the first one"):
            find(tmp_path)


@pytest.mark.parametrize("labels", (
    {"background": 0, "a": 10200004}, {"background": 0, "a": 1, "b": 1},
    {"background": 0, "a": 1.7}, {"background": 0, "a": -1}, {"background": 0, "a": [1, 2]},
    {"background": 0, "a": 1e400}))
def test_classes_have_one_number_each_up_to_255(tmp_path, labels):
    write_pair(tmp_path / "Dataset900_X", "a", labels=labels)
    with pytest.raises(DataError, match="no plain classes: give every class one number, from 0"):
        find(tmp_path)


def test_ignore_alone_names_no_class(tmp_path):
    write_pair(tmp_path / "Dataset900_X", "a", labels={"ignore": 1})
    with pytest.raises(DataError, match="names no class above 0"):
        find(tmp_path)


def test_patients_are_found_in_the_names_of_cases(tmp_path):
    folder, cases = tmp_path / "Dataset900_X", [f"pat{p}_slice{s}" for p in (1, 2) for s in (1, 2)]
    for name in cases:
        write_pair(folder, name, patient=r"^(pat\d+)_")
    hit = find(tmp_path)["Dataset900_X"]
    assert [c.patient for c in hit.cases] == ["pat1", "pat1", "pat2", "pat2"]
    assert len({c.split for c in hit.cases if c.patient == "pat1"}) == 1 and not hit.notes
    for bad in ("(", "x", 3, "pat", "(x)?"):
        write_pair(folder, cases[0], patient=bad)
        with pytest.raises(DataError, match='"patient" .* finds no patient in'):
            find(tmp_path)
    write_pair(folder, cases[0])
    hit = find(tmp_path)["Dataset900_X"]
    assert [c.patient for c in hit.cases] == cases and "a patient of its own" in hit.notes[0]


def test_an_nnunet_1_folder_lists_its_images_without_their_channel(tmp_path):
    folder = tmp_path / "Task900_Old"
    for name in "ab":
        write_pair(folder, name)
    entries = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ab"]
    write_about(folder, name="Old", modality={"0": "MRI"}, training=entries,
                labels={"0": "background", "1": "thing"})
    hit = find(tmp_path)["msd_old"]
    assert [c.name for c in hit.cases] == ["a", "b"] and not hit.problems
    assert hit.cases[0].files[0].name == "a_0000.nii.gz"


def test_a_folder_that_is_no_dataset_or_may_not_be_read_is_named(tmp_path, monkeypatch):
    write_pair(tmp_path / "Dataset900_X", "a")
    write_pair(tmp_path / "Dataset901_Y", "a")
    (tmp_path / "Dataset901_Y" / "dataset.json").unlink()
    (tmp_path / "lost+found").mkdir()
    search, said = datasets.datasets_of_folder, []

    def refused(folder, *more):
        if folder.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return search(folder, *more)

    monkeypatch.setattr(datasets, "datasets_of_folder", refused)
    assert list(find(tmp_path, say=said.append)) == ["Dataset900_X"]
    assert "Dataset901_Y has imagesTr but no dataset.json" in said[0]
    assert "lost+found cannot be searched (Permission denied)" in said[1]


def test_what_nobody_annotated_has_no_truth(tmp_path):
    """nnU-Net's ignore label is no class: `valid` is False there."""
    folder = tmp_path / "Dataset900_X"
    write_pair(folder, "a", labels={"background": 0, "thing": 1, "ignore": 2})
    label = nibabel.load(folder / "labelsTr" / "a.nii.gz")
    array = np.asarray(label.dataobj).copy()
    array[:5] = 2
    nibabel.Nifti1Image(array, label.affine).to_filename(folder / "labelsTr" / "a.nii.gz")
    hit = find(tmp_path)["Dataset900_X"]
    pair = hit.cases[0].load()
    assert hit.dataset.labels == ("thing",)
    assert np.array_equal(pair.valid, array != 2)
    assert np.array_equal(pair.label.array, np.where(array == 2, 0, array))


def decathlon(folder, image="./imagesTr/a_1.nii.gz", label="./labelsTr/a_1.nii.gz", **more):
    """A Decathlon task that lists this pair first, then a_10 (not there), a_2, a_3 and a_4."""
    for n in range(5):
        for part in ("imagesTr", "labelsTr"):
            write_nifti(folder / part / f"a_{n}.nii.gz", np.ones((4, 4, 4), np.uint8))
    entries = [{"image": image, "label": label}]
    for n in (10, 2, 3, 4):
        entries.append({"image": f"./imagesTr/a_{n}.nii.gz", "label": f"./labelsTr/a_{n}.nii.gz"})
    about = {"name": "Any", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"},
             "training": entries}
    write_about(folder, **{**about, **more})
    return folder


@pytest.mark.parametrize("entry", [
    "../secret.nii.gz", "/etc/passwd", "imagesTr/../../x.nii.gz", 7, ["x"]])
def test_dataset_json_cannot_leave_its_folder(tmp_path, entry):
    for key in ("image", "label"):
        decathlon(tmp_path / "Task99", **{key: entry})
        with pytest.raises(DataError, match="outside its folder"):
            find(tmp_path)


def test_names_in_dataset_json_cannot_leave_the_folder(tmp_path):
    folder = tmp_path / "Task50_Trap"
    trap = {"image": "../../etc/passwd", "label": "./labelsTr/a.nii.gz"}
    write_pair(folder, "a")
    write_about(folder, modality={"0": "CT"}, training=[trap],
                labels={"background": 0, "thing": 1})
    with pytest.raises(DataError, match="outside its folder"):
        find(tmp_path)


def test_dataset_json_name_cannot_leave_the_store(tmp_path):
    decathlon(tmp_path / "in/Task99", name="../../LEFT ATRIUM")
    assert list(find(tmp_path / "in")) == ["msd__left_atrium"]


def test_dataset_json_of_strings_is_a_clear_error(tmp_path):
    decathlon(tmp_path / "Task99", training=["./imagesTr/a_1.nii.gz"])
    with pytest.raises(DataError, match="needs an image and a label"):
        find(tmp_path)


def test_any_decathlon_task_and_four_channels(tmp_path):
    folder = decathlon(tmp_path / "Task05_Any")
    array = np.stack([np.full((4, 4, 4), 3), np.full((4, 4, 4), 8)], -1).astype(np.int16)
    write_nifti(folder / "imagesTr/a_1.nii.gz", array)
    cases = find(tmp_path)["msd_any"].cases
    assert [c.name for c in cases] == ["a_1", "a_2", "a_3", "a_4", "a_10"]
    assert names(cases, "inference") == ["a_10"]
    assert names(cases, "test") == ["a_4"]  # the last of those that are there
    assert cases[0].load().image.array.max() == 3


def test_symbolic_links_inside_a_dataset_are_followed(tmp_path):
    folder = decathlon(tmp_path / "in/Task99")
    (folder / "imagesTr").rename(tmp_path / "elsewhere")
    (folder / "imagesTr").symlink_to(tmp_path / "elsewhere")
    assert len(find(tmp_path / "in")["msd_any"].cases) == 5


def test_labels_and_names_must_fit(tmp_path, monkeypatch):
    write_pair(tmp_path / "Dataset900_Nine", "a", value=9)
    problems = prepare(find(tmp_path), tmp_path / "store")
    assert "holds the label 9" in problems["Dataset900_Nine"][0]
    write_pair(tmp_path / "0" / "synthetic", "a")
    write_pair(tmp_path / "1" / "Dataset001_B", "a", labels={"background": 0})
    for place, words in (("0", "rename the folder"), ("1", "no class above 0")):
        with pytest.raises(DataError, match=words):
            find(tmp_path / place)
    assert set(find(tmp_path)) == {"Dataset900_Nine"}  # said, and the others go on
    monkeypatch.chdir(tmp_path / "Dataset900_Nine")
    assert set(find(".")) == {"Dataset900_Nine"}


# ------------------------------------------------------------------------------------------------
# Finding and joining

def test_find_knows_datasets_by_their_marks(stand_ins, tmp_path):
    hits = find(stand_ins)
    assert set(hits) == set(FIVE)
    nested = tmp_path / "some" / "where"
    nested.mkdir(parents=True)
    (nested / "renamed").symlink_to(hits["acdc"].root, target_is_directory=True)
    assert set(find(tmp_path)) == {"acdc"}


def test_find_says_what_is_wrong(stand_ins, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no dataset"):
        find(tmp_path)
    with pytest.raises(DataError, match="did you mean acdc"):
        find(stand_ins, ["acdcc"])
    with pytest.raises(DataError, match="word is not in"):
        find(stand_ins, ["word"])


def test_parts_of_a_dataset_are_joined_and_copies_are_not(sixteen, found, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ACDC").symlink_to(sixteen / "ACDC")
    hit = find(tmp_path)["acdc"]
    assert len(hit.cases) == 14 and "14 cases of" in hit.notes[0] and "left out" in hit.notes[0]
    chest = found["chest_xray"]
    assert len({c.files[0].parent for c in chest.cases}) == 2
    assert any("2 cases of" in n and "left out" in n for n in chest.notes)


def test_two_folders_of_a_users_own_dataset_are_not_joined(tmp_path):
    for place, case in (("a", "x"), ("b", "y")):
        folder = tmp_path / place / "Dataset001_Own"
        write_png(folder / f"imagesTr/{case}_0000.png", np.ones((4, 4), np.uint8))
        write_png(folder / f"labelsTr/{case}.png", np.ones((4, 4), np.uint8))
        write_about(folder, channel_names={"0": "CT"}, labels={"background": 0, "it": 1})
    hit = find(tmp_path)["Dataset001_Own"]
    assert [c.name for c in hit.cases] == ["x"] and "left out" in hit.notes[-1]


def test_a_labelled_case_replaces_one_without_label():
    first, second = made(2, split="inference"), made(2)
    datasets.join(first, second)
    assert names(first.cases, "train") == ["c0", "c1"]


def test_amos_converted_to_nnunet_is_an_nnunet_folder(tmp_path):
    folder = tmp_path / "Dataset218_AMOS"
    for n in (1, 507):
        write_nifti(folder / f"imagesTr/amos_{n:04d}_0000.nii.gz", np.ones((4, 4, 4), np.int16))
        write_nifti(folder / f"labelsTr/amos_{n:04d}.nii.gz", np.ones((4, 4, 4), np.uint8))
    write_about(folder, channel_names={"0": "CT"}, labels={"background": 0, "spleen": 1})
    hits = find(tmp_path)
    assert list(hits) == ["Dataset218_AMOS"] and len(hits["Dataset218_AMOS"].cases) == 2


def test_modality_of_amos_is_in_the_id(tmp_path):
    for n in (1, 410, 499, 507, 600):
        for part in ("imagesTr", "labelsTr"):
            write_nifti(tmp_path / part / f"amos_{n:04d}.nii.gz", np.ones((4, 4, 4), np.int16))
    hits = find(tmp_path)
    ct, mri = (sorted(c.name for c in hits[n].cases) for n in ("amos_ct", "amos_mri"))
    assert ct == ["amos_0001", "amos_0410", "amos_0499"] and mri == ["amos_0507", "amos_0600"]


# ------------------------------------------------------------------------------------------------
# Splitting

def made(count, dataset="btcv", split="train", patient="p{}".format):
    """A `Found` of cases c0, c1, ... without files. patient: of each number."""
    cases = [datasets.Case(f"c{i}", patient(i), split, (), None) for i in range(count)]
    return Found(DATASETS[dataset], Path("x"), cases)


@pytest.mark.parametrize("dataset, patients, expected", [
    ("btcv", [f"img{i:04d}" for i in (*range(1, 11), *range(21, 41))], 9),
    ("brats_local", [f"BraTS-GLI-{i:05d}" for i in range(1251)], 251),
    ("ldct", [f"{k}{i:03d}" for k in "CLN" for i in range(50)], 33),
    ("chest_xray", [f"MCUCXR_{i:04d}_0" for i in range(138)]
     + [f"CHNCXR_{i:04d}_1" for i in range(566)], 39 + 161),
    ("msd_liver", [f"liver_{i}" for i in range(131)], 26)])
def test_cuts_of_the_papers_counts(dataset, patients, expected):
    for order in (patients, patients[::-1]):  # whatever the order of the files
        hit = made(len(patients), dataset, patient=order.__getitem__)
        datasets.settle(hit)
        test = [c.patient for c in hit.cases if c.split == "test"]
        assert len(test) == expected
        if dataset == "ldct":
            counts = {k: sum(t[0] == k for t in test) for k in "CLN"}
            assert counts == {"C": 11, "L": 11, "N": 11}
        elif dataset != "chest_xray":
            last = sorted(patients, key=natural)[-expected:]
            assert sorted(test, key=natural) == last


def test_btcv_is_cut_as_documented():
    hit = made(30, patient=lambda i: f"img{(i + 1 if i < 10 else i + 11):04d}")
    datasets.settle(hit)
    test = [c.patient for c in hit.cases if c.split == "test"]
    assert test == [f"img{i:04d}" for i in range(32, 41)]


@pytest.mark.parametrize("patients, test", [
    (["a"], []), (["a", "a"], []), (["a", "b"], ["b"]), (["b", "a", "b"], ["b"]),
    (["a", "b", "b"], ["b"]), (["p2", "p10", "p1"], ["p10"]), ([], [])])
def test_held_out_by_patient(patients, test):
    assert sorted(datasets.held_out(patients)) == test


def test_a_patient_on_the_border_is_trained_on():
    patients = [f"p{i // 2:02d}" for i in range(20)]  # two scans each; the last fifth is 4 scans
    assert datasets.held_out(patients) == {"p08", "p09"}
    assert datasets.held_out(patients[1:]) == {"p09"}  # 3 of 19


def test_one_patient_of_each_anatomy_still_leaves_a_test_case():
    hit = made(3, "ldct", patient=["C052", "L004", "N012"].__getitem__)
    datasets.settle(hit)
    assert [c.split for c in hit.cases] == ["train", "train", "test"]


def test_a_single_patient_is_never_held_out():
    hit = made(3, patient=lambda i: "one", split="test")
    datasets.settle(hit)
    assert {c.split for c in hit.cases} == {"train"}


def test_official_splits_fall_back_aloud():
    hit = made(10, "acdc")
    datasets.settle(hit)
    assert names(hit.cases, "test") == ["c8", "c9"]
    assert "no official test case is here: held out are 2 patients" in hit.notes[0]


def test_a_patient_of_both_parts_is_left_out_of_training():
    hit = made(4, "acdc", patient=lambda i: f"p{i % 3}")
    hit.cases[3].split = "test"  # p0, who is in training as c0
    datasets.settle(hit)
    assert [c.split for c in hit.cases] == ["inference", "train", "train", "test"]
    assert "c0" in hit.notes[0]


# ------------------------------------------------------------------------------------------------
# The table, and real files

def test_the_docs_have_the_table():
    page = (ROOT / "docs" / "datasets.md").read_text()
    shown = page.split("<!-- datasets -->")[1].split("<!-- /datasets -->")[0]
    assert shown.strip() == datasets.table().strip()


def test_every_row_of_the_table_is_complete():
    tasks = ("segmentation", "synthesis", "inpainting", "denoising", "detection")
    for name, d in DATASETS.items():
        assert name == d.name and d.title and d.region and d.split and d.licence and d.address
        assert callable(d.reader)
        assert d.task in tasks and bool(d.labels) == d.colored
        assert f"| `{name}` |" in datasets.table()
    assert len({line.count("|") for line in datasets.table().splitlines()}) == 1


REAL_COUNTS = {  # training, test, inference
    "acdc": (72, 28, 0), "la": (12, 3, 0), "brats_gli": (2, 0, 0), "brats_local": (0, 0, 1),
    "promise12": (1, 0, 0), "ldct": (1, 0, 0), "deeplesion": (40, 10, 0),
    "msd_hippocampus": (48, 12, 0), "msd_spleen": (1, 0, 0),
    "Dataset801_NerveUltrasound": (100, 20, 0), "Dataset802_MsT1ToFlair": (2, 1, 0)}


@pytest.mark.parametrize("name", REAL_COUNTS)
def test_real_files_are_listed_and_read(real_found, name):
    if name not in real_found:
        pytest.skip(f"{name} is not in ../shared/data/real")
    hit = real_found[name]
    counts = tuple(len(names(hit.cases, s)) for s in ("train", "test", "inference"))
    assert counts == REAL_COUNTS[name]
    patients = [{c.patient for c in hit.cases if c.split == s} for s in ("train", "test")]
    assert not patients[0] & patients[1]
    for case in [c for c in hit.cases if c.split != "inference"][::40]:
        if case.files[0].suffix == ".h5":
            pytest.importorskip("h5py", reason="h5py, which the UA-MT form needs, is not installed")
        arrays, index = prepare_case(case, hit.dataset)
        assert index["foreground"] and arrays["image"].std() > 1000
        if hit.dataset.colored:
            assert arrays["label"].max() <= len(hit.dataset.labels)
        else:
            assert arrays["label"].std() > 1000


def test_real_hounsfield_units(real_found):
    if not {"ldct", "deeplesion"} <= set(real_found):
        pytest.skip("no DICOM or DeepLesion in ../shared/data/real")
    pair = real_found["ldct"].cases[0].load()
    image, label = pair.image.array, pair.label.array
    assert image.shape == (512, 512, 4) and image.min() == -1024 and 1000 < label.max() < 3072
    assert np.median(label[(label > -50) & (label < 150)]) < 80  # soft tissue
    for case in real_found["deeplesion"].cases[::9]:
        check_boxes(real_found["deeplesion"].root, case)
        assert case.load().image.array.min() >= -1024


def test_real_brats_is_voided_in_the_mask_only(real_found):
    """The real validation case has t1n, t1n-voided and mask: with the mask as mask-healthy it is
    what a training case is."""
    if "brats_local" not in real_found:
        pytest.skip("brats_local is not in ../shared/data/real")
    voided, whole, _ = real_found["brats_local"].cases[0].files
    mask = voided.with_name(voided.name.replace("t1n-voided", "mask"))
    pair = datasets.load_inpainting(voided, whole, mask)
    scored = pair.valid == 1
    assert 0 < scored.mean() < 0.1 and (pair.image.array[scored] == 0).all()
    assert (pair.valid > 0).all()  # there is no other hole
    # outside of the mask the voided image is the image
    assert np.array_equal(pair.label.array, read_volume(whole).array)


def test_real_scans_are_found_and_read(real, tmp_path):
    hits = find(real)
    assert set(FIVE) <= set(hits)
    counts = tuple(len(hits[n].cases) for n in ("acdc", "la", "msd_hippocampus"))
    assert counts == (100, 15, 60)
    some = {n: Found(f.dataset, f.root, f.cases[:2]) for n, f in hits.items() if n in FIVE}
    assert prepare(some, tmp_path) == {}  # the first two cases of each
    for name, cases in Store(tmp_path).cases.items():
        assert all(c.foreground for c in cases), name


# ------------------------------------------------------------------------------------------------
# Prompts from these datasets

def test_single_slices_are_prompted_by_the_nearest_heights(filled):
    cases = filled.split("deeplesion", "train")
    assert all(c.height is not None for c in cases)
    target = cases[0]
    others = [c for c in cases if c.patient != target.patient]
    others.sort(key=lambda c: abs(c.height - target.height))
    near = data.prompt_cases(cases, target, nearest=4)
    assert [c.name for c in near] == [c.name for c in others[:4]]
    many = [StoredCase(None, str(i), str(i), "train", 1, [0], [[]], {}, "", i / 100)
            for i in range(100)]
    prompts = {data.evaluation_prompt(many, many[50], np.random.default_rng(i)).height
               for i in range(200)}
    assert prompts == {i / 100 for i in range(42, 59)} - {0.5}
    many[50].height = None
    assert len(data.prompt_cases(many, many[50])) == 99


def mean_iou(answer, truth, classes):
    """Of the classes that are in either of two stacks (K, H, W)."""
    scores = []
    for c in range(1, classes + 1):
        a, b = answer == c, truth == c
        if (a | b).any():
            scores.append((a & b).sum() / (a | b).sum())
    return np.mean(scores)


def test_copying_the_prompt_does_not_solve_the_stand_ins(filled):
    """By the paper's protocol, the matching prompt slice's label as it is scores at most 0.35 mIoU
    on every dataset."""
    for name, dataset in filled.datasets.items():
        if not dataset.colored:
            continue
        training, scores = filled.split(name, "train"), []
        for case in filled.split(name, "test"):
            truth = np.stack([case.read(k)[1] for k in case.foreground])
            for seed in range(3):
                rng = np.random.default_rng(seed)
                prompt = data.evaluation_prompt(training, case, rng)
                labels = np.stack([prompt.read(k)[1] for k in prompt.foreground])
                matched = [data.matching_slice(k, len(truth), len(labels))
                           for k in range(len(truth))]
                shown = torch.from_numpy(labels[matched])
                copied = resize_labels(shown, truth.shape[1:]).numpy()
                scores.append(mean_iou(copied, truth, len(dataset.labels)))
        assert np.mean(scores) <= 0.35, (name, np.mean(scores))


# ------------------------------------------------------------------------------------------------
# What is drawn from them

def test_brats_local_learns_nothing_of_the_hole_over_the_tumour(filled):
    only = Store(filled.root, ["brats_local"])
    samples = context(only, 64, 16, 4, objective="ar", seed=1)
    batch = batch_of(samples, *((0, i) for i in range(8)))
    labels, valid, recipe = batch.labels, batch.valid, Recipe()
    assert valid[:, 1].any() and not valid[:, 1].all()
    assert (valid[:, 1] > 0).float().mean() > 0.5  # what is to stay as it is
    model = mvg.from_config(mvg.Config(32, 4, 2, 4, image_size=64)).eval()

    def loss(labels):
        return LOSSES["ar"](model, batch, labels, recipe).mean().item()

    noise = torch.rand(labels[:, 1].shape, generator=torch.Generator().manual_seed(0))
    other, changed = labels.clone(), labels.clone()
    other[:, 1] = torch.where(valid[:, 1] > 0, labels[:, 1], noise)
    assert loss(labels) == loss(other) > 0
    changed[:, 1] = torch.where(valid[:, 1] > 0, 1 - labels[:, 1], labels[:, 1])
    assert loss(changed) != loss(labels)

    case = only.cases["brats_local"][0]
    _, truth, valid = case.read(case.foreground[0])
    spoiled = np.where(valid == 1, truth, np.float32(1) - truth)
    assert metrics.image_scores(spoiled, truth, valid == 1)[:2] == (0, metrics.MAX_PSNR)
    assert metrics.image_scores(spoiled, truth)[0] > 0.1


def test_prompts_are_of_the_same_kind_and_another_patient(filled):
    cases = filled.split("brats_gli", "train")
    samples = context(filled, 64, 16, 4)
    for i in range(60):
        at = i % len(cases)
        prompt, _ = samples.draw_prompt("brats_gli", at, 5, np.random.default_rng(i))
        assert prompt.kind == cases[at].kind and prompt.patient != cases[at].patient
    target = filled.split("brats_gli", "test")[1]
    prompts = [data.evaluation_prompt(cases, target, np.random.default_rng(i)) for i in range(40)]
    assert {p.kind for p in prompts} == {target.kind}
    assert len({p.name for p in prompts}) == len(cases) / 2
    alone = [c for c in cases if c.patient == "BraTS-GLI-00000"]
    samples.cases["brats_gli"] = alone
    prompt, _ = samples.draw_prompt("brats_gli", 0, 5, np.random.default_rng(0))
    assert prompt.kind == alone[0].kind


def test_every_dataset_is_drawn_at_its_share(sixteen, tmp_path):
    """Stand-ins and real scans below one root, 5,000 draws.

    Half are segmentation, and the datasets of a group are equally likely.
    """
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stand_ins").symlink_to(sixteen, target_is_directory=True)
    if REAL.is_dir():
        (tmp_path / "data" / "real").symlink_to(REAL, target_is_directory=True)
    every = find(tmp_path / "data")
    for hit in every.values():  # a few cases of each are enough to be drawn
        cases = [c for c in hit.cases if c.split == "train"]
        hit.cases = [c for c in cases if "mri_norm2" not in str(c.files[0])][:3]
    prepare(every, tmp_path / "store", quiet)
    samples = context(Store(tmp_path / "store"), 32, 8, 8)
    assert len(samples.names) == (19 if REAL.is_dir() else 16) and not samples.excluded
    draws = [samples.draw(step, i)[2:4] for step in range(1250) for i in range(4)]
    colored = [name for name, c in draws if c]
    others = [name for name, c in draws if not c]
    assert len(colored) / 5000 == pytest.approx(0.5, abs=0.03)
    for drawn, group in ((colored, samples.segmentation), (others, samples.others)):
        assert set(drawn) == set(group)
        share = 1 / len(group)
        for name in group:
            spread = 4 * (share / len(drawn)) ** 0.5
            assert drawn.count(name) / len(drawn) == pytest.approx(share, abs=spread)
