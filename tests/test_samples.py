"""Training samples: a function of seed, step and number, of the right tasks, cases and prompts."""

import numpy as np
import pytest
import torch

import data
from common import context, same
from lab import synthetic
from recipe import Recipe
from scans import boxes
from scans.datasets import SYNTHETIC, find
from scans.store import Store, open_store, prepare
from scans.volumes import DataError
from test_datasets import lesions, write_pair


# -------------------------------------------------------------------------------------------------
# Samples

def test_samples_are_a_function_of_seed_step_and_number(store):
    a, b = (context(store, seed=1) for _ in range(2))
    other = context(store, seed=2)
    for key in ((0, 0), (7, 3), (100_000, 127)):
        assert same(a[key], b[key]) and not same(a[key], other[key])
    assert not same(a[0, 0], a[0, 1])


def test_samples_are_what_the_model_expects(store):
    samples = context(store, 96, 16, 12, num_prompts="2", objective="ar")
    s = samples[0, 0]
    assert s["images"].shape == s["labels"].shape == s["valid"].shape == (3, 1, 96, 96)
    assert 0 <= s["images"].min() and s["images"].max() <= 1 and s["drop"].shape == (12, 2)
    seen = {bool(samples[0, i]["colored"]): samples[0, i] for i in range(30)}
    # classes stay classes through resizing
    assert seen[True]["labels"].unique().frac().abs().max() == 0
    assert 0 <= seen[False]["labels"].min() and seen[False]["labels"].max() <= 1
    assert context(store, 96, 16, 12, objective="mim")[0, 0]["hidden"].shape == (4, 36)


def test_samples_are_collated_to_a_batch(store):
    for objective in ("ar", "mim"):
        samples = context(store, 32, objective=objective)
        drawn = [samples[0, i] for i in range(3)]
        batch = samples.collate(drawn)
        assert batch.images.shape == batch.labels.shape == batch.valid.shape == (3, 2, 1, 32, 32)
        assert batch.palette.shape == (3, 256) and batch.colored.dtype == torch.bool
        assert batch.drop.shape == (3, 8, 2) and batch.drawn.shape == (3, 3)
        assert (batch.hidden is None) == (objective == "ar")
        for i, s in enumerate(drawn):
            assert same({k: getattr(batch, k)[i] for k in s}, s)
        assert batch.to("meta").images.device.type == "meta"


def test_the_three_numbers_say_which_slice_was_drawn(store):
    samples = context(store, objective="ar")
    for i in range(20):
        s = samples[0, i]
        dataset, case, k = s["drawn"].tolist()
        name = samples.names[dataset]
        drawn = samples.cases[name][case]
        assert k in drawn.foreground
        assert samples.describe(dataset, case, k) == f"{name} {drawn.name} slice {k}"
        if s["colored"]:  # the task pair is of that slice
            classes = set(s["labels"][-1].unique().int().tolist()) - {0}
            assert classes <= set(drawn.classes[k])


def test_what_the_prompt_does_not_show_has_no_color(store):
    samples = context(store, 64, seg_share=1.0, objective="ar")
    hidden = 0
    for i in range(60):
        s = samples[0, i]
        shown = set(s["labels"][:-1].unique().int().tolist()) - {0}
        assert set(np.flatnonzero(s["palette"])) == shown
        hidden += not set(s["labels"][-1].unique().int().tolist()) <= shown | {0}
    assert hidden > 0  # the rule had something to do


def test_a_crop_is_7_8_of_the_picture_and_keeps_image_and_label_together():
    """Paper: resized to 512, cropped to 448; a bright square stays under its label."""
    rng = np.random.default_rng(0)
    image = np.zeros((40, 60), np.float32)
    image[10:20, 30:45] = 1
    places = set()
    for _ in range(30):
        crop, label, valid = data.crop((image, 2 * image, None), 56, rng)
        assert crop.shape == label.shape == valid.shape == (56, 56)
        assert set(label.unique().tolist()) == {0, 2} and (valid == 1).all()
        assert ((crop > 0.5) == (label == 2)).float().mean() > 0.98
        assert label.sum() / 2 == pytest.approx(150 / 2400 * 64 ** 2, rel=0.15)
        places.add(tuple(torch.nonzero(label)[0].tolist()))
    assert len(places) > 10  # nine by nine places
    rows = [p[0] for p in places]
    assert max(rows) - min(rows) <= 8


