"""The page's server: the same answers as infer.py, and hostile requests. test_browser.py clicks."""

import http.client
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from argparse import Namespace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from conftest import ROOT
from test_dicom import hounsfield, write_dicom

import app
import infer
from running.local_server import LocalServer
from scans import uploads
from scans.volumes import read_volume


class Page:
    """A session's server in a thread, and requests to it."""

    def __init__(self, checkpoint=None):
        self.session = app.Session(Namespace(checkpoint=checkpoint, device="cpu"))
        self.server = LocalServer(0, app.Handler, app.PAGE, self.session)
        self.folder = self.session.uploads.folder
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        shutil.rmtree(self.folder)

    def request(self, path, body=None, token=None, **headers):
        """(status, content); a body makes it a POST."""
        link = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=120)
        path = f"/{token or self.server.token}/{path}"
        link.request("GET" if body is None else "POST", path, body, headers)
        answer = link.getresponse()
        return answer.status, answer.read()

    def do(self, what, **more):
        status, content = self.request("do", json.dumps({"do": what, **more}))
        return json.loads(content)

    def drop(self, number, role, *paths):
        for path in paths:
            self.request(f"upload/{number}/{role}/{path.name}", path.read_bytes())
        return self.do("open" if role == "scan" else "label", scan=number)

    def answer(self, number, shape):
        """The streamed answer: {slice: (values, confidence)}."""
        content = self.request(f"answer/{number}", b"")[1]
        pixels, found = shape[1] * shape[2], {}
        size = 4 + 5 * pixels
        for at in range(0, len(content), size):
            k = int(np.frombuffer(content, np.int32, 1, at)[0])
            assert k >= 0, content[at + 4:]
            found[k] = (np.frombuffer(content, np.float32, pixels, at + 4).reshape(shape[1:]),
                        np.frombuffer(content, np.uint8, pixels, at + 4 + 4 * pixels))
        return found


@pytest.fixture(scope="module")
def page():
    page = Page()
    yield page
    page.close()


def saved(page, number, folder):
    """The file that the page saves, read."""
    status, content = page.request(f"file/{number}/answer")
    assert status == 200
    path = folder / page.session.scan(number).case.output.name
    path.write_bytes(content)
    return read_volume(path)


def by_infer(image, label, new, folder):
    folder.mkdir(exist_ok=True)
    infer.main(["--prompt", str(image), "--prompt_label", str(label), "--input", str(new),
                "--output", str(folder), "--device", "cpu"])
    return read_volume(next(iter(folder.iterdir())))


# -------------------------------------------------------------------------------------------------
# The server beside infer.py

def whole_way(page, numbers, example, new, folder):
    """Drop, answer and save through the server; the same by infer.py: two volumes."""
    first, second = numbers
    page.drop(first, "scan", example[0])
    page.drop(first, "label", example[1])
    said = page.drop(second, "scan", new)
    notes = page.do("prepare", scan=second, examples=[first])
    assert any("task segmentation" in note for note in notes["notes"])
    parts = page.answer(second, said["shape"])
    assert sorted(parts) == list(range(said["shape"][0]))
    page.do("save", scan=second)
    return saved(page, second, folder), by_infer(*example, new, folder / "infer"), parts


@pytest.mark.parametrize("kind", [
    ".nii.gz", ".png", *(pytest.param(kind, marks=pytest.mark.slow) for kind in (".mha", ".nrrd"))])
def test_a_saved_answer_equals_that_of_infer_in_every_voxel(page, kind, hearts, nerves, tmp_path):
    import SimpleITK as sitk

    example, new = hearts[0], hearts[1][0]
    if kind == ".png":
        example, new = nerves[0], nerves[1][0]
    elif kind != ".nii.gz":
        paths = [tmp_path / f"{i}{kind}" for i in range(3)]
        for path, source in zip(paths, (*example, new)):
            sitk.WriteImage(sitk.ReadImage(str(source)), str(path))
        example, new = paths[:2], paths[2]
    ours, theirs, parts = whole_way(page, (10, 11), example, new, tmp_path)
    assert theirs.array.any()
    assert ours.array.dtype == theirs.array.dtype
    np.testing.assert_array_equal(ours.array, theirs.array)
    np.testing.assert_allclose(ours.affine, theirs.affine)
    scan = page.session.scan(11)
    for k, (values, _) in parts.items():
        np.testing.assert_array_equal(values, scan.cut.cut(ours.array)[k])
    page.do("remove", scan=10)
    page.do("remove", scan=11)
    assert not (page.folder / "10").exists()


