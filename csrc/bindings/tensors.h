// Tensors as the C core takes them, a status back as a Python exception, and where a call runs: for every op.
#ifndef FA_BINDINGS_TENSORS_H
#define FA_BINDINGS_TENSORS_H

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <cmath>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "flash_attention.h"

namespace fa {

using at::Tensor;
using torch::jit::Stack;

inline void check(fa_status status) {
    if (status == FA_OK) return;
    TORCH_CHECK_TYPE(status != FA_ERROR_TYPE, fa_error_text());
    TORCH_CHECK_VALUE(status == FA_ERROR_DEVICE || status == FA_ERROR_WORKSPACE, fa_error_text());
    TORCH_CHECK(false, fa_error_text());
}

inline fa_dtype dtype_of(const char *name, const Tensor &t) {
    switch (t.scalar_type()) {
    case at::kFloat: return FA_FLOAT32;
    case at::kDouble: return FA_FLOAT64;
    case at::kHalf: return FA_FLOAT16;
    case at::kBFloat16: return FA_BFLOAT16;
    default: TORCH_CHECK_TYPE(false, name, " is ", t.scalar_type(), ": must be float32, float64, float16 or bfloat16");
    }
}

// "[2, 3]". Not by way of a stream: where a compiler links libstdc++ statically, a number's way through its locales may
// end in torch's.
inline std::string text(at::IntArrayRef numbers) {
    std::string all;
    for (const int64_t number : numbers) all += (all.empty() ? "" : ", ") + std::to_string(number);
    return '[' + all + ']';
}

inline void check_shape(const char *name, const Tensor &t, const char *shape, at::IntArrayRef expected) {
    TORCH_CHECK_VALUE(t.sizes() == expected, name, " has shape ", text(t.sizes()), ": must be ", shape, " = ",
                      text(expected));
}

// (B, H, L, D), or (T, H, D) where sequences are packed.
inline fa_tensor tensor_of(const char *name, const Tensor &t, bool packed) {
    TORCH_CHECK_VALUE(t.dim() == (packed ? 3 : 4), name, " has shape ", text(t.sizes()), ": must be ",
                      packed ? "(tokens, heads, head_dim)" : "(batch, heads, length, head_dim)");
    TORCH_CHECK_VALUE(t.stride(-1) == 1 || t.size(-1) <= 1, name, " has strides ", text(t.strides()),
                      ": the last axis must be contiguous; call .contiguous()");
    return packed ? fa_tensor{t.data_ptr(), 0, t.stride(1), t.stride(0)}
                  : fa_tensor{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline fa_tensor lse_tensor(const Tensor &t, bool packed) { // (B, Hq, Lq) or (Hq, Tq)
    return packed ? fa_tensor{t.data_ptr(), 0, t.stride(0), t.stride(1)}
                  : fa_tensor{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// Of a tensor that is given: an empty one has no storage, and NULL would mean that there is none.
inline void *data_or_nothing(const Tensor &t) {
    alignas(FA_WORKSPACE_ALIGNMENT) static char nothing[FA_WORKSPACE_ALIGNMENT];
    return t.data_ptr() ? t.data_ptr() : nothing;
}

inline fa_bias bias_of(const char *name, const Tensor &t, at::IntArrayRef full) {
    fa_bias bias{data_or_nothing(t), dtype_of(name, t), 0, 0, 0, 0};
    int64_t *strides[4] = {&bias.stride_b, &bias.stride_h, &bias.stride_q, &bias.stride_k};
    TORCH_CHECK_VALUE(t.dim() <= 4, name, " has shape ", text(t.sizes()),
                      ": must broadcast to (B, Hq, Lq, Lk) = ", text(full));
    for (int64_t axis = 4 - t.dim(), i = 0; axis < 4; ++axis, ++i) {
        TORCH_CHECK_VALUE(t.size(i) == 1 || t.size(i) == full[axis], name, " has shape ", text(t.sizes()),
                          ": must broadcast to (B, Hq, Lq, Lk) = ", text(full));
        *strides[axis] = t.size(i) == 1 ? 0 : t.stride(i);
    }
    return bias;
}

// (H,), or (B, H) where with_batch; axis: the name of H.
inline fa_per_head per_head_of(const char *name, const Tensor &t, int64_t batch, int64_t heads, bool with_batch,
                               const char *axis = "Hq") {
    const bool two_axes = with_batch && t.dim() == 2;
    TORCH_CHECK_VALUE(two_axes ? t.size(0) == batch && t.size(1) == heads : t.dim() == 1 && t.size(0) == heads, name,
                      " has shape ", text(t.sizes()), ": must be (", axis, ",) = ", text(heads),
                      with_batch ? " or (B, " : "", with_batch ? axis : "", with_batch ? ")" : "");
    return {data_or_nothing(t), dtype_of(name, t), two_axes ? t.stride(0) : 0, t.stride(-1)};
}

inline const int32_t *lengths_of(const char *name, const Tensor &t, int64_t count) {
    TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, name, " is ", t.scalar_type(), ": must be int32");
    TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == count && t.is_contiguous(), name, " has shape ", text(t.sizes()),
                      ": must be a contiguous (", std::to_string(count), ",)");
    return static_cast<const int32_t *>(data_or_nothing(t));
}

inline void run_on_torch_threads(void *context, void (*body)(void *arg, int32_t worker), void *arg) {
    const int64_t count = reinterpret_cast<intptr_t>(context);
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
        for (int64_t worker = first; worker < last; ++worker) body(arg, static_cast<int32_t>(worker));
    });
}

inline bool has_cuda_kernels() {
    fa_kernel_info info{};
    for (int32_t index = 0; index < fa_kernel_count() && info.device != FA_CUDA; ++index)
        check(fa_kernel_describe(index, &info));
    return info.device == FA_CUDA;
}

// torch's own threads; one where waking them would cost more than the work (results do not depend on the count).
inline fa_workers torch_workers(double multiplications) {
    const int64_t count = multiplications < 1e6 || at::in_parallel_region() ? 1 : at::get_num_threads();
    return {static_cast<int32_t>(count), run_on_torch_threads, reinterpret_cast<void *>(static_cast<intptr_t>(count))};
}

inline void check_same_device(const char *name, const Tensor &t, const Tensor &q) {
    TORCH_CHECK_VALUE(t.device() == q.device(), name, " is on ", t.device(), " and q is on ", q.device(),
                      ": all tensors must be on one device");
}

// Makes q's GPU the current one while the guard lives; returns its current stream, which comes from the device's virtual
// guard, which needs neither CUDA headers nor libtorch_cuda.
inline void *enter_device(const Tensor &q, c10::OptionalDeviceGuard &guard) {
    static const bool served = has_cuda_kernels();
    TORCH_CHECK_VALUE(served, "q is on ", q.device(), " and this build has kernels for the CPU alone: build it with ",
                      "FA_CUDA=1, which needs nvcc");
    guard.reset_device(q.device());
    return c10::impl::VirtualGuardImpl(q.device().type()).getStream(q.device()).native_handle();
}

// A tensor of like's sizes but for the last axis, in like's order of the head and length axes.
inline Tensor empty_in_layout_of(const Tensor &like, int64_t width) {
    std::vector<int64_t> sizes = like.sizes().vec();
    sizes.back() = width;
    if (like.dim() != 4 || like.stride(1) >= like.stride(2)) return at::empty(sizes, like.options());
    std::swap(sizes[1], sizes[2]);
    return at::empty(sizes, like.options()).transpose(1, 2);
}

inline Tensor empty_bytes(size_t bytes, const Tensor &q) {
    return at::empty({static_cast<int64_t>(bytes)}, q.options().dtype(at::kByte));
}

// With FLASH_ATTENTION_CHECK=1, lengths on a GPU are copied to the host and held to what the CPU allows.
inline bool lengths_are_checked(fa_device device) {
    const char *wanted = std::getenv("FLASH_ATTENTION_CHECK");
    return device != FA_CPU && wanted && std::string_view(wanted) == "1";
}

// The verdict of each kernel on a request: "impl", "device", "verdict", one after the other.
template <class Verdict>
c10::List<std::string> verdicts(Verdict verdict_of) {
    c10::List<std::string> rows;
    for (int32_t index = 0; index < fa_kernel_count(); ++index) {
        fa_kernel_info info;
        char verdict[512];
        check(fa_kernel_describe(index, &info));
        check(verdict_of(index, verdict, sizeof verdict));
        rows.push_back(info.name);
        rows.push_back(info.device == FA_CUDA ? "cuda" : "cpu");
        rows.push_back(verdict);
    }
    return rows;
}

} // namespace fa

#endif
