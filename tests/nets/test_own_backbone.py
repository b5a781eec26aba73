"""A user's own image path, named in the card as package.module:Class."""

import itertools
import re
import sys

import pytest
import torch
import yaml

from noprop_dist import NoPropModel, train
from noprop_dist.cards import dump_card
from noprop_dist.config import Card, ModelCard, UserError
from noprop_dist.nets.backbones import image_path, resolve_backbone
from noprop_dist.nets.cost import block_cost

SHAPE = (1, 8, 8)
GOOD = """
import torch
from torch import nn

SCALE = torch.tensor(2.0)  # a tensor that is no parameter


class Net(nn.Module):
    width = 32

    def __init__(self, shape, dropout):
        super().__init__()
        self.linear = nn.Linear(shape[0] * shape[1] * shape[2], 6)
        nn.init.trunc_normal_(self.linear.weight)  # looks at what it drew

    def forward(self, x):
        return self.linear(x.flatten(1) * SCALE)
"""
numbers = itertools.count()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """``own(source)``: write it as a module into the current directory; returns the module's name, never used before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])

    def write(source):
        name = f"own_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def test_it_is_found_in_the_current_directory(own):
    name = f"{own(GOOD)}:Net"
    before = torch.get_rng_state()
    assert resolve_backbone(name, SHAPE) == name
    assert torch.get_rng_state().equal(before), "trying it out moves no random numbers"
    backbone, features, width = image_path(ModelCard(backbone=name, dropout=0.2), SHAPE)
    assert (type(backbone).__name__, backbone.training, features, width) == ("Net", True, 6, 32)


def test_it_trains_is_saved_by_name_and_read_back(own, small_card):
    name = f"{own(GOOD)}:Net"
    card = small_card(model={"backbone": name})
    assert block_cost(card, SHAPE, 10).flops > 0
    result = train(card)
    assert result.model.card.model.backbone == name
    assert yaml.safe_load(dump_card(result.model.card))["model"]["backbone"] == name
    again = NoPropModel.from_pretrained(card.run.dir / "run" / "model")
    images = torch.randint(256, (5, *SHAPE), dtype=torch.uint8)
    assert again(images).equal(result.model(images))


CLASS = "from torch import nn\n\nclass Net(nn.Module):\n    "
MADE = f"{CLASS}def __init__(self, shape, dropout):\n        super().__init__()\n    "
BAD = [  # source, what is named, what the complaint says
    (None, "no_such_module:Net", r"importing no_such_module raised ModuleNotFoundError: .*; mend it, or name a module"),
    ("import nothing_of_this_name", "{}:Net", r"raised ModuleNotFoundError: .*nothing_of_this_name' \({}\.py:1\)"),
    ("def broken(:", "{}:Net", r"raised SyntaxError: .*{}\.py, line 1"),
    ("from torch import nn", "{}:Net", r"has no nn\.Module class 'Net'; define one"),
    (f"{CLASS}pass", "{}:Nett", r"has no nn\.Module class 'Nett'; use Net$"),
    ("def Net(shape, dropout): ...", "{}:Net", r"has no nn\.Module class 'Net'; define one"),
    ("class Net: ...", "{}:Net", r"has no nn\.Module class 'Net'; define one"),
    (f"{CLASS}def __init__(self): pass", "{}:Net", r"calling it with .* raised TypeError: .*; a backbone is made from"),
    (f"{CLASS}def __init__(self, *args): 1 / 0", "{}:Net", r"raised ZeroDivisionError: division by zero \({}\.py:4\)"),
    (f"{MADE}def forward(self, x): return x[9]", "{}:Net", r"its forward of \(2, 1, 8, 8\) raised IndexError: .*{}\.py:6"),
    (f"{MADE}def forward(self, x): return nn.functional.linear(x, x)", "{}:Net", r"raised RuntimeError: .*\({}\.py:6\)"),
    (f"{MADE}def forward(self, x): return x", "{}:Net", r"gives torch\.float32 \(2, 1, 8, 8\), not features"),
    (f"{MADE}def forward(self, x): return x.flatten(1).long()", "{}:Net", r"gives torch\.int64 \(2, 64\), not"),
    (f"{MADE}def forward(self, x): return x.flatten(2).mean(2).T", "{}:Net", r"gives torch\.float32 \(1, 2\), not"),
    (f"{MADE}def forward(self, x): return [x]", "{}:Net", r"gives list, not features"),
    (f"{CLASS}smallest = 20", "{}:Net", r"needs images of at least 20 pixels a side, these have 8; use small-cnn"),
]


@pytest.mark.parametrize(("source", "name", "complaint"), BAD)
def test_what_is_wrong_with_it_is_told_in_one_line(own, source, name, complaint):
    module = own(source or "")
    with pytest.raises(UserError) as caught:
        resolve_backbone(name.format(module), SHAPE)
    assert re.search(rf"^model\.backbone: .*{complaint.replace('{}', module)}", str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_is_refused_before_ranks_meet_and_before_anything_is_written(own, small_card, monkeypatch):
    monkeypatch.setattr("noprop_dist.launcher.World.connect", lambda self: pytest.fail("ranks met"))
    card = small_card(model={"backbone": f"{own('')}:Net"})
    with pytest.raises(UserError, match=r"has no nn\.Module class 'Net'"):
        train(card)
    assert not card.run.dir.exists()


def test_a_card_may_name_any_class():
    assert Card(model={"backbone": "a.b:C"}).model.backbone == "a.b:C"


VIEW = f"""{MADE}    self.conv = nn.Conv2d(shape[0], 4, 3)

    def forward(self, x):
        return self.conv(x).view(len(x), -1)
"""


def test_what_fails_only_as_training_calls_it_is_refused_before_ranks_meet(own, small_card, monkeypatch):
    """``view`` on images whose channels are last in memory."""
    name = f"{own(VIEW)}:Net"
    assert resolve_backbone(name, SHAPE) == name
    assert train(small_card(model={"backbone": name}, train={"channels_last": False})).summary["steps"] == 6
    monkeypatch.setattr("noprop_dist.launcher.World.connect", lambda self: pytest.fail("ranks met"))
    card = small_card(model={"backbone": name}, run={"name": "refused"})
    with pytest.raises(
        UserError, match=rf"^model\.backbone: {name}: a training step raised RuntimeError: view .*\(own_\d+\.py:9\); mend"
    ):
        train(card)
    assert not (card.run.dir / "refused").exists()