def test_a_dicom_series_comes_as_files_and_as_a_zip(page, tmp_path):
    files = write_dicom(tmp_path / "series", hounsfield(4))
    one = page.drop(20, "scan", *files)
    packed = tmp_path / "series.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in files:
            archive.write(file, f"study/{file.name}")
    two = page.drop(21, "scan", packed)
    assert one["shape"] == two["shape"] and one["shape"][0] == 4
    assert one["modality"] == "ct"
    for k in range(4):
        _, first = page.request(f"slice/20/scan/{k}")
        assert first == page.request(f"slice/21/scan/{k}")[1]
    values = np.frombuffer(first, np.float32).reshape(one["shape"][1:])
    np.testing.assert_array_equal(values, page.session.scan(20).cut.cut(
        read_volume(tmp_path / "series").array)[3])


def test_painted_slices_are_the_example_and_infer_takes_its_files(page, hearts, tmp_path):
    said = page.drop(30, "scan", hearts[0][0])
    new = page.drop(31, "scan", hearts[1][0])
    K, H, W = said["shape"]
    assert "mask" in page.do("prepare", scan=31, examples=[30])["error"]
    truth = page.session.scan(30).cut.cut(read_volume(hearts[0][1]).array)
    for k in (2, 3, 5):
        page.request(f"paint/30/{k}", truth[k].astype(np.int32).tobytes())
    page.request("paint/30/5", b"")  # undone
    page.do("prepare", scan=31, examples=[30])
    page.answer(31, new["shape"])
    page.do("save", scan=31)
    ours = saved(page, 31, tmp_path)
    with zipfile.ZipFile(io.BytesIO(page.request("file/30/example")[1])) as archive:
        archive.extractall(tmp_path / "painted")
    label, image = sorted((tmp_path / "painted").glob("*.nii.gz"),
                          key=lambda p: "_label" not in p.name)
    part = read_volume(label)
    assert sorted(part.array.shape) == sorted((2, H, W))
    theirs = by_infer(image, label, hearts[1][0], tmp_path / "infer")
    assert theirs.array.any()
    np.testing.assert_array_equal(ours.array, theirs.array)
    # The painted slices lie where they did in the scan.
    whole, cut = read_volume(hearts[0][0]), page.session.scan(30).cut
    index = np.argwhere(part.array == 3)[0]
    world = part.affine @ [*index, 1]
    there = np.rint(np.linalg.inv(whole.affine) @ world)[:3].astype(int)
    assert read_volume(hearts[0][1]).array[tuple(there)] == 3
    assert read_volume(image).array[tuple(index)] == whole.array[tuple(there)]
    assert cut.axis == 2


def test_a_dropped_mask_may_be_mended_in_one_slice(page, hearts):
    page.drop(32, "scan", hearts[0][0])
    page.drop(32, "label", hearts[0][1])
    scan = page.session.scan(32)
    before = scan.cut.cut(read_volume(hearts[0][1]).array)
    page.request("paint/32/1", np.full(before[1].shape, 2, np.int32).tobytes())
    example = scan.prompt(page.session.arguments({}))
    assert (example.labels[1] == 2).all()
    np.testing.assert_array_equal(example.labels[2:], before[2:])


