"""The prepared store and the doctor: killed, raced, corrupted, newer, too large; nothing torn, nothing silent."""

import faulthandler
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import data
import readers
import train
from conftest import REAL, ROOT
from readers import DataError
from test_data import write_pair
from test_train import failure

quiet = lambda line: None


# ---- the doctor

# What is wrong with the stand-ins (phantom.PLANTED tells of more: those are ways of storing, to be read rightly without a word).
DEFECTS = {"promise12": ["test_Case02: Case02_segmentation.mhd is missing"], "brats_local": ["BraTS-GLI-00001-000: BraTS-GLI-00001-000-t1n.nii.gz"],
           "chest_xray": ["CHNCXR_0025_0: CHNCXR_0025_0.png is missing", "CHNCXR_0010_0: CHNCXR_0010_0_mask.png is 96x80"],
           "la": ["0RZDK210BSMWAA6467LU: its header says voxels of 1 x 1 x 1 mm"], "msd_lung": ["lung_014: lung_014.nii.gz is missing"]}
REMARKS = {"promise12": ["5 cases of"], "brats_gli": ["14 cases of"], "brats_local": ["1 cases of"], "ldct": ["1 patients have one dose only"],
           "chest_xray": ["6 cases of", "2 cases of", "a color picture is read as gray (1 of 13"], "deeplesion": ["3 lesions marked Possibly_noisy"],
           "microsegnet": ["its header's voxels of 1 x 1 x 1 mm are a placeholder (7 of 7"]}


