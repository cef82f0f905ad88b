// How a kernel is launched: its status is that of this launch alone, not of what the caller's program met before.
#ifndef FA_LAUNCH_CUH
#define FA_LAUNCH_CUH

#include <type_traits>

#include "cuda/cuda.h"

constexpr size_t kAnySharedBytes = 99 * 1024; // of a block, on every GPU from sm_80 on

// `what` names the kernel in the sentence of a failure. Nothing is launched where there is no block.
template <typename... Params>
static fa_status fa_launch(const char *what, void (*kernel)(Params...), int64_t blocks, unsigned threads,
                           size_t shared_bytes, cudaStream_t stream, const std::common_type_t<Params> &...params) {
    FA_REQUIRE(blocks <= INT32_MAX, FA_ERROR_UNSUPPORTED, "%s: %lld blocks of threads, a launch takes at most 2^31 - 1",
               what, static_cast<long long>(blocks));
    if (blocks == 0) return FA_OK;
    void *pointers[] = {const_cast<void *>(static_cast<const void *>(&params))...};
    const cudaError_t error =
        cudaLaunchKernel(reinterpret_cast<const void *>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(threads),
                         pointers, shared_bytes, stream);
    FA_REQUIRE(error == cudaSuccess, FA_ERROR_DEVICE, "%s: %s", what, cudaGetErrorString(error));
    return FA_OK;
}

// A kernel that waits by wait_for_prerequisites() for the one launched before it, and may start while that runs, where the
// device knows of that (sm_90). Nothing is launched where there is no block.
template <typename... Params>
static fa_status fa_launch_dependent(const char *what, void (*kernel)(Params...), dim3 blocks, unsigned threads,
                                     size_t shared_bytes, cudaStream_t stream,
                                     const std::common_type_t<Params> &...params) {
    if (blocks.x == 0) return FA_OK;
    int device = 0, major = 0;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes,
    config.stream = stream;
    config.attrs = &attribute, config.numAttrs = major >= 9;
    void *pointers[] = {const_cast<void *>(static_cast<const void *>(&params))...};
    const cudaError_t error = cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(kernel), pointers);
    FA_REQUIRE(error == cudaSuccess, FA_ERROR_DEVICE, "%s: %s", what, cudaGetErrorString(error));
    return FA_OK;
}

#endif