@pytest.mark.slow
def test_a_corrected_slice_becomes_a_further_example(page, hearts, tmp_path):
    page.drop(33, "scan", hearts[0][0])
    page.drop(33, "label", hearts[0][1])
    said = page.drop(34, "scan", hearts[1][0])
    page.do("prepare", scan=34, examples=[33])
    page.answer(34, said["shape"])
    truth = page.session.scan(34).cut.cut(read_volume(hearts[1][1]).array)
    page.request("paint/34/4", truth[4].astype(np.int32).tobytes())
    page.do("save", scan=34)
    np.testing.assert_array_equal(
        page.session.scan(34).cut.cut(saved(page, 34, tmp_path).array)[4], truth[4])
    page.do("keep", scan=35, source=34)
    assert page.do("open", scan=35)["shape"][0] == 1
    page.do("label", scan=35)
    np.testing.assert_array_equal(page.session.scan(35).example.labels[0], truth[4])
    notes = page.do("prepare", scan=34, examples=[33, 35])["notes"]
    assert sum("task segmentation" in note for note in notes) == 2
    assert len(page.answer(34, said["shape"])) == said["shape"][0]


def test_an_image_task_is_answered_in_the_units_of_its_example(page, hearts, tmp_path):
    import nibabel

    made = []
    for n, (image, _) in enumerate(hearts[:2]):
        scan = nibabel.load(image)
        path = tmp_path / f"target{n}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.asarray(scan.dataobj) * 2.5, scan.affine), path)
        made.append(path)
    page.drop(36, "scan", hearts[0][0])
    label = page.drop(36, "label", made[0])
    assert not label["segmentation"]
    said = page.drop(37, "scan", hearts[1][0])
    ready = page.do("prepare", scan=37, examples=[36])
    assert ready["range"] == label["range"] and ready["range"][1] > 2 * said["range"][1]
    parts = page.answer(37, said["shape"])
    page.do("save", scan=37)
    ours = page.session.scan(37).cut.cut(saved(page, 37, tmp_path).array)
    for k, (values, _) in parts.items():
        np.testing.assert_array_equal(values, ours[k])


def test_choices_go_to_infer_and_unknown_ones_are_refused(page, hearts):
    page.drop(38, "scan", hearts[0][0])
    said = page.do("open", scan=38, options={"axis": "sagittal", "modality": "ct"})
    assert (said["axis"], said["modality"], said["range"]) == ("sagittal", "ct", [-100, 200])
    assert "no choice" in page.do("open", scan=38, options={"axis": "upwards"})["error"]


# -------------------------------------------------------------------------------------------------
# Hostile requests

def test_only_our_own_page_is_answered(page):
    host = f"127.0.0.1:{page.server.server_port}"
    assert page.request("", Host=host)[0] == 200
    assert page.request("app.js", Origin=f"http://{host}")[0] == 200
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"},
                    {"Origin": f"https://{host}.evil.example"}, {"Host": "evil.example"},
                    {"Host": f"evil.example:{page.server.server_port}"}, {"Host": ""}):
        assert page.request("", **headers)[0] == 403, headers
        assert page.request("do", b"{}", **headers)[0] == 403, headers
    assert page.request("", token="guess")[0] == 403
    assert page.request("do", b"{}", token="%C3%A9")[0] == 403


@pytest.mark.parametrize("path", ["../app.py", "%2e%2e/app.py", "..%2fapp.py", "app.py", "serve",
                                  "file/1/..%2f..%2fetc%2fpasswd", "slice/1/scan/0", "slice",
                                  "slice/-1/scan/0", "file/%00/answer", "do/do"])
def test_odd_addresses_get_an_answer_and_no_file(page, path):
    status, content = page.request(path)
    assert status in (400, 404)
    assert b"import" not in content and b"root:" not in content


@pytest.mark.parametrize("name", ["../../evil.nii", "/etc/evil.nii", "..%2f..%2fevil.nii", "..",
                                  "%00.nii", "C:%5Cevil.nii", ".hidden", "%0d%0aX:y"])
def test_a_name_never_leads_out_of_the_folder(page, name):
    page.request(f"upload/40/scan/{name}", b"x")
    page.request(f"upload/..%2f..%2fx/scan/{name}", b"x")
    page.request(f"upload/40/..%2f..%2fx/{name}", b"x")
    assert not list(page.folder.parent.glob("evil*")) and not Path("/etc/evil.nii").exists()
    for path in page.folder.rglob("*"):
        if path.is_file() and "/40/" in str(path):
            assert path.parent == page.folder / "40" / "scan"
    page.do("remove", scan=40)


