"""Every dataset's reader: on its stand-in (phantom.py), on real files where ../shared/data/real has them, and on files made here."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

import data
import eval as evaluation
import mvg
import readers
import train
from readers import DataError

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared/data/real"
quiet = lambda text: None


@pytest.fixture(scope="module")
def stand_ins(sixteen):
    return sixteen


@pytest.fixture(scope="module")
def found(stand_ins):
    return data.find(stand_ins)


@pytest.fixture(scope="module")
def store(found, tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    assert data.prepare(found, root, quiet) == {}
    return data.Store(root)


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip("no real files: ../shared/data/real is not there")
    return data.find(REAL)


def names(cases, split):
    return [c.name for c in cases if c.split == split]


def write_nifti(path, array, affine=None, dtype=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array.astype(dtype or array.dtype), np.eye(4) if affine is None else affine).to_filename(path)
    return path


def write_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Listing: names and splits, against the lists that phantom.py plants

LISTED = {
    "amos_ct": ("amos_0001 amos_0004 amos_0005 amos_0009 amos_0015", "amos_0008 amos_0013", ""),
    "amos_mri": ("amos_0507 amos_0508 amos_0510 amos_0514 amos_0600", "amos_0575 amos_0583", ""),
    "word": ("word_0002 word_0003 word_0004 word_0006 word_0009", "word_0001 word_0007", ""),
    "btcv": ("img0001 img0002 img0005 img0021 img0024", "img0035 img0038", ""),
    "microsegnet": ("microUS_train_01 microUS_train_02 microUS_train_03 microUS_train_05 microUS_train_08", "microUS_test_01 microUS_test_02", ""),
    "promise12": ("training_Case00 training_Case02 training_Case07 training_Case13 training_Case26", "test_Case00 test_Case01", "test_Case02"),
    "brats_local": ("BraTS-GLI-00000-000 BraTS-GLI-00002-000 BraTS-GLI-00003-000 BraTS-GLI-00005-000 BraTS-GLI-00005-001 BraTS-GLI-00006-000",
                    "BraTS-GLI-00008-000", "BraTS-GLI-00001-000"),
    "ldct": ("C052 L004 N012", "L006", ""),
    "chest_xray": ("CHNCXR_0001_0 CHNCXR_0004_0 CHNCXR_0010_0 CHNCXR_0327_1 MCUCXR_0001_0 MCUCXR_0002_0 MCUCXR_0003_0 MCUCXR_0005_0 "
                   "MCUCXR_0104_1 MCUCXR_0108_1", "CHNCXR_0330_1 MCUCXR_0141_1 MCUCXR_0150_1", "CHNCXR_0025_0"),
    "msd_liver": ("liver_0 liver_1 liver_2 liver_5 liver_10 liver_11", "liver_23", ""),
    "msd_lung": ("lung_001 lung_003 lung_004 lung_005 lung_006 lung_009", "lung_010", "lung_014"),
    "msd_spleen": ("spleen_2 spleen_3 spleen_6 spleen_8 spleen_9 spleen_10", "spleen_12", "")}


@pytest.mark.parametrize("name", LISTED)
def test_lists_and_splits_its_stand_in(found, name):
    for split, expected in zip(("train", "test", "inference"), LISTED[name]):
        assert sorted(names(found[name].cases, split)) == sorted(expected.split()), split


def test_all_sixteen_are_found(found):
    assert list(found) == sorted(data.DATASETS)


def test_acdc_la_brats_gli_and_deeplesion_are_listed(stand_ins, found):
    assert {c.patient for c in found["acdc"].cases if c.split == "test"} == {"patient101", "patient104"}
    assert "patient003_frame04" in names(found["acdc"].cases, "train")  # ED is not always frame 01
    assert len(found["acdc"].cases) == 14
    assert set(names(found["la"].cases, "test")) == {"4498CA6DZWELOXCBRYRF", "67W9VHOSUK9Z2UDA96WQ"}
    gli = found["brats_gli"].cases
    folders = {p.name for p in stand_ins.glob("*-GLI-*/**/BraTS-GLI-*") if p.is_dir()}
    assert sorted(c.name for c in gli) == sorted(f"{n}-{pair}" for n in folders for pair in ("t1c-t2w", "t2w-t1c"))
    assert {c.patient for c in gli if c.split == "test"} == {"BraTS-GLI-00001", "BraTS-GLI-00013"}
    assert {c.patient for c in found["deeplesion"].cases if c.split == "test"} == {f"{p:06d}" for p in (11, 13, 14, 17, 19, 20)}


def test_patients_never_part(found):
    for name, hit in found.items():
        train_, test_ = ({c.patient for c in hit.cases if c.split == s} for s in ("train", "test"))
        assert test_ and not train_ & test_, name
        assert len({c.name for c in hit.cases}) == len(hit.cases), name


def test_case_names_and_patients_of_the_repeaters(found):
    assert {c.patient for c in found["brats_local"].cases if "00005" in c.name} == {"BraTS-GLI-00005"}
    assert {c.patient for c in found["promise12"].cases if c.name.endswith("Case00")} == {"training_Case00", "test_Case00"}


def test_the_stand_ins_load_as_they_should(found):
    for name, hit in found.items():
        for case in hit.cases[::2]:
            if case.split != "inference":
                pair = case.load()
                assert pair.image.array.shape == pair.label.array.shape and pair.image.array.ndim == 3
                if hit.dataset.colored:
                    assert pair.label.array.dtype == np.uint8 and 0 < pair.label.array.max() <= len(hit.dataset.labels), case.name
                if hit.dataset.modality == "ct":
                    assert pair.image.array.min() < -900, case.name


@pytest.mark.parametrize("name", ["amos_ct", "amos_mri", "word", "btcv", "microsegnet", "acdc", "msd_liver", "msd_lung", "msd_spleen", "promise12", "la"])
def test_labels_are_the_files_numbers(found, name):
    """Against SimpleITK reading the label file that belongs to the image by the dataset's own naming."""
    case = found[name].cases[-1] if found[name].cases[-1].split != "inference" else found[name].cases[0]
    pair = case.load()
    image, label = (sitk.GetArrayFromImage(sitk.ReadImage(str(f))).T for f in case.files)
    assert np.allclose(pair.image.array, image, atol=1e-3)
    assert np.array_equal(pair.label.array, label > 0 if len(found[name].dataset.labels) == 1 else label)


