// The second kernel of decoding: lines that several blocks have chunks of. A block has one of them, if there is one at its
// place, waits until all of its chunks are told, and folds them from left to right (decode_sum.cuh), for some rows: a thread
// has four columns of one, a warp works on its own.
#ifndef FA_DECODE_MERGE_CUH
#define FA_DECODE_MERGE_CUH

#include "cuda/decode_rows.cuh"
#include "cuda/ptx/dependent.cuh"

enum { kMergeThreads = 128, kMergeAtOnce = 8 };

// What a chunk of a row is folded by: the sums before it times left, its own times right; and its l.
template <typename Real>
struct alignas(4 * sizeof(Real)) Fold {
    Real left, right, sum;
};

// m and l of a row's chunks, each of them in a lane.
template <typename Real>
struct ChunkSums {
    Real max, sum;
    ChunkSums() = default;
    __device__ __forceinline__ ChunkSums(const Real *of_row, int64_t step, int n, int chunks)
        : max(-infinity(Real())), sum(0) {
        if (n < chunks) max = of_row[n * step], sum = of_row[n * step + 1];
    }
    // The chunk's fold. before: the largest m of the chunks before lane 0's; it becomes that of all.
    __device__ __forceinline__ Fold<Real> fold(Real &before) const {
        const int lane = threadIdx.x % 32;
        Real most = max;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const Real other = __shfl_up_sync(~0u, most, step);
            if (lane >= step) most = fmax(most, other);
        }
        most = fmax(most, before);
        Real previous = __shfl_up_sync(~0u, most, 1);
        if (lane == 0) previous = before;
        before = __shfl_sync(~0u, most, 31);
        const FoldFactors<Real> by(previous, max, most);
        return {by.left, by.right, sum};
    }
};

template <typename Real, int kDim>
struct MergeSmem {
    static constexpr int kRowsOfWarp = kDim < 128 ? 128 / kDim : 1;
    Fold<Real> folds[kMergeThreads / 32][kRowsOfWarp][kMostOfLine];
};

template <typename Real, int kDim, int kRows>
__device__ __forceinline__ void merge_line(MergeSmem<Real, kDim> &smem, const fa_kvcache_args &args,
                                           const DecodePlan &plan) {
    constexpr int kQuads = kDim / 4, kRowsOfWarp = MergeSmem<Real, kDim>::kRowsOfWarp, kVecs = 4 / kVec<Real>;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int flat = static_cast<int>(blockIdx.y) * kMergeThreads + static_cast<int>(threadIdx.x);
    const int warp_row = (flat & -32) / kQuads, quad = flat % kQuads;

    // All that can be known before the line's last chunk is told.
    const int place = static_cast<int>(blockIdx.x);
    const ToldLine line = load_told_line(plan, place);
    const int head = plan.m_blocks.quotient(line.line);
    const int row0 = (line.line - head * static_cast<int>(plan.m_blocks.value)) * kRows;
    const int rows = min(plan.rows - row0, plan.chunk_rows);
    if (line.chunks == 0 || warp_row >= rows) return;
    const int row = min(flat / kQuads, rows - 1);
    const QueryRow query(plan, head, row0 + row);
    const RowResult<Real> result(args, line.b, head, query);
    const Rows<Real> out(args.o, args.dtype, line.b, query.h, query.i, args.head_dim_v);
    const ToldChunk<Real, kDim> first(plan, place, line.first_chunk);
    const int64_t step = ToldChunk<Real, kDim>::bytes(plan) / static_cast<int64_t>(sizeof(Real));
    for (int n = lane; n < line.chunks; n += 32)
        wait_acquire(&told_flag(plan, place, line.first_chunk + n), kFolders / 32);
    __syncwarp(); // all of the line is told

    const auto sums_of = [&](int r, int n) {
        return ChunkSums<Real>(first.max_and_sum + 2 * min(warp_row + r, rows - 1), step, n, line.chunks);
    };
    ChunkSums<Real> sums[kRowsOfWarp];
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) sums[r] = sums_of(r, lane);
    Vec<Real> told[kMergeAtOnce][kVecs];
    const Real *const columns = first.rows + row * kDim + 4 * quad;
    const auto load = [&](int n0) {
#pragma unroll
        for (int n = 0; n < kMergeAtOnce; ++n)
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                if (n0 + n < line.chunks) told[n][v] = vec_at(columns + (n0 + n) * step + v * kVec<Real>);
    };
    load(0);
    Part<Real> part = Part<Real>::empty();
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
        Real most = -infinity(Real());
#pragma unroll 1
        for (int n = lane;; n += 32) {
            const Fold<Real> fold = sums[r].fold(most);
            if (n < line.chunks) smem.folds[warp][r][n] = fold;
            if (n - lane + 32 >= line.chunks) break;
            sums[r] = sums_of(r, n + 32);
        }
        if (row == warp_row + r) part.max = most;
    }
    __syncwarp(); // folds are there
    for (int n0 = 0; n0 < line.chunks; n0 += kMergeAtOnce) {
        if (n0 > 0) load(n0);
#pragma unroll
        for (int n = 0; n < kMergeAtOnce; ++n) {
            if (n0 + n >= line.chunks) break;
            const Fold<Real> by = smem.folds[warp][row - warp_row][n0 + n];
            part.sum = fma_of(by.sum, by.right, product(part.sum, by.left));
#pragma unroll
            for (int c = 0; c < 4; ++c)
                part.o[c] = fma_of(told[n][c / kVec<Real>].x[c % kVec<Real>], by.right, product(part.o[c], by.left));
        }
    }
    if (row < flat / kQuads) return; // there is none for this thread
    result.finish(args, part, quad == 0);
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
        Vec<Real> vec;
#pragma unroll
        for (int c = 0; c < kVec<Real>; ++c) vec.x[c] = part.o[v * kVec<Real> + c];
        out.store_vec(0, 4 * quad + v * kVec<Real>, vec);
    }
}

template <typename Real, int kDim, int kRows>
__global__ void __launch_bounds__(kMergeThreads)
    decode_merge(const __grid_constant__ fa_kvcache_args args, const __grid_constant__ DecodePlan plan) {
    __shared__ MergeSmem<Real, kDim> smem;
    warm_constants(args, plan);
    let_dependents_start();
    merge_line<Real, kDim, kRows>(smem, args, plan);
    if (blockIdx.x == 0 && blockIdx.y == 0) wait_for_prerequisites(); // nor is this kernel done before decode is
}

#endif
