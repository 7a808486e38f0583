"""One file <-> a `Volume`: read a scan, cut it into slices, write an answer back on its grid.

Paper, section 4.1, "Data": CT is clipped to [-100, 200] HU, images are resized.

- Reads NIfTI, MetaImage, NRRD, DICOM series and pictures; every array is (X, Y, Z) as it is stored.
- An affine (voxel -> mm, RAS+) comes with every array, so that slices always are the same way up.
- What is wrong with a file is a `DataError`: one line with the file, the value and the fix.
- `write_like` writes an array on the grid of the scan that it answers, whole or not at all.
- nibabel, SimpleITK and Pillow are imported where they are used: training needs none of them.

    volume = read_volume("scan.nii.gz")                         # volume.array: (X, Y, Z)
    cut = slicing(volume)
    stack = cut.cut(volume.array)                               # (X, Y, Z) -> (K, H, W)
    images = to_unit(stack, intensity_range(volume, "ct"))      # (K, H, W) in [0, 1]
    write_like("answer.nii.gz", cut.restore(answer), volume)    # (K, H, W) -> (X, Y, Z)
"""

import gzip
import json
import logging
import os
import re
import socket
import sys
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

NIFTI = (".nii", ".nii.gz")
ITK = (".mha", ".mhd", ".nrrd", ".nhdr")
PICTURE = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
DICOM = (".dcm", ".ima")
EXTENSIONS = NIFTI + ITK + PICTURE + DICOM
MAX_VOXELS = 2 ** 31  # a header that claims more is taken for broken
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK, DICOM: x to the left, y to the back
CT_WINDOW = (-100.0, 200.0)  # HU; paper, section 4.1
FEW_VALUES = 64  # a label of integers with more distinct values has to be made of regions
AIR = -200  # HU; less is air
LUMA = np.array([0.299, 0.587, 0.114])  # the gray of red, green and blue (ITU-R BT.601, as Pillow)
SOFT_EDGES = 16  # a mask of so many values and more, mostly of two, has soft edges


class DataError(ValueError):
    """Something is wrong with a file. The message is one line: the file, the value, the fix."""


@dataclass
class Volume:
    """An array in the file's own axis order, and the geometry to write another like it."""

    array: np.ndarray        # (X, Y, Z); a picture of H rows and W columns is (W, H, 1)
    affine: np.ndarray       # (4, 4) voxel -> world in mm, RAS+ (nibabel's convention)
    path: Path
    kind: str                # nifti | itk | picture | h5
    header: object = None    # nibabel's header, or the SimpleITK image
    shape: tuple | None = None  # as stored in a NIfTI file, which may have other than three axes
    eight_bit: bool = False  # stored as uint8: its natural range is 0..255
    note: str = ""           # what was decided while reading
    colors: bool = False     # a mask in color: its numbers are red * 65536 + green * 256 + blue
    modality: str = ""       # what a DICOM header says: ct, mri, xray, ultrasound
    sized: bool = True       # does the file say how large a voxel is?


# --------------------------------------------------------------------------------------------------
# Names of files

def extension(path) -> str:
    """The known extension of a path, lower case with its dot, or "". ".nii.gz" counts as one."""
    name = Path(path).name.lower()
    for known in sorted(EXTENSIONS, key=len, reverse=True):
        if name.endswith(known):
            return known
    return ""


def stem(path) -> str:
    """The file name without its known extension: "a.nii.gz" -> "a"."""
    name = Path(path).name
    return name[:len(name) - len(extension(path))]


def natural(text) -> list:
    """A sort key that puts numbers in number order: case2 before case10."""
    parts = re.split(r"([0-9]+)", str(text))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def clean(paths: Iterable[Path]) -> list:
    """Paths in natural order, without what archives and desktops leave behind.

    Left out are names that start with a dot (`._x`, `.DS_Store`), `__MACOSX` and `desktop.ini`.
    """
    kept = [p for p in paths
            if not p.name.startswith(".") and p.name not in ("__MACOSX", "desktop.ini")]
    return sorted(kept, key=natural)


