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
#include "cuda/ptx/cp_async.cuh"

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
#pragma unroll 1
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
#pragma unroll 1
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

// The two floats behind 32 bits of a 16-bit dtype.
__device__ __forceinline__ float2 unpack(uint32_t bits, fa_dtype dtype) {
    if (dtype == FA_FLOAT16) return __half22float2(reinterpret_cast<const __half2 &>(bits));
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u)};
}
__device__ __forceinline__ uint32_t pack(float low, float high, fa_dtype dtype) {
    if (dtype == FA_FLOAT16) {
        const __half2 halves = __floats2half2_rn(low, high);
        return reinterpret_cast<const uint32_t &>(halves);
    }
    const __nv_bfloat162 halves = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t &>(halves);
}

// Rows of one head of one sequence in global memory. `vectors`: rows are made of 16 bytes, aligned.
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
          vectors((reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride * fa_dtype_bytes(type)) |
                   static_cast<uintptr_t>(columns * fa_dtype_bytes(type))) %
                      16 ==
                  0) {}

    __device__ __forceinline__ char *at(int64_t row, int col) const {
        return data + (row * stride + col) * fa_dtype_bytes(dtype);
    }

    // Columns [col, col + kVec) of a row, cut at the width.
    __device__ __forceinline__ void store_vec(int64_t row, int col, const Vec<Real> &v) const {
        if (col >= width) return;
        if (vectors && fa_dtype_bytes(dtype) == sizeof(Real)) {
            *reinterpret_cast<Vec<Real> *>(at(row, col)) = v;
        } else if (vectors && kVec<Real> == 4) {
            *reinterpret_cast<uint2 *>(at(row, col)) =
                make_uint2(pack(float(v.x[0]), float(v.x[1]), dtype),
                           pack(float(v.x[kVec<Real> - 2]), float(v.x[kVec<Real> - 1]), dtype));
        } else {
#pragma unroll
            for (int c = 0; c < kVec<Real>; ++c)
                if (col + c < width) store(data, dtype, row * stride + col + c, v.x[c]);
        }
    }
};

// tile = rows [row0, row0 + kHeight) of src from column col0 on; 0 beyond row_end, beyond src's width, and in rows whose
// `row_lse` is +inf (they have no gradient, whatever stands in d_o). A group of copies: cp_async_wait, then a barrier.
template <typename Real, int kHeight, int kWidth>
__device__ __forceinline__ void load_tile(Tile<Real, kHeight, kWidth> &tile, const Rows<Real> &src, int64_t row0,
                                          int64_t row_end, int col0 = 0, const Real *row_lse = nullptr) {
    const auto is_valid = [&](int64_t row, int col) {
        return row < row_end && col < src.width && !(row_lse && row_lse[row] == infinity(Real()));
    };
    if (src.vectors && fa_dtype_bytes(src.dtype) == sizeof(Real)) {
        constexpr int kVecs = kWidth / kVec<Real>;
#pragma unroll 4
        for (int index = threadIdx.x; index < kHeight * kVecs; index += kThreads) {
            const int r = index / kVecs, col = col0 + index % kVecs * kVec<Real>;
            const bool valid = is_valid(row0 + r, col);
            cp_async_16(tile.row(r) + index % kVecs * kVec<Real>, valid ? src.at(row0 + r, col) : src.data, valid);
        }
    } else if (src.vectors && sizeof(Real) == 4) {      // eight 16-bit elements make two vectors
        constexpr int kEights = kWidth / 8, kBatch = 4; // kBatch loads are in flight
        for (int first = threadIdx.x; first < kHeight * kEights; first += kBatch * kThreads) {
            uint4 bits[kBatch];
#pragma unroll
            for (int n = 0; n < kBatch; ++n) {
                const int index = first + n * kThreads, r = index / kEights, col = col0 + index % kEights * 8;
                bits[n] = make_uint4(0, 0, 0, 0);
                if (index < kHeight * kEights && is_valid(row0 + r, col))
                    bits[n] = *reinterpret_cast<const uint4 *>(src.at(row0 + r, col));
            }
#pragma unroll
            for (int n = 0; n < kBatch; ++n) {
                const int index = first + n * kThreads;
                if (index >= kHeight * kEights) break;
                float4 *to = reinterpret_cast<float4 *>(tile.row(index / kEights) + index % kEights * 8);
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
            tile.row(r)[index % kWidth] =
                is_valid(row0 + r, col) ? load<Real>(src.data, src.dtype, (row0 + r) * src.stride + col) : Real(0);
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
template <typename Real, int kRows, int kCols, int kHeight, int kWidth>
__device__ __forceinline__ void multiply_chunks(Real (&acc)[kRows][kCols], Chunks<Real, kHeight, kWidth> &chunks,
                                                const Rows<Real> &a, int64_t a0, int64_t a_end, const Rows<Real> &b,
                                                int64_t b0, int64_t b_end, const Lane &lane,
                                                const Real *a_lse = nullptr, const Real *b_lse = nullptr) {
    for (int d = 0; d < a.width; d += kChunk) {
        __syncthreads(); // the chunk before was read
        load_tile(chunks.a, a, a0, a_end, d, a_lse);
        load_tile(chunks.b, b, b0, b_end, d, b_lse);
        cp_async_wait<0>();
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