def test_a_slice_that_cannot_be_read_is_named(store, monkeypatch):
    samples = context(store)

    def broken(self, k):
        raise OSError("no such page")

    monkeypatch.setattr(type(samples.cases["acdc"][0]), "read", broken)
    with pytest.raises(DataError, match=r"sample 4 of step 3 cannot be read, \w+ .* slice \d+, "
                                        r".* slice \d+: OSError: no such page"):
        samples[3, 4]


# -------------------------------------------------------------------------------------------------
# Which cases

def test_prompts_come_from_another_patient_near_the_same_height(store):
    samples, rng = context(store), np.random.default_rng(0)
    cases = samples.cases["acdc"]
    for at, case in enumerate(cases):
        for k in case.foreground:
            prompt, s = samples.draw_prompt("acdc", at, k, rng)
            assert prompt.patient != case.patient and s in prompt.foreground
            if set(case.classes[k]) & {c for f in prompt.foreground for c in prompt.classes[f]}:
                assert set(case.classes[k]) & set(prompt.classes[s])
    # ED and ES: the rule had something to do
    assert len({c.patient for c in cases}) < len(cases)


def test_a_prompt_is_as_near_in_height_as_its_jitter_allows(store):
    samples, rng = context(store), np.random.default_rng(0)
    apart = []
    for at, case in enumerate(samples.cases["la"]):
        for k in case.foreground:
            prompt, s = samples.draw_prompt("la", at, k, rng, jitter=0)
            wanted = (k + 0.5) / case.slices
            gaps = {f: abs((f + 0.5) / prompt.slices - wanted) for f in prompt.foreground
                    if set(case.classes[k]) & set(prompt.classes[f])}
            assert gaps[s] == min(gaps.values())
            apart.append(gaps[s])
    assert np.mean(apart) < 0.1


def test_a_single_case_prompts_itself_and_is_never_held_out(tmp_path):
    write_pair(tmp_path / "Dataset900_One", "a")
    found = find(tmp_path)
    assert [c.split for c in found["Dataset900_One"].cases] == ["train"]
    prepare(found, tmp_path / "store")
    s = context(Store(tmp_path / "store"))[0, 0]
    assert s["images"].shape == (2, 1, 64, 64)
    assert not torch.equal(s["images"][0], s["images"][1])


def test_data_fraction_keeps_at_least_one_case(store):
    whole, part = context(store), context(store, data_fraction=0.01)
    assert all(len(c) == 1 for c in part.cases.values()) and len(part) < len(whole)
    assert part.cases == context(store, seed=9, data_fraction=0.01).cases
    assert part.cases == context(store, seed=3, cases=1).cases
    two = context(store, cases=2)
    for name, cases in two.cases.items():
        assert len(cases) == 2 and set(map(id, part.cases[name])) < set(map(id, cases))


def test_held_out_patients_are_not_drawn(store):
    whole, part = context(store), context(store, validate_cases=1)
    for name, cases in whole.cases.items():
        held, patients = {c.patient for c in part.held[name]}, {c.patient for c in cases}
        assert len(held) == (len(patients) >= 5)
        assert {c.patient for c in part.cases[name]} == patients - held
        assert len(part.held[name]) + len(part.cases[name]) == len(cases)
    assert not any(whole.held.values()) and any(part.held.values())


def test_an_epoch_is_every_training_slice(store):
    slices = sum(len(c.foreground) for n in store.datasets for c in store.split(n, "train"))
    assert len(context(store)) == slices


def test_nothing_to_train_on_is_said(tmp_path):
    write_pair(tmp_path / "Dataset900_Empty", "a", value=0)
    store = open_store(tmp_path, tmp_path / "store")
    with pytest.raises(DataError, match="no training slices with foreground: check the labels"):
        context(store)


# -------------------------------------------------------------------------------------------------
# Which datasets

def test_synthetic_share(store):
    samples = context(store, synthetic_share=0.3)
    draws = [samples.draw(step, 0)[2:4] for step in range(4000)]
    for colored in (True, False):
        names = [n for n, c in draws if c == colored]
        assert names.count(SYNTHETIC) / len(names) == pytest.approx(0.3, abs=0.035)
    assert samples.shares(samples.segmentation)[:-1] == pytest.approx(0.7 / 4)