def test_store_holds_every_case_once(found, store):
    for name, hit in found.items():
        assert {c.name for c in store.cases[name]} == {c.name for c in hit.cases if c.split != "inference"}
        assert all(c.foreground for c in store.cases[name]), name


def test_unchanged_cases_are_not_read_again(found, store, monkeypatch):
    monkeypatch.setattr(data, "write_case", lambda case, *rest: pytest.fail(f"{case.name} was read again"))
    data.prepare(found, store.root, quiet)


def test_slices_run_from_foot_to_head_and_axial(store):
    assert {c.index["axis"] for cases in store.cases.values() for c in cases} == {2}


# ---------------------------------------------------------------------------------------------------------------------
# Orientation

CODES = ("RAS", "LPS", "LAS", "RPI", "PSR", "SAL")


def marker():
    """(x, y, z) LPS array with a block at the patient's left, front, feet, and the affine; 5 mm slices of 1 mm pixels."""
    array = np.zeros((9, 11, 5), np.int16)
    array[6:8, 1:3, 0:2] = 700
    array[1, 9, 4] = 300
    return array, np.diag([-1.0, -1.0, 5.0, 1.0])


def reoriented(codes):
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
    array, affine = marker()
    return nibabel.Nifti1Image(array, affine).as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes)))


def test_every_orientation_gives_the_same_slices(tmp_path):
    array, affine = marker()
    expected = array.transpose(2, 1, 0)  # rows front to back, columns right to left, slices feet to head
    assert expected[0, 1, 6] == 700 and expected[4, 9, 1] == 300
    files = []
    for codes in CODES:
        reoriented(codes).to_filename(tmp_path / f"{codes}.nii.gz")
        stored = readers.read_volume(tmp_path / f"{codes}.nii.gz")
        image = sitk.GetImageFromArray(np.ascontiguousarray(stored.array.T))
        lps = readers.LPS_TO_RAS @ stored.affine
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist()), image.SetOrigin(lps[:3, 3].tolist()), image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        sitk.WriteImage(image, str(tmp_path / f"{codes}.mha")), sitk.WriteImage(image, str(tmp_path / f"{codes}.nrrd"))
        files += [tmp_path / f"{codes}{e}" for e in (".nii.gz", ".mha", ".nrrd")]
    for file in files:
        volume = readers.read_volume(file)
        cut = data.slicing(volume)
        assert cut.axis == 2 and np.array_equal(cut.cut(volume.array), expected), file.name
        assert np.array_equal(cut.restore(cut.cut(volume.array)), volume.array), file.name
    picture = readers.read_volume(write_png(tmp_path / "slice.png", expected[0].astype(np.uint16)))
    cut = data.slicing(picture)
    assert np.array_equal(cut.cut(picture.array)[0], expected[0])
    assert np.array_equal(cut.restore(cut.cut(picture.array)), picture.array)


def test_orientation_holds_down_to_the_store(tmp_path):
    """The marker in every orientation as one nnU-Net dataset, and through the DICOM reader."""
    folder = tmp_path / "Dataset001_Marker"
    for codes in CODES:
        image = reoriented(codes)
        for part, suffix, a in (("imagesTr", "_0000", image.get_fdata()), ("labelsTr", "", image.get_fdata() > 500)):
            write_nifti(folder / part / f"{codes}{suffix}.nii.gz", a, image.affine, np.int16)
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}, "labels": {"background": 0, "block": 1}}))
    hits = data.find(tmp_path)
    data.prepare(hits, tmp_path / "store", quiet)
    expected = marker()[0].transpose(2, 1, 0) == 700
    for case in data.Store(tmp_path / "store").cases["Dataset001_Marker"]:
        assert np.array_equal(np.load(case.folder / "label.npy"), expected), case.name
        assert np.array_equal(np.load(case.folder / "image.npy") == 65535, expected), case.name

    files = write_dicom(tmp_path / "series", marker()[0].transpose(2, 1, 0), order=(3, 0, 4, 1, 2))
    volume, heights = readers.read_series(files)
    assert np.array_equal(data.slicing(volume).cut(volume.array) == 700, expected) and heights == [-100, -95, -90, -85, -80]


def test_the_liver_is_on_the_left_of_the_picture_in_all_stand_ins(store):
    """Every stand-in shows the same anatomy, whatever its files' orientation: liver left, spleen right, spine below."""
    for name in ("amos_ct", "amos_mri", "word", "btcv"):
        labels = store.datasets[name].labels
        for case in store.cases[name]:
            stack = np.load(case.folder / "label.npy")
            column = {n: np.nonzero(stack == labels.index(n) + 1)[2].mean() for n in ("liver", "spleen")}
            assert column["liver"] < column["spleen"], (name, case.name)
            if name != "amos_mri":
                assert np.nonzero(stack == labels.index("liver") + 1)[0].mean() > len(stack) / 2 or name == "btcv", (name, case.name)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR"])
def test_microsegnet_slices_are_frames_whatever_the_header_says(tmp_path, codes):
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff
    frames = np.random.default_rng(0).integers(0, 255, (6, 5, 9), dtype=np.uint8)  # (frame, row, column)
    affine = np.linalg.inv(inv_ornt_aff(axcodes2ornt(codes), (9, 5, 6)))
    write_nifti(tmp_path / "train/micro_ultrasound_scans/microUS_train_01.nii.gz", frames.T, affine)
    write_nifti(tmp_path / "train/expert_annotations/expert_annotation_train_01.nii.gz", (frames.T > 99) * 255, affine, np.uint8)
    case, = readers.microsegnet(tmp_path)
    pair = case.load()
    cut = data.slicing(pair.image)
    assert np.array_equal(cut.cut(pair.image.array), frames) and np.array_equal(cut.cut(pair.label.array), frames > 99)
    assert cut.spacing[1:] == (0.033586, 0.033586)


# ---------------------------------------------------------------------------------------------------------------------
# Hounsfield units

