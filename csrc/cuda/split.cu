// Attention in three kernels with the score matrix between them, each tiled for its own bottleneck: what fusing them is
// held against. Forward only; float32, float16 and bfloat16, multiplied and summed in float32.
//
//   split_scores   a block: 64 rows x 64 keys of  s = modified(softmax_scale q k^T), -inf where a row sees no key
//   split_softmax  a warp, or for long rows a block, makes a row of s a row of P in place, and writes its lse
//   split_output   a block: 64 rows x 64 elements of  o = P v / (1 - p)
//
// The scores of a block of 64 rows exist for the keys that any of its rows may see, in whole steps of 32: KeySteps. No
// kernel reads others, and among them P is 0 wherever a row does not see a key.
//
// Both products run 64 x 64 x 32 at a time through shared memory, a holding its rows down the columns:
//
//   smem.a [32][68]  q or P, transposed      8704 bytes      thread t sums rows 8 (t / 16) + [0, 8),
//   smem.b [32][68]  k, transposed, or v     8704 bytes                columns 4 (t mod 16) + [0, 4)
//
// Rows are 64 + 4 floats long: 4 keeps them aligned for float4, and puts the 8 x 4 elements that a warp of
// load_transposed() stores at a time into 32 different banks. A step of the sum reads three float4 for 32 fma.
#include "cuda/device.cuh"

enum {
    kSplitTile = 64,  // rows, keys, or elements of o
    kSplitDepth = 32, // summed over at a time
    kSplitLine = kSplitTile + 4,
    kSplitThreads = 128,
    kThreadRows = 8,
    kThreadCols = 4,
    kSoftmaxThreads = 256,
    kLongRow = 1024, // floats: below it, 256 threads would have less than one float4 each
};
static_assert(kSplitTile / kThreadRows * (kSplitTile / kThreadCols) == kSplitThreads,
              "a thread for each part of a tile");

struct alignas(16) SplitSmem {
    float a[kSplitDepth][kSplitLine], b[kSplitDepth][kSplitLine];
};

struct Split {
    fa_forward_args args;
    float *p;             // [B][Hq][Lq][ld] scores, then P
    int64_t ld;           // seqlen_k in whole tiles
    int64_t row_tiles;    // of seqlen_q
    int64_t column_tiles; // of seqlen_k for split_scores, of head_dim_v for split_output
};

struct KeySteps {
    int64_t begin, end; // keys, multiples of kSplitDepth; begin = end: no row sees any
};

// Both ends of a row's visible keys grow with the row.
__device__ __forceinline__ KeySteps key_steps(const fa_forward_args &args, const fa_sequence &seq, int64_t row) {
    const int64_t first = row / kSplitTile * kSplitTile, last = fa_min(first + kSplitTile, seq.len_q) - 1;
    const int64_t lo = fa_visible_keys(&args, &seq, first).lo, hi = fa_visible_keys(&args, &seq, last).hi;
    if (lo >= hi) return {0, 0};
    return {lo / kSplitDepth * kSplitDepth, fa_round_up(hi, kSplitDepth)};
}

struct SplitBlock { // where a block of the two products stands
    int64_t b, h, h_kv, row0, col0;
    fa_sequence seq;
    int rows; // that the sequence has from row0 on, at most kSplitTile
};

__device__ __forceinline__ SplitBlock split_block(const Split &split) {
    const fa_forward_args &args = split.args;
    const fa_place place = fa_place_of(blockIdx.x / split.column_tiles, args.heads_q, split.row_tiles);
    SplitBlock block = {place.b, place.head, place.head / (args.heads_q / args.heads_kv)};
    block.row0 = place.part * kSplitTile, block.col0 = blockIdx.x % split.column_tiles * kSplitTile;
    block.seq = fa_sequence_at(&args, block.b);
    block.rows = static_cast<int>(fa_clamp(block.seq.len_q - block.row0, 0, kSplitTile));
    return block;
}

// ---- one tile product -----------------------------------------------------------------------------------------------