def folders(paths: Iterable[Path]) -> list:
    """The folders among paths, cleaned and in natural order."""
    return clean(p for p in paths if p.is_dir())


def shape_text(shape: Iterable[int]) -> str:
    """(512, 512, 90) -> "512x512x90"."""
    return "x".join(str(n) for n in shape)


def spacing_text(volume: Volume) -> str:
    """The voxel size of a volume: "0.7 x 0.7 x 5 mm"."""
    return " x ".join(f"{size:.4g}" for size in _voxel_size(volume.affine)) + " mm"


def _voxel_size(affine):
    """(4, 4) -> (3,) in mm, in the order of the stored axes."""
    return np.linalg.norm(affine[:3, :3], axis=0)


# --------------------------------------------------------------------------------------------------
# Reading one file

def read_volume(path, channel: int | None = None, mask: bool = False,
                series: str | None = None) -> Volume:
    """Read one NIfTI, MetaImage, NRRD, DICOM or picture file, or a folder with a DICOM series.

    Integers stay integers, other numbers become float32; a header's slope and intercept are
    applied. Color pictures become gray.

    channel: which volume of a 4-D file, from 0 (the last one of a NIfTI file that has fewer).
        None refuses a 4-D file.
    mask: the file holds classes: a palette picture is read as its indices, a 1-bit picture as 0
        and 1, a color picture as a number for every color (`Volume.colors`).
    series: the number (from 1) or the UID of one of several series in a folder.
    Raises DataError for a file that is missing, of an unknown kind, unreadable, 4-D, empty, or has
    values that are not finite.
    """
    from scans.dicom import is_dicom, read_dicom

    path = Path(path)
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{path}: no such file: check the path")
    kind = extension(path)
    if path.is_dir() or guarded(is_dicom, path):
        return guarded(read_dicom, path, series)
    if kind in NIFTI:
        volume = guarded(_read_nifti, path, channel)
    elif kind in ITK:
        volume = guarded(read_itk, path, channel, mask)
    elif kind in PICTURE:
        volume = guarded(_read_picture, path, mask)
    elif path.suffix.lower() in (".hdr", ".img"):
        raise DataError(f"{path} is a half of a pair .hdr and .img: save the scan as one .nii file")
    else:
        raise DataError(f"{path} is of an unknown kind {path.suffix or '(no extension)'!r}: "
                        f"pass one of {' '.join(EXTENSIONS)}")
    return check_values(volume)


def guarded(read: Callable, path, *more) -> Any:
    """read(path, *more); whatever goes wrong becomes a DataError of one line."""
    try:
        with quiet():
            return read(path, *more)
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{path} does not fit in memory: crop or resample it") from None
    except PermissionError:
        raise DataError(f"{path} may not be read: ask its owner for the right to") from None
    except Exception as error:  # the libraries have exception types of their own
        text = " ".join(str(error).split())[-100:] or type(error).__name__
        raise DataError(f"{path} cannot be read ({text}): the file is damaged or cut short, "
                        "fetch it again") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the libraries print off the terminal: the error's one line says what matters.

    They print from C++, so that file descriptor 2 itself is led elsewhere.
    """
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)
    sys.stderr.flush()
    terminal = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nothing)


def _check_size(shape, path):
    """Refuse a header's claim before memory is asked for."""
    if np.prod([float(n) for n in shape]) > MAX_VOXELS:
        raise DataError(f"{path} claims {shape_text(shape)} voxels: its header is damaged, "
                        "or resample it")


def check_values(volume: Volume) -> Volume:
    """The volume itself. Raises DataError where it is empty or has values that are not finite."""
    array, path = volume.array, volume.path
    if array.size == 0:
        raise DataError(f"{path} is empty ({shape_text(array.shape)}): pass an image with voxels")
    if array.dtype.kind == "f":
        finite = np.isfinite(array)
        if not finite.all():
            raise DataError(f"{path} has {int((~finite).sum())} voxels that are NaN or infinite: "
                            "replace them, for example by the background value")
    return volume


