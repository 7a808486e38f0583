"""Which file belongs to which: an image's label, a folder's images, the place of an answer."""

import os
from pathlib import Path

import numpy as np

from scans.volumes import (EXTENSIONS, NIFTI, PICTURE, DataError, Volume, extension, is_dicom,
                           stem)

LABEL_WORDS = ("label", "labels", "seg", "segmentation", "gt", "mask", "target")
LABEL_NAMES = [sign + word for word in LABEL_WORDS for sign in ("_", "-")]
TWINS = {"imagesTr": "labelsTr", "imagesTs": "labelsTs", "imagesVa": "labelsVa",
         "imagesVal": "labelsVal", "images": "labels", "image": "label", "img": "label"}
ANSWERS = ("_mvg", "_mvg_confidence", "_mvg_overlay")  # how the names of our own files end


def find_label(image) -> Path:
    """The label file of an image file, by the usual names. Raises DataError where there is none."""
    image = Path(image)
    name, folder = stem(image), image.parent
    base = name[:-5] if name.endswith("_0000") else name  # nnU-Net's number of the channel
    places = [(folder, b + ending) for b in dict.fromkeys((name, base)) for ending in LABEL_NAMES]
    if folder.name in TWINS:
        twin = folder.parent / TWINS[folder.name]
        places += [(twin, b) for b in dict.fromkeys((base, name))]
    if folder.name == "images":
        places.append((folder.parent / "masks", name))
    if name == "lgemri":  # LA 2018
        places.append((folder, "laendo"))
    for place, label in places:
        for kind in (extension(image), *EXTENSIONS):
            if (place / (label + kind)).is_file():
                return place / (label + kind)
    raise DataError(f"{image}: no label beside it (looked for {name}_label, {name}_seg, "
                    f"{name}_gt, ...): pass --prompt_label")


def find_inputs(given) -> list:
    """Files and folders -> the files to answer.

    A folder is a DICOM series, or stands for every image in it that is neither a label nor an
    answer. Raises DataError for a folder without either.
    """
    found = []
    for path in map(Path, given):
        if not path.is_dir() or is_dicom(path):
            found.append(path)
            continue
        files = [f for f in sorted(path.iterdir())
                 if extension(f) and not f.name.startswith(".")]
        names = {stem(f) for f in files}
        labels = {n for n in names if any(
            n.endswith(ending) and n[:-len(ending)] in names for ending in LABEL_NAMES)}
        images = [f for f in files
                  if stem(f) not in labels and not stem(f).endswith(ANSWERS)]
        if not images:
            raise DataError(f"{path} holds no image ({' '.join(EXTENSIONS)}) and no DICOM series: "
                            "name another folder")
        found += images
    return found


def output_path(given, source: Volume, inputs, several=False) -> Path:
    """Where the answer goes: `given`, a file or a folder, or <input>_mvg beside the input.

    Without a name the kind is the input's; pictures become PNG and MetaImage .mha. Raises
    DataError for a place that cannot be written, another kind of file, and any of `inputs`.
    """
    folder = Path(given) if given and (several or Path(given).is_dir()) else None
    if given and not folder:
        path = Path(given)
    else:
        path = (folder or source.path.parent) / (stem(source.path) + "_mvg" + own_kind(source))
    allowed = {"nifti": NIFTI, "itk": (".mha", ".nrrd"), "picture": (".png", ".tif", ".tiff")}
    allowed = allowed[source.kind]
    if extension(path) not in allowed:
        raise DataError(f"--output {path} cannot hold the answer to {source.path.name}: "
                        f"end it in {' or '.join(allowed)}")
    if not path.parent.is_dir():
        raise DataError(f"--output {path}: there is no folder {path.parent}: make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise DataError(f"--output {path} cannot be written there: "
                        "name a file in a folder of yours")
    if path.exists() and path.resolve() in [Path(p).resolve() for p in inputs]:
        raise DataError(f"--output {path} is one of the inputs: name another file")
    return path


def own_kind(source):
    """The ending of an answer's file that is like its input's."""
    kind = extension(source.path)
    if source.kind == "picture":
        return ".png"
    alike = {".mhd": ".mha", ".nhdr": ".nrrd", "": ".nii.gz"}  # "": a folder with a DICOM series
    return alike.get(kind, kind)


def answer_type(label: Volume, largest, segmentation, output) -> np.dtype:
    """The numbers of an answer's file.

    The smallest integers that hold the largest class; floats for images, where a file can hold
    them. Raises DataError where it cannot.
    """
    picture = extension(output) in PICTURE
    if segmentation:
        if largest <= 255:
            return np.dtype(np.uint8)
        if largest < 2 ** 16 and label.kind == "picture":
            return np.dtype(np.uint16)
        if picture and largest >= 2 ** 16:
            raise DataError(f"{label.path} holds the label {largest}, too large for a picture: "
                            "renumber its classes below 65536")
        return np.dtype(np.int32 if largest < 2 ** 31 else np.int64)
    if label.kind == "picture" and label.array.dtype.kind in "iu":
        return np.dtype(np.uint8 if label.eight_bit else np.uint16)
    if extension(output) == ".png":
        raise DataError(f"--output {output} cannot hold the numbers of {label.path}, which are no "
                        "integers of a picture: end it in .tif")
    return np.dtype(np.float32)
