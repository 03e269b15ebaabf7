"""Readers for the worker's tests; a module of its own, so that the worker's processes import little."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

from patience import PATIENCE
from varl.rewards.engine import Line


class Moody:
    """Its mood is the picture's first pixel: 1 dies, 2 hangs, 3 raises, 4 is killed, else it reads it."""

    def read_picture(self, picture):
        mood = int(picture[0, 0, 0])
        if mood == 1:
            os._exit(7)
        if mood == 2:
            time.sleep(2 * PATIENCE)
        if mood == 3:
            raise ValueError("bad mood")
        if mood == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return [Line(str(mood), 1.0, np.zeros((4, 2), np.float32))]


class Unstartable:
    def __init__(self):
        raise RuntimeError("no models here")


class Mortal:
    """Dies over every n-th picture; finds nothing in the others."""

    def __init__(self, n):
        self.left = n

    def read_picture(self, picture):
        self.left -= 1
        if self.left == 0:
            os._exit(7)
        return []
