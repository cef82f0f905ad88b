// Tiles in shared memory and the two matrix products of attention, on CUDA cores.
//
// A block is four warps, one above the other; the lanes of a warp stand as kLanesY x kLanesX (lane = kLanesX * y + x). A
// thread holds kRows rows of a product and kCols of its columns:
//
//   rows     kLanesY (kRows warp + i) + y            apart by kLanesY, or
//            kVec (kLanesY i' + y) + i''             in blocks of kVec, i = kVec i' + i'', from kLanesY kRows warp on
//   columns  x + kLanesX j                           of scores (multiply_nt)
//            kVec (x + kLanesX j') + j''             of outputs (multiply_nn), j = kVec j' + j''
//
// Both products read vectors of 16 bytes along the last axis of both operands. A row of a tile is 16 bytes longer than
// its data: the 8 rows that a quarter of a warp reads then lie in different banks. Lanes that read the same address cost
// less: a row costs one cycle of shared memory where all lanes read it, two where each quarter reads its own; a column
// costs four. So many lanes share rows (kLanesY = 1) where a thread has few columns.
#ifndef FA_TILE_CUH
#define FA_TILE_CUH

#include "cuda/ptx/cp_async.cuh"
#include "cuda/rows.cuh"

constexpr size_t kHopperSharedBytes = 226 * 1024; // of an SM of Hopper, less what blocks reserve

enum { kThreads = 128, kWarps = 4, kBlocksPerSm = 2 }; // one block computes while the other waits for its copies

template <int kY>
struct Lanes {
    static constexpr int kLanesY = kY, kLanesX = 32 / kY;
    int warp, y, x;
    __device__ Lanes() : warp(threadIdx.x / 32), y(threadIdx.x % 32 / kLanesX), x(threadIdx.x % kLanesX) {}
    template <int kRows>
    __device__ __forceinline__ int row(int i) const {
        return kLanesY * (kRows * warp + i) + y;
    }
    __device__ __forceinline__ int col(int j) const { return x + kLanesX * j; }
    // Rows in blocks: the thread's first, and how far the others are from it.
    template <typename Real, int kRows>
    __device__ __forceinline__ int block_row() const {
        return kLanesY * kRows * warp + kVec<Real> * y;
    }
    template <typename Real>
    static constexpr __device__ __forceinline__ int block_step(int i) {
        return kVec<Real> * kLanesY * (i / kVec<Real>)+i % kVec<Real>;
    }
};

// kHeight rows of kWidth elements. kByElement: stored so by 4 x 8 lanes, which rows 8 banks apart keep from meeting.
template <typename Real, int kHeight, int kWidth, bool kByElement = false>
struct Tile {
    static constexpr int kStride = kWidth + (kByElement ? 2 : 1) * kVec<Real>;
    alignas(16) Real x[kHeight * kStride];
    __device__ __forceinline__ Real *row(int r) { return x + r * kStride; }
    __device__ __forceinline__ const Real *row(int r) const { return x + r * kStride; }
};

// acc[i][j] += A row . B row over `depth` elements, in order: a sum of products has the same bits in every tile shape.
// The operand of which a thread has fewer rows stays in registers while the other one passes.
template <bool kBlocks, int kUnroll = 4, typename Real, int kRows, int kCols, typename TileA, typename TileB, int kY>
__device__ __forceinline__ void multiply_nt(Real (&acc)[kRows][kCols], const TileA &a, const TileB &b, int depth,
                                            const Lanes<kY> &lane) {
    const Real *a_row = a.row(kBlocks ? lane.template block_row<Real, kRows>() : lane.template row<kRows>(0));
    const Real *b_row = b.row(lane.col(0));
    const auto load_a = [&](int i, int d) {
        return vec_at(a_row + (kBlocks ? Lanes<kY>::template block_step<Real>(i) : kY * i) * TileA::kStride + d);
    };
    const auto load_b = [&](int j, int d) { return vec_at(b_row + Lanes<kY>::kLanesX * j * TileB::kStride + d); };
#pragma unroll kUnroll
    for (int d = 0; d < depth; d += kVec<Real>) {
        constexpr bool kKeepA = kRows <= kCols;
        Vec<Real> kept[kKeepA ? kRows : kCols];
#pragma unroll
        for (int n = 0; n < (kKeepA ? kRows : kCols); ++n) kept[n] = kKeepA ? load_a(n, d) : load_b(n, d);
#pragma unroll
        for (int m = 0; m < (kKeepA ? kCols : kRows); ++m) {
            const Vec<Real> passing = kKeepA ? load_b(m, d) : load_a(m, d);
#pragma unroll
            for (int c = 0; c < kVec<Real>; ++c)
#pragma unroll
                for (int n = 0; n < (kKeepA ? kRows : kCols); ++n) {
                    Real &sum = acc[kKeepA ? n : m][kKeepA ? m : n];
                    sum = fma(passing.x[c], kept[n].x[c], sum);
                }
        }
    }
}