def write_dicom(folder, hu, order=None, description="Full Dose Images", slope=1, intercepts=(-1024,), step=5.0, suffix=".dcm"):
    """(z, y, x) HU -> a file a slice, the lowest at -100 mm; order: the number in the name of every slice."""
    folder.mkdir(parents=True)
    files = []
    for k, number in enumerate(order or range(len(hu))):
        image = sitk.GetImageFromArray(hu[k].astype(np.float64 if slope != 1 else np.int16))
        intercept = intercepts[k % len(intercepts)]
        for key, value in {"0008|0060": "CT", "0008|103e": description, "0020|0032": f"-10\\-20\\{k * step - 100}", "0020|0037": "1\\0\\0\\0\\1\\0",
                           "0028|0030": "1\\1", "0028|1052": str(intercept), "0028|1053": str(slope), "0028|0100": "16", "0028|0101": "16",
                           "0028|0102": "15", "0028|0103": "1"}.items():
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
    """A row of known HU as DICOM (another intercept in every file), as NIfTI (slope, intercept), as a 16-bit picture + 32768."""
    row = np.broadcast_to(HU, (4, 6, 9))  # (z, y, x)
    write_dicom(tmp_path / "D/L001/1-1-2000/1.0-FULL DOSE images-1", row, intercepts=(-1024, -1000, 0))
    write_dicom(tmp_path / "D/L001/1-1-2000/1.1-low dose IMAGES-2", row, description="low dose IMAGES", intercepts=(0,))
    image = nibabel.Nifti1Image(((np.ascontiguousarray(row.T) + 1024) * 2).astype(np.uint16), np.diag([-1, -1, 5, 1]))
    image.header.set_slope_inter(0.5, -1024)
    (tmp_path / "B/Training/img").mkdir(parents=True)
    image.to_filename(tmp_path / "B/Training/img/img0001.nii.gz")
    write_nifti(tmp_path / "B/Training/label/label0001.nii.gz", (row.T > 0).astype(np.uint8), np.diag([-1, -1, 5, 1]))
    lesions(tmp_path / "L", [dict(File_name="000001_01_01_005.png", Bounding_boxes="2, 2, 3, 3")], picture=row[0] + 32768)
    for hit in data.find(tmp_path).values():
        arrays, index = data.prepare_case(hit.cases[0], hit.dataset)
        assert np.array_equal(arrays["image"][-1, -1], np.rint(UNIT * 65535)), hit.dataset.name
        assert index["scale"] == (-100, 200) and arrays["image"].shape[1:] == (6, 9)
    assert np.array_equal(data.find(tmp_path)["btcv"].cases[0].load().image.array[:, 0, 0], HU)
    assert np.array_equal(data.find(tmp_path)["ldct"].cases[0].load().label.array[:, 0, 0], HU)
    assert np.array_equal(data.find(tmp_path)["deeplesion"].cases[0].load().image.array[:, 0, 0], HU)


def test_dicom_with_a_slope(tmp_path):
    hu = np.arange(24, dtype=float).reshape(1, 4, 6) / 2 - 6
    volume, _ = readers.read_series(write_dicom(tmp_path / "s", hu, slope=0.5))
    assert np.array_equal(volume.array[:, :, 0].T, hu[0])


# ---------------------------------------------------------------------------------------------------------------------
# Low-dose CT

def test_ldct_pairs_by_description_and_sorts_by_position(stand_ins, found):
    hit = found["ldct"]
    assert hit.notes == ["1 patients have one dose only (GE scanners have no low dose images) and are left out"]
    for case in hit.cases:
        assert not any("rojection" in f.parent.name for f in case.files)
        low = [f for f in case.files if "low" in f.parent.name.lower()]
        heights = {}
        for f in low:  # independently: the tag, file by file
            reader = sitk.ImageFileReader()
            reader.SetFileName(str(f))
            image = reader.Execute()
            heights[float(reader.GetMetaData("0020|0032").split("\\")[2])] = sitk.GetArrayFromImage(image)[0]
        pair = case.load()
        stack = data.slicing(pair.image).cut(pair.image.array)
        assert np.array_equal(stack, np.stack([heights[z] for z in sorted(heights)]))
        noise = lambda v: np.abs(np.diff(v.array.astype(float), axis=0)).mean()
        assert noise(pair.image) > noise(pair.label), case.name


def test_ldct_refuses_doses_at_other_heights(tmp_path):
    hu = np.zeros((3, 4, 4))
    low, full = write_dicom(tmp_path / "a", hu), write_dicom(tmp_path / "b", hu, step=4.0)
    with pytest.raises(DataError, match="heights"):
        readers.load_series(low, full)
    with pytest.raises(DataError, match="2"):
        readers.load_series(low[:2], write_dicom(tmp_path / "c", hu))


def test_ldct_also_reads_mayo_2016(tmp_path):
    for part in ("full_1mm", "quarter_1mm", "full_3mm", "quarter_3mm"):
        write_dicom(tmp_path / "L067" / part, np.full((2, 4, 4), 10 if part == "full_1mm" else 20), description="", suffix=".IMA")
    cases, notes = readers.ldct(tmp_path)
    assert cases[0].load().label.array.max() == 10 and cases[0].load().image.array.max() == 20 and "several" in notes[0]


# ---------------------------------------------------------------------------------------------------------------------
# BraTS

def test_brats_local_has_a_truth_in_healthy_voxels_only(found, store):
    for case in found["brats_local"].cases:
        if case.split == "inference":
            continue
        pair = case.load()
        files = {f.name[len(case.name) + 1:-7]: np.asarray(nibabel.load(f).dataobj) for f in case.files}
        assert sorted(files) == ["mask-healthy", "t1n", "t1n-voided"]
        healthy = files["mask-healthy"] > 0
        assert healthy.any() and np.array_equal(pair.valid, healthy)
        assert np.array_equal(pair.label.array[healthy], files["t1n"][healthy])
        assert np.array_equal(pair.label.array[~healthy], files["t1n-voided"][~healthy])
        assert np.array_equal(pair.image.array, files["t1n-voided"])
    for case in store.cases["brats_local"]:
        images, labels, valid = (np.stack(a) for a in zip(*(case.read(k) for k in range(case.slices))))
        assert np.array_equal(images[~valid], labels[~valid])  # in one scale
        assert case.foreground == [k for k in range(case.slices) if valid[k].any()]


