"""Which file belongs to which: an image's label, a folder's images, the place of an answer.

`Example` is an image with its label, read and checked.
"""

import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np

from scans.dicom import is_dicom
from scans.volumes import (DICOM, EXTENSIONS, ITK, NIFTI, PICTURE, DataError, Scaled, Volume, clean,
                           extension, folders, guess_modality, has_soft_edges, holds_classes,
                           integer_labels, intensity_range, lay_on, odd_values, read_volume,
                           slicing, some_slices, stem, write_like)

LABEL_WORDS = ("label", "labels", "seg", "segmentation", "gt", "mask", "target")
LABEL_NAMES = tuple(sign + word for word in LABEL_WORDS for sign in "_-.")  # 3D Slicer: x.seg
MODALITIES = ("t1", "t1n", "t1c", "t1ce", "t1gd", "t2", "t2w", "t2f", "flair")  # BraTS: x-t1c
TWINS = {"imagesTr": "labelsTr", "imagesTs": "labelsTs", "imagesVa": "labelsVa",
         "imagesVal": "labelsVal"}
IMAGE_FOLDERS = ("images", "image", "imgs", "img")
LABEL_FOLDERS = ("labels", "label", "masks", "mask")
AXES = ("sagittal", "coronal", "axial")
ANSWERS = ("_mvg", "_mvg_confidence", "_mvg_overlay")  # how the names of our own files end
BESIDE = ("_confidence.nii.gz", "_confidence.nii", "_confidence.png", "_overlay.png", ".json")


def find_label(image) -> Path:
    """The label file of an image file, by the usual names. Raises DataError where there is none."""
    image = Path(image)
    name, folder = stem(image), image.parent
    base = name[:-5] if name.endswith("_0000") else name  # nnU-Net's number of the channel
    if name.lower().endswith(tuple(sign + word for word in MODALITIES for sign in "_-")):
        base = name[:-1 - len(name.replace("_", "-").split("-")[-1])]
    places = [(folder, b + ending) for b in dict.fromkeys((name, base)) for ending in LABEL_NAMES]
    if folder.name in TWINS:
        twin = folder.parent / TWINS[folder.name]
        places += [(twin, b) for b in dict.fromkeys((base, name))]
    if folder.name.lower() in IMAGE_FOLDERS:
        twins = [f for f in folders(folder.absolute().parent.iterdir())
                 if f.name.lower() in LABEL_FOLDERS]
        places += [(twin, b + ending) for twin in twins for b in dict.fromkeys((base, name))
                   for ending in ("", *LABEL_NAMES)]
    if name == "lgemri":  # LA 2018
        places.append((folder, "laendo"))
    files = [(place, label + kind) for place, label in places
             for kind in (extension(image), *EXTENSIONS)]
    for place, file in files:
        if (place / file).is_file():
            return only_label(place / file)
    there = {(place, f.name.lower()): f for place in {p for p, _ in places} if place.is_dir()
             for f in place.iterdir() if f.is_file()}
    for place, file in files:  # small and capital letters alike
        if (place, file.lower()) in there:
            return only_label(there[place, file.lower()])
    raise DataError(f"{image}: no label beside it (looked for {name}_label, {name}_seg, "
                    f"{name}_gt, ... in {', '.join(dict.fromkeys(str(p) for p, _ in places))}): "
                    "pass --prompt_label")


def only_label(found):
    """A label's file. Raises DataError where others are numbered after it: x_mask, x_mask_1."""
    if label_of(stem(found)) is None:
        return found  # named as its image is: labelsTr/spleen_2 beside spleen_20
    numbered = re.compile(re.escape(stem(found)) + r"[_-]?\d+")
    more = [f.name for f in found.parent.iterdir()
            if numbered.fullmatch(stem(f)) and extension(f)]
    if more:
        raise DataError(f"{found} is one of several labels, beside {', '.join(more[:3])}: "
                        "make one file of them, or pass --prompt_label")
    return found