def _three_axes(array, path, channel, fix):
    """Any number of axes -> (X, Y, Z).

    Trailing axes of length 1 are dropped, missing axes are added, of four axes `channel` is taken.
    Raises DataError, which ends in `fix`, for other arrays.
    """
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 4 and channel is not None:
        array = array[..., channel]
    if array.ndim > 3:
        raise DataError(f"{path} is {array.ndim}-D ({shape_text(array.shape)}): {fix}")
    return array.reshape(array.shape + (1,) * (3 - array.ndim))


def _single_precision(array):
    """Floats of any precision -> float32; integers stay what they are."""
    return array.astype(np.float32) if array.dtype.kind == "f" else array


# ---- NIfTI

def _read_nifti(path, channel):
    image, file = _open_nifti(path)
    _check_size(image.shape, path)
    _check_gray(image.dataobj.dtype, path)
    array, note = _nifti_array(image, path, channel)
    if file:  # gzip's checksum is at its end; no more is read than the header says, and 16 MB
        size = np.prod(image.shape) * image.dataobj.dtype.itemsize
        with file:
            for _ in range(2 + (int(size) >> 24)):
                if not file.read(2 ** 24):
                    break
    affine, notes = _nifti_affine(image, path)
    shape = image.shape if channel is None else None  # one channel has another shape than its file
    eight_bit = image.dataobj.dtype == np.uint8
    note = "; ".join(filter(None, [note, *notes]))
    return Volume(array, affine, path, "nifti", image.header, shape, eight_bit, note)


def _open_nifti(path):
    """The nibabel image of a file, and the open file that its voxels come from, or None.

    Its content decides whether it is gzipped, not its name.
    """
    import nibabel

    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    if not zipped and path.name.endswith(".nii"):
        return nibabel.load(path), None
    file = gzip.open(path) if zipped else open(path, "rb")
    start = file.read(4)
    file.seek(0)
    second = 540 in (int.from_bytes(start, "little"), int.from_bytes(start, "big"))
    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    holder = nibabel.FileHolder(fileobj=file)
    return kind.from_file_map({"header": holder, "image": holder}), file


def _nifti_affine(image, path):
    """The (4, 4) affine in mm and what was decided: [text].

    A header whose sform cannot be used is placed by its qform. Raises DataError where both fail.
    """
    header, affine, notes = image.header, image.affine, []
    if is_flat(affine) and header["qform_code"] > 0:
        affine = header.get_qform()
        header.set_sform(None, 0)
        notes.append("its sform cannot be inverted, the qform is used")
    elif not header["sform_code"] and not header["qform_code"]:
        notes.append("its header has no orientation: x is taken for right, y for front, z for up")
    check_affine(affine, path)
    unit = int(header["xyzt_units"]) & 7
    in_mm = {1: 1000.0, 3: 0.001}.get(unit, 1.0)  # metres, micrometres
    if in_mm != 1:
        notes.append(f"its header counts in {'metres' if unit == 1 else 'micrometres'}")
    return np.diag([in_mm] * 3 + [1.0]) @ affine, notes


def _check_gray(dtype, path):
    if dtype.fields is not None:
        raise DataError(f"{path} is an RGB NIfTI: save it with one gray channel")
    if dtype.kind == "c":
        raise DataError(f"{path} holds complex numbers: save its magnitude")


def _nifti_array(image, path, channel):
    """The (X, Y, Z) array of a nibabel image, and a note of what was decided.

    Of a 4-D file only the channel asked for is read from disk, the last one where it has fewer.
    """
    note = ""
    if channel is not None and len(image.shape) == 4:
        channels = image.shape[3]
        chosen = min(channel, channels - 1)
        array = np.asanyarray(image.dataobj[..., chosen])
        note = f"channel {chosen + 1} of {channels} is used"
    else:
        fix = "pass one 3-D volume, for example one frame or channel of it"
        array = _three_axes(np.asanyarray(image.dataobj), path, channel, fix)
    return _single_precision(array), note


def is_flat(affine: np.ndarray) -> bool:
    """Is an affine (4, 4) not finite, or do its axes lie in one plane?"""
    if not np.isfinite(affine).all():
        return True
    return abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * np.prod(_voxel_size(affine))


