"""How long steps waited for data, from when batches were ready."""

import pytest

from hpcutils.train.record import waited_s


def play(step_s: float, ready: list[float]) -> tuple[float, float]:
    """Return when the last step ends, and how long all waited, for steps that begin at 10."""
    now, waited = 10.0, 0.0
    for clock in ready:
        waited += max(0.0, clock - now)
        now = max(now, clock) + step_s
    return now, waited


@pytest.mark.parametrize(
    "ready",
    [[9.0], [10.5], [9.0] * 16, [9.0, 10.1, 10.2, 12.0, 12.1], [10.1 + 0.3 * k for k in range(16)], [8.0, 8.0, 15.0]],
)
@pytest.mark.parametrize("step_s", [0.001, 0.1, 1.0])
def test_what_was_played_is_found(ready, step_s):
    ended, waited = play(step_s, ready)
    assert waited_s(10.0, ended, ready) == pytest.approx(waited, abs=1e-4)
