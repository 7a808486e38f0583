"""The prepared store and the doctor: what they hold, and that nothing is torn, nothing silent.

Programs are killed and raced, files corrupted, stores newer than the code or too large.
"""

import faulthandler
import filecmp
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest

from common import context
from conftest import REAL, ROOT
from scans.datasets import DATASETS, find
from scans.doctor import diagnose
from scans.store import STORE_VERSION, Store, in_processes, open_store, prepare, prepare_case
from scans.volumes import DataError, extension, intensity_range, slicing, to_unit
from test_datasets import quiet, write_pair


# ---- what the store holds

def test_the_store_holds_what_the_files_hold(stand_ins, store):
    for name, hit in find(stand_ins, ["acdc", "Dataset802_MsT1ToFlair"]).items():
        case = hit.cases[0]
        stored = next(c for c in store.cases[name] if c.name == case.name)
        pair = case.load()
        cut = slicing(pair.image)
        expected = to_unit(cut.cut(pair.image.array), intensity_range(pair.image, "mri"))
        for k in (0, stored.slices // 2):
            image, label, valid = stored.read(k)
            assert np.abs(image - expected[k]).max() < 1 / 2 ** 13 and valid is None
            if hit.dataset.colored:
                assert np.array_equal(label, cut.cut(pair.label.array)[k])
                assert stored.classes[k] == [c for c in np.unique(label) if c]


def test_the_store_is_built_once_and_rebuilt_where_a_source_changed(tmp_path):
    root, where = tmp_path / "data" / "Dataset900_Two", tmp_path / "store"

    def stamp(name):
        return (where / "Dataset900_Two" / name / "image.npy").stat().st_mtime_ns

    write_pair(root, "a")
    write_pair(root, "b", seed=1)
    found = find(tmp_path / "data")
    prepare(found, where)
    before = {n: stamp(n) for n in "ab"}
    prepare(found, where)
    assert {n: stamp(n) for n in "ab"} == before
    write_pair(root, "b", seed=2, shape=(40, 40, 8))
    prepare(find(tmp_path / "data"), where)
    assert stamp("a") == before["a"] and stamp("b") != before["b"]
    cases = Store(where).cases["Dataset900_Two"]
    assert {c.name: c.slices for c in cases} == {"a": 6, "b": 8}


def test_a_bad_case_is_named_and_left_out(tmp_path, capsys):
    root = tmp_path / "data" / "Dataset900_Bad"
    for i, n in enumerate("abc"):
        write_pair(root, n, seed=i)
    (root / "labelsTr" / "b.nii.gz").unlink()
    whole = (root / "imagesTr" / "c_0000.nii.gz").read_bytes()
    (root / "imagesTr" / "c_0000.nii.gz").write_bytes(whole[:len(whole) // 2])
    problems = prepare(find(tmp_path / "data"), tmp_path / "store")
    said = capsys.readouterr().out
    missing = "b: b.nii.gz is missing, it is neither trained on nor scored"
    assert f"Dataset900_Bad: {missing}" in said
    assert len(problems["Dataset900_Bad"]) == 1 and "c_0000.nii.gz cannot be read" in said
    assert [c.name for c in Store(tmp_path / "store").cases["Dataset900_Bad"]] == ["a"]


def test_a_large_slice_is_reduced_to_the_training_resolution(tmp_path):
    write_pair(tmp_path / "Dataset900_Large", "a", shape=(700, 300, 1))
    prepare(find(tmp_path), tmp_path / "store")
    case = Store(tmp_path / "store").cases["Dataset900_Large"][0]
    image, label, _ = case.read(0)
    assert image.shape == label.shape == (300, 512)
    assert case.index["spacing"] == pytest.approx([4, 1, 700 / 512])
    assert set(np.unique(label)) == {0, 1}


def test_another_description_of_the_dataset_makes_its_cases_anew(tmp_path):
    root = tmp_path / "data" / "Dataset900_One"
    write_pair(root, "a")
    about = json.loads((root / "dataset.json").read_text())
    for change in ({}, {"channel_names": {"0": "CT"}}, {"labels": "image"}):
        (root / "dataset.json").write_text(json.dumps({**about, **change}))
        prepare(find(tmp_path / "data"), tmp_path / "store")
        case = Store(tmp_path / "store").cases["Dataset900_One"][0]
        assert (case.index["scale"] == [-100, 200]) == ("channel_names" in change)
        assert case.read(2)[1].max() <= 1
        assert (case.index["label_scale"] is None) == (change.get("labels") != "image")


@pytest.mark.parametrize("damage", ("cut", "empty", "gone", "index", "list", "dataset"))
def test_a_damaged_store_is_named_and_mended(tmp_path, damage):
    write_pair(tmp_path / "data" / "Dataset900_One", "a")
    found = find(tmp_path / "data")
    prepare(found, tmp_path / "store")
    case = tmp_path / "store" / "Dataset900_One" / "a"
    if damage == "cut":
        (case / "image.npy").write_bytes((case / "image.npy").read_bytes()[:500])
    elif damage == "empty":
        (case / "label.npy").write_bytes(b"")
    elif damage == "gone":
        (case / "label.npy").unlink()
    elif damage == "index":
        (case / "case.json").write_text('{"version": 2}')
    elif damage == "list":
        (case / "case.json").write_text("[]")
    else:
        (case.parent / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="Dataset900_One.* is damaged"):
        Store(tmp_path / "store")
    prepare(found, tmp_path / "store")
    mended = Store(tmp_path / "store").cases["Dataset900_One"][0]
    assert mended.read(0)[0].shape == (40, 40)


def newer_store(tmp_path):
    """A store with a case of a later version: what was found, the store, the case's index."""
    write_pair(tmp_path / "data" / "Dataset900_One", "a")
    found = find(tmp_path / "data")
    prepare(found, tmp_path / "store", quiet)
    index = tmp_path / "store" / "Dataset900_One" / "a" / "case.json"
    text = index.read_text()
    assert f'"version": {STORE_VERSION}' in text
    index.write_text(text.replace(f'"version": {STORE_VERSION}', '"version": 99'))
    return found, tmp_path / "store", index


def test_a_newer_store_is_refused(tmp_path):
    with pytest.raises(DataError, match="version 99"):
        Store(newer_store(tmp_path)[1])


def test_a_newer_store_is_neither_read_nor_overwritten(tmp_path):
    found, store, index = newer_store(tmp_path)
    kept = index.read_bytes()
    for use in (partial(prepare, found, store, quiet), partial(Store, store)):
        with pytest.raises(DataError, match="version 99.*update the code"):
            use()
    assert index.read_bytes() == kept


# ---- the doctor

# What is wrong with the stand-ins. Their other traps are ways of storing, to be read rightly
# without a word.
DEFECTS = {
    "promise12": ["test_Case02: Case02_segmentation.mhd is missing"],
    "brats_local": ["BraTS-GLI-00001-000: BraTS-GLI-00001-000-t1n.nii.gz"],
    "chest_xray": ["CHNCXR_0025_0: CHNCXR_0025_0.png is missing",
                   "CHNCXR_0010_0: CHNCXR_0010_0_mask.png is 96x80"],
    "la": ["0RZDK210BSMWAA6467LU: its header says voxels of 1 x 1 x 1 mm"],
    "msd_lung": ["lung_014: lung_014.nii.gz is missing"]}
REMARKS = {
    "promise12": ["5 cases of"], "brats_gli": ["14 cases of"], "brats_local": ["1 cases of"],
    "ldct": ["1 patients have one dose only"],
    "chest_xray": ["6 cases of", "2 cases of"],
    "deeplesion": ["3 lesions marked Possibly_noisy"],
    "microsegnet": ["its header's voxels of 1 x 1 x 1 mm are a placeholder (7 of 7"]}


def doctor(*args):
    """Run `python data.py`: (exit status, standard output)."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "data.py"), *map(str, args)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    return run.returncode, run.stdout

@pytest.mark.parametrize("offset,said", ((0, False), (1024, True)))
def test_the_doctor_says_that_a_ct_is_not_in_hu(tmp_path, offset, said):
    """Of its labels the middle one has no name."""
    folder = tmp_path / "Dataset900_X"
    for n, name in enumerate("abc"):
        write_pair(folder, name, value=n + 1, channel_names={"0": "CT"},
                   labels={"background": 0, "first": 1, "third": 3})
        image = nibabel.load(folder / "imagesTr" / f"{name}_0000.nii.gz")
        array = 300 * (np.asarray(image.dataobj) - np.asarray(image.dataobj).min()) - 1000 + offset
        nibabel.Nifti1Image(array, image.affine).to_filename(image.get_filename())
    problems = diagnose(find(tmp_path), workers=1)["Dataset900_X"]["problems"]
    assert sum("not in HU" in p for p in problems) == 3 * said
    assert [p for p in problems if "no name" in p] == \
        ["the label 2 occurs, but dataset.json has no name for it"]



def test_the_doctor_finds_what_was_planted_and_nothing_else(sixteen, tmp_path):
    figure = tmp_path / "f.png"
    status, said = doctor("--data_root", sixteen, "--json", "--figure", figure)
    said = json.loads(said)
    report = said["datasets"]
    assert status == 1 and figure.stat().st_size > 10_000 and said["problems"] == []
    assert list(report) == list(DATASETS) and all(r["found"] for r in report.values())
    for name, r in report.items():
        for what, expected in (("problems", DEFECTS), ("notes", REMARKS)):
            starts = expected.get(name, [])
            assert len(r[what]) == len(starts), (name, r[what])
            assert all(map(str.startswith, r[what], starts)), (name, r[what])
        assert Path(r["root"]).is_dir() and r["cases"]["train"] and r["cases"]["test"]
        assert r["slices"] >= r["foreground"] > 0
        assert 0 < r["mean"] < 1 and (not DATASETS[name].colored or r["classes"])
    assert report["amos_mri"]["classes_absent"] == ["bladder", "prostate/uterus"]
    assert report["msd_spleen"]["classes"] == {"1": "spleen"}


def test_the_doctor_tells_the_truth_of_the_real_scans(real):
    report = diagnose(find(real))
    cases = {n: (r["cases"]["train"], r["cases"]["test"]) for n, r in report.items() if r["found"]}
    assert cases["acdc"] == (72, 28) and cases["msd_hippocampus"] == (48, 12)
    assert cases["Dataset801_NerveUltrasound"] == (100, 20)
    assert sum(cases["deeplesion"]) == 50
    assert cases["promise12"] == cases["msd_spleen"] == cases["ldct"] == (1, 0)
    problems = {n: r["problems"] for n, r in report.items() if r["problems"]}
    # no healthy mask; slices of a volume stacked 210 mm apart, whose headers are stand-ins
    assert set(problems) == {"brats_local", "ldct"}
    assert "mask-healthy" in problems["brats_local"][0] and "spacing" in problems["ldct"][0]
    assert {n for n in DATASETS if not report[n]["found"]} == {
        "amos_ct", "amos_mri", "word", "btcv", "microsegnet", "chest_xray", "msd_liver",
        "msd_lung"}


ILL = {  # case: what the doctor says of it
    "unreadable": "cannot be read", "mismatch": "5x5x5", "value": "holds the label 7",
    "missing": "is missing", "thick": "spacing", "empty": "label is empty",
    "constant": "image is constant"}


def make_ill(root):
    """An nnU-Net folder with three good cases and one of every kind of `ILL`."""
    for i, n in enumerate(("good", "other", "third", *ILL)):
        write_pair(root, n, seed=i)
    image = {n: root / "imagesTr" / f"{n}_0000.nii.gz" for n in ILL}
    label = {n: root / "labelsTr" / f"{n}.nii.gz" for n in ILL}
    affine, shape = nibabel.load(label["value"]).affine, nibabel.load(label["value"]).shape

    def put(path, array, scale=1):
        turned = affine @ np.diag([scale, scale, scale, 1])
        nibabel.save(nibabel.Nifti1Image(array, turned), path)

    image["unreadable"].write_bytes(image["unreadable"].read_bytes()[:300])
    put(label["mismatch"], np.ones((5, 5, 5), np.uint8))
    put(label["value"], np.full(shape, 7, np.uint8))
    label["missing"].unlink()
    for path in (image["thick"], label["thick"]):
        put(path, np.asarray(nibabel.load(path).dataobj), 9)
    put(label["empty"], np.zeros(shape, np.uint8))
    put(image["constant"], np.full(shape, 3, np.int16))
    return [*image.values(), *label.values()]


def test_the_doctor_names_every_kind_of_problem(tmp_path):
    files = make_ill(tmp_path / "data" / "Dataset900_Ill")
    status, said = doctor("--data_root", tmp_path, "--json")
    problems = json.loads(said)["datasets"]["Dataset900_Ill"]["problems"]
    named = {line.split(": ")[0]: line for line in problems}
    assert status == 1 and set(named) == set(ILL), problems
    assert all(words in named[n] for n, words in ILL.items()), problems
    status, said = doctor("--data_root", tmp_path, "--figure", tmp_path / "f.png")
    assert status == 1 and (tmp_path / "f.png").is_file()
    assert all(f"PROBLEM: {line}" in said for line in problems)
    for path in files:
        path.unlink(missing_ok=True)
    assert doctor("--data_root", tmp_path)[0] == 0


def test_strict_refuses_and_the_rest_says_what_is_left_out(tmp_path, capsys):
    root = tmp_path / "data" / "Dataset900_Ill"
    for i in range(4):
        write_pair(root, f"c{i}", seed=i)
    (root / "imagesTr" / "c1_0000.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match="1 problems, the first is Dataset900_Ill: c1"):
        open_store(tmp_path / "data", tmp_path / "store", strict=True)
    capsys.readouterr()
    store = open_store(tmp_path / "data", tmp_path / "store")
    assert "left out of Dataset900_Ill: c1" in capsys.readouterr().out
    assert [c.name for c in store.cases["Dataset900_Ill"]] == ["c0", "c2", "c3"]


# ---- building

def build(found, root, **more):
    return prepare(found, root, quiet, **more)


def same_tree(a, b):
    """Two folders with the same files, byte by byte, hidden ones included."""
    files = [sorted(p.relative_to(r) for p in r.rglob("*") if p.is_file()) for r in (a, b)]
    return files[0] == files[1] and not filecmp.cmpfiles(a, b, files[0], shallow=False)[1]


def start_building(root, store, workers, **more):
    """Another program that fills a store."""
    program = ("from scans import datasets, store; "
               f"store.prepare(datasets.find({str(root)!r}), {str(store)!r}, workers={workers})")
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL,
                            **more)


def test_processes_change_nothing(stand_ins, tmp_path):
    found = find(stand_ins)
    build(found, tmp_path / "one", workers=1)
    build(found, tmp_path / "three", workers=3)
    assert same_tree(tmp_path / "one", tmp_path / "three")


def kill_and_finish(root, tmp_path, moments):
    """Builds that are killed, each into a store of its own, then finished: all equal to an unbroken
    one. moments: which shares of the cases are then done. Returns at how many cases."""
    found, at = find(root), []
    build(found, tmp_path / "whole", workers=2)

    def done(store):
        return len(list(store.glob("*/*/case.json")))

    total = done(tmp_path / "whole")
    for i, moment in enumerate(moments):
        store = tmp_path / f"killed{i}"
        run = start_building(root, store, workers=2, start_new_session=True)
        while done(store) < moment * total and run.poll() is None:
            time.sleep(0.005)
        run.kill()  # the parent alone: its workers have to notice
        run.wait()
        at.append(done(store))
        deadline = time.time() + 20
        workers = ["pgrep", "-g", str(run.pid)]
        while subprocess.run(workers, capture_output=True).returncode == 0:
            assert time.time() < deadline, "workers outlived their parent"
            time.sleep(0.1)
        build(found, store, workers=2)
        whole = same_tree(tmp_path / "whole", store)
        assert whole, f"killed at {at[-1]} of {total} cases"
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
    runs = [start_building(stand_ins, tmp_path / "store", workers=1) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    build(find(stand_ins), tmp_path / "alone")
    assert same_tree(tmp_path / "store", tmp_path / "alone")


def test_a_read_only_data_root_and_a_full_disk(tmp_path, monkeypatch):
    root = tmp_path / "data"
    for n in "abcdef":
        write_pair(root / "Dataset900_One", n)
    folders = [root, *(p for p in root.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    before = sorted(root.rglob("*"))
    said = []
    assert prepare(find(root), tmp_path / "store", said.append) == {}
    assert sorted(root.rglob("*")) == before
    line = next(s for s in said if "5 more cases to prepare: about 0.00 GB" in s)
    assert "minutes" in line
    for folder in folders:
        folder.chmod(0o755)
    full = shutil._ntuple_diskusage(10, 10, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    words = "needs about .* GB more and 0.0 GB are free: name another --store"
    with pytest.raises(DataError, match=words):
        build(find(root), tmp_path / "other")


def test_a_disk_that_runs_full_ends_the_preparation(tmp_path, monkeypatch):
    """np.save's error of a short write has no number."""
    write_pair(tmp_path / "data" / "Dataset900_One", "a")

    def full(path, array):
        raise OSError("196608 requested and 118656 written")

    monkeypatch.setattr(np, "save", full)
    words = "cannot be written .196608 requested and 118656 written.: free some space"
    with pytest.raises(DataError, match=words):
        prepare(find(tmp_path / "data"), tmp_path / "store", quiet, workers=1)


def test_whatever_a_damaged_file_brings_about_costs_its_case_alone():
    def broken(x):
        return np.zeros((2, 0)).min() / x

    (_, answer, error), = in_processes(broken, [(1,)], 1)
    assert answer is None and isinstance(error, DataError) and "ValueError: zero-size" in str(error)


def test_ct_that_is_called_mri_is_a_problem(tmp_path):
    write_pair(tmp_path / "Dataset900_One", "a")
    path = tmp_path / "Dataset900_One" / "imagesTr" / "a_0000.nii.gz"
    image = nibabel.load(path)
    hu = np.linspace(-1000, 500, image.shape[0] * 240).reshape(image.shape).astype(np.int16)
    nibabel.Nifti1Image(hu, image.affine).to_filename(path)
    hit = find(tmp_path)["Dataset900_One"]
    assert "look like CT in HU, but are read as mri" in str(
        prepare_case(hit.cases[0], hit.dataset)[1]["notes"])


# ---- processes

def die(number):
    if number == 3:
        faulthandler.disable()  # pytest would print a page about where it died
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 5:
        raise DataError("five is bad")
    return number * 2


def test_a_job_that_kills_its_process_ends_nobody_else():
    jobs = [(n,) for n in range(12)]
    answers = {n: (answer, error) for n, answer, error in in_processes(die, jobs, workers=2)}
    assert set(answers) == set(range(12))
    assert {n for n, (_, error) in answers.items() if error} == {3, 5}
    assert "died" in str(answers[3][1]) and str(answers[5][1]) == "five is bad"
    assert all(answers[n][0] == 2 * n for n in answers if n not in (3, 5))


def test_a_job_that_is_not_taken_because_a_process_died_is_not_lost(monkeypatch):
    taken = []

    class Pool(ProcessPoolExecutor):
        def submit(self, *job):
            taken.append(job)
            if len(taken) == 3:  # another job has killed its process meanwhile
                raise BrokenProcessPool
            return super().submit(*job)

    monkeypatch.setattr("scans.store.ProcessPoolExecutor", Pool)
    jobs = [(-n,) for n in range(6)]
    answers = {n: answer for n, answer, _ in in_processes(abs, jobs, workers=2)}
    assert answers == {n: n for n in range(6)}


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
        values = [b"\xff\x7f", b"\x00\x80", b"\x00\x00", b"\x40\x00", b"\x10\x00"]
        content[at:at + 2] = rng.choice(values)
    elif how == 3 and kind in (".mhd", ".mha", ".nrrd"):
        for word, other in ((b"DimSize = ", b"DimSize = 99999 "), (b"sizes: ", b"sizes: 99999 "),
                            (b"MET_SHORT", b"MET_DOUBLE"), (b"type: ", b"type: double #")):
            if rng.random() < 0.5:
                content = bytearray(bytes(content).replace(word, other, 1))
    elif how == 3:
        content[16:24] = b"\x00\xff\xff\xff\x00\xff\xff\xff"  # a PNG's width and height
    if how == 4:  # two halves swapped
        half = len(content) // 2
        return bytes(content[half:] + content[:half])
    return bytes(content)


def read_corrupted(case, dataset, file, number, folder):
    """Read a case with one of its files corrupted: what came of it, as text.

    The process's peak of memory meanwhile goes to a file.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    try:
        return read_spoilt(case, dataset, file, number, folder)
    finally:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        (Path(folder) / f"{number}.peak").write_text(peak.split()[1])


def read_spoilt(case, dataset, file, number, folder):
    rng, kind = np.random.default_rng([7, number]), extension(file)
    place = Path(folder) / str(number)
    place.mkdir()
    twin = {}  # of every file, and of the raw data of a header
    for path in case.files:
        for source in (path, path.with_suffix(".raw"), path.with_suffix(".zraw")):
            if source.is_file():
                twin[source] = place / source.name
                shutil.copy(source, twin[source])
    # below the compression, else everything ends in a bad checksum
    packed = kind == ".nii.gz" and rng.random() < 0.7
    content = twin[file].read_bytes()
    content = corrupt(gzip.decompress(content) if packed else content, kind, rng)
    twin[file].write_bytes(gzip.compress(content, 1) if packed else content)
    args = [twin.get(a, a) if isinstance(a, Path) else a for a in case.load.args]
    moved = replace(case, files=tuple(twin[f] for f in case.files),
                    load=partial(case.load.func, *args, **case.load.keywords))
    arrays, index = prepare_case(moved, dataset)
    shape = (index["slices"], *index["size"])
    assert all(a.shape == shape for a in arrays.values())
    assert arrays["image"].dtype == np.uint16 and np.isfinite(index["scale"]).all()
    assert not dataset.colored or arrays["label"].max() <= len(dataset.labels)
    return "read"


@pytest.mark.slow
def test_200_corruptions(sixteen, tmp_path):
    """Finite arrays of the declared shape, or one line that names the file; no crash, no hang,
    memory below 2 GiB."""
    jobs = []
    for root in (sixteen, REAL) if REAL.is_dir() else (sixteen,):
        for hit in find(root, say=quiet).values():
            case = next((c for c in hit.cases if c.split != "inference"), None)
            if case and hit.dataset.name not in ("ldct", "deeplesion"):
                jobs += [(case, hit.dataset, f) for f in case.files if extension(f)]
    jobs = [(*jobs[i % len(jobs)], i, str(tmp_path)) for i in range(200)]
    started, came = time.time(), {}
    for number, answer, error in in_processes(read_corrupted, jobs, workers=2):
        came.setdefault(answer or type(error).__name__, []).append(number)
        if error is not None:
            file, text = jobs[number][2], str(error)
            assert isinstance(error, DataError), (file, text)
            assert "\n" not in text and "died" not in text, (file, text)
            copies = (tmp_path / str(number)).iterdir()
            assert any(p.name in text for p in copies), (file, text)
    print({k: len(v) for k, v in came.items()}, f"{time.time() - started:.0f} s")
    assert sum(map(len, came.values())) == 200
    assert len(came["DataError"]) > 80 and len(came["read"]) > 20
    peaks = [int(p.read_text()) for p in tmp_path.glob("*.peak")]
    print(f"peak {max(peaks) / 2 ** 20:.2f} GiB")
    assert len(peaks) == 200 and max(peaks) < 2 * 2 ** 20  # KiB


# ---- a long run

def open_files_and_memory():
    """How many files this process has open, and its memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * 4096 / 2 ** 20


@pytest.mark.slow
def test_100_000_draws_leave_files_and_memory_alone(tmp_path):
    """From a store of 2,000 cases."""
    write_pair(tmp_path / "data" / "Dataset900_Many", "a", shape=(20, 20, 3))
    build(find(tmp_path / "data"), tmp_path / "store")
    root = tmp_path / "store" / "Dataset900_Many"
    about, index = (json.loads((root / p).read_text()) for p in ("dataset.json", "a/case.json"))
    for i in range(2000):
        shutil.copytree(root / "a", root / f"c{i}")
        copy = {**index, "name": f"c{i}", "patient": f"c{i}"}
        (root / f"c{i}" / "case.json").write_text(json.dumps(copy))
    about["cases"] = [f"c{i}" for i in range(2000)]
    (root / "dataset.json").write_text(json.dumps(about))
    samples, seen = context(Store(tmp_path / "store"), 16, 8, 4), {}
    for draw in range(100_000):
        samples[draw // 100, draw % 100]
        if draw in (5_000, 50_000, 99_999):
            seen[draw] = open_files_and_memory()
    print({d: f"{files} files, {memory:.0f} MiB" for d, (files, memory) in seen.items()})
    first, last = seen[5_000], seen[99_999]
    assert last[0] <= first[0] + 2 and last[1] < first[1] + 20