def check_affine(affine: np.ndarray, path) -> None:
    """Raise DataError for an affine that cannot be inverted."""
    if is_flat(affine):
        raise DataError(f"{path} has an affine that cannot be inverted: repair its header")


# ---- MetaImage and NRRD, and the pixels of DICOM files

def read_itk(path, channel=None, mask=False) -> Volume:
    """What SimpleITK makes of a MetaImage, NRRD or DICOM file, whatever its name ends in.

    Colors become gray, but not those of a mask.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    kinds = {".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO",
             ".nhdr": "NrrdImageIO"}
    reader.SetImageIO(kinds.get(extension(path), "GDCMImageIO"))
    reader.ReadImageInformation()
    _check_size(reader.GetSize(), path)
    image = reader.Execute()
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    array, note = sitk.GetArrayFromImage(image), ""
    channels = image.GetNumberOfComponentsPerPixel()
    if channels == 3 and array.dtype == np.uint8 and not mask:
        array, note = np.rint(array @ LUMA).astype(np.uint8), "a color picture is read as gray"
    elif channels > 1:
        raise DataError(f"{path} has {channels} channels a voxel: save it with one")
    array = _three_axes(array.T, path, channel, "pass one 3-D volume")  # (.., y, x) -> (x, y, ..)
    eight_bit = array.dtype == np.uint8
    return Volume(_single_precision(array), _itk_affine(image), path, "itk", image,
                  eight_bit=eight_bit, note=note)


def _itk_affine(image):
    """The (4, 4) affine, RAS+, of a SimpleITK image; the axes that it lacks are 1 mm."""
    axes = image.GetDimension()
    known = min(axes, 3)
    direction = np.array(image.GetDirection()).reshape(axes, axes)[:known, :known]
    affine = np.eye(4)
    affine[:known, :known] = direction * np.array(image.GetSpacing()[:known])
    affine[:known, 3] = image.GetOrigin()[:known]
    return LPS_TO_RAS @ affine


# ---- Pictures

def _read_picture(path, mask):
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # the limit here is MAX_VOXELS
    with open(path, "rb") as file, Image.open(file) as picture:  # by its path Pillow 13 leaves
        _check_size(picture.size, path)                          # a turned TIFF as it is
        pages = getattr(picture, "n_frames", 1)
        if pages > 1:
            raise DataError(f"{path} has {pages} pages: save the one that is meant alone")
        notes = []
        if picture.getexif().get(0x0112, 1) != 1:
            notes.append("it is turned as its EXIF orientation says")
        array, more = _pixels(ImageOps.exif_transpose(picture), mask)  # (H, W) or (H, W, 3)
        if array.dtype == np.uint16 and picture.format == "TIFF" and picture.tag_v2.get(262) == 0:
            array = 65535 - array  # Pillow inverts those of 8 bits itself
            notes.append("its TIFF tag says that white is 0, so it is inverted")
    colors = array.ndim == 3
    if colors:
        array = array.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        more.append("every color is a class")
    array = _single_precision(array).T[:, :, None]  # (H, W) -> (W, H, 1)
    eight_bit = array.dtype == np.uint8
    return Volume(array, LPS_TO_RAS, path, "picture", eight_bit=eight_bit,
                  note="; ".join(notes + more), colors=colors)


def _pixels(picture, mask):
    """The pixels of an upright picture, (H, W), or (H, W, 3) where colors are classes; notes."""
    from PIL import Image

    gray = picture.mode in ("L", "I", "F") or picture.mode.startswith("I;16")
    if gray or (mask and picture.mode in ("1", "P")):  # 1 bit, or a palette's indices
        array = np.array(picture)
        return (array.astype(np.uint8) if array.dtype == bool else array), []
    notes, rgb = [], np.array(picture.convert("RGB"))
    if picture.has_transparency_data:
        alpha = np.array(picture.convert("RGBA"))[..., 3:]
        if alpha.min() < 255:
            rgb = np.rint(rgb * (alpha / 255)).astype(np.uint8)
            notes.append("where it is transparent (alpha) it is read as black")
    if (rgb == rgb[..., :1]).all():
        return rgb[..., 0], notes
    if mask:
        return rgb, notes
    return np.array(Image.fromarray(rgb).convert("L")), [*notes, "a color picture is read as gray"]


# --------------------------------------------------------------------------------------------------
# Labels

def integer_labels(array: np.ndarray, path) -> np.ndarray:
    """The classes of a label from whatever numbers its file stores: uint8, int32 or int64.

    Raises DataError where a number is no integer (to 0.001) or is below 0.
    """
    rounded = array
    if array.dtype.kind == "f":
        rounded = np.rint(array)
        strange = np.abs(array - rounded) > 1e-3
        if strange.any():
            raise DataError(f"{path} holds {float(array[strange][0]):.4g}, which is no class: "
                            "segmentation labels are integers (for images: --task image, or "
                            "\"labels\": \"image\" in dataset.json)")
    if rounded.min() < 0:
        raise DataError(f"{path} holds the label {int(rounded.min())}: labels start at 0, "
                        "the background")
    largest = rounded.max()
    if largest <= 255:
        return rounded.astype(np.uint8)
    if largest < 2 ** 31:
        return rounded.astype(np.int32)
    return rounded.astype(np.int64)


def holds_classes(array: np.ndarray) -> bool:
    """Are the values of a label (X, Y, Z) classes, or is it an image?

    Integers are classes if they are few, or if three of four neighbours are equal.
    """
    if array.dtype.kind == "f" and np.abs(array - np.rint(array)).max() > 1e-3:
        return False
    values, counts = np.unique(array, return_counts=True)
    if len(values) <= FEW_VALUES:
        return True
    usual, pairs, equal = values[counts.argmax()], 0, 0
    for axis in range(3):
        one, next_one = (np.delete(array, end, axis) for end in (-1, 0))
        inside = (one != usual) & (next_one != usual)
        pairs, equal = pairs + inside.sum(), equal + (inside & (one == next_one)).sum()
    return bool(equal > 0.75 * pairs)  # X-rays reach 0.55, masks of 20 structures fall to 0.9


def has_soft_edges(array: np.ndarray) -> bool:
    """Is a label a mask whose edges were blurred, as by resizing? Most of it is of two values."""
    values, counts = np.unique(array, return_counts=True)
    mask = values[0] == 0 and (values[-1] == 255 or array.dtype.kind == "f")
    return len(values) > SOFT_EDGES and bool(mask) and counts[-1] > 0.5 * counts[1:].sum()


def number_colors(labels: list) -> str:
    """Number the classes of masks in color, the same color alike in all; says how, "" if none is.

    Raises DataError where some of the label volumes are in color and some are not.
    """
    if not any(label.colors for label in labels):
        return ""
    gray = [label.path for label in labels if not label.colors]
    if gray:
        raise DataError(f"{gray[0]} holds grays and another label colors: save both alike")
    colors = np.unique(np.concatenate([np.unique(label.array) for label in labels]))
    colors = colors[colors > 0]
    for label in labels:
        numbers = np.where(label.array > 0, np.searchsorted(colors, label.array) + 1, 0)
        label.array = integer_labels(numbers, label.path)
    table = ", ".join(f"{n} = #{color:06x}" for n, color in enumerate(colors, 1))
    return f"colors become classes: {table}; black is the background"


def lay_on(label: Volume, image: Volume) -> str:
    """Lay a label on its image's voxels. What is assumed: a text, "" if nothing.

    Axes that are stored in another order or direction than the image's are turned, which changes
    no voxel. Corners up to a voxel apart are a slip of the header. A header that says nothing (no
    orientation, or 1 mm from 0) is no contradiction. Raises DataError for another shape, and for
    another place.
    """
    silent = [Path(v.path).name for v in (label, image) if _says_no_place(v)]
    if not silent and not _fits(label, image):
        _turn(label, image)
    if label.array.shape != image.array.shape:
        raise DataError(f"{label.path} is {shape_text(label.array.shape)} but its image is "
                        f"{shape_text(image.array.shape)}: pass the label that belongs to it")
    if "picture" in (label.kind, image.kind) or _fits(label, image):
        return ""
    if len(silent) == 1:
        return f"{silent[0]} does not say where it lies: the label is laid on its image's voxels"
    raise DataError(f"{label.path} lies elsewhere than its image, up to "
                    f"{_apart(label, image):.4g} mm: "
                    f"{_place_text(label)}, the image {_place_text(image)}: pass the label that "
                    "belongs to it, or resample it onto the image")


def _says_no_place(volume):
    """Does a file say nothing of where it lies?"""
    if volume.kind == "picture" or np.allclose(np.abs(volume.affine), np.eye(4)):
        return True
    header = volume.header
    return header is not None and volume.kind == "nifti" and \
        not header["sform_code"] and not header["qform_code"]


def _apart(label, image):
    """How far the corners of a label lie from those of its image, at most, in mm."""
    ends = np.array(np.meshgrid(*([0, n - 1] for n in image.array.shape))).reshape(3, 8)
    ends = np.vstack([ends, np.ones(8)])  # (4, 8): the corners
    return np.linalg.norm((label.affine - image.affine)[:3] @ ends, axis=0).max()


def _fits(label, image):
    return label.array.shape == image.array.shape and \
        _apart(label, image) <= _voxel_size(image.affine).max()


def _turn(label, image):
    """Turn the axes of a label to the order and direction of its image's, in place."""
    from nibabel.orientations import (apply_orientation, inv_ornt_aff, io_orientation,
                                      ornt_transform)

    turn = ornt_transform(io_orientation(label.affine), io_orientation(image.affine))
    label.affine = label.affine @ inv_ornt_aff(turn, label.array.shape)
    label.array = apply_orientation(label.array, turn)