def find_inputs(given, labels=()) -> list:
    """Files and folders -> the files to answer.

    A folder is a DICOM series, or stands for every image in it, and every folder with a series,
    that is neither a label nor an answer. In nnU-Net's folders the first channel (x_0000) is one.
    labels: of the prompts, which are no inputs. Raises DataError for an empty name, a folder
    without an image, and a series beside other images.
    """
    found, labels = [], {Path(label).resolve() for label in labels}
    if not all(str(path).strip() for path in given):
        raise DataError("the name of an input is empty: is a variable not set?")
    for path in map(Path, given):
        if not path.is_dir():
            found.append(path)
            continue
        files = [f for f in clean(path.iterdir())
                 if (f.is_file() and extension(f)) or (f.is_dir() and is_dicom(f))]
        if is_dicom(path):
            others = [f for f in files if extension(f) not in DICOM and f.is_file()
                      and not (label_of(stem(f)) or stem(f).lower() in LABEL_WORDS
                               or stem(f).endswith(ANSWERS) or f.resolve() in labels)]
            if others:
                raise DataError(f"{path} holds a DICOM series and other images "
                                f"({others[0].name}): name what is to be answered")
            found.append(path)
            continue
        names = [stem(f) for f in files]
        channels = path.absolute().name in TWINS  # nnU-Net's
        images = [f for f in files if not is_label(stem(f), names)
                  and not stem(f).endswith(ANSWERS) and f.resolve() not in labels
                  and not (channels and is_channel(stem(f), names))]
        if not images:
            raise DataError(f"{path} holds no image ({' '.join(EXTENSIONS)}) and no DICOM series: "
                            "name another folder")
        found += images
    return found


def is_label(name, names):
    """Does a file's name, among those of its folder, say that it is another one's label?"""
    if name.lower() in LABEL_WORDS:
        return len(names) > 1
    label = label_of(name)
    if label is None:
        return False
    base, number = label
    begins = (base + "_", base + "-", base + ".")  # x_seg also belongs to x-t1c
    return base in names or (not number and any(
        n.startswith(begins) for n in names if not label_of(n)))


def label_of(name):
    """(the image's name in that of its label, a number after it): x_mask_1 -> (x, _1); or None."""
    match = re.fullmatch(rf"(.+)[_.-](?:{'|'.join(LABEL_WORDS)})([_-]?\d+)?", name, re.IGNORECASE)
    return match and match.groups()


def is_channel(name, names):
    """Is a file the second or a later channel of another one, x_0001 beside x_0000?"""
    match = re.fullmatch(r"(.+)_(\d{4})", name)
    return bool(match) and match[2] != "0000" and match[1] + "_0000" in names


def output_paths(given, inputs: list, prompts: list) -> list:
    """Where the answers to `inputs` go: a path for each, all different, decided before any is made.

    given: a file for one input, a folder, or None: <input>_mvg beside every input. Inputs of one
    name are told apart by their folders. Without a name the kind is the input's; pictures become
    PNG, MetaImage .mha and DICOM .nii.gz.
    Raises DataError for a place that cannot be written, another kind of file, two answers of one
    name, and the name of an input or of a file of the prompts.
    """
    if given and str(given).endswith(("/", os.sep)) and not Path(given).is_dir():
        raise DataError(f"--output {given}: there is no such folder: make it first")
    folder = Path(given) if given and (len(inputs) > 1 or Path(given).is_dir()) else None
    if given and not folder:
        paths = [Path(given)]
    else:
        places = [folder or path.parent for path in inputs]
        names = [stem(path.absolute()) for path in inputs]
        keys = list(zip(places, names))
        names = [name if keys.count(key) == 1 else f"{path.absolute().parent.name}_{name}"
                 for path, name, key in zip(inputs, names, keys)]
        paths = [place / (name + "_mvg" + own_kind(path))
                 for place, name, path in zip(places, names, inputs)]
    used = {Path(p).resolve() for p in [*inputs, *prompts]}
    first = {}
    for path, source in zip(paths, inputs):
        check_output(path, source, used)
        key = path.resolve().parent / stem(path)
        if key in first:
            raise DataError(f"{first[key]} and {source} would both be answered under the name "
                            f"{key.name}: rename one, or answer them one by one")
        first[key] = source
    return paths


def check_output(path, source, used):
    """Raise DataError where the answer to `source` cannot go to a path. used: not to be written."""
    allowed = allowed_kinds(source)
    if extension(path) not in allowed:
        raise DataError(f"--output {path} cannot hold the answer to {source.name}: "
                        f"end it in {' or '.join(allowed)}")
    if not path.parent.is_dir():
        raise DataError(f"--output {path}: there is no folder {path.parent}: make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise DataError(f"--output {path} cannot be written there: "
                        "name a file in a folder of yours")
    for file in (path, *(path.with_name(stem(path) + ending) for ending in BESIDE)):
        if file.resolve() in used:
            raise DataError(f"--output {path}: {file} is one of the inputs: name another file")


def allowed_kinds(source):
    """The endings that the answer's file may have."""
    kind = extension(source)
    if kind in PICTURE:
        return (".png", ".tif", ".tiff")
    return (".mha", ".nrrd") if kind in ITK else (".nii", ".nii.gz")


def own_kind(source):
    """The ending of an answer's file that is like its input's."""
    kind = extension(source)
    if kind in PICTURE:
        return ".png"
    alike = {".mhd": ".mha", ".nhdr": ".nrrd"}
    return alike.get(kind, kind if kind in NIFTI + ITK else ".nii.gz")


