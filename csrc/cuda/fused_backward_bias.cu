// d_bias = dS, summed over the axes that bias broadcasts: a block owns a tile of d_bias and walks over what it is the sum
// of, which is cut into chunks where there are fewer tiles than the GPU has room for blocks; the chunks are then added in
// order. Sums are float64: a bias that broadcasts over everything is the sum of B Hq Lq Lk terms that nearly cancel.
#include "cuda/fused_backward.cuh"

enum { kTileRows = 4, kTileCols = 8, kBlock = 64, kEnoughBlocks = 512, kAddThreads = 256 };

struct BiasShape {
    int64_t sizes[4];         // of d_bias: 1 along the axes that are summed
    int64_t m_tiles, n_tiles; // of d_bias
    int64_t sums[4];          // of each of its tiles: batches, heads, tiles of rows, tiles of keys
    __host__ __device__ explicit BiasShape(const fa_backward_args &args) {
        const fa_forward_args &forward = args.forward;
        const int64_t full[4] = {forward.batch, forward.heads_q, forward.seqlen_q, forward.seqlen_k};
        const int64_t strides[4] = {args.d_bias.stride_b, args.d_bias.stride_h, args.d_bias.stride_q,
                                    args.d_bias.stride_k};
        for (int axis = 0; axis < 4; ++axis) {
            sizes[axis] = strides[axis] ? full[axis] : 1;
            sums[axis] = strides[axis] ? 1 : axis < 2 ? full[axis] : fa_ceil_div(full[axis], kBlock);
        }
        m_tiles = fa_ceil_div(sizes[2], kBlock);
        n_tiles = fa_ceil_div(sizes[3], kBlock);
    }
    // d_bias at an element of its own shape.
    __device__ void put(const fa_bias &t, int64_t element, double sum) const {
        const int64_t key = element % sizes[3], row = element / sizes[3] % sizes[2];
        const fa_place place = fa_place_of(element / sizes[3], sizes[1], sizes[2]);
        store(t.data, t.dtype, place.b * t.stride_b + place.head * t.stride_h + row * t.stride_q + key * t.stride_k,
              sum);
    }
    __host__ __device__ int64_t tiles() const { return sizes[0] * sizes[1] * m_tiles * n_tiles; }
    __host__ __device__ int64_t terms() const { return sums[0] * sums[1] * sums[2] * sums[3]; } // of a tile
    __host__ __device__ int64_t elements() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
};

template <typename Real>
union BiasSmem {
    Chunks<Real, kBlock, kBlock> chunks;
    double sums[kBlock][kBlock + 1];
};

// acc += dS of 64 rows and 64 keys of head (b, h).
template <typename Real>
__device__ __forceinline__ void add_tile(const fa_backward_args &args, const BackwardPlan &plan, int64_t b, int64_t h,
                                         int64_t row0, int64_t key0, double (&acc)[kTileRows][kTileCols],
                                         BiasSmem<Real> &smem) {
    const fa_forward_args &forward = args.forward;
    const fa_sequence seq = fa_sequence_at(&forward, b);
    const int64_t row_end = fa_min(row0 + kBlock, seq.len_q), h_kv = h / (forward.heads_q / forward.heads_kv);
    if (row0 >= row_end || fa_visible_keys(&forward, &seq, row_end - 1).hi <= key0 ||
        fa_visible_keys(&forward, &seq, row0).lo >= key0 + kBlock)
        return;
    const Rows<Real> q(forward.q, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim);
    const Rows<Real> k(forward.k, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim);
    const Rows<Real> v(forward.v, forward.dtype, seq.batch_index, h_kv, seq.row_k, forward.head_dim_v);
    const Rows<Real> d_o(args.d_o, forward.dtype, seq.batch_index, h, seq.row_q, forward.head_dim_v);
    const RowValues<Real> of_row = row_values<Real>(forward, seq, plan, b, h);
    const ScoreRule<Real> rule(forward, seq, b, h);
    const Real scale = static_cast<Real>(forward.softmax_scale), keep = static_cast<Real>(1 / (1 - forward.dropout_p));
    const Lanes<4> lane;
    Real acc_s[kTileRows][kTileCols] = {}, acc_dp[kTileRows][kTileCols] = {};
    multiply_chunks<false>(acc_s, smem.chunks, q, row0, row_end, k, key0, seq.len_k, lane);
    multiply_chunks<false>(acc_dp, smem.chunks, d_o, row0, row_end, v, key0, seq.len_k, lane, blind_rows(plan, of_row));
    const int64_t thread_row = row0 + lane.row<kTileRows>(0), col0 = key0 + lane.x;
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
        const int64_t row = thread_row + lane.kLanesY * i;
        if (row >= row_end) continue;
        const Span keys = span_of(forward, seq, row, col0, false);
#pragma unroll
        for (int j = 0; j < kTileCols; ++j)
            acc[i][j] += gradient_of<true>(rule, acc_s[i][j], acc_dp[i][j], row, col0, lane.kLanesX * j, keys, scale,
                                           of_row.lse[row], of_row.correction[row], of_row.delta[row], keep);
    }
}

