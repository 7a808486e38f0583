"""The prepared store: every case is read once and kept as slices, which training reads from disk.

    <store>/<dataset>/dataset.json        the dataset's row, its root, the folders of its cases
    <store>/<dataset>/<case>/case.json    the index: patient, split, classes of every slice, ...
    <store>/<dataset>/<case>/image.npy    (K, H, W) uint16, 0..65535 stands for 0..1
    <store>/<dataset>/<case>/label.npy    (K, H, W) uint16 likewise, or uint8 where it is classes
    <store>/<dataset>/<case>/valid.npy    (K, H, W) uint8, often absent: 1 where the label has a
                                          truth, 2 where it is the input's and not scored, else 0

Slices are at most 512 x 512, all the same way up. What the store has to withstand:

- A program that is killed leaves whole cases only. The next one goes on where it stopped.
- Several programs may fill one store at once.
- A case is made anew where a source file or the dataset's description has changed.
- A file that cannot be read, or that crashes its library, costs one case, which is named.

    found = find("path/to/data")
    prepare(found, "store")
    case = Store("store").cases["acdc"][0]
    image, label, valid = case.read(case.foreground[0])     # (H, W) each
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch

from scans.datasets import Case, Dataset, check_names, find
from scans.volumes import (
    DataError, guess_modality, intensity_range, odd_values, read_json, resize_images,
    resize_labels, slicing, to_unit, write_json)

STORE_VERSION = 4
MAX_SIDE = 512  # paper: images are resized to 512 and cropped to 448; larger slices are reduced
TOP = 65535     # the uint16 that stands for 1
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class NewerStore(DataError):
    """A store of a later version of this code: not to be read, and not to be overwritten."""


def default_store(data_root: str | Path) -> Path:
    """Where the store of a data root goes if none is named: store/<folder's name>-<its hash>."""
    root = Path(data_root).resolve()
    return Path("store") / f"{root.name}-{hashlib.sha1(str(root).encode()).hexdigest()[:8]}"


# ------------------------------------------------------------------------------------------------
# One case: from its files to slices

def prepare_case(case: Case, dataset: Dataset) -> tuple:
    """Read and preprocess a `Case`: (arrays, index), as they are written to the store.

    arrays: image, label and perhaps valid, (K, H, W) each. index: the content of case.json.
    Raises DataError for files that cannot be read or do not fit the dataset.
    """
    pair = case.load()
    strange = odd_values(pair.image, dataset.modality)
    if strange and dataset.modality == "ct":
        pair.problems.append(strange)
    if dataset.modality != "ct" and guess_modality(pair.image) == "ct":
        pair.notes.append(f"its values look like CT in HU, but are read as {dataset.modality}")
    cut = slicing(pair.image)
    scale = intensity_range(pair.image, dataset.modality)
    label, label_scale = prepare_label(pair, cut.cut(pair.label.array), dataset, scale)
    arrays = {"image": to_uint16(cut.cut(pair.image.array), scale), "label": label}
    if pair.valid is not None:
        arrays["valid"] = np.ascontiguousarray(cut.cut(pair.valid), np.uint8)
    K, H, W = arrays["image"].shape
    h, w = min(H, MAX_SIDE), min(W, MAX_SIDE)
    arrays = {name: shrink(stack, (h, w)) for name, stack in arrays.items()}
    if dataset.colored:
        classes = [np.unique(s[s > 0]).tolist() for s in arrays["label"]]
        foreground = [k for k in range(K) if classes[k]]
    else:
        classes = [[] for _ in range(K)]
        foreground = [k for k in range(K) if shows_an_image(arrays, k)]
    across, row, column = cut.spacing  # mm
    return arrays, {
        **identity(case), **rules(dataset), "version": STORE_VERSION,
        "slices": K, "size": [h, w], "axis": cut.axis,
        "spacing": (across, row * H / h, column * W / w),
        "scale": scale, "label_scale": label_scale,
        "foreground": foreground, "classes": classes, "valid": "valid" in arrays,
        "boxes": [stored_box(box, pair, cut, (h, w)) for box in pair.boxes],
        "problems": pair.problems, "notes": pair.notes, "sources": signature(case)}


