"""The recipe and the command lines: every value parsed, refused or read, and every flag counted."""

import ast
import re
from dataclasses import asdict, fields

import pytest
import torch

import eval as evaluation
import infer
import mvg
import recipe as recipes
import train
from conftest import ROOT
from recipe import Recipe, parse
from running.checkpoints import load_checkpoint
from scans.volumes import DataError


# -------------------------------------------------------------------------------------------------
# Fields

def test_the_papers_defaults():
    args, recipe = parse([])
    assert args.epochs == 100 and recipe.prompt_range == (1, 1)
    assert (recipe.lr, recipe.weight_decay, recipe.warmup) == (1e-3, 0.05, 0.05)
    assert (recipe.objective, recipe.seg_share, recipe.mim_share) == ("hybrid", 0.5, 0.9)
    assert (recipe.coloring, recipe.loss) == ("random", "smooth_l1")
    assert mvg.Config(**mvg.SIZES["large"]).image_size == 448 and recipe.model == "large"


@pytest.mark.parametrize("words,name,value", (
    ("strict=true", "strict", True), ("strict=True", "strict", True),
    ("qk_norm=false", "qk_norm", False), ("bf16=none", "bf16", None), ("bf16=true", "bf16", True),
    ("image_size=64", "image_size", 64), ("image_size=none", "image_size", None),
    ("cases=3", "cases", 3), ("layer_decay=None", "layer_decay", None),
    ("layer_decay=0.75", "layer_decay", 0.75), ("beta=1e-3", "beta", 1e-3),
    ("loss=l2", "loss", "l2"), ("mask_loss=l2", "mask_loss", "l2"),
    ("mask_loss=none", "mask_loss", None), ("num_prompts=1-4", "num_prompts", "1-4"),
    ("init=none", "init", None), ("init=a=b.pth", "init", "a=b.pth"),
    ("datasets=acdc,la", "datasets", ("acdc", "la")),
    ("brats_pairs=t1c:t2w,t2w:t1c", "brats_pairs", ("t1c:t2w", "t2w:t1c"))))
def test_set_parses_every_type(words, name, value):
    recipe = parse(["--set", words])[1]
    assert getattr(recipe, name) == value and type(getattr(recipe, name)) is type(value)
    others = {f.name for f in fields(Recipe)} - {name}
    assert all(getattr(recipe, other) == getattr(Recipe(), other) for other in others)


def test_flags_and_set_parse_alike():
    for words, name in ((["lr", "5e-4"], "lr"), (["cases", "7"], "cases"),
                        (["datasets", "acdc"], "datasets"), (["seed", "3"], "seed")):
        flag, assigned = parse([f"--{words[0]}", words[1]])[1], parse(["--set", "=".join(words)])[1]
        assert flag == assigned != Recipe(), name
    assert parse(["--datasets", "acdc", "la"])[1].datasets == ("acdc", "la")
    several = parse(["--set", "loss=l1", "beta=0.1", "gate=true"])[1]
    assert (several.loss, several.beta, several.gate) == ("l1", 0.1, True)


@pytest.mark.parametrize("argv,words", (
    (["--set", "los=l1"], "the recipe has no such field, it has model, image_size"),
    (["--set", "steps=3"], "the recipe has no such field"),
    (["--set", "beta=small"], "--beta is 'small': write a float"),
    (["--set", "beta="], "write a float"),
    (["--set", "beta=none"], "write a float"),
    (["--set", "beta=nan"], "--beta is nan: it must be above 0"),
    (["--set", "strict=yes"], "--strict is 'yes': write a bool"),
    (["--set", "cases=1.5"], "--cases is '1.5': write a int"),
    (["--set", "loss=l3"], "--loss is 'l3': choose one of smooth_l1, l1, l2"),
    (["--set", "drop_path=1"], "a rate is from 0 to 0.99999"),
    (["--set", "boxes=round"], "choose one of lines, filled"),
    (["--set", "validate_cases=-1"], "must not be below 0"),
    (["--model", "huge"], "choose one of demo, pocket, tiny"),
    (["--layout", "stacked"], "choose one of"),
    (["--coloring", "rainbow"], "choose one of random, predefined, binary"),
    (["--lr", "0"], "--lr is 0.0: it must be above 0"),
    (["--mask_ratio", "0"], "above 0, at most 1"),
    (["--seg_share", "1.1"], "a share is from 0 to 1"),
    (["--steps", "0"], "--steps is 0: it must be a number above 0"),
    (["--epochs", "-1"], "--epochs is -1.0"),
    (["--steps", "9", "--minutes", "5"], "--steps and --minutes both say how long"),
    (["--log_every", "0"], "--log_every is 0"),
    (["--num_prompts", "0"], "range such as 1-4")))
