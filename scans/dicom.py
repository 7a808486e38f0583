"""DICOM files and folders -> one `Volume`, placed by what every frame says of itself.

Headers are read by pydicom, pixels by SimpleITK (GDCM), which knows every compression. A file holds
one frame or many. Frames are sorted along their normal, and have to lie evenly. What cannot be
placed is refused: a missing, damaged or doubled slice would move the others. A segmentation
(SEG), a structure set (RTSTRUCT) and what else has no picture of its own is refused by its name.

    volume = read_dicom("scan.dcm")                 # (X, Y, Z), HU where it is CT
    volume = read_dicom("folder", series="2")       # one of several series in a folder
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.uid import UID

from scans.volumes import (DICOM, EXTENSIONS, LPS_TO_RAS, DataError, Volume, check_affine,
                           check_values, guarded, read_itk)

UNEVEN = 0.1  # how much the distance of two slices may differ from the usual one
IMPLICIT = UID("1.2.840.10008.1.2")
MODALITIES = {"CT": "ct", "MR": "mri", "US": "ultrasound", "IVUS": "ultrasound", "CR": "xray",
              "DX": "xray", "RG": "xray", "MG": "xray", "RF": "xray", "XA": "xray"}
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"


@dataclass
class Frame:
    """A picture of a DICOM file, and where it lies."""
    pixels: np.ndarray        # (X, Y)
    axes: np.ndarray          # (3, 2): a step of x and of y in mm, LPS
    position: np.ndarray | None   # (3,) the first pixel's centre in mm, LPS; None: it is not said
    thickness: float | None   # mm
    file: Path
    modality: str             # as `Volume.modality`
    sized: bool               # does the file say how large a pixel of the body is?
    note: str

    @property
    def height(self):
        """Where it lies along its own normal, in mm. Without a position: 0."""
        return 0.0 if self.position is None else float(self.position @ self.normal)

    @property
    def normal(self):
        """(3,), of length 1"""
        normal = np.cross(self.axes[:, 0], self.axes[:, 1])
        return normal / np.linalg.norm(normal)


def is_dicom(path: Path) -> bool:
    """Is a file DICOM, or does a folder hold such a file?

    A name that ends in .dcm or .ima is one. A file without a known ending is one that says DICM
    after its first 128 bytes.
    """
    if path.is_dir():
        return any(is_dicom(file) for file in sorted(path.iterdir())
                   if file.is_file() and not file.name.startswith("."))
    if path.suffix.lower() in DICOM:
        return True
    if path.name.lower().endswith(EXTENSIONS):
        return False
    with open(path, "rb") as content:
        return content.read(132)[128:] == b"DICM"


def read_dicom(path: Path, series: str | None = None) -> Volume:
    """Read a DICOM file, or the series of a folder, as one volume of the kind "nifti".

    series: the number (from 1) or the UID of one of several series in the folder.
    Raises DataError for what is no scan, for a folder without a series or with several of which
    none was chosen, for damaged files, and for slices that do not make an even volume.
    """
    return read_files([path] if path.is_file() else series_files(path, series), path)[0]


def read_files(files: list, path: Path, even: bool = True) -> tuple:
    """The files of one series: (Volume, heights of its slices in mm), the lowest first.

    path: what messages call them. even: refuse gaps, as `read_dicom` does. Raises DataError.
    """
    import nibabel

    frames = sorted((f for file in files for f in guarded(read_frames, file)),
                    key=lambda f: f.height)
    grids = {(f.pixels.shape, *np.round(f.axes, 3).ravel()) for f in frames}
    if len(grids) > 1:
        raise DataError(f"{path} holds slices of different sizes or directions: "
                        "name the folder of one series")
    step, note = slice_step(frames, path, even)
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2] = frames[0].axes, step
    if frames[0].position is not None:
        affine[:3, 3] = frames[0].position
    affine = LPS_TO_RAS @ affine
    check_affine(affine, path)
    array = np.stack([f.pixels for f in frames], axis=2)
    header = nibabel.Nifti1Image(array, affine).header
    note = "; ".join(filter(None, [note, frames[0].note]))
    volume = Volume(array, affine, path, "nifti", header, None, array.dtype == np.uint8, note,
                    modality=frames[0].modality, sized=all(f.sized for f in frames))
    return check_values(volume), [f.height for f in frames]


# --------------------------------------------------------------------------------------------------
# One file

def read_header(file: Path, whole: bool = True):
    """The pydicom dataset of a file; whole: with its pixels, so that a cut file is noticed."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom.dcmread(file, force=True, stop_before_pixels=not whole)


def is_scan(header, file: Path) -> bool:
    """Has a file slices of a scan? Raises DataError where it should have some and has none."""
    kind = header.get("SOPClassUID")
    broken = "Rows" not in header and "Image Storage" in getattr(kind, "name", "")
    if broken or not (kind or "Rows" in header or "DirectoryRecordSequence" in header):
        raise DataError(f"{file} is DICOM that is damaged or cut short: fetch it again, or move it "
                        "elsewhere")
    return "Rows" in header and kind != SEGMENTATION


def read_frames(file: Path) -> list:
    """The `Frame`s of a DICOM file. Raises DataError for what is damaged, or no gray picture."""
    header = read_header(file)
    if not is_scan(header, file):
        name = getattr(header.get("SOPClassUID"), "name", "") or "without a picture"
        raise DataError(f"{file} is no scan but DICOM {name}: convert it to NIfTI or NRRD, "
                        "for example with 3D Slicer")
    check_length(header, file)
    volume, frames = read_itk(file), []  # its array: (X, Y, frames)
    modality = MODALITIES.get(header.get("Modality"), "")
    for k in range(volume.array.shape[2]):
        groups = functional_groups(header, k)
        axes, position, thickness, note = place(groups, file)
        note = "; ".join(filter(None, [volume.note, note]))
        sized = bool(find(groups, "PixelMeasuresSequence", "PixelSpacing")) and modality != "xray"
        frames.append(Frame(volume.array[:, :, k], axes, position, thickness, file, modality, sized,
                            note))
    scales = {str(find(functional_groups(header, k), "PixelValueTransformationSequence", word))
              for k in range(len(frames)) for word in ("RescaleSlope", "RescaleIntercept")}
    if len(scales) > 2:
        raise DataError(f"{file} scales every frame in its own way: convert it to NIfTI, "
                        "for example with dcm2niix")
    return frames


