"""``pytest -m gpu``: varl on a GPU against the CPU's numbers; with ``--gpu-device cpu``, a rehearsal without a GPU."""
