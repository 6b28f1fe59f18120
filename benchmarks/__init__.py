"""How fast iwae-cli is beside other programs that do the same work: ``python -m benchmarks``, or ``make bench``."""
