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

import json
import logging
import os
import re
import socket
import sys
import tempfile
import zlib
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
EXTENSIONS = NIFTI + ITK + PICTURE
DICOM = (".dcm", ".ima")
MAX_VOXELS = 2 ** 31  # a header that claims more is taken for broken
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK, DICOM: x to the left, y to the back
CT_WINDOW = (-100.0, 200.0)  # HU; paper, section 4.1
AIR = -200  # HU; a volume whose values reach it is taken for CT
BROKEN_FILE_ERRORS = (OSError, EOFError, zlib.error, RuntimeError, ValueError, TypeError, KeyError,
                      IndexError, OverflowError, SyntaxError)


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

def read_volume(path, channel: int | None = None, mask: bool = False) -> Volume:
    """Read one NIfTI, MetaImage, NRRD, DICOM or picture file.

    Integers stay integers, other numbers become float32; a header's slope and intercept are
    applied. Color pictures become gray.

    channel: which volume of a 4-D file, from 0 (the last one of a NIfTI file that has fewer).
        None refuses a 4-D file.
    mask: read a palette picture as its indices, and a 1-bit picture as 0 and 1.
    Raises DataError for a file that is missing, of an unknown kind, unreadable, 4-D, empty, or has
    values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file: check the path")
    return _read_checked(_reader_of(path), path, channel, mask)


def _reader_of(path):
    """The function that reads a file of this name. Raises DataError for an unknown ending."""
    kind = extension(path)
    if kind in NIFTI:
        return _read_nifti
    if kind in ITK or path.suffix.lower() in DICOM:
        return _read_itk
    if kind in PICTURE:
        return _read_picture
    raise DataError(f"{path} is of an unknown kind {path.suffix or '(no extension)'!r}: "
                    f"pass one of {' '.join(EXTENSIONS)}")


def _read_checked(read: Callable, path, channel=None, mask=False):
    """Call read(path, channel, mask); whatever goes wrong becomes a DataError of one line."""
    try:
        with quiet():
            volume = read(path, channel, mask)
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{path} does not fit in memory: crop or resample it") from None
    except BROKEN_FILE_ERRORS as error:
        text = " ".join(str(error).split())[-100:] or type(error).__name__
        raise DataError(f"{path} cannot be read ({text}): the file is damaged or cut short, "
                        "fetch it again") from None
    except Exception as error:  # nibabel has exception types of its own
        raise DataError(f"{path} cannot be read ({type(error).__name__}): the file is damaged, "
                        "fetch it again") from None
    _check_values(volume.array, path)
    return volume


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


def _check_values(array, path):
    if array.size == 0:
        raise DataError(f"{path} is empty ({shape_text(array.shape)}): pass an image with voxels")
    if array.dtype.kind != "f":
        return
    finite = np.isfinite(array)
    if not finite.all():
        raise DataError(f"{path} has {int((~finite).sum())} voxels that are NaN or infinite: "
                        "replace them, for example by the background value")


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

def _read_nifti(path, channel, mask):
    import nibabel

    image = nibabel.load(path)
    _check_size(image.shape, path)
    _check_gray(image.dataobj.dtype, path)
    array, note = _nifti_array(image, path, channel)
    _check_affine(image.affine, path)
    shape = image.shape if channel is None else None  # one channel has another shape than its file
    eight_bit = image.dataobj.dtype == np.uint8
    return Volume(array, image.affine, path, "nifti", image.header, shape, eight_bit, note)


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


def _check_affine(affine, path):
    """Raise DataError for an affine that is not finite, or whose axes lie in one plane."""
    finite = np.isfinite(affine).all()
    if not finite or abs(np.linalg.det(affine[:3, :3])) < 1e-6 * np.prod(_voxel_size(affine)):
        raise DataError(f"{path} has an affine that cannot be inverted: repair its header")


# ---- MetaImage, NRRD and single DICOM files

def _read_itk(path, channel, mask):
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    _check_size(reader.GetSize(), path)
    image = reader.Execute()
    channels = image.GetNumberOfComponentsPerPixel()
    if channels > 1:
        raise DataError(f"{path} has {channels} channels a voxel: save it with one")
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    array = sitk.GetArrayFromImage(image).T  # (..., y, x) -> (x, y, ...)
    array = _single_precision(_three_axes(array, path, channel, "pass one 3-D volume"))
    eight_bit = array.dtype == np.uint8
    return Volume(array, _itk_affine(image), path, "itk", image, eight_bit=eight_bit)


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

def _read_picture(path, channel, mask):
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the limit here is MAX_VOXELS
    with Image.open(path) as picture:
        _check_size(picture.size, path)
        pages = getattr(picture, "n_frames", 1)
        if pages > 1:
            raise DataError(f"{path} has {pages} pages: save the one that is meant alone")
        gray = picture.mode in ("L", "I", "F") or picture.mode.startswith("I;16")
        indexed = picture.mode in ("1", "P")  # 1 bit, or a palette
        as_stored = gray or (mask and indexed)
        array = np.array(picture if as_stored else picture.convert("L"))  # (H, W)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    array = _single_precision(array).T[:, :, None]  # (H, W) -> (W, H, 1)
    note = "" if gray or indexed else "a color picture is read as gray"
    eight_bit = array.dtype == np.uint8
    return Volume(array, LPS_TO_RAS, path, "picture", eight_bit=eight_bit, note=note)


# --------------------------------------------------------------------------------------------------
# DICOM series: a folder with a file a slice

def is_dicom(folder: Path) -> bool:
    """Does a folder hold a DICOM file?

    The files are looked at in the order of their names. A file that ends in .dcm or .ima is one.
    The first file without a known ending decides: after its first 128 bytes a DICOM file says DICM.
    """
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        if file.suffix.lower() in DICOM:
            return True
        if not extension(file):
            with open(file, "rb") as content:
                return content.read(132)[128:] == b"DICM"
    return False


def read_image(path, series: str | None = None) -> Volume:
    """Read a file as `read_volume` does, or a folder that holds a DICOM series as one volume.

    A series is in HU where it is CT, and its `Volume` is of the kind "nifti". It may be oblique:
    slices are sorted along their normal, and the affine says where they lie.

    series: the number (from 1) or the UID of one of several series in the folder.
    Raises DataError for a folder without a series, for several of which none was chosen, for slices
    that do not fit together, and for gaps between slices.
    """
    path = Path(path)
    if not path.is_dir():
        return read_volume(path)
    import nibabel

    slices = sorted((_read_dicom(file) for file in _series_files(path, series)), key=_height)
    grids = {(v.array.shape, *np.round(v.affine[:3, :2], 3).ravel()) for v in slices}
    if len(grids) > 1:
        raise DataError(f"{path} holds slices of different sizes or directions: "
                        "name the folder of one series")
    affine = slices[0].affine.copy()
    if len(slices) > 1:
        affine[:3, 2] = _slice_step(slices, path)
    array = np.concatenate([v.array for v in slices], axis=2)
    return Volume(array, affine, path, "nifti", nibabel.Nifti1Image(array, affine).header)


def _series_files(folder, wanted):
    """The files of the series wanted (number, UID or None) in a folder, in no order."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    find = sitk.ImageSeriesReader
    with quiet():
        uids = sorted(find.GetGDCMSeriesIDs(str(folder)))
        files = {uid: find.GetGDCMSeriesFileNames(str(folder), uid) for uid in uids}
    if not uids:
        raise DataError(f"{folder} holds no DICOM series: name a file, or the folder with the "
                        "series' files")
    listed = "; ".join(f"{n}: {len(files[uid])} files, {uid}" for n, uid in enumerate(uids, 1))
    chosen = choose_series(wanted, uids)
    if wanted and chosen is None:
        raise DataError(f"{folder} has no series {wanted!r} but {listed}: pass one of their "
                        "numbers")
    if chosen is None and len(uids) > 1:
        raise DataError(f"{folder} has {len(uids)} series ({listed}): choose one with --series")
    return files[chosen or uids[0]]


