"""A page in the browser: drop an example, drop or paint its mask, drop new scans, see the answers.

    python app.py            # opens http://127.0.0.1:8000/<token>/

The page (app/) shows slices and takes strokes of a brush. Reading, answering and writing are the
functions of infer.py, so a saved answer equals the file that infer.py writes. Nothing leaves this
machine (running/local_server.py), and what was dropped lies in a private folder (scans/uploads.py)
that is removed at the end. Research software, not a medical device.
"""

import argparse
import json
import shutil
import signal
import sys
import threading
import webbrowser
from dataclasses import replace
from pathlib import Path

import numpy as np

import infer
import mvg
import report
from lab import phantom
from running.checkpoints import find_checkpoint, pick_device
from running.local_server import LocalHandler, LocalServer
from scans import volumes
from scans.files import (AXES, Example, choose_modality, cut_slices, output_paths, pack_example,
                         remarks, write_example)
from scans.uploads import Uploads
from scans.volumes import DataError, command_line, intensity_range, read_volume

PAGE = Path(__file__).parent / "app"
MAX_VOXELS = 2 ** 28  # of one volume: a small file can claim a large one
BATCH = 2             # slices answered at once: few, so that the first one comes soon


class Scan:
    """An uploaded scan: its files, what is painted on it, and the answer to it."""

    def __init__(self, uploads, number):
        self.uploads, self.number = uploads, number
        self.volume = self.cut = self.stack = self.example = self.case = self.answer = None
        self.painted, self.names = {}, {}  # slice number -> classes (H, W); class -> its name

    def open(self, args):
        """Read the scan, and say what the page has to know about it."""
        self.volume = self.example = self.case = self.answer = None
        self.painted = {}
        self.volume = read_volume(self.uploads.find(self.number, "scan"), series=args.series)
        self.cut, self.stack = cut_slices(self.volume, args)
        modality = choose_modality(self.volume, args)
        return {"shape": self.stack.shape, "spacing": self.cut.spacing, "modality": modality,
                "axis": AXES[self.cut.axis], "range": self.stack.low_high,
                "notes": remarks(self.volume, modality)}

    def label(self, args):
        """Read the answer that was dropped for this scan."""
        role = "next" if self.uploads.find(self.number, "next") else "label"
        self.example = Example(self.volume, self.uploads.find(self.number, role), args)
        self.painted = {}
        if role == "next":
            self.uploads.move(self.number, "next", "label")
        classes = np.unique(self.example.label.array) if self.example.segmentation else []
        low_high = intensity_range(self.example.label, self.example.modality)
        return {"segmentation": self.example.segmentation, "notes": self.example.remarks(),
                "classes": [int(c) for c in classes if c > 0], "range": low_high}

    def prompt(self, args):
        """This scan as an `Example`: with the dropped answer, the painted slices, or both."""
        if self.painted:
            image, label = self.write_painted()
            return Example(read_volume(image), label, args)
        dropped = self.uploads.find(self.number, "label")
        if not dropped:
            raise DataError("the example has no answer yet: drop its mask, or paint one")
        return Example(self.volume, dropped, args)

    def write_painted(self):
        """The files of the painted example: (image, label)."""
        known = self.example and self.example.segmentation
        slices = dict(enumerate(self.example.labels)) if known else {}
        return write_example(self.uploads.place(self.number, "example"), self.volume, self.cut,
                             slices | self.painted)

    def keep(self, source):
        """Become an example: the slices of an answer that were corrected, as if dropped."""
        for role, path in zip(("scan", "label"), source.write_painted()):
            path.replace(self.uploads.place(self.number, role) / path.name)

    def parts(self):
        """The answer as it comes; also kept, for `save`."""
        self.case.options = replace(self.case.options, batch=BATCH)
        self.answer, self.painted = np.zeros(self.case.stack.shape, self.case.kind), {}
        for part, answers, sure in self.case.parts():
            self.answer[part] = answers
            yield part, answers, sure if self.case.segmentation else np.ones_like(answers)

    def save(self):
        """Write the answer, with what was painted over it; its classes and their volumes."""
        for k, classes in self.painted.items():
            if classes.max() > np.iinfo(self.answer.dtype).max:
                raise DataError(f"class {classes.max()} does not fit into the answer's file")
            self.answer[k] = classes
        self.case.write(self.answer, None)
        return report.describe_answer(self.case, self.answer)["classes"]


