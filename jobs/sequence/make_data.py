"""Write scikit-learn's handwritten digits to digits.npz: images (1797, 8, 8) uint8 of 0 to 16, labels (1797,) uint8."""

import numpy as np
from sklearn.datasets import load_digits

digits = load_digits()
# A fixed shuffle: the original order groups the writers, and the last fifth is held out.
order = np.random.RandomState(0).permutation(len(digits.target))
np.savez("digits.npz", images=digits.images[order].astype("uint8"), labels=digits.target[order].astype("uint8"))
