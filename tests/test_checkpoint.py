"""The bundled checkpoint: it is the file its card describes, it works, and the card's command is the one that made it."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import eval as evaluation
import infer
import mvg
from conftest import ROOT

CARD, FILE, LOG = (ROOT / "checkpoints" / n for n in ("README.md", "demo.pt", "log.jsonl"))


def commands():
    """The command lines of the card: indented, joined where a backslash ends them."""
    lines = "\n".join(line.strip() for line in CARD.read_text().splitlines() if line.startswith("    "))
    return [shlex.split(line) for line in lines.replace("\\\n", " ").splitlines()]


def test_the_file_is_the_one_the_card_describes():
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == re.search(r"[0-9a-f]{64}", CARD.read_text())[0]
    assert FILE.stat().st_size <= 25e6
    checkpoint = torch.load(FILE, weights_only=True)
    assert {"mvg", "config", "meta", "model", "settings", "step"} <= set(checkpoint)
    assert checkpoint["step"] == json.loads(LOG.read_text().splitlines()[-1])["step"]
    model = mvg.load(FILE)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M" in CARD.read_text()
    assert infer.find_checkpoint() == FILE


def test_the_card_has_the_settings_of_the_run():
    import train
    typed = []
    for command in (c[c.index("train.py") + 1:] for c in commands() if "train.py" in c):  # the last run, and what --resume changed of it
        typed = [*typed, *command[command.index("--resume") + 2:]] if "--resume" in command else command
    said, settings = vars(train.parse(typed)[0]), torch.load(FILE, weights_only=True)["settings"]
    places = ("data_root", "store", "out", "log_every", "save_every", "resume", "stop_at", "device", "init")
    assert {k: said[k] for k in settings if k not in places} == {k: v for k, v in settings.items() if k not in places}


def test_it_beats_copying_on_held_out_stand_ins(store):
    model = mvg.load(FILE)
    for name, metric in (("la", "mIoU"), ("Dataset802_MsT1ToFlair", "PSNR")):
        dataset, training = store.datasets[name], store.split(name, "train")
        answers = [evaluation.answer_case(model, c, training, dataset, "foreground", 0, votes=1) for c in store.split(name, "test")]
        prompted, copied = (evaluation.summary([evaluation.score(a[k], a, dataset) for a in answers], range(len(answers)), dataset)[metric]
                            for k in ("prediction", "copy"))
        assert prompted > copied, (name, prompted, copied)


@pytest.mark.slow
def test_the_command_of_the_card_reproduces_the_first_logged_losses(tmp_path):
    first = json.loads(LOG.read_text().splitlines()[0])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in commands():
        if {"--finetune", "--init", "--resume"} & set(command):  # they go on from there
            continue
        if "phantom.py" in command:
            subprocess.run([sys.executable, str(ROOT / "phantom.py"), *command[command.index("phantom.py") + 1:]], cwd=tmp_path, check=True, env=environment)
        elif "train.py" in command:
            at = command.index("train.py")
            ranks = next(w for w in command if w.startswith("--nproc_per_node"))
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", ranks, str(ROOT / "train.py"), *command[at + 1:],
                            "--stop_at", str(first["step"])], cwd=tmp_path, check=True, env=environment)
    again = json.loads(next((tmp_path / "runs").glob("*/log.jsonl")).read_text().splitlines()[0])
    assert again["step"] == first["step"] and again["loss"] == pytest.approx(first["loss"], rel=0.01)
    assert again["losses"].keys() == first["losses"].keys()
    for objective, by in first["losses"].items():
        assert again["losses"][objective].keys() == by.keys()  # the same draws
        assert list(again["losses"][objective].values()) == pytest.approx(list(by.values()), rel=0.1)  # bfloat16 on another machine
