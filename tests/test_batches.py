"""From stored slices to a batch: views, looks, and as many kernels for a batch as for a sample."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import batches
from batches import Slices, draw_crop, draw_image_task, draw_look, draw_moves, draw_rest, make_batch
from common import batch_of, context, same, shown
from lab import synthetic
from recipe import Recipe
from scans.datasets import SYNTHETIC

SIDE = 56


def sample_of(pairs, views=None, colored=True, seed=0, **more):
    """A sample as `ContextSamples` draws it, of pairs [(image, label, valid or None)].

    One pair stands for two that are alike.
    """
    rng, pairs = np.random.default_rng(seed), pairs * (2 // len(pairs) or 1)
    if views is not None and len(views) < len(pairs):
        views = list(views) * 2
    views = [np.eye(3)] * len(pairs) if views is None else views
    return {"pairs": pairs, "views": np.stack(views), **draw_rest(rng, len(pairs), SIDE, colored),
            "offset": np.float32([0, 1]), **more}


def made(*samples, key=0, coloring="random"):
    slices = Slices.collate(samples)
    slices.rest |= {"drop": torch.zeros(len(samples), 1, 2), "drawn": torch.zeros(len(samples), 3)}
    return make_batch(slices, SIDE, Recipe(coloring=coloring), key)


def stored(image):
    """A picture in [0, 1] as the store keeps it."""
    return np.rint(image * batches.TOP).astype(np.uint16)


def square(shape=(40, 60), value=2):
    """A slice with a bright square and the square's mask."""
    image = np.zeros(shape)
    image[10:20, 30:45] = 1
    return stored(image), (value * image).astype(np.uint8), None


# -------------------------------------------------------------------------------------------------
# Views

def test_a_crop_is_7_8_of_the_picture_and_keeps_image_and_label_together():
    """Paper: resized to 512, cropped to 448; a bright square stays under its label."""
    rng, places = np.random.default_rng(0), set()
    for _ in range(30):
        batch = made(sample_of([square()], [draw_crop(SIDE, rng)]))
        image, label, valid = (t[0, 0, 0] for t in (batch.images, batch.labels, batch.valid))
        assert image.shape == label.shape == valid.shape == (SIDE, SIDE)
        assert set(label.unique().tolist()) == {0, 2} and (valid == 1).all()
        assert ((image > 0.5) == (label == 2)).float().mean() > 0.98
        assert label.sum() / 2 == pytest.approx(150 / 2400 * 64 ** 2, rel=0.15)
        places.add(tuple(torch.nonzero(label)[0].tolist()))
    assert len(places) > 10  # nine by nine places
    rows = [p[0] for p in places]
    assert max(rows) - min(rows) <= 8


def test_an_enlarged_crop_is_that_of_a_bilinear_resize():
    rng = np.random.default_rng(0)
    image, label = stored(rng.random((40, 50))), rng.integers(0, 4, (40, 50)).astype(np.uint8)
    full = [torch.from_numpy(x.astype(np.float32))[None, None] for x in (image, label)]
    big = F.interpolate(full[0] / batches.TOP, (64, 64), mode="bilinear", align_corners=False)
    classes = F.interpolate(full[1], (64, 64), mode="nearest-exact")
    view = draw_crop(SIDE, np.random.default_rng(5))
    y, x = np.random.default_rng(5).integers(0, 9, 2)
    batch = made(sample_of([(image, label, None)], [view]))
    cut = (..., slice(y, y + SIDE), slice(x, x + SIDE))
    assert torch.allclose(batch.images[0, 0], big[cut][0], atol=1e-4)
    assert (batch.labels[0, 0] == classes[cut][0]).float().mean() > 0.999


def test_a_large_slice_is_averaged_before_it_is_sampled():
    """A checkerboard of single pixels becomes gray, and no pattern of its own."""
    image = stored(np.indices((448, 448)).sum(0) % 2)
    batch = made(sample_of([(image, image, None)], colored=False))
    assert (batch.images - 0.5).abs().max() < 0.01
    assert (batch.labels - 0.5).abs().max() > 0.3  # labels that are images are shown in windows


def test_slices_of_other_sizes_in_the_batch_change_nothing():
    view = batches.view_of((0.5, 0.6), (0.7, 0.8))
    a, b = sample_of([square()], [view]), sample_of([square((90, 45))], seed=1)
    alone, both = made(a), made(b, a)
    for name in ("images", "labels", "valid", "palette"):
        assert torch.allclose(getattr(alone, name)[0], getattr(both, name)[1], atol=1e-5), name


