"""lab/pack.py: a store that is small enough to be sent is drawn from like any other."""

import tarfile

import numpy as np

from common import batch_of, context
from lab import pack
from scans.store import Store


def test_a_packed_store_trains_like_the_store_it_is_of(store, tmp_path):
    pack.main([str(store.root), str(tmp_path / "small.tar.xz"), "--side", "48", "--slices", "9"])
    with tarfile.open(tmp_path / "small.tar.xz") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    small = Store(tmp_path / "there")
    assert set(small.datasets) == set(store.datasets)
    for name in store.datasets:
        before = {case.name: case for case in store.split(name, "train")}
        cases = small.split(name, "train")
        assert cases and not small.split(name, "test")
        assert 5 <= sum(case.slices for case in cases) <= 10
        for case in cases:
            index = before[case.name].index
            assert case.patient == index["patient"] and case.foreground == [*range(case.slices)]
            image, label, _ = case.stored(0)
            assert image.dtype == np.uint16 and max(image.shape) <= 48
            assert set(np.unique(label)) - {0} <= set(case.classes[0]) or label.dtype == np.uint16
    batch = batch_of(context(small, 32, objective="ar"), *((0, i) for i in range(6)))
    assert 0.02 < batch.images.mean() < 0.9 and batch.images.max() <= 1


def test_slices_are_shared_out_over_all_cases():
    class Case:
        def __init__(self, count):
            self.foreground = list(range(5, 5 + count))

    kept = pack.share_out([Case(20) for _ in range(10)], 40)
    assert [len(k) for k in kept] == [4] * 10 and len(set(kept[0])) == 4
    assert sum(len(k) for k in pack.share_out([Case(1) for _ in range(100)], 40)) == 40
    assert pack.share_out([Case(3)], 40) == [[5, 6, 7]]
