// The end of the forward on tensor cores: from sums of a warp's rows to o and lse.
#ifndef FA_TENSOR_CORE_FORWARD_STORE_CUH
#define FA_TENSOR_CORE_FORWARD_STORE_CUH

#include "cuda/ptx/sync.cuh"
#include "cuda/tensor_core_forward_tile.cuh"

// O / l and lse of a warp's rows, when its block has read Q, whose place in shared memory O takes.
template <typename T, bool kModified>
__device__ __forceinline__ void store_rows(typename T::template Smem<kModified> &smem, const fa_forward_args &args,
                                           const ForwardPlan &plan, float (&acc_o)[T::kMTiles][T::kWarpDim / 8][4],
                                           const float (&row_max)[T::kMTiles][2], float (&row_sum)[T::kMTiles][2],
                                           float unit, bool is_far) {
    using M = Mma<typename T::Element>;
    constexpr int kMTiles = T::kMTiles, kOTiles = T::kWarpDim / 8;
    constexpr bool kFloat = kDtype<typename T::Element> == FA_FLOAT32;
    const int thread = thread_index_again(), warp = thread / 32, lane = thread % 32;
    const int row_warp = warp / T::kColWarps, col_warp = warp % T::kColWarps;
    if constexpr (T::kColWarps == 2) {
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                row_sum[i][half] = row_sum_of<4>(row_sum[i][half]);
                if (lane % 4 == 0)
                    smem.exchange.of_row[col_warp][row_warp * T::kWarpRows + 16 * i + 8 * half + lane / 4] =
                        row_sum[i][half];
            }
        barrier_wait(1 + row_warp, 64); // both sums are there, Q was read
    }
    const int block_row0 = smem.row0, block_row_end = smem.row_end, head = smem.head;
    float natural = static_cast<float>(args.softmax_scale); // a score of 1
    if constexpr (kModified) natural = plan.scores.unit;
    LanePlace place_o(smem.q, row_warp * T::kWarpRows + lane / 4, 2 * col_warp);
    place_o.address += lane % 4 * 4;
    int own_row = T::kBlockM; // each of a row's four lanes tells the lse of one of their rows
    float own_sum = 0, own_most = 0;
    static_assert(2 * kMTiles <= 4);
    const bool has_sink = args.sinks.data != nullptr;
    const float sink = has_sink ? load_per_head<float>(args.sinks, 0, head) : -infinity(0.0f);
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = row_warp * T::kWarpRows + 16 * i + 8 * half + lane / 4; // in the block
            float sum, most = row_max[i][half] * natural;
            if constexpr (T::kColWarps == 2)
                sum = row_sum[i][half] + smem.exchange.of_row[1 - col_warp][r];
            else
                sum = row_sum_of<4>(row_sum[i][half]);
            // P is of the rounded shift, the sink and lse are of m.
            const float shift = product(row_max[i][half], unit);
            float rescale =
                is_far || most == -infinity(0.0f) ? 1.0f : ex2_approx(-fmaf(row_max[i][half], unit, -shift));
            sum *= rescale;
            if (has_sink && sink != -infinity(0.0f)) {
                const float higher = fmaxf(most, sink), factor = exp_of(most - higher);
                sum = sum * factor + exp_of(sink - higher);
                rescale *= factor;
                most = higher;
            }
            const float normalise = sum == 0 ? 0 : rescale * plan.keep * rcp_approx(sum); // a NaN stays one
            if constexpr (kFloat) {
                const Rows<float> o(args.o, FA_FLOAT32, smem.seq.batch_index, head, smem.seq.row_q, args.head_dim_v);
#pragma unroll
                for (int j = 0; j < kOTiles; j += 2) {
                    const float4 x = M::four_columns(acc_o[i][j], acc_o[i][j + 1], half);
                    const int column = 8 * j + lane % 4 * 4;
                    if (block_row0 + r < block_row_end && column < args.head_dim_v)
                        *reinterpret_cast<float4 *>(o.at(block_row0 + r, column)) =
                            make_float4(x.x * normalise, x.y * normalise, x.z * normalise, x.w * normalise);
                }
            } else {
#pragma unroll
                for (int j = 0; j < kOTiles; ++j) {
                    store_shared(
                        place_o.at(16 * i + 8 * half, T::kColWarps * (j / 2 * 2) + j % 2),
                        M::round_pair(acc_o[i][j][2 * half] * normalise, acc_o[i][j][2 * half + 1] * normalise));
                }
            }
            if (lane % 4 == 2 * i + half) own_row = r, own_sum = sum, own_most = most;
        }
    if (col_warp == 0 && own_row < T::kBlockM && block_row0 + own_row < block_row_end)
        store(args.lse.data, FA_FLOAT32,
              fa_row_offset(&args.lse, smem.seq.batch_index, head, smem.seq.row_q + block_row0 + own_row),
              own_sum == 0 ? -infinity(0.0f) : own_most + logf(own_sum));
    if constexpr (!kFloat) {
        if constexpr (T::kColWarps == 2)
            barrier_wait(1 + row_warp, 64); // the rows are there
        else
            __syncwarp();
        const Rows<float> o(args.o, kDtype<typename T::Element>, smem.seq.batch_index, head, smem.seq.row_q,
                            args.head_dim_v);
        // A lane stays in its column; four of its rows at a time.
        constexpr int kColumns = T::kDim / 8, kStep = 32 * T::kColWarps / kColumns;
        const int index = col_warp * 32 + lane, column = index % kColumns;
        const int r = row_warp * T::kWarpRows + index / kColumns, rows_left = block_row_end - block_row0 - r;
        if (index >= kStep * kColumns || column * 8 >= args.head_dim_v) return;
        auto *to = o.at(block_row0 + r, column * 8);
#pragma unroll
        for (int first = 0; first < T::kWarpRows / kStep; first += 4) {
            uint4 x[4];
#pragma unroll
            for (int n = 0; n < 4; ++n)
                x[n] = *reinterpret_cast<const uint4 *>(smem.q.at(r + (first + n) * kStep, column));
#pragma unroll
            for (int n = 0; n < 4; ++n, to += kStep * args.o.stride_l * sizeof(typename T::Element))
                if ((first + n) * kStep < rows_left) *reinterpret_cast<uint4 *>(to) = x[n];
        }
    }
}

#endif
