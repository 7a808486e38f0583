"""Preprocessing, coloring, the store and the sampler."""

import itertools
import json

import numpy as np
import nibabel
import pytest
import torch

import boxes
import data
import readers
from conftest import FIVE
from test_readers import lesions


# ---- coloring (section 3.2)

def test_colors_keep_their_distance_and_differ_between_draws():
    rng = np.random.default_rng(0)
    for n in range(1, 31):
        draws = [data.random_colors(n, rng) for _ in range(50)]
        for colors in draws:
            every = np.sort([0, *colors])
            assert np.diff(every).min() >= data.color_gap(n) - 1e-9 and every[-1] <= 1 + 1e-9
        assert len({tuple(c) for c in draws}) == 50
        if n > 1:  # the order is random too: any class can be the brightest
            assert len({int(np.argmax(c)) for c in draws}) > 1


@pytest.mark.parametrize("n", (1, 2, 7, 15, 30))
def test_labels_decode_exactly_from_blurred_and_noised_colors(n):
    """Grays moved by up to a sixth of the gap through blur, and as much again through noise, decode to their classes."""
    rng = np.random.default_rng(n)
    labels = torch.from_numpy(rng.integers(0, n + 1, (64, 64)))
    colors = data.random_colors(n, rng)
    gray = torch.from_numpy(np.concatenate([[0], colors]))[labels].float()
    gap = np.diff(np.sort([0, *colors])).min()
    blurred = torch.nn.functional.avg_pool2d(gray[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
    moved = gray + (blurred - gray).clamp(-gap / 6, gap / 6) + torch.from_numpy(rng.uniform(-gap / 6, gap / 6, gray.shape)).float()
    fit = data.decode(moved, colors)
    assert torch.equal(fit.argmax(0), labels)
    assert torch.allclose(fit.sum(0), torch.ones(64, 64), atol=1e-5)


def test_fits_survive_resizing_where_grays_do_not():
    """Between class 2 (bright) and background, resized grays pass through class 1's color; resized fits must not."""
    colors = [0.5, 1.0]
    gray = torch.zeros(8, 8)
    gray[:, 4:] = 1.0
    through_gray = data.decode(data.resize_images(gray[None], (64, 64)), colors)[0].argmax(0)
    through_fit = data.resize_images(data.decode(gray, colors), (64, 64)).argmax(0)
    assert (through_gray == 1).any() and not (through_fit == 1).any()


def test_predefined_colors_never_collide():
    extra = data.Dataset("mine", "", "", "mri", "segmentation", ("a", "b"))
    offsets, total = data.predefined_offsets([extra, data.DATASETS["acdc"]])
    grays = [(offsets[d.name] + n) / total for d in [*data.DATASETS.values(), extra] if d.colored for n in range(1, len(d.labels) + 1)]
    assert len(set(grays)) == len(grays) == total and min(grays) > 0 and max(grays) == 1
    palette = data.make_palette([1, 3], "predefined", None, "acdc", (offsets, total))
    assert palette[3] == np.float32((offsets["acdc"] + 3) / total) and palette[2] == 0


def test_binary_coloring_is_one_class_against_the_rest():
    rng = np.random.default_rng(0)
    palettes = [data.make_palette([2, 5], "binary", rng) for _ in range(20)]
    assert all(p.sum() == 1 for p in palettes) and {int(p.argmax()) for p in palettes} == {2, 5}


def test_one_color_a_class_in_all_pairs_of_a_sample(store):
    """The same palette paints prompt and task; a class that the prompt does not show is background."""
    episodes = data.Episodes(store, 64, 8, 8, seed=3)
    seen = 0
    for step in range(20):
        s = episodes[step, 0]
        if not s["colored"]:
            assert (s["palette"] == 0).all()
            continue
        painted = data.color(s["labels"][None], s["palette"][None], s["colored"][None])[0]
        shown = set(s["labels"][:-1].unique().int().tolist()) - {0}
        for c in set(s["labels"].unique().int().tolist()) - {0}:
            values = painted[s["labels"] == c].unique()
            assert len(values) == 1 and (values[0] > 0) == (c in shown)
            seen += 1
    assert seen > 5


# ---- the switch (section 4.1)

def test_the_shares_of_the_switch(store):
    episodes = data.Episodes(store, 64, 8, 8, seed=0)
    draws = [episodes.draw(step, 0)[:3] for step in range(10_000)]
    segmentation = [o for o, _, name in draws if store.datasets[name].colored]
    others = [o for o, _, name in draws if not store.datasets[name].colored]
    assert len(segmentation) / 10_000 == pytest.approx(0.5, abs=0.02)
    assert set(segmentation) == {"ar"}
    assert others.count("mim") / len(others) == pytest.approx(0.9, abs=0.02)
    names = [name for _, _, name in draws if store.datasets[name].colored]
    for name in set(names):  # equally likely inside the group
        assert names.count(name) / len(names) == pytest.approx(1 / 4, abs=0.02)


def test_a_step_has_one_objective_whatever_the_rank(store):
    episodes = data.Episodes(store, 64, 8, 8, seed=5)
    for step in range(30):
        assert len({episodes.draw(step, i)[0] for i in range(32)}) == 1
    ranks = [[key for batch in data.Steps(2, 6, 4, rank, 2) for key in batch] for rank in (0, 1)]
    assert not set(ranks[0]) & set(ranks[1])
    assert sorted(ranks[0] + ranks[1]) == [(step, i) for step in range(2, 6) for i in range(8)]


@pytest.mark.parametrize("objective", ("ar", "mim"))
def test_one_objective_alone(store, objective):
    episodes = data.Episodes(store, 64, 8, 8, objective=objective, num_prompts=(1, 3))
    draws = [episodes.draw(step, 0) for step in range(2000)]
    assert {d[0] for d in draws} == {objective}
    assert {d[1] for d in draws} == ({1, 2, 3} if objective == "ar" else {1})
    assert np.mean([store.datasets[d[2]].colored for d in draws]) == pytest.approx(0.5, abs=0.03)


def test_hidden_share_and_hidden_label():
    rng = np.random.default_rng(0)
    for ratio in (0.5, 0.75, 0.3):
        assert data.draw_hidden(rng, 49, ratio).sum() == round(4 * 49 * ratio)
    drawn = np.mean([data.draw_hidden(rng, 16, 0.75) for _ in range(2000)], 0)
    assert drawn.min() > 0.7 and drawn.max() < 0.8  # anywhere, all four images alike
    only_y = [data.draw_hidden(rng, 16, 0.75, 0.1) for _ in range(2000)]
    share = np.mean([h[3].all() and not h[:3].any() for h in only_y])
    assert share == pytest.approx(0.1, abs=0.025)


# ---- the sampler

def test_synthetic_share(store):
    episodes = data.Episodes(store, 64, 8, 8, synthetic=True, synthetic_share=0.3)
    draws = [episodes.draw(step, 0)[2:4] for step in range(4000)]
    for colored in (True, False):
        names = [n for n, c in draws if c == colored]
        assert names.count(data.SYNTHETIC) / len(names) == pytest.approx(0.3, abs=0.035)
    assert episodes.weights[True][:-1] == pytest.approx(0.7 / 4)


def test_dataset_weights(store):
    share = lambda rule: dict(zip((e := data.Episodes(store, 64, 8, 8, dataset_weights=rule)).groups[True], e.weights[True]))
    names = list(share("equal"))
    assert share("equal") == pytest.approx({n: 1 / len(names) for n in names})
    assert share("acdc=3")["acdc"] == pytest.approx(3 / (len(names) + 2))
    slices = {n: sum(len(c.foreground) for c in store.split(n, "train")) for n in names}
    assert share("size") == pytest.approx({n: s / sum(slices.values()) for n, s in slices.items()})
    for wrong in ("all", "acdc", "acdc=x", "acdc=0", "nowhere=2", "acdc=1,"):
        with pytest.raises(data.DataError, match="dataset_weights"):
            share(wrong)


def test_augment_makes_another_task_of_a_sample(store):
    plain, other = (data.Episodes(store, 64, 8, 8, augment=a) for a in (0.0, 1.0))
    assert same(other[3, 1], other[3, 1])
    fewer = 0
    for step in range(40):
        a, b = plain[step, 0], other[step, 0]
        assert a["images"].shape == b["images"].shape and b["valid"].dtype == torch.uint8
        assert 0 <= b["images"].min() and b["images"].max() <= 1 and not torch.equal(a["images"], b["images"])
        if b["colored"]:
            assert set(b["labels"].unique().tolist()) <= set(a["labels"].unique().tolist())  # classes stay classes
            fewer += len(b["labels"].unique()) < len(a["labels"].unique())
        else:  # mirrored and turned by quarters, image and label together, all pairs alike
            turned = [torch.rot90(torch.stack([b["images"], b["labels"]]), k, (-2, -1)) for k in range(4)]
            turned += [t.flip(-1) for t in turned]
            assert min((t - torch.stack([a["images"], a["labels"]])).abs().max() for t in turned) < 1e-3
    assert fewer > 2


def test_augment_keeps_image_and_label_together():
    """A label that is the image's bright square still covers it after turning and zooming, in every pair."""
    rng = np.random.default_rng(0)
    labels = torch.zeros(3, 1, 64, 64)
    labels[:, :, 20:44, 24:40] = 1
    for _ in range(20):
        images, moved, valid = data.augment(labels * 0.9, labels, torch.ones(labels.shape, dtype=torch.uint8), False, rng)
        assert torch.allclose(images, 0.9 * moved, atol=1e-4) and float(moved.sum()) == pytest.approx(float(labels.sum()), rel=1e-3)
        images, moved, _ = data.augment(labels * 0.9, labels, valid, True, rng)
        for x, y in zip(images, moved):
            if 50 < y.sum() < 3000:
                inside, outside = x[y > 0].median(), x[y == 0].median()
                assert ((x - inside).abs() < (x - outside).abs())[y > 0].float().mean() > 0.8 or abs(inside - outside) < 0.15


def test_a_case_that_prompts_itself_is_moved_apart():
    """Copying the prompt's label must not answer the question where both are one slice."""
    labels, rng, shared = torch.zeros(2, 1, 64, 64), np.random.default_rng(0), {1: [], 4: []}
    labels[:, :, 22:42, 26:38] = 1
    for apart, values in shared.items():
        for _ in range(60):
            a, b = (x > 0 for x in data.augment(labels, labels, torch.ones(labels.shape, dtype=torch.uint8), True, rng, apart)[1])
            values.append(float((a & b).sum() / (a | b).sum().clamp(min=1)))
    assert np.mean(shared[1]) > 0.5 and np.mean(shared[4]) < 0.35


def test_windows_by_hand():
    mask = np.zeros((10, 20), bool)
    mask[2:4, 5:15] = True
    assert data.extent(mask) == ((0.3, 0.5), 0.5) and data.extent(mask > 1) is None
    mask[9, 19] = True  # one of 21 pixels
    assert data.extent(mask) == ((0.6, 0.625), 0.8) and data.extent(mask, 0.05) == ((0.3, 0.5), 0.5)
    assert data.window((0.3, 0.5), 0.4, mask.shape) == (slice(1, 5), slice(6, 14))
    assert data.window((0.0, 1.0), 0.4, mask.shape) == (slice(0, 4), slice(12, 20))  # moved inside
    assert data.window((0.5, 0.5), 1.0, mask.shape) == (slice(0, 10), slice(0, 20)) and data.window((0.5, 0.5), 0.01, (3, 1)) == (slice(0, 2), slice(0, 1))


def test_close_ups_show_one_class_of_the_prompt_from_near():
    rng = np.random.default_rng(0)
    label = np.zeros((2, 60, 80), np.float32)
    label[0, 10:16, 10:18], label[1, 30:36, 50:58], label[:, 40:42, 70:74] = 1, 1, 2
    label[1, 0, 0] = 3  # the prompt does not show it
    seen = set()
    for _ in range(50):
        (image, mask, valid), (other, answer, none) = data.close_ups([(label[0] / 9, label[0], label[0] > 0), (label[1] / 9, label[1], None)], rng)
        (asked,) = np.unique(mask[mask > 0])
        seen.add(asked)
        size = {1: 80, 2: 26.7}[asked] / 800  # of the picture: 8 of 80 pixels, 2 of 60 are less than 4 of 80
        for picture in (image, other):
            assert 0.2 <= picture.shape[0] / 60 + 0.02 and picture.shape[0] / 60 <= max(0.2, 2.6 * size) + 0.02 and abs(picture.shape[0] / 60 - picture.shape[1] / 80) < 0.03
        assert set(np.unique(answer)) <= {0, asked} and (answer == asked).any() and none is None
        assert np.array_equal(valid, mask + (np.rint(image * 9) > 0) * (mask == 0) > 0)  # cut alike, whatever is asked for
        assert np.array_equal(np.rint(other * 9) == asked, answer == asked)
    assert seen == {1, 2}
    empty = [(label[0], np.zeros((60, 80)), None)] * 2
    assert data.close_ups(empty, rng) is empty


def test_close_ups_are_drawn_as_often_as_asked_for(store, monkeypatch):
    asked, real = [], data.close_ups
    monkeypatch.setattr(data, "close_ups", lambda *a: asked.append(1) or real(*a))
    for share, low, high in ((0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)):
        asked.clear()
        episodes = data.Episodes(store, 32, 8, 8, seg_share=1.0, objective="ar", close_up=share)
        samples = [episodes[0, i] for i in range(200)]
        assert low <= len(asked) <= high and all(s["images"].shape == (2, 1, 32, 32) for s in samples)
    assert all(len(s["labels"].unique()) <= 2 for s in samples)  # one class each


def test_boxes_are_lines_on_the_image_or_masks(tmp_path):
    picture = np.full((64, 64), 32768 - 1000)
    picture[8:56, 8:56] = 32768
    lesions(tmp_path / "DeepLesion", [dict(File_name=f"00000{p}_01_01_005.png", Bounding_boxes=f"{20 + p}, 22, 40, 36") for p in (1, 2, 3)], picture)
    store = data.open_store(tmp_path / "DeepLesion", tmp_path / "store")
    lines, filled = (data.Episodes(store, 64, 8, 8, filled=f) for f in (False, True))
    assert lines.groups == {True: [], False: ["deeplesion"]} and lines.seg_share == 0 and filled.groups == {True: ["deeplesion"], False: []} and filled.seg_share == 1
    for i in range(6):
        sample = filled[0, i]
        assert sample["colored"] and sample["labels"].dtype == torch.float32
        for image, label in zip(sample["images"][:, 0], sample["labels"][:, 0]):
            top, left, bottom, right = box = boxes.around(label)[0]
            assert np.array_equal(label, boxes.fill([box], (64, 64))) and abs(bottom - top - 16 * 8 / 7) <= 2 and 18 <= right - left <= 24
            assert abs(top - int(torch.where(image > 0.2)[0].min()) - 13 * 8 / 7) <= 2  # where it is in the body
    sample = lines[0, 0]
    assert not sample["colored"] and 0.5 < (sample["labels"] - sample["images"]).max() <= 1
    with pytest.raises(data.DataError, match="--boxes filled"):
        data.Episodes(store, 64, 8, 8, filled=True, coloring="predefined")


def test_few_shot_asks_for_it(store, monkeypatch):
    asked, real = [], data.augment
    monkeypatch.setattr(data, "augment", lambda *a: asked.append(a[-2]) or real(*a))
    for few, apart in ((1, 4), (3, 1)):
        asked.clear()
        episodes = data.Episodes(data.Store(store.root, ["msd_hippocampus"]), 64, 8, 8, augment=1.0, few=few)
        episodes[0, 0]
        assert asked == [apart]


def same(a, b):
    return all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a) and a.keys() == b.keys()


def test_samples_are_a_function_of_seed_step_and_number(store):
    a, b = (data.Episodes(store, 64, 8, 8, seed=1) for _ in range(2))
    other = data.Episodes(store, 64, 8, 8, seed=2)
    for key in ((0, 0), (7, 3), (100_000, 127)):
        assert same(a[key], b[key]) and not same(a[key], other[key])
    assert not same(a[0, 0], a[0, 1])


def test_samples_are_what_the_model_expects(store):
    episodes = data.Episodes(store, 96, 16, 12, num_prompts=(2, 2), objective="ar")
    s = episodes[0, 0]
    assert s["images"].shape == s["labels"].shape == s["valid"].shape == (3, 1, 96, 96)
    assert 0 <= s["images"].min() and s["images"].max() <= 1 and s["drop"].shape == (12, 2)
    seen = {bool(episodes[0, i]["colored"]): episodes[0, i] for i in range(30)}
    assert seen[True]["labels"].unique().frac().abs().max() == 0  # classes stay classes through resizing
    assert 0 <= seen[False]["labels"].min() and seen[False]["labels"].max() <= 1
    assert bool(seen[False]["first"]) and not bool(seen[True]["first"])
    assert data.Episodes(store, 96, 16, 12, objective="mim")[0, 0]["hidden"].shape == (4, 36)


def test_prompts_come_from_another_patient_near_the_same_height(store):
    episodes = data.Episodes(store, 64, 8, 8)
    rng = np.random.default_rng(0)
    cases = episodes.cases["acdc"]
    for at, case in enumerate(cases):
        for k in case.foreground:
            prompt, s = episodes.draw_prompt(cases, at, k, rng)
            assert prompt.patient != case.patient and s in prompt.foreground
            if set(case.classes[k]) & {c for f in prompt.foreground for c in prompt.classes[f]}:
                assert set(case.classes[k]) & set(prompt.classes[s])
    assert len({c.patient for c in cases}) < len(cases)  # ED and ES: the rule had something to do


def test_a_single_case_prompts_itself_and_is_never_held_out(tmp_path):
    folder = tmp_path / "Dataset900_One"
    write_pair(folder, "a")
    found = data.find(tmp_path)
    assert [c.split for c in found["Dataset900_One"].cases] == ["train"]
    data.prepare(found, tmp_path / "store")
    episodes = data.Episodes(data.Store(tmp_path / "store"), 64, 8, 8)
    s = episodes[0, 0]
    assert s["images"].shape == (2, 1, 64, 64) and not torch.equal(s["images"][0], s["images"][1])


def test_data_fraction_keeps_at_least_one_case(store):
    whole, part = data.Episodes(store, 64, 8, 8), data.Episodes(store, 64, 8, 8, data_fraction=0.01)
    assert all(len(c) == 1 for c in part.cases.values()) and len(part) < len(whole)
    assert part.cases == data.Episodes(store, 64, 8, 8, seed=9, data_fraction=0.01).cases == data.Episodes(store, 64, 8, 8, seed=3, few=1).cases
    two = data.Episodes(store, 64, 8, 8, few=2)
    assert all(len(c) == 2 and set(map(id, part.cases[n])) < set(map(id, c)) for n, c in two.cases.items())


def test_held_out_patients_are_not_drawn(store):
    whole, part = data.Episodes(store, 64, 8, 8), data.Episodes(store, 64, 8, 8, held_out=1)
    for name, cases in whole.cases.items():
        held, patients = {c.patient for c in part.held[name]}, {c.patient for c in cases}
        assert len(held) == (len(patients) >= 5) and {c.patient for c in part.cases[name]} == patients - held
        assert len(part.held[name]) + len(part.cases[name]) == len(cases)
    assert not any(whole.held.values()) and any(part.held.values())


# ---- geometry and intensity

def marked_volume():
    """(X, Y, Z) in LPS with spacing (1, 2, 3) and one bright voxel at left-anterior-superior."""
    array = np.zeros((5, 6, 7), np.float32)
    array[4, 0, 6] = 1
    return array


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_storage_order_gives_the_same_slices(order, tmp_path):
    lps = marked_volume()
    affine = readers.LPS_TO_RAS @ np.diag([1.0, 2.0, 3.0, 1.0])
    expected = None
    for flips in itertools.product((1, -1), repeat=3):
        ornt = np.array([[o, f] for o, f in zip(order, flips)], float)
        stored = nibabel.Nifti1Image(lps, affine).as_reoriented(ornt)
        nibabel.save(stored, tmp_path / "v.nii")
        volume = readers.read_volume(tmp_path / "v.nii")
        cut = data.slicing(volume)
        stack = cut.cut(volume.array)
        assert cut.axis == 2 and stack.shape == (7, 6, 5)
        assert stack[6, 0, 4] == 1  # superior slice, anterior row, left (right of the picture) column
        assert cut.spacing == pytest.approx((3, 2, 1))
        assert np.array_equal(cut.restore(stack), volume.array)


@pytest.mark.parametrize("spacing,axis", (((1, 1, 1), 2), ((1, 1, 5), 2), ((4, 1, 1), 0), ((1, 3, 1), 1), ((1.9, 1, 1), 2), ((3, 1, 2), 2), ((1, 1, 0.3), 2)))
def test_slice_axis_is_the_coarsest_if_twice_as_coarse(spacing, axis):
    volume = readers.Volume(np.zeros((3, 4, 5)), readers.LPS_TO_RAS @ np.diag([*map(float, spacing), 1]), "x", "nifti")
    cut = data.slicing(volume)
    assert cut.axis == axis and len(cut.cut(volume.array)) == (3, 4, 5)[axis]
    assert cut.spacing[0] == spacing[axis]
    if axis != 2:
        volume.array[:, :, 4] = 1  # superior is at the top
        assert (cut.cut(volume.array)[:, 0] == 1).all()
    assert np.array_equal(cut.restore(cut.cut(volume.array)), volume.array)


def test_intensity_ranges():
    eye = np.eye(4)
    ct = readers.Volume(np.array([-1000.0, -100, 50, 200, 3000]).reshape(5, 1, 1), eye, "x", "nifti")
    assert data.to_unit(ct.array, data.intensity_range(ct, "ct")).ravel().tolist() == [0, 0, 0.5, 1, 1]
    assert data.guess_modality(ct) == "ct"
    mr = readers.Volume(np.arange(10_001.0).reshape(-1, 1, 1), eye, "x", "nifti")
    assert data.intensity_range(mr, "mri") == (50, 9950)
    picture = readers.Volume(np.array([0, 51], np.uint8).reshape(2, 1, 1), eye, "x", "picture", eight_bit=True)
    assert data.to_unit(picture.array, data.intensity_range(picture, "ultrasound")).ravel().tolist() == pytest.approx([0, 0.2])
    flat = readers.Volume(np.full((4, 4, 4), 7.0), eye, "x", "nifti")
    assert np.isfinite(data.to_unit(flat.array, data.intensity_range(flat, "mri"))).all()


# ---- finding

def write_pair(folder, name, shape=(40, 40, 6), value=1, seed=0, **about):
    rng = np.random.default_rng(seed)
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    label = np.zeros(shape, np.uint8)
    label[10:20, 12:30] = value
    nibabel.save(nibabel.Nifti1Image(rng.normal(size=shape).astype(np.float32) + label, np.diag([1, 1, 4, 1.0])), folder / "imagesTr" / f"{name}_0000.nii.gz")
    nibabel.save(nibabel.Nifti1Image(label, np.diag([1, 1, 4, 1.0])), folder / "labelsTr" / f"{name}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}, "labels": {"background": 0, "thing": 1}, **about}))


def test_find_knows_datasets_by_their_marks(stand_ins, tmp_path):
    found = data.find(stand_ins)
    assert set(found) == set(FIVE)
    nested = tmp_path / "some" / "where"
    nested.mkdir(parents=True)
    (nested / "renamed").symlink_to(found["acdc"].root, target_is_directory=True)
    assert set(data.find(tmp_path)) == {"acdc"}


def test_find_says_what_is_wrong(stand_ins, tmp_path):
    with pytest.raises(data.DataError, match="no such folder"):
        data.find(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match="no dataset"):
        data.find(tmp_path)
    with pytest.raises(data.DataError, match="did you mean acdc"):
        data.find(stand_ins, ["acdcc"])
    with pytest.raises(data.DataError, match="word is not in"):
        data.find(stand_ins, ["word"])


def test_splits_keep_patients_apart(stand_ins):
    for name, found in data.find(stand_ins).items():
        train, test = ({c.patient for c in found.cases if c.split == s} for s in ("train", "test"))
        assert train and test and not train & test, name


# ---- the store

def test_the_store_holds_what_the_files_hold(stand_ins, store):
    for name, found in data.find(stand_ins, ["acdc", "Dataset802_MsT1ToFlair"]).items():
        case = found.cases[0]
        stored = next(c for c in store.cases[name] if c.name == case.name)
        pair = case.load()
        cut = data.slicing(pair.image)
        expected = data.to_unit(cut.cut(pair.image.array), data.intensity_range(pair.image, "mri"))
        for k in (0, stored.slices // 2):
            image, label, valid = stored.read(k)
            assert np.abs(image - expected[k]).max() < 1 / 2 ** 13 and valid is None
            if found.dataset.colored:
                assert np.array_equal(label, cut.cut(pair.label.array)[k])
                assert stored.classes[k] == [c for c in np.unique(label) if c]


def test_the_store_is_built_once_and_rebuilt_where_a_source_changed(tmp_path):
    root = tmp_path / "data" / "Dataset900_Two"
    write_pair(root, "a"), write_pair(root, "b", seed=1)
    found, where = data.find(tmp_path / "data"), tmp_path / "store"
    data.prepare(found, where)
    stamp = lambda n: (where / "Dataset900_Two" / n / "image.npy").stat().st_mtime_ns
    before = {n: stamp(n) for n in "ab"}
    data.prepare(found, where)
    assert {n: stamp(n) for n in "ab"} == before
    write_pair(root, "b", seed=2, shape=(40, 40, 8))
    data.prepare(data.find(tmp_path / "data"), where)
    assert stamp("a") == before["a"] and stamp("b") != before["b"]
    assert {c.name: c.slices for c in data.Store(where).cases["Dataset900_Two"]} == {"a": 6, "b": 8}


def test_a_bad_case_is_named_and_left_out(tmp_path, capsys):
    root = tmp_path / "data" / "Dataset900_Bad"
    for i, n in enumerate("abc"):
        write_pair(root, n, seed=i)
    (root / "labelsTr" / "b.nii.gz").unlink()
    whole = (root / "imagesTr" / "c_0000.nii.gz").read_bytes()
    (root / "imagesTr" / "c_0000.nii.gz").write_bytes(whole[:len(whole) // 2])
    problems = data.prepare(data.find(tmp_path / "data"), tmp_path / "store")
    said = capsys.readouterr().out
    assert "Dataset900_Bad: b: b.nii.gz is missing, it is neither trained on nor scored" in said
    assert len(problems["Dataset900_Bad"]) == 1 and "c_0000.nii.gz cannot be read" in said
    assert [c.name for c in data.Store(tmp_path / "store").cases["Dataset900_Bad"]] == ["a"]


def test_a_large_slice_is_reduced_to_the_training_resolution(tmp_path):
    write_pair(tmp_path / "Dataset900_Large", "a", shape=(700, 300, 1))
    data.prepare(data.find(tmp_path), tmp_path / "store")
    case = data.Store(tmp_path / "store").cases["Dataset900_Large"][0]
    image, label, _ = case.read(0)
    assert image.shape == label.shape == (300, 512) and case.index["spacing"] == pytest.approx([4, 1, 700 / 512])
    assert set(np.unique(label)) == {0, 1}


def test_another_description_of_the_dataset_makes_its_cases_anew(tmp_path):
    root = tmp_path / "data" / "Dataset900_One"
    write_pair(root, "a")
    for change in ({}, {"channel_names": {"0": "CT"}}, {"labels": "image"}):
        write_pair(root, "a", **change)
        data.prepare(data.find(tmp_path / "data"), tmp_path / "store")
        case = data.Store(tmp_path / "store").cases["Dataset900_One"][0]
        assert (case.index["scale"] == [-100, 200]) == ("channel_names" in change)
        assert (case.read(2)[1].max() <= 1) and (case.index["label_scale"] is None) == (change.get("labels") != "image")


@pytest.mark.parametrize("damage", ("cut", "empty", "gone", "index", "list", "dataset"))
def test_a_damaged_store_is_named_and_mended(tmp_path, damage):
    write_pair(tmp_path / "data" / "Dataset900_One", "a")
    found = data.find(tmp_path / "data")
    data.prepare(found, tmp_path / "store")
    case = tmp_path / "store" / "Dataset900_One" / "a"
    {"cut": lambda: (case / "image.npy").write_bytes((case / "image.npy").read_bytes()[:500]), "empty": lambda: (case / "label.npy").write_bytes(b""),
     "gone": (case / "label.npy").unlink, "index": lambda: (case / "case.json").write_text('{"version": 2}'),
     "list": lambda: (case / "case.json").write_text("[]"), "dataset": lambda: (case.parent / "dataset.json").write_text("{}")}[damage]()
    with pytest.raises(data.DataError, match="Dataset900_One.* is damaged"):
        data.Store(tmp_path / "store")
    data.prepare(found, tmp_path / "store")
    assert data.Store(tmp_path / "store").cases["Dataset900_One"][0].read(0)[0].shape == (40, 40)


def test_labels_and_names_must_fit(tmp_path, monkeypatch):
    write_pair(tmp_path / "Dataset900_Nine", "a", value=9)
    assert "holds the label 9" in data.prepare(data.find(tmp_path), tmp_path / "store")["Dataset900_Nine"][0]
    for i, (name, about, words) in enumerate((("synthetic", {}, "rename the folder"), ("Dataset001_B", {"labels": {"background": 0}}, "no class above 0"))):
        write_pair(tmp_path / str(i) / name, "a", **about)
        with pytest.raises(data.DataError, match=words):
            data.find(tmp_path / str(i))
    assert set(data.find(tmp_path)) == {"Dataset900_Nine"}  # said, and the others go on
    monkeypatch.chdir(tmp_path / "Dataset900_Nine")
    assert set(data.find(".")) == {"Dataset900_Nine"}


def test_a_newer_store_is_refused(tmp_path):
    write_pair(tmp_path / "Dataset900_One", "a")
    data.prepare(data.find(tmp_path), tmp_path / "store")
    index = tmp_path / "store" / "Dataset900_One" / "a" / "case.json"
    index.write_text(index.read_text().replace(f'"version": {data.STORE_VERSION}', '"version": 99'))
    with pytest.raises(data.DataError, match="version 99"):
        data.Store(tmp_path / "store")


def test_names_in_dataset_json_cannot_leave_the_folder(tmp_path):
    folder = tmp_path / "Task50_Trap"
    write_pair(folder, "a", modality={"0": "CT"}, training=[{"image": "../../etc/passwd", "label": "./labelsTr/a.nii.gz"}])
    about = json.loads((folder / "dataset.json").read_text())
    del about["channel_names"]
    (folder / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(data.DataError, match="outside its folder"):
        data.find(tmp_path)


def test_real_scans_are_found_and_read(real, tmp_path):
    found = data.find(real)
    assert set(FIVE) <= set(found)
    assert (len(found["acdc"].cases), len(found["la"].cases), len(found["msd_hippocampus"].cases)) == (100, 15, 60)
    some = {n: data.Found(f.dataset, f.root, f.cases[:2]) for n, f in found.items() if n in FIVE}
    assert data.prepare(some, tmp_path) == {}  # the first two cases of each
    store = data.Store(tmp_path)
    for name, cases in store.cases.items():
        assert all(c.foreground for c in cases), name


# ---- synthetic tasks

def test_synthetic_tasks_are_deterministic_and_differ(tmp_path):
    from synthetic import task
    for colored in (True, False):
        draw = lambda i: task(np.random.default_rng([7, i]), 3, 64, colored)
        seen = [draw(i) for i in range(20)]
        for i, (images, labels) in enumerate(seen):
            again = draw(i)
            assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
            assert images.shape == labels.shape == (3, 64, 64) and images.dtype == labels.dtype == torch.float32
            assert 0 <= images.min() and images.max() <= 1 and labels.min() >= 0
            assert (labels.frac() == 0).all() and labels.max() <= 12 if colored else labels.max() <= 1
        assert len({float(i.sum()) for i, _ in seen}) == 20
        if colored:  # nearly every task asks for something, and subjects differ
            assert sum(bool(l.max() > 0) for _, l in seen) >= 19
            same = [((l[0] > 0) & (l[1] > 0)).sum() / ((l[0] > 0) | (l[1] > 0)).sum().clamp(min=1) for _, l in seen]
            assert 0.1 < np.mean(same) < 0.7


def test_synthetic_needs_no_data_and_joins_both_groups(store):
    alone = data.Episodes(None, 64, 8, 8, synthetic=True)
    kinds = {(s["colored"].item(), s["dataset"]) for s in (alone[i, 0] for i in range(20))}
    assert kinds == {(True, 0), (False, 0)} and len(alone) == data.SYNTHETIC_EPOCH
    assert same(alone[3, 1], data.Episodes(None, 64, 8, 8, synthetic=True)[3, 1])
    both = data.Episodes(store, 64, 8, 8, synthetic=True)
    draws = [both.draw(step, 0) for step in range(4000)]
    for colored, others in ((True, 4), (False, 1)):
        names = [d[2] for d in draws if d[3] == colored]
        assert names.count("synthetic") / len(names) == pytest.approx(1 / (others + 1), abs=0.03)
    with pytest.raises(data.DataError, match="leave synthetic out"):
        data.Episodes(None, 64, 8, 8, synthetic=True, coloring="predefined")
