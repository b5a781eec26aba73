"""Data sets, the order in which training sees them, and what happens to pixels before a network sees them."""

from noprop_dist.data.augment import Pixels, resolve_augment
from noprop_dist.data.order import test_indices, train_indices
from noprop_dist.data.prototypes import check_classes, medoids
from noprop_dist.data.sets import DataInfo, DataSet, Split, describe, open_data

__all__ = [
    "DataInfo",
    "DataSet",
    "Pixels",
    "Split",
    "check_classes",
    "describe",
    "medoids",
    "open_data",
    "resolve_augment",
    "test_indices",
    "train_indices",
]