def test_dataset_weights(store):
    def share(rule):
        samples = context(store, dataset_weights=rule)
        return dict(zip(samples.segmentation, samples.shares(samples.segmentation)))

    names = list(share("equal"))
    assert share("equal") == pytest.approx({n: 1 / len(names) for n in names})
    slices = {n: sum(len(c.foreground) for c in store.split(n, "train")) for n in names}
    total = sum(slices.values())
    assert share("size") == pytest.approx({n: s / total for n, s in slices.items()})
    for wrong in ("all", "acdc", "acdc=x", "acdc=0", "nowhere=2", "acdc=1,"):
        with pytest.raises(DataError, match="dataset_weights"):
            share(wrong)


def test_boxes_are_lines_on_the_image_or_masks(tmp_path):
    picture = np.full((64, 64), 32768 - 1000)
    picture[8:56, 8:56] = 32768
    rows = [dict(File_name=f"00000{p}_01_01_005.png", Bounding_boxes=f"{20 + p}, 22, 40, 36")
            for p in (1, 2, 3)]
    lesions(tmp_path / "DeepLesion", rows, picture)
    store = open_store(tmp_path / "DeepLesion", tmp_path / "store")
    lines, filled = (context(store, boxes=b) for b in ("lines", "filled"))
    assert (lines.segmentation, lines.others) == ([], ["deeplesion"])
    assert (filled.segmentation, filled.others) == (["deeplesion"], [])
    assert lines.segmentation_share == 0 and filled.segmentation_share == 1
    for i in range(6):
        sample = filled[0, i]
        assert sample["colored"] and sample["labels"].dtype == torch.float32
        for image, label in zip(sample["images"][:, 0], sample["labels"][:, 0]):
            box = boxes.around(label.numpy())[0]
            top, left, bottom, right = box
            assert np.array_equal(label, boxes.fill([box], (64, 64)))
            assert abs(bottom - top - 16 * 8 / 7) <= 2 and 18 <= right - left <= 24
            first = int(torch.where(image > 0.2)[0].min())
            assert abs(top - first - 13 * 8 / 7) <= 2  # where it is in the body
    sample = lines[0, 0]
    assert not sample["colored"] and 0.5 < (sample["labels"] - sample["images"]).max() <= 1
    with pytest.raises(DataError, match="leave synthetic and boxes=filled out"):
        context(store, boxes="filled", coloring="predefined")


# -------------------------------------------------------------------------------------------------
# Task augmentation

def test_augment_makes_another_task_of_a_sample(store):
    plain, other = (context(store, augment=a) for a in (0.0, 1.0))
    assert same(other[3, 1], other[3, 1])
    fewer = 0
    for step in range(40):
        a, b = plain[step, 0], other[step, 0]
        assert a["images"].shape == b["images"].shape and b["valid"].dtype == torch.uint8
        assert 0 <= b["images"].min() and b["images"].max() <= 1
        assert not torch.equal(a["images"], b["images"])
        if b["colored"]:  # classes stay classes
            assert set(b["labels"].unique().tolist()) <= set(a["labels"].unique().tolist())
            fewer += len(b["labels"].unique()) < len(a["labels"].unique())
        else:  # mirrored and turned by quarters, image and label together, all pairs alike
            before, after = (torch.stack([s["images"], s["labels"]]) for s in (a, b))
            turned = [torch.rot90(after, k, (-2, -1)) for k in range(4)]
            turned += [t.flip(-1) for t in turned]
            assert min((t - before).abs().max() for t in turned) < 1e-3
    assert fewer > 2


