"""Search settings on a Ray cluster: trials drawn at random, each on one rank; ASHA ends early those that fall behind.

    python launch/ray_tune.py [CARD.yaml] --search SPACE.yaml --trials 20 [--out DIR] [--address auto] [--section.name value]...

SPACE.yaml names settings and what to draw them from, as ray.tune does:

    optim.lr: {loguniform: [1e-4, 1e-2]}
    method.label_noise: {uniform: [0, 0.3]}
    data.batch_size: {choice: [64, 128, 256]}
    model.embedding_dim: {randint: [10, 41]}        # 10 to 40

also quniform, qloguniform, lograndint, qrandint and qlograndint. Every trial's card is checked before the first one starts.
Trials are compared by test_accuracy at their last evaluation, so by the test set. For figures to be published, search on a
split of the training set (--data.name npz or imagefolder), and test the best card once.
DIR/best.yaml is that card, for python -m noprop_dist.train; DIR/trials.json and trials.csv tell of all. Started again after an
end by force or Ctrl-C, the same command goes on.
"""

from __future__ import annotations

from pathlib import Path

from cluster import add_arguments, joined, prepare, refuse_fleeting, require, share

from noprop_dist import command
from noprop_dist.cards import read_card
from noprop_dist.config import UserError


def main(argv: list[str]) -> None:
    """Check everything, search, and write and print what came of it."""
    parser = command.Parser("launch/ray_tune.py", __doc__)
    add_arguments(parser, "trial")
    parser.add_argument("--search", type=Path, required=True, metavar="SPACE.yaml", help="which settings, and from where")
    parser.add_argument("--trials", type=int, default=20, help="how many cards to draw (default: 20)")
    parser.add_argument("--draw", type=int, default=0, metavar="SEED", help="seed of the drawing (default: 0)")
    parser.add_argument("--grace", type=float, default=1.0, metavar="EPOCHS", help="ASHA ends no trial before (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("search"), help="folder of best.yaml, trials.* and runs/")
    if any(word.startswith(("--run.dir", "--run.name", "--train.resume")) for word in argv):
        raise UserError("command line: a search names and resumes its runs itself; use --out DIR")
    card, arguments = read_card(parser, argv)
    if arguments.trials < 1 or arguments.draw < 0 or arguments.grace <= 0:
        raise UserError("command line: --trials and --grace are more than 0, --draw at least 0; mend them")
    refuse_fleeting(arguments.out, "--out")
    prepare(arguments.address)
    from search import plan, read_space, search, tell  # here, for they import Ray

    trials = plan(card, read_space(arguments.search), arguments)
    print("trials are compared by their accuracy on the test set (see --help)", flush=True)
    with joined(arguments.address, logs=False):
        require(1, "trial", share(arguments), wait=arguments.wait)
        entries = search(trials, arguments)
    tell(entries, trials, arguments.out)
    if any(entry["state"] != "finished" and entry["state"] != "stopped early" for entry in entries):
        raise SystemExit(1)


if __name__ == "__main__":
    command.run(main)