def _place_text(volume):
    """Where a volume lies: its axes, its voxels and its first voxel."""
    import nibabel

    axes = "".join(map(str, nibabel.aff2axcodes(volume.affine)))
    first = ", ".join(f"{v:.4g}" for v in volume.affine[:3, 3])
    return f"{axes} from ({first}) mm with voxels of {spacing_text(volume)}"


# --------------------------------------------------------------------------------------------------
# Slices, always the same way up

# The LPS axes (0: to the left, 1: to the back, 2: to the head) of a slice axis: slice, row, column.
SLICE_ORDER = {2: (2, 1, 0), 1: (1, 2, 0), 0: (0, 2, 1)}


@dataclass
class Slicing:
    """How a volume is cut: turned to LPS, then into slices along `axis`, as radiologists hang them.

    Axial slices have rows front to back and columns right to left. Other slices have rows head to
    feet. Made by `slicing`.
    """

    to_lps: np.ndarray    # nibabel's orientation transforms, (3, 2)
    from_lps: np.ndarray
    axis: int             # of LPS: 0 sagittal, 1 coronal, 2 axial
    spacing: tuple        # (slice, row, column) in mm

    def cut(self, array: np.ndarray) -> np.ndarray:
        """(X, Y, Z) as stored -> (K, H, W)"""
        from nibabel.orientations import apply_orientation

        stack = apply_orientation(array, self.to_lps).transpose(SLICE_ORDER[self.axis])
        return stack if self.axis == 2 else stack[:, ::-1]

    def restore(self, stack: np.ndarray) -> np.ndarray:
        """(K, H, W) -> (X, Y, Z) as stored, the inverse of `cut`"""
        from nibabel.orientations import apply_orientation

        stack = stack if self.axis == 2 else stack[:, ::-1]
        return apply_orientation(stack.transpose(np.argsort(SLICE_ORDER[self.axis])), self.from_lps)