def prepare_label(pair, stack, dataset, image_scale):
    """A label (K, H, W): classes as uint8 and None, or an image as uint16 and what became 0 and 1.

    Raises DataError for a class that the dataset does not have.
    """
    if dataset.colored:
        if stack.max() > len(dataset.labels):
            raise DataError(f"{pair.label.path} holds the label {int(stack.max())} but "
                            f"{dataset.name} has {len(dataset.labels)} classes: correct the label, "
                            "or name the class")
        return np.ascontiguousarray(stack, np.uint8), None
    if dataset.task == "inpainting":  # a hole is filled in the scale of the picture around it
        scale = image_scale
    elif becomes_another_modality(pair, dataset):
        scale = intensity_range(pair.label, "mri")
    else:
        scale = intensity_range(pair.label, dataset.modality)
    return to_uint16(stack, scale), scale


def becomes_another_modality(pair, dataset):
    """Does a CT become something else, whose values are no Hounsfield units?"""
    from_ct = dataset.task == "synthesis" and dataset.modality == "ct"
    return from_ct and guess_modality(pair.label) != "ct"


def to_uint16(stack, scale):
    """Intensities -> uint16: the range `scale` becomes 0..65535."""
    return np.rint(to_unit(stack, scale) * TOP).astype(np.uint16)


def shrink(stack, size):
    """(K, H, W) -> (K, *size) in the same dtype, slice by slice. uint16: images, uint8: classes."""
    if stack.shape[1:] == size:
        return stack
    resize = resize_images if stack.dtype == np.uint16 else resize_labels
    slices = [resize(torch.from_numpy(s.astype(np.float32)), size) for s in stack]
    return np.stack([s.round().numpy().astype(stack.dtype) for s in slices])


def shows_an_image(arrays, k):
    """Is the label of slice k an image that is not empty and has a truth somewhere?"""
    bright = arrays["label"][k] > 0.02 * TOP
    has_truth = "valid" not in arrays or (arrays["valid"][k] == 1).any()
    return bright.mean() > 0.01 and has_truth


def stored_box(box, pair, cut, size):
    """A box of a picture in pixels of its stored slice: [top, left, bottom, right], first to last.

    box: (first x, first y, last x, last y) as the `Pair` has it. size: (h, w) of the stored slice.
    """
    x1, y1, x2, y2 = box
    filled = np.zeros(pair.image.array.shape, bool)
    filled[x1:x2 + 1, y1:y2 + 1] = True
    filled = cut.cut(filled)  # (1, H, W)
    if not filled.any():
        raise DataError(f"box {box} lies outside of its picture")
    _, rows, columns = np.nonzero(filled)
    _, H, W = filled.shape
    h, w = size
    return [int(rows.min() * h / H), int(columns.min() * w / W),
            int(rows.max() * h / H), int(columns.max() * w / W)]


def rules(dataset):
    """What decides how a case is prepared: another answer makes it anew."""
    return {"modality": dataset.modality, "task": dataset.task, "labels": len(dataset.labels)}


def identity(case):
    """What the index keeps of a `Case`."""
    return {key: getattr(case, key) for key in ("name", "patient", "split", "kind", "height")}


def signature(case):
    """What tells that a source changed: [name, bytes, time of change] of every file."""
    entries = []
    for path in case.files:
        if path.is_file():
            entries.append([path.name, path.stat().st_size, path.stat().st_mtime_ns])
        else:
            entries.append([path.name, -1, 0])
    return entries


