// Float32 on the tensor cores: an element is the sum of two tf32 numbers, x = hi + lo, x y = lo hi' + hi lo' + hi hi'.
//
// hi has the 11 bits that the tensor cores read and is x rounded, so that lo = x - hi is exact and has 12 bits, of which one is
// cut, and either sign. (hi cut alone makes every product too small.) What fits 11 bits, as bfloat16 and 0 do, is hi.
//
// The tensor cores cut sums, too, always toward zero: a long chain of products drifts. So a chain begins at zero, is
// short and takes lo hi' and hi lo' first, or in accumulators of their own, and float32 additions join the chains.
// Errors of o against float64 (normal inputs, 2000 keys, head_dim 128), by a model that cuts the sum once in each
// product of 8:
//
//                                                             largest    mean
//   float32 fma                                               2.7e-7     2.5e-8
//   lo hi', hi lo' and hi hi' in one chain over all keys      3.8e-6     5.8e-7
//   hi hi' in a chain of its own                              1.2e-6     1.9e-7
//   chains of 32 elements and of 16 keys, as here             9e-8       1.1e-8
//
// Infinite elements, and those that rounding makes so, become NaN.
#ifndef FA_MMA_FLOAT_CUH
#define FA_MMA_FLOAT_CUH

#include "cuda/mma_tile.cuh"

// Two accumulators made by load_b_transposed hold its columns in this order: `left` 0 2 4 ... 14, `right` 1 3 5 ... 15.
// So a thread has four that lie side by side, 4 t to 4 t + 3: four_columns().
template <>
struct Mma<float> {
    using Element = float;
    static constexpr int kDepth = 8, kColumnsIn16 = 4;
    struct A {
        uint32_t hi[4], lo[4];
    };
    struct B {
        uint32_t hi[2], lo[2];
    };

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
    // The lane's words, one or two, of the even rows: column0 is a multiple of 4.
    template <typename Tile>
    static __device__ __forceinline__ LanePlace<Tile> place_a_transposed(Tile &tile, int row0 = 0, int column0 = 0) {
        return place_words(tile, row0, column0, threadIdx.x % 32 / 4);
    }
    template <typename Tile>
    static __device__ __forceinline__ LanePlace<Tile> place_b_transposed(Tile &tile, int row0 = 0, int column0 = 0) {
        return place_words(tile, row0, column0, threadIdx.x % 32 / 4 * 2);
    }

    // i, n: multiples of 16; k: of 8.
    template <typename Tile>
    static __device__ __forceinline__ void load_a(A &a, const LanePlace<Tile> &place, int i, int k) {
        uint32_t x[4];
        ldmatrix_4(x, place.at(i, k / 4));
#pragma unroll
        for (int n = 0; n < 4; ++n) split(x[n], a.hi[n], a.lo[n]);
    }
    template <typename Tile>
    static __device__ __forceinline__ void load_a_transposed(A &a, const LanePlace<Tile> &place, int i, int k) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int column = i / 4 + n % 2 * 2;
            split(load_shared(n < 2 ? place.at(k, column) : next_row(place, k, column)), a.hi[n], a.lo[n]);
        }
    }
    template <typename Tile>
    static __device__ __forceinline__ void load_b(B (&b)[2], const LanePlace<Tile> &place, int k, int n) {
        uint32_t x[4];
        ldmatrix_4(x, place.at(n, k / 4));
#pragma unroll
        for (int m = 0; m < 4; ++m) split(x[m], b[m / 2].hi[m % 2], b[m / 2].lo[m % 2]);
    }
    template <typename Tile>
    static __device__ __forceinline__ void load_b_transposed(B (&b)[2], const LanePlace<Tile> &place, int k, int n) {
        const uint2 even = load_shared_2(place.at(k, n / 4)), odd = load_shared_2(next_row(place, k, n / 4));
        split(even.x, b[0].hi[0], b[0].lo[0]), split(odd.x, b[0].hi[1], b[0].lo[1]);
        split(even.y, b[1].hi[0], b[1].lo[0]), split(odd.y, b[1].hi[1], b[1].lo[1]);
    }

    // Two accumulators side by side: kDepth of the inner axis each, in the order 0 2 4 6 1 3 5 7.
    static __device__ __forceinline__ void from_scores(A (&a)[2], const float (&left)[4], const float (&right)[4]) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int entry = n % 2 * 2 + n / 2;
            split(__float_as_uint(left[entry]), a[0].hi[n], a[0].lo[n]);
            split(__float_as_uint(right[entry]), a[1].hi[n], a[1].lo[n]);
        }
    }
    static __device__ __forceinline__ float4 four_columns(const float (&left)[4], const float (&right)[4], int half) {
        return make_float4(left[2 * half], right[2 * half], left[2 * half + 1], right[2 * half + 1]);
    }

    // c += term 0, 1, 2 of the product: lo hi, hi lo, hi hi.
    static __device__ __forceinline__ void multiply(float (&c)[4], const A &a, const B &b, int term) {
        mma_tf32(c, term == 0 ? a.lo : a.hi, term == 1 ? b.lo : b.hi);
    }

