"""Section 3.3, inference on files: an image and its answer prompt the model for a new image.

    python infer.py --prompt a.nii --input b.nii
    python infer.py --prompt a.nii c.nii --input scans/ --output answers/ --overlay --report

finds the label of `a.nii` beside it (a_label, a_seg, a_gt, labelsTr/a ...) or takes --prompt_label,
and writes `b_mvg.nii` on the input's grid: its shape, affine and header, with the values of the
prompt's label. Volumes (NIfTI, MetaImage, NRRD, a folder with a DICOM series) and pictures (PNG,
JPEG, TIFF); segmentation and image-to-image. What the model does is in predict.py; from Python:

    label = infer.predict("last.pt", [(image, label)], new_image)    # (H, W) or (K, H, W), [0, 1]

Research software, not a medical device.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import figures
import mvg
import report
from data import matching_slice
from predict import Options, detection_masks, predict, predict_boxes, predict_stack
from running.checkpoints import find_checkpoint, pick_device
from scans import boxes
from scans.files import (AXES, Example, answer_type, choose_modality, cut_slices, differ,
                         find_inputs, output_paths, remarks)
from scans.volumes import (DataError, Scaled, command_line, extension, intensity_range,
                           number_colors, read_volume, shape_text, stem, write_json, write_like)

__all__ = ["main", "predict"]


class Prompts:
    """All examples of a call, as the model is shown them: one task."""

    def __init__(self, examples, model, args):
        self.examples, self.segmentation = examples, examples[0].segmentation
        if len({e.segmentation for e in examples}) > 1:
            raise DataError("some prompts are segmentations and some images: "
                            "prompt one task at a time, or say which with --task")
        self.label_modality = choose_modality(examples[0].label, args)
        self.label_range, self.masks = None, None  # of the first label, in whose units is answered
        self.said = number_colors([e.label for e in examples]) if self.segmentation else ""
        self.pairs = [(e.images, e.labels) for e in examples]
        if not self.segmentation:
            ranges = [intensity_range(e.label, self.label_modality) for e in examples]
            self.label_range = ranges[0]
            drawn = [(e.images, Scaled(e.labels, e.images.low_high)) for e in examples]
            self.masks = detection_masks(model, drawn, self.segmentation)
            self.pairs = [(e.images, Scaled(e.labels, r)) for e, r in zip(examples, ranges)]

    def classes(self, chosen=None):
        """The classes above 0 in a slice of every prompt, by its number, or in all of them."""
        stacks = [labels if chosen is None else labels[[chosen[i]]]
                  for i, (_, labels) in enumerate(self.pairs)]
        return {int(v) for stack in stacks for v in np.unique(stack)} - {0}


class Case:
    """One input and all that it takes to answer it. source: its `Volume`; output: a path."""

    def __init__(self, source, output, prompts, model, args):
        self.source, self.output, self.prompts = source, output, prompts
        self.model, self.args = model, args
        self.segmentation, self.notes, self.begun = prompts.segmentation, [], time.time()
        labels = [e.label for e in prompts.examples]
        if self.segmentation:  # the type holds the classes of every prompt
            labels.sort(key=lambda label: int(label.array.max()), reverse=True)
        self.kind = answer_type(labels[0], labels[0].array.max(), self.segmentation, self.output)
        self.modality = choose_modality(self.source, args)
        self.cut, self.stack = cut_slices(self.source, args)
        self.axis = AXES[self.cut.axis]
        self.options = Options(args.mode, args.votes, args.each, args.looks)
        for example in prompts.examples:
            self.say_assumed(example)
        for text in filter(None, [*remarks(self.source, self.modality), prompts.said]):
            self.say(text)
        self.slices = self.match_slices()
        self.say_task()

    def say(self, text):
        self.notes.append(text)
        print(text)

    def say_assumed(self, example):
        """What is assumed of a prompt and of the input."""
        theirs, axis = example.modality, AXES[example.cut.axis]
        task = "segmentation" if self.segmentation else "image"
        mode = self.options.settled(self.model, self.segmentation).mode
        self.say(f"label {example.label.path}; task {task}; prompt {theirs}, "
                 f"{len(example.images)} {axis} slices; input {self.modality}, "
                 f"{len(self.stack)} {self.axis} slices; mode {mode}")
        if differ(theirs, self.modality):
            self.say(f"warning: the prompt looks like {theirs} and the input like "
                     f"{self.modality}: pass --modality if that is wrong")
        if axis != self.axis:
            self.say(f"warning: the prompt has {axis} slices and the input {self.axis} ones: "
                     "--axis chooses for both")
        for text in example.remarks():
            self.say(text)

    def match_slices(self):
        """The prompts' slices for every slice: the paper's rule.

        A single slice is shown that slice of a volume which shows the most (ours).
        """
        def shows(label):
            return (len(np.unique(label)) if self.segmentation else 0), np.count_nonzero(label)

        pairs, count = self.prompts.pairs, len(self.stack)
        if count > 1 or all(len(images) == 1 for images, _ in pairs):
            return [tuple(matching_slice(k, count, len(images)) for images, _ in pairs)
                    for k in range(count)]
        fullest = tuple(max(range(len(labels)), key=lambda k: shows(labels[k]))
                        for _, labels in pairs)
        self.say("note: the input is a single slice: it is shown the slice of the prompt that "
                 f"shows the most ({', '.join(str(k + 1) for k in fullest)})")
        return [fullest]

    def say_task(self):
        """Which boxes or classes are asked for. Raises DataError where there is none."""
        masks = self.prompts.masks
        if masks:
            count = sum(len(boxes.around(m)) for _, stack in masks for m in stack if m.any())
            self.say(f"{count} boxes are drawn on the prompts: what is in them is asked for as a "
                     "class, and boxes are drawn around what is found")
        elif self.segmentation:
            self.check_classes()
            if self.args.votes > 1 and self.options.settled(self.model, True).each:
                self.say("note: classes are asked for one by one: --votes changes nothing")
        elif self.prompts.label_modality == "ct":
            self.say("note: CT is seen through the window [-100, 200] HU, "
                     "so the answer stays inside it")

    def check_classes(self):
        prompts = self.prompts
        there, of_slices = prompts.classes(), [prompts.classes(shown) for shown in self.slices]
        matched = set().union(*of_slices)
        if not there:
            raise DataError(f"{prompts.examples[0].label.path} is empty: "
                            "pass a prompt with at least one class")
        self.say("classes shown: " + ", ".join(map(str, sorted(matched))))
        if there - matched:
            lost = ", ".join(map(str, sorted(there - matched)))
            self.say(f"warning: the prompt slices that match the input lack {lost}")
        if set() in of_slices:
            self.say(f"note: {of_slices.count(set())} of {len(of_slices)} slices are shown "
                     "prompt slices without a class and stay empty")
        if self.model.meta.get("coloring") == "predefined":
            self.say("warning: the model was trained on predefined colors of its own datasets: "
                     "here all classes are asked for in colors far apart")

    def parts(self):
        """The answer as it comes, in the output's numbers and units: (slice numbers, answer
        (B, H, W), confidence (B, H, W))."""
        if self.prompts.masks:
            parts = predict_boxes(self.model, self.prompts.masks, self.stack, self.options,
                                  self.slices)
        else:
            parts = predict_stack(self.model, self.prompts.pairs, self.stack, self.segmentation,
                                  self.options, self.slices)
        for part, answers, sure in parts:
            yield part, self.in_units(answers).astype(self.kind), sure

    def answer(self):
        """All of it, with a progress bar: (answer, confidence or None), (K, H, W) each."""
        answer = np.zeros(self.stack.shape, self.kind)
        confidence = np.zeros(self.stack.shape, np.float32) if self.args.confidence else None
        with tqdm(total=len(self.stack), unit="slice", disable=None) as bar:
            for part, answers, sure in self.parts():
                answer[part] = answers
                if confidence is not None:
                    confidence[part] = sure
                bar.update(len(part))
        return answer, confidence

    def in_units(self, answers):
        """An answer in the units of the prompt's label; with boxes in those of the input."""
        if self.segmentation:
            return answers
        low, high = self.stack.low_high if self.prompts.masks else self.prompts.label_range
        answers = answers * (high - low) + low
        if self.kind.kind == "f":
            return answers
        limits = np.iinfo(self.kind)
        return np.rint(answers).clip(limits.min, limits.max)

    def beside(self, ending):
        return self.output.with_name(stem(self.output) + ending)

    def write(self, answer, confidence):
        """The answer's file, and what else is asked for."""
        if confidence is not None:
            ending = extension(self.output)
            if self.source.kind == "picture":  # as PNG: 255 is certain
                confidence, ending = np.rint(255 * confidence).astype(np.uint8), ".png"
            restored = np.ascontiguousarray(self.cut.restore(confidence))
            write_like(self.beside("_confidence" + ending), restored, self.source)
        write_like(self.output, np.ascontiguousarray(self.cut.restore(answer)), self.source)
        if self.args.overlay:
            classes = sorted(self.prompts.classes()) if self.segmentation else None
            figures.draw_overlay(self.beside("_overlay.png"), self.stack, answer, classes,
                                 self.cut.spacing[1:])
        if self.args.report:
            write_json(self.beside(".json"), report.describe_answer(self, answer))
        print(f"wrote {self.output} ({shape_text(self.source.array.shape)})")


