"""Native files -> arrays: one short function a dataset, straight from its download, nothing to convert or rename.

A reader is given a folder and answers with the folder's cases, or with None where the folder is not its dataset: it
knows the dataset by its own marks, whatever the folder around it is called. It lists; nothing is read until a case's
`load()` is called, which returns a `Pair` of volumes. The layouts are those of the datasets' pages (README, "Datasets").

To add a dataset: write such a function, then a row in `data.DATASETS`. A folder in nnU-Net or Medical Segmentation
Decathlon form needs neither.

nibabel, SimpleITK and Pillow are imported where they are used: a machine that trains from a prepared store needs none.
"""

import hashlib
import json
import re
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np

NIFTI, ITK, PICTURE = (".nii", ".nii.gz"), (".mha", ".mhd", ".nrrd", ".nhdr"), (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
EXTENSIONS = NIFTI + ITK + PICTURE
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
    kind: str           # nifti | itk | picture
    header: object = None  # nibabel header, or the SimpleITK image
    eight_bit: bool = False  # stored as uint8: 0..255 is its natural range


@dataclass
class Pair:
    image: Volume
    label: Volume
    valid: np.ndarray = None  # same shape, True where the label has a truth; None: everywhere


@dataclass
class Case:
    name: str      # unique in its dataset
    patient: str   # cases of one patient never part between training and test, nor prompt each other
    split: str     # train | test
    files: tuple   # what `load` reads, to notice when it changes
    load: Callable = field(repr=False)  # () -> Pair; raises DataError


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


def read_volume(path, channel=None):
    """Read one NIfTI, MetaImage, NRRD or picture file as a `Volume`; integers stay integers, scaled data is float32.

    channel: which volume of a 4-D file; None refuses 4-D. Color pictures become gray.
    Raises DataError for a missing, unreadable, 4-D, non-finite or empty file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file: check the path")
    kind = extension(path)
    read = _read_nifti if kind in NIFTI else _read_itk if kind in ITK else _read_picture if kind in PICTURE else None
    if read is None:
        raise DataError(f"{path} is of an unknown kind {path.suffix or '(no extension)'!r}: pass one of {' '.join(EXTENSIONS)}")
    try:
        volume = read(path, channel)
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{path} does not fit in memory: crop or resample it") from None
    except (OSError, EOFError, zlib.error, RuntimeError, ValueError, TypeError, KeyError, IndexError, OverflowError,
            SyntaxError) as error:
        text = " ".join(str(error).split())[:100] or type(error).__name__
        raise DataError(f"{path} cannot be read ({text}): the file is damaged or cut short, fetch it again") from None
    except Exception as error:  # nibabel has its own exception types
        raise DataError(f"{path} cannot be read ({type(error).__name__}): the file is damaged, fetch it again") from None
    if volume.array.size == 0:
        raise DataError(f"{path} is empty ({shape_text(volume.array.shape)}): pass an image with voxels")
    if volume.array.dtype.kind == "f" and not np.isfinite(volume.array).all():
        bad = int((~np.isfinite(volume.array)).sum())
        raise DataError(f"{path} has {bad} voxels that are NaN or infinite: replace them, for example by the background value")
    return volume


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


def _read_nifti(path, channel):
    import nibabel
    image = nibabel.load(path)
    _check_size(image.shape, path)
    if image.dataobj.dtype.fields is not None:
        raise DataError(f"{path} is an RGB NIfTI: save it with one gray channel")
    if image.dataobj.dtype.kind == "c":
        raise DataError(f"{path} holds complex numbers: save its magnitude")
    if channel is not None and len(image.shape) == 4:
        array = np.asanyarray(image.dataobj[..., min(channel, image.shape[3] - 1)])
    else:
        array = _three_d(np.asanyarray(image.dataobj), path, channel, "pass one 3-D volume, for example one frame or channel of it")
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    affine = image.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(f"{path} has an affine that cannot be inverted: repair its header")
    return Volume(array, affine, path, "nifti", image.header, image.dataobj.dtype == np.uint8)


def _read_itk(path, channel):
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
    return Volume(array, LPS_TO_RAS @ affine, path, "itk", image, array.dtype == np.uint8)


def _read_picture(path, channel):
    from PIL import Image
    with Image.open(path) as picture:
        _check_size(picture.size, path)
        if picture.mode in ("1", "L", "P", "I", "F") or picture.mode.startswith("I;16"):
            array = np.array(picture)  # a palette picture keeps its indices, which are the labels of a mask
        else:
            array = np.array(picture.convert("L"))
    array = array.astype(np.uint8) if array.dtype == bool else array
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    return Volume(array.T[:, :, None], LPS_TO_RAS, path, "picture", None, array.dtype == np.uint8)


def integer_labels(array, path):
    """Integer labels from whatever numbers a file stores them as. Raises DataError where they are no integers >= 0."""
    rounded = np.rint(array)
    if array.dtype.kind == "f" and np.abs(array - rounded).max() > 1e-3:
        value = float(array[np.abs(array - rounded) > 1e-3][0])
        raise DataError(f"{path} holds {value:.4g}, which is no class: segmentation labels are integers (--task image for images)")
    if rounded.min() < 0:
        raise DataError(f"{path} holds the label {int(rounded.min())}: labels start at 0, the background")
    return rounded.astype(np.int32 if rounded.max() > 255 else np.uint8)


def check_fit(label, image):
    """Raise DataError unless the two volumes have one shape and one orientation."""
    if label.array.shape != image.array.shape:
        raise DataError(f"{label.path} is {shape_text(label.array.shape)} but its image is {shape_text(image.array.shape)}: "
                        "pass the label that belongs to it")
    if label.kind != "picture" and image.kind != "picture":
        import nibabel
        a, b = nibabel.aff2axcodes(label.affine), nibabel.aff2axcodes(image.affine)
        if a != b:
            raise DataError(f"{label.path} is stored as {''.join(a)} but its image as {''.join(b)}: resample it onto the image")


def load_pair(image, label, task="segmentation", positive=False, spacing=None, channel=None):
    """Read an image and its label. positive: any value above 0 is class 1. spacing: replaces an unreliable header (mm)."""
    image, label = read_volume(image, channel), read_volume(label)
    check_fit(label, image)
    label.affine = image.affine
    if task == "segmentation":
        label.array = (label.array > 0).astype(np.uint8) if positive else integer_labels(label.array, label.path)
        if label.array.max() > 255:
            raise DataError(f"{label.path} holds the label {label.array.max()}: classes above 255 are not supported, renumber them")
    if spacing is not None:
        scale = np.array(spacing) / np.linalg.norm(image.affine[:3, :3], axis=0)
        image.affine = label.affine = image.affine @ np.diag([*scale, 1.0])
    return Pair(image, label)


# ---------------------------------------------------------------------------------------------------------------------
# Listing

def clean(paths):
    """Sorted without the droppings of archives and desktops (`._x`, `.DS_Store`, `__MACOSX`), numbers in number order."""
    paths = (p for p in paths if not p.name.startswith(".") and p.name not in ("__MACOSX", "desktop.ini"))
    return sorted(paths, key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", p.name)])


def held_out(patients):
    """The test patients where no official split exists: of the sorted patients the last fifth, at least one of two."""
    patients = list(dict.fromkeys(patients))
    return set(patients[len(patients) - max(1, len(patients) // 5):]) if len(patients) > 1 else set()


def pair_case(name, patient, split, image, label, **how):
    return Case(name, patient, split, (image, label), partial(load_pair, image, label, **how))


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no JSON ({error}): repair it") from None


# ---------------------------------------------------------------------------------------------------------------------
# The datasets

def acdc(folder):
    """ACDC: training/patient001/patient001_frame01.nii.gz + _gt, two frames a patient; official split by folder.

    Frame numbers are read from the file names: the first one is not always frame 01. The 4-D cine is left alone.
    """
    if not any((folder / part).is_dir() and next((folder / part).glob("patient*/"), None) for part in ("training", "testing")):
        return None
    cases = []
    for part, split in (("training", "train"), ("testing", "test")):
        for patient in clean((folder / part).glob("patient*/")):
            for image in clean(patient.glob("patient*_frame*.nii*")):
                if re.fullmatch(r"patient\d+_frame\d+", stem(image)):
                    label = image.with_name(image.name.replace(".nii", "_gt.nii", 1))
                    cases.append(pair_case(stem(image), patient.name, split, image, label))
    return cases


def la(folder):
    """LA 2018: "Training Set"/<id>/lgemri.nrrd + laendo.nrrd (0/255), "Testing Set" likewise; 0.625 mm, whatever the header.

    Two ids are one scan under two names: where the masks' bytes are equal, the cases count as one patient.
    """
    parts = [(folder / "Training Set", "train"), (folder / "Testing Set", "test")]
    if not any(next(part.glob("*/lgemri.nrrd"), None) for part, _ in parts):
        return None
    cases = []
    for part, split in parts:
        for image in sorted(part.glob("*/lgemri.nrrd")):
            label = image.with_name("laendo.nrrd")
            patient = hashlib.sha1(label.read_bytes()).hexdigest()[:12] if label.is_file() else image.parent.name
            cases.append(pair_case(image.parent.name, patient, split, image, label, positive=True, spacing=(0.625,) * 3))
    return cases


def decathlon(folder):
    """Medical Segmentation Decathlon: dataset.json lists `training` pairs; test labels are not public.

    Held out is the last fifth. Where an image has several channels (4-D) the first is used.
    """
    about = folder_json(folder)
    if about is None or not isinstance(about.get("training"), list) or "modality" not in about or (folder / "imagesVa").is_dir() \
            or (folder / "imagesVal").is_dir():  # AMOS and WORD look alike and have a split of their own
        return None
    pairs = []
    for entry in about["training"]:
        image, label = (inside(folder, entry[key]) for key in ("image", "label"))
        pairs.append((stem(image), image, label))
    pairs.sort(key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", p[0])])
    test = held_out(p[0] for p in pairs)
    return [pair_case(n, n, "test" if n in test else "train", i, l, channel=0) for n, i, l in pairs]


def nnunet(folder):
    """An nnU-Net raw folder: imagesTr/x_0000.EXT + labelsTr/x.EXT (any known extension), imagesTs/labelsTs held out if there.

    `"labels": "image"` in dataset.json makes it image-to-image. Of several channels the first (_0000) is used.
    """
    about = folder_json(folder)
    if about is None or "channel_names" not in about or not (folder / "imagesTr").is_dir():
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
            cases.append(pair_case(name, name, split, image, label, task=task))
    if not any(c.split == "test" for c in cases):
        test = held_out(c.patient for c in cases)
        for case in cases:
            case.split = "test" if case.patient in test else "train"
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
    path = folder / name
    if not isinstance(name, str) or not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder}/dataset.json names {name!r}, which is outside its folder: correct the entry")
    return path