private:
    static __device__ __forceinline__ void split(uint32_t x, uint32_t &hi, uint32_t &lo) {
        hi = (x + 0x1000u) & 0xFFFFE000u;
        lo = rest(x, hi);
    }
    static __device__ __forceinline__ uint32_t rest(uint32_t x, uint32_t hi) {
        return __float_as_uint(__uint_as_float(x) - __uint_as_float(hi));
    }
    template <typename Tile>
    static __device__ __forceinline__ LanePlace<Tile> place_words(Tile &tile, int row0, int column0, int word) {
        static_assert(Tile::kSwizzle == 7, "next_row");
        LanePlace<Tile> place(tile, row0 + threadIdx.x % 4 * 2, column0 + word / 4);
        place.address += word % 4 * 4;
        return place;
    }
    // place.at() of the row after an even one: the same column stands where the last bit differs.
    template <typename Tile>
    static __device__ __forceinline__ uint32_t next_row(LanePlace<Tile> place, int rows, int columns) {
        place.address ^= 16;
        return place.at(rows, columns) + Tile::kRowBytes;
    }
};

// acc[i][j] = A rows . B rows, over kWidth elements. after(d) runs behind the products of elements d to d + 7.
template <int kWidth, int kMTiles, int kNTiles, typename PlaceA, typename PlaceB, typename After>
__device__ __forceinline__ void multiply_rows(float (&acc)[kMTiles][kNTiles][4], const PlaceA &place_a,
                                              const PlaceB &place_b, const After &after) {
    using M = Mma<float>;
    constexpr int kChain = 32; // elements
    float small[kMTiles][kNTiles][4] = {};
#pragma unroll
    for (int d0 = 0; d0 < kWidth; d0 += kChain) {
        float large[kMTiles][kNTiles][4] = {};
#pragma unroll
        for (int d = d0; d < d0 + kChain; d += M::kDepth) {
            M::A a[kMTiles];
            M::B b[kNTiles / 2][2];
#pragma unroll
            for (int i = 0; i < kMTiles; ++i) M::load_a(a[i], place_a, 16 * i, d);
#pragma unroll
            for (int n = 0; n < kNTiles / 2; ++n) M::load_b(b[n], place_b, d, 16 * n);
#pragma unroll
            for (int term = 0; term < 3; ++term)
#pragma unroll
                for (int j = 0; j < kNTiles; ++j)
#pragma unroll
                    for (int i = 0; i < kMTiles; ++i)
                        M::multiply(term < 2 ? small[i][j] : large[i][j], a[i], b[j / 2][j % 2], term);
            after(d);
        }
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int j = 0; j < kNTiles; ++j)
#pragma unroll
                for (int entry = 0; entry < 4; ++entry)
                    acc[i][j][entry] = d0 == 0 ? large[i][j][entry] : acc[i][j][entry] + large[i][j][entry];
    }
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int entry = 0; entry < 4; ++entry) acc[i][j][entry] += small[i][j][entry];
}

// acc += A B over 16 rows of B's tile from row k on: A has 8 columns for each of its parts.
template <int kEvery = 1, int kMTiles, int kOTiles, typename PlaceB>
__device__ __forceinline__ void add_product(float (&acc)[kMTiles][kOTiles][4], const Mma<float>::A (&a)[kMTiles][2],
                                            const PlaceB &place_b, int k) {
    static_assert(kEvery == 1, "columns side by side");
    using M = Mma<float>;
    constexpr int kTogether = kOTiles % 4 == 0 ? 4 : 2; // chains that run side by side
#pragma unroll
    for (int j0 = 0; j0 < kOTiles; j0 += kTogether) {
        M::B b[2][kTogether / 2][2];
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
            for (int n = 0; n < kTogether / 2; ++n)
                M::load_b_transposed(b[part][n], place_b, k + M::kDepth * part, 8 * j0 + 16 * n);
        float sum[kMTiles][kTogether][4] = {};
#pragma unroll
        for (int step = 0; step < 6; ++step) // terms 0, 1 of both parts, term 2 of both
#pragma unroll
            for (int j = 0; j < kTogether; ++j)
#pragma unroll
                for (int i = 0; i < kMTiles; ++i)
                    M::multiply(sum[i][j], a[i][step % 2], b[step % 2][j / 2][j % 2], step / 2);
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int j = 0; j < kTogether; ++j)
#pragma unroll
                for (int entry = 0; entry < 4; ++entry) acc[i][j0 + j][entry] += sum[i][j][entry];
    }
}

#endif