def make_parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--prompt", required=True, nargs="+", metavar="FILE",
        help="image of the example, or of several")
    add("--prompt_label", nargs="+", metavar="FILE",
        help="its answer, one for each (default: found beside it)")
    add("--input", required=True, nargs="+", metavar="FILE",
        help="images to answer: files, folders of files, folders with a DICOM series")
    add("--output", help="file to write, or a folder for several (default: <input>_mvg beside it)")
    add("--checkpoint", help="what train.py wrote (default: the bundled one, or the newest run's)")
    add("--series", help="which series of a DICOM folder: number or UID (default: the only one)")
    add("--task", default="auto", choices=("auto", "seg", "image"),
        help="auto: a label of integers that makes regions is a segmentation")
    add("--modality", default="auto", choices=("auto", "ct", "mri", "xray", "ultrasound"),
        help="auto: ct where values reach air and fat, 8-bit pictures as they are, else mri")
    add("--axis", default="auto", choices=("auto", *AXES),
        help="how volumes are sliced (auto: across the coarsest axis, as in training)")
    add("--looks", type=int, choices=(1, 2),
        help="2: look again where a class was seen (default: where training knew binary colors)")
    add("--each", action=argparse.BooleanOptionalAction,
        help="ask for one class at a time (default: where training knew binary colors)")
    add("--votes", type=int, default=1, help="answers averaged, each under other colors")
    add("--overlay", action="store_true", help="also draw <output>_overlay.png")
    add("--confidence", action="store_true",
        help="also write <output>_confidence, the winning class's score (segmentation)")
    add("--report", action="store_true",
        help="also write <output>.json: what was used and assumed, volumes in ml, versions")
    add("--device", help="cpu, mps, cuda ... (default: the best there is)")
    add("--mode", default="auto", choices=("auto", "ar", "canvas"),
        help="auto: as trained; canvas paints the lower right of the square")
    return p


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.votes < 1:
        raise DataError(f"--votes is {args.votes}: it must be at least 1")
    labels = args.prompt_label or [None] * len(args.prompt)
    if len(labels) != len(args.prompt):
        raise DataError(f"{len(args.prompt)} prompts and {len(labels)} labels: "
                        "pass one --prompt_label for each --prompt, in the same order")
    examples = [Example(read_volume(image, series=args.series), label, args)
                for image, label in zip(args.prompt, labels)]
    if args.confidence and not examples[0].segmentation:
        raise DataError("--confidence is of segmentations, these prompts are images: leave it out")
    inputs = find_inputs(args.input, [e.label.path for e in examples])
    if len(inputs) > 1 and args.output and not Path(args.output).is_dir():
        raise DataError(f"--output {args.output} is no folder, and there are {len(inputs)} inputs: "
                        "make it first")
    files = [v.path for e in examples for v in (e.image, e.label)]
    outputs = output_paths(args.output, inputs, files)
    args.checkpoint = str(args.checkpoint or find_checkpoint())
    device, reason = pick_device(args.device)
    model = mvg.load(args.checkpoint, device)
    print(f"checkpoint {args.checkpoint}; device {device} ({reason})")
    prompts, failed = Prompts(examples, model, args), []
    for path, output in zip(inputs, outputs):
        try:
            case = Case(read_volume(path, series=args.series), output, prompts, model, args)
            case.write(*case.answer())
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if len(inputs) == 1:
                raise
            failed.append(path)
            print(f"error: {error}", file=sys.stderr)
    if failed:
        raise DataError(f"{len(failed)} of {len(inputs)} inputs have no answer, "
                        f"{failed[0].name} is the first: see above")


if __name__ == "__main__":
    command_line(main)
