"""One file per program that is measured; each is a process of its own (see ``benchmarks.worker``)."""
