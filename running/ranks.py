"""The processes of a training: ranks, device, data, number format, compilation, interruptions."""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lab.synthetic import open_pool
from running.checkpoints import first_line, pick_device
from scans.datasets import SYNTHETIC
from scans.store import Store, default_store, open_store
from scans.volumes import DataError

PATIENCE = timedelta(hours=12)  # the others wait while the first rank prepares the store


class Ranks:
    """This process among those of torchrun. Alone it is rank 0 of 1."""

    def __init__(self, device_name):
        self.distributed = "RANK" in os.environ
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device, self.reason = pick_device(device_name, local)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.distributed:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)

    def say(self, *words):
        if self.main:
            print(*words, flush=True)

    def wrap(self, model):
        if not self.distributed:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)


def find_data(args, recipe, ranks):
    """The prepared store, or None for the procedural tasks alone.

    The first rank prepares it and the others wait to hear what it found. A rank never raises
    alone: where something is wrong all end, and the first one says why.
    """
    names = [n for n in recipe.datasets if n != SYNTHETIC]
    if recipe.datasets and not names:
        return None
    store, found, problem = None, None, None
    if ranks.main:
        try:
            store = open_store(args.data_root, args.store, names, recipe.brats_pairs, recipe.strict)
            found = list(store.datasets)
        except (ValueError, OSError) as error:
            problem = str(error)
    if ranks.distributed:
        said = [found, problem]
        on = ranks.device if ranks.device.type == "cuda" else None
        dist.broadcast_object_list(said, device=on)
        found, problem = said
    if problem:
        raise DataError(problem) if ranks.main else SystemExit(2)
    return store or Store(args.store or default_store(args.data_root), found)


def find_pool(args, recipe, ranks, image_size):
    """The pool of procedural tasks, kept beside the store, or None. The first rank draws it."""
    if not recipe.synthetic:
        return None
    folder = args.store or (default_store(args.data_root) if args.data_root else "store")
    pool = open_pool(folder, recipe.pool, image_size) if ranks.main else None
    if ranks.distributed:
        dist.barrier()
    return pool or open_pool(folder, recipe.pool, image_size)


def use_bf16(recipe, ranks):
    """bfloat16 autocast? Where a CPU has no such arithmetic it would take many times as long."""
    cpu = ranks.device.type == "cpu"
    asked = ranks.device.type == "cuda" if recipe.bf16 is None else recipe.bf16
    if asked and cpu and torch.backends.mkldnn.is_available() and \
            not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        ranks.say("bf16: this CPU has no bfloat16 arithmetic; float32 it is")
        return False
    return asked


def compile_blocks(model):
    """Let torch compile every block by itself, which takes seconds; a whole model takes minutes."""
    torch._dynamo.config.recompile_limit = 64   # all blocks share a graph for every plan
    torch._dynamo.config.optimize_ddp = False   # a block is not split among DDP's buckets
    for block in model.blocks:
        block.compile(dynamic=False)


def compile_if_it_works(model, asked, ranks, bf16):
    """Compile the blocks of a ViT if `asked`, None: with CUDA; and say so.

    One block is tried before, forward and backward. Where that fails all stay as they are.
    """
    asked = ranks.device.type == "cuda" if asked is None else asked
    if not asked or not hasattr(model, "blocks"):
        return
    side, width = model.config.image_size, model.config.width
    x = torch.zeros(1, 1, model.side ** 2, width, device=ranks.device, requires_grad=True)
    try:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
            turn = model.grid(torch.zeros(1, side, side, device=ranks.device)).turn
            block = torch.compile(model.blocks[0], dynamic=False)
            answer, _ = block(x, [((0,), (0,))], turn)
        torch.autograd.grad(answer.sum(), x)
    except Exception as error:  # of a compiler that is not there, or of any of its parts
        ranks.say(f"blocks are not compiled: {first_line(error)}")
        return
    compile_blocks(model)
    ranks.say("blocks are compiled: the first steps take seconds longer (--no-compile: not)")


class Interrupts:
    """SIGTERM and Ctrl-C, noted here and read at logging steps, by all ranks together."""

    def __enter__(self):
        self.noted = []
        numbers = (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def note(self, number, frame):
        if self.noted and number == signal.SIGINT:  # pressed again
            raise KeyboardInterrupt
        self.noted.append(number)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
