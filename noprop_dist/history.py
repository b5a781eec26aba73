"""What a run was like along the way: RUN/history.json, which a resumed run continues. The coordinator alone has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from noprop_dist import files
from noprop_dist.chain import PATHS
from noprop_dist.config import UserError

SHOWN = ("step", "epoch", "seconds", *PATHS)


class History:
    """Figures by step, kept in ``path``.

    ``checkpoint``: from which the run goes on at step ``start``, None at its beginning. What the checkpoint's own run noted up
    to that step is taken over, be it this run or another. Raises UserError where that is damaged.
    """

    def __init__(self, path: Path, start: int, checkpoint: Path | None) -> None:
        self._path = path
        before = checkpoint.parents[1] / path.name if checkpoint else None
        points = files.read_json(before, list) if before and before.exists() else []
        try:
            self._points: dict[int, dict[str, Any]] = {point["step"]: point for point in points if point["step"] <= start}
        except (KeyError, TypeError):
            raise UserError(f"{before}: damaged (no list of steps); delete it or bring a whole one back") from None
        newest = max(self._points.values(), key=lambda point: int(point["step"]), default={})
        self.before = {name: newest.get(name, 0) for name in ("seconds", "steps", "bytes")}
        """Of training, before this start: how long it took, for how many steps, and what it sent."""

    def note(self, step: int, **figures: float) -> None:
        """Add figures of a step to what is known of it."""
        self._points[step] = self._points.get(step, {"step": step}) | figures
        files.write(self._path, json.dumps(list(self._points.values())).encode())

    def at(self, step: int) -> dict[str, Any]:
        """What is known of a step."""
        return dict(self._points.get(step, {}))

    @property
    def curve(self) -> list[dict[str, Any]]:
        """The steps that were evaluated."""
        return [{name: point[name] for name in SHOWN} for point in self._points.values() if PATHS[0] in point]