def slicing(volume: Volume, axis: int | None = None) -> Slicing:
    """The `Slicing` of a volume.

    axis: of LPS (0 sagittal, 1 coronal, 2 axial). None: the only axis of one voxel, else the
    coarsest axis if it is at least twice as coarse as the next, else axial.
    """
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    stored = io_orientation(volume.affine)  # (3, 2): of every stored axis, its axis in the world
    lps = axcodes2ornt(("L", "P", "S"))
    to_lps, from_lps = ornt_transform(stored, lps), ornt_transform(lps, stored)
    world = stored[:, 0].astype(int)
    mm = np.empty(3)
    mm[world] = _voxel_size(volume.affine)  # in the order of the world's axes
    if axis is None:
        flat = [int(world[i]) for i in range(3) if volume.array.shape[i] == 1]
        axis = flat[0] if len(flat) == 1 else _coarsest(mm, volume)
    spacing = tuple(float(mm[i]) for i in SLICE_ORDER[axis])
    return Slicing(to_lps, from_lps, axis, spacing)


def _coarsest(mm, volume):
    """The LPS axis of the largest voxel size if that is twice the next, else axial. mm: (3,)"""
    order = np.argsort(mm)
    if volume.kind != "picture" and mm[order[2]] >= 2 * mm[order[1]]:
        return int(order[2])
    return 2


