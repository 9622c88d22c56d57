"""How many lines an event may write: some at once, then one a second, for each peer. Knows no files.

A peer that misbehaves in a loop must not fill the disk, nor push out of the log what came before.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from expertd.log_lines import fields_of

BURST = 10
EVERY_S = 1.0
_KEYS_MAX = 1024


@dataclass(slots=True)
class _Allowance:
    """What is left to one event of one peer."""

    left: float
    at: float
    n_suppressed: int = 0


class LineLimit(logging.Filter):
    """Lets a record pass, or counts it; the next one of its kind that passes says how many did not. Any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._allowances: OrderedDict[tuple[str, object], _Allowance] = OrderedDict()
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is to be written."""
        key = (str(record.msg), fields_of(record).get("pid"))
        with self._lock:
            allowance = self._allowance(key, self._clock())
            if allowance.left < 1:
                allowance.n_suppressed += 1
                return False
            allowance.left -= 1
            record.n_suppressed, allowance.n_suppressed = allowance.n_suppressed, 0
            return True

    def _allowance(self, key: tuple[str, object], now: float) -> _Allowance:
        allowance = self._allowances.setdefault(key, _Allowance(BURST, now))
        self._allowances.move_to_end(key)
        if len(self._allowances) > _KEYS_MAX:
            self._allowances.popitem(last=False)
        allowance.left = min(BURST, allowance.left + (now - allowance.at) / EVERY_S)
        allowance.at = now
        return allowance
