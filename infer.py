"""Prompt a model with an image and its answer, and get the answer of a new image, on the new image's grid.

    python infer.py --prompt a.nii --input b.nii

finds the label of `a.nii` beside it (a_label, a_seg, a_gt, a-mask, labelsTr/a ...) or takes --prompt_label, a checkpoint
(checkpoints/*.pt here, else the newest runs/*/last.pt, or --checkpoint), and writes `b_mvg.nii` (or --output): the input's
shape, affine and header, with the prompt's label values, or in the units of the prompt's label image. Volumes (NIfTI,
MetaImage, NRRD) and single pictures (PNG, JPEG, TIFF, written as PNG); segmentation and image-to-image.

Slice n of the input is shown slice floor(n * N_prompt / N_input) of the prompt (paper, section 3.3). From Python:

    label = infer.predict("runs/mvg/last.pt", [(image, label)], new_image)     # (H, W) arrays, images in [0, 1]

Research software, not a medical device.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import mvg
import readers
from readers import DataError, shape_text

MAX_CLASSES = 64  # a label of integers with more distinct values is an image
BATCH = 16        # slices painted at once
UNSURE = 0.65     # a class painted one by one is seen above 0.5, or where a slice has none of that, from this share of its brightest pixel on
MAX_FITS = 2 ** 26  # values of per-class fits held at once, 256 MiB
LABEL_NAMES = [sign + word for word in ("label", "labels", "seg", "segmentation", "gt", "mask", "target") for sign in "_-"]


# ---------------------------------------------------------------------------------------------------------------------
# The answer, at model resolution

def paint(model, prompt_images, prompt_labels, images, mode):
    """Paint the labels of images (B, 1, s, s) from n prompts (n, 1, s, s), gray; a list of answers to be averaged.

    mode ar: one answer from all prompts, or one a prompt where the model never saw so many; canvas: one a prompt.
    """
    images_device = next(model.parameters()).device
    together = mode == "ar" and len(prompt_images) <= model.config.max_prompts
    groups = [slice(None)] if together else [slice(i, i + 1) for i in range(len(prompt_images))]
    answers = []
    for group in groups:
        px, py = prompt_images[group].to(images_device), prompt_labels[group].to(images_device)
        cache = model.encode_prompts(px[None], py[None]) if mode == "ar" else None
        parts = [model.predict(cache, x) if mode == "ar" else model.predict_canvas(px, py, x)
                 for x in images.to(images_device).split(BATCH)]
        answers.append(torch.cat(parts).cpu())
    return answers


def paint_each(model, prompt_images, prompt_labels, images, mode):
    """V questions, each with prompts of its own (V, n, 1, s, s) and images (V, B, 1, s, s) -> (V, B, 1, s, s), the mean over
    what `paint` answers. Where few images share a prompt, questions are painted side by side."""
    V, B = images.shape[:2]
    if B > 4:
        return torch.stack([sum(a) / len(a) for a in (paint(model, *question, mode) for question in zip(prompt_images, prompt_labels, images))])
    device, n = next(model.parameters()).device, prompt_images.shape[1]
    together = mode == "ar" and n <= model.config.max_prompts
    answers = []
    for px, py, x in zip(*(t.to(device).split(BATCH) for t in (prompt_images.repeat_interleave(B, 0), prompt_labels.repeat_interleave(B, 0), images.flatten(0, 1)))):
        parts = [(px, py)] if together else list(zip(px.split(1, 1), py.split(1, 1)))
        gray = [model.predict(model.encode_prompts(a, b), x) if mode == "ar" else model.predict_canvas(a[:, 0], b[:, 0], x) for a, b in parts]
        answers.append((sum(gray) / len(gray)).cpu())
    return torch.cat(answers).unflatten(0, (V, B))


def choose_mode(model, segmentation, mode="auto"):
    """ar | canvas. auto: what the task was trained with; under the hybrid, ar for segmentation and canvas for images."""
    if mode not in ("auto", "ar", "canvas"):
        raise ValueError(f"mode is {mode!r}: choose auto, ar or canvas")
    if mode != "auto":
        return mode
    objective = model.meta.get("objective", "hybrid")
    return {"ar": "ar", "mim": "canvas"}.get(objective, "ar" if segmentation else "canvas")


def segment(model, prompt_images, prompt_labels, images, classes, mode="auto", votes=None, seed=0, dataset=None):
    """How well every pixel fits each class: images (B, 1, s, s) -> (B, C + 1, s, s), summing to 1, background first.

    prompt_labels (n, 1, s, s) integers; classes: the C values that are asked for, all above 0.
    votes: answers under so many random colorings are averaged, or, of a model trained on binary ones, of so many views (mirrored,
    turned); None: the eight views that training with --augment knew, else 1. dataset: whose colors a model trained on predefined ones uses.
    """
    mode, coloring = choose_mode(model, True, mode), model.meta.get("coloring", "random")
    votes = votes or (8 if coloring == "binary" and model.meta.get("augment") else 1)
    if coloring == "binary":  # one class against the rest, class by class
        turn = lambda x, view: torch.rot90(x.flip(-1) if view % 2 else x, view // 2 % 4, (-2, -1))  # mirrored, turned by quarters
        back = lambda x, view: torch.rot90(x, -(view // 2) % 4, (-2, -1)).flip(-1 if view % 2 else ())
        questions = [(turn(prompt_images, v), turn((prompt_labels == c).float(), v), turn(images, v)) for v in range(votes) for c in classes]
        gray = paint_each(model, *(torch.stack(t) for t in zip(*questions)), mode).unflatten(0, (votes, len(classes))).clamp(0, 1)
        gray = sum(back(g, v) for v, g in enumerate(gray)) / votes  # (C, B, 1, s, s)
        gray = gray[:, :, 0].transpose(0, 1)
        fit = gray / (UNSURE * gray.flatten(2).amax(2)[..., None, None]).clamp(0.2, 0.5)  # 1 is where the class begins
        fit = torch.cat([torch.ones_like(fit[:, :1]), fit], 1)
        return fit / fit.sum(1, keepdim=True)
    rng, fit = np.random.default_rng(seed), 0
    for vote in range(votes):
        colors = data.spread_colors(len(classes))
        if coloring == "predefined":
            offsets, total = model.meta["predefined"]
            if dataset in offsets:
                colors = (offsets[dataset] + np.asarray(classes)) / total
        elif vote:
            colors = rng.permutation(colors) if len(classes) > 1 else colors * (1 - 0.6 * vote / votes)
        painted = sum((prompt_labels == c).float() * v for c, v in zip(classes, colors.tolist()))
        for answer in paint(model, prompt_images, painted, images, mode):
            fit = fit + data.decode(answer[:, 0], colors)
    return fit / fit.sum(1, keepdim=True)


def predict_stack(model, prompts, stack, segmentation, mode="auto", votes=None, seed=0, dataset=None, slices=None, progress=None):
    """Answer every slice of a stack (K, H, W) float in [0, 1] -> (K, H, W): integers with the prompt's values, or floats.

    prompts: list of (images, labels), each (K_p, H_p, W_p), label integers or floats in [0, 1]
    slices: which slice of every prompt serves slice k, a list of K tuples; default floor(k * K_p / K), the paper's rule
    """
    side = (model.config.image_size,) * 2
    K, H, W = stack.shape
    slices = slices or [tuple(data.matching_slice(k, K, len(p[0])) for p in prompts) for k in range(K)]
    groups = {}
    for k, shown in enumerate(slices):
        groups.setdefault(shown, []).append(k)
    output = np.zeros(stack.shape, prompts[0][1].dtype if segmentation else np.float32)
    for shown, members in groups.items():  # slices that share their prompt slices share one prompt cache
        images = torch.cat([data.resize_images(torch.from_numpy(np.ascontiguousarray(p[0][s])).float()[None, None], side)
                            for p, s in zip(prompts, shown)])
        labels = [torch.from_numpy(np.ascontiguousarray(p[1][s]))[None, None] for p, s in zip(prompts, shown)]
        shown_classes = sorted({int(v) for label in labels for v in label.unique().tolist()} - {0}) if segmentation else []
        batch = max(1, min(BATCH, MAX_FITS // (H * W * (len(shown_classes) + 1))))
        for part in (members[i:i + batch] for i in range(0, len(members), batch)):
            x = torch.from_numpy(np.ascontiguousarray(stack[part])).float()[:, None]
            x = data.resize_images(x, side)
            if segmentation:
                if shown_classes:
                    values = torch.tensor([0, *shown_classes])  # resized by their numbers: floats hold no large values
                    small = torch.cat([values[data.resize_labels(torch.searchsorted(values, label.long()), side)] for label in labels])
                    fit = segment(model, images, small, x, shown_classes, mode, votes, seed, dataset)
                    best = data.resize_images(fit, (H, W)).argmax(1).numpy()
                    output[part] = np.array([0, *shown_classes], output.dtype)[best]
            else:
                small = torch.cat([data.resize_images(label.float(), side) for label in labels])
                answers = paint(model, images, small, x, choose_mode(model, False, mode))
                output[part] = data.resize_images(sum(answers) / len(answers), (H, W))[:, 0].clamp(0, 1).numpy()
            if progress is not None:
                progress.update(len(part))
    return output


def predict(model_or_path, prompts, image, mode="auto", votes=None, seed=0, device=None, dataset=None):
    """Answer one image.

    model_or_path   an MVG, or a checkpoint's path
    prompts         list of (image, label), (H, W) arrays; images in [0, 1]. Integer (or bool) labels mean segmentation:
                    the answer holds their values. Float labels in [0, 1] mean an image. Sizes may differ.
    image           (H, W) in [0, 1]
    mode            auto | ar | canvas; votes: colorings averaged; device: for a path, see mvg.pick_device; dataset: whose
                    colors to use, for a model trained on predefined ones
    Returns (H, W): the labels' integer type, or float32 in [0, 1]. Raises ValueError for arrays of another form.
    """
    if not prompts:
        raise ValueError("no prompts: pass a list with at least one (image, label)")
    image = _checked(image, "image")
    pairs = [(_checked(x, f"image of prompt {i}"), np.asarray(y)) for i, (x, y) in enumerate(prompts)]
    for i, (x, y) in enumerate(pairs):
        if x.shape != y.shape:
            raise ValueError(f"label of prompt {i} is {shape_text(y.shape)} but its image is {shape_text(x.shape)}: they must be equal")
    kinds = {y.dtype.kind in "iub" for _, y in pairs}
    if len(kinds) > 1:
        raise ValueError("some prompt labels are integers and some floats: integers mean segmentation, floats an image")
    segmentation = kinds.pop()
    if segmentation:
        pairs = [(x, y.astype(np.uint8) if y.dtype == bool else y) for x, y in pairs]
        if min(int(y.min()) for _, y in pairs) < 0:
            raise ValueError(f"a prompt label holds {min(int(y.min()) for _, y in pairs)}: classes start at 0, the background")
        kind = np.result_type(*(y.dtype for _, y in pairs))
        kind = kind if kind.kind in "iu" else np.dtype(np.int64)  # numpy makes floats of uint64 beside int
        pairs = [(x, y.astype(np.int64)) for x, y in pairs]
    else:
        pairs = [(x, _checked(y, f"label of prompt {i}")) for i, (x, y) in enumerate(pairs)]
    if votes is not None and votes < 1:
        raise ValueError(f"votes is {votes}: it must be at least 1")
    model = model_or_path
    if not isinstance(model, mvg.MVG):
        device = mvg.pick_device(device)[0]
        model = mvg.load(model_or_path, device)
    training = model.training
    model.eval()
    answer = predict_stack(model, [(x[None], y[None]) for x, y in pairs], image[None], segmentation, mode, votes, seed, dataset)[0]
    model.train(training)
    return answer.astype(kind) if segmentation else answer


def _checked(array, what):
    """A (H, W) array in [0, 1] as float32."""
    array = np.asarray(array)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{what} is {shape_text(array.shape) or 'a number'}: pass one (H, W) slice")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{what} has {int((~np.isfinite(array)).sum())} values that are NaN or infinite: replace them")
    if array.min() < -1e-3 or array.max() > 1 + 1e-3:
        raise ValueError(f"{what} reaches from {array.min():.4g} to {array.max():.4g}: scale it to [0, 1] (data.to_unit)")
    return array.clip(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def find_label(image):
    """The label file that belongs to an image file, by the usual names. Raises DataError where there is none."""
    image = Path(image)
    name, folder = readers.stem(image), image.parent
    base = name[:-5] if name.endswith("_0000") else name
    places = [(folder, b + n) for b in dict.fromkeys((name, base)) for n in LABEL_NAMES]
    twins = {"imagesTr": "labelsTr", "imagesTs": "labelsTs", "imagesVa": "labelsVa", "imagesVal": "labelsVal", "images": "labels",
             "image": "label", "img": "label"}
    if folder.name in twins:
        places += [(folder.parent / twins[folder.name], b) for b in dict.fromkeys((base, name))]
    if folder.name == "images":
        places += [(folder.parent / "masks", name)]
    if name == "lgemri":
        places.append((folder, "laendo"))
    for place, label in places:
        for kind in (readers.extension(image), *readers.EXTENSIONS):
            if (place / (label + kind)).is_file():
                return place / (label + kind)
    raise DataError(f"{image}: no label beside it (looked for {name}_label, {name}_seg, {name}_gt, ...): pass --prompt_label")


def find_checkpoint():
    """The bundled checkpoint, else the newest run's. Raises DataError where there is none."""
    bundled = sorted((Path(__file__).parent / "checkpoints").glob("*.pt"))
    runs = sorted({p for place in (Path("runs"), Path(__file__).parent / "runs") for p in place.glob("*/last.pt")}, key=lambda p: p.stat().st_mtime)
    if not bundled and not runs:
        raise DataError("no checkpoint in checkpoints/ or runs/*/last.pt: train one (make demo), or pass --checkpoint")
    return bundled[0] if bundled else runs[-1]