template <typename Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    fused_backward_bias(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan) {
    __shared__ BiasSmem<Real> smem;
    const BiasShape shape(args);
    const int64_t chunk = blockIdx.x % plan.bias_chunks, tile = blockIdx.x / plan.bias_chunks;
    const int64_t n_tile = tile % shape.n_tiles, m_tile = tile / shape.n_tiles % shape.m_tiles;
    const int64_t head = tile / shape.n_tiles / shape.m_tiles % shape.sizes[1];
    const int64_t batch = tile / shape.n_tiles / shape.m_tiles / shape.sizes[1];
    double acc[kTileRows][kTileCols] = {};
    const int64_t end = (chunk + 1) * shape.terms() / plan.bias_chunks;
    for (int64_t term = chunk * shape.terms() / plan.bias_chunks; term < end; ++term) {
        // Along an axis that is summed the tile's own index is 0, along the others the term's.
        const int64_t n = term % shape.sums[3] + n_tile, m = term / shape.sums[3] % shape.sums[2] + m_tile;
        const int64_t h = term / shape.sums[3] / shape.sums[2] % shape.sums[1] + head;
        const int64_t b = term / shape.sums[3] / shape.sums[2] / shape.sums[1] + batch;
        add_tile<Real>(args, plan, b, h, m * kBlock, n * kBlock, acc, smem);
    }

    const Lanes<4> lane;
    __syncthreads(); // the last chunk of rows was read: the sums take its place
#pragma unroll
    for (int i = 0; i < kTileRows; ++i)
#pragma unroll
        for (int j = 0; j < kTileCols; ++j) smem.sums[lane.row<kTileRows>(i)][lane.col(j)] = acc[i][j];
    __syncthreads(); // they are there
    const bool sums_rows = shape.sizes[2] == 1, sums_keys = shape.sizes[3] == 1;
    if (sums_rows && threadIdx.x < kBlock)
        for (int r = 1; r < kBlock; ++r) smem.sums[0][threadIdx.x] += smem.sums[r][threadIdx.x];
    __syncthreads(); // rows are added up
    if (sums_keys && threadIdx.x < (sums_rows ? 1 : kBlock))
        for (int c = 1; c < kBlock; ++c) smem.sums[threadIdx.x][0] += smem.sums[threadIdx.x][c];
    __syncthreads(); // keys are added up
    const int64_t rows = fa_min(kBlock, shape.sizes[2] - m_tile * kBlock);
    const int64_t keys = fa_min(kBlock, shape.sizes[3] - n_tile * kBlock);
    for (int64_t i = threadIdx.x; i < rows * keys; i += kThreads) {
        const int64_t row = m_tile * kBlock + i / keys, key = n_tile * kBlock + i % keys;
        const double sum = smem.sums[i / keys][i % keys];
        const int64_t element = ((batch * shape.sizes[1] + head) * shape.sizes[2] + row) * shape.sizes[3] + key;
        if (plan.bias_sums)
            plan.bias_sums[chunk * shape.elements() + element] = sum;
        else
            shape.put(args.d_bias, element, sum);
    }
}

__global__ void __launch_bounds__(kAddThreads)
    add_bias_chunks(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan) {
    const BiasShape shape(args);
    const int64_t element = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
    if (element >= shape.elements()) return;
    double sum = 0;
    for (int64_t chunk = 0; chunk < plan.bias_chunks; ++chunk)
        sum += plan.bias_sums[chunk * shape.elements() + element];
    shape.put(args.d_bias, element, sum);
}

void fa_fused_plan_bias(const fa_backward_args *args, BackwardPlan *plan, fa_arena *arena) {
    plan->bias_chunks = 1;
    plan->bias_sums = nullptr;
    if (!args->d_bias.data) return;
    const BiasShape shape(*args);
    const int64_t tiles = fa_max(shape.tiles(), 1);
    plan->bias_chunks = fa_max(fa_min(fa_ceil_div(kEnoughBlocks, tiles), shape.terms()), 1);
    if (plan->bias_chunks > 1)
        plan->bias_sums = static_cast<double *>(
            fa_take(arena, sizeof(double) * static_cast<size_t>(plan->bias_chunks * shape.elements())));
}

fa_status fa_fused_backward_bias(const fa_backward_args *args, const BackwardPlan &plan) {
    const BiasShape shape(*args);
    const cudaStream_t stream = fa_stream(&args->forward);
    const auto kernel = args->forward.dtype == FA_FLOAT64 ? fused_backward_bias<double> : fused_backward_bias<float>;
    FA_CHECK(fa_launch("fused backward, d_bias", kernel, shape.tiles() * plan.bias_chunks, kThreads, 0, stream, *args,
                       plan));
    if (plan.bias_chunks == 1) return FA_OK;
    return fa_launch("fused backward, the sum of d_bias", add_bias_chunks, fa_ceil_div(shape.elements(), kAddThreads),
                     kAddThreads, 0, stream, *args, plan);
}