def doctor(*args):
    run = subprocess.run([sys.executable, str(ROOT / "data.py"), *map(str, args)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return run.returncode, run.stdout, run.stderr


def test_the_doctor_finds_what_was_planted_and_nothing_else(sixteen, tmp_path):
    status, said, _ = doctor("--data_root", sixteen, "--json", "--figure", tmp_path / "f.png")
    report = json.loads(said)["datasets"]
    assert status == 1 and (tmp_path / "f.png").stat().st_size > 10_000 and json.loads(said)["problems"] == []
    assert list(report) == list(data.DATASETS) and all(r["found"] for r in report.values())
    for name, r in report.items():
        for what, expected in (("problems", DEFECTS), ("notes", REMARKS)):
            starts = expected.get(name, [])
            assert len(r[what]) == len(starts) and all(line.startswith(start) for line, start in zip(r[what], starts)), (name, r[what])
        assert Path(r["root"]).is_dir() and r["cases"]["train"] and r["cases"]["test"] and r["slices"] >= r["foreground"] > 0
        assert 0 < r["mean"] < 1 and (not data.DATASETS[name].colored or r["classes"])
    assert report["amos_mri"]["classes_absent"] == ["bladder", "prostate/uterus"] and report["msd_spleen"]["classes"] == {"1": "spleen"}


def test_the_doctor_tells_the_truth_of_the_real_scans():
    if not REAL.is_dir():
        pytest.skip(f"real scans are not here ({REAL})")
    report = data.diagnose(data.find(REAL))
    cases = {n: (r["cases"]["train"], r["cases"]["test"]) for n, r in report.items() if r["found"]}
    assert cases["acdc"] == (72, 28) and cases["msd_hippocampus"] == (48, 12) and cases["Dataset801_NerveUltrasound"] == (100, 20)
    assert sum(cases["deeplesion"]) == 50 and cases["promise12"] == cases["msd_spleen"] == cases["ldct"] == (1, 0)
    problems = {n: r["problems"] for n, r in report.items() if r["problems"]}
    assert set(problems) == {"brats_local", "ldct"}  # no healthy mask; slices of a volume stacked 210 mm apart, its headers are stand-ins
    assert "mask-healthy" in problems["brats_local"][0] and "spacing" in problems["ldct"][0]
    assert {n for n in data.DATASETS if not report[n]["found"]} == {"amos_ct", "amos_mri", "word", "btcv", "microsegnet", "chest_xray", "msd_liver", "msd_lung"}


def test_the_doctor_names_every_kind_of_problem(tmp_path):
    root = tmp_path / "data" / "Dataset900_Ill"
    for i, n in enumerate(("good", "other", "third", "unreadable", "mismatch", "value", "missing", "thick", "empty", "constant")):
        write_pair(root, n, seed=i)
    image, label = lambda n: root / "imagesTr" / f"{n}_0000.nii.gz", lambda n: root / "labelsTr" / f"{n}.nii.gz"
    import nibabel
    image("unreadable").write_bytes(image("unreadable").read_bytes()[:300])
    put = lambda path, array, affine=None: nibabel.save(nibabel.Nifti1Image(array, nibabel.load(path).affine if affine is None else affine), path)
    shape = nibabel.load(label("good")).shape
    put(label("mismatch"), np.ones((5, 5, 5), np.uint8))
    put(label("value"), np.full(shape, 7, np.uint8))
    label("missing").unlink()
    for path in (image("thick"), label("thick")):
        put(path, np.asarray(nibabel.load(path).dataobj), nibabel.load(path).affine @ np.diag([9, 9, 9, 1]))
    put(label("empty"), np.zeros(shape, np.uint8))
    put(image("constant"), np.full(shape, 3, np.int16))
    status, said, _ = doctor("--data_root", tmp_path, "--json")
    report = json.loads(said)["datasets"]["Dataset900_Ill"]
    found = {line.split(": ")[0]: line for line in report["problems"]}
    words = {"unreadable": "cannot be read", "mismatch": "5x5x5", "value": "holds the label 7", "missing": "is missing", "thick": "spacing", "empty": "label is empty",
             "constant": "image is constant"}
    assert status == 1 and set(found) == set(words) and all(w in found[n] for n, w in words.items()), report["problems"]
    status, said, _ = doctor("--data_root", tmp_path, "--figure", tmp_path / "f.png")
    assert status == 1 and (tmp_path / "f.png").is_file() and all(f"PROBLEM: {line}" in said for line in report["problems"])
    for n in words:
        image(n).unlink()
        label(n).unlink(missing_ok=True)
    assert doctor("--data_root", tmp_path)[0] == 0


def test_strict_refuses_to_start_and_the_rest_says_what_is_left_out(tmp_path, capsys):
    root = tmp_path / "data" / "Dataset900_Ill"
    for i in range(4):
        write_pair(root, f"c{i}", seed=i)
    (root / "imagesTr" / "c1_0000.nii.gz").write_bytes(b"nothing")
    argv = ["--data_root", tmp_path / "data", "--store", tmp_path / "store", "--model", "demo", "--image_size", "16", "--batch_size", "2", "--steps", "1", "--out"]
    assert "1 problems, the first is Dataset900_Ill: c1" in failure(capsys, train.main, *argv, tmp_path / "a", "--strict")
    train.main([*map(str, argv), str(tmp_path / "b")])
    assert "left out of Dataset900_Ill: c1" in capsys.readouterr().out


# ---- building

def build(found, root, **more):
    return data.prepare(found, root, quiet, **more)


def same_tree(a, b):
    """Two folders with the same files, byte by byte, hidden ones included."""
    files = [sorted(p.relative_to(r) for p in r.rglob("*") if p.is_file()) for r in (a, b)]
    return files[0] == files[1] and not filecmp.cmpfiles(a, b, files[0], shallow=False)[1]


def test_processes_change_nothing(stand_ins, tmp_path):
    found = data.find(stand_ins)
    build(found, tmp_path / "one", workers=1)
    build(found, tmp_path / "three", workers=3)
    assert same_tree(tmp_path / "one", tmp_path / "three")


def kill_and_finish(root, tmp_path, moments):
    """Builds that are killed, each into a store of its own, then finished: all equal to an unbroken one. Returns at how many cases."""
    found, at = data.find(root), []
    started = time.perf_counter()
    build(found, tmp_path / "whole", workers=2)
    length = time.perf_counter() - started
    program = f"import data; data.prepare(data.find({str(root)!r}), STORE, workers=2)"
    for i, moment in enumerate(moments):
        store = tmp_path / f"killed{i}"
        run = subprocess.Popen([sys.executable, "-c", program.replace("STORE", repr(str(store)))], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        while not store.is_dir() and run.poll() is None:  # imports are no building
            time.sleep(0.005)
        time.sleep(moment * length)
        run.kill()  # the parent alone: its workers have to notice
        run.wait()
        at.append(len(list(store.glob("*/*/case.json"))))
        deadline = time.time() + 20
        while subprocess.run(["pgrep", "-g", str(run.pid)], capture_output=True).returncode == 0 and time.time() < deadline:
            time.sleep(0.1)
        assert time.time() < deadline, "workers outlived their parent"
        build(found, store, workers=2)
        assert same_tree(tmp_path / "whole", store), f"killed at {moment:.2f} of the time, {at[-1]} cases"
        shutil.rmtree(store)
    return at


def test_a_killed_build_is_finished_as_if_nothing_had_been(stand_ins, tmp_path):
    kill_and_finish(stand_ins, tmp_path, (0.3, 0.7))


@pytest.mark.slow
def test_ten_kills_of_a_build_of_all_sixteen(sixteen, tmp_path):
    at = kill_and_finish(sixteen, tmp_path, np.random.default_rng(0).uniform(0, 1, 10))
    print("killed after", at, "cases")
    assert len(set(at)) > 5


def test_several_programs_build_one_store_at_once(stand_ins, tmp_path):
    program = f"import data; data.prepare(data.find({str(stand_ins)!r}), {str(tmp_path / 'store')!r}, workers=1)"
    runs = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    build(data.find(stand_ins), tmp_path / "alone")
    assert same_tree(tmp_path / "store", tmp_path / "alone")


def test_a_read_only_data_root_and_a_full_disk(tmp_path, monkeypatch):
    for n in "abcdef":
        write_pair(tmp_path / "data" / "Dataset900_One", n)
    folders = [tmp_path / "data", *(p for p in (tmp_path / "data").rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    before = sorted((tmp_path / "data").rglob("*"))
    said = []
    assert data.prepare(data.find(tmp_path / "data"), tmp_path / "store", said.append) == {}
    assert sorted((tmp_path / "data").rglob("*")) == before
    assert any("5 more cases to prepare: about 0.00 GB" in line and "minutes" in line for line in said), said
    for folder in folders:
        folder.chmod(0o755)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(DataError, match="needs about .* GB more and 0.0 GB are free: name another --store"):
        build(data.find(tmp_path / "data"), tmp_path / "other")


def test_a_newer_store_is_neither_read_nor_overwritten(tmp_path):
    write_pair(tmp_path / "data" / "Dataset900_One", "a")
    found = data.find(tmp_path / "data")
    build(found, tmp_path / "store")
    index = tmp_path / "store" / "Dataset900_One" / "a" / "case.json"
    index.write_text(index.read_text().replace(f'"version": {data.STORE_VERSION}', '"version": 99'))
    kept = index.read_bytes()
    for use in (lambda: build(found, tmp_path / "store"), lambda: data.Store(tmp_path / "store")):
        with pytest.raises(DataError, match="version 99.*update the code"):
            use()
    assert index.read_bytes() == kept


# ---- processes

def die(number):
    if number == 3:
        faulthandler.disable()  # pytest would print a page about where it died
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 5:
        raise DataError("five is bad")
    return number * 2


def test_a_job_that_kills_its_process_ends_nobody_else():
    answers = {n: (answer, error) for n, answer, error in data.in_processes(die, [(n,) for n in range(12)], workers=2)}
    assert set(answers) == set(range(12)) and {n for n, (_, error) in answers.items() if error} == {3, 5}
    assert "died" in str(answers[3][1]) and str(answers[5][1]) == "five is bad"
    assert all(answers[n][0] == 2 * n for n in answers if n not in (3, 5))


# ---- corrupted files

def corrupt(content, kind, rng):
    """One of the ways files go bad."""
    content, how = bytearray(content), rng.integers(5)
    if how == 0:
        return bytes(content[:rng.integers(len(content))])
    if how == 1:  # bits of the header
        for at in rng.integers(min(348, len(content)), size=rng.integers(1, 6)):
            content[at] ^= 1 << int(rng.integers(8))
    if how == 2:  # bytes anywhere
        for at in rng.integers(len(content), size=20):
            content[at] = int(rng.integers(256))
    if how == 3 and kind in (".nii", ".nii.gz"):  # dimensions, type, slope
        at = int(rng.choice([42, 44, 46, 70, 72, 112, 116, 108]))
        content[at:at + 2] = rng.choice([b"\xff\x7f", b"\x00\x80", b"\x00\x00", b"\x40\x00", b"\x10\x00"])
    elif how == 3 and kind in (".mhd", ".mha", ".nrrd"):
        for word, other in ((b"DimSize = ", b"DimSize = 99999 "), (b"sizes: ", b"sizes: 99999 "), (b"MET_SHORT", b"MET_DOUBLE"), (b"type: ", b"type: double #")):
            if rng.random() < 0.5:
                content = bytearray(bytes(content).replace(word, other, 1))
    elif how == 3:
        content[16:24] = b"\x00\xff\xff\xff\x00\xff\xff\xff"  # a PNG's width and height
    if how == 4:  # two halves swapped
        half = len(content) // 2
        return bytes(content[half:] + content[:half])
    return bytes(content)


def read_corrupted(case, dataset, file, number, folder):
    """Read a case with one of its files corrupted: what came of it, as text; the process's peak of memory meanwhile goes to a file."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    try:
        return read_spoilt(case, dataset, file, number, folder)
    finally:
        peak = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
        (Path(folder) / f"{number}.peak").write_text(peak.split()[1])


def read_spoilt(case, dataset, file, number, folder):
    import gzip
    rng, kind = np.random.default_rng([7, number]), readers.extension(file)
    place = Path(folder) / str(number)
    place.mkdir()
    twin = {p: place / p.name for p in (q for f in case.files for q in (f, f.with_suffix(".raw"), f.with_suffix(".zraw")) if q.is_file())}
    for source, copy in twin.items():
        shutil.copy(source, copy)
    packed = kind == ".nii.gz" and rng.random() < 0.7  # below the compression, else everything ends in a bad checksum
    content = gzip.decompress(twin[file].read_bytes()) if packed else twin[file].read_bytes()
    content = corrupt(content, kind, rng)
    twin[file].write_bytes(gzip.compress(content, 1) if packed else content)
    moved = replace(case, files=tuple(twin[f] for f in case.files),
                    load=partial(case.load.func, *(twin.get(a, a) if isinstance(a, Path) else a for a in case.load.args), **case.load.keywords))
    arrays, index = data.prepare_case(moved, dataset)
    shape = (index["slices"], *index["size"])
    assert all(a.shape == shape for a in arrays.values()) and arrays["image"].dtype == np.uint16 and np.isfinite(index["scale"]).all()
    assert not dataset.colored or arrays["label"].max() <= len(dataset.labels)
    return "read"


@pytest.mark.slow
def test_200_corruptions(sixteen, tmp_path):
    """Finite arrays of the declared shape, or one line that names the file; no crash, no hang, memory below 2 GiB."""
    roots, jobs = [sixteen] + [REAL] * REAL.is_dir(), []
    for root in roots:
        for hit in data.find(root, say=quiet).values():
            if hit.dataset.name not in ("ldct", "deeplesion"):
                case = next((c for c in hit.cases if c.split != "inference"), None)
                jobs += [(case, hit.dataset, f) for f in case.files if readers.extension(f)] if case else []
    jobs = [(*jobs[i % len(jobs)], i, str(tmp_path)) for i in range(200)]
    started, came = time.time(), {}
    for number, answer, error in data.in_processes(read_corrupted, jobs, workers=2):
        came.setdefault(answer or type(error).__name__, []).append(number)
        if error is not None:
            text = str(error)
            assert isinstance(error, DataError) and "\n" not in text and "died" not in text, (jobs[number][2], text)
            assert any(p.name in text for p in (tmp_path / str(number)).iterdir()), (jobs[number][2], text)
    print({k: len(v) for k, v in came.items()}, f"{time.time() - started:.0f} s")
    assert sum(map(len, came.values())) == 200 and len(came["DataError"]) > 80 and len(came["read"]) > 20
    peaks = [int(p.read_text()) for p in tmp_path.glob("*.peak")]
    print(f"peak {max(peaks) / 2 ** 20:.2f} GiB")
    assert len(peaks) == 200 and max(peaks) < 2 * 2 ** 20  # KiB


# ---- a long run

@pytest.mark.slow
def test_100_000_draws_leave_files_and_memory_alone(tmp_path):
    """From a store of 2,000 cases."""
    write_pair(tmp_path / "data" / "Dataset900_Many", "a", shape=(20, 20, 3))
    build(data.find(tmp_path / "data"), tmp_path / "store")
    root = tmp_path / "store" / "Dataset900_Many"
    about, index = (json.loads((root / p).read_text()) for p in ("dataset.json", "a/case.json"))
    for i in range(2000):
        shutil.copytree(root / "a", root / f"c{i}")
        (root / f"c{i}" / "case.json").write_text(json.dumps({**index, "name": f"c{i}", "patient": f"c{i}"}))
    (root / "dataset.json").write_text(json.dumps({**about, "cases": [f"c{i}" for i in range(2000)]}))
    episodes = data.Episodes(data.Store(tmp_path / "store"), 16, 8, 4)
    state = lambda: (len(os.listdir("/proc/self/fd")), int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2 ** 20)
    seen = {}
    for draw in range(100_000):
        episodes[draw // 100, draw % 100]
        if draw in (5_000, 50_000, 99_999):
            seen[draw] = state()
    print({d: f"{f} files, {m:.0f} MiB" for d, (f, m) in seen.items()})
    first, last = seen[5_000], seen[99_999]
    assert last[0] <= first[0] + 2 and last[1] < first[1] + 20
