"""A run in memory whose server can be away, slow or picky."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from mlflow.exceptions import MlflowException

from ml2o_dist.tracking.records import End, Point, Status, Words


class FakeRun:
    """Keeps what it got, in the order in which it got it.

    Attributes:
        away: every call raises, as without a server.
        gate: every call waits until it is set.
        bad_key: a metric that is refused for good.
        lost_answers: so many calls are carried out and raise nevertheless.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.words: list[Words] = []
        self.calls: list[int] = []
        self.ended: Status | None = None
        self.started = 0
        self.away = False
        self.bad_key = ""
        self.lost_answers = 0
        self.gate = threading.Event()
        self.gate.set()

    @property
    def run_id(self) -> str | None:
        return "run" if self.started else None

    def _answer(self) -> None:
        self.gate.wait()
        if self.away:
            raise ConnectionError("nobody there")

    def start(self) -> bool:
        self._answer()
        self.started += 1
        return True

    def send_points(self, points: Sequence[Point]) -> None:
        self._answer()
        self.calls.append(len(points))
        if any(point.key == self.bad_key for point in points):
            raise MlflowException("bad key", 1000)  # INVALID_PARAMETER_VALUE
        self.points += points
        if self.lost_answers:
            self.lost_answers -= 1
            raise ConnectionResetError("the answer was lost")

    def send(self, words: Words) -> None:
        self._answer()
        if isinstance(words, End):
            self.ended = words.status
        else:
            self.words.append(words)
