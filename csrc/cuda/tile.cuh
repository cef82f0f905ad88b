// Tiles in shared memory and the two matrix products of attention, on CUDA cores.
//
// A block is four warps, one above the other; the lanes of a warp stand as 4 x 8 (lane = 8 * y + x). A thread holds kRows
// rows of a product and kCols of its columns:
//
//   rows     4 kRows * warp + y + 4 i          i < kRows     the lanes of one row are neighbours in a warp
//   columns  x + 8 j                           j < kCols     of scores (multiply_nt)
//            kVec (x + 8 j) + c                c < kVec      of outputs (multiply_nn), so that they are stored as vectors
//
// Both products read vectors of 16 bytes along the last axis of both operands. A row of a tile is 16 bytes longer than
// its data: the 8 rows that a quarter of a warp reads then lie in different banks.
#ifndef FA_TILE_CUH
#define FA_TILE_CUH

#include "cuda/device.cuh"

// Bytes of shared memory a block: two blocks to an SM of Hopper; what every GPU from sm_80 on has.
constexpr size_t kHalfOfHopper = 113 * 1024, kAnyGpu = 99 * 1024;

enum { kThreads = 128, kWarps = 4, kLanesY = 4, kLanesX = 8 };

template <typename Real>
constexpr int kVec = 16 / sizeof(Real);

template <typename Real>
struct alignas(16) Vec {
    Real x[kVec<Real>];
};

template <typename Real>
__device__ __forceinline__ Vec<Real> vec_at(const Real *p) {
    return *reinterpret_cast<const Vec<Real> *>(p);
}

struct Lane {
    int warp, y, x;
    __device__ Lane() : warp(threadIdx.x / 32), y(threadIdx.x % 32 / kLanesX), x(threadIdx.x % kLanesX) {}
    template <int kRows>
    __device__ __forceinline__ int row(int i) const {
        return kLanesY * (kRows * warp + i) + y;
    }
    __device__ __forceinline__ int col(int j) const { return x + kLanesX * j; }
};

// A tile of kHeight rows of kWidth elements, and of P or dS where `scores`: those are also stored by element, and rows
// 8 banks apart keep the 4 x 8 lanes of a warp from meeting.
template <typename Real, int kHeight, int kWidth, bool kScores = false>
struct Tile {
    static constexpr int kStride = kWidth + (kScores ? 2 : 1) * kVec<Real>;
    alignas(16) Real x[kHeight * kStride];
    __device__ __forceinline__ Real *row(int r) { return x + r * kStride; }
    __device__ __forceinline__ const Real *row(int r) const { return x + r * kStride; }
};

// acc[i][j] += A row . B row over `depth` elements, in order: a sum of products has the same bits in every tile shape.
template <typename Real, int kRows, int kCols, typename TileA, typename TileB>
__device__ __forceinline__ void multiply_nt(Real (&acc)[kRows][kCols], const TileA &a, const TileB &b, int depth,
                                            const Lane &lane) {
    const Real *a_row = a.row(lane.row<kRows>(0)), *b_row = b.row(lane.col(0));
#pragma unroll 2
    for (int d = 0; d < depth; d += kVec<Real>) {
        Vec<Real> a_vec[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) a_vec[i] = vec_at(a_row + i * kLanesY * TileA::kStride + d);
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
            const Vec<Real> b_vec = vec_at(b_row + j * kLanesX * TileB::kStride + d);
#pragma unroll
            for (int c = 0; c < kVec<Real>; ++c)
#pragma unroll
                for (int i = 0; i < kRows; ++i) acc[i][j] = fma(a_vec[i].x[c], b_vec.x[c], acc[i][j]);
        }
    }
}

// acc[i] += A row * B, over kDepth rows of B.
template <int kDepth, typename Real, int kRows, int kCols, typename TileA, typename TileB>
__device__ __forceinline__ void multiply_nn(Real (&acc)[kRows][kCols], const TileA &a, const TileB &b,
                                            const Lane &lane) {
    const Real *a_row = a.row(lane.row<kRows>(0)), *b_col = b.row(0) + lane.x * kVec<Real>;
#pragma unroll 2
    for (int d = 0; d < kDepth; d += kVec<Real>) {
        Vec<Real> a_vec[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) a_vec[i] = vec_at(a_row + i * kLanesY * TileA::kStride + d);
#pragma unroll
        for (int u = 0; u < kVec<Real>; ++u)
#pragma unroll
            for (int j = 0; j < kCols / kVec<Real>; ++j) {
                const Vec<Real> b_vec = vec_at(b_col + (d + u) * TileB::kStride + j * kLanesX * kVec<Real>);
#pragma unroll
                for (int c = 0; c < kVec<Real>; ++c)
#pragma unroll
                    for (int i = 0; i < kRows; ++i)
                        acc[i][j * kVec<Real> + c] = fma(a_vec[i].x[u], b_vec.x[c], acc[i][j * kVec<Real> + c]);
            }
    }
}

// ---- between global memory and tiles --------------------------------------------------------------------------------

// Rows of one head of one sequence in global memory. `vectors`: kVec elements at a time are aligned.
template <typename Real>
struct Rows {
    char *data;
    fa_dtype dtype;
    int64_t stride;
    int width;
    bool vectors;

