// Tiles in shared memory and matrix products on the tensor cores: Mma<Element> is one warp's view of both.
//
// A tile's rows are cut into columns of 16 bytes, and column c of row r stands where column c ^ swizzle(r) would: the
// eight rows that ldmatrix reads at once, and the four or eight that other reads touch, then lie in different banks.
//
// A product takes kDepth of its inner axis at a time, two columns of 16 bytes in either dtype:
//
//   load_a              A[i][k] = tile[i][k]          load_b              B[k][n] = tile[n][k]
//   load_a_transposed   A[i][k] = tile[k][i]          load_b_transposed   B[k][n] = tile[k][n]
//   from_scores         A = accumulators, rounded to Element
//
// Where the inner axis runs along rows of a tile, float32 takes them in the order 0 2 4 6 1 3 5 7, that of the columns of
// an accumulator: from_scores and *_transposed go together, and load_a with load_b.
#ifndef FA_MMA_TILE_CUH
#define FA_MMA_TILE_CUH

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/rows.cuh"

// A member of what stands in shared memory, in the kernels that need it.
struct Nothing {};
template <bool kIsThere, typename Member>
using Where = std::conditional_t<kIsThere, Member, Nothing>;

template <typename Element_, int kHeight_, int kWidth_>
struct SwizzledTile {
    using Element = Element_;
    static constexpr int kHeight = kHeight_, kWidth = kWidth_, kPerColumn = 16 / sizeof(Element);
    static constexpr int kColumns = kWidth / kPerColumn, kRowBytes = kWidth * sizeof(Element);
    static constexpr int kSwizzle = kColumns % 8 == 0 ? 7 : 3; // columns that change places
    static_assert(kColumns % 4 == 0, "rows of whole groups of columns");
    alignas(1024) Element x[kHeight * kWidth];

    static __device__ __forceinline__ int swizzle(int row) { return kSwizzle == 7 ? row & 7 : row >> 1 & 3; }
    __device__ __forceinline__ Element *at(int row, int column) {
        return x + row * kWidth + (column ^ swizzle(row)) * kPerColumn;
    }
};

// A lane's own place in a tile, from which multiples of 8 rows lead on, and columns whose bits the place's own has not.
template <typename Tile>
struct LanePlace {
    uint32_t address;
    __device__ LanePlace(Tile &tile, int row, int column) : address(shared_address(tile.at(row, column))) {}
    __device__ __forceinline__ uint32_t at(int rows, int columns) const {
        return (address ^ ((columns & Tile::kSwizzle) * 16)) + rows * Tile::kRowBytes +
               (columns & ~Tile::kSwizzle) * 16;
    }
};

template <typename Element_>
struct Mma { // float16, bfloat16; float32: mma_float.cuh
    using Element = Element_;
    static constexpr int kDepth = 16, kColumnsIn16 = 2; // columns of 16 bytes behind 16 elements
    struct A {
        uint32_t x[4];
    };
    struct B {
        uint32_t x[2];
    };

    // Where a lane reads: row0 and column0 of the matrix, in the tile.
    template <typename Tile>
    static __device__ __forceinline__ LanePlace<Tile> place_a(Tile &tile, int row0 = 0, int column0 = 0) {
        const int lane = threadIdx.x % 32;
        return LanePlace<Tile>(tile, row0 + lane % 16, column0 + lane / 16);
    }
    template <typename Tile>
    static __device__ __forceinline__ LanePlace<Tile> place_b(Tile &tile, int row0 = 0, int column0 = 0) {
        const int lane = threadIdx.x % 32;
        return LanePlace<Tile>(tile, row0 + lane % 8 + lane / 16 * 8, column0 + lane / 8 % 2);
    }
    template <typename Tile>
    static __device__ __forceinline__ LanePlace<Tile> place_a_transposed(Tile &tile, int row0 = 0, int column0 = 0) {
        return place_b(tile, row0, column0);
    }
    template <typename Tile>
    static __device__ __forceinline__ LanePlace<Tile> place_b_transposed(Tile &tile, int row0 = 0, int column0 = 0) {
        return place_a(tile, row0, column0);
    }