// tile[d][row] = source[row][d] for 64 rows and 32 columns, 0 outside `rows` and `cols`. A warp: 8 columns of 4 rows.
template <typename Element>
__device__ __forceinline__ void load_transposed(float (*tile)[kSplitLine], const Element *source, int64_t stride,
                                                int rows, int64_t cols) {
    const int first_d = threadIdx.x % 8, first_row = threadIdx.x / 8;
#pragma unroll
    for (int row = first_row; row < kSplitTile + first_row; row += kSplitThreads / 8)
#pragma unroll
        for (int d = first_d; d < kSplitDepth + first_d; d += 8)
            tile[d][row] = row < rows && d < cols ? static_cast<float>(source[row * stride + d]) : 0;
}

// tile[row][d] = source[row][d] for 32 rows and 64 columns, 0 outside `rows` and `cols`.
template <typename Element>
__device__ __forceinline__ void load_rows(float (*tile)[kSplitLine], const Element *source, int64_t stride,
                                          int64_t rows, int64_t cols) {
    const int d = threadIdx.x % kSplitTile, first_row = threadIdx.x / kSplitTile;
#pragma unroll
    for (int row = first_row; row < kSplitDepth + first_row; row += kSplitThreads / kSplitTile)
        tile[row][d] = row < rows && d < cols ? static_cast<float>(source[row * stride + d]) : 0;
}

// acc += a^T b over the first `depth` lines of the tiles, in groups of 8: what is past the end of both is 0
__device__ __forceinline__ void multiply(float (&acc)[kThreadRows][kThreadCols], const SplitSmem &smem, int64_t depth) {
    const int row = threadIdx.x / 16 * kThreadRows, col = threadIdx.x % 16 * kThreadCols;
    for (int group = 0; group < kSplitDepth && group < depth; group += 8) {
#pragma unroll
        for (int d = group; d < group + 8; ++d) {
            const float4 a0 = *reinterpret_cast<const float4 *>(&smem.a[d][row]);
            const float4 a1 = *reinterpret_cast<const float4 *>(&smem.a[d][row + 4]);
            const float4 b = *reinterpret_cast<const float4 *>(&smem.b[d][col]);
            const float a[kThreadRows] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
#pragma unroll
            for (int i = 0; i < kThreadRows; ++i) {
                acc[i][0] += a[i] * b.x;
                acc[i][1] += a[i] * b.y;
                acc[i][2] += a[i] * b.z;
                acc[i][3] += a[i] * b.w;
            }
        }
    }
}

// ---- the three steps ------------------------------------------------------------------------------------------------

template <typename Element>
__global__ void __launch_bounds__(kSplitThreads) split_scores(const __grid_constant__ Split split) {
    __shared__ SplitSmem smem;
    const fa_forward_args &args = split.args;
    const SplitBlock block = split_block(split);
    const fa_sequence &seq = block.seq;
    if (block.rows == 0) return;
    const KeySteps keys = key_steps(args, seq, block.row0);
    if (block.col0 + kSplitTile <= keys.begin || block.col0 >= keys.end) return;

    const Element *q = static_cast<const Element *>(args.q.data) +
                       fa_row_offset(&args.q, seq.batch_index, block.h, seq.row_q + block.row0);
    const Element *k = static_cast<const Element *>(args.k.data) +
                       fa_row_offset(&args.k, seq.batch_index, block.h_kv, seq.row_k + block.col0);
    const int cols = static_cast<int>(fa_min(seq.len_k - block.col0, kSplitTile));
    float acc[kThreadRows][kThreadCols] = {};
    for (int64_t d = 0; d < args.head_dim; d += kSplitDepth) {
        load_transposed(smem.a, q + d, args.q.stride_l, block.rows, args.head_dim - d);
        load_transposed(smem.b, k + d, args.k.stride_l, cols, args.head_dim - d);
        __syncthreads(); // both tiles are whole
        multiply(acc, smem, args.head_dim - d);
        __syncthreads(); // every thread is done with them
    }

    const ScoreRule<float> rule(args, seq, block.b, block.h);
    const float scale = static_cast<float>(args.softmax_scale);
    const int row0 = threadIdx.x / 16 * kThreadRows, col0 = threadIdx.x % 16 * kThreadCols;
    float *s = split.p + ((block.b * args.heads_q + block.h) * args.seqlen_q + block.row0) * split.ld + block.col0;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
        if (row0 + i >= block.rows) break;
        const fa_interval visible = fa_visible_keys(&args, &seq, block.row0 + row0 + i);
        float cap_slope;
#pragma unroll
        for (int j = 0; j < kThreadCols; ++j) {
            const int64_t col = block.col0 + col0 + j;
            acc[i][j] = col >= visible.lo && col < visible.hi
                            ? rule.score(scale * acc[i][j], block.row0 + row0 + i, col, &cap_slope)
                            : -infinity(0.0f);
        }
        *reinterpret_cast<float4 *>(s + (row0 + i) * split.ld + col0) =
            make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    }
}

