"""The Dockerfile, built for real, where asked for: no registry of images is needed, debootstrap makes the base."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import ARGUMENTS, CARD, ROOT, block_files, undisturbed

pytestmark = pytest.mark.skipif(
    "NOPROP_IMAGE" not in os.environ, reason="takes minutes and 20 GB: NOPROP_IMAGE='' or build arguments (make image-test)"
)


@pytest.fixture
def buildah(tmp_path: Path) -> Iterator[list[str]]:
    if os.geteuid() != 0 or not all(map(shutil.which, ("buildah", "debootstrap"))):
        pytest.skip("needs root, buildah and debootstrap (Debian's packages of these names)")
    command = ["buildah", "--root", str(tmp_path / "storage"), "--runroot", str(tmp_path / "state")]
    yield command
    subprocess.run([*command, "rmi", "--all", "--force"])


def test_the_image_builds_and_trains_without_root_to_the_same_end(buildah, tmp_path):
    def call(*arguments: object) -> str:
        command = [*buildah, *map(str, arguments)]
        result = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"BUILDAH_ISOLATION": "chroot"}
        )
        assert result.returncode == 0, command
        return result.stdout.strip()

    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", tmp_path / "debian"], check=True, stdout=subprocess.DEVNULL)
    scratch = call("from", "scratch")
    call("copy", "--quiet", scratch, tmp_path / "debian", "/")
    call("commit", "--quiet", scratch, "localhost/debian")
    arguments = os.environ["NOPROP_IMAGE"].split()
    call("build", "--network=host", "--layers=false", "--build-arg=BASE=localhost/debian", *arguments, "--tag=noprop-dist", ".")
    made = call("from", "localhost/noprop-dist")
    run = [*buildah, "run", "--env=RANKS=2", "--env=OMP_NUM_THREADS=1", made, "--"]
    card = str(Path(CARD).relative_to(ROOT))
    subprocess.run([*run, "/work/launch/torchrun.sh", card, *ARGUMENTS], check=True)
    assert call("run", made, "--", "id", "--user") == "1000"
    assert block_files(Path(call("mount", made)) / "work/runs/dt") == undisturbed()