def choose_series(wanted: str | None, uids: list) -> str | None:
    """The UID that is wanted, by itself or by its number in the list (from 1); None if neither."""
    if wanted in uids:
        return wanted
    if wanted and wanted.isdigit() and 1 <= int(wanted) <= len(uids):
        return uids[int(wanted) - 1]
    return None


def _read_dicom(file):
    """One slice of a series, whatever its name ends in: (X, Y, 1)."""
    return _read_checked(_read_itk, Path(file))


def _height(volume):
    """Where a slice lies along its own normal: mm times the area of a pixel."""
    return volume.affine[:3, 3] @ np.cross(volume.affine[:3, 0], volume.affine[:3, 1])


def _slice_step(slices, path):
    """From one slice to the next, in mm (3,): the mean. Raises DataError for gaps and doubles."""
    steps = np.diff([v.affine[:3, 3] for v in slices], axis=0)  # (slices - 1, 3)
    lengths = np.linalg.norm(steps, axis=1)
    if lengths.min() < 1e-3 or lengths.max() > 1.5 * np.median(lengths):
        raise DataError(f"{path}: its {len(slices)} slices are {lengths.min():.2f} to "
                        f"{lengths.max():.2f} mm apart: files are missing, or two series are mixed")
    return steps.mean(0)