def some_slices(volume: Volume, cut: Slicing, numbers: list) -> Volume:
    """Some slices of a volume as a smaller NIfTI volume, placed where they lie.

    numbers: of slices as `cut` counts them, at least one. What lies between them is left out, and
    their mean distance is that of the new volume.
    """
    import nibabel

    axis = int(np.flatnonzero(cut.to_lps[:, 0] == cut.axis)[0])  # as stored
    kept = np.arange(volume.array.shape[axis])[::int(cut.to_lps[axis, 1])][sorted(numbers)]
    kept = np.sort(kept)
    step = np.eye(4)
    step[axis, axis] = np.diff(kept).mean() if len(kept) > 1 else 1
    step[axis, 3] = kept[0]
    image = nibabel.Nifti1Image(np.take(volume.array, kept, axis), volume.affine @ step)
    return Volume(np.asanyarray(image.dataobj), image.affine, volume.path, "nifti", image.header)


# --------------------------------------------------------------------------------------------------
# Intensities and sizes

def guess_modality(volume: Volume) -> str:
    """What a DICOM header says; else ct (see `looks_like_ct`), picture (8 bits), or mri."""
    if volume.modality:
        return volume.modality
    if volume.kind == "picture" and volume.eight_bit:
        return "picture"
    return "ct" if looks_like_ct(volume.array) else "mri"


def looks_like_ct(array: np.ndarray) -> bool:
    """Are there voxels of air, and others between air and water? A thousandth of each is enough.

    Padding of an MRI has no values between -200 and 0. A few voxels decide nothing.
    """
    least = 0.001 * array.size
    return np.count_nonzero(array <= AIR) > least and \
        np.count_nonzero((array > AIR) & (array < 0)) > least


def odd_values(volume: Volume, modality: str) -> str:
    """What is strange about the values of a volume of this modality: a text, "" if nothing is."""
    lowest = volume.array.min()
    if modality == "ct" and lowest >= 0 and intensity_range(volume, modality) == CT_WINDOW:
        return (f"its lowest value is {lowest:g}, so it is not in HU (Hounsfield units): "
                "CT is shown from -100 to 200 HU; subtract what was added")
    if modality == "mri" and lowest <= AIR:
        return (f"its values reach {lowest:g}, but it has too few below 0 for CT and is taken "
                "for MRI")
    return ""


def intensity_range(volume: Volume, modality: str) -> tuple:
    """(low, high): the values that become 0 and 1.

    CT: [-100, 200] HU (paper, section 4.1). Pictures, X-rays and ultrasound of 8 bits: [0, 255].
    Others: the 0.5th and 99.5th percentiles of the volume (ours).
    """
    if volume.eight_bit and (volume.kind == "picture" or modality in ("xray", "ultrasound")):
        return 0.0, 255.0
    if modality == "ct":
        return CT_WINDOW
    with np.errstate(over="ignore"):
        low, high = (float(v) for v in np.percentile(volume.array, (0.5, 99.5)))
    if high <= low:  # nearly empty, or constant
        low, high = float(volume.array.min()), float(volume.array.max())
    if high <= low:
        high = low + 1.0
    if high - low > float(np.finfo(np.float32).max):
        raise DataError(f"{volume.path} reaches from {low:.4g} to {high:.4g}: replace such values, "
                        "for example by the background value")
    return low, high