// The largest of, or the sum of, what the kRowThreads threads of a row hold; each of them gets it. parts: one float for
// each warp of a block.
template <int kRowThreads, bool kLargest>
__device__ __forceinline__ float over_row(float x, float *parts) {
    for (int apart = 16; apart > 0; apart /= 2) {
        const float other = __shfl_xor_sync(~0u, x, apart);
        x = kLargest ? fmaxf(x, other) : x + other;
    }
    if (kRowThreads == 32) return x;
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads(); // every warp's part is there
    x = parts[0];
    for (int warp = 1; warp < kRowThreads / 32; ++warp) x = kLargest ? fmaxf(x, parts[warp]) : x + parts[warp];
    return x;
}

template <int kRowThreads>
__global__ void __launch_bounds__(kSoftmaxThreads) split_softmax(const __grid_constant__ Split split, int64_t rows) {
    __shared__ float max_parts[kSoftmaxThreads / 32], sum_parts[kSoftmaxThreads / 32];
    const fa_forward_args &args = split.args;
    const int64_t index =
        static_cast<int64_t>(blockIdx.x) * (kSoftmaxThreads / kRowThreads) + threadIdx.x / kRowThreads;
    if (index >= rows) return;
    const fa_place place = fa_place_of(index, args.heads_q, args.seqlen_q);
    const int64_t b = place.b, h = place.head, row = place.part;
    const fa_sequence seq = fa_sequence_at(&args, b);
    if (row >= seq.len_q) return;

    const KeySteps keys = key_steps(args, seq, row);
    float4 *p = reinterpret_cast<float4 *>(split.p + index * split.ld);
    const int64_t first = keys.begin / 4 + threadIdx.x % kRowThreads, end = keys.end / 4; // in float4
    const float sink = args.sinks.data ? load_per_head<float>(args.sinks, 0, h) : -infinity(0.0f);
    float max = sink, sum = 0;
    for (int64_t i = first; i < end; i += kRowThreads)
        max = fmaxf(max, fmaxf(fmaxf(p[i].x, p[i].y), fmaxf(p[i].z, p[i].w)));
    max = over_row<kRowThreads, true>(max, max_parts);
    if (max == -infinity(0.0f)) max = 0; // every term of the sum is 0, and -inf - max no NaN
    for (int64_t i = first; i < end; i += kRowThreads) {
        const float4 s = p[i];
        sum += exp_of(s.x - max) + exp_of(s.y - max) + exp_of(s.z - max) + exp_of(s.w - max);
    }
    sum = over_row<kRowThreads, false>(sum, sum_parts) + exp_of(sink - max);

    const ScoreRule<float> rule(args, seq, b, h);
    const float inverse = sum == 0 ? 0 : 1 / sum;
    for (int64_t i = first; i < end; i += kRowThreads) {
        float4 x = p[i];
        x.x = rule.keeps(row, 4 * i) ? exp_of(x.x - max) * inverse : 0;
        x.y = rule.keeps(row, 4 * i + 1) ? exp_of(x.y - max) * inverse : 0;
        x.z = rule.keeps(row, 4 * i + 2) ? exp_of(x.z - max) * inverse : 0;
        x.w = rule.keeps(row, 4 * i + 3) ? exp_of(x.w - max) * inverse : 0;
        p[i] = x;
    }
    if (threadIdx.x % kRowThreads == 0)
        static_cast<float *>(args.lse.data)[fa_row_offset(&args.lse, seq.batch_index, h, seq.row_q + row)] =
            max + log_of(sum);
}