    // i, k, n: elements from the place on, multiples of 16.
    template <typename Tile>
    static __device__ __forceinline__ void load_a(A &a, const LanePlace<Tile> &place, int i, int k) {
        ldmatrix_4(a.x, place.at(i, k / 8));
    }
    template <typename Tile>
    static __device__ __forceinline__ void load_a_transposed(A &a, const LanePlace<Tile> &place, int i, int k) {
        ldmatrix_4_transposed(a.x, place.at(k, i / 8));
    }
    template <typename Tile>
    static __device__ __forceinline__ void load_b(B (&b)[2], const LanePlace<Tile> &place, int k, int n) {
        split(b, [&](uint32_t (&r)[4]) { ldmatrix_4(r, place.at(n, k / 8)); });
    }
    template <typename Tile>
    static __device__ __forceinline__ void load_b_transposed(B (&b)[2], const LanePlace<Tile> &place, int k, int n) {
        split(b, [&](uint32_t (&r)[4]) { ldmatrix_4_transposed(r, place.at(k, n / 8)); });
    }

    static __device__ __forceinline__ uint32_t round_pair(float low, float high) {
        return pack(low, high, kDtype<Element>);
    }
    // Two accumulators side by side.
    static __device__ __forceinline__ void from_scores(A (&a)[1], const float (&left)[4], const float (&right)[4]) {
        a[0].x[0] = round_pair(left[0], left[1]);
        a[0].x[1] = round_pair(left[2], left[3]);
        a[0].x[2] = round_pair(right[0], right[1]);
        a[0].x[3] = round_pair(right[2], right[3]);
    }

    static __device__ __forceinline__ void multiply(float (&c)[4], const A &a, const B &b) {
        if constexpr (kDtype<Element> == FA_FLOAT16)
            mma_f16(c, a.x, b.x);
        else
            mma_bf16(c, a.x, b.x);
    }

private:
    template <typename Load>
    static __device__ __forceinline__ void split(B (&b)[2], const Load &load) {
        uint32_t r[4];
        load(r);
        b[0].x[0] = r[0], b[0].x[1] = r[1];
        b[1].x[0] = r[2], b[1].x[1] = r[3];
    }
};

// acc = A rows . B rows, over kWidth elements.
template <int kWidth, int kMTiles, int kNTiles, typename TileA, typename TileB>
__device__ __forceinline__ void multiply_rows(float (&acc)[kMTiles][kNTiles][4], const LanePlace<TileA> &place_a,
                                              const LanePlace<TileB> &place_b) {
    using M = Mma<typename TileA::Element>;
#pragma unroll
    for (int d = 0; d < kWidth; d += M::kDepth) {
        typename M::A a[kMTiles];
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) M::load_a(a[i], place_a, 16 * i, d);
#pragma unroll
        for (int n = 0; n < 8 * kNTiles; n += 16) {
            typename M::B b[2];
            M::load_b(b, place_b, d, n);
#pragma unroll
            for (int i = 0; i < kMTiles; ++i) {
                M::multiply(acc[i][n / 8], a[i], b[0]);
                M::multiply(acc[i][n / 8 + 1], a[i], b[1]);
            }
        }
    }
}

// acc += A B, over 16 rows of B's tile from row k on, and every kEvery-th 16 of its columns.
template <int kEvery = 1, int kMTiles, int kOTiles, typename Tile>
__device__ __forceinline__ void add_product(float (&acc)[kMTiles][kOTiles][4],
                                            const typename Mma<typename Tile::Element>::A (&a)[kMTiles][1],
                                            const LanePlace<Tile> &place_b, int k) {
    using M = Mma<typename Tile::Element>;
#pragma unroll
    for (int n = 0; n < 8 * kOTiles; n += 16) {
        typename M::B b[2];
        M::load_b_transposed(b, place_b, k, kEvery * n);
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) {
            M::multiply(acc[i][n / 8], a[i][0], b[0]);
            M::multiply(acc[i][n / 8 + 1], a[i][0], b[1]);
        }
    }
}