def check_length(header, file):
    """Refuse a header that claims more pixels than there are, before memory is asked for."""
    if not header.file_meta.get("TransferSyntaxUID", IMPLICIT).is_compressed:
        voxels = header.Rows * header.Columns * int(header.get("NumberOfFrames") or 1)
        expected = voxels * int(header.get("SamplesPerPixel") or 1) * header.BitsAllocated / 8
        if expected > len(header.PixelData):
            raise DataError(f"{file} is DICOM that is damaged or cut short: fetch it again, or "
                            "move it elsewhere")


def functional_groups(header, k):
    """Where frame k is described, the nearest place first: its own group, the shared one, all."""
    groups = []
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    if k < len(per_frame):
        groups.append(per_frame[k])
    groups += list(header.get("SharedFunctionalGroupsSequence") or [])[:1]
    return [*groups, header]


def find(groups, sequence, word):
    """The value of `word` in the nearest of some groups, in its sequence or by itself, or None."""
    for group in groups:
        inner = list(group.get(sequence) or [])[:1] if sequence else []
        for holder in [*inner, group]:
            if holder.get(word) not in (None, ""):
                return holder.get(word)
    return None


def place(groups, file):
    """(axes, position or None, thickness or None, a note) of a frame, as `Frame` has them.

    Raises DataError for a frame whose place is known, and its directions not.
    """
    directions = find(groups, "PlaneOrientationSequence", "ImageOrientationPatient")
    position = find(groups, "PlanePositionSequence", "ImagePositionPatient")
    if position is not None and directions is None:
        raise DataError(f"{file} says where its slices lie but not how they are turned "
                        "(ImageOrientationPatient): repair its header")
    directions = np.array(directions or (1, 0, 0, 0, 1, 0), float).reshape(2, 3)
    spacing = find(groups, "PixelMeasuresSequence", "PixelSpacing") or \
        find(groups, None, "ImagerPixelSpacing")  # of rows, of columns
    note = "" if spacing else "its file does not say how large a pixel is, 1 mm is assumed"
    axes = directions.T * np.array(spacing or (1, 1), float)[::-1]
    thickness = find(groups, "PixelMeasuresSequence", "SliceThickness") or \
        find(groups, "PixelMeasuresSequence", "SpacingBetweenSlices")
    return (axes, None if position is None else np.array(position, float),
            None if thickness is None else abs(float(thickness)) or None, note)


# --------------------------------------------------------------------------------------------------
# Many files

def series_files(folder, wanted):
    """The files of the series wanted (number, UID or None) of a folder, in the order of names."""
    series = {}
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name.startswith(".") or not is_dicom(file):
            continue
        header = guarded(read_header, file, False)
        if is_scan(header, file):
            series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(file)
    if not series:
        raise DataError(f"{folder} holds no DICOM series: name a file, or the folder with the "
                        "series' files")
    uids = sorted(series)
    listed = "; ".join(f"{n}: {len(series[uid])} files, {uid}" for n, uid in enumerate(uids, 1))
    chosen = choose_series(wanted, uids)
    if chosen is None and wanted:
        raise DataError(f"{folder} has no series {wanted!r} but {listed}: pass one of their "
                        "numbers")
    if chosen is None:
        raise DataError(f"{folder} has {len(uids)} series ({listed}): choose one with --series")
    return series[chosen]


def choose_series(wanted: str | None, uids: list) -> str | None:
    """The only UID, or the one that is wanted, by itself or by its number (from 1), or None."""
    if len(uids) == 1:
        return uids[0]
    if wanted in uids:
        return wanted
    if wanted and wanted.isdigit() and 1 <= int(wanted) <= len(uids):
        return uids[int(wanted) - 1]
    return None


def slice_step(frames, path, even):
    """(from one slice to the next in mm (3,), a note of what is assumed).

    Raises DataError for gaps, doubles and positions that are missing.
    """
    first, note = frames[0], ""
    if len(frames) == 1 or all(f.position is None for f in frames):
        if len({f.file for f in frames}) > 1:
            raise DataError(f"{path}: its {len(frames)} files do not say where their slices lie: "
                            "name one of them")
        if first.thickness is None:
            note = "its file does not say how thick a slice is, 1 mm is assumed"
        return first.normal * (first.thickness or 1.0), note
    if any(f.position is None for f in frames):
        raise DataError(f"{path}: some of its slices do not say where they lie: fetch it again")
    steps = np.diff([f.position for f in frames], axis=0)  # (slices - 1, 3)
    lengths = np.linalg.norm(steps, axis=1)
    usual = np.median(lengths)
    odd = np.abs(lengths - usual) > UNEVEN * usual
    if even and (odd.any() or usual < 1e-3):
        k = int(np.argmax(np.abs(lengths - usual)))
        raise DataError(
            f"{path}: its {len(frames)} slices are {lengths.min():.2f} to {lengths.max():.2f} mm "
            f"apart ({frames[k].file.name} and {frames[k + 1].file.name}: {lengths[k]:.2f} mm): "
            "files are missing or doubled, or series are mixed; resample it to even distances")
    return steps.mean(0), note
