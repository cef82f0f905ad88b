// d_bias = dS, summed over the axes that bias broadcasts: a block owns a tile of d_bias and walks over what it is the sum
// of, which is cut into chunks where there are fewer tiles than the GPU has room for blocks; the chunks are then added in
// order. Sums are float64: a bias that broadcasts over everything is the sum of B Hq Lq Lk terms that nearly cancel.
#include "cuda/backward_bias.cuh"
#include "cuda/fused_backward.cuh"

enum { kTileRows = 4, kTileCols = 8, kBlock = 64 };

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
                                           of_row.lse[row], of_row.correction_at(row), of_row.delta[row], keep);
    }
}

template <typename Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    fused_backward_bias(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan) {
    __shared__ BiasSmem<Real> smem;
    const BiasShape shape(args, kBlock, kBlock);
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

fa_status fa_fused_backward_bias(const fa_backward_args *args, const BackwardPlan &plan) {
    const BiasShape shape(*args, kBlock, kBlock);
    const auto kernel = args->forward.dtype == FA_FLOAT64 ? fused_backward_bias<double> : fused_backward_bias<float>;
    FA_CHECK(fa_launch("fused backward, d_bias", kernel, shape.tiles() * plan.bias_chunks, kThreads, 0,
                       fa_stream(&args->forward), *args, plan));
    return fa_backward_add_bias_chunks(args, plan);
}