def test_brats_local_neither_trains_nor_scores_elsewhere(store):
    only = data.Store(store.root, ["brats_local"])
    episodes = data.Episodes(only, 64, 16, 4, objective="ar", first_term="off", seed=1)
    batch = [episodes[0, i] for i in range(2)]
    images, labels, valid = (torch.stack([b[k] for b in batch]) for k in ("images", "labels", "valid"))
    assert valid[:, 1].any() and not valid[:, 1].all()
    model = mvg.MVG(mvg.Config(32, 4, 2, 4, image_size=64)).eval()
    rng = torch.Generator().manual_seed(0)
    other = labels.clone()
    other[:, 1] = torch.where(valid[:, 1] > 0, labels[:, 1], torch.rand(labels[:, 1].shape, generator=rng))
    losses = [model(images, y, "ar", valid=valid)[0].item() for y in (labels, other)]
    assert losses[0] == losses[1] > 0
    changed = labels.clone()
    changed[:, 1] = torch.where(valid[:, 1] > 0, 1 - labels[:, 1], labels[:, 1])
    assert model(images, changed, "ar", valid=valid)[0].item() != losses[0]

    case = only.cases["brats_local"][0]
    image, truth, valid = case.read(case.foreground[0])
    spoiled = np.where(valid, truth, np.float32(1) - truth)
    assert evaluation.image_scores(spoiled, truth, valid)[:2] == (0, evaluation.MAX_PSNR)
    assert evaluation.image_scores(spoiled, truth)[0] > 0.1


def test_a_case_without_a_healthy_mask_is_for_inference_and_said(stand_ins, tmp_path, capsys):
    hits = data.find(stand_ins, ["brats_local"])
    data.prepare(hits, tmp_path)
    out = capsys.readouterr().out
    assert out.count("BraTS-GLI-00001-000: BraTS-GLI-00001-000-t1n.nii.gz, BraTS-GLI-00001-000-mask-healthy.nii.gz is missing") == 1
    assert not (tmp_path / "brats_local/BraTS-GLI-00001-000").exists()


def test_brats_pairs(stand_ins, store):
    hit = data.find(stand_ins, brats_pairs=["t1n:t2f"])["brats_gli"]
    assert {c.kind for c in hit.cases} == {"t1n->t2f"} and {f.name[-10:-7] for c in hit.cases for f in c.files} == {"t1n", "t2f"}
    case = next(c for c in data.find(stand_ins)["brats_gli"].cases if c.kind == "t2w->t1c")
    pair = case.load()
    assert pair.image.path.name.endswith("-t2w.nii.gz") and pair.label.path.name.endswith("-t1c.nii.gz")
    for bad in ("t1c", "t1c:t1c", "t1c:seg", "t1c:t2w:t2f", "t1:t2"):
        with pytest.raises(DataError, match="brats_pairs"):
            data.find(stand_ins, brats_pairs=[bad])
    assert train.parse(["--brats_pairs", "t1n:t2f", "t1c:t2w"])[0].brats_pairs == ["t1n:t2f", "t1c:t2w"]


def test_prompts_are_of_the_same_kind_and_another_patient(store):
    cases = store.split("brats_gli", "train")
    episodes = data.Episodes(store, 64, 16, 4)
    for i in range(60):
        rng = np.random.default_rng(i)
        at = i % len(cases)
        prompt, _ = episodes.draw_prompt(cases, at, 5, rng)
        assert prompt.kind == cases[at].kind and prompt.patient != cases[at].patient
    target = store.split("brats_gli", "test")[1]
    prompts = [data.evaluation_prompt(cases, target, np.random.default_rng(i)) for i in range(40)]
    assert {p.kind for p in prompts} == {target.kind} and len({p.name for p in prompts}) == len(cases) / 2
    alone = [c for c in cases if c.patient == "BraTS-GLI-00000"]
    assert episodes.draw_prompt(alone, 0, 5, np.random.default_rng(0))[0].kind == alone[0].kind


# ---------------------------------------------------------------------------------------------------------------------
# Chest X-ray, LA

def test_chest_masks_are_joined_and_resized(stand_ins, found):
    cases = {c.name: c for c in found["chest_xray"].cases}
    pair = cases["MCUCXR_0104_1"].load()
    left, right = (np.array(Image.open(stand_ins / f"MontgomerySet/ManualMask/{side}Mask/MCUCXR_0104_1.png")) > 0 for side in ("left", "right"))
    assert left.any() and right.any() and np.array_equal(pair.label.array[:, :, 0].T, left | right)
    small = np.array(Image.open(stand_ins / "Lung Segmentation/masks/CHNCXR_0010_0_mask.png")) > 0
    pair = cases["CHNCXR_0010_0"].load()  # its mask has half the size
    assert pair.label.array.shape == pair.image.array.shape and np.array_equal(pair.label.array[::2, ::2, 0].T, small)
    assert cases["CHNCXR_0004_0"].load().image.array.ndim == 3  # a color picture
    index = data.prepare_case(cases["CHNCXR_0004_0"], data.DATASETS["chest_xray"])[1]
    assert index["scale"] == (0, 255)


def test_overlapping_lungs_do_not_cancel(tmp_path):
    for place, mask in (("CXR_png", np.full((4, 4), 9)), ("ManualMask/leftMask", np.eye(4) * 255), ("ManualMask/rightMask", np.eye(4) * 255)):
        write_png(tmp_path / place / "MCUCXR_0001_0.png", mask.astype(np.uint8))
    assert np.array_equal(readers.chest_xray(tmp_path)[0].load().label.array[:, :, 0], np.eye(4))


