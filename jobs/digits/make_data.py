"""Write scikit-learn's handwritten digits to digits.h5: images (1797, 8, 8, 1) uint8 of 0 to 16, labels (1797,) uint8.

The same bytes on every machine: no time stamps, oldest file format, contiguous data.
"""

import os
from pathlib import Path

import h5py
import numpy as np
from sklearn.datasets import load_digits

digits = load_digits()
# A fixed shuffle: the original order groups the writers, and the last fifth is held out.
order = np.random.RandomState(0).permutation(len(digits.target))
# Under a name of its own until it is whole: a script that was interrupted leaves no half file that looks like data.
unfinished = Path(f".digits.h5.part-{os.getpid()}")
try:
    with h5py.File(unfinished, "w", libver="earliest", track_order=False) as file:
        file.create_dataset("images", data=digits.images[order, :, :, None].astype("uint8"), track_times=False)
        file.create_dataset("labels", data=digits.target[order].astype("uint8"), track_times=False)
    unfinished.replace("digits.h5")
finally:
    unfinished.unlink(missing_ok=True)
