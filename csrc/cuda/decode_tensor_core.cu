// Decoding on tensor cores: over caches without pages here.
#include "cuda/decode_tensor_core_launch.cuh"

static const TensorCoreDecodeKernels &kernels_for(const fa_kvcache_args *args) {
    static constexpr TensorCoreDecodeKernels kContiguous = tensor_core_decode_kernels<false>();
    return args->page_table ? fa_paged_tensor_core_decode : kContiguous;
}

bool fa_cuda_tensor_core_decode_fits(const fa_kvcache_args *args) { return kernels_for(args).fits(args); }
size_t fa_cuda_tensor_core_decode_bytes(const fa_kvcache_args *args) { return kernels_for(args).bytes(args); }
fa_status fa_cuda_tensor_core_decode(const fa_kvcache_args *args) { return kernels_for(args).launch(args); }