@pytest.mark.parametrize("entry", ["/etc/evil.nii", "../../evil.nii", "a/../../evil.nii",
                                   "..\\..\\evil.nii", "C:\\evil.nii"])
def test_a_zip_with_paths_that_lead_out_is_refused(page, entry, tmp_path):
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr(entry, b"x")
    status, content = page.request("upload/41/scan/bad.zip", bad.read_bytes())
    assert status == 400 and b"leads out" in content
    assert not list(page.folder.rglob("*evil*"))
    for place in (page.folder.parent, page.folder.parent.parent, Path("/etc")):
        assert not list(place.glob("*evil*"))
    page.do("remove", scan=41)


def test_a_zip_bomb_is_stopped_while_it_unpacks(page, tmp_path, monkeypatch):
    there = sum(f.stat().st_size for f in page.folder.rglob("*") if f.is_file())
    monkeypatch.setattr(uploads, "MAX_BYTES", there + 20_000_000)
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.nii", bytes(200_000_000))
    assert bomb.stat().st_size < 1_000_000
    status, content = page.request("upload/42/scan/bomb.zip", bomb.read_bytes())
    assert status == 400 and b"GB that fit" in content
    assert sum(f.stat().st_size for f in page.folder.rglob("*") if f.is_file()) < 60_000_000
    page.do("remove", scan=42)
    monkeypatch.undo()
    assert page.request("")[0] == 200


def test_ten_gigabytes_are_refused_before_they_come(page):
    link = http.client.HTTPConnection("127.0.0.1", page.server.server_port, timeout=20)
    link.putrequest("POST", f"/{page.server.token}/upload/43/scan/a.nii")
    link.putheader("Content-Length", "10000000000")
    link.endheaders()
    answer = link.getresponse()
    assert answer.status == 400 and b"GB that fit" in answer.read()
    assert "GB that fit" in page.do("room", bytes=10 ** 10)["error"]
    for place in ("upload/43/scan/a.nii", "do"):
        status, content = page.request(place, b"x", **{"Content-Length": "-5"})
        assert status == 400


@pytest.mark.parametrize("name, text", [
    ("a.mhd", "ElementDataFile = /etc/passwd"), ("b.mha", "ElementDataFile = ../../x.raw"),
    ("c.nhdr", "data file: /etc/passwd"), ("d.nrrd", "datafile: ../x.raw"),
    ("e.mhd", "ElementDataFile = LIST\n/etc/passwd")])
@pytest.mark.parametrize("comments", (0, 2000))
def test_a_header_cannot_have_another_file_read(page, name, text, comments):
    nrrd = name[-4:] in ("nhdr", "nrrd")
    head = "NRRD0004\n" * nrrd + ("# " if nrrd else "Comment = ") * bool(comments)
    head += ("x" * 60 + ("\n# " if nrrd else "\nComment = ")) * comments + "\n" * bool(comments)
    page.request(f"upload/44/scan/{name}", (head + text + "\n").encode())
    said = page.do("open", scan=44)["error"]
    assert ("header of more than" if comments else "drop that file") in said
    page.do("remove", scan=44)


def test_a_mhd_finds_the_raw_file_that_was_dropped_with_it(page, hearts, tmp_path):
    import SimpleITK as sitk

    sitk.WriteImage(sitk.ReadImage(str(hearts[0][0])), str(tmp_path / "a.mhd"), False)
    said = page.drop(45, "scan", *sorted(tmp_path.iterdir()))
    assert said["shape"][1:] == list(page.session.scan(45).stack.shape[1:])


def test_a_claim_of_many_voxels_is_refused(page, tmp_path, monkeypatch):
    import nibabel

    monkeypatch.setattr(app.volumes, "MAX_VOXELS", app.MAX_VOXELS)
    header = nibabel.Nifti1Header()
    header.set_data_shape((1024, 1024, 300))
    header.set_data_dtype(np.int16)
    path = tmp_path / "a.nii"
    path.write_bytes(header.binaryblock + bytes(1000))
    assert "claims" in page.drop(46, "scan", path)["error"]


