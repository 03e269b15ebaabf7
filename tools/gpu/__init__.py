"""Prove varl on a GPU machine without a network, in one command of ten minutes: see ``day.sh`` and ``wheels.sh``."""
