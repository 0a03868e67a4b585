"""Random histories of the whole queue; simulation/histories.py says what may happen."""

from simulation.histories import check

EXAMPLES, STEPS = 60, 50


def test_every_history_keeps_the_promises(valkey_url: str) -> None:
    check(valkey_url, examples=EXAMPLES, steps=STEPS, repeatable=True)
