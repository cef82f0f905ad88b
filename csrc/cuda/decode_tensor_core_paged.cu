// Decoding on tensor cores over caches with pages.
#include "cuda/decode_tensor_core_launch.cuh"

extern const TensorCoreDecodeKernels fa_paged_tensor_core_decode = tensor_core_decode_kernels<true>();