def answer_type(label: Volume, largest, segmentation, output) -> np.dtype:
    """The numbers of an answer's file.

    The smallest integers that hold the largest class; floats for images, where a file can hold
    them. Raises DataError where it cannot.
    """
    picture = extension(output) in PICTURE
    if segmentation:
        if largest <= 255:
            return np.dtype(np.uint8)
        if largest < 2 ** 16 and (picture or label.kind == "picture"):
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


def write_example(folder, image, cut, slices):
    """Write painted slices and the image under them as two files that infer.py takes: their paths.

    slices: {number, as `cut` counts: classes (H, W)}, at least one. Slices that are not in it are
    left out of both files. A picture becomes a PNG or TIFF, part of a volume a NIfTI file.
    """
    numbers = sorted(slices)
    name = stem(image.path.absolute())
    if len(numbers) < len(cut.cut(image.array)):
        image = some_slices(image, cut, numbers)
    stack = np.stack([slices[k] for k in numbers])  # (K, H, W)
    kinds = (np.uint8, np.uint16, np.int32)
    label = cut.restore(stack.astype(next(t for t in kinds if stack.max() <= np.iinfo(t).max)))
    large = image.array.dtype.kind == "f" or label.dtype == np.int32  # for a PNG
    kind = {"picture": ".tif" if large else ".png", "nifti": ".nii.gz"}
    kind = kind.get(image.kind, own_kind(image.path))
    paths = Path(folder) / (name + kind), Path(folder) / (name + "_label" + kind)
    write_like(paths[0], image.array, image)
    write_like(paths[1], np.ascontiguousarray(label), image)
    return paths


def pack_example(paths, names) -> Path:
    """A zip beside `write_example`'s files that holds them and classes.json, the classes' names."""
    packed = paths[0].with_name("example.zip")
    with zipfile.ZipFile(packed, "w") as archive:
        for path in paths:
            archive.write(path, path.name)
        archive.writestr("classes.json", json.dumps(names, indent=1))
    return packed


# ------------------------------------------------------------------------------------------------
# A prompt: an image and its label

class Example:
    """An image with its answer: read, checked against each other, cut into slices.

    image: a `Volume`; label: a path, or None to look for it beside the image; args: task, modality
    and axis, as infer.py has them. Raises DataError for files that do not fit.
    """

    def __init__(self, image, label, args):
        self.image = image
        self.label = read_volume(label or find_label(self.image.path), mask=args.task != "image")
        path = self.label.path
        self.assumed = lay_on(self.label, self.image)
        self.segmentation = args.task == "seg" or (
            args.task == "auto" and holds_classes(self.label.array))
        if self.segmentation and extension(path) in (".jpg", ".jpeg"):
            raise DataError(f"{path} is a JPEG, which blurs classes into each other: "
                            "save the mask as PNG")
        if self.segmentation and args.task == "auto" and has_soft_edges(self.label.array):
            raise DataError(f"{path} has {len(np.unique(self.label.array))} values and is mostly "
                            "of two, as a mask with soft edges: round it to its classes, or say "
                            "--task seg or image")
        if self.segmentation:
            self.label.array = integer_labels(self.label.array, path)
        elif self.label.kind == "picture":  # its grays, not the indices of a palette
            self.label = read_volume(path)
        self.modality = choose_modality(self.image, args)
        self.cut, self.images = cut_slices(self.image, args)

    @property
    def labels(self):
        """The label's slices (K, H, W), in the numbers of its file."""
        return self.cut.cut(self.label.array)

    def remarks(self):
        """What was decided in reading the two files, and what is odd about them: [text]."""
        said = [*remarks(self.image, self.modality), *remarks(self.label)]
        return said + [f"warning: {self.assumed}"] * bool(self.assumed)


def remarks(volume, modality=None):
    """What was decided in reading a file, and what is odd about its values: [text]."""
    note, odd = volume.note, odd_values(volume, modality)
    return ([f"note: {volume.path.name}: {note}"] * bool(note)
            + [f"warning: {volume.path.name}: {odd}"] * bool(odd))


def differ(one, other):
    """Are two modalities at odds? A picture may be an X-ray or ultrasound."""
    alike = {"picture", "xray"}, {"picture", "ultrasound"}
    return one != other and {one, other} not in alike


def choose_modality(volume, args):
    return guess_modality(volume) if args.modality == "auto" else args.modality


def cut_slices(volume, args):
    """How a volume is cut, and its slices in [0, 1]."""
    cut = slicing(volume, None if args.axis == "auto" else AXES.index(args.axis))
    low_high = intensity_range(volume, choose_modality(volume, args))
    return cut, Scaled(cut.cut(volume.array), low_high)
