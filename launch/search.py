"""A search over settings: the space, the cards drawn from it, their trials under Ray Tune, and what came of them."""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cluster import check_card, settle, share, storage
from ray import cloudpickle, tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.sample import Domain
from rich.console import Console

from noprop_dist import UserError, train
from noprop_dist.cards import dump_card, parse_yaml, setting_names, stack, unknown_setting
from noprop_dist.config import Card
from noprop_dist.files import read, write
from noprop_dist.report.console import make_table
from noprop_dist.runs import Progress as RunProgress

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not have this file

NUMBERS = {
    **dict.fromkeys(("uniform", "loguniform", "randint", "lograndint"), 2),
    **dict.fromkeys(("quniform", "qloguniform", "qrandint", "qlograndint"), 3),
}
"""What can be drawn from but choice: ray.tune's names, and how many numbers they take."""
FIXED = ("train.epochs", "train.steps", "train.resume", "run.dir", "run.name", "run.stop_exit_code")
"""How long a trial lasts is for ASHA to say, and where it lies for the search."""
FIGURES = ("test_accuracy", "epoch", "step", "seconds")
"""Of a trial's last evaluation; seconds: of training."""


@dataclass(frozen=True)
class Trial:
    """What was drawn, by setting; the card it makes, as the user would write it, and as it runs here."""

    drawn: Mapping[str, Any]
    card: Card
    settled: Card


def read_space(path: Path) -> dict[str, Domain]:
    """What to draw each setting from. Raises UserError listing every mistake."""
    given = parse_yaml(path, "search space")
    if not isinstance(given, dict) or not given:
        raise UserError(f"{path}: a search space is a mapping such as 'optim.lr: {{loguniform: [1e-4, 1e-2]}}'")
    space, mistakes = {}, []
    for name, domain in given.items():
        try:
            if name not in setting_names():
                raise UserError(unknown_setting(str(name), str(path)))
            if name in FIXED:
                raise UserError(f"{path}: {name}: not to be searched, ASHA and --out decide it; leave it out")
            space[name] = _domain(f"{path}: {name}", domain)
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return space


def _domain(place: str, given: Any) -> Domain:
    kinds = ("choice", *NUMBERS)
    if not isinstance(given, dict) or len(given) != 1:
        raise UserError(f"{place}: not one of {', '.join(kinds)} with its values, but {given!r}; mend it")
    ((kind, values),) = given.items()
    if kind not in kinds:
        nearest = difflib.get_close_matches(str(kind), kinds, n=1)
        raise UserError(
            f"{place}: unknown {kind}; " + (f"did you mean {nearest[0]}?" if nearest else f"use {', '.join(kinds)}")
        )
    if not isinstance(values, list) or not values:
        raise UserError(f"{place}: {kind} takes a list, not {values!r}; mend it")
    if kind == "choice":
        return tune.choice(values)
    try:
        whole = kind.endswith("randint")
        numbers = [int(value) if whole else float(value) for value in values]  # PyYAML reads 1e-3 as text
        if whole and numbers != [float(value) for value in values]:
            raise ValueError("not whole numbers")
        if len(numbers) != NUMBERS[kind] or not numbers[0] < numbers[1] or ("log" in kind and numbers[0] <= 0):
            raise ValueError(f"{NUMBERS[kind]} numbers, the first one below the second" + " and above 0" * ("log" in kind))
        return getattr(tune, kind)(*numbers)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {kind} cannot draw from {values!r} ({error}); mend it") from None


def plan(card: Card, space: Mapping[str, Domain], arguments: argparse.Namespace) -> list[Trial]:
    """Draw the trials, the same ones for the same ``--draw``. Raises UserError where one has a card that would not run."""
    random = np.random.default_rng(arguments.draw)
    trials = []
    for number in range(arguments.trials):
        values = {name: np.asarray(domain.sample(random_state=random)).item() for name, domain in space.items()}
        place = f"{arguments.search}: trial {number} ({_settings(values)})"
        drawn: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            section, setting = name.split(".")
            drawn.setdefault(section, {})[setting] = value
        full = stack({"card": card.model_dump(exclude_unset=True), place: drawn}, place)
        try:
            check_card(full, 1, arguments)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        plain = full.model_dump(mode="json")  # numbers that YAML read as text are numbers now
        values = {f"{section}.{setting}": plain[section][setting] for section in drawn for setting in drawn[section]}
        run = full.run.model_copy(update={"dir": arguments.out / "runs", "name": f"{number:03d}"})
        trials.append(Trial(values, full, settle(full.model_copy(update={"run": run}), arguments)))
    return trials


