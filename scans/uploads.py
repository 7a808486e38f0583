"""Files that a page has sent, which may be made to do harm: kept by number, in one private folder.

No name of the page's becomes a path: folders, odd characters and leading dots are taken off. What
a zip or a header says about other files is refused where it leads elsewhere.
"""

import re
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from scans.dicom import is_dicom
from scans.volumes import ITK, DataError, extension

MAX_BYTES = 2 ** 32  # of everything in one session, unpacked


class Uploads:
    """The files of one session. A scan has a number and two roles: "scan" and "label"."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="mvg_"))
        self.used = 0

    def place(self, number, role: str) -> Path:
        """The folder of a scan's files. Raises DataError for another role."""
        if role not in ("scan", "label", "answer", "example"):
            raise DataError(f"{role} is neither a scan nor a label")
        folder = self.folder / str(int(number)) / role
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def store(self, number, role: str, name: str, stream: BinaryIO, length: int) -> None:
        """Keep `length` bytes of a stream as a file; a zip is unpacked, flat.

        Raises DataError for more than fits into a session, and for a zip that leads elsewhere.
        """
        self.check_room(length)
        self.used += length
        path = self.place(number, role) / plain_name(name)
        with open(path, "wb") as file:
            while length > 0 and (chunk := stream.read(min(length, 2 ** 20))):
                file.write(chunk)
                length -= len(chunk)
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    self._unpack(archive, entry, path.parent)
            path.unlink()

    def forget(self, number, role: str) -> None:
        """Remove what was dropped as a scan or as a label."""
        folder = self.place(number, role)
        self.used -= sum(f.stat().st_size for f in folder.iterdir())
        shutil.rmtree(folder)

    def find(self, number, role: str) -> Path | None:
        """The file that was dropped, or the folder of a DICOM series; None if there is no label.

        Raises DataError where there is no scan, for several files that are no series, and for a
        MetaImage or NRRD header that names a file which was not dropped with it.
        """
        folder = self.place(number, role)
        files = sorted(folder.iterdir())
        known = [f for f in files if extension(f) or is_dicom(f)]
        if len(known) > 1 and all(map(is_dicom, known)):
            return folder
        if not files and role == "scan":
            raise DataError("no scan was dropped: drop one")
        if len(known) != 1 and files:
            raise DataError(f"{len(files)} files were dropped, {len(known)} of them of a known "
                            "kind: drop one scan, or the files of one DICOM series")
        for path in known:
            _check_data_file(path, {f.name for f in files})
        return known[0] if known else None

    def without_folder(self, text: str) -> str:
        """A message that names our files by their names alone."""
        return re.sub(re.escape(str(self.folder)) + r"/\d+/\w+/?", "", text)

    def check_room(self, length: int) -> None:
        """Raise DataError where so many bytes more do not fit into the session."""
        if length < 0 or self.used + length > MAX_BYTES:
            raise DataError(f"this is more than the {MAX_BYTES / 1e9:.1f} GB that fit into one "
                            "session: crop the scan, or start app.py anew")

    def _unpack(self, archive, entry, folder):
        inside = PurePosixPath(entry.filename.replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts or ":" in entry.filename:
            raise DataError(f"the zip holds {entry.filename}, which leads out of it: "
                            "pack the scan anew")
        target = folder / plain_name(inside.name)
        if target.exists():  # series in folders of their own use the same names
            target = folder / plain_name("_".join(inside.parts))
        if entry.is_dir() or inside.name.startswith("."):
            return
        with archive.open(entry) as packed, open(target, "wb") as file:
            while chunk := packed.read(2 ** 20):
                self.check_room(len(chunk))
                self.used += len(chunk)
                file.write(chunk)


def plain_name(name: str) -> str:
    """A file name without folders, odd characters and leading dots."""
    name = re.sub(r"[^\w. -]", "_", PurePosixPath(name.replace("\\", "/")).name)
    return name.lstrip(".")[-100:] or "file"


def _check_data_file(path, dropped):
    if extension(path) in ITK:
        with open(path, "rb") as file:
            head = file.read(2 ** 16).decode("latin-1")
        for name in re.findall(r"(?mi)^\s*(?:ElementDataFile|data ?file)\s*[=:]\s*(.*?)\s*$", head):
            if name.upper() != "LOCAL" and name not in dropped:
                raise DataError(f"{path.name} keeps its voxels in {name}: drop that file with it")