def case_folder(root: Path, case: Case) -> Path:
    """The folder of a case: its name, with a hash where the name holds more than A-Z, 0-9, -_."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in case.name)
    if safe != case.name:
        safe += f"-{hashlib.sha1(case.name.encode()).hexdigest()[:6]}"
    return root / safe


def is_stored(case):
    """Cases for inference have no truth and are not stored."""
    return case.split in ("train", "test")


# ------------------------------------------------------------------------------------------------
# Writing and reading one case

def save(path, array):
    """np.save, whose OSError of a full disk has no number."""
    try:
        np.save(path, array)
    except OSError as error:
        raise OSError(error.errno or errno.ENOSPC, error.strerror or str(error)) from None


def write_case(case: Case, dataset: Dataset, folder: Path) -> None:
    """Prepare a case into its folder, whole or not at all, whatever other programs do there."""
    arrays, index = prepare_case(case, dataset)
    temporary = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            save(temporary / f"{name}.npy", array)
        index["bytes"] = {p.name: p.stat().st_size for p in sorted(temporary.glob("*.npy"))}
        (temporary / "case.json").write_text(json.dumps(index))
        replace_folder(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(old, new):
    """Put the folder `new` in the place of `old`, which may appear again meanwhile."""
    for _ in range(20):
        shutil.rmtree(old, ignore_errors=True)
        try:
            os.replace(new, old)
            return
        except OSError as error:  # another program has just put its own there
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise OSError(f"{old} cannot be replaced: is another program writing it over and over?")


def read_index(folder: Path) -> dict:
    """The index of a stored case.

    Raises NewerStore, and DataError where the case is damaged: its index cannot be used, or an
    array is not as long as it was written.
    """
    index = read_json(folder / "case.json")
    if isinstance(index, dict) and index.get("version", 0) > STORE_VERSION:
        raise NewerStore(f"{folder} has store version {index['version']}, this code reads "
                         f"{STORE_VERSION}: update the code, or name another --store")
    try:
        sizes = {name: (folder / name).stat().st_size for name in index["bytes"]}
        whole = index["version"] == STORE_VERSION and sizes == index["bytes"]
    except (OSError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise DataError(f"{folder} is damaged: delete it and pass --data_root, it is made anew")
    return index


def is_fresh(case: Case, dataset: Dataset, folder: Path) -> bool:
    """Does the store hold this case as it would be prepared now? Raises NewerStore."""
    try:
        index = read_index(folder)
    except NewerStore:
        raise
    except DataError:
        return False
    same = {**identity(case), **rules(dataset), "sources": signature(case)}
    return all(key in index and index[key] == value for key, value in same.items())


# ------------------------------------------------------------------------------------------------
# Many jobs in processes of their own

def in_processes(function: Callable, jobs: list, workers: int | None = None) -> Iterator[tuple]:
    """Yield (number, answer, error) of function(*job) for every job, as they end.

    error: the DataError or OSError that a job ended with, or one which says that its process died
    (a library that crashed, or no memory left). When a process dies, the jobs that were under way
    are tried again, each alone, and only the one that kills its process is given up.
    workers: number of processes, by default one a CPU core; 1 works here, without processes.
    """
    workers = min(workers or usable_cores(), len(jobs))
    if workers <= 1:
        for number, job in enumerate(jobs):
            yield number, *attempt(function, job)
        return
    waiting = list(range(len(jobs)))[::-1]  # the next one is the last
    while waiting:
        suspects = yield from in_pool(function, jobs, waiting, workers)
        for number in suspects:
            died = yield from in_pool(function, jobs, [number], 1)
            if died:
                yield number, None, DataError("the process that read it died: its file breaks a "
                                              "library, or memory ran out")


def in_pool(function, jobs, waiting, workers):
    """Yield (number, answer, error) of the jobs whose numbers are `waiting`, taken from its end.

    Stops when a process dies. Returns the numbers of the jobs that were under way then.
    """
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(os.getpid(),))
    running = {}
    try:
        while waiting or running:
            while waiting and len(running) < 2 * workers:
                future = pool.submit(attempt, function, jobs[waiting[-1]])
                running[future] = waiting.pop()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                answer, error = future.result()
                yield running.pop(future), answer, error
    except BrokenProcessPool:
        pass
    finally:
        pool.shutdown(cancel_futures=True)
    return sorted(running.values())


def usable_cores():
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_worker(parent):
    """One thread a process. Ctrl-C is the parent's to answer. Nobody outlives a killed parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def attempt(function, job):
    """(answer, None), or (None, what was wrong with the data)."""
    try:
        return function(*job), None
    except (DataError, OSError) as error:
        return None, error
    except MemoryError:
        return None, DataError("it does not fit in memory")
    except Exception as error:  # whatever else a damaged file brings about
        if os.environ.get("MVG_DEBUG"):
            raise
        return None, DataError(f"{type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------------
# Filling the store

class Job(NamedTuple):
    """A case that the store lacks."""
    name: str      # of the dataset
    dataset: Dataset
    case: Case
    folder: Path   # where it goes


def prepare(found: dict, root: str | Path, say: Callable = print, workers: int | None = None,
            strict: bool = False) -> dict:
    """Write every case of {name: Found} that the store `root` lacks or whose source changed.

    Several cases are prepared at once. Cases that cannot be read are named and left out; cases for
    inference are not stored. say: is given the notes and problems, a line each. workers: number of
    processes (default: one a CPU core).
    The first case of every dataset tells, by the size of the files, how long the others will take
    and how much disk they will fill.
    Returns {dataset: [problem, ...]}. Raises DataError where the disk is too small or cannot be
    written, and with `strict` for any problem.
    """
    root = Path(root)
    for name, hit in found.items():
        for line in hit.notes + hit.problems:
            say(f"{name}: {line}")
    root.mkdir(parents=True, exist_ok=True)
    failed = write_missing(missing_cases(found, root), root, say, workers)
    problems = {}
    for job, error in failed:
        problems.setdefault(job.name, []).append(f"{job.case.name}: {error}")
    for name, hit in found.items():
        left_out = {job.case.name for job, _ in failed if job.name == name}
        describe(hit, root / name, left_out)
    for name, lines in problems.items():
        for line in lines:
            say(f"left out of {name}: {line}")
    every = [f"{name}: {line}" for name, hit in found.items()
             for line in hit.problems + problems.get(name, [])]
    if strict and every:
        raise DataError(f"{len(every)} problems, the first is {every[0]}: mend them (python "
                        "data.py names them all), or leave strict=true out")
    return problems


def missing_cases(found: dict, root: Path) -> list:
    """What the store lacks, as `Job`s. Clears away what killed programs of this machine left."""
    jobs = []
    for name, hit in found.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        clear_leftovers(root / name)
        for case in hit.cases:
            folder = case_folder(root / name, case)
            if is_stored(case) and not is_fresh(case, hit.dataset, folder):
                jobs.append(Job(name, hit.dataset, case, folder))
    return jobs


def clear_leftovers(folder):
    """Delete temporary files of programs of this machine that no longer run."""
    for left in folder.glob(f".*.{socket.gethostname()}.*"):
        if is_alive(left.name.rsplit(".", 1)[-1]):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def is_alive(pid):
    """Does a process of this number run here?"""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # it does, for another user
        pass
    return True


def write_missing(jobs, root, say, workers):
    """Write cases and say a forecast on the way: [(job, error)] of those that cannot be read."""
    from tqdm import tqdm
    first_of = {}
    for job in jobs:
        first_of.setdefault(job.name, job)
    firsts = list(first_of.values())
    rest = [job for job in jobs if job is not first_of[job.name]]
    failed = []
    with tqdm(total=len(jobs), desc="preparing", unit="case", disable=None, leave=False) as bar:
        started = time.perf_counter()
        failed += write_jobs(firsts, root, bar, workers)
        if rest:
            say(forecast(root, firsts, rest, time.perf_counter() - started))
        failed += write_jobs(rest, root, bar, workers)
    return failed


def write_jobs(jobs, root, bar, workers):
    """Write cases in processes: [(job, error)] of those that could not be read.

    Raises DataError where the disk is full or cannot be written.
    """
    failed = []
    calls = [(job.case, job.dataset, job.folder) for job in jobs]
    for number, _, error in in_processes(write_case, calls, workers):
        bar.update()
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise DataError(f"{root} cannot be written ({error.strerror}): free some space, "
                            "or name another --store")
        if error is not None:
            failed.append((jobs[number], error))
    return failed


def forecast(root, firsts, rest, seconds) -> str:
    """A line: what the jobs `rest` will take, by the sizes of their files.

    firsts: one job of every dataset, done in so many seconds. Raises DataError where the disk is
    too small.
    """
    growth = {}  # stored bytes for a byte of source
    for job in firsts:
        written = sum(path.stat().st_size for path in job.folder.glob("*"))
        growth[job.name] = written / max(1, source_bytes(job.case))
    done = sum(source_bytes(job.case) for job in firsts)
    left = sum(source_bytes(job.case) for job in rest)
    needed = sum(source_bytes(job.case) * growth[job.name] for job in rest)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise DataError(f"{root} needs about {needed / 1e9:.1f} GB more and {free / 1e9:.1f} GB "
                        "are free: name another --store, or fewer --datasets")
    return (f"{len(rest)} more cases to prepare: about {needed / 1e9:.2f} GB in {root} "
            f"({free / 1e9:.0f} GB free), {seconds * left / max(1, done) / 60:.1f} minutes")


def source_bytes(case):
    """The size of a case's files."""
    return sum(max(size, 0) for _, size, _ in signature(case))


def describe(found, folder, left_out):
    """Write dataset.json, unless it says the same: the row, the root, the cases but `left_out`."""
    kept = [c for c in found.cases if is_stored(c) and c.name not in left_out]
    about = asdict(found.dataset)
    del about["reader"]
    about["root"] = str(found.root)
    about["cases"] = sorted(case_folder(folder, c).name for c in kept)
    about = json.loads(json.dumps(about))  # tuples become lists
    try:
        same = json.loads((folder / "dataset.json").read_text()) == about
    except (OSError, ValueError):
        same = False
    if not same:
        write_json(folder / "dataset.json", about)


# ------------------------------------------------------------------------------------------------
# Reading the store

@dataclass
class StoredCase:
    """A case of the store; `read` gives its slices."""
    folder: Path
    name: str
    patient: str
    split: str
    slices: int       # how many
    foreground: list  # numbers of the slices with something to learn
    classes: list     # those of every slice
    index: dict = field(repr=False)  # all of case.json
    kind: str = ""
    height: float = None

    def stored(self, k: int) -> tuple:
        """Slice k as it is stored: image, label, valid (uint8, or None), (H, W) each.

        A packed store (lab/pack.py) has images of 8 bits; they come as 16.
        """
        names = ["image", "label"] + ["valid"] * self.index["valid"]
        image, label, *valid = (np.load(self.folder / f"{n}.npy", mmap_mode="r")[k] for n in names)
        image = image * np.uint16(257) if image.dtype == np.uint8 else np.asarray(image)
        return image, np.asarray(label), np.asarray(valid[0]) if valid else None

    def read(self, k: int) -> tuple:
        """Slice k: image, label and valid, (H, W) each.

        The image is float32 in [0, 1]; the label holds classes, or an image in [0, 1], in float32;
        valid is as it is stored (uint8, or None).
        """
        image, label, valid = self.stored(k)
        scale = TOP if label.dtype == np.uint16 else 1
        return image.astype(np.float32) / TOP, label.astype(np.float32) / scale, valid

    def kept(self, slices: str = "foreground") -> list:
        """Numbers of the slices that count. slices: foreground | all."""
        return self.foreground if slices == "foreground" else list(range(self.slices))


class Store:
    """A prepared store, opened: `datasets` {name: Dataset}, `cases` {name: [StoredCase]}.

    names: which datasets (default: all). Raises DataError for a folder that is no store, a damaged
    or newer store, and names that are not in it.
    """

    def __init__(self, root: str | Path, names: list | None = None):
        self.root = Path(root)
        there = {p.parent.name: p for p in sorted(self.root.glob("*/dataset.json"))}
        if not there:
            raise DataError(f"{self.root} is no prepared store: pass --data_root once to fill it")
        check_names(names, there, self.root)
        self.datasets, self.cases = {}, {}
        for name in names or there:
            self.datasets[name], self.cases[name] = read_dataset(there[name])

    def split(self, name: str, split: str) -> list:
        """The cases of a dataset of one split, train or test."""
        return [c for c in self.cases[name] if c.split == split]


def read_dataset(path) -> tuple:
    """A dataset.json with the indices of its cases: (Dataset, [StoredCase])."""
    keys = ("name", "patient", "split", "slices", "foreground", "classes", "kind", "height")
    try:
        about = read_json(path)
        folders = [path.parent / name for name in about.pop("cases")]
        indices = [read_index(folder) for folder in folders]
        about.pop("root")
        row = {k: tuple(v) if isinstance(v, list) else v for k, v in about.items()}
        dataset = Dataset(**row)
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is damaged: delete it and pass --data_root, "
                        "it is made anew") from None
    return dataset, [StoredCase(folder=folder, index=index, **{key: index[key] for key in keys})
                     for folder, index in zip(folders, indices)]


def open_store(data_root: str | Path | None, store: str | Path | None, names: list | None = None,
               brats_pairs: list | None = None, strict: bool = False) -> Store:
    """Find, prepare and open in one call; without data_root the store is used as it is.

    store: its folder (default: `default_store`). strict: DataError for any case that is bad.
    """
    if data_root is None and store is None:
        raise DataError("no data: pass --data_root, the folder that holds the datasets, "
                        "or --store, a prepared store")
    if data_root is None:
        return Store(store, names)
    found = find(data_root, names, brats_pairs=brats_pairs)
    root = Path(store or default_store(data_root))
    prepare(found, root, strict=strict)
    return Store(root, list(found))
