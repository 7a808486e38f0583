"""The bundled checkpoint: it is the file that its card describes, and it works."""

import hashlib
import re

import numpy as np
import torch

import eval as evaluation
import metrics
import mvg
from conftest import ROOT
from recipe import Recipe
from running.checkpoints import find_checkpoint

CARD, FILE = ROOT / "checkpoints" / "README.md", ROOT / "checkpoints" / "demo.pt"


def test_the_file_is_the_one_the_card_describes():
    card = CARD.read_text()
    digest = hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert digest == re.search(r"[0-9a-f]{64}", card)[0]
    assert FILE.stat().st_size <= 25e6
    checkpoint = torch.load(FILE, weights_only=True)
    assert {"mvg", "config", "meta", "model", "recipe", "step"} <= set(checkpoint)
    model = mvg.load(FILE)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M" in card
    assert find_checkpoint() == FILE


def test_its_recipe_is_one_of_this_code():
    """Every field of the recipe is known, and says of the model what its configuration says."""
    checkpoint = torch.load(FILE, weights_only=True)
    recipe, config = Recipe(**checkpoint["recipe"]), mvg.load(FILE).config
    for name in ("layout", "positions", "qk_norm", "gate", "drop_path", "image_size"):
        assert getattr(recipe, name) == getattr(config, name), name
    for name in ("coloring", "objective", "boxes"):
        assert getattr(recipe, name) == checkpoint["meta"][name], name


def scores(model, store, name, settings, kinds):
    """The mean main score of some answers to a stand-in's held-out cases."""
    dataset, training = store.datasets[name], store.split(name, "train")
    answers = [evaluation.answer_case(model, case, training, dataset, settings, ())
               for case in store.split(name, "test")]
    metric = metrics.main_metric(dataset)
    return [np.mean([metrics.case_values(evaluation.score(kind, a, dataset), dataset)[metric]
                     for a in answers]) for kind in kinds]


def test_it_beats_copying_on_held_out_stand_ins(store):
    model = mvg.load(FILE)
    for name in ("la", "acdc"):
        kinds = ("prediction", "copy")
        prompted, copied = scores(model, store, name, evaluation.Settings(looks=1), kinds)
        assert prompted > copied + 0.1, (name, prompted, copied)


def test_a_prompt_without_an_answer_lowers_its_score(store):
    settings = evaluation.Settings(looks=1, wrong_prompt=True)
    prompted, empty = scores(mvg.load(FILE), store, "la", settings, ("prediction", "empty"))
    assert empty < prompted / 2, (prompted, empty)
