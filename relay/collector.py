"""When Python's garbage collector looks, and at what. Pure, but for that."""

import gc

# Of what was made since its last look; Python's own are 700, 10 and 10. Beacons leave
# next to nothing that only it can free, and imports nothing at all.
THRESHOLDS = 50_000, 20, 100


def look_rarely() -> None:
    """For the start: its looks take a tenth of the time that imports take."""
    gc.set_threshold(*THRESHOLDS)


def pass_over_what_stays() -> None:
    """For a server that is ready.

    A look at everything stops a process for tens of milliseconds, and each beacon
    with it.
    """
    gc.collect()
    gc.freeze()
    look_rarely()
