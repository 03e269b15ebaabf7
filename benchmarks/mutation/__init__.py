"""One-line breaks of the library, and whether the tests notice them; the command is ``benchmarks.mutants``."""