def read_series(files: list) -> tuple:
    """DICOM files of an axial series -> (Volume, heights of its slices in mm), the lowest first.

    Values are in HU: every file's own slope and intercept are applied. Unlike `read_image`, which
    reads a user's folder, the heights alone decide and gaps are no error: a dataset's two series of
    one patient are compared by their heights.
    Raises DataError for a file that cannot be read and for slices of different sizes.
    """
    slices = sorted((read_volume(file) for file in files), key=lambda v: v.affine[2, 3])
    heights = [v.affine[2, 3] for v in slices]
    if len({v.array.shape for v in slices}) > 1:
        raise DataError(f"{files[0].parent} holds slices of different sizes: fetch it again")
    affine = slices[0].affine.copy()
    if len(slices) > 1:
        affine[:3, 2] = 0, 0, np.median(np.diff(heights)) or 1.0
    array = np.concatenate([v.array for v in slices], axis=2)
    return Volume(array, affine, files[0].parent, "itk"), heights


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


def check_fit(label: Volume, image: Volume) -> None:
    """Raise DataError unless two volumes have one shape and one orientation.

    An axis that points elsewhere is refused. A slip of shift or spacing is common and is not.
    """
    if label.array.shape != image.array.shape:
        raise DataError(f"{label.path} is {shape_text(label.array.shape)} but its image is "
                        f"{shape_text(image.array.shape)}: pass the label that belongs to it")
    if "picture" in (label.kind, image.kind):
        return
    directions = [v.affine[:3, :3] / _voxel_size(v.affine) for v in (label, image)]
    cosines = (directions[0] * directions[1]).sum(0)  # of each label axis and its image axis
    if (cosines < 0.7).any():
        import nibabel

        stored = ["".join(map(str, nibabel.aff2axcodes(v.affine))) for v in (label, image)]
        raise DataError(f"{label.path} is stored as {stored[0]} but its image as {stored[1]}: "
                        "resample it onto the image")


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


# --------------------------------------------------------------------------------------------------
# Intensities and sizes

def guess_modality(volume: Volume) -> str:
    """ct (values reach air), picture (8 bits), else mri: for files that no dataset describes."""
    if volume.kind == "picture" and volume.eight_bit:
        return "picture"
    return "ct" if volume.array.min() <= AIR else "mri"


def intensity_range(volume: Volume, modality: str) -> tuple:
    """(low, high): the values that become 0 and 1.

    CT: [-100, 200] HU (paper, section 4.1). Pictures, X-rays and ultrasound of 8 bits: [0, 255].
    Others: the 0.5th and 99.5th percentiles of the volume (ours).
    """
    if volume.eight_bit and (volume.kind == "picture" or modality in ("xray", "ultrasound")):
        return 0.0, 255.0
    if modality == "ct":
        return CT_WINDOW
    low, high = (float(v) for v in np.percentile(volume.array, (0.5, 99.5)))
    if high <= low:  # nearly empty, or constant
        low, high = float(volume.array.min()), float(volume.array.max())
    if high <= low:
        high = low + 1.0
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
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def command_line(main: Callable) -> None:
    """Run a program's main and exit with the status it returns, 0 if none.

    What a user can mend ends the program with one line and status 2. MVG_DEBUG=1 in the environment
    shows where it came from.
    """
    try:
        status = main()
    except (ValueError, OSError) as error:  # DataError is a ValueError
        if os.environ.get("MVG_DEBUG"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
