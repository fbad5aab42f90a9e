"""hpcutils: containerised Keras training jobs on Slurm clusters.

Importing the package imports none of TensorFlow, Keras, h5py or MPI: every room loads what it needs when it is called.
"""

__version__ = "0.1.0"
