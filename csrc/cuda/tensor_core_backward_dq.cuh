// The end of the backward on tensor cores: from sums of dQ to d_q.
#ifndef FA_TENSOR_CORE_BACKWARD_DQ_CUH
#define FA_TENSOR_CORE_BACKWARD_DQ_CUH

#include "cuda/tensor_core_backward_tile.cuh"

// dQ = scale dQ', a block of queries each; 0 where no key was visible.
template <typename T>
__global__ void __launch_bounds__(T::kThreads)
    tensor_core_round_dq(const __grid_constant__ fa_backward_args args, const __grid_constant__ QueryGradient dq) {
    using Element = typename T::Element;
    using M = Mma<Element>;
    const fa_forward_args &forward = args.forward;
    const fa_place place = fa_place_of(blockIdx.x, forward.heads_q, fa_ceil_div(forward.seqlen_q, T::kBlockM));
    const fa_sequence seq = fa_sequence_at(&forward, place.b);
    const int64_t m0 = place.part * T::kBlockM;
    if (m0 >= seq.len_q) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int query_warp = warp % T::kQueryWarps, column_warp = warp / T::kQueryWarps;
    const int64_t block = place.head * dq.blocks + first_query_block<T::kBlockM>(forward, seq, place.b) + place.part;
    const float scale = static_cast<float>(forward.softmax_scale);
    const float4 *sums = reinterpret_cast<const float4 *>(dq.sums + block * dq.chains * T::kBlockM * T::kDim) +
                         warp * (T::kQueryTiles * 2 * T::kColumnTiles) * 32 + lane;
    bool is_there[kMostChains];
#pragma unroll
    for (int chain = 0; chain < kMostChains; ++chain)
        is_there[chain] = chain < dq.chains && dq.turns[block * dq.chains + chain] > 0;
    if constexpr (T::kFloat) {
        const Rows<float> d_q(args.d_q, FA_FLOAT32, seq.batch_index, place.head, seq.row_q, forward.head_dim);
#pragma unroll
        for (int i = 0; i < T::kQueryTiles; ++i)
#pragma unroll
            for (int j = 0; j < T::kColumnTiles; ++j) {
                float x[2][4] = {};
#pragma unroll
                for (int chain = 0; chain < kMostChains; ++chain)
#pragma unroll
                    for (int side = 0; side < 2; ++side)
                        if (is_there[chain]) {
                            const float4 y =
                                sums[chain * T::kBlockM * T::kDim / 4 + ((i * T::kColumnTiles + j) * 2 + side) * 32];
                            x[side][0] += y.x, x[side][1] += y.y, x[side][2] += y.z, x[side][3] += y.w;
                        }
                const int column = 16 * (column_warp * T::kColumnTiles + j) + lane % 4 * 4;
#pragma unroll
                for (int upper = 0; upper < 2; ++upper) {
                    const int64_t row = m0 + 16 * (query_warp * T::kQueryTiles + i) + 8 * upper + lane / 4;
                    const float4 four = M::four_columns(x[0], x[1], upper);
                    if (row < seq.len_q && column < forward.head_dim)
                        *reinterpret_cast<float4 *>(d_q.at(row, column)) =
                            make_float4(four.x * scale, four.y * scale, four.z * scale, four.w * scale);
                }
            }
    } else {
        __shared__ SwizzledTile<Element, T::kBlockM, T::kDim> tile;
#pragma unroll
        for (int i = 0; i < T::kQueryTiles; ++i)
#pragma unroll
            for (int j = 0; j < 2 * T::kColumnTiles; ++j) {
                float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
                for (int chain = 0; chain < kMostChains; ++chain)
                    if (is_there[chain]) {
                        const float4 y = sums[chain * T::kBlockM * T::kDim / 4 + (i * 2 * T::kColumnTiles + j) * 32];
                        x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
                    }
                const int row = 16 * (query_warp * T::kQueryTiles + i) + lane / 4;
                const int column = 2 * (j / 2 * T::kColumnWarps + column_warp) + j % 2;
                store_shared(shared_address(tile.at(row, column)) + lane % 4 * 4,
                             M::round_pair(x.x * scale, x.y * scale));
                store_shared(shared_address(tile.at(row + 8, column)) + lane % 4 * 4,
                             M::round_pair(x.z * scale, x.w * scale));
            }
        __syncthreads(); // all of the block is there
        const Rows<float> d_q(args.d_q, kDtype<Element>, seq.batch_index, place.head, seq.row_q, forward.head_dim);
        constexpr int kColumns = T::kDim / 8;
        for (int index = threadIdx.x; index < T::kBlockM * kColumns; index += T::kThreads) {
            const int r = index / kColumns, column = index % kColumns;
            if (m0 + r < seq.len_q && column * 8 < forward.head_dim)
                *reinterpret_cast<uint4 *>(d_q.at(m0 + r, column * 8)) =
                    *reinterpret_cast<const uint4 *>(tile.at(r, column));
        }
    }
}

#endif