// acc[i] += A row * B, over kDepth rows of B.
template <int kDepth, int kUnroll = 4, typename Real, int kRows, int kCols, typename TileA, typename TileB, int kY>
__device__ __forceinline__ void multiply_nn(Real (&acc)[kRows][kCols], const TileA &a, const TileB &b,
                                            const Lanes<kY> &lane) {
    const Real *a_row = a.row(lane.template row<kRows>(0)), *b_col = b.row(0) + lane.x * kVec<Real>;
    const auto load_a = [&](int i, int d) { return vec_at(a_row + kY * i * TileA::kStride + d); };
    const auto load_b = [&](int j, int d) {
        return vec_at(b_col + d * TileB::kStride + j * Lanes<kY>::kLanesX * kVec<Real>);
    };
    constexpr int kVecs = kCols / kVec<Real>;
#pragma unroll kUnroll
    for (int d = 0; d < kDepth; d += kVec<Real>) {
        if constexpr (kRows <= kCols) { // A stays
            Vec<Real> a_vec[kRows];
#pragma unroll
            for (int i = 0; i < kRows; ++i) a_vec[i] = load_a(i, d);
#pragma unroll
            for (int n = 0; n < kVec<Real> * kVecs; ++n) {
                const int u = n / kVecs, j = n % kVecs;
                const Vec<Real> b_vec = load_b(j, d + u);
#pragma unroll
                for (int c = 0; c < kVec<Real>; ++c)
#pragma unroll
                    for (int i = 0; i < kRows; ++i) {
                        Real &sum = acc[i][j * kVec<Real> + c];
                        sum = fma(a_vec[i].x[u], b_vec.x[c], sum);
                    }
            }
        } else { // B stays
            Vec<Real> b_vec[kVec<Real>][kVecs];
#pragma unroll
            for (int n = 0; n < kVec<Real> * kVecs; ++n) b_vec[n / kVecs][n % kVecs] = load_b(n % kVecs, d + n / kVecs);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const Vec<Real> a_vec = load_a(i, d);
#pragma unroll
                for (int u = 0; u < kVec<Real>; ++u)
#pragma unroll
                    for (int n = 0; n < kCols; ++n)
                        acc[i][n] = fma(a_vec.x[u], b_vec[u][n / kVec<Real>].x[n % kVec<Real>], acc[i][n]);
            }
        }
    }
}

// ---- between global memory and tiles --------------------------------------------------------------------------------

