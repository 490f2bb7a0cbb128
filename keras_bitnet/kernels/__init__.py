"""Fast paths of the packed matmul, one ordered table per backend."""

from keras_bitnet.kernels.pages import use_huge_pages
from keras_bitnet.kernels.select import Kernel, Problem, explain, use_kernel

__all__ = ["Kernel", "Problem", "explain", "use_huge_pages", "use_kernel"]