def test_what_lies_outside_of_a_slice_is_empty_and_has_no_truth():
    wide = batches.view_of((0.5, 0.5), (2, 2))
    ones = (np.full((20, 30), 65535, np.uint16), np.ones((20, 30), np.uint8), None)
    batch = made(sample_of([ones], [wide]))
    for t in (batch.images, batch.labels, batch.valid):
        assert t.float().mean() == pytest.approx(0.25, abs=0.01)
        assert t[0, 0, 0, 14:42, 14:42].float().min() > 1 - 1e-5
    endless = made(sample_of([ones], [wide], endless=True))
    assert endless.valid.min() == 1 and endless.labels.min() == 1


def test_moves_turn_image_and_label_together():
    """An image task is mirrored and turned by quarters, all pairs alike."""
    rng, seen = np.random.default_rng(0), set()
    image = np.random.default_rng(1).random((SIDE, SIDE))
    pairs = [(stored(image), stored(1 - image), None)] * 2
    plain = made(sample_of(pairs, colored=False)).images[0, 0, 0]
    turned = [torch.rot90(plain, k) for k in range(4)]
    turned += [t.flip(-1) for t in turned]
    for _ in range(40):
        batch = made(sample_of(pairs, draw_moves(rng, 2, False), colored=False))
        assert torch.allclose(batch.images + batch.labels, torch.ones(()), atol=1e-3)
        assert torch.allclose(batch.images[:, 0], batch.images[:, 1], atol=1e-3)
        differences = [float((batch.images[0, 0, 0] - t).abs().max()) for t in turned]
        assert min(differences) < 2e-3
        seen.add(int(np.argmin(differences)))
    assert len(seen) == 8


def test_a_case_that_prompts_itself_is_moved_apart():
    """Copying the prompt's label must not answer the question where both are one slice."""
    rng, overlap = np.random.default_rng(0), {1: [], 4: []}
    label = np.zeros((64, 64), np.uint8)
    label[22:42, 26:38] = 1
    pairs = [(stored(1.0 * label), label, None)] * 2
    for apart, values in overlap.items():
        for _ in range(60):
            batch = made(sample_of(pairs, draw_moves(rng, 2, True, apart=apart)))
            a, b = batch.labels[0] > 0
            values.append(float((a & b).sum() / (a | b).sum().clamp(min=1)))
    assert np.mean(overlap[1]) > 0.5 and np.mean(overlap[4]) < 0.35


def test_an_elastic_warp_bends_image_and_label_alike():
    straight, bent = (made(sample_of([square()], bend=np.float32(b))) for b in (0, 0.1))
    assert not torch.equal(straight.labels, bent.labels)
    assert ((bent.images > 0.5) == (bent.labels > 0)).float().mean() > 0.98


# -------------------------------------------------------------------------------------------------
# Looks