def search(trials: Sequence[Trial], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the trials, as many at once as the cluster has room for; ASHA ends those that fall behind.

    Returns an entry a trial: number, settings, state, and the figures of its last evaluation, where it had one.
    Raises UserError where ``--out`` holds another search.
    """
    cards = [trial.settled.model_dump(mode="json") for trial in trials]
    _claim(arguments.out, json.dumps(cards))

    def run(config: dict[str, Any]) -> None:
        try:
            summary = train(Card.model_validate(cards[config["trial"]]), listener=_report).summary
        except UserError as error:  # another try would find it too
            tune.report({"test_accuracy": 0.0, "epoch": 0.0, "state": f"failed: {error}"})
        else:
            tune.report(summary["curve"][-1] | {"test_accuracy": summary["test_accuracy"], "state": "finished"})

    scheduler = ASHAScheduler(
        time_attr="epoch",
        max_t=1000 * arguments.grace,
        grace_period=arguments.grace,
        reduction_factor=3,
        stop_last_trials=False,
    )
    tuner = tune.Tuner(
        tune.with_resources(run, {name.lower(): amount for name, amount in share(arguments).items()}),
        param_space={"trial": tune.grid_search(list(range(len(trials))))},
        tune_config=tune.TuneConfig(metric="test_accuracy", mode="max", scheduler=scheduler),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S", time.gmtime()),
            storage_path=storage(arguments, arguments.out),
            failure_config=tune.FailureConfig(max_failures=arguments.max_failures),
            callbacks=[_Progress(trials)],
            verbose=0,
            log_to_file=True,
        ),
    )
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # which Tune takes as the wish to stop
    ends = {result.config["trial"]: _end(result.metrics, result.error) for result in tuner.fit()}
    return [{"trial": number, **trial.drawn, **ends[number]} for number, trial in enumerate(trials)]


def _claim(out: Path, plan: str) -> None:
    """Runs that lie in ``out`` go on, if they are of the same cards."""
    path = out / "plan.json"
    if path.exists() and read(path).decode() != plan:
        raise UserError(f"{out}: holds another search, of other cards; choose another --out or delete that folder")
    write(path, plan.encode())


def _report(progress: RunProgress) -> None:
    if "test_accuracy" in progress.figures:
        tune.report(dict(progress.figures))


def _end(metrics: Mapping[str, Any] | None, error: Exception | None) -> dict[str, Any]:
    """How a trial ended, and what it had reached by then."""
    metrics = metrics or {}
    state = metrics.get("state") or ("stopped early" if metrics.get("done") else "interrupted")
    if error:
        state = f"failed: {str(error).strip().splitlines()[-1]}"
    reached = {name: metrics[name] for name in FIGURES if name in metrics and not state.startswith("failed")}
    return {"state": state, **reached}


class _Progress(tune.Callback):
    """A line a trial that ends."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._trials, self._ended = trials, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended += 1
        number, end = trial.config["trial"], _end({**trial.last_result, "done": True}, None)
        accuracy = f"{end['test_accuracy']:.2%} after {end['epoch']:.4g} epochs, " if "epoch" in end else ""
        settings = _settings(self._trials[number].drawn)
        print(f"{self._ended}/{len(self._trials)}: trial {number} ({settings}): {accuracy}{end['state']}", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        print(f"trial {trial.config['trial']} failed; its files: {trial.path}", flush=True)


def tell(entries: Sequence[Mapping[str, Any]], trials: Sequence[Trial], out: Path) -> None:
    """Write trials.json, trials.csv and the best card, and print the table, best first."""
    ranked = sorted(entries, key=lambda entry: -entry.get("test_accuracy", -1))
    columns = ["trial", *trials[0].drawn, *FIGURES, "state"]
    write(out / "trials.json", json.dumps(ranked, indent=1).encode())
    text = io.StringIO()
    sheet = csv.DictWriter(text, columns, lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(ranked)
    write(out / "trials.csv", text.getvalue().encode())
    table = make_table("trials", *columns)
    for entry in ranked:
        table.add_row(*(_shown(entry.get(name, "-")) for name in columns))
    Console(width=max(80, table.__rich_measure__(Console(width=1000), Console(width=1000).options).maximum)).print(table)
    names = ["trials.json", "trials.csv"]
    if "test_accuracy" in ranked[0]:
        write(out / "best.yaml", dump_card(trials[ranked[0]["trial"]].card).encode())
        names.append("best.yaml")
    for name in names:
        print(out / name)


def _settings(drawn: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in drawn.items())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