def is_segmentation(label, task):
    """Does a label volume hold classes? auto: integers with at most 64 distinct values do."""
    if task != "auto":
        return task == "seg"
    array = label.array
    if array.dtype.kind == "f" and np.abs(array - np.rint(array)).max() > 1e-3:
        return False
    return len(np.unique(array)) <= MAX_CLASSES


def write_like(path, array, like):
    """Write (X, Y, Z) as the kind of file `path` says, on the grid and with the header of `like`: whole or not at all."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{readers.stem(path)}.", suffix=readers.extension(path))
    os.close(handle)
    try:
        if like.kind == "nifti":
            import nibabel
            header = like.header.copy()
            header.set_data_dtype(array.dtype)
            header["cal_min"] = header["cal_max"] = 0
            kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
            nibabel.save(kind(array.reshape(like.shape or array.shape), None, header), temporary)
        elif like.kind == "itk":
            import SimpleITK as sitk
            image = sitk.GetImageFromArray(np.ascontiguousarray(array[..., 0].T if like.header.GetDimension() == 2 else array.T))
            image.CopyInformation(like.header)
            sitk.WriteImage(image, temporary, useCompression=True)
        else:
            from PIL import Image
            Image.fromarray(np.ascontiguousarray(array[:, :, 0].T)).save(temporary)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp is private, an answer is not
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def output_path(given, source, inputs):
    """Where the answer goes: --output, or <input>_mvg of the input's kind (pictures: PNG, MetaImage: .mha).

    Raises DataError for a place that cannot be written, another kind of file, and any of `inputs`.
    """
    kind = readers.extension(source.path)
    kind = ".png" if source.kind == "picture" else ".mha" if kind in (".mhd", ".mha") else ".nrrd" if kind in (".nrrd", ".nhdr") else kind
    path = Path(given) if given else source.path.with_name(readers.stem(source.path) + "_mvg" + kind)
    allowed = {"nifti": readers.NIFTI, "itk": (".mha", ".nrrd"), "picture": (".png", ".tif", ".tiff")}[source.kind]
    if readers.extension(path) not in allowed:
        raise DataError(f"--output {path} cannot hold the answer to {source.path.name}: end it in {' or '.join(allowed)}")
    if not path.parent.is_dir():
        raise DataError(f"--output {path}: there is no folder {path.parent}: make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise DataError(f"--output {path} cannot be written there: name a file in a folder of yours")
    if path.exists() and path.resolve() in [p.resolve() for p in inputs]:
        raise DataError(f"--output {path} is one of the inputs: name another file")
    return path


def answer_type(label, segmentation, output):
    """The numbers of the answer's file: the smallest integers that hold the classes; floats for images, where a file can hold
    them. Raises DataError where it cannot."""
    if segmentation:
        kind = np.dtype(np.uint8 if label.array.max() <= 255 else np.uint16 if label.array.max() < 2 ** 16 else np.int64)
        if label.kind != "picture" and kind != np.uint8:
            kind = np.dtype(np.int32 if label.array.max() < 2 ** 31 else np.int64)
        if kind.itemsize > 2 and readers.extension(output) in readers.PICTURE:
            raise DataError(f"{label.path} holds the label {label.array.max()}, too large for a picture: renumber its classes below 65536")
        return kind
    if label.kind == "picture" and label.array.dtype.kind in "iu":
        return np.dtype(np.uint8 if label.eight_bit else np.uint16)
    if readers.extension(output) == ".png":
        raise DataError(f"--output {output} cannot hold the numbers of {label.path}, which are no integers of a picture: end it in .tif")
    return np.dtype(np.float32)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--prompt", required=True, help="image of the example")
    add("--prompt_label", help="its answer (default: found beside it)")
    add("--input", required=True, help="image to answer")
    add("--output", help="file to write (default: <input>_mvg of the same kind)")
    add("--checkpoint", help="what train.py wrote (default: checkpoints/*.pt, else the newest runs/*/last.pt)")
    add("--task", default="auto", choices=("auto", "seg", "image"), help=f"auto: a label of integers, at most {MAX_CLASSES} distinct ones, is a segmentation")
    add("--modality", default="auto", choices=("auto", "ct", "mri", "xray", "ultrasound"), help="auto: ct where values reach -200, 8-bit pictures as they are, else mri")
    add("--mode", default="auto", choices=("auto", "ar", "canvas"), help="auto: as trained; canvas paints the lower right of the square")
    add("--votes", type=int, help="colorings (binary: views) whose answers are averaged (default: 8 where training knew such views, else 1)")
    add("--seed", type=int, default=0, help="of the votes")
    add("--dataset", metavar="NAME", help="whose colors to use, for a model trained with --coloring predefined")
    add("--device", help="cpu, mps, cuda ... (default: the best there is)")
    args = p.parse_args(argv)
    if (args.votes is not None and args.votes < 1) or args.seed < 0:
        raise DataError(f"--votes is {args.votes} and --seed {args.seed}: votes are at least 1, seeds not below 0")

    # ---- read everything before anything is computed
    prompt = readers.read_volume(args.prompt)
    label = readers.read_volume(args.prompt_label or find_label(args.prompt), mask=args.task != "image")
    source = readers.read_volume(args.input)
    readers.check_fit(label, prompt)
    output = output_path(args.output, source, (source.path, prompt.path, label.path))
    segmentation = is_segmentation(label, args.task)
    if segmentation and readers.extension(label.path) in (".jpg", ".jpeg"):
        raise DataError(f"{label.path} is a JPEG, which blurs classes into each other: save the mask as PNG")
    if segmentation:
        label.array = readers.integer_labels(label.array, label.path)
    elif label.kind == "picture":  # its grays, not the indices of a palette
        label = readers.read_volume(label.path)
    modalities = [data.guess_modality(v) if args.modality == "auto" else args.modality for v in (prompt, source)]
    kind = answer_type(label, segmentation, output)
    checkpoint = args.checkpoint or find_checkpoint()
    device, reason = mvg.pick_device(args.device)
    model = mvg.load(checkpoint, device)

    # ---- one picture language for both
    cuts = [data.slicing(v) for v in (prompt, source)]
    images = data.to_unit(cuts[0].cut(prompt.array), data.intensity_range(prompt, modalities[0]))
    stack = data.to_unit(cuts[1].cut(source.array), data.intensity_range(source, modalities[1]))
    label_modality = data.guess_modality(label) if args.modality == "auto" else args.modality
    label_range = None if segmentation else data.intensity_range(label, label_modality)
    labels = cuts[0].cut(label.array) if segmentation else data.to_unit(cuts[0].cut(label.array), label_range)
    axes = [("sagittal", "coronal", "axial")[c.axis] for c in cuts]
    print(f"checkpoint {checkpoint}; device {device} ({reason})")
    print(f"label {label.path}; task {'segmentation' if segmentation else 'image'}; prompt {modalities[0]}, {len(images)} {axes[0]} slices; "
          f"input {modalities[1]}, {len(stack)} {axes[1]} slices; mode {choose_mode(model, segmentation, args.mode)}")
    if modalities[0] != modalities[1]:
        print(f"warning: the prompt looks like {modalities[0]} and the input like {modalities[1]}: pass --modality if that is wrong")
    if axes[0] != axes[1]:
        print(f"warning: the prompt has {axes[0]} slices and the input {axes[1]} ones")
    if not segmentation and label_modality == "ct":
        print("note: CT is seen through the window [-100, 200] HU, so the answer stays inside it")
    slices = [(data.matching_slice(k, len(stack), len(images)),) for k in range(len(stack))]
    if segmentation:
        everywhere, matched = set(np.unique(labels)) - {0}, set(np.unique(labels[sorted({s for s, in slices})])) - {0}
        if not everywhere:
            raise DataError(f"{label.path} is empty: pass a prompt with at least one class")
        print("classes shown: " + ", ".join(map(str, sorted(matched))))
        if model.meta.get("coloring") == "predefined" and args.dataset not in model.meta["predefined"][0]:
            print(f"warning: the model knows the colors of {', '.join(model.meta['predefined'][0])} only: pass --dataset, one of them")
        if everywhere - matched:
            print("warning: the prompt slices that match the input lack " + ", ".join(map(str, sorted(everywhere - matched))))

    # ---- answer, back on the input's grid
    with tqdm(total=len(stack), unit="slice", disable=None) as progress:
        answer = predict_stack(model, [(images, labels)], stack, segmentation, args.mode, args.votes, args.seed, args.dataset, slices, progress)
    if not segmentation:
        answer = answer * (label_range[1] - label_range[0]) + label_range[0]
    answer = answer.astype(kind) if kind.kind == "f" else np.rint(answer).clip(np.iinfo(kind).min, np.iinfo(kind).max).astype(kind)
    write_like(output, np.ascontiguousarray(cuts[1].restore(answer)), source)
    print(f"wrote {output} ({shape_text(source.array.shape)})")


if __name__ == "__main__":
    data.command_line(main)
