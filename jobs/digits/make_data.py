"""Write scikit-learn's handwritten digits to digits.h5: images (1797, 8, 8, 1) uint8 of 0 to 16, labels (1797,) uint8.

The same bytes on every machine: no time stamps, oldest file format, contiguous data.
"""

import h5py
import numpy as np
from sklearn.datasets import load_digits

digits = load_digits()
# A fixed shuffle: the original order groups the writers, and the last fifth is held out.
order = np.random.RandomState(0).permutation(len(digits.target))
with h5py.File("digits.h5", "w", libver="earliest", track_order=False) as file:
    file.create_dataset("images", data=digits.images[order, :, :, None].astype("uint8"), track_times=False)
    file.create_dataset("labels", data=digits.target[order].astype("uint8"), track_times=False)
