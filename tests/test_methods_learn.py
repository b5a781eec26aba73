"""Every method and option learns: a short training on the digits, far above chance."""

import pytest

from noprop_dist import train

CASES = {
    "ct": {"method": {"name": "ct", "loss_weight": "uniform"}},
    "ct-4-blocks": {"method": {"name": "ct"}, "model": {"blocks": 4}},
    "fm": {"method": {"name": "fm"}},
    "fm-4-blocks": {"method": {"name": "fm"}, "model": {"blocks": 4}},
    "learned": {"model": {"blocks": 2, "embedding": "learned"}},
    "prototype": {"model": {"blocks": 2, "embedding": "prototype"}},
    "radial": {"model": {"blocks": 2, "head": "radial"}},
    "mlp-head": {"model": {"blocks": 2, "head": "mlp"}},
    "mlp": {"model": {"blocks": 1, "backbone": "mlp"}},
}


@pytest.mark.parametrize("name", CASES)
def test_it_learns_the_digits(small_card, name):
    settings = {section: dict(values) for section, values in CASES[name].items()}
    if "method" in settings:
        settings["inference"] = {"steps": 20}
        settings["model"] = {"blocks": 1} | settings.get("model", {})
    lean = {"steps": 150, "eval_every": 0, "checkpoint_every": 0}
    summary = train(small_card(**settings, data={"batch_size": 64, "augment": "none"}, train=lean)).summary
    assert summary["accuracy"]["mean"] > 0.9