def test_a_zip_of_too_many_files_is_refused(page, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_ENTRIES", 20)
    many = tmp_path / "many.zip"
    with zipfile.ZipFile(many, "w") as archive:
        for n in range(21):
            archive.writestr(f"{n}.dcm", b"x")
    status, content = page.request("upload/47/scan/many.zip", many.read_bytes())
    assert status == 400 and b"21 files" in content
    assert not list((page.folder / "47" / "scan").iterdir())


def test_a_wrong_mask_leaves_the_one_before(page, hearts):
    page.drop(48, "scan", hearts[0][0])
    page.drop(48, "label", hearts[0][1])
    assert "its image" in page.drop(48, "next", hearts[1][1])["error"]
    page.do("forget", scan=48)
    assert page.do("label", scan=48)["classes"] == [1, 2, 3]
    page.request("paint/48/1", np.ones(page.session.scan(48).stack.shape[1:], np.int32).tobytes())
    assert page.drop(48, "next", hearts[0][1])["classes"] == [1, 2, 3]
    assert not page.session.scan(48).painted  # a new mask takes the place of the painting, too


def test_names_of_any_script_and_large_classes_come_back(page, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    name = "Gr\u00f6\u00dfe \u56fe\u50cf x.png"
    image = tmp_path / name
    Image.fromarray(rng.integers(0, 255, (40, 50), np.uint8)).save(image)
    status, _ = page.request(f"upload/49/scan/{quote(name)}", image.read_bytes())
    assert status == 200
    shape = page.do("open", scan=49)["shape"][1:]
    classes = np.zeros(shape, np.int32)
    classes[3:9, 4:20] = 70000
    page.request("paint/49/0", classes.tobytes())
    page.do("name", scan=49, names={"70000": "a name"})
    link = page.request("file/49/example")
    with zipfile.ZipFile(io.BytesIO(link[1])) as archive:
        assert json.loads(archive.read("classes.json")) == {"70000": "a name"}
        label, = [n for n in archive.namelist() if "_label" in n]
        archive.extract(label, tmp_path)
    np.testing.assert_array_equal(read_volume(tmp_path / label).array[:, :, 0].T, classes)


def test_an_unprepared_answer_is_an_error_and_messages_name_no_folder(page, tmp_path):
    files = write_dicom(tmp_path / "series", hounsfield(5))
    assert "not prepared" in json.loads(page.request("answer/50", b"")[1])["error"]
    said = page.drop(50, "scan", *files[:2], *files[3:])["error"]
    assert said.startswith("the dropped scan:") and "/tmp" not in said


def test_a_reader_that_stalls_does_not_hold_the_others(page, hearts, monkeypatch):
    monkeypatch.setattr(app.Handler, "timeout", 2)
    monkeypatch.setattr(app.Scan, "parts", lambda self: (
        ([k], np.zeros((1, 2000, 2000), np.float32), np.zeros((1, 2000, 2000)))
        for k in range(20)))
    page.drop(51, "scan", hearts[0][0])
    page.session.scan(51).case = object()
    link = http.client.HTTPConnection("127.0.0.1", page.server.server_port)
    link.request("POST", f"/{page.server.token}/answer/51", b"")
    link.getresponse()  # its body is never read
    assert page.do("open", scan=51)["axis"] == "axial"  # waits until the other has timed out
    link.close()


def test_the_folder_goes_when_the_program_is_terminated(checkpoint, tmp_path):
    command = [sys.executable, "app.py", "--port", "0", "--no-browser", "--checkpoint",
               str(checkpoint)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "TMPDIR": str(tmp_path)}) as program:
        assert program.stdout.readline().startswith("http://127.0.0.1:")
        assert list(tmp_path.glob("mvg_*"))
        program.terminate()
        program.wait(20)
    assert not list(tmp_path.glob("mvg_*"))


def test_the_folder_is_private_and_goes(tmp_path, checkpoint):
    page = Page(checkpoint)
    assert page.folder.stat().st_mode & 0o077 == 0
    page.request("upload/1/scan/a.nii", b"x")
    page.close()
    assert not page.folder.exists()