def test_what_cannot_be_is_refused_in_one_line(argv, words):
    with pytest.raises(DataError) as error:
        parse(argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_unknown_flags_and_parts_of_flags_are_refused(capsys):
    for argv in (["--loss", "l1"], ["--data", "x"], ["--see", "1"]):
        with pytest.raises(SystemExit) as stop:
            parse(argv)
        assert stop.value.code == 2
    assert "unrecognized arguments: --loss l1" in capsys.readouterr().err


def test_the_papers_layout_is_a_preset():
    recipe = parse(["--layout", "paper"])[1]
    assert (recipe.layout, recipe.positions, recipe.qk_norm) == ("sequence", "learned", False)
    assert recipe == Recipe(layout="sequence", positions="learned", qk_norm=False)
    own = parse(["--layout", "paper", "--set", "positions=rope"])[1]  # what is typed wins
    assert (own.layout, own.positions, own.qk_norm) == ("sequence", "rope", False)
    model = train.make_model(*parse(["--layout", "paper", "--model", "demo"]), None)[0]
    assert isinstance(model, mvg.Sequence)
    assert (model.config.positions, model.config.qk_norm) == ("learned", False)


def test_the_model_is_the_recipes():
    changes = ["positions=learned", "qk_norm=false", "gate=true", "drop_path=0.25"]
    args, recipe = parse(["--model", "demo", "--image_size", "32", "--num_prompts", "1-3",
                          "--set", *changes])
    model, losses = train.make_model(args, recipe, None)
    c = model.config
    assert (c.image_size, c.layout, c.positions, c.qk_norm) == (32, "fused", "learned", False)
    assert (c.gate, c.drop_path, c.max_prompts) == (True, 0.25, 3) and set(losses) == {"ar", "mim"}


# -------------------------------------------------------------------------------------------------
# Resuming and fine-tuning

OTHER = {"model": "tiny", "image_size": "64", "layout": "sequence", "positions": "learned",
         "qk_norm": "false", "gate": "true", "drop_path": "0.2", "init": "mae.pth",
         "objective": "ar", "seg_share": "0.4", "mim_share": "0.8", "mask_ratio": "0.5",
         "hide_label": "0.2", "num_prompts": "1-2", "coloring": "binary", "loss": "l1",
         "mask_loss": "l2", "beta": "0.02", "background_weight": "1",
         "boxes": "filled",
         "augment": "0.5", "superpixels": "0.5", "datasets": "acdc",
         "brats_pairs": "t1c:t2w",
         "data_fraction": "0.5", "cases": "5", "validate_cases": "1", "dataset_weights": "size",
         "synthetic_share": "0.1", "pool": "20", "strict": "true", "optimizer": "muon",
         "batch_size": "8", "accumulate": "2", "lr": "1e-4", "layer_decay": "0.9", "warmup": "0.1",
         "weight_decay": "0.1", "clip": "2", "average": "0.9", "bf16": "true", "seed": "1"}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A checkpoint that a run with the default recipe could have written."""
    path = tmp_path_factory.mktemp("run") / "last.pt"
    args, recipe = parse(["--out", str(path.parent), "--steps", "10", "--data_root", "scans",
                          "--stop_at", "4", "--save_every", "7", "--device", "cpu"])
    mvg.save(path, mvg.build("demo", 32), step=4, ranks=1, optimizers=[], best=0.0,
             recipe=asdict(recipe), run=vars(args))
    return path


def test_every_field_has_another_value():
    assert set(OTHER) == {f.name for f in fields(Recipe)}


@pytest.mark.parametrize("name", OTHER)
def test_resume_refuses_every_changed_field(begun, name):
    before = getattr(Recipe(), name)
    with pytest.raises(DataError, match=re.escape(f"was trained with --{name} {before}, now ")):
        parse(["--resume", str(begun), "--set", f"{name}={OTHER[name]}"])
    if name in recipes.FLAGS:
        with pytest.raises(DataError, match=f"drop --{name}, or start anew"):
            parse(["--resume", str(begun), f"--{name}", OTHER[name]])


def test_resume_takes_the_settings_of_the_run(begun):
    args, recipe = parse(["--resume", str(begun)])
    assert recipe == Recipe() and args.resume == str(begun) and args.out == str(begun.parent)
    assert (args.steps, args.data_root, args.save_every) == (10, "scans", 7)
    assert (args.stop_at, args.device, args.dry_run) == (None, None, False)  # those of this time
    assert parse(["--resume", "--out", str(begun.parent)])[0].resume == str(begun)
    args, recipe = parse(["--resume", str(begun), "--set", "loss=smooth_l1", "--lr", "0.001",
                          "--steps", "20", "--save_every", "3", "--device", "cpu"])
    assert recipe == Recipe() and (args.steps, args.save_every, args.device) == (20, 3, "cpu")
    assert args.minutes is None
    args, _ = parse(["--resume", str(begun), "--minutes", "2"])  # another length, another way
    assert (args.steps, args.minutes) == (None, 2)


def test_a_run_of_other_code_is_not_resumed(begun, tmp_path):
    saved = load_checkpoint(begun)
    saved["recipe"]["balance"] = True
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(DataError, match="is of other code, whose recipe had balance: go on with"):
        parse(["--resume", str(tmp_path / "last.pt")])


def test_a_model_without_a_run_is_not_resumed(checkpoint):
    with pytest.raises(DataError, match="holds a model but no run to go on with"):
        parse(["--resume", str(checkpoint)])


def test_finetuning_keeps_the_fields_of_model_and_method(tmp_path):
    kept = {name: OTHER[name] for name in recipes.OF_THE_MODEL + recipes.OF_THE_METHOD
            if name not in ("init", "model")}
    kept["layout"] = "fused"
    first = Recipe(**{name: recipes.converted(name, value) for name, value in OTHER.items()
                      if name not in ("layout", "init")})
    model = mvg.build("demo", 32)
    model.config.max_prompts = 3
    mvg.save(tmp_path / "m.pt", model, recipe=asdict(first))
    args, recipe = parse(["--finetune", str(tmp_path / "m.pt")])
    for name, value in kept.items():
        assert getattr(recipe, name) == recipes.converted(name, value), name
    assert (args.steps, recipe.num_prompts) == (300, "1-3")
    rest = {f.name for f in fields(Recipe)} - set(kept) - {"num_prompts", "model", "image_size"}
    assert len(rest) > 10
    for name in rest:  # data and optimisation begin anew
        assert getattr(recipe, name) == getattr(Recipe(), name), name
    changed = parse(["--finetune", str(tmp_path / "m.pt"), "--coloring", "random", "--lr", "1e-5",
                     "--set", "loss=l2"])[1]
    assert (changed.coloring, changed.lr, changed.loss) == ("random", 1e-5, "l2")
    args = parse(["--finetune", str(tmp_path / "m.pt"), "--epochs", "2"])[0]
    assert (args.steps, args.epochs) == (None, 2)


def test_the_lists_of_fields_name_fields_once():
    names = {f.name for f in fields(Recipe)}
    for some in (recipes.FLAGS, recipes.OF_THE_MODEL + recipes.OF_THE_METHOD, recipes.CHOICES,
                 " ".join(row[0] for row in recipes.RANGES).split()):
        assert len(set(some)) == len(list(some)) and set(some) <= names


# -------------------------------------------------------------------------------------------------
# The flags

PROGRAMS = {"train": (train, 38), "infer": (infer, 17), "eval": (evaluation, 18)}


def help_of(program, capsys):
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[program][0].main(["--help"])
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_flags_are_few(program, capsys):
    flags = re.findall(r"^  --(\w+)", help_of(program, capsys), re.M)
    assert 10 < len(flags) <= PROGRAMS[program][1], flags
    assert len(set(flags)) == len(flags)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_has_a_help(program, capsys):
    help_of(program, capsys)
    parser = PROGRAMS[program][0]
    parser = recipes.make_parser() if program == "train" else parser.make_parser()
    assert [a.dest for a in parser._actions if not a.help] == []


def test_the_help_has_the_comment_of_every_field(capsys):
    said = re.sub(r"\s", "", help_of("train", capsys))
    source = (ROOT / "recipe.py").read_text()
    for f in fields(Recipe):
        comment = re.search(rf"^    {f.name}: .*?  # (.*)$", source, re.M).group(1)
        assert re.match(r"(paper|authors|ours|only|at most|do not|of the|file)\b", comment), f.name
        assert re.sub(r"\s", "", comment) in said, f.name
        assert f"{f.name}={f.default}" in said or f"--{f.name}" in said


def reads(tree, owner):
    """Names read as `owner.<name>` or `<anything>.owner.<name>`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            of = node.value
            if getattr(of, "id", None) == owner or getattr(of, "attr", None) == owner:
                names.add(node.attr)
    return names


def parsed(*paths, without=()):
    """The syntax of some files of the project as one tree, without some functions of theirs."""
    trees = [ast.parse(path.read_text()) for path in paths]
    body = [node for tree in trees for node in tree.body
            if getattr(node, "name", None) not in without]
    return ast.Module(body, [])


def test_what_is_read_is_told_from_what_is_named():
    source = """
FLAGS = ["quoted", "listed"]
def f(args, recipe, self):
    args.set_here = 1
    use(self.args.nested, args.read, recipe.field, other.foreign, getattr(args, name))
"""
    tree = ast.parse(source)
    assert reads(tree, "args") == {"nested", "read"} and reads(tree, "recipe") == {"field"}


def test_no_flag_is_unread():
    """Every flag of train.py that is no field of the recipe is read as args.<flag>."""
    running = sorted((ROOT / "running").glob("*.py"))
    tree = parsed(ROOT / "train.py", ROOT / "recipe.py", *running)
    bench = parsed(ROOT / "lab" / "bench.py", without=("main",))  # which has flags of its own
    known = reads(tree, "args") | reads(bench, "args")
    flags = {a.dest for a in recipes.make_parser()._actions} - {"help"}
    flags -= {f.name for f in fields(Recipe)}
    assert len(flags) > 10 and sorted(flags - known) == []


def test_no_field_of_the_recipe_is_unread():
    """As recipe.<field>, by getattr in make_model, or by a property that is read."""
    running = sorted((ROOT / "running").glob("*.py"))
    tree = parsed(ROOT / "train.py", ROOT / "data.py", ROOT / "objectives.py", *running)
    known = reads(tree, "recipe")
    make_model, = (n for n in tree.body if getattr(n, "name", None) == "make_model")
    given = next(n.value for n in make_model.body
                 if isinstance(n, ast.Assign) and n.targets[0].id == "names")
    known |= {name.value for name in given.elts}
    recipe, = (n for n in parsed(ROOT / "recipe.py").body if getattr(n, "name", "") == "Recipe")
    for method in (n for n in recipe.body if isinstance(n, ast.FunctionDef)):
        if method.name in known:
            known |= reads(method, "self")
    assert sorted({f.name for f in fields(Recipe)} - known) == []


@pytest.mark.parametrize("program", ("infer", "eval"))
def test_no_flag_of_infer_and_eval_is_unread(program):
    tree = parsed(ROOT / f"{program}.py")
    known, module = reads(tree, "args"), PROGRAMS[program][0]
    if program == "infer":  # an example's files are read there
        known |= reads(parsed(ROOT / "scans" / "files.py"), "args")
    if program == "eval":
        settings, = (n for n in tree.body if getattr(n, "name", None) == "Settings")
        names = {f.name for f in fields(evaluation.Settings)}
        used = reads(settings, "self") | reads(tree, "settings")
        used |= reads(parsed(ROOT / "prompts.py"), "settings")
        assert sorted(names - used) == []
        known |= names
    flags = {a.dest for a in module.make_parser()._actions} - {"help"}
    assert len(flags) > 10 and sorted(flags - known) == []


# -------------------------------------------------------------------------------------------------
# Trained as asked

def test_gated_and_plain_models_are_told_apart_by_their_checkpoint(tmp_path):
    for gate in (False, True):
        mvg.save(tmp_path / "m.pt", mvg.build("demo", 32, gate=gate))
        model = mvg.load(tmp_path / "m.pt")
        assert model.config.gate is gate and model.head.expand.out_features == 64 * (16 + gate)