    __device__ Rows(const fa_tensor &t, fa_dtype type, int64_t batch_index, int64_t head, int64_t row0, int64_t columns)
        : data(static_cast<char *>(t.data) + fa_row_offset(&t, batch_index, head, row0) * fa_dtype_bytes(type)),
          dtype(type), stride(t.stride_l), width(static_cast<int>(columns)),
          vectors(columns % kVec<Real> == 0 &&
                  (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride * fa_dtype_bytes(type))) %
                          (kVec<Real> * fa_dtype_bytes(type)) ==
                      0) {}

    __device__ __forceinline__ Vec<Real> load_vec(int64_t row, int col) const {
        const int64_t index = row * stride + col;
        Vec<Real> v;
        if constexpr (sizeof(Real) == 8) {
            v = *reinterpret_cast<const Vec<Real> *>(data + index * 8);
        } else if (dtype == FA_FLOAT32) {
            v = *reinterpret_cast<const Vec<Real> *>(data + index * 4);
        } else {
            const uint2 bits = *reinterpret_cast<const uint2 *>(data + index * 2);
            if (dtype == FA_FLOAT16) {
                const float2 low = __half22float2(reinterpret_cast<const __half2 &>(bits.x));
                const float2 high = __half22float2(reinterpret_cast<const __half2 &>(bits.y));
                v = {low.x, low.y, high.x, high.y};
            } else {
                v = {__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xFFFF0000u),
                     __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xFFFF0000u)};
            }
        }
        return v;
    }

    __device__ __forceinline__ void store_vec(int64_t row, int col, const Vec<Real> &v) const {
        const int64_t index = row * stride + col;
        if (vectors && fa_dtype_bytes(dtype) == sizeof(Real)) {
            if (col < width) *reinterpret_cast<Vec<Real> *>(data + index * sizeof(Real)) = v;
        } else {
#pragma unroll
            for (int c = 0; c < kVec<Real>; ++c)
                if (col + c < width) store(data, dtype, index + c, v.x[c]);
        }
    }
};

// tile = rows [row0, row0 + kHeight) of src from column col0 on; 0 beyond row_end, beyond src's width, and in rows whose
// `row_lse` is +inf (they have no gradient, whatever stands in d_o).
template <typename Real, int kHeight, int kWidth>
__device__ __forceinline__ void load_tile(Tile<Real, kHeight, kWidth> &tile, const Rows<Real> &src, int64_t row0,
                                          int64_t row_end, int col0 = 0, const Real *row_lse = nullptr) {
    constexpr int kVecs = kWidth / kVec<Real>, kBatch = 4; // kBatch loads are in flight
    const auto each = [&](auto &&load_at) {
        for (int first = threadIdx.x; first < kHeight * kVecs; first += kBatch * kThreads) {
            Vec<Real> v[kBatch];
#pragma unroll
            for (int n = 0; n < kBatch; ++n) {
                const int index = first + n * kThreads;
                const int64_t row = row0 + index / kVecs;
                const int col = col0 + index % kVecs * kVec<Real>;
                v[n] = {};
                if (index < kHeight * kVecs && row < row_end && col < src.width &&
                    !(row_lse && row_lse[row] == infinity(Real())))
                    v[n] = load_at(row, col);
            }
#pragma unroll
            for (int n = 0; n < kBatch; ++n) {
                const int index = first + n * kThreads;
                if (index < kHeight * kVecs)
                    *reinterpret_cast<Vec<Real> *>(tile.row(index / kVecs) + index % kVecs * kVec<Real>) = v[n];
            }
        }
    };
    if (src.vectors) {
        each([&](int64_t row, int col) { return src.load_vec(row, col); });
    } else {
        each([&](int64_t row, int col) {
            Vec<Real> v = {};
#pragma unroll
            for (int c = 0; c < kVec<Real>; ++c)
                if (col + c < src.width) v.x[c] = load<Real>(src.data, src.dtype, row * src.stride + col + c);
            return v;
        });
    }
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
template <typename Real, int kRows, int kCols, int kHeight, int kWidth>
__device__ __forceinline__ void multiply_chunks(Real (&acc)[kRows][kCols], Chunks<Real, kHeight, kWidth> &chunks,
                                                const Rows<Real> &a, int64_t a0, int64_t a_end, const Rows<Real> &b,
                                                int64_t b0, int64_t b_end, const Lane &lane,
                                                const Real *a_lse = nullptr, const Real *b_lse = nullptr) {
    for (int d = 0; d < a.width; d += kChunk) {
        __syncthreads(); // the chunk before was read
        load_tile(chunks.a, a, a0, a_end, d, a_lse);
        load_tile(chunks.b, b, b0, b_end, d, b_lse);
        __syncthreads(); // the chunk is there
        multiply_nt(acc, chunks.a, chunks.b, kChunk, lane);
    }
}

// ---- a row's lanes ----------------------------------------------------------------------------------------------------

// A row's sum or maximum over the eight lanes that share it.
template <typename Real>
__device__ __forceinline__ Real row_sum_of(Real x) {
    for (int step = 1; step < kLanesX; step *= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
template <typename Real>
__device__ __forceinline__ Real row_max_of(Real x) {
    for (int step = 1; step < kLanesX; step *= 2) x = max(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

#endif
