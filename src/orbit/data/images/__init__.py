"""Labelled images from the files that they are published in, as tensors in memory."""

from orbit.data.images.cifar import load_cifar10
from orbit.data.images.idx import load_fashion_mnist, read_idx
from orbit.data.images.labelled import ImageDataError, LabelledImages

__all__ = ["ImageDataError", "LabelledImages", "load_cifar10", "load_fashion_mnist", "read_idx"]
