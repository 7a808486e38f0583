"""Native files -> arrays: one short function a dataset, straight from its download, nothing to convert or rename.

A reader is given a folder and answers with the folder's cases, or with None where the folder is not its dataset: it
knows the dataset by its own marks, whatever the folder around it is called. Where it has to pass something over it answers
with (cases, notes), a note being one line that says what and how much of it. It lists; no image is read until a case's
`load()` is called, which returns a `Pair` of volumes. The layouts are those of the datasets' pages (README, "Datasets").

Splits: a reader says train or test as the dataset's own folders or tables do, train where they say nothing. A case that
lacks a file gets the split "inference". What remains to be cut, `data.settle` cuts by the rule of the dataset's row.

To add a dataset: write such a function, then a row in `data.DATASETS`. A folder in nnU-Net or Medical Segmentation
Decathlon form needs neither.

nibabel, SimpleITK, Pillow and h5py are imported where they are used: a machine that trains from a prepared store needs none.
"""

import csv
import hashlib
import json
import logging
import os
import re
import sys
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np

NIFTI, ITK, PICTURE = (".nii", ".nii.gz"), (".mha", ".mhd", ".nrrd", ".nhdr"), (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
EXTENSIONS = NIFTI + ITK + PICTURE
DICOM = (".dcm", ".ima")
MAX_VOXELS = 2 ** 31  # larger claims are taken for a broken header
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class DataError(ValueError):
    """Something is wrong with a file. The message is one line: the file, the value, the fix."""


@dataclass
class Volume:
    """An array in the file's own axis order and the geometry to write another like it."""
    array: np.ndarray   # (X, Y, Z); a picture of H rows and W columns is (W, H, 1)
    affine: np.ndarray  # (4, 4) voxel -> world in mm, RAS+ (nibabel's convention)
    path: Path
    kind: str           # nifti | itk | picture | h5
    header: object = None  # nibabel header, or the SimpleITK image
    shape: tuple = None    # as stored, where that is not three axes
    eight_bit: bool = False  # stored as uint8: 0..255 is its natural range
    note: str = ""           # what was decided in reading it


@dataclass
class Pair:
    image: Volume
    label: Volume
    valid: np.ndarray = None  # same shape, True where the label has a truth; None: everywhere
    problems: list = field(default_factory=list)  # what was wrong with the files and has been mended, for the doctor
    notes: list = field(default_factory=list)     # what else was decided
    boxes: tuple = ()         # of a picture (X, Y): (first x, first y, last x, last y) of every box drawn into the label


@dataclass
class Case:
    name: str      # unique in its dataset
    patient: str   # cases of one patient never part between training and test, nor prompt each other
    split: str     # train | test | inference (no truth: neither trained on nor scored)
    files: tuple   # what `load` reads, to notice when it changes
    load: Callable = field(repr=False)  # () -> Pair; raises DataError
    kind: str = ""         # which of several tasks, such as "t1c->t2w": prompts are of the same kind
    height: float = None   # of a single slice in the body, 0..1: prompts are of the nearest heights


# ---------------------------------------------------------------------------------------------------------------------
# One file

def extension(path):
    """The known extension of a path, lower case with its dot (".nii.gz" counts as one), or ""."""
    name = Path(path).name.lower()
    return next((e for e in sorted(EXTENSIONS, key=len, reverse=True) if name.endswith(e)), "")


def stem(path):
    """File name without its known extension: "a.nii.gz" -> "a"."""
    return Path(path).name[:len(Path(path).name) - len(extension(path))]


def shape_text(shape):
    return "x".join(str(n) for n in shape)


def read_volume(path, channel=None, mask=False):
    """Read one NIfTI, MetaImage, NRRD or picture file as a `Volume`; integers stay integers, scaled data is float32.

    channel: which volume of a 4-D file; None refuses 4-D. Color pictures become gray; as a mask, a palette picture keeps its
    indices and a 1-bit picture its 0 and 1.
    Raises DataError for a missing, unreadable, 4-D, non-finite or empty file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file: check the path")
    kind = extension(path)
    read = _read_nifti if kind in NIFTI else _read_itk if kind in ITK or path.suffix.lower() in DICOM else \
        _read_picture if kind in PICTURE else None
    if read is None:
        raise DataError(f"{path} is of an unknown kind {path.suffix or '(no extension)'!r}: pass one of {' '.join(EXTENSIONS)}")
    try:
        with quiet():
            volume = read(path, channel, mask)
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{path} does not fit in memory: crop or resample it") from None
    except (OSError, EOFError, zlib.error, RuntimeError, ValueError, TypeError, KeyError, IndexError, OverflowError,
            SyntaxError) as error:
        text = " ".join(str(error).split())[-100:] or type(error).__name__
        raise DataError(f"{path} cannot be read ({text}): the file is damaged or cut short, fetch it again") from None
    except Exception as error:  # nibabel has its own exception types
        raise DataError(f"{path} cannot be read ({type(error).__name__}): the file is damaged, fetch it again") from None
    if volume.array.size == 0:
        raise DataError(f"{path} is empty ({shape_text(volume.array.shape)}): pass an image with voxels")
    if volume.array.dtype.kind == "f" and not np.isfinite(volume.array).all():
        bad = int((~np.isfinite(volume.array)).sum())
        raise DataError(f"{path} has {bad} voxels that are NaN or infinite: replace them, for example by the background value")
    return volume


def read_image(path, series=None):
    """Read a file as `read_volume` does, or a folder with a DICOM series as one volume that is written as NIfTI, in HU where it is CT.

    series: number or UID of one of several. Raises DataError for a folder without a series, with several and none chosen, or with gaps.
    """
    path = Path(path)
    if not path.is_dir():
        return read_volume(path)
    import nibabel
    import SimpleITK as sitk
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    with quiet():
        names = {uid: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), uid) for uid in sorted(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path)))}
    if not names:
        raise DataError(f"{path} holds no DICOM series: name a file, or the folder with the series' files")
    listed = "; ".join(f"{i + 1}: {len(files)} files, {uid}" for i, (uid, files) in enumerate(names.items()))
    uid = series if series in names else list(names)[int(series) - 1] if series and series.isdigit() and 1 <= int(series) <= len(names) else None
    if series and uid is None:
        raise DataError(f"{path} has no series {series!r} but {listed}: pass one of their numbers")
    if uid is None and len(names) > 1:
        raise DataError(f"{path} has {len(names)} series ({listed}): choose one with --series")
    files = names[uid or next(iter(names))]
    slices = sorted((read_volume(f) if Path(f).suffix.lower() in DICOM else _read_itk(Path(f), None, False) for f in files),
                    key=lambda v: v.affine[:3, 3] @ np.cross(v.affine[:3, 0], v.affine[:3, 1]))
    if len({(v.array.shape, *np.round(v.affine[:3, :2], 3).ravel()) for v in slices}) > 1:
        raise DataError(f"{path} holds slices of different sizes or directions: name the folder of one series")
    affine = slices[0].affine.copy()
    if len(slices) > 1:
        steps = np.diff([v.affine[:3, 3] for v in slices], axis=0)
        lengths = np.linalg.norm(steps, axis=1)
        if lengths.min() < 1e-3 or lengths.max() > 1.5 * np.median(lengths):
            raise DataError(f"{path}: its {len(slices)} slices are {lengths.min():.2f} to {lengths.max():.2f} mm apart: files are missing, or two series are mixed")
        affine[:3, 2] = steps.mean(0)
    array = np.concatenate([v.array for v in slices], axis=2)
    return Volume(array, affine, path, "nifti", nibabel.Nifti1Image(array, affine).header)


def is_dicom(folder):
    """Does a folder hold a DICOM file? Known by its ending or by the letters after its first 128 bytes."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            if file.suffix.lower() in DICOM:
                return True
            if not extension(file):
                with open(file, "rb") as content:
                    return content.read(132)[128:] == b"DICM"
    return False


@contextmanager
def quiet():
    """Keep the libraries' own remarks off the terminal: what matters of them is in the error's one line."""
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(nothing)


def _three_d(array, path, channel, fix):
    """Drop trailing axes of length 1, take the channel asked for, refuse the rest."""
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 4 and channel is not None:
        array = array[..., channel]
    if array.ndim > 3:
        raise DataError(f"{path} is {array.ndim}-D ({shape_text(array.shape)}): {fix}")
    return array.reshape(array.shape + (1,) * (3 - array.ndim))


def _check_size(shape, path):
    if np.prod([float(n) for n in shape]) > MAX_VOXELS:
        raise DataError(f"{path} claims {shape_text(shape)} voxels: its header is damaged, or resample it")


def _read_nifti(path, channel, mask):
    import nibabel
    image = nibabel.load(path)
    _check_size(image.shape, path)
    if image.dataobj.dtype.fields is not None:
        raise DataError(f"{path} is an RGB NIfTI: save it with one gray channel")
    note = ""
    if image.dataobj.dtype.kind == "c":
        raise DataError(f"{path} holds complex numbers: save its magnitude")
    if channel is not None and len(image.shape) == 4:
        array = np.asanyarray(image.dataobj[..., min(channel, image.shape[3] - 1)])
        note = f"channel {min(channel, image.shape[3] - 1) + 1} of {image.shape[3]} is used"
    else:
        array = _three_d(np.asanyarray(image.dataobj), path, channel, "pass one 3-D volume, for example one frame or channel of it")
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    affine = image.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6 * np.prod(np.linalg.norm(affine[:3, :3], axis=0)):
        raise DataError(f"{path} has an affine that cannot be inverted: repair its header")
    return Volume(array, affine, path, "nifti", image.header, image.shape if channel is None else None, image.dataobj.dtype == np.uint8, note)


def _read_itk(path, channel, mask):
    import SimpleITK as sitk
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    _check_size(reader.GetSize(), path)
    image = reader.Execute()
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise DataError(f"{path} has {image.GetNumberOfComponentsPerPixel()} channels a voxel: save it with one")
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    array = sitk.GetArrayFromImage(image).T  # (..., y, x) -> (x, y, ...)
    array = _three_d(array, path, channel, "pass one 3-D volume")
    n = image.GetDimension()
    affine = np.eye(4)
    k = min(n, 3)
    direction = np.array(image.GetDirection()).reshape(n, n)[:k, :k]
    affine[:k, :k] = direction * np.array(image.GetSpacing()[:k])
    affine[:k, 3] = image.GetOrigin()[:k]
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    return Volume(array, LPS_TO_RAS @ affine, path, "itk", image, eight_bit=array.dtype == np.uint8)


def _read_picture(path, channel, mask):
    from PIL import Image
    Image.MAX_IMAGE_PIXELS = None  # MAX_VOXELS is the limit here
    with Image.open(path) as picture:
        _check_size(picture.size, path)
        if getattr(picture, "n_frames", 1) > 1:
            raise DataError(f"{path} has {picture.n_frames} pages: save the one that is meant alone")
        as_stored = ("1", "P") if mask else ()
        if picture.mode in ("L", "I", "F", *as_stored) or picture.mode.startswith("I;16"):
            array = np.array(picture)
        else:
            array = np.array(picture.convert("L"))
        note = "a color picture is read as gray" if picture.mode not in ("L", "I", "F", "1", "P") and not picture.mode.startswith("I;16") else ""
    array = array.astype(np.uint8) if array.dtype == bool else array
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    return Volume(array.T[:, :, None], LPS_TO_RAS, path, "picture", eight_bit=array.dtype == np.uint8, note=note)


def integer_labels(array, path):
    """Integer labels from whatever numbers a file stores them as. Raises DataError where they are no integers >= 0."""
    rounded = np.rint(array) if array.dtype.kind == "f" else array
    if array.dtype.kind == "f" and np.abs(array - rounded).max() > 1e-3:
        value = float(array[np.abs(array - rounded) > 1e-3][0])
        raise DataError(f"{path} holds {value:.4g}, which is no class: segmentation labels are integers (for images: --task image, or "
                        "\"labels\": \"image\" in dataset.json)")
    if rounded.min() < 0:
        raise DataError(f"{path} holds the label {int(rounded.min())}: labels start at 0, the background")
    return rounded.astype(np.uint8 if rounded.max() <= 255 else np.int32 if rounded.max() < 2 ** 31 else np.int64)


def check_fit(label, image):
    """Raise DataError unless the two volumes have one shape and one orientation."""
    if label.array.shape != image.array.shape:
        raise DataError(f"{label.path} is {shape_text(label.array.shape)} but its image is {shape_text(image.array.shape)}: "
                        "pass the label that belongs to it")
    if label.kind != "picture" and image.kind != "picture":
        turned = [m[:3, :3] / np.linalg.norm(m[:3, :3], axis=0) for m in (label.affine, image.affine)]
        if ((turned[0] * turned[1]).sum(0) < 0.7).any():  # an axis points elsewhere; slips of shift or spacing are common
            import nibabel
            a, b = ("".join(map(str, nibabel.aff2axcodes(v.affine))) for v in (label, image))
            raise DataError(f"{label.path} is stored as {a} but its image as {b}: resample it onto the image")


def load_pair(image, label, task="segmentation", positive=False, spacing=None, channel=None):
    """Read an image and its label. positive: any value above 0 is class 1. spacing: replaces an unreliable header (mm)."""
    image, label = read_volume(image, channel), read_volume(label, mask=task == "segmentation")
    check_fit(label, image)
    pair = Pair(image, label)
    apart = np.abs(label.affine - image.affine) if image.kind != "picture" else np.zeros((4, 4))
    if (apart[:3, :3].max(0) > 0.1 * (mm := np.linalg.norm(image.affine[:3, :3], axis=0))).any() or apart[:3, 3].max() > mm.max():
        pair.problems.append(f"the header of {label.path.name} says another place or voxel size than its image's, which is used")
    pair.notes += [v.note for v in (image, label) if v.note]
    label.affine = image.affine
    if task == "segmentation":
        label.array = (label.array > 0).astype(np.uint8) if positive else integer_labels(label.array, label.path)
        if label.array.max() > 255:
            raise DataError(f"{label.path} holds the label {label.array.max()}: classes above 255 are not supported, renumber them")
    if spacing is not None:
        scale = np.array(spacing) / np.linalg.norm(image.affine[:3, :3], axis=0)
        if np.abs(np.log(scale)).max() > 0.1:
            pair.problems.append(f"its header says voxels of {spacing_text(image)}, they are {' x '.join(f'{v:g}' for v in spacing)}")
        image.affine = label.affine = image.affine @ np.diag([*scale, 1.0])
    return pair


def spacing_text(volume):
    return " x ".join(f"{v:.4g}" for v in np.linalg.norm(volume.affine[:3, :3], axis=0)) + " mm"


# ---------------------------------------------------------------------------------------------------------------------
# Listing

def natural(text):
    """Sort key that puts numbers in number order: case2 before case10."""
    return [int(t) if i % 2 else t for i, t in enumerate(re.split(r"([0-9]+)", str(text)))]


def clean(paths):
    """Sorted without the droppings of archives and desktops (`._x`, `.DS_Store`, `__MACOSX`), numbers in number order."""
    return sorted((p for p in paths if not p.name.startswith(".") and p.name not in ("__MACOSX", "desktop.ini")), key=natural)


def folders(paths):
    return clean(p for p in paths if p.is_dir())


def held_out(patients, train=4, test=1):
    """The test patients where no official split exists: the last test / (train + test) of the sorted cases, at least one of two.

    patients: that of every case. A patient on the border is a training patient.
    """
    patients = sorted(patients, key=natural)
    for count in range(max(1, len(patients) * test // (train + test)), len(patients)):
        chosen = set(patients[-count:]) - set(patients[:-count])
        if chosen:
            return chosen
    return set()


def make_case(name, patient, split, files, load=load_pair, **more):
    """A case that is read by load(*files); for inference only where one of the files is not there."""
    complete = all(f.is_file() for f in files)
    return Case(name, patient, split if complete else "inference", tuple(files), partial(load, *files), **more)


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no JSON ({error}): repair it") from None


# ---------------------------------------------------------------------------------------------------------------------
# The datasets

def amos(folder, mri):
    """AMOS22: imagesTr|imagesVa/amos_0001.nii.gz, the label of the same name in labelsTr|labelsVa; official split by folder.

    CT and MRI lie in one folder: ids up to 500 are CT, later ones MRI. The labels of imagesTs are not public.
    """
    return [case for case in same_names(folder, "amos", "Va") if (int(re.search(r"\d+", case.name)[0]) > 500) == mri]


def word(folder):
    """WORD: imagesTr|imagesVal/word_0002.nii.gz + labelsTr|labelsVal; test is Val, as in the paper, not the 30 of imagesTs."""
    return same_names(folder, "word", "Val")


def same_names(folder, start, test):
    """Cases of imagesTr (training) and images<test> whose labels have the same names."""
    return [make_case(stem(image), stem(image), split, (image, folder / f"labels{part}" / image.name))
            for part, split in (("Tr", "train"), (test, "test"))
            for image in clean((folder / f"images{part}").glob(f"{start}_*.nii*")) if re.fullmatch(start + r"_\d+", stem(image))]


def btcv(folder):
    """BTCV: RawData/Training/img/img0001.nii.gz + label/label0001.nii.gz. No list of the paper's 21 / 9 is public: sorted."""
    images = clean((folder / "Training/img").glob("img*.nii*"))
    label = lambda image: image.parents[1] / "label" / image.name.replace("img", "label", 1)
    return [make_case(stem(image), stem(image), "train", (image, label(image))) for image in images]


def microsegnet(folder):
    """MicroSegNet: train|test/micro_ultrasound_scans/microUS_train_01.nii.gz + expert_annotations/expert_annotation_train_01.

    Official split by folder. The annotations of students and clinicians are left alone.
    """
    cases = []
    for part in ("train", "test"):
        for image in clean((folder / part / "micro_ultrasound_scans").glob("microUS_*.nii*")):
            label = folder / part / "expert_annotations" / image.name.replace("microUS", "expert_annotation", 1)
            cases.append(make_case(stem(image), stem(image), part, (image, label), load_frames))
    return cases


def load_frames(image, label):
    """An ultrasound sweep: slices are its frames, the third stored axis. The header's geometry is a placeholder; the pixel
    size is the one every public reader writes in, 1 mm between frames is ours (they are turned, not stacked)."""
    pair = load_pair(image, label, positive=True)
    pair.notes.append(f"its header's voxels of {spacing_text(pair.image)} are a placeholder")
    pair.image.affine = pair.label.affine = LPS_TO_RAS @ np.diag([0.033586, 0.033586, 1.0, 1.0])
    return pair


def promise12(folder):
    """PROMISE12: training_data|test_data/Case00.mhd + Case00_segmentation.mhd; official split by folder.

    Numbers start anew in test_data, so that the folder belongs to the patient's name. Test masks are not in every download.
    """
    name = folder.name.lower()
    part = "livechallenge" if "live" in name else "test" if "test" in name else "training"
    split, images = "train" if part == "training" else "test", clean(folder.glob("Case[0-9][0-9].mhd"))
    return [make_case(f"{part}_{stem(image)}", f"{part}_{stem(image)}", split,
                      (image, image.with_name(stem(image) + "_segmentation.mhd"))) for image in images]


BRATS_PAIRS = ("t1c:t2w", "t2w:t1c")  # authors' code


def check_brats_pairs(pairs):
    """[(from, to), ...] of texts such as "t1c:t2w". Raises DataError for others."""
    for text in pairs:
        if len(set(text.split(":")) & {"t1n", "t1c", "t2w", "t2f"}) != 2 or text.count(":") != 1:
            raise DataError(f"--brats_pairs {text}: write from:to, two of t1n t1c t2w t2f, for example t1c:t2w")
    return [tuple(text.split(":")) for text in dict.fromkeys(pairs)]


def brats_cases(folder):
    return [f for f in folders(folder.glob("BraTS-GLI-*")) if re.fullmatch(r"BraTS-GLI-\d{5}-\d{3}", f.name)]


def brats_file(case, part):
    """The file of a case that ends in exactly this: "mask" is not "mask-healthy", nor "t1n" "t1n-voided"."""
    path = case / f"{case.name}-{part}.nii"
    return path if path.is_file() else case / f"{case.name}-{part}.nii.gz"


def brats_gli(folder, pairs=BRATS_PAIRS):
    """BraTS-GLI 2023: BraTS-GLI-00001-000/BraTS-GLI-00001-000-t1c.nii.gz; one modality to another, every pair is a case.

    Official split by the folder's name, ...ValidationData is test. The last three digits are a patient's time points.
    """
    cases = brats_cases(folder)
    if not any(brats_file(case, part).is_file() for case in cases for part in ("t1c", "t2w", "t2f")):
        return None  # BraTS-Local has t1n only
    split = "test" if "validation" in folder.name.lower() else "train"
    load = partial(load_pair, task="synthesis")
    return [make_case(f"{case.name}-{a}-{b}", case.name[:-4], split, (brats_file(case, a), brats_file(case, b)), load,
                      kind=f"{a}->{b}") for case in cases for a, b in check_brats_pairs(pairs)]


def brats_local(folder):
    """BraTS 2023 Local Synthesis: ...-t1n-voided + ...-t1n + ...-mask-healthy: fill a hole in healthy brain.

    The validation cases have no t1n, so the training cases are cut as in the paper. Without mask-healthy nothing is known
    to be healthy: such a case is for inference.
    """
    cases = [case for case in brats_cases(folder) if brats_file(case, "t1n-voided").is_file()]
    parts = ("t1n-voided", "t1n", "mask-healthy")
    return [make_case(case.name, case.name[:-4], "train", [brats_file(case, part) for part in parts], load_inpainting) for case in cases]


def load_inpainting(voided, whole, healthy):
    """The label is the whole image in healthy voxels, the only ones with a truth, elsewhere the voided input."""
    pair, mask = load_pair(voided, whole, task="inpainting"), read_volume(healthy)
    check_fit(mask, pair.image)
    pair.valid = mask.array > 0.5
    pair.label.array = np.where(pair.valid, pair.label.array, pair.image.array)
    return pair


def ldct(folder):
    """TCIA LDCT-and-Projection-data: L004/<study>/<series>/1-001.dcm; quarter or tenth dose to full dose.

    The dose is in the series' description, in any case; series numbers, dates and file names tell nothing. The GE half of
    the patients has no low dose images. Also AAPM Mayo 2016 (L067/full_1mm|quarter_1mm/*.IMA; of several, the first).
    """
    cases, lone, several = [], 0, 0
    for subject in folders(folder.glob("[CLN][0-9][0-9][0-9]")):
        series = {"low": [], "full": []}
        for place in folders([*subject.glob("*"), *subject.glob("*/*")]):
            files = [f for f in clean(place.iterdir()) if f.suffix.lower() in DICOM]
            if files and (kind := dose(place, files[0])):
                series[kind].append(files)
        if series["low"] and series["full"]:
            low, full = series["low"][0], series["full"][0]
            cases.append(Case(subject.name, subject.name, "train", (*low, *full), partial(load_series, low, full)))
        lone += bool(series["low"]) != bool(series["full"])
        several += len(series["low"]) > 1 or len(series["full"]) > 1
    notes = [f"{lone} patients have one dose only (GE scanners have no low dose images) and are left out"] * (lone > 0)
    notes += [f"{several} patients have several series of a dose, the first is used"] * (several > 0)
    return (cases, notes) if cases or lone else None


def dose(folder, file):
    """low | full | None, of a DICOM series: by its description, in Mayo 2016 by its folder's name. Projections are no images."""
    import SimpleITK as sitk
    name = folder.name.lower()
    if "projection" in name:
        return None
    if re.fullmatch(r"(full|quarter)_\dmm.*", name):
        return "full" if name.startswith("full") else "low"
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
        name = reader.GetMetaData("0008|103e").lower()
    except RuntimeError:
        pass  # the folder bears the description, too
    return None if "projection" in name else "low" if "low dose" in name else "full" if "full dose" in name else None


def load_series(low, full):
    """Low and full dose of one patient, in HU. Raises DataError where their slices lie at different heights."""
    (image, low_z), (label, full_z) = read_series(low), read_series(full)
    if image.array.shape != label.array.shape or not np.allclose(low_z, full_z, atol=0.01):
        raise DataError(f"{image.path} is {shape_text(image.array.shape)} but its full dose is {shape_text(label.array.shape)}, or "
                        "their slices lie at other heights: fetch both series again")
    return Pair(image, label)


def read_series(files):
    """A DICOM series as one volume, lowest slice first whatever the files are called, and the slices' heights in mm.

    Values are in HU: every file's own slope and intercept are applied.
    """
    slices = sorted((read_volume(f) for f in files), key=lambda v: v.affine[2, 3])
    heights = [v.affine[2, 3] for v in slices]
    if len({v.array.shape for v in slices}) > 1:
        raise DataError(f"{files[0].parent} holds slices of different sizes: fetch it again")
    affine = slices[0].affine.copy()
    if len(slices) > 1:
        affine[:3, 2] = 0, 0, np.median(np.diff(heights)) or 1.0
    return Volume(np.concatenate([v.array for v in slices], axis=2), affine, files[0].parent, "itk"), heights


def chest_xray(folder):
    """Chest X-rays: CXR_png/<name>.png with the lungs in ManualMask/leftMask + rightMask (Montgomery), or in masks/<name>.png
    or <name>_mask.png (Shenzhen, the Kaggle union "Lung Segmentation").
    """
    sides = [folder / "ManualMask" / side for side in ("leftMask", "rightMask")]
    place = next((p for p in (folder / "masks", folder / "mask/mask", folder / "mask") if p.is_dir()), None)
    if place is None and not sides[0].is_dir():
        return None
    cases = []
    for image in clean((folder / "CXR_png").glob("*.png")):
        name = stem(image)
        masks = [side / image.name for side in sides] if sides[0].is_dir() else [place / f"{name}_mask.png"]
        if not masks[0].is_file() and place is not None:
            masks = [place / image.name]
        cases.append(make_case(name, name, "train", (image, *masks), load_masks))
    return cases


def load_masks(image, *masks):
    """A picture and the union of its masks (any value above 0), which take on the picture's size, by nearest neighbor."""
    image = read_volume(image)
    union, problems = np.zeros(image.array.shape, np.uint8), []
    for path in masks:
        mask = read_volume(path).array > 0
        if mask.shape != union.shape:
            problems.append(f"{path.name} is {shape_text(mask.shape[:2])}, its picture {shape_text(union.shape[:2])}: the mask is resized")
        x, y = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(union.shape[:2], mask.shape))
        union |= mask[x][:, y]
    return Pair(image, Volume(union, image.affine, masks[0], "picture"), problems=problems, notes=[image.note] * bool(image.note))


def acdc(folder):
    """ACDC: training/patient001/patient001_frame01.nii.gz + _gt, two frames a patient; official split by folder.

    Frame numbers are read from the file names: the first one is not always frame 01. The 4-D cine is left alone.
    """
    cases = []
    for part, split in (("training", "train"), ("testing", "test")):
        for patient in folders((folder / part).glob("patient*")):
            for image in clean(patient.glob("patient*_frame*.nii*")):
                if re.fullmatch(r"patient\d+_frame\d+", stem(image)):
                    label = image.with_name(image.name.replace(".nii", "_gt.nii", 1))
                    cases.append(make_case(stem(image), patient.name, split, (image, label)))
    return cases


def la(folder):
    """LA 2018: "Training Set"/<id>/lgemri.nrrd + laendo.nrrd (0/255), "Testing Set" likewise; 0.625 mm, whatever the header.

    Two ids are one scan under two names: where the masks' bytes are equal, the cases count as one patient.
    Also the UA-MT form, <id>/mri_norm2.h5, cropped around the atrium, with its train.list and test.list.
    """
    cases = []
    for part, split in (("Training Set", "train"), ("Testing Set", "test")):
        for image in clean((folder / part).glob("*/lgemri.nrrd")):
            label = image.with_name("laendo.nrrd")
            patient = hashlib.sha1(label.read_bytes()).hexdigest()[:12] if label.is_file() else image.parent.name
            load = partial(load_pair, positive=True, spacing=(0.625,) * 3)
            cases.append(make_case(image.parent.name, patient, split, (image, label), load))
    lists = [place / "test.list" for place in (folder, folder.parent) if (place / "test.list").is_file()]
    test = set(lists[0].read_text().split()) if lists else set()
    for scan in clean(folder.glob("*/mri_norm2.h5")):
        name = scan.parent.name
        cases.append(make_case(name, name, "test" if name in test else "train", (scan,), load_h5))
    return cases


def load_h5(path):
    """UA-MT's mri_norm2.h5: image (X, Y, Z) z-scored, label 0/1."""
    try:
        import h5py
    except ImportError:
        raise DataError(f"{path} needs h5py: pip install h5py") from None
    try:
        with h5py.File(path) as scan:
            image, label = scan["image"][()], scan["label"][()]
    except (OSError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({str(error)[:100]}): the file is damaged, fetch it again") from None
    affine = LPS_TO_RAS @ np.diag([0.625, 0.625, 0.625, 1.0])
    pair = Pair(Volume(image.astype(np.float32), affine, path, "h5"), Volume((label > 0).astype(np.uint8), affine, path, "h5"))
    check_fit(pair.label, pair.image)
    return pair


def deeplesion(folder):
    """DeepLesion: DL_info.csv + Images_png/000001_01_01/109.png, or Key_slices/000001_01_01_109.png; the boxes of lesions.

    A row of the table is a lesion, a case is a key slice with all of its lesions. Rows marked Possibly_noisy are dropped.
    Train_Val_Test: 1 is train, 2 and 3 are test, a patient who has both is test. Patients without a value: test are those whose
    number is a multiple of 5.
    """
    table = folder / "DL_info.csv"
    if not table.is_file():
        return None
    slices, parts, noisy, missing = {}, {}, 0, 0
    with open(table, newline="", encoding="utf-8-sig") as handle:
        for line, row in enumerate(csv.DictReader(handle), start=2):
            try:
                name, part = row["File_name"], row["Train_Val_Test"].strip()
                if not re.fullmatch(r"\d{6}_\d\d_\d\d_\d+\.png", name):
                    raise DataError(f"{table} line {line} names {name!r}: names are like 000001_01_01_109.png, correct the entry")
                parts.setdefault(name[:6], set()).update({part} - {""})
                if row["Possibly_noisy"].strip() == "1":
                    noisy += 1
                    continue
                box, place = numbers(row["Bounding_boxes"]), numbers(row["Normalized_lesion_location"])
                if len(box) != 4 or part not in ("", "1", "2", "3"):
                    raise ValueError(f"{len(box)} numbers for a box, part {part!r}")
                slices.setdefault(name, []).append((box, place[2:], numbers(row["Spacing_mm_px_"])[:2]))
            except (KeyError, AttributeError, TypeError, ValueError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{table} line {line} cannot be read ({error}): fetch the table again") from None
    cases = []
    for name in sorted(slices):
        boxes, heights, spacings = zip(*slices[name])
        picture = folder / "Images_png" / name[:12] / name[13:]
        picture = picture if picture.is_file() else folder / "Key_slices" / name
        if not picture.is_file():
            missing += 1
            continue
        test = parts[name[:6]] - {"1"} or (not parts[name[:6]] and int(name[:6]) % 5 == 0)
        heights = [h for height in heights for h in height]
        load = partial(load_boxes, boxes=boxes, spacing=spacings[0])
        cases.append(make_case(name[:-4], name[:6], "test" if test else "train", (picture, table), load,
                               height=float(np.mean(heights)) if heights else None))
    mixed = sum("1" in p and len(p) > 1 for p in parts.values())
    return cases, [text for count, text in (
        (noisy, f"{noisy} lesions marked Possibly_noisy are dropped"),
        (missing, f"{missing} key slices have no picture here and are left out"),
        (mixed, f"{mixed} patients have slices of both train and test in the table and count as test")) if count]


def numbers(text):
    """The numbers of a cell of DL_info.csv: "512, 512" -> [512.0, 512.0]; [] where it is empty or NaN."""
    values = [float(v) for v in (text or "").split(",") if v.strip()]
    return values if np.isfinite(values).all() else []


def load_boxes(picture, table, boxes, spacing):
    """A key slice in HU; the label is the same with a box of 2-pixel lines, as bright as the window gets, around every lesion."""
    image = read_volume(picture)
    if image.eight_bit:
        raise DataError(f"{picture} has 8 bits, DeepLesion has 16: fetch it again, without converting it")
    image.array = (image.array.astype(np.int32) - 32768).astype(np.int16)
    if len(spacing) == 2:
        image.affine = image.affine @ np.diag([*spacing, 1.0, 1.0])
    label = Volume(image.array.copy(), image.affine, table, "picture")
    return Pair(image, label, boxes=tuple(draw_box(label.array[:, :, 0], box) for box in boxes))


def draw_box(array, box, value=200):
    """Paint the outline of a box on (X, Y): the two pixels nearest to its line, where they are inside. box: x1, y1, x2, y2,
    1-based as in the table. Returns (first x, first y, last x, last y) of what is painted, from 0."""
    two = lambda at: slice(max(at, 0), max(at + 2, 0))
    x1, y1, x2, y2 = (int(np.floor(v - 1)) for v in box)
    for x in (x1, x2):
        array[two(x), max(y1, 0):max(y2 + 2, 0)] = value
    for y in (y1, y2):
        array[max(x1, 0):max(x2 + 2, 0), two(y)] = value
    last = [min(v + 1, n - 1) for v, n in zip((x2, y2), array.shape)]
    return max(x1, 0), max(y1, 0), *last


def decathlon(folder):
    """Medical Segmentation Decathlon: dataset.json lists `training` pairs; test labels are not public.

    Where an image has several channels (4-D) the first is used.
    """
    about = folder_json(folder)
    if about is None or not isinstance(about.get("training"), list) or "modality" not in about:
        return None
    if not all(isinstance(entry, dict) and {"image", "label"} <= set(entry) for entry in about["training"]):
        raise DataError(f"{folder}/dataset.json: every entry of training needs an image and a label: correct it")
    pairs = [[inside(folder, entry[key]) for key in ("image", "label")] for entry in about["training"]]
    return [make_case(stem(image), stem(image), "train", (image, label), partial(load_pair, channel=0))
            for image, label in sorted(pairs, key=lambda pair: natural(pair[0].name))]


def nnunet(folder):
    """An nnU-Net raw folder: imagesTr/x_0000.EXT + labelsTr/x.EXT (any known extension), imagesTs/labelsTs held out if there.

    `"labels": "image"` in dataset.json makes it image-to-image. Of several channels the first (_0000) is used.
    """
    about = folder_json(folder)
    if about is None or "channel_names" not in about:
        return None
    task = "synthesis" if about.get("labels") == "image" else "segmentation"
    cases = []
    for part, split in (("Tr", "train"), ("Ts", "test")):
        labels = {stem(p): p for p in clean((folder / f"labels{part}").glob("*")) if extension(p)}
        if split == "test" and not labels:
            continue
        for image in clean((folder / f"images{part}").glob("*_0000.*")):
            name = stem(image)[:-len("_0000")]
            label = labels.get(name, folder / f"labels{part}" / (name + extension(image)))
            cases.append(make_case(name, name, split, (image, label), partial(load_pair, task=task)))
    return cases


def folder_json(folder):
    """The dataset.json of an imagesTr folder, or None."""
    path = folder / "dataset.json"
    if not path.is_file() or not (folder / "imagesTr").is_dir():
        return None
    about = read_json(path)
    return about if isinstance(about, dict) else None


def inside(folder, name):
    """The file `name` of `folder`. Raises DataError where the name leads out of it (absolute, or through ..)."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{folder}/dataset.json names {name!r}, which is outside its folder: correct the entry")
    return folder / name