class Session:
    """All that the page has sent, and the model."""

    def __init__(self, args):
        self.checkpoint = str(args.checkpoint or find_checkpoint())
        self.model = mvg.load(self.checkpoint, pick_device(args.device)[0])
        self.uploads, self.scans = Uploads(), {}
        self.busy, self.stopped = threading.Lock(), threading.Event()

    def scan(self, number):
        return self.scans.setdefault(int(number), Scan(self.uploads, int(number)))

    def arguments(self, options):
        """infer.py's arguments, with what was chosen on the page."""
        flags = [f"--{name}={options[name]}" for name in ("task", "modality", "axis", "series")
                 if options.get(name)]
        try:
            args = infer.make_parser().parse_args(["--prompt", "", "--input", "", *flags])
        except SystemExit:
            raise DataError(f"{' '.join(flags)} is no choice of infer.py") from None
        args.checkpoint = self.checkpoint
        return args

    def do(self, wanted):
        """What the page asks for in words: one of `ways`, or to stop."""
        action, number = wanted["do"], int(wanted.get("scan", 0))
        scan, args = self.scan(number), self.arguments(wanted.get("options", {}))
        if action == "stop":
            return self.stopped.set()
        ways = {"open": lambda: scan.open(args), "label": lambda: scan.label(args),
                "save": scan.save, "room": lambda: self.uploads.check_room(wanted["bytes"]),
                "keep": lambda: scan.keep(self.scan(wanted["source"])),
                "prepare": lambda: self.prepare(scan, wanted["examples"], args),
                "name": lambda: setattr(scan, "names", wanted["names"]),
                "forget": lambda: self.uploads.forget(number, "next"),
                "remove": lambda: self.scans.pop(number) and self.uploads.forget(number, "")}
        with self.busy:
            return ways[action]()

    def prepare(self, scan, examples, args):
        """Everything up to the first answer. Says what infer.py would print."""
        examples = [self.scan(number).prompt(args) for number in examples]
        prompts = infer.Prompts(examples, self.model, args)
        files = [path for e in examples for path in (e.image.path, e.label.path)]
        folder = self.uploads.place(scan.number, "answer")
        output = output_paths(folder, [scan.volume.path], files)[0]
        scan.case = infer.Case(scan.volume, output, prompts, self.model, args)
        low_high = scan.stack.low_high if prompts.masks else prompts.label_range
        return {"notes": list(map(self.uploads.without_folder, scan.case.notes)),
                "segmentation": scan.case.segmentation, "range": low_high,
                "classes": sorted(prompts.classes()) if scan.case.segmentation else []}


class Handler(LocalHandler):
    """What the page fetches and sends."""

    def words(self, error):
        return self.server.session.uploads.without_folder(super().words(error))

    def get_slice(self, number, layer, k):
        """The values (H, W) of a slice, float32."""
        scan = self.server.session.scan(number)
        stack = {"scan": lambda: scan.stack.stack, "label": lambda: scan.example.labels,
                 "answer": lambda: scan.answer}[layer]()
        self.reply(np.ascontiguousarray(stack[int(k)], np.float32).tobytes())

    def get_file(self, number, what):
        """The answer's file, or a zip with the painted example."""
        scan = self.server.session.scan(number)
        self.reply_file(scan.case.output if what == "answer"
                        else pack_example(scan.write_painted(), scan.names))

    def get_heart(self, name):
        self.reply_file(phantom.two_hearts(self.server.session.uploads.folder / "hearts")[name])

    def post_upload(self, number, role, name):
        self.server.session.uploads.store(number, role, name, self.rfile, self.length())
        self.reply_json({})

    def post_paint(self, number, k):
        """The classes (H, W) of a painted slice, int32. Nothing: the strokes were undone."""
        scan = self.server.session.scan(number)
        size = 4 * scan.stack.shape[1] * scan.stack.shape[2]
        classes = np.frombuffer(self.rfile.read(min(self.length(), size)), np.int32)
        scan.painted.pop(int(k), None)
        if classes.size and 0 <= int(k) < len(scan.stack):
            scan.painted[int(k)] = classes.reshape(scan.stack.shape[1:])
        self.reply_json({})

    def post_do(self):
        wanted = json.loads(self.rfile.read(min(self.length(), 2 ** 20)))
        self.reply_json(self.server.session.do(wanted) or {})

    def post_answer(self, number):
        """Slices as they come: number int32, values float32, confidence uint8; -1: what failed."""
        session, scan = self.server.session, self.server.session.scan(number)
        with session.busy:
            if not scan.case:
                raise DataError("the scan was not prepared")
            session.stopped.clear()
            self.begin()
            try:
                for part, answers, sure in scan.parts():
                    for k, answer, score in zip(part, answers, sure):
                        self.wfile.write(np.int32(k).tobytes() + answer.astype(np.float32).tobytes()
                                         + np.uint8(255 * score).tobytes())
                    if session.stopped.is_set():
                        break
            except Exception as error:  # the headers are sent
                self.wfile.write(np.int32(-1).tobytes() + self.words(error).encode())


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--checkpoint", help="as of infer.py")
    parser.add_argument("--device", help="as of infer.py")
    parser.add_argument("--browser", action=argparse.BooleanOptionalAction, default=True,
                        help="open the page")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    volumes.MAX_VOXELS = MAX_VOXELS
    if not 0 <= args.port <= 65535:
        raise DataError(f"--port is {args.port}: it is from 0 to 65535")
    for name in {"SIGTERM", "SIGHUP"} & {s.name for s in signal.Signals}:  # so that uploads go
        if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # as under nohup
            signal.signal(getattr(signal, name), lambda *_: sys.exit())
    session = Session(args)
    try:
        server = LocalServer(args.port, Handler, PAGE, session)
        print(f"{server.address}   Ctrl+C ends it", flush=True)
        if args.browser:
            webbrowser.open(server.address)
        server.serve_forever()
    finally:
        shutil.rmtree(session.uploads.folder)


if __name__ == "__main__":
    command_line(main)