template <typename Element>
__global__ void __launch_bounds__(kSplitThreads) split_output(const __grid_constant__ Split split) {
    __shared__ SplitSmem smem;
    const fa_forward_args &args = split.args;
    const SplitBlock block = split_block(split);
    const fa_sequence &seq = block.seq;
    if (block.rows == 0) return;
    const KeySteps keys = key_steps(args, seq, block.row0);

    const float *p = split.p + ((block.b * args.heads_q + block.h) * args.seqlen_q + block.row0) * split.ld;
    const Element *v = static_cast<const Element *>(args.v.data) +
                       fa_row_offset(&args.v, seq.batch_index, block.h_kv, seq.row_k) + block.col0;
    float acc[kThreadRows][kThreadCols] = {};
    for (int64_t key = keys.begin; key < keys.end; key += kSplitDepth) {
        load_transposed(smem.a, p + key, split.ld, block.rows, kSplitDepth);
        load_rows(smem.b, v + key * args.v.stride_l, args.v.stride_l, seq.len_k - key, args.head_dim_v - block.col0);
        __syncthreads(); // both tiles are whole
        multiply(acc, smem, seq.len_k - key);
        __syncthreads(); // every thread is done with them
    }

    const float kept_scale = static_cast<float>(1 / (1 - args.dropout_p));
    const int row0 = threadIdx.x / 16 * kThreadRows;
    const int64_t col0 = block.col0 + threadIdx.x % 16 * kThreadCols;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
        const int64_t at = fa_row_offset(&args.o, seq.batch_index, block.h, seq.row_q + block.row0 + row0 + i) + col0;
#pragma unroll
        for (int j = 0; j < kThreadCols; ++j)
            if (row0 + i < block.rows && col0 + j < args.head_dim_v)
                static_cast<Element *>(args.o.data)[at + j] = static_cast<Element>(kept_scale * acc[i][j]);
    }
}

// ---- launches -------------------------------------------------------------------------------------------------------

static Split split_of(const fa_forward_args &args) {
    Split split = {args, static_cast<float *>(args.workspace), fa_round_up(args.seqlen_k, kSplitTile)};
    split.row_tiles = fa_ceil_div(args.seqlen_q, kSplitTile);
    return split;
}

// One block for each tile of column_tiles x row_tiles of each head.
static fa_status launch_product(const char *what, void (*kernel)(Split), Split split, int64_t columns) {
    split.column_tiles = fa_ceil_div(columns, kSplitTile);
    const int64_t blocks = split.column_tiles * split.row_tiles * split.args.heads_q * split.args.batch;
    return fa_launch(what, kernel, blocks, kSplitThreads, 0, fa_stream(&split.args), split);
}

template <int kRowThreads>
static fa_status launch_softmax(const Split &split) {
    const int64_t rows = split.args.batch * split.args.heads_q * split.args.seqlen_q;
    const int64_t blocks = fa_ceil_div(rows, kSoftmaxThreads / kRowThreads);
    return fa_launch("split_softmax", split_softmax<kRowThreads>, blocks, kSoftmaxThreads, 0, fa_stream(&split.args),
                     split, rows);
}

template <typename Element>
static fa_status launch_steps(const Split &split) {
    const fa_forward_args &args = split.args;
    FA_CHECK(launch_product("split_scores", split_scores<Element>, split, args.seqlen_k));
    FA_CHECK(args.seqlen_k < kLongRow ? launch_softmax<32>(split) : launch_softmax<kSoftmaxThreads>(split));
    return launch_product("split_output", split_output<Element>, split, args.head_dim_v);
}

size_t fa_cuda_split_forward_bytes(const fa_forward_args *args) {
    const int64_t rows = args->batch * args->heads_q * args->seqlen_q;
    return static_cast<size_t>(rows * split_of(*args).ld) * sizeof(float);
}

fa_status fa_cuda_split_forward(const fa_forward_args *args) {
    const Split split = split_of(*args);
    switch (args->dtype) {
    case FA_FLOAT32: return launch_steps<float>(split);
    case FA_FLOAT16: return launch_steps<__half>(split);
    case FA_BFLOAT16: return launch_steps<__nv_bfloat16>(split);
    default: return fa_fail(FA_ERROR_TYPE, "split: takes no %s", fa_dtype_name(args->dtype));
    }
}
