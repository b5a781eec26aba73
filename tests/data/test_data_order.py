from itertools import pairwise

import pytest
import torch

from noprop_dist.data import test_indices as rows_in_test  # pytest would collect a test_...
from noprop_dist.data import train_indices


def stream(seed, count, **sizes):
    return torch.cat([train_indices(seed, step, **sizes) for step in range(count)])


def test_each_epoch_is_another_permutation():
    rows = stream(3, 30, size=50, batch_size=10).view(6, 50)
    assert (rows.sort(1).values == torch.arange(50)).all()
    assert all((a != b).any() for a, b in pairwise(rows))


def test_batches_are_full_across_epoch_borders():
    batches = [train_indices(0, step, size=10, batch_size=4) for step in range(5)]
    assert [len(batch) for batch in batches] == [4] * 5
    assert torch.cat(batches).view(2, 10).sort(1).values.tolist() == [list(range(10))] * 2


def test_a_batch_may_be_longer_than_several_epochs():
    rows = train_indices(0, 1, size=3, batch_size=12)
    assert rows.dtype == torch.int64
    assert rows.view(4, 3).sort(1).values.tolist() == [[0, 1, 2]] * 4


def test_a_batch_depends_on_seed_and_step_alone():
    sizes = {"size": 100, "batch_size": 7}
    forward = [train_indices(5, step, **sizes).tolist() for step in range(60)]
    torch.manual_seed(99)
    backward = [train_indices(5, step, **sizes).tolist() for step in reversed(range(60))]
    assert forward == backward[::-1]
    assert train_indices(6, 0, **sizes).tolist() != forward[0]


def test_writing_to_a_batch_leaves_later_ones_alone():
    before = train_indices(0, 0, size=8, batch_size=8).clone()
    train_indices(0, 0, size=8, batch_size=8).zero_()
    assert train_indices(0, 0, size=8, batch_size=8).equal(before)


def test_overfit_batches_come_again_and_again():
    sizes = {"size": 20, "batch_size": 5}
    plain = [train_indices(1, step, **sizes).tolist() for step in range(2)]
    again = [train_indices(1, step, **sizes, overfit_batches=2).tolist() for step in range(6)]
    assert again == plain * 3


@pytest.mark.parametrize(("size", "lengths"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3])])
def test_test_batches_cover_the_test_set_once_in_order(size, lengths):
    batches = [rows_in_test(i, size=size, batch_size=4) for i in range(len(lengths))]
    assert [len(batch) for batch in batches] == lengths
    assert torch.cat(batches).tolist() == list(range(size))
    assert batches[0].dtype == torch.int64
