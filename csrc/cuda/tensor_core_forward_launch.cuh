// The launch of the forward on tensor cores: its plan, and whether a tile fits.
#ifndef FA_TENSOR_CORE_FORWARD_LAUNCH_CUH
#define FA_TENSOR_CORE_FORWARD_LAUNCH_CUH

#include "cuda/launch.cuh"
#include "cuda/tensor_core_forward.cuh"

fa_status fa_tensor_core_forward_f32(const fa_forward_args *args);

constexpr int64_t kSectionBytes = 32 << 20; // of K and V, at a time: half of an H200's L2 cache

template <typename T, unsigned kFeatures>
static fa_status launch(const fa_forward_args *args, size_t shared_bytes) {
    const int64_t heads = args->heads_q * args->batch, group = args->heads_q / fa_max(args->heads_kv, 1);
    const int64_t head_bytes = args->seqlen_k * (args->head_dim + args->head_dim_v) * fa_dtype_bytes(args->dtype);
    const int64_t m_blocks = fa_ceil_div(args->seqlen_q, T::kBlockM);
    // Where rows are unequally long: the longest of many heads first. Else head by head.
    const int64_t fitting = fa_clamp(kSectionBytes / fa_max(head_bytes, 1) * group, group, fa_max(heads, 1));
    if (heads == 0 || m_blocks == 0) return FA_OK;
    const int64_t most = fa_has_unequal_rows(args) ? fa_max(fitting, 1) : 1;
    const int64_t section = fa_ceil_div(heads, fa_ceil_div(heads, most)); // alike
    const auto divisor = [](int64_t value) { return Divisor(static_cast<uint32_t>(value)); };
    const ForwardPlan plan = {divisor(section),
                              divisor(section * m_blocks),
                              divisor(args->heads_q),
                              divisor(group),
                              static_cast<int>(m_blocks),
                              static_cast<int>(heads),
                              static_cast<float>(1 / (1 - args->dropout_p)),
                              shared_bytes > sizeof(typename T::template Smem<kFeatures != kProducts>),
                              MmaScorePlan(*args)};
    return fa_launch("tensor core forward", tensor_core_forward<T, kFeatures>,
                     fa_ceil_div(heads, section) * section * m_blocks, T::kThreads, shared_bytes, fa_stream(args),
                     *args, plan);
}

// Whether the device has the shared memory for a block. The limit is the kernel's, for all threads of the program: it is
// never lowered.
template <typename T, unsigned kFeatures>
static bool fits_tile(size_t bytes = sizeof(typename T::template Smem<kFeatures != kProducts>)) {
    return fa_allow_shared(reinterpret_cast<const void *>(tensor_core_forward<T, kFeatures>), bytes);
}

// Launches a tile that holds the rows and that the device has the shared memory for; false: neither.
template <typename T, unsigned kFeatures>
static bool try_tile(const fa_forward_args *args, fa_status *status) {
    if (fa_max(args->head_dim, args->head_dim_v) > T::kDim) return false;
    const size_t plain_bytes = sizeof(typename T::template Smem<kFeatures != kProducts>),
                 staged_bytes = plain_bytes + sizeof(typename T::BiasTile);
    const bool can_stage = (kFeatures & kBias) && fits_tile<T, kFeatures>(staged_bytes);
    if (!can_stage && (kFeatures == kBias || !fits_tile<T, kFeatures>(plain_bytes))) return false;
    const size_t shared_bytes = can_stage && has_whole_rows(args->bias, args->dtype) ? staged_bytes : plain_bytes;
    *status = launch<T, kFeatures>(args, shared_bytes);
    return true;
}

#endif