def test_augment_keeps_image_and_label_together():
    """A label that is the image's bright square still covers it after turning and zooming."""
    rng = np.random.default_rng(0)
    labels = torch.zeros(3, 1, 64, 64)
    labels[:, :, 20:44, 24:40] = 1
    everywhere = torch.ones(labels.shape, dtype=torch.uint8)
    for _ in range(20):
        images, moved, valid = synthetic.augment(labels * 0.9, labels, everywhere, False, rng)
        assert torch.allclose(images, 0.9 * moved, atol=1e-4)
        assert float(moved.sum()) == pytest.approx(float(labels.sum()), rel=1e-3)
        images, moved, _ = synthetic.augment(labels * 0.9, labels, valid, True, rng)
        for x, y in zip(images, moved):
            if 50 < y.sum() < 3000:
                inside, outside = x[y > 0].median(), x[y == 0].median()
                nearer = ((x - inside).abs() < (x - outside).abs())[y > 0].float().mean()
                assert nearer > 0.8 or abs(inside - outside) < 0.15


def test_a_case_that_prompts_itself_is_moved_apart():
    """Copying the prompt's label must not answer the question where both are one slice."""
    labels, rng, shared = torch.zeros(2, 1, 64, 64), np.random.default_rng(0), {1: [], 4: []}
    labels[:, :, 22:42, 26:38] = 1
    valid = torch.ones(labels.shape, dtype=torch.uint8)
    for apart, values in shared.items():
        for _ in range(60):
            moved = synthetic.augment(labels, labels, valid, True, rng, apart)[1]
            a, b = (x > 0 for x in moved)
            values.append(float((a & b).sum() / (a | b).sum().clamp(min=1)))
    assert np.mean(shared[1]) > 0.5 and np.mean(shared[4]) < 0.35


def test_few_shot_asks_for_it(store, monkeypatch):
    asked, augment = [], synthetic.augment

    def noted(*arguments, apart, **more):
        asked.append(apart)
        return augment(*arguments, apart=apart, **more)

    monkeypatch.setattr(synthetic, "augment", noted)
    for cases, apart in ((1, 4), (3, 1)):
        asked.clear()
        context(Store(store.root, ["msd_hippocampus"]), augment=1.0, cases=cases)[0, 0]
        assert asked == [apart]


# -------------------------------------------------------------------------------------------------
# Procedural tasks

def test_synthetic_tasks_are_deterministic_and_differ():
    def draw(i, colored):
        return synthetic.task(np.random.default_rng([7, i]), 3, 64, colored)

    for colored in (True, False):
        seen = [draw(i, colored) for i in range(20)]
        for i, (images, labels) in enumerate(seen):
            again = draw(i, colored)
            assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
            assert images.shape == labels.shape == (3, 64, 64)
            assert images.dtype == labels.dtype == torch.float32
            assert 0 <= images.min() and images.max() <= 1 and labels.min() >= 0
            if colored:
                assert (labels.frac() == 0).all() and labels.max() <= 12
            else:
                assert labels.max() <= 1
        assert len({float(i.sum()) for i, _ in seen}) == 20
        if colored:  # nearly every task asks for something, and subjects differ
            assert sum(bool(l.max() > 0) for _, l in seen) >= 19
            shared = []
            for _, label in seen:
                a, b = label[0] > 0, label[1] > 0
                shared.append((a & b).sum() / (a | b).sum().clamp(min=1))
            assert 0.1 < np.mean(shared) < 0.7


def test_synthetic_needs_no_data_and_joins_both_groups(store):
    alone = context(None, datasets=(SYNTHETIC,))
    kinds = {(s["colored"].item(), s["drawn"][0].item()) for s in (alone[i, 0] for i in range(20))}
    assert kinds == {(True, 0), (False, 0)} and len(alone) == data.SYNTHETIC_EPOCH
    assert same(alone[3, 1], context(None, datasets=(SYNTHETIC,))[3, 1])
    both = context(store, datasets=(SYNTHETIC,))
    draws = [both.draw(step, 0) for step in range(4000)]
    for colored, others in ((True, 4), (False, 1)):
        names = [d[2] for d in draws if d[3] == colored]
        assert names.count("synthetic") / len(names) == pytest.approx(1 / (others + 1), abs=0.03)
    with pytest.raises(DataError, match="leave synthetic and boxes=filled out"):
        context(None, datasets=(SYNTHETIC,), coloring="predefined")


def test_a_recipe_says_whether_procedural_tasks_are_among_its_datasets():
    assert Recipe(datasets=("acdc", SYNTHETIC)).synthetic and Recipe(synthetic_share=0.1).synthetic
    assert not Recipe().synthetic and not Recipe(datasets=("acdc",)).synthetic