// ---- from global memory -----------------------------------------------------------------------------------------------

// Copies rows [row0, row0 + kHeight) of a head into a tile; 0 beyond row_end, beyond the width, and where `lse` of a row is
// +inf (it has no gradient, whatever stands in d_o). In kCopies parts, so that they can be issued between products. They
// belong to a group: cp_async_commit, cp_async_wait, then a barrier.
template <int kBlockThreads, typename Tile, int kBeside = 1>
struct TileCopy {
    // A thread stays in its columns of 16 bytes: of these the next one, which needs no address of its own, is kAcross
    // further on. Whole groups of 8 rows, which the swizzle repeats, where there are so many.
    static constexpr int kAcross = Tile::kColumns / kBeside;
    static_assert(kBeside == 1 || kAcross % 8 == 0, "columns beside each other change places alike");
    static constexpr int kAtOnce = kBlockThreads / kAcross, kEights = kAtOnce >= 8 ? kAtOnce / 8 * 8 : kAtOnce;
    static constexpr int kStep = kEights < Tile::kHeight ? kEights : Tile::kHeight;
    static constexpr int kCopies = Tile::kHeight / kStep * kBeside;
    static_assert(kStep > 0 && Tile::kHeight % kStep == 0);

    const char *from;
    int64_t row_bytes;
    int row, column;
    int rows_left, columns_left; // from this thread's first on; rows: 0 beyond the width

    __device__ __forceinline__ TileCopy(const char *head, int64_t stride, int64_t width, int row0, int row_end)
        : row_bytes(stride * static_cast<int64_t>(sizeof(typename Tile::Element))),
          row(static_cast<int>(threadIdx.x) / kAcross), column(static_cast<int>(threadIdx.x) % kAcross),
          rows_left(column * Tile::kPerColumn < width ? row_end - row0 - row : 0),
          columns_left(static_cast<int>(width) / Tile::kPerColumn - column) {
        from = head + (row0 + row) * row_bytes + column * 16;
    }
    // Parts 0, 1, 2 ...: each once, in order.
    __device__ __forceinline__ void part(Tile &tile, int n, const float *lse = nullptr) {
        const int step = n / kBeside * kStep, beside = n % kBeside * kAcross;
        const bool is_row = step < rows_left && !(lse && lse[row + step] == infinity(0.0f));
        const bool is_there = is_row && (beside == 0 || beside < columns_left);
        auto *to = kStep % 8 == 0 ? tile.at(row, column) + step * Tile::kWidth : tile.at(row + step, column);
        if (kStep * kAcross == kBlockThreads || row < kStep)
            cp_async_16(to + beside * Tile::kPerColumn, from + beside * 16, is_there);
        if (n % kBeside == kBeside - 1) from += kStep * row_bytes;
    }
    __device__ __forceinline__ void all(Tile &tile, const float *lse = nullptr) {
#pragma unroll
        for (int n = 0; n < kCopies; ++n) part(tile, n, lse);
    }
};

// words[n] of lane t of four becomes words[t] of lane n.
__device__ __forceinline__ void transpose_quads(uint32_t (&words)[4]) {
    const bool is_odd = threadIdx.x & 1, is_upper = threadIdx.x & 2;
    const auto exchange = [&](bool has_first, int step, uint32_t &first, uint32_t &second) {
        const uint32_t other = __shfl_xor_sync(~0u, has_first ? first : second, step);
        (has_first ? first : second) = other;
    };
    exchange(is_odd, 1, words[0], words[1]);
    exchange(is_odd, 1, words[2], words[3]);
    exchange(is_upper, 2, words[0], words[2]);
    exchange(is_upper, 2, words[1], words[3]);
}

#endif