def test_the_uamt_form_of_la(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py", reason="h5py, which the UA-MT form needs, is not installed")
    rng, places = np.random.default_rng(0), ["AAA", "BBB", "CCC"]
    folder = tmp_path / "2018LA_Seg_Training Set"
    for name in places:
        (folder / name).mkdir(parents=True)
        with h5py.File(folder / name / "mri_norm2.h5", "w") as f:
            f["image"], f["label"] = rng.standard_normal((7, 5, 4)).astype(np.float32), (rng.random((7, 5, 4)) > 0.5).astype(np.uint8)
    (tmp_path / "test.list").write_text("BBB\n")
    hit = data.find(tmp_path)["la"]
    assert names(hit.cases, "test") == ["BBB"] and names(hit.cases, "train") == ["AAA", "CCC"]
    pair = hit.cases[0].load()
    with h5py.File(folder / "AAA/mri_norm2.h5") as f:
        assert np.array_equal(pair.image.array, f["image"][()]) and np.array_equal(pair.label.array, f["label"][()])
    assert np.allclose(np.abs(np.linalg.det(pair.image.affine[:3, :3])), 0.625 ** 3)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match="pip install h5py"):
        hit.cases[0].load()


def test_la_scans_with_the_same_mask_are_one_patient(tmp_path):
    for name, value in (("A", 1), ("B", 2), ("C", 1)):
        for file, array in (("lgemri", np.arange(24)), ("laendo", np.full(24, 255 * (value == 1)))):
            (tmp_path / "Training Set" / name).mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(array.reshape(2, 3, 4).astype(np.uint8)), str(tmp_path / "Training Set" / name / f"{file}.nrrd"))
    a, b, c = readers.la(tmp_path)
    assert a.patient == c.patient != b.patient
    assert np.allclose(np.linalg.norm(a.load().image.affine[:3, :3], axis=0), 0.625) and a.load().label.array.max() == 1


# ---------------------------------------------------------------------------------------------------------------------
# DeepLesion

def lesions(folder, rows, picture=None):
    """A DeepLesion folder with these rows; every column that they lack is empty."""
    columns = ["File_name", "Bounding_boxes", "Normalized_lesion_location", "Possibly_noisy", "Spacing_mm_px_", "Train_Val_Test"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "DL_info.csv", "w", newline="") as handle:
        table = csv.DictWriter(handle, columns)
        table.writeheader()
        table.writerows({"Bounding_boxes": "3, 4, 9, 8", "Train_Val_Test": 1, **row} for row in rows)
    for row in rows:
        name = row["File_name"]
        if "/" not in name and "\\" not in name and not row.get("missing"):
            write_png(folder / "Images_png" / name[:12] / name[13:], (np.full((16, 20), 32768) if picture is None else picture).astype(np.uint16))
    return folder


def check_boxes(root, case):
    """Painted pixels lie within one pixel of a box of the table, and along every line of it: an independent reading."""
    pair = case.load()
    image, label = (v.array[:, :, 0].T.astype(int) for v in (pair.image, pair.label))
    with open(root / "DL_info.csv", newline="") as handle:
        rows = [r for r in csv.DictReader(handle) if r["File_name"] == case.name + ".png" and r["Possibly_noisy"] != "1"]
    assert rows
    ys, xs = np.mgrid[:image.shape[0], :image.shape[1]]
    near = np.zeros(image.shape, bool)
    for row in rows:
        x1, y1, x2, y2 = (float(v) - 1 for v in row["Bounding_boxes"].split(","))
        across, along = (xs >= x1 - 1) & (xs <= x2 + 1), (ys >= y1 - 1) & (ys <= y2 + 1)
        sides = [(np.abs(xs - x) <= 1) & along for x in (x1, x2)] + [(np.abs(ys - y) <= 1) & across for y in (y1, y2)]
        for side in sides:
            near |= side
        for side, axis in zip(sides, (1, 1, 0, 0)):  # every row, or column, of a side has its two pixels
            painted, inner = ((label == 200) & side).sum(axis), (side & across & along).any(axis)
            assert (painted[inner][1:-1] >= 2).all()
    assert (label[~near] == image[~near]).all() and ((label == image) | (label == 200)).all() and (label != image).any()
    assert np.array_equal(image + 32768, np.array(Image.open(case.files[0])).astype(int))


def test_deeplesion_boxes_are_within_a_pixel_of_the_table(stand_ins, found):
    assert any(len(c.load.keywords["boxes"]) > 1 for c in found["deeplesion"].cases)
    for case in found["deeplesion"].cases:
        check_boxes(stand_ins / "DeepLesion", case)


