"""What a run was like along the way: RUN/history.json, which a resumed run continues. The coordinator alone has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from noprop_dist import files


class History:
    """Figures by step, kept in ``path``.

    ``checkpoint``: from which the run goes on at step ``start``, None at its beginning. What the checkpoint's own run noted up
    to that step is taken over, be it this run or another.
    """

    def __init__(self, path: Path, start: int, checkpoint: Path | None) -> None:
        self._path = path
        before = checkpoint.parents[1] / path.name if checkpoint else None
        points = json.loads(files.read(before)) if before and before.exists() else []
        self._points: dict[int, dict[str, Any]] = {point["step"]: point for point in points if point["step"] <= start}
        self.seconds: float = max((point["seconds"] for point in self._points.values()), default=0.0)
        """Of training, before this start."""

    def note(self, step: int, **figures: float) -> None:
        """Add figures of a step to what is known of it."""
        self._points[step] = self._points.get(step, {"step": step}) | figures
        files.write(self._path, json.dumps(list(self._points.values())).encode())

    @property
    def curve(self) -> list[dict[str, Any]]:
        """The steps that were evaluated."""
        return [point for point in self._points.values() if "mean" in point]
