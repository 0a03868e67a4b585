"""The benchmark: the relay beside its floors and its peers, on pinned cores.

`python -m bench` runs everything; docs/performance.md tells what is measured and how
to read it. Nothing of the relay is switched off in the measured path: stack.py says
which settings differ from the defaults, and tests/test_bench.py holds it to that.
"""
