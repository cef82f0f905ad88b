// The second kernel of decoding: lines that several blocks have chunks of. A block has one of them, if there is one at its
// place, and folds what the line's blocks have told, from left to right (decode_sum.cuh), for some rows: a thread has four
// columns of one, a warp works on its own.
#ifndef FA_DECODE_MERGE_CUH
#define FA_DECODE_MERGE_CUH

#include "cuda/decode_rows.cuh"
#include "cuda/ptx/dependent.cuh"

enum { kMergeThreads = 128, kMergeAtOnce = 8 };

// What each chunk of a row is folded by, and its l.
template <typename Real>
struct RowFolds {
    Real left[kMostOfLine + 2], right[kMostOfLine + 2], sum[kMostOfLine + 2];
    Real max; // of the line

    // By one warp: a lane has a chunk. The largest score so far comes by way of the lanes before.
    template <int kDim>
    __device__ __forceinline__ void find(const DecodePlan &plan, int place, const ToldLine &line, int row) {
        const int lane = threadIdx.x % 32;
        Real before = -infinity(Real());
        for (int n0 = 0; n0 < line.chunks; n0 += 32) {
            const int n = n0 + lane;
            Real own = -infinity(Real()), own_sum = 0;
            if (n < line.chunks) {
                const Real *of_row = ToldChunk<Real, kDim>(plan, place, line.first_chunk + n).max_and_sum + 2 * row;
                own = of_row[0], own_sum = of_row[1];
            }
            Real most = own;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const Real other = __shfl_up_sync(~0u, most, step);
                if (lane >= step) most = fmax(most, other);
            }
            most = fmax(most, before);
            Real previous = __shfl_up_sync(~0u, most, 1);
            if (lane == 0) previous = before;
            if (n < line.chunks) {
                const FoldFactors<Real> by(previous, own, most);
                left[n] = by.left, right[n] = by.right, sum[n] = own_sum;
            }
            before = __shfl_sync(~0u, most, 31);
        }
        if (lane == 0) max = before;
    }
};

template <typename Real, int kDim>
struct MergeSmem {
    static constexpr int kRowsOfWarp = kDim < 128 ? 128 / kDim : 1;
    RowFolds<Real> folds[kMergeThreads / 32][kRowsOfWarp];
};

template <typename Real, int kDim, int kKeys, int kRows>
__global__ void __launch_bounds__(kMergeThreads)
    decode_merge(const __grid_constant__ fa_kvcache_args args, const __grid_constant__ DecodePlan plan) {
    constexpr int kQuads = kDim / 4, kRowsOfWarp = MergeSmem<Real, kDim>::kRowsOfWarp, kVecs = 4 / kVec<Real>;
    __shared__ MergeSmem<Real, kDim> smem;

    warm_constants(args, plan);
    let_dependents_start();
    const int place = static_cast<int>(blockIdx.x), warp = static_cast<int>(threadIdx.x) / 32;
    const int flat = static_cast<int>(blockIdx.y) * kMergeThreads + static_cast<int>(threadIdx.x);
    const int row = flat / kQuads, quad = flat % kQuads, warp_row = (flat & -32) / kQuads;

    // Of one sequence what will be told is known while the first kernel runs: that has waited for the length before it let
    // this one start.
    ToldLine line;
    const bool is_known = args.batch == 1 && plan.merges_lines;
    if (is_known) line = Partition<kKeys>(args, plan).only_line(place);
    wait_for_prerequisites();
    if (!is_known) line = told_line(plan, place);
    const int head = plan.m_blocks.quotient(line.line);
    const int row0 = (line.line - head * static_cast<int>(plan.m_blocks.value)) * kRows;
    const int rows = min(plan.rows - row0, plan.chunk_rows);
    if (line.chunks == 0 || warp_row >= rows) return;

    const bool is_there = row < rows;
    const Real *const first = ToldChunk<Real, kDim>(plan, place, line.first_chunk).rows + flat * 4;
    const int64_t step = ToldChunk<Real, kDim>::bytes(plan) / static_cast<int64_t>(sizeof(Real));
    Vec<Real> told[kMergeAtOnce][kVecs];
    const auto load = [&](int n0) {
#pragma unroll
        for (int n = 0; n < kMergeAtOnce; ++n)
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                if (is_there && n0 + n < line.chunks) told[n][v] = vec_at(first + (n0 + n) * step + v * kVec<Real>);
    };
    load(0);
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r)
        if (warp_row + r < rows) smem.folds[warp][r].template find<kDim>(plan, place, line, warp_row + r);
    __syncwarp(); // folds are there
    if (!is_there) return;
    const RowFolds<Real> &by = smem.folds[warp][row - warp_row];
    Part<Real> sum = Part<Real>::empty();
    for (int n0 = 0; n0 < line.chunks; n0 += kMergeAtOnce) {
        if (n0 > 0) load(n0);
#pragma unroll
        for (int n = 0; n < kMergeAtOnce; ++n) {
            if (n0 + n >= line.chunks) break;
            const Real left = by.left[n0 + n], right = by.right[n0 + n];
            sum.sum = fma_of(by.sum[n0 + n], right, product(sum.sum, left));
#pragma unroll
            for (int c = 0; c < 4; ++c)
                sum.o[c] = fma_of(told[n][c / kVec<Real>].x[c % kVec<Real>], right, product(sum.o[c], left));
        }
    }
    sum.max = by.max;
    store_result(args, sum, line.b, head, QueryRow(plan, head, row0 + row), [&](int c) { return 4 * quad + c; });
}

#endif
