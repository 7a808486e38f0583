"""Training samples: a function of seed, step and number, of the right tasks, cases and prompts."""

import numpy as np
import pytest
import torch

import data
from common import batch_of, context, same, shown
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
        assert same(shown(a, *key), shown(b, *key))
        assert not same(shown(a, *key), shown(other, *key))
    assert not same(shown(a, 0, 0), shown(a, 0, 1))


def test_samples_are_what_the_model_expects(store):
    samples = context(store, 96, 16, 12, num_prompts="2", objective="ar")
    s = shown(samples, 0, 0)
    assert s["images"].shape == s["labels"].shape == s["valid"].shape == (3, 1, 96, 96)
    assert 0 <= s["images"].min() and s["images"].max() <= 1 and s["drop"].shape == (12, 2)
    seen = {bool(samples[0, i]["colored"]): shown(samples, 0, i) for i in range(30)}
    # classes stay classes through resizing
    assert seen[True]["labels"].unique().frac().abs().max() == 0
    assert 0 <= seen[False]["labels"].min() and seen[False]["labels"].max() <= 1
    assert context(store, 96, 16, 12, objective="mim")[0, 0]["hidden"].shape == (4, 36)


def test_samples_are_collated_to_a_batch(store):
    for objective in ("ar", "mim"):
        samples = context(store, 32, objective=objective)
        batch = batch_of(samples, (0, 0), (0, 1), (0, 2))
        assert batch.images.shape == batch.labels.shape == batch.valid.shape == (3, 2, 1, 32, 32)
        assert batch.palette.shape == (3, 256) and batch.colored.dtype == torch.bool
        assert batch.drop.shape == (3, 8, 2) and batch.drawn.shape == (3, 3)
        assert (batch.hidden is None) == (objective == "ar")
        for i in range(3):  # a sample does not depend on what it is batched with
            alone = shown(samples, 0, i)
            for name, value in alone.items():
                assert torch.allclose(getattr(batch, name)[i], value, atol=1e-4), name
        slices = samples.collate([samples[0, 0]])
        assert slices.to("meta").images.device.type == "meta"


def test_the_three_numbers_say_which_slice_was_drawn(store):
    samples = context(store, objective="ar")
    for i in range(20):
        s = shown(samples, 0, i)
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
        s = shown(samples, 0, i)
        classes = set(s["labels"][:-1].unique().int().tolist()) - {0}
        assert set(np.flatnonzero(s["palette"])) == classes
        hidden += not set(s["labels"][-1].unique().int().tolist()) <= classes | {0}
    assert hidden > 0  # the rule had something to do


def test_a_slice_that_cannot_be_read_is_named(store, monkeypatch):
    samples = context(store)

    def broken(self, k):
        raise OSError("no such page")

    monkeypatch.setattr(type(samples.cases["acdc"][0]), "stored", broken)
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


def test_several_prompts_are_of_several_patients(store):
    samples, rng = context(store), np.random.default_rng(0)
    patients = {c.patient for c in samples.cases["acdc"]}
    assert len(patients) > 2
    for _ in range(50):
        chosen = []
        for n in range(1, len(patients) + 1):
            chosen.append(samples.draw_prompt("acdc", 0, 5, rng, shown=chosen))
            assert len({c.patient for c, _ in chosen}) == min(n, len(patients) - 1)


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
    s = shown(context(Store(tmp_path / "store")), 0, 0)
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
        sample = shown(filled, 0, i)
        assert sample["colored"] and sample["labels"].dtype == torch.float32
        for image, label in zip(sample["images"][:, 0], sample["labels"][:, 0]):
            box = boxes.around(label.numpy())[0]
            top, left, bottom, right = box
            assert np.array_equal(label, boxes.fill([box], (64, 64)))
            assert abs(bottom - top - 16 * 8 / 7) <= 2 and 18 <= right - left <= 24
            first = int(torch.where(image > 0.2)[0].min())
            assert abs(top - first - 13 * 8 / 7) <= 2  # where it is in the body
    sample = shown(lines, 0, 0)
    assert not sample["colored"] and 0.5 < (sample["labels"] - sample["images"]).max() <= 1
    with pytest.raises(DataError, match="leave synthetic and boxes=filled out"):
        context(store, boxes="filled", coloring="predefined")


# -------------------------------------------------------------------------------------------------
# Task augmentation

def test_few_shot_moves_the_pairs_apart(store, monkeypatch):
    asked, draw_moves = [], data.draw_moves

    def noted(*arguments, apart, **more):
        asked.append(apart)
        return draw_moves(*arguments, apart=apart, **more)

    monkeypatch.setattr(data, "draw_moves", noted)
    for cases, apart in ((1, 4), (3, 1)):
        asked.clear()
        context(Store(store.root, ["msd_hippocampus"]), augment=1.0, cases=cases)[0, 0]
        assert asked == [apart]


def test_superpixels_are_regions_of_like_gray_in_a_slice_that_prompts_itself(store):
    pytest.importorskip("skimage")
    samples = context(store, 64, superpixels=1.0, seg_share=1.0, objective="ar")
    spread, apart = [], []
    for i in range(12):
        drawn, s = samples[0, i], shown(samples, 0, i)
        (image, regions, _), (other, same_regions, _) = drawn["pairs"]
        assert image is other and regions is same_regions and regions.shape == image.shape
        assert regions.dtype == np.uint8 and regions.max() >= 1
        pixels = image / 65535
        inside = [pixels[regions == c].std() for c in range(1, regions.max() + 1)]
        spread.append(np.mean(inside) / pixels.std())
        assert max((regions == c).mean() for c in range(1, regions.max() + 1)) < 0.55
        apart.append(float((s["labels"][0] != s["labels"][1]).float().mean()))
        assert (s["palette"] > 0).any()
    assert np.mean(spread) < 0.7 and np.mean(apart) > 0.1


def test_image_tasks_are_made_of_real_slices_too(store):
    """Half of the procedural image tasks: then image and label are looks at one slice."""
    samples = context(store, 64, synthetic_share=1.0, seg_share=0.0, objective="ar")
    drawn = [samples[0, i] for i in range(60)]
    real = [d for d in drawn if not d["regions"]]
    assert 18 <= len(real) <= 42 and all(len(d["looks"]) == 2 for d in drawn)
    stored = [c.stored(k)[0] for cases in samples.cases.values() for c in cases
              for k in c.foreground]
    for i, d in enumerate(drawn):
        assert [samples.names[d["drawn"][0]], *d["drawn"][1:]] == [SYNTHETIC, 0, i]  # for the log
        image, label, valid = d["pairs"][-1]
        assert image is label and valid is None and not d["colored"]
        assert any(np.array_equal(image, s) for s in stored) == (not d["regions"])


# -------------------------------------------------------------------------------------------------
# Procedural tasks

def test_pixels_are_float32_under_autocast_too():
    samples = context(None, 32, datasets=(SYNTHETIC,), objective="ar")
    plain = shown(samples, 0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(plain, shown(samples, 0, 0))


def test_synthetic_needs_no_data_and_joins_both_groups(store):
    alone = context(None, datasets=(SYNTHETIC,))
    kinds = {(s["colored"], s["drawn"][0]) for s in (alone[i, 0] for i in range(20))}
    assert kinds == {(True, 0), (False, 0)} and len(alone) == data.SYNTHETIC_EPOCH
    assert same(shown(alone, 3, 1), shown(context(None, datasets=(SYNTHETIC,)), 3, 1))
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