def test_fields_are_smooth_and_of_unit_variance():
    cells = torch.tensor([5, 27]).repeat(50, 1)
    fields = batches.smooth_fields(cells, 64, torch.Generator().manual_seed(0))
    assert fields.shape == (50, 2, 64, 64)
    assert fields.var(dim=(0, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.15)
    steps = fields.diff(dim=-1).square().mean(dim=(0, 2, 3)).sqrt()
    assert 3 < steps[1] / steps[0] < 8  # 27 bumps a side change faster than 5


def test_a_look_is_a_function_of_the_key():
    sample = sample_of([square()] * 2, looks=[draw_look(np.random.default_rng(0), 2)])
    a, b, other = made(sample, key=1), made(sample, key=1), made(sample, key=2)
    assert torch.equal(a.images, b.images) and not torch.equal(a.images, other.images)
    assert torch.equal(a.labels, other.labels)  # noise is in the image alone


def test_another_contrast_keeps_what_belongs_together():
    rng, label = np.random.default_rng(0), np.zeros((SIDE, SIDE), np.uint8)
    label[20:44, 24:40] = 1
    pairs = [(stored(0.8 * label), label, None)] * 3
    for _ in range(20):
        batch = made(sample_of(pairs, draw_moves(rng, 3, True), looks=[draw_look(rng, 3)]))
        assert 0 <= batch.images.min() and batch.images.max() <= 1
        for x, y in zip(batch.images[0], batch.labels[0]):
            if 50 < y.sum() < 2500:
                inside, outside = x[y > 0].median(), x[y == 0].median()
                nearer = ((x - inside).abs() < (x - outside).abs())[y > 0].float().mean()
                assert nearer > 0.8 or abs(inside - outside) < 0.15


def look(**changes):
    """A look at a slice that changes nothing, but for what is said."""
    plain = {"sigma": np.full(2, 1e-5), "bias": 0.0, "fade": 0.0, "hole": None, "mean": None,
             "rough": None, "gamma": np.ones(2), "scaled": False, "noise": np.zeros(3),
             "grain": 0.0, "curve": batches.line_segments([0, 1], np.array([[0.0, 1.0]] * 2))}
    return {**plain, **changes}


def scanned(image, **changes):
    """What a look makes of an image (SIDE, SIDE) in [0, 1]."""
    pairs = [(stored(image), np.ones((SIDE, SIDE), np.uint8), None)]
    return made(sample_of(pairs, looks=[look(**changes)])).images[0, 0, 0].numpy()


def test_every_step_of_a_scanner_does_what_it_says():
    image = np.random.default_rng(0).random((SIDE, SIDE)) * 0.6 + 0.2
    assert np.allclose(scanned(image), image, atol=1e-4)
    flat = np.full((SIDE, SIDE), 0.5)
    blurred = scanned(image, sigma=np.array([0.05, 0.05]))
    assert blurred.std() < 0.3 * image.std() and blurred.mean() == pytest.approx(0.5, abs=0.01)
    one_way = scanned(image, sigma=np.array([0.05, 1e-5]))  # down, not across
    assert np.abs(np.diff(one_way, axis=0)).mean() < 0.2 * np.abs(np.diff(one_way, axis=1)).mean()
    assert np.allclose(scanned(flat, sigma=np.array([0.05, 0.05])), 0.5, atol=1e-3)  # to the rim
    assert np.allclose(scanned(image, gamma=np.full(2, 2.0)), image ** 2, atol=1e-3)
    inverted = batches.line_segments([0, 0.5, 1], np.array([[1, 0.5, 0.0]] * 2))
    assert np.allclose(scanned(image, curve=inverted), 1 - image, atol=1e-3)
    assert scanned(flat, noise=np.array([0.1, 0, 0])).std() == pytest.approx(0.1, rel=0.1)
    assert scanned(flat, noise=np.array([0, 0, 0.1])).std() == pytest.approx(0.05, rel=0.1)
    rician = scanned(0 * flat, noise=np.array([0.1, 0.1, 0]))
    assert rician.mean() > 0.08 and scanned(flat, bias=0.2).std() > 0.02
    assert np.diff(scanned(flat, fade=1.0)[:, 0]).max() < 0
    holes = scanned(flat, hole=1.0)
    assert set(np.unique(holes.round(2))) == {0, 0.5} and 0.02 < (holes == 0).mean() < 0.4
    scaled = scanned(0.3 + 0.2 * image, scaled=True)
    assert scaled.min() == 0 and scaled.max() == 1


def test_an_image_task_has_two_looks_at_one_anatomy():
    rng, kinds = np.random.default_rng(0), set()
    image = np.kron(rng.random((7, 7)), np.ones((8, 8)))
    for _ in range(30):
        looks = draw_image_task(rng, 2)
        kinds.add(next((name for name in ("hole", "curve") if not np.array_equal(
            looks[0][name], looks[1][name])), "detail"))
        batch = made(sample_of([(stored(image), stored(image), None)], colored=False, looks=looks))
        shows, answer = batch.images[0, 0, 0].numpy(), batch.labels[0, 0, 0].numpy()
        assert not np.array_equal(shows, answer) and (batch.palette == 0).all()
        if looks[0]["hole"] is not None:
            hole = shows != answer  # elsewhere the image is left as it is
            assert (shows[hole] == 0).all() and 0.005 < hole.mean() < 0.5
    assert kinds == {"hole", "curve", "detail"}


# -------------------------------------------------------------------------------------------------
# What is asked for

def test_of_a_procedural_task_structures_that_all_pairs_show_come_first():
    label = np.zeros((2, SIDE, SIDE), np.uint8)
    label[:, 4:9, 4:9], label[0, 20:40, 20:40] = 1, 2
    pairs = [(stored(one > 0), one, None) for one in label]
    for seed in range(20):
        one = sample_of(pairs, seed=seed, wanted=1, sizes=np.float32([6, 2000]))
        assert set(np.flatnonzero(made(one).palette[0])) == {1}
    seen = {tuple(np.flatnonzero(made(sample_of(pairs, seed=seed, wanted=1)).palette[0]))
            for seed in range(20)}
    assert seen == {(1,), (2,)}  # of a slice with a label, any class of the prompt


def test_the_sizes_of_procedural_structures_are_shares_of_the_models_square():
    pool, rng = synthetic.draw_pool(2, 448), np.random.default_rng(0)
    sample = synthetic.draw_sample(pool, 448, 2, True, rng)
    assert sample["sizes"].tolist() == pytest.approx([0.002 * 448 ** 2, 0.5 * 448 ** 2])


@pytest.mark.parametrize("S", (2, 4, 5, 7))
def test_a_procedural_task_does_not_prompt_itself(S):
    pool, rng = synthetic.draw_pool(4, 32), np.random.default_rng(0)
    for _ in range(30):
        *prompts, (own, _, _) = synthetic.draw_sample(pool, 32, S, True, rng)["pairs"]
        assert len(prompts) == S - 1
        assert not any(np.array_equal(own, regions) for regions, _, _ in prompts)
        different = len({regions.tobytes() for regions, _, _ in prompts})
        assert different == min(S, synthetic.SUBJECTS) - 1


def test_what_a_warp_pushes_out_of_a_slice_does_not_depend_on_the_batch():
    """The same pixels are outside, whether another sample leaves its slice or not."""
    away = np.float64([[[1, 0, 1.5], [0, 1, 0], [0, 0, 1]]])
    bent = sample_of([square()], bend=np.float32(0.3), seed=1)
    alone, beside = made(bent), made(bent, sample_of([square()], views=away))
    assert torch.equal(alone.valid[0], beside.valid[0]) and not alone.valid[0].all()


def test_black_and_white_may_change_places():
    plain, swapped = (made(sample_of([square()], swapped=np.float32(x))) for x in (0, 1))
    assert torch.allclose(swapped.palette, 1 - plain.palette)


# -------------------------------------------------------------------------------------------------
# Procedural tasks

def test_procedural_tasks_are_deterministic_and_differ():
    samples = context(None, 64, datasets=(SYNTHETIC,), num_prompts="2", objective="ar", pool=20)
    drawn = [shown(samples, 7, i) for i in range(40)]
    for i, s in enumerate(drawn):
        assert same(s, shown(samples, 7, i))
        assert s["images"].shape == s["labels"].shape == (3, 1, 64, 64)
        assert s["images"].dtype == s["labels"].dtype == torch.float32
        assert 0 <= s["images"].min() and s["images"].max() <= 1 and s["labels"].min() >= 0
        if not s["colored"]:
            assert s["labels"].max() <= 1
    assert len({float(s["images"].sum()) for s in drawn}) == 40
    masks = [s["palette"][s["labels"].long()] for s in drawn if s["colored"]]
    assert sum(bool(m.max() > 0) for m in masks) >= len(masks) - 1
    overlap = [((m[0] > 0) & (m[1] > 0)).sum() / ((m[0] > 0) | (m[1] > 0)).sum().clamp(min=1)
               for m in masks]
    assert 0.1 < np.mean(overlap) < 0.7  # subjects differ


def test_a_pool_is_small_and_the_same_wherever_it_is_drawn(tmp_path):
    pool = synthetic.open_pool(tmp_path, 12, 64)
    again, more = synthetic.open_pool(tmp_path, 12, 64), synthetic.draw_pool(14, 64, workers=2)
    assert [p.name for p in tmp_path.iterdir()] == ["synthetic-1-12-64.npz"]
    for task in range(12):
        maps = [pool.read(task, subject) for subject in range(synthetic.SUBJECTS)]
        assert all(m.shape == (80, 80) and m.max() < batches.TISSUES for m in maps)
        assert len({m.tobytes() for m in maps}) == synthetic.SUBJECTS
        for p in (again, more):
            assert all(np.array_equal(m, p.read(task, i)) for i, m in enumerate(maps))
    assert pool.packed.size / pool.ends.size < 1500  # bytes a map


# -------------------------------------------------------------------------------------------------
# Cost

class Kernels(TorchDispatchMode):
    """Counts operations that compute: neither views nor memory that is only set aside."""

    FREE = ("view", "expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "permute",
            "unbind", "split", "alias", "detach", "empty", "aten::t")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not any(word in function.name() for word in self.FREE)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ("ar", "mim"))
def test_a_batch_takes_at_most_120_kernels_whatever_it_holds(store, objective):
    samples = context(store, 64, augment=0.7, synthetic_share=0.4, seg_share=0.5,
                      objective=objective)
    counts = []
    for count in (1, 8, 64):
        slices = samples.collate([samples[0, i] for i in range(count)])
        samples.make(slices, 0)  # what is computed once for a size is there now
        with Kernels() as kernels:
            samples.make(slices, 0)
        counts.append(kernels.count)
    print(f"{objective}: {counts} kernels of 1, 8 and 64 samples")
    assert max(counts) <= 120 and counts[1] <= counts[2]
    plain = context(store, 64, objective=objective)
    with Kernels() as kernels:
        batch_of(plain, (0, 0), (0, 1), (0, 2))
    assert kernels.count < counts[2]
