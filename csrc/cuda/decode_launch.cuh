// How decoding is launched: what the host knows of a request, the workspace, both kernels.
#ifndef FA_DECODE_LAUNCH_CUH
#define FA_DECODE_LAUNCH_CUH

#include "cuda/decode.cuh"

// Turns that the longest sequence may have, and lines of all sequences.
template <typename T>
static int64_t most_turns(const fa_kvcache_args *args) {
    return fa_max(fa_ceil_div(args->max_pages * args->page_size, T::kKeys), 1);
}
template <typename T>
static int64_t lines_of(const fa_kvcache_args *args) {
    return args->heads_kv * fa_ceil_div(args->heads_q / args->heads_kv * args->seqlen_q, T::kRows) * args->batch;
}

// Stages that the device has shared memory for; at least two are needed.
template <typename T>
static int decode_stages() {
    int device = 0, of_block = 0, of_sm = 0, reserved = 0;
    if (cudaGetDevice(&device) == cudaSuccess) {
        cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        cudaDeviceGetAttribute(&of_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
        cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
    }
    const int64_t beside = 2 * reserved + static_cast<int64_t>(sizeof(MergeSmem<typename T::Real, T::kDim>));
    const int64_t bytes = T::kLeavesRoom ? fa_min(of_block, of_sm - beside) : of_block;
    const int64_t fixed = sizeof(DecodeSmem<T>) - sizeof(typename T::Stage);
    return static_cast<int>(
        fa_clamp((bytes - fixed) / static_cast<int64_t>(sizeof(typename T::Stage)), 0, kMostStages));
}
template <typename T>
static constexpr size_t decode_shared_bytes(int stages) {
    return sizeof(DecodeSmem<T>) + static_cast<size_t>(stages - 1) * sizeof(typename T::Stage);
}
template <typename T>
static bool decode_fits() {
    const int stages = decode_stages<T>();
    return stages >= 2 && fa_allow_shared(reinterpret_cast<const void *>(decode<T>), decode_shared_bytes<T>(stages));
}

template <typename T>
static DecodePlan decode_plan(const fa_kvcache_args *args) {
    const int64_t group = args->heads_q / args->heads_kv, rows = group * args->seqlen_q;
    const int64_t m_blocks = fa_ceil_div(rows, T::kRows), lines = lines_of<T>(args), turns = most_turns<T>(args);
    int device = 0, processors = 1, l2_bytes = 0;
    if (cudaGetDevice(&device) == cudaSuccess) {
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device);
    }
    const int64_t cache_bytes = args->batch * args->heads_kv * args->max_pages * args->page_size *
                                (args->head_dim + args->head_dim_v) * fa_dtype_bytes(args->cache_dtype);
    const int64_t parts_a_line = fa_min(args->num_splits, turns);
    const int64_t chunks = lines * fa_ceil_div(turns * T::kKeys, kLeastKeys); // at most
    const int64_t blocks = parts_a_line ? lines * parts_a_line : fa_min(processors, chunks);
    const int64_t of_sequence = args->heads_kv * m_blocks;
    const bool has_line_places = parts_a_line || lines < blocks;
    const bool shares = blocks > 1 && parts_a_line != 1;
    const auto strides = [&](const fa_tensor &cache) {
        const int64_t bytes = fa_dtype_bytes(args->cache_dtype);
        return CacheStrides{static_cast<uint32_t>(cache.stride_b * bytes / 16),
                            static_cast<uint32_t>(cache.stride_l * bytes / 16)};
    };
    const auto divisor = [](int64_t value) { return Divisor(static_cast<uint32_t>(value)); };
    return {divisor(args->page_size),
            divisor(group),
            divisor(m_blocks),
            divisor(blocks),
            static_cast<int>(rows),
            static_cast<int>(of_sequence),
            static_cast<int>(blocks),
            static_cast<int>(parts_a_line),
            static_cast<int>(fa_min(fa_min(fa_ceil_div(kMostChunks, fa_max(of_sequence, 1)), kMostOfLine), turns)),
            static_cast<int>(fa_min(rows, T::kRows)),
            static_cast<int>(!shares           ? 0
                             : has_line_places ? lines
                                               : blocks),
            has_line_places,
            decode_stages<T>(),
            cache_bytes > l2_bytes,
            args->max_pages <= 1 || args->page_size % T::kKeys == 0,
            args->softcap > 0 || args->alibi_slopes.data || args->tree_mask,
            strides(args->k_cache),
            strides(args->v_cache),
            args->workspace};
}

template <typename T>
static size_t decode_bytes(const fa_kvcache_args *args) {
    const DecodePlan plan = decode_plan<T>(args);
    if (plan.places == 0) return 0;
    return static_cast<size_t>(told_chunks_at(plan) +
                               nth_told(plan, plan.places, 0) * ToldChunk<typename T::Real, T::kDim>::bytes(plan));
}

template <typename T>
static fa_status launch_decode(const fa_kvcache_args *args) {
    using Real = typename T::Real;
    FA_REQUIRE(lines_of<T>(args) * most_turns<T>(args) <= INT32_MAX / 2, FA_ERROR_UNSUPPORTED,
               "decode: %lld times %lld keys that %d rows share: more than 2^30 times %d",
               static_cast<long long>(lines_of<T>(args)), static_cast<long long>(most_turns<T>(args) * T::kKeys),
               T::kRows, T::kKeys);
    const DecodePlan plan = decode_plan<T>(args);
    const cudaStream_t stream = static_cast<cudaStream_t>(args->stream);
    FA_CHECK(fa_launch_dependent("decode", decode<T>, dim3(static_cast<unsigned>(plan.blocks)), T::kThreads,
                                 decode_shared_bytes<T>(plan.stages), stream, *args, plan));
    const int64_t row_blocks = fa_ceil_div(plan.chunk_rows * T::kDim / 4, kMergeThreads);
    return fa_launch_dependent("merging of decoded chunks", decode_merge<Real, T::kDim, T::kRows>,
                               dim3(static_cast<unsigned>(plan.places), static_cast<unsigned>(row_blocks)),
                               kMergeThreads, 0, stream, *args, plan);
}

#endif