def to_unit(array: np.ndarray, low_high: tuple) -> np.ndarray:
    """Clip to (low, high) and scale to [0, 1], float32; the shape stays."""
    low, high = low_high
    clipped = np.clip(array.astype(np.float32), low, high)
    return ((clipped - low) / (high - low)).astype(np.float32)


class Scaled:
    """A stack (K, H, W) whose slices are scaled to [0, 1], float32, when they are taken out.

    A large volume takes no more memory than in its file.
    """

    def __init__(self, stack: np.ndarray, low_high: tuple):
        self.stack = stack
        self.low_high = low_high
        self.shape = stack.shape

    def __len__(self) -> int:
        return len(self.stack)

    def __getitem__(self, k) -> np.ndarray:
        return to_unit(np.ascontiguousarray(self.stack[k]), self.low_high)


def resize_images(x: torch.Tensor, size: tuple) -> torch.Tensor:
    """(..., H, W) floats -> (..., h, w), bilinear, antialiased where it shrinks. size: (h, w)"""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    pictures = x.reshape(1, -1, *x.shape[-2:])  # (..., H, W) -> (1, N, H, W)
    resized = F.interpolate(pictures, size=size, mode="bilinear", antialias=True)
    return resized.reshape(*x.shape[:-2], *size)


def resize_labels(x: torch.Tensor, size: tuple) -> torch.Tensor:
    """(..., H, W) classes, floats or integers -> (..., h, w), nearest, dtype kept. size: (h, w)"""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    pictures = x.reshape(1, -1, *x.shape[-2:]).float()  # (..., H, W) -> (1, N, H, W)
    resized = F.interpolate(pictures, size=size, mode="nearest-exact")
    return resized.to(x.dtype).reshape(*x.shape[:-2], *size)


# --------------------------------------------------------------------------------------------------
# Writing

def write_like(path, array: np.ndarray, like: Volume) -> None:
    """Write (X, Y, Z) on the grid and with the header of `like`: whole or not at all.

    The kind of file is that of `like`; the extension of path has to fit it. Volumes keep their
    affine, NIfTI files the shape as stored.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{stem(path)}.",
                                         suffix=extension(path))
    os.close(handle)
    write = {"nifti": _write_nifti, "itk": _write_itk}.get(like.kind, _write_picture)
    try:
        write(temporary, array, like)
        mask = os.umask(0)  # there is no other way to ask for it
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's file is private, an answer is not
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _write_nifti(path, array, like):
    import nibabel

    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    header["cal_min"] = 0  # the display range of the scan is not that of the answer
    header["cal_max"] = 0
    version_2 = isinstance(header, nibabel.Nifti2Header)
    image = nibabel.Nifti2Image if version_2 else nibabel.Nifti1Image
    nibabel.save(image(array.reshape(like.shape or array.shape), None, header), path)


def _write_itk(path, array, like):
    import SimpleITK as sitk

    if like.header.GetDimension() == 2:
        array = array[..., 0]
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.CopyInformation(like.header)
    sitk.WriteImage(image, path, useCompression=True)


def _write_picture(path, array, like):
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(array[:, :, 0].T)).save(path)


# --------------------------------------------------------------------------------------------------
# JSON and the command line

def read_json(path) -> Any:
    """The value of a JSON file. Raises DataError where it is none."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no JSON ({error}): repair it") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all, also where several machines write the same one."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=1))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def command_line(main: Callable) -> None:
    """Run a program's main and exit with the status it returns, 0 if none.

    What a user can mend ends the program with one line and status 2. MVG_DEBUG=1 in the environment
    shows where it came from.
    """
    for stream in (sys.stdout, sys.stderr):  # a name may hold what a terminal cannot print
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:  # DataError is a ValueError
        memory = isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and "ried to allocate" in str(error))  # torch's words
        if os.environ.get("MVG_DEBUG") or isinstance(error, RuntimeError) and not memory:
            raise
        words = " ".join(str(error).split())
        if memory:
            words = f"it does not fit in memory: take smaller images or batches ({words[:100]})"
        print(f"error: {words}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
