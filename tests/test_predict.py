"""Pictures as people have them, named from the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import BAD, ODD, digit, on_paper
from PIL import Image

from noprop_dist import Card, train
from noprop_dist.command import answer
from noprop_dist.predict import main

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest shows what users do not see


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """``call(*argv)``: exit code, lines of stdout, lines of stderr, in the test's own folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        capsys.readouterr()
        try:
            code = answer(main, [str(word) for word in argv])
        except SystemExit as leaving:
            code = leaving.code
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return run


def named(lines):
    """The digits that lines of output name."""
    return [int(re.search(r"  (\d) +\d+\.\d\d%", line)[1]) for line in lines]


def paint(*names, folder="."):
    for name in names:
        (ODD[name][1] if name in ODD else BAD[name][1])(Path(folder) / name)


def test_odd_pictures_are_named_rightly_and_bad_ones_told_in_a_line_each(call, tmp_path):
    (tmp_path / "mine" / "a folder.png").mkdir(parents=True)
    loops = {"a loop.png", "to nowhere.png"}  # files of a folder, and these are none
    for number, name in enumerate([*ODD, *BAD]):
        paint(name, folder=tmp_path / "mine" / ("a folder.png" if number % 3 and name not in loops else ""))
    (tmp_path / "mine" / "notes.txt").write_text("not a picture, and not called one")
    paint("empty.png", folder=tmp_path)
    (tmp_path / "empty.png").rename(tmp_path / "mine" / "._hidden.png")
    code, out, err = call("digits", "mine", "--json", "gone.png", "mine/a loop.png")
    assert (code, err) == (1, [])
    answers = {Path(each["file"]).name: each for each in json.loads("\n".join(out))}
    assert set(answers) == {*ODD, *BAD, "gone.png"} - loops | {"a loop.png"}
    digits = {name: str(right) for name, (right, _) in ODD.items() if right is not None}
    wrong = {name: answers[name] for name, right in digits.items() if answers[name].get("class") != right}
    assert not wrong
    assert all("class" in answers[name] for name in ODD)
    for name in BAD.keys() & answers.keys():
        assert BAD[name][0] in answers[name]["error"] and "\n" not in answers[name]["error"], answers[name]
        assert answers[name]["error"].startswith(answers[name]["file"])
    assert "No such file" in answers["gone.png"]["error"]


def test_lines_and_exit_codes(call):
    paint("UPPER.PNG", "lying.jpg", "empty.png", "text.png", "mit Umlaut ä 数 \n zwei Zeilen.png")
    code, out, err = call("digits", "UPPER.PNG", "lying.jpg")
    assert (code, named(out), err) == (0, [0, 4], [])
    assert len(re.findall(r"\d\.\d\d%", out[0])) == 3
    code, out, err = call("digits", "empty.png", "lying.jpg", "text.png", "--top", "2")
    assert (code, named(out)) == (1, [4])
    assert len(re.findall(r"\d\.\d\d%", out[0])) == 2
    assert err == [
        "error: empty.png: not a readable picture (empty file); replace or remove it",
        "error: text.png: not a readable picture (in no known format); replace or remove it",
    ]
    code, out, err = call("digits", "empty.png", "gone.png")
    assert (code, out, len(err)) == (2, [], 2)
    code, out, err = call("digits", "mit Umlaut ä 数 \n zwei Zeilen.png")
    assert (code, len(out)) == (0, 1) and out[0].startswith(r"mit Umlaut ä 数 \n zwei")


def test_json_is_one_list_whatever_happens(call, tmp_path):
    paint("UPPER.PNG", "empty.png")
    (tmp_path / "folder").mkdir()
    code, out, err = call("digits", "--json", "--top", "99", "UPPER.PNG", "empty.png", "folder", "x" * 5000)
    answers = json.loads("\n".join(out))
    assert (code, err, len(answers)) == (1, [], 4)
    assert list(answers[0]) == ["file", "class", "confidence", "top"] and len(answers[0]["top"]) == 10
    assert sum(each["confidence"] for each in answers[0]["top"]) == pytest.approx(1, abs=1e-4)
    assert answers[0]["top"] == sorted(answers[0]["top"], key=lambda each: -each["confidence"])
    assert answers[2]["error"] == "folder: no picture in this folder; name one that holds some, or a file"
    assert "File name too long" in answers[3]["error"]
    code, out, _ = call("digits", "--json", "empty.png")
    assert code == 2 and len(json.loads("\n".join(out))) == 1


@pytest.mark.parametrize("name", ["out.png", "new/out.svg"])
def test_what_the_blocks_believed_is_drawn(call, name):
    paint("UPPER.PNG", "empty.png", "lying.jpg")
    code, _, err = call("digits", "UPPER.PNG", "empty.png", "lying.jpg", "--explain", name)
    assert code == 1 and err[-1] == name
    if name.endswith("png"):
        with Image.open(name) as picture:
            assert min(picture.size) > 300
    else:
        assert b"<svg" in Path(name).read_bytes()[:1000]


def test_a_drawing_as_it_is(call):
    digit(4).point(lambda grey: 255 - grey).save("turned.png")
    assert named(call("digits", "turned.png")[1]) == [4]
    assert named(call("digits", "turned.png", "--as-is")[1]) != [4]


def test_many_pictures_go_through_in_batches(call, tmp_path):
    train(Card(train={"steps": 1}, inference={"batch_size": 4}, model={"blocks": 1}, run={"dir": tmp_path, "name": "run"}))
    for number in range(10):
        on_paper(digit(number)).save(f"{number}.png")
    code, out, _ = call("run", *(f"{number}.png" for number in range(10)), "--json")
    assert code == 0 and [each["file"] for each in json.loads("\n".join(out))] == [f"{number}.png" for number in range(10)]


def test_a_model_of_named_coloured_classes_sees_what_it_was_trained_on(call, tmp_path):
    """The red ones and the blue ones, in folders: modes that become RGB, one lying on its side."""
    for half in ("train", "test"):
        for label, colour in (("red ones", (220, 30, 30)), ("blue & co", (30, 30, 220))):
            (tmp_path / half / label).mkdir(parents=True)
            for number in range(6):
                page = Image.new("RGB", (40 + number, 30), "white")
                page.paste(tuple(max(0, level - 5 * number) for level in colour), (0, 0, 40 + number, 20))
                kind = ["RGB", "RGBA", "P"][number % 3]
                exif = Image.Exif()
                exif[0x0112] = 6 if number == 5 else 1
                page.convert(kind).save(tmp_path / half / label / f"{number}.png", exif=exif)
    card = Card(
        data={"name": "imagefolder", "root": tmp_path, "image_size": 16, "workers": 0, "batch_size": 12, "augment": "none"},
        model={"blocks": 2, "backbone": "mlp"},
        train={"steps": 60},
        optim={"lr": 0.01},
        run={"dir": tmp_path / "runs", "name": "run"},
    )
    train(card)
    code, out, _ = call("runs/run", "test", "--json")
    answers = json.loads("\n".join(out))
    assert code == 0 and len(answers) == 12
    assert all(each["class"] == Path(each["file"]).parent.name for each in answers)


def test_the_real_command_leaves_with_its_reader(tmp_path):
    on_paper(digit(0)).save(tmp_path / "0.png")
    script = f"{sys.executable} -m noprop_dist.predict digits 0.png | true"
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=240, env=os.environ)
    assert (result.stdout, result.stderr) == ("", "")
