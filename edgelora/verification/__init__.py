"""The parts of `edgelora.verify`.

observation.py   a certificate's probes, read by this device
comparison.py    what was recorded and what was observed, in numbers
weights.py       what the file adds to each weight, against what was recorded
thresholds.py    what passes
checks.py        from numbers to rows of the report
report.py        the rows
"""
