"""The times of frames, of which files may state two."""

import math


class BestEffort:
    """FFmpeg's best-effort times: presentation times, or decoding times where those go back less often."""

    def __init__(self) -> None:
        self._faults = [0, 0]  # steps back in presentation and decoding times
        self._plain = True
        self.flush()

    @property
    def plain(self) -> bool:
        """Whether every time so far was a presentation time, later than the one before."""
        return self._plain and not self._faults[0]

    def flush(self) -> None:
        """Forget the last times; call it after a seek."""
        self._last: list[float] = [-math.inf, -math.inf]

    def of(self, pts: int | None, dts: int | None) -> int | None:
        """The time of the decoder's next frame, in its own ticks."""
        for i, (stamp, other) in enumerate(((pts, dts), (dts, pts))):
            if stamp is not None:
                self._faults[i] += stamp <= self._last[i]
                self._last[i] = stamp
            elif other is not None:
                self._last[i] = other
        if pts is not None and (dts is None or self._faults[0] <= self._faults[1]):
            return pts
        self._plain = False
        return dts
