// What the CUDA rooms know of each other: the kernels behind the table, and how a launch is checked.
#ifndef FA_CUDA_H
#define FA_CUDA_H

#include <cuda_runtime.h>

#include "error.h"
#include "flash_attention.h"
#include "kernel_table.h"
#include "sequence.h"
#include "sizes.h"

#define FA_CUDA_FORWARD(NAME)                                                                                          \
    size_t fa_cuda_##NAME##_forward_bytes(const fa_forward_args *args);                                                \
    fa_status fa_cuda_##NAME##_forward(const fa_forward_args *args)
#define FA_CUDA_BACKWARD(NAME)                                                                                         \
    size_t fa_cuda_##NAME##_backward_bytes(const fa_backward_args *args);                                              \
    fa_status fa_cuda_##NAME##_backward(const fa_backward_args *args)
FA_CUDA_FORWARD(naive);
FA_CUDA_BACKWARD(naive);
FA_CUDA_FORWARD(split);
FA_CUDA_FORWARD(tensor_core);
FA_CUDA_BACKWARD(tensor_core);
FA_CUDA_FORWARD(fused);
FA_CUDA_BACKWARD(fused);
size_t fa_cuda_tensor_core_decode_bytes(const fa_kvcache_args *args);
fa_status fa_cuda_tensor_core_decode(const fa_kvcache_args *args);
bool fa_cuda_tensor_core_decode_fits(const fa_kvcache_args *args); // the device
size_t fa_cuda_fused_decode_bytes(const fa_kvcache_args *args);
fa_status fa_cuda_fused_decode(const fa_kvcache_args *args);

// prefill.cu: whether a call's queries are so many that the forward kernels serve it, and what these are then asked for.
bool fa_cuda_prefills(const fa_kvcache_args *args);
fa_forward_args fa_cuda_prefill_forward(const fa_kvcache_args *args);
size_t fa_cuda_prefill_bytes(const fa_kvcache_args *args, bool on_tensor_cores);
fa_status fa_cuda_prefill(const fa_kvcache_args *args, bool on_tensor_cores);

enum { kMaxTensorCoreDim = 256, kMaxTensorCoreDimF32 = 128 }; // widest tiles
enum { kMaxTensorCoreLength = INT32_MAX - 1024 };             // rows are counted in int32, and a tile beyond

// o = 0, lse = -inf (d_q = d_k = d_v = 0) in the rows that belong to no sequence, which no kernel visits.
fa_status fa_cuda_fill_padding(const fa_forward_args *args);
fa_status fa_cuda_fill_gradient_padding(const fa_backward_args *args);

static inline cudaStream_t fa_stream(const fa_forward_args *args) { return (cudaStream_t)args->stream; }

// Raises the dynamic shared memory that `kernel` may use. False: the device has less.
static inline bool fa_allow_shared(const void *kernel, size_t bytes) {
    int device = 0, most_bytes = 0;
    if (cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
        bytes > (size_t)most_bytes)
        return false;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes) == cudaSuccess)
        return true;
    (void)cudaGetLastError(); // it is told to the caller alone
    return false;
}

// Whether rows see unequal numbers of keys, though sequences be alike.
static inline bool fa_has_unequal_rows(const fa_forward_args *args) {
    return args->causal || args->window_left >= 0 || args->window_right >= 0;
}

// Whether softmax sees anything but softmax_scale q.k, or P is not what softmax gave.
static inline bool fa_has_modified_scores(const fa_forward_args *args) {
    return args->softcap > 0 || args->bias.data || args->alibi_slopes.data || args->dropout_p > 0;
}

#endif
