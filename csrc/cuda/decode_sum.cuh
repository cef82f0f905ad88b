// Sums over a line's keys whose bits depend on nothing but the line.
//
// What a set of keys contributes to a row is (m, l, O): the largest score, sum of e^(s - m), sum of e^(s - m) v. Two of them
// are folded by bringing both to the larger m, and as that rounds, the order counts. It is fixed: one block sums up a chunk
// (decode_plan.cuh), turn by turn, and the chunks of a line are folded from left to right, by the block that has all of
// them, or by decode_merge.
#ifndef FA_DECODE_SUM_CUH
#define FA_DECODE_SUM_CUH

#include "cuda/decode_plan.cuh"

// Not inlined: where they stood in the code would decide which of their products and sums are fused, and so the bits.
static __device__ __noinline__ double exp2_of(double x) { return exp2(x); }
static __device__ __noinline__ double log2_of(double x) { return log2(x); }
__device__ __forceinline__ float exp2_of(float x) { return ex2_approx(x); }
__device__ __forceinline__ float log2_of(float x) { return log2f(x); }
__device__ __forceinline__ float fma_of(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fma_of(double a, double b, double c) { return __fma_rn(a, b, c); }

// What exponents are taken relative to: where no key has been seen 0.
template <typename Real>
__device__ __forceinline__ Real shift_of(Real max) {
    return max == -infinity(Real()) ? 0 : max;
}

// What two sums are multiplied by when the right one is folded into the left.
template <typename Real>
struct FoldFactors {
    Real left, right;
    __device__ __forceinline__ FoldFactors(Real left_max, Real right_max, Real max)
        : left(exp2_of(left_max - shift_of(max))), right(exp2_of(right_max - shift_of(max))) {}
    __device__ __forceinline__ Real fold(Real x, Real y) const { return fma_of(y, right, product(x, left)); }
};

// Some columns of O and their row's m (of scores times log2 e) and l.
template <typename Real, int kColumns = 4>
struct Part {
    Real max, sum, o[kColumns];

    static __device__ __forceinline__ Part empty() { return {-infinity(Real()), 0, {}}; }
    __device__ __forceinline__ void fold(const Part &right) {
        const Real most = max > right.max ? max : right.max;
        const FoldFactors<Real> by(max, right.max, most);
        sum = by.fold(sum, right.sum);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) o[c] = by.fold(o[c], right.o[c]);
        max = most;
    }
};

#endif
