"""Inference along the chain, however it is cut and wherever it ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from noprop_dist import Card, NoPropModel, UserError, train
from noprop_dist.chain import Segment, Tally, read_out
from noprop_dist.data import Pixels, describe, open_data
from noprop_dist.nets.block import Block


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> NoPropModel:
    folder = tmp_path_factory.mktemp("chain")
    card = Card.model_validate({"model": {"blocks": 3}, "train": {"steps": 40}, "run": {"dir": str(folder), "name": "r"}})
    model = train(card).model
    assert model is not None
    return model


@pytest.fixture(scope="module")
def images(trained) -> torch.Tensor:
    return open_data(trained.card.data).test.load()[0][:50]


def test_the_mean_path_follows_the_equations_step_by_step(trained, images):
    """z_t = a_t·û + b_t·z_{t-1} from z_0 = 0, with the coefficients written out."""
    x = Pixels(trained.card.data, trained.info).normalise(images)
    z = torch.zeros(len(images), 10)
    alpha_bar = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0], dtype=torch.float64).mul(torch.pi / 2).sin().square()
    alpha_bar = alpha_bar.clamp(trained.card.method.alpha_min, trained.card.method.alpha_max).tolist()
    with torch.no_grad():
        for t in (1, 2, 3):
            block = trained.blocks[t - 1]
            estimate = block.denoise(z, block.encode(x), torch.eye(10))
            alpha = alpha_bar[t - 1] / alpha_bar[t]
            a = alpha_bar[t] ** 0.5 * (1 - alpha) / (1 - alpha_bar[t - 1])
            b = alpha**0.5 * (1 - alpha_bar[t]) / (1 - alpha_bar[t - 1])
            z = a * estimate + b * z
        expected = trained.labels(z).log_softmax(dim=1)
    torch.testing.assert_close(trained(images), expected, atol=1e-4, rtol=1e-4)


def test_cutting_the_chain_into_segments_changes_no_bit(trained, images):
    blocks = dict(enumerate(trained.blocks))
    embedding, pixels = trained.labels.embedding, Pixels(trained.card.data, trained.info)

    def through(*cuts: list[int]) -> torch.Tensor:
        paths = None
        for cut in cuts:
            segment = Segment(trained.card, {index: blocks[index] for index in cut}, embedding, pixels)
            paths = segment.start(len(images), 7) if paths is None else paths
            paths, _ = segment.advance(segment.encode(images), paths, 7)
        return paths

    assert torch.equal(through([0, 1, 2]), through([0], [1], [2]))


def test_an_early_exit_reads_the_last_blocks_estimate(trained, images):
    x = Pixels(trained.card.data, trained.info).normalise(images)
    with torch.no_grad():
        block = trained.blocks[0]
        estimate = block.denoise(torch.zeros(len(images), 10), block.encode(x), torch.eye(10))
        expected = trained.labels(estimate).log_softmax(dim=1)
    torch.testing.assert_close(trained(images, blocks=1), expected, atol=1e-4, rtol=1e-4)


def test_the_stochastic_chain_depends_on_the_batch_number_and_averages_its_samples(trained, images):
    first, again = trained(images, path="stochastic"), trained(images, path="stochastic")
    assert torch.equal(first, again)
    assert not torch.equal(first, trained(images, path="stochastic", batch=1))
    assert not torch.equal(first, trained(images, path="stochastic", samples=4))
    assert torch.allclose(trained(images, path="stochastic", samples=4).exp().sum(dim=1), torch.ones(len(images)))
    assert torch.equal(trained(images), trained(images, batch=1)), "the mean path has no noise"


def test_the_image_is_what_is_classified_not_the_label(trained, images):
    """Black pictures must not be recognised: evaluation never sees the label."""
    assert len(trained.predict(torch.zeros_like(images)).unique()) == 1
    labels = open_data(trained.card.data).test.load()[1][:50]
    assert (trained.predict(images) == labels).float().mean() > 0.8


def test_read_out_averages_probabilities_of_the_stochastic_chains_only(trained):
    paths = torch.randn(5, 2, 10)
    mean, stochastic, average = read_out(trained.card, trained.labels, paths).exp()
    each = [trained.labels(row).softmax(dim=1) for row in paths]
    torch.testing.assert_close(mean, each[0].detach())
    torch.testing.assert_close(stochastic, (sum(each[1:4]) / 3).detach())
    torch.testing.assert_close(average, each[4].detach())


def test_the_nearest_embedding_may_be_read_instead_of_the_head(trained, images):
    """And is, for flow matching, unless the head is asked for."""
    paths = torch.randn(3, 6, 10)
    distances = torch.stack([(paths[row, :, None] - torch.eye(10)).square().sum(dim=-1) for row in range(3)])
    nearest = with_settings(trained.card, inference={"readout": "nearest"})
    torch.testing.assert_close(
        read_out(nearest, trained.labels, paths), (-distances / 2).log_softmax(dim=-1), atol=1e-5, rtol=0
    )
    flow = with_settings(trained.card, method={"name": "fm"}, inference={"readout": "auto"})
    assert read_out(flow, trained.labels, paths).equal(read_out(nearest, trained.labels, paths))
    head = with_settings(flow, inference={"readout": "head"})
    assert read_out(head, trained.labels, paths).equal(read_out(trained.card, trained.labels, paths))


def with_settings(card: Card, **sections: dict[str, Any]) -> Card:
    values = card.model_dump()
    return Card.model_validate(values | {name: values[name] | settings for name, settings in sections.items()})


@pytest.mark.parametrize("name", ["ct", "fm"])
def test_images_are_encoded_once_for_all_steps_with_the_same_result_as_at_every_step(name, images, monkeypatch):
    card = Card.model_validate({"method": {"name": name}, "model": {"blocks": 2}, "inference": {"steps": 12}})
    info = open_data(card.data).info
    model = NoPropModel(card, info)
    calls = []
    encode, denoise = Block.encode, Block.denoise

    def counted(self: Block, x: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return encode(self, x)

    monkeypatch.setattr(Block, "encode", counted)
    once = model(images)
    assert len(calls) == 2, "once a block"

    x = Pixels(card.data, info).normalise(images)

    def encoding_again(self: Block, z: torch.Tensor, features: torch.Tensor, *others: Any) -> torch.Tensor:
        return denoise(self, z, self.encode(x).repeat(len(features) // len(x), 1), *others)

    monkeypatch.setattr(Block, "denoise", encoding_again)
    assert model(images).equal(once)
    assert len(calls) > 12


def test_a_tally_counts_shares():
    tally = Tally()
    scores = torch.zeros(3, 4, 2)
    scores[0, :, 1] = 1  # the mean path says class 1 four times
    tally.chain(scores, torch.tensor([1, 1, 1, 0]))
    tally.estimates({0: torch.tensor([1, 1, 0, 0])}, torch.tensor([1, 1, 1, 0]))
    found = tally.scores(1)
    assert (found.mean, found.stochastic, found.average, found.blocks) == (0.75, 0.25, 0.25, (0.75,))


@pytest.mark.parametrize("wrong", [{"path": "shortest"}, {"blocks": 4}, {"samples": 0}])
def test_a_wrong_option_is_named(trained, images, wrong):
    with pytest.raises(UserError):
        trained(images, **wrong)


def test_weights_of_another_model_are_refused_with_the_files_name(trained, tmp_path):
    trained.save(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"blocks": 3', '"blocks": 2')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"model\.safetensors: weights of another model"):
        NoPropModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: not a model's config"):
        NoPropModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        NoPropModel.from_pretrained(tmp_path / "nowhere")


def untrained(**sections: dict[str, Any]) -> NoPropModel:
    card = Card.model_validate(sections)
    return NoPropModel(card, open_data(card.data).info)


def heard(model: NoPropModel, images: torch.Tensor, block: int, z: torch.Tensor, time: float) -> torch.Tensor:
    """What a block says at z and a time, asked directly."""
    network = model.blocks[block]
    features = network.encode(Pixels(model.card.data, model.info).normalise(images))
    return network.denoise(z, features, model.labels.embedding, torch.full((len(z),), time))


@torch.no_grad()
def test_flow_matching_walks_by_each_blocks_velocity_at_its_own_times(images):
    inference = {"solver": "euler", "steps": 6, "readout": "head"}
    model = untrained(method={"name": "fm"}, model={"blocks": 2}, inference=inference)
    z = torch.zeros(len(images), 10)
    for step in range(6):
        z = z + heard(model, images, step // 3, z, step / 6) / 6
    torch.testing.assert_close(model(images), model.labels(z).log_softmax(dim=1), atol=1e-5, rtol=1e-5)
    assert not z.allclose(6 * heard(model, images, 0, torch.zeros_like(z), 0.0) / 6, atol=1e-3), "the time matters"


@torch.no_grad()
def test_continuous_time_takes_ancestral_steps_at_its_own_times(images):
    model = untrained(method={"name": "ct"}, model={"blocks": 2}, inference={"steps": 4})
    first, last = (math.asin(math.sqrt(model.card.method.model_dump()[name])) for name in ("alpha_min", "alpha_max"))
    alpha_bar = [math.sin(first + (last - first) * step / 4) ** 2 for step in range(5)]
    z = torch.zeros(len(images), 10)
    for step in range(4):
        now, then = alpha_bar[step], alpha_bar[step + 1]
        a = then**0.5 * (1 - now / then) / (1 - now)
        b = (now / then) ** 0.5 * (1 - then) / (1 - now)
        z = a * heard(model, images, step // 2, z, step / 4) + b * z
    torch.testing.assert_close(model(images), model.labels(z).log_softmax(dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["sigmoid", "learned"])
def test_the_probability_flow_keeps_the_noise_while_the_signal_level_rises(images, schedule):
    """dz/dt = d√ᾱ/dt·û + d√(1−ᾱ)/dt·ε̂, ε̂ being the noise in z if û is right; ᾱ is the block's own where it learned one."""
    model = untrained(method={"name": "ct", "schedule": schedule}, inference={"solver": "euler", "steps": 3})
    own = model.blocks[0].gamma
    if own is not None:
        with torch.no_grad():  # not where it started
            own.ends += torch.tensor([1.0, -2.0])
            own.inner += 3
    ends = [math.log(alpha / (1 - alpha)) for alpha in (model.card.method.alpha_min, model.card.method.alpha_max)]

    def alpha_bar(time: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(-own(time) if own is not None else ends[0] + (ends[1] - ends[0]) * time)

    z = torch.zeros(len(images), 10)
    for step in range(3):
        time = torch.tensor(step / 3, requires_grad=True)
        signal, noise = alpha_bar(time).sqrt(), (1 - alpha_bar(time)).sqrt()
        rising, falling = (torch.autograd.grad(level, time, retain_graph=True)[0] for level in (signal, noise))
        with torch.no_grad():
            estimate = heard(model, images, 0, z, step / 3)
            z = z + (rising * estimate + falling * (z - signal * estimate) / noise) / 3
    expected = model.labels(z).log_softmax(dim=1).detach()
    torch.testing.assert_close(model(images).detach(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "blocks", "moments"), [("dt", 4, 4), ("ct", 2, 6), ("fm", 2, 6)])
def test_watching_shows_every_step_on_the_way_to_the_same_result(small_card, name, blocks, moments):
    card = small_card(method={"name": name}, model={"blocks": blocks}, inference={"steps": 6} if name != "dt" else {})
    model = NoPropModel(card, describe(card.data))
    images = open_data(card.data).test.load()[0][:5]
    seen, paths = model.watch(images)
    assert len(seen) == moments
    times = [moment.time for moment in seen]
    assert times == sorted(set(times)) and times[0] == 0 and times[-1] < 1
    assert [moment.block for moment in seen] == sorted(moment.block for moment in seen)
    assert all(moment.z.shape == moment.estimate.shape == (2, 5, 10) for moment in seen)
    assert not seen[0].z[0].any(), "the mean path starts at 0"
    torch.testing.assert_close(model.beliefs(paths)[0], model(images).exp())


def test_a_class_that_is_out_of_the_question_has_a_finite_log_probability(trained):
    found = read_out(trained.card, trained.labels, 1e3 * torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(0)))
    assert found.isfinite().all() and found.min() < -200, "a float32's softmax is 0 there"
    assert torch.allclose(found.exp().sum(dim=-1), torch.ones(3, 5))