def test_deeplesion_drops_noisy_rows_and_says_how_many(stand_ins, found):
    with open(stand_ins / "DeepLesion/DL_info.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    noisy = [r for r in rows if r["Possibly_noisy"] == "1"]
    assert noisy and f"{len(noisy)} lesions marked Possibly_noisy are dropped" in found["deeplesion"].notes
    assert {c.name + ".png" for c in found["deeplesion"].cases} == {r["File_name"] for r in rows} - {r["File_name"] for r in noisy}


def test_deeplesion_box_of_a_known_table(tmp_path):
    root = lesions(tmp_path, [dict(File_name="000001_01_01_005.png", Bounding_boxes="3, 4, 9.5, 8", Normalized_lesion_location="0.1, 0.2, 0.4"),
                              dict(File_name="000001_01_01_005.png", Bounding_boxes="-5, 12, 4, 40", Normalized_lesion_location="0.1, 0.2, 0.6"),
                              dict(File_name="000001_01_01_005.png", Bounding_boxes="1, 1, 20, 16", Possibly_noisy=1)])
    (case,), notes = readers.deeplesion(root)
    check_boxes(root, case)
    label = case.load().label.array[:, :, 0].T
    assert label[3:5, 2:10].tolist() == [[200] * 8] * 2 and label[5, 2:10].tolist() == [200, 200, 0, 0, 0, 0, 200, 200]  # 1-based: x 3 is column 2
    assert label[14, 0:6].tolist() == [0, 0, 0, 200, 200, 0] and label[11, 0:6].tolist() == [200] * 5 + [0]  # cut off by the edge
    assert case.load().boxes == ((2, 3, 9, 8), (0, 11, 4, 15))  # what is painted, first to last
    assert data.prepare_case(case, data.DATASETS["deeplesion"])[1]["boxes"] == [[3, 2, 8, 9], [11, 0, 15, 4]]  # top, left, bottom, right
    assert case.height == pytest.approx(0.5) and notes == ["1 lesions marked Possibly_noisy are dropped"]


def test_deeplesion_splits(tmp_path):
    row = lambda patient, part, **more: dict(File_name=f"{patient:06d}_01_01_{len(more) + 1:03d}.png", Train_Val_Test=part, **more)
    root = lesions(tmp_path, [row(1, 1), row(2, 2), row(3, 3), row(4, ""), row(5, ""), row(6, 1), row(6, 3, Possibly_noisy=0), row(7, ""),
                              row(7, 1, Possibly_noisy=0)])
    cases, notes = readers.deeplesion(root)
    assert {c.patient[-1] for c in cases if c.split == "test"} == {"2", "3", "5", "6"}
    assert {c.patient[-1] for c in cases if c.split == "train"} == {"1", "4", "7"}
    assert notes == ["1 patients have slices of both train and test in the table and count as test"]
    (root / "Images_png/000001_01_01/001.png").unlink()
    assert readers.deeplesion(root)[1][0] == "1 key slices have no picture here and are left out"


@pytest.mark.parametrize("name", ["../../000001_01_01_109.png", "/etc/000001_01_01_109.png", "000001_01_01_../secret.png", "..\\000001_01_01_1.png",
                                  "000001_01_01/109.png", "", "000001_01_01_109.png/../../x.png"])
def test_deeplesion_names_cannot_leave_the_root(tmp_path, name):
    root = lesions(tmp_path / "DeepLesion", [dict(File_name="000001_01_01_109.png"), dict(File_name=name)] if name and "/" in name or "\\" in name
                   else [dict(File_name="000001_01_01_109.png")])
    if not name:
        with open(root / "DL_info.csv", "a") as handle:
            handle.write(',"1, 2, 3, 4",,,,1\n')
    with pytest.raises(DataError, match="line 3 names"):
        data.find(tmp_path)


@pytest.mark.parametrize("row", [dict(Bounding_boxes="1, 2, 3"), dict(Bounding_boxes="a, b, c, d"), dict(Train_Val_Test="7")])
def test_deeplesion_broken_rows_are_named(tmp_path, row):
    root = lesions(tmp_path, [dict(File_name="000001_01_01_109.png", **row)])
    with pytest.raises(DataError, match="DL_info.csv line 2 cannot be read"):
        readers.deeplesion(root)


def test_deeplesion_of_8_bits_is_refused(tmp_path):
    root = lesions(tmp_path, [dict(File_name="000001_01_01_109.png")])
    write_png(root / "Images_png/000001_01_01/109.png", np.zeros((16, 20), np.uint8))
    with pytest.raises(DataError, match="8 bits"):
        readers.deeplesion(root)[0][0].load()


def test_single_slices_are_prompted_by_the_nearest_heights(store):
    cases = store.split("deeplesion", "train")
    assert all(c.height is not None for c in cases)
    target = cases[0]
    others = sorted((c for c in cases if c.patient != target.patient), key=lambda c: abs(c.height - target.height))
    near = data.prompt_cases(cases, target, nearest=4)
    assert [c.name for c in near] == [c.name for c in others[:4]]
    many = [data.StoredCase(None, str(i), str(i), "train", 1, [0], [[]], {}, "", i / 100) for i in range(100)]
    prompts = {data.evaluation_prompt(many, many[50], np.random.default_rng(i)).height for i in range(200)}
    assert prompts == {i / 100 for i in range(42, 59)} - {0.5}
    many[50].height = None
    assert len(data.prompt_cases(many, many[50])) == 99


# ---------------------------------------------------------------------------------------------------------------------
# dataset.json

def decathlon(folder, image="./imagesTr/a_1.nii.gz", label="./labelsTr/a_1.nii.gz", **more):
    for n in range(5):
        for part in ("imagesTr", "labelsTr"):
            write_nifti(folder / part / f"a_{n}.nii.gz", np.ones((4, 4, 4), np.uint8))
    entries = [{"image": image, "label": label}] + [{"image": f"./imagesTr/a_{n}.nii.gz", "label": f"./labelsTr/a_{n}.nii.gz"} for n in (10, 2, 3, 4)]
    (folder / "dataset.json").write_text(json.dumps({"name": "Any", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"}, "training": entries, **more}))
    return folder


@pytest.mark.parametrize("entry", ["../secret.nii.gz", "/etc/passwd", "imagesTr/../../x.nii.gz", 7, ["x"]])
def test_dataset_json_cannot_leave_its_folder(tmp_path, entry):
    for key in ("image", "label"):
        decathlon(tmp_path / "Task99", **{key: entry})
        with pytest.raises(DataError, match="outside its folder"):
            data.find(tmp_path)


def test_dataset_json_name_cannot_leave_the_store(tmp_path):
    decathlon(tmp_path / "in/Task99", name="../../LEFT ATRIUM")
    assert list(data.find(tmp_path / "in")) == ["msd__left_atrium"]


def test_dataset_json_of_strings_is_a_clear_error(tmp_path):
    decathlon(tmp_path / "Task99", training=["./imagesTr/a_1.nii.gz"])
    with pytest.raises(DataError, match="needs an image and a label"):
        data.find(tmp_path)


def test_any_decathlon_task_and_four_channels(tmp_path):
    folder = decathlon(tmp_path / "Task05_Any")
    array = np.stack([np.full((4, 4, 4), 3), np.full((4, 4, 4), 8)], -1).astype(np.int16)
    write_nifti(folder / "imagesTr/a_1.nii.gz", array)
    hit = data.find(tmp_path)["msd_any"]
    assert [c.name for c in hit.cases] == ["a_1", "a_2", "a_3", "a_4", "a_10"] and names(hit.cases, "inference") == ["a_10"]
    assert names(hit.cases, "test") == ["a_4"]  # the last of those that are there
    assert hit.cases[0].load().image.array.max() == 3


def test_symbolic_links_inside_a_dataset_are_followed(tmp_path):
    folder = decathlon(tmp_path / "in/Task99")
    (folder / "imagesTr").rename(tmp_path / "elsewhere")
    (folder / "imagesTr").symlink_to(tmp_path / "elsewhere")
    assert len(data.find(tmp_path / "in")["msd_any"].cases) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Finding, joining, splitting

def made(count, dataset="btcv", split="train", patient=lambda i: f"p{i}", **row):
    cases = [readers.Case(f"c{i}", patient(i), split, (), None) for i in range(count)]
    return data.Found(data.DATASETS[dataset], Path("x"), cases)


@pytest.mark.parametrize("dataset, patients, expected", [
    ("btcv", [f"img{i:04d}" for i in (*range(1, 11), *range(21, 41))], 9),
    ("brats_local", [f"BraTS-GLI-{i:05d}" for i in range(1251)], 251),
    ("ldct", [f"{k}{i:03d}" for k in "CLN" for i in range(50)], 33),
    ("chest_xray", [f"MCUCXR_{i:04d}_0" for i in range(138)] + [f"CHNCXR_{i:04d}_1" for i in range(566)], 39 + 161),
    ("msd_liver", [f"liver_{i}" for i in range(131)], 26)])
def test_cuts_of_the_papers_counts(dataset, patients, expected):
    for order in (patients, patients[::-1]):  # the same on every machine, whatever the order of the files
        hit = made(len(patients), dataset, patient=lambda i: order[i])
        data.settle(hit)
        test = [c.patient for c in hit.cases if c.split == "test"]
        assert len(test) == expected
        if dataset != "ldct" and dataset != "chest_xray":
            assert sorted(test, key=readers.natural) == sorted(patients, key=readers.natural)[-expected:]
        elif dataset == "ldct":
            assert {k: sum(t[0] == k for t in test) for k in "CLN"} == {"C": 11, "L": 11, "N": 11}


def test_btcv_is_cut_as_documented():
    hit = made(30, patient=lambda i: f"img{(i + 1 if i < 10 else i + 11):04d}")
    data.settle(hit)
    assert [c.patient for c in hit.cases if c.split == "test"] == [f"img{i:04d}" for i in range(32, 41)]


@pytest.mark.parametrize("patients, test", [(["a"], []), (["a", "a"], []), (["a", "b"], ["b"]), (["b", "a", "b"], ["b"]), (["a", "b", "b"], ["b"]),
                                            (["p2", "p10", "p1"], ["p10"]), ([], [])])
def test_held_out_by_patient(patients, test):
    assert sorted(readers.held_out(patients)) == test


def test_a_patient_on_the_border_is_trained_on():
    patients = [f"p{i // 2:02d}" for i in range(20)]  # two scans each; the last fifth is 4 scans
    assert readers.held_out(patients) == {"p08", "p09"}
    assert readers.held_out(patients[1:]) == {"p09"}  # 3 of 19


def test_one_patient_of_each_anatomy_still_leaves_a_test_case():
    hit = made(3, "ldct", patient=lambda i: ["C052", "L004", "N012"][i])
    data.settle(hit)
    assert [c.split for c in hit.cases] == ["train", "train", "test"]


def test_a_single_patient_is_never_held_out():
    hit = made(3, patient=lambda i: "one", split="test")
    data.settle(hit)
    assert {c.split for c in hit.cases} == {"train"}


def test_official_splits_fall_back_aloud():
    hit = made(10, "acdc")
    data.settle(hit)
    assert names(hit.cases, "test") == ["c8", "c9"] and "no official test case is here: held out are 2 patients" in hit.notes[0]


def test_a_patient_of_both_parts_is_left_out_of_training():
    hit = made(4, "acdc", patient=lambda i: f"p{i % 3}")
    hit.cases[3].split = "test"  # p0, who is in training as c0
    data.settle(hit)
    assert [c.split for c in hit.cases] == ["inference", "train", "train", "test"] and "c0" in hit.notes[0]


def test_parts_of_a_dataset_are_joined_and_copies_are_not(stand_ins, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ACDC").symlink_to(stand_ins / "ACDC")
    hit = data.find(tmp_path)["acdc"]
    assert len(hit.cases) == 14 and "14 cases of" in hit.notes[0] and "left out" in hit.notes[0]
    chest = data.find(stand_ins)["chest_xray"]
    assert len({c.files[0].parent for c in chest.cases}) == 2 and any("2 cases of" in n and "left out" in n for n in chest.notes)


def test_two_folders_of_a_users_own_dataset_are_not_joined(tmp_path):
    for place, case in (("a", "x"), ("b", "y")):
        folder = tmp_path / place / "Dataset001_Own"
        write_png(folder / f"imagesTr/{case}_0000.png", np.ones((4, 4), np.uint8)), write_png(folder / f"labelsTr/{case}.png", np.ones((4, 4), np.uint8))
        (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "it": 1}}))
    hit = data.find(tmp_path)["Dataset001_Own"]
    assert [c.name for c in hit.cases] == ["x"] and "left out" in hit.notes[0]


def test_a_labelled_case_replaces_one_without_label():
    first, second = made(2, split="inference"), made(2)
    data.join(first, second)
    assert names(first.cases, "train") == ["c0", "c1"]


def test_amos_converted_to_nnunet_is_an_nnunet_folder(tmp_path):
    folder = tmp_path / "Dataset218_AMOS"
    for n in (1, 507):
        write_nifti(folder / f"imagesTr/amos_{n:04d}_0000.nii.gz", np.ones((4, 4, 4), np.int16)), write_nifti(folder / f"labelsTr/amos_{n:04d}.nii.gz", np.ones((4, 4, 4), np.uint8))
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "spleen": 1}}))
    hits = data.find(tmp_path)
    assert list(hits) == ["Dataset218_AMOS"] and len(hits["Dataset218_AMOS"].cases) == 2


