// CUDA's rows of the kernel table.
#include "cuda/cuda.h"

static void refuse_split(const fa_forward_args *args, const fa_backward_args *, fa_reasons *reasons) {
    if (args->dtype == FA_FLOAT64) fa_add_reason(reasons, "takes float32, float16 and bfloat16, not float64");
}

#define CUDA_KERNEL(NAME)                                                                                              \
    static fa_status NAME##_forward(const fa_forward_args *args) {                                                     \
        FA_CHECK(fa_cuda_fill_padding(args));                                                                          \
        return fa_cuda_##NAME##_forward(args);                                                                         \
    }
#define CUDA_KERNEL_BACKWARD(NAME)                                                                                     \
    static fa_status NAME##_backward(const fa_backward_args *args) {                                                   \
        FA_CHECK(fa_cuda_fill_gradient_padding(args));                                                                 \
        return fa_cuda_##NAME##_backward(args);                                                                        \
    }
CUDA_KERNEL(fused)
CUDA_KERNEL_BACKWARD(fused)
CUDA_KERNEL(split)
CUDA_KERNEL(naive)
CUDA_KERNEL_BACKWARD(naive)

static const fa_kernel kRows[] = {
    {{FA_FUSED, FA_CUDA, "fused"},
     nullptr,
     fa_cuda_fused_forward_bytes,
     fused_forward,
     fa_cuda_fused_backward_bytes,
     fused_backward}, // tiles and an online softmax
    {{FA_SPLIT, FA_CUDA, "split"},
     refuse_split,
     fa_cuda_split_forward_bytes,
     split_forward,
     nullptr,
     nullptr}, // three tiled steps
    {{FA_NAIVE, FA_CUDA, "naive"},
     nullptr,
     fa_cuda_naive_forward_bytes,
     naive_forward,
     fa_cuda_naive_backward_bytes,
     naive_backward}, // one thread an output, the score matrix in memory
};
extern "C" const fa_kernel_rows fa_cuda_kernel_rows = {kRows, sizeof kRows / sizeof kRows[0]};
