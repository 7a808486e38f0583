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

MAX_BYTES = 2 ** 32   # of everything in one session, unpacked
MAX_ENTRIES = 20_000  # in a zip
HEADER = 2 ** 16      # bytes in which the header of a MetaImage or NRRD file has to end


class Uploads:
    """The files of one session. A scan has a number; a file of it has a role.

    Roles: scan, label, next (a label that was not read yet), answer, example.
    """

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="mvg_"))

    def place(self, number, role: str) -> Path:
        """The folder of a scan's files. Raises DataError for another role."""
        if role not in ("scan", "label", "next", "answer", "example"):
            raise DataError(f"{role} is neither a scan nor a label")
        folder = self.folder / str(int(number)) / role
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def store(self, number, role: str, name: str, stream: BinaryIO, length: int) -> None:
        """Keep `length` bytes of a stream as a file; a zip is unpacked, flat.

        Raises DataError for more than fits into a session, and for a zip that leads elsewhere.
        """
        self.check_room(length)
        path = self.place(number, role) / plain_name(name)
        with open(path, "wb") as file:
            while length > 0 and (chunk := stream.read(min(length, 2 ** 20))):
                file.write(chunk)
                length -= len(chunk)
        if path.suffix.lower() == ".zip":
            try:
                self._unpack(path)
            finally:
                path.unlink()

    def forget(self, number, role: str) -> None:
        """Remove the files of one role, or with the role "" all of a scan."""
        shutil.rmtree(self.folder / str(int(number)) / (role and self.place(number, role).name))

    def move(self, number, role: str, to: str) -> None:
        """Give what was dropped another role, in place of what had it."""
        self.forget(number, to)
        self.place(number, role).rename(self.folder / str(int(number)) / to)

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
        place = re.escape(str(self.folder)) + r"/\d+/(\w+)"
        return re.sub(place, r"the dropped \1", re.sub(place + r"/(?=\S)", "", text))

    def check_room(self, length: int) -> None:
        """Raise DataError where so many bytes more do not fit into the session."""
        used = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())
        if not 0 <= length <= MAX_BYTES - used:
            raise DataError(f"this is more than the {MAX_BYTES / 1e9:.1f} GB that fit into one "
                            "session: crop the scan, or start app.py anew")

    def _unpack(self, path):
        self.check_room(0)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise DataError(f"the zip holds {len(entries)} files: pack one scan")
            total = 0
            for entry in entries:
                inside = PurePosixPath(entry.filename.replace("\\", "/"))
                if inside.is_absolute() or ".." in inside.parts or ":" in entry.filename:
                    raise DataError(f"the zip holds {entry.filename}, which leads out of it: "
                                    "pack the scan anew")
                if entry.is_dir() or inside.name.startswith("."):
                    continue
                target = path.parent / plain_name(inside.name)
                if target.exists():  # series in folders of their own use the same names
                    target = path.parent / plain_name("_".join(inside.parts))
                with archive.open(entry) as packed, open(target, "wb") as file:
                    while chunk := packed.read(2 ** 20):
                        file.write(chunk)
                        total += len(chunk)
                        if total > MAX_BYTES:  # one file can be all of a bomb
                            self.check_room(total)
            self.check_room(0)


def plain_name(name: str) -> str:
    """A file name without folders, odd characters and leading dots."""
    name = re.sub(r"[^\w. -]", "_", PurePosixPath(name.replace("\\", "/")).name)
    return name.lstrip(".")[-100:] or "file"


def _check_data_file(path, dropped):
    if extension(path) not in ITK:
        return
    with open(path, "rb") as file:
        head = file.read(HEADER).decode("latin-1")
    names = re.findall(r"(?mi)^\s*(?:ElementDataFile|data ?file)\s*[=:]\s*(.*?)\s*$", head)
    ended = re.search(r"\n\r?\n", head) if head.startswith("NRRD") else names
    if not ended and path.stat().st_size > HEADER:
        raise DataError(f"{path.name} has a header of more than {HEADER} bytes: save it anew")
    for name in names:
        if name.upper() != "LOCAL" and name not in dropped:
            raise DataError(f"{path.name} keeps its voxels in {name}: drop that file with it")