def test_modality_of_amos_is_in_the_id(tmp_path):
    for n in (1, 410, 499, 507, 600):
        for part in ("imagesTr", "labelsTr"):
            write_nifti(tmp_path / part / f"amos_{n:04d}.nii.gz", np.ones((4, 4, 4), np.int16))
    hits = data.find(tmp_path)
    assert sorted(c.name for c in hits["amos_ct"].cases) == ["amos_0001", "amos_0410", "amos_0499"]
    assert sorted(c.name for c in hits["amos_mri"].cases) == ["amos_0507", "amos_0600"]


# ---------------------------------------------------------------------------------------------------------------------
# The table, and real files

def test_readme_has_the_table():
    readme = (ROOT / "README.md").read_text() if (ROOT / "README.md").is_file() else ""
    if "<!-- datasets -->" not in readme:
        pytest.skip("README.md has no <!-- datasets --> mark yet")
    assert readme.split("<!-- datasets -->")[1].split("<!-- /datasets -->")[0].strip() == data.table().strip()


def test_every_row_of_the_table_is_complete():
    for name, d in data.DATASETS.items():
        assert name == d.name and d.title and d.region and d.split and d.licence and d.address and callable(d.reader)
        assert d.task in ("segmentation", "synthesis", "inpainting", "denoising", "detection") and bool(d.labels) == d.colored
        assert f"| `{name}` |" in data.table()
    assert len({line.count("|") for line in data.table().splitlines()}) == 1


