"""A thousand damaged files: a finite answer of the input's shape, or one line each."""

import gzip
import io
import resource
import signal
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from test_dicom import enhanced, hounsfield, write_dicom

import infer
import mvg
from fakes import Echo, fake
from scans.store import in_processes
from scans.volumes import command_line, read_volume

KINDS = ("a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.png", "a.jpg", "a.tif", "one.dcm", "series",
         "enhanced.dcm")
EACH = 100
ALARM = 60       # seconds for a file
MOST = 2 * 2 ** 30  # bytes


def sound(path):
    """A sound scan, and the file of it that is to be damaged."""
    hu = hounsfield(3)
    if path.name == "series":
        return write_dicom(path, hu)[1]
    if path.name == "one.dcm":
        return write_dicom(path.parent, hu[:1])[0].rename(path)
    if path.name == "enhanced.dcm":
        return enhanced(path, hu + 1024, (0, 3, 6))
    if ".nii" in path.name:
        nibabel.save(nibabel.Nifti1Image(hu.transpose(2, 1, 0), np.diag([1, 1, 3, 1])), path)
    elif path.suffix in (".nrrd", ".mha"):
        sitk.WriteImage(sitk.GetImageFromArray(hu), str(path))
    else:
        Image.fromarray((hu[0] & 255).astype(np.uint8)).save(path)
    return path


def damage(file, rng):
    """Change a file in one of six ways."""
    raw = bytearray(file.read_bytes())
    head = min(len(raw) - 8, 600)
    at = int(rng.integers(0, head))
    way = rng.integers(0, 6)
    if way == 0:
        for k in rng.integers(0, head, rng.integers(1, 9)):
            raw[k] = rng.integers(0, 256)
    elif way == 1:
        del raw[int(rng.integers(0, len(raw))):]
    elif way == 2:
        filling = (b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f", b"9999")
        raw[at:at + 4] = filling[rng.integers(0, 5)]
    elif way == 3:
        other = int(rng.integers(0, head))
        raw[at:at + 8], raw[other:other + 8] = raw[other:other + 8], raw[at:at + 8]
    elif way == 4:
        del raw[at:at + int(rng.integers(1, 40))]
    else:
        raw[at:at] = rng.bytes(int(rng.integers(1, 40)))
    file.write_bytes(raw)
    if way == 5 and ".dcm" in file.name:
        damage_tags(file, rng)


def damage_tags(file, rng):
    """A DICOM file that lacks a tag, or has another value there."""
    try:
        header = pydicom.dcmread(file, force=True)
        tags = [element.tag for element in header]
        tag = tags[rng.integers(0, len(tags))]
        if rng.random() < 0.5:
            del header[tag]
        else:
            header[tag].value = ("", 0, 65535, [0, 0, 0], "1\\nan\\2")[rng.integers(0, 5)]
        header.save_as(file)
    except Exception:  # damaged beyond that
        pass


def answer_damaged(folder, number):
    """"answered", "refused", or what is wrong with the program's behaviour."""
    place = Path(folder) / f"f{number}"
    place.mkdir()
    kind = KINDS[number // EACH]
    if kind == "a.nii.gz" and number % 2:  # what is compressed is damaged, not its compression
        damage(sound(place / "a.nii"), np.random.default_rng(number))
        (place / kind).write_bytes(gzip.compress((place / "a.nii").read_bytes()))
        (place / "a.nii").unlink()
    else:
        damage(sound(place / kind), np.random.default_rng(number))
    mvg.load = lambda path, device="cpu": fake(Echo, 32)
    prompt = Path(folder) / "prompt" / "p.nii"
    argv = ["--prompt", prompt, "--input", place / kind, "--checkpoint", "any", "--looks", "1"]
    out, err, status = io.StringIO(), io.StringIO(), 0
    signal.alarm(ALARM)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            command_line(lambda: infer.main([str(a) for a in argv]))
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:  # a traceback, as a user sees it
        return f"{kind} {number}: {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if peak > MOST:
        return f"{kind} {number}: {peak / 2 ** 30:.1f} GiB"
    written = list(place.glob("*_mvg*"))
    if status == 0 and len(written) == 1:
        answer, scan = read_volume(written[0]).array, read_volume(place / kind).array
        same = answer.shape == scan.shape and np.isfinite(answer).all()
        return "answered" if same else f"{kind} {number}: {scan.shape} became {answer.shape}"
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    if status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and not written:
        return "refused"
    return f"{kind} {number}: status {status}, {lines[:3]}, wrote {written}"


@pytest.mark.slow
def test_a_thousand_damaged_files(tmp_path):
    (tmp_path / "prompt").mkdir()
    image = np.random.default_rng(0).integers(0, 900, (7, 6, 3)).astype(np.int16)
    label = (image > 450).astype(np.uint8)
    for name, array in (("p", image), ("p_label", label)):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 3, 1])),
                     tmp_path / "prompt" / f"{name}.nii")
    jobs = [(str(tmp_path), n) for n in range(EACH * len(KINDS))]
    ends = {}
    for number, end, error in in_processes(answer_damaged, jobs, 2):
        ends[number] = end or f"{KINDS[number // EACH]} {number}: {error}"
    wrong = [end for end in ends.values() if end not in ("answered", "refused")]
    assert len(ends) == len(jobs) and not wrong, wrong
    for k in range(len(KINDS)):  # both happen to files of every kind
        of_kind = {ends[n] for n in range(k * EACH, (k + 1) * EACH)}
        assert of_kind == {"answered", "refused"}, KINDS[k]