// tile = rows [row0, row0 + kHeight) of src from column col0 on; 0 beyond row_end, beyond src's width, and in rows whose
// `row_lse` is +inf (they have no gradient, whatever stands in d_o). A group of copies: cp_async_wait, then a barrier.
template <typename Real, int kHeight, int kWidth>
__device__ __forceinline__ void load_tile(Tile<Real, kHeight, kWidth> &tile, const Rows<Real> &src, int64_t row0,
                                          int64_t row_end, int col0 = 0, const Real *row_lse = nullptr) {
    const auto is_row = [&](int64_t row) { return row < row_end && !(row_lse && row_lse[row] == infinity(Real())); };
    if (src.vectors && fa_dtype_bytes(src.dtype) == sizeof(Real)) {
        constexpr int kVecs = kWidth / kVec<Real>, kStep = kThreads / kVecs; // a thread stays in its column
        const int col = threadIdx.x % kVecs * kVec<Real>;
        int r = threadIdx.x / kVecs;
        const char *from = src.at(row0 + r, col0 + col);
        Real *to = tile.row(r) + col;
        const bool is_col = col0 + col < src.width;
#pragma unroll
        for (int n = 0; n < fa_ceil_div(kHeight, kStep); ++n, r += kStep) {
            if (kHeight % kStep != 0 && r >= kHeight) break;
            const bool valid = is_col && is_row(row0 + r);
            cp_async_16(to + n * kStep * Tile<Real, kHeight, kWidth>::kStride, valid ? from : src.data, valid);
            from += kStep * src.stride * static_cast<int>(sizeof(Real));
        }
    } else if (src.vectors && sizeof(Real) == 4) { // eight 16-bit elements make two vectors
        constexpr int kEights = kWidth / 8, kStep = kThreads / kEights, kBatch = 4; // kBatch loads are in flight
        const int col = threadIdx.x % kEights * 8;
        const char *from = src.at(row0 + threadIdx.x / kEights, col0 + col);
        const bool is_col = col0 + col < src.width;
        for (int first = threadIdx.x / kEights; first < kHeight; first += kBatch * kStep) {
            uint4 bits[kBatch];
#pragma unroll
            for (int n = 0; n < kBatch; ++n, from += kStep * src.stride * 2) {
                const int r = first + n * kStep;
                bits[n] = make_uint4(0, 0, 0, 0);
                if (r < kHeight && is_col && is_row(row0 + r)) bits[n] = *reinterpret_cast<const uint4 *>(from);
            }
#pragma unroll
            for (int n = 0; n < kBatch; ++n) {
                const int r = first + n * kStep;
                if (r >= kHeight) break;
                float4 *to = reinterpret_cast<float4 *>(tile.row(r) + col);
                const float2 a = unpack(bits[n].x, src.dtype), b = unpack(bits[n].y, src.dtype);
                const float2 c = unpack(bits[n].z, src.dtype), d = unpack(bits[n].w, src.dtype);
                to[0] = make_float4(a.x, a.y, b.x, b.y);
                to[1] = make_float4(c.x, c.y, d.x, d.y);
            }
        }
    } else {
#pragma unroll 4
        for (int index = threadIdx.x; index < kHeight * kWidth; index += kThreads) {
            const int r = index / kWidth, col = col0 + index % kWidth;
            tile.row(r)[index % kWidth] = col < src.width && is_row(row0 + r)
                                              ? load<Real>(src.data, src.dtype, (row0 + r) * src.stride + col)
                                              : Real(0);
        }
    }
    cp_async_commit();
}

// ---- rows too wide for shared memory ----------------------------------------------------------------------------------

// A piece of the head_dim axis of both operands.
enum { kChunk = 32 };
template <typename Real, int kHeight, int kWidth>
struct Chunks {
    Tile<Real, kHeight, kChunk> a;
    Tile<Real, kWidth, kChunk> b;
};

// acc = A rows . B rows over the whole of their width, chunk by chunk: the bits of multiply_nt over whole rows.
template <bool kBlocks, int kUnroll = 1, typename Real, int kRows, int kCols, int kHeight, int kWidth, int kY>
__device__ __forceinline__ void multiply_chunks(Real (&acc)[kRows][kCols], Chunks<Real, kHeight, kWidth> &chunks,
                                                const Rows<Real> &a, int64_t a0, int64_t a_end, const Rows<Real> &b,
                                                int64_t b0, int64_t b_end, const Lanes<kY> &lane,
                                                const Real *a_lse = nullptr, const Real *b_lse = nullptr) {
    for (int d = 0; d < a.width; d += kChunk) {
        __syncthreads(); // the chunk before was read
        load_tile(chunks.a, a, a0, a_end, d, a_lse);
        load_tile(chunks.b, b, b0, b_end, d, b_lse);
        cp_async_wait<0>();
        __syncthreads(); // the chunk is there
        multiply_nt<kBlocks, kUnroll>(acc, chunks.a, chunks.b, kChunk, lane);
    }
}

// ---- launch: T is a row of a tile table ---------------------------------------------------------------------------------

// Slices of kDim columns of an output `width` wide, each made by blocks of its own.
template <typename T>
static __host__ __device__ __forceinline__ int64_t slices_of(int64_t width) {
    return T::kWide ? fa_ceil_div(width, T::kDim) : 1;
}

// Whether the device has the shared memory that the tile takes; every device has that of a wide one.
template <typename T, typename... Params>
static bool tile_fits(void (*kernel)(Params...)) {
    static_assert(sizeof(typename T::Smem) <= (T::kWide ? kAnySharedBytes : kHopperSharedBytes / kBlocksPerSm));
    return fa_allow_shared(reinterpret_cast<const void *>(kernel), sizeof(typename T::Smem));
}

template <typename T, typename... Params>
static fa_status launch_tile(const char *what, void (*kernel)(Params...), int64_t blocks, cudaStream_t stream,
                             const std::common_type_t<Params> &...params) {
    return fa_launch(what, kernel, blocks, kThreads, sizeof(typename T::Smem), stream, params...);
}

#endif