REAL_COUNTS = {"acdc": (72, 28, 0), "la": (12, 3, 0), "brats_gli": (2, 0, 0), "brats_local": (0, 0, 1), "promise12": (1, 0, 0), "ldct": (1, 0, 0),
               "deeplesion": (40, 10, 0), "msd_hippocampus": (48, 12, 0), "msd_spleen": (1, 0, 0), "Dataset801_NerveUltrasound": (100, 20, 0),
               "Dataset802_MsT1ToFlair": (2, 1, 0)}


@pytest.mark.parametrize("name", REAL_COUNTS)
def test_real_files_are_listed_and_read(real, name):
    if name not in real:
        pytest.skip(f"{name} is not in ../shared/data/real")
    hit = real[name]
    assert tuple(len(names(hit.cases, s)) for s in ("train", "test", "inference")) == REAL_COUNTS[name]
    patients = [{c.patient for c in hit.cases if c.split == s} for s in ("train", "test")]
    assert not patients[0] & patients[1]
    for case in [c for c in hit.cases if c.split != "inference"][::40]:
        if case.files[0].suffix == ".h5":
            pytest.importorskip("h5py", reason="h5py, which the UA-MT form needs, is not installed")
        arrays, index = data.prepare_case(case, hit.dataset)
        assert index["foreground"] and arrays["image"].std() > 1000
        assert arrays["label"].max() <= len(hit.dataset.labels) if hit.dataset.colored else arrays["label"].std() > 1000


def test_real_hounsfield_units(real):
    if not {"ldct", "deeplesion"} <= set(real):
        pytest.skip("no DICOM or DeepLesion in ../shared/data/real")
    pair = real["ldct"].cases[0].load()
    assert pair.image.array.shape == (512, 512, 4) and pair.image.array.min() == -1024 and 1000 < pair.label.array.max() < 3072
    assert np.median(pair.label.array[(pair.label.array > -50) & (pair.label.array < 150)]) < 80  # soft tissue
    for case in real["deeplesion"].cases[::9]:
        check_boxes(real["deeplesion"].root, case)
        assert case.load().image.array.min() >= -1024


def test_real_brats_is_voided_in_the_mask_only(real):
    """The real validation case has t1n, t1n-voided and mask: with the mask as mask-healthy it is what a training case is."""
    if "brats_local" not in real:
        pytest.skip("brats_local is not in ../shared/data/real")
    voided, whole, _ = real["brats_local"].cases[0].files
    mask = voided.with_name(voided.name.replace("t1n-voided", "mask"))
    pair = readers.load_inpainting(voided, whole, mask)
    assert 0 < pair.valid.mean() < 0.1 and (pair.image.array[pair.valid] == 0).all()
    assert np.array_equal(pair.label.array, readers.read_volume(whole).array)  # outside of the mask the voided image is the image


def test_every_dataset_is_drawn_at_its_share(stand_ins, tmp_path):
    """Stand-ins and real scans below one root, 5,000 draws: half are segmentation, datasets of a group are equally likely."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stand_ins").symlink_to(stand_ins, target_is_directory=True)
    if REAL.is_dir():
        (tmp_path / "data" / "real").symlink_to(REAL, target_is_directory=True)
    found = data.find(tmp_path / "data")
    for hit in found.values():  # a few cases of each are enough to be drawn
        hit.cases = [c for c in hit.cases if c.split == "train" and "mri_norm2" not in str(c.files[0])][:3]
    data.prepare(found, tmp_path / "store", quiet)
    store = data.Store(tmp_path / "store")
    episodes = data.Episodes(store, 32, 8, 8)
    assert len(episodes.names) == (19 if REAL.is_dir() else 16) and not episodes.excluded
    draws = [episodes.draw(step, i)[2:4] for step in range(1250) for i in range(4)]
    colored = [name for name, c in draws if c]
    others = [name for name, c in draws if not c]
    assert len(colored) / 5000 == pytest.approx(0.5, abs=0.03)
    for names, group in ((colored, True), (others, False)):
        assert set(names) == set(episodes.groups[group])
        for name in set(names):
            share = 1 / len(episodes.groups[group])
            assert names.count(name) / len(names) == pytest.approx(share, abs=4 * (share / len(names)) ** 0.5)


def test_copying_the_prompt_does_not_solve_the_stand_ins(store):
    """By the protocol of eval.py, the matching prompt slice's label as it is scores at most 0.35 mIoU on every dataset."""
    for name, dataset in store.datasets.items():
        if not dataset.colored:
            continue
        training, scores = store.split(name, "train"), []
        for case in store.split(name, "test"):
            for seed in range(3):
                prompt = data.evaluation_prompt(training, case, np.random.default_rng(seed))
                _, truth, _ = evaluation.read_slices(case, case.foreground)
                _, labels, _ = evaluation.read_slices(prompt, prompt.foreground)
                matched = [data.matching_slice(k, len(truth), len(labels)) for k in range(len(truth))]
                copied = data.resize_labels(torch.from_numpy(labels[matched]), truth.shape[1:]).numpy()
                found = evaluation.overlap(copied, truth, range(1, len(dataset.labels) + 1))
                scores.append(np.mean([iou for iou, _ in found.values()]))
        assert np.mean(scores) <= 0.35, (name, np.mean(scores))
