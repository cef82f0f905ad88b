// Many new tokens over a contiguous cache: they are stored, q is rotated, and the forward kernels read the cache where it is.
#include "cuda/decode_rows.cuh"

enum { kPrefillThreads = 128, kPrefillColumns = 8 };

// What a call keeps in its workspace.
struct PrefillSpace {
    int32_t *seqlens; // (B,)
    void *q;          // (B, Hq, Lq, D), rotated; NULL: q as it is
    void *lse;        // (B, Hq, Lq), where the caller wants none
    size_t bytes;     // of these
};

static PrefillSpace prefill_space(const fa_kvcache_args *args, void *base) {
    fa_arena arena = {static_cast<char *>(base), 0};
    PrefillSpace space = {};
    const size_t rows = static_cast<size_t>(args->batch * args->heads_q * args->seqlen_q);
    space.seqlens = static_cast<int32_t *>(fa_take(&arena, sizeof(int32_t) * static_cast<size_t>(args->batch)));
    if (args->rotary.cos)
        space.q =
            fa_take(&arena, rows * static_cast<size_t>(fa_round_up(args->head_dim, 8) * fa_dtype_bytes(args->dtype)));
    if (!args->lse.data) space.lse = fa_take(&arena, rows * (args->dtype == FA_FLOAT64 ? 8 : 4));
    space.bytes = arena.used_bytes;
    return space;
}

// The forward's arguments for a cache whose page b belongs to sequence b.
fa_forward_args fa_cuda_prefill_forward(const fa_kvcache_args *args) {
    const PrefillSpace space = prefill_space(args, args->workspace);
    fa_forward_args forward = {};
    forward.device = args->device, forward.dtype = args->dtype, forward.stream = args->stream;
    forward.batch = args->batch, forward.heads_q = args->heads_q, forward.heads_kv = args->heads_kv;
    forward.seqlen_q = args->seqlen_q, forward.seqlen_k = args->page_size;
    forward.head_dim = args->head_dim, forward.head_dim_v = args->head_dim_v;
    forward.q = args->q, forward.k = args->k_cache, forward.v = args->v_cache;
    if (args->rotary.cos) {
        const int64_t row = fa_round_up(args->head_dim, 8);
        forward.q = {space.q, args->heads_q * args->seqlen_q * row, args->seqlen_q * row, row};
    }
    forward.o = args->o, forward.lse = args->lse;
    if (!args->lse.data) forward.lse = {space.lse, args->heads_q * args->seqlen_q, args->seqlen_q, 1};
    forward.softmax_scale = args->softmax_scale, forward.softcap = args->softcap, forward.causal = args->causal;
    forward.window_left = args->window_left, forward.window_right = args->window_right;
    forward.alibi_slopes = args->alibi_slopes, forward.sinks = args->sinks;
    forward.seqlens_k = space.seqlens;
    return forward;
}

// Stores the new tokens and the rotated q: a thread has kPrefillColumns columns of a row of q, k or v.
template <typename Real>
__global__ void __launch_bounds__(kPrefillThreads)
    prefill_rows(const __grid_constant__ fa_kvcache_args args, const __grid_constant__ fa_forward_args forward,
                 int32_t *seqlens) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kPrefillThreads + threadIdx.x;
    if (thread < args.batch) seqlens[thread] = fa_cached_sequence_at(&args, thread).len_k;
    const int64_t pieces = fa_ceil_div(fa_max(args.head_dim, args.head_dim_v), kPrefillColumns);
    const int64_t heads = args.heads_q + 2 * args.heads_kv; // of q, k, v
    const fa_place place = fa_place_of(thread / pieces, heads, args.seqlen_q);
    const int64_t b = place.b, i = place.part;
    const int col = static_cast<int>(thread % pieces) * kPrefillColumns;
    if (b >= args.batch) return;
    const fa_cached_sequence seq = fa_cached_sequence_at(&args, b);
    const int64_t position = seq.start + i;
    Real x[kPrefillColumns];
    const auto move = [&](const fa_tensor &from, const fa_tensor &to, int64_t head, int64_t to_row, int64_t width,
                          bool rotates) {
        if (col >= width) return;
        by_element<Real>(args.dtype, [&](auto of_type) {
            load_rotated<decltype(of_type)>(x, args, from, fa_row_offset(&from, b, head, i), col,
                                            static_cast<int>(width), rotates, position);
        });
        const int64_t at = fa_row_offset(&to, b, head, to_row) + col;
#pragma unroll
        for (int c = 0; c < kPrefillColumns; ++c)
            if (col + c < width) store(to.data, args.dtype, at + c, x[c]);
    };
    if (place.head < args.heads_q) {
        if (args.rotary.cos) move(args.q, forward.q, place.head, i, args.head_dim, true);
    } else if (args.k.data && position < seq.len_k) {
        const int64_t head = (place.head - args.heads_q) / 2;
        if ((place.head - args.heads_q) % 2 == 0)
            move(args.k, args.k_cache, head, position, args.head_dim, true);
        else
            move(args.v, args.v_cache, head, position, args.head_dim_v, false);
    }
}

// More queries than decoding takes at the speed of memory, over a cache that the forward can read.
bool fa_cuda_prefills(const fa_kvcache_args *args) {
    return args->seqlen_q > 32 && !args->page_table && !args->tree_mask && args->cache_dtype == args->dtype;
}

static size_t forward_bytes(const fa_forward_args *forward, bool on_tensor_cores) {
    return on_tensor_cores ? fa_cuda_tensor_core_forward_bytes(forward) : fa_cuda_fused_forward_bytes(forward);
}

size_t fa_cuda_prefill_bytes(const fa_kvcache_args *args, bool on_tensor_cores) {
    const fa_forward_args forward = fa_cuda_prefill_forward(args);
    return prefill_space(args, args->workspace).bytes + forward_bytes(&forward, on_tensor_cores);
}

fa_status fa_cuda_prefill(const fa_kvcache_args *args, bool on_tensor_cores) {
    fa_forward_args forward = fa_cuda_prefill_forward(args);
    const PrefillSpace space = prefill_space(args, args->workspace);
    forward.workspace = static_cast<char *>(args->workspace) + space.bytes;
    forward.workspace_bytes = args->workspace_bytes - space.bytes;
    const int64_t pieces = fa_ceil_div(fa_max(args->head_dim, args->head_dim_v), kPrefillColumns);
    const int64_t threads =
        fa_max(args->batch * (args->heads_q + 2 * args->heads_kv) * args->seqlen_q * pieces, args->batch);
    const auto kernel = args->dtype == FA_FLOAT64 ? prefill_rows<double> : prefill_rows<float>;
    FA_CHECK(fa_launch("prefill of a cache", kernel, fa_ceil_div(threads, kPrefillThreads), kPrefillThreads, 0,
                       static_cast<cudaStream_t>(args->stream), *args, forward, space.seqlens));
    return on_tensor_cores ? fa_cuda_tensor_core_forward(&forward) : fa_cuda_fused_forward(&forward);
}
