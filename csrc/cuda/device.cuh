// What every kernel on the GPU shares: one element at a time between memory and arithmetic, and the rule of the scores.
// Real is float, or double for float64 inputs.
#ifndef FA_DEVICE_CUH
#define FA_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.cuh"
#include "cuda/ptx/math.cuh"
#include "philox.h"

template <typename Element>
constexpr fa_dtype kDtype = sizeof(Element) == 8              ? FA_FLOAT64
                            : sizeof(Element) == 4            ? FA_FLOAT32
                            : std::is_same_v<Element, __half> ? FA_FLOAT16
                                                              : FA_BFLOAT16;

template <typename Real>
__device__ __forceinline__ Real load(const void *base, fa_dtype dtype, int64_t index) {
    switch (dtype) {
    case FA_FLOAT32: return static_cast<const float *>(base)[index];
    case FA_FLOAT64: return static_cast<Real>(static_cast<const double *>(base)[index]);
    case FA_FLOAT16: return __half2float(static_cast<const __half *>(base)[index]);
    default: return __bfloat162float(static_cast<const __nv_bfloat16 *>(base)[index]);
    }
}

template <typename Real>
__device__ __forceinline__ void store(void *base, fa_dtype dtype, int64_t index, Real x) {
    switch (dtype) {
    case FA_FLOAT32: static_cast<float *>(base)[index] = static_cast<float>(x); break;
    case FA_FLOAT64: static_cast<double *>(base)[index] = x; break;
    case FA_FLOAT16: static_cast<__half *>(base)[index] = __float2half_rn(static_cast<float>(x)); break;
    default: static_cast<__nv_bfloat16 *>(base)[index] = __float2bfloat16_rn(static_cast<float>(x)); break;
    }
}

template <typename Real>
__device__ __forceinline__ Real load_per_head(const fa_per_head &t, int64_t b, int64_t h) {
    return load<Real>(t.data, t.dtype, b * t.stride_b + h * t.stride_h);
}

__device__ __forceinline__ float infinity(float) { return __int_as_float(0x7F800000); }
__device__ __forceinline__ double infinity(double) { return __longlong_as_double(0x7FF0000000000000); }

__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

// e^x for x <= 0 (-inf gives 0).
__device__ __forceinline__ float exp_of(float x) { return ex2_approx(x * 1.44269504f); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

// Rounded on its own: the compiler fuses it with no sum, so that every kernel gives a score the same bits.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

// What happens to softmax_scale * q_i.k_j of head (b, h) before softmax, and to P after it.
template <typename Real>
struct ScoreRule {
    int64_t offset; // query i stands at key position i + offset
    Real softcap, softcap_inverse, slope;
    const fa_bias *bias; // NULL: none
    int64_t bias_at;     // index of bias (b, h, 0, 0)
    uint64_t dropout_seed;
    uint32_t dropout_offset, dropout_head, dropout_threshold; // threshold 0: no dropout

    __device__ ScoreRule(const fa_forward_args &args, const fa_sequence &seq, int64_t b, int64_t h)
        : offset(seq.len_k - seq.len_q), softcap(static_cast<Real>(args.softcap)),
          softcap_inverse(args.softcap > 0 ? static_cast<Real>(1 / args.softcap) : Real(0)),
          slope(args.alibi_slopes.data ? load_per_head<Real>(args.alibi_slopes, b, h) : Real(0)),
          bias(args.bias.data ? &args.bias : nullptr), bias_at(b * args.bias.stride_b + h * args.bias.stride_h),
          dropout_seed(args.dropout_p > 0 ? static_cast<uint64_t>(*args.dropout_seed) : 0),
          dropout_offset(args.dropout_offset), dropout_head(static_cast<uint32_t>(b * args.heads_q + h)),
          dropout_threshold(fa_dropout_threshold(args.dropout_p)) {}

    __device__ __forceinline__ Real distance(int64_t row, int64_t col) const {
        const int64_t d = row + offset - col;
        return static_cast<Real>(d < 0 ? -d : d);
    }

    // s: softmax_scale * q.k. Returns the score; *cap_slope is its derivative by s.
    __device__ __forceinline__ Real score(Real s, int64_t row, int64_t col, Real *cap_slope) const {
        *cap_slope = 1;
        if (softcap > 0) {
            const Real t = tanh_of(product(s, softcap_inverse));
            s = product(softcap, t);
            *cap_slope = 1 - t * t;
        }
        if (bias) s += load<Real>(bias->data, bias->dtype, bias_at + row * bias->stride_q + col * bias->stride_k);
        if (slope != 0) s -= product(slope, distance(row, col));
        return s;
    }

    __device__ __forceinline__ bool keeps(int64_t row, int64_t col) const {
        return dropout_threshold == 0 ||
               fa_dropout_keeps(dropout_seed, dropout_offset, dropout_head, row, col, dropout_threshold);
    }
};

// x, which all lanes of the warp have: told to the compiler, it needs no register of theirs.
__device__ __forceinline__ int warp_uniform(int x) { return __shfl_sync(~0u, x, 0); }

// A row's sum or maximum over the kLanesX neighbours that share it.
template <int kLanesX, typename Real>
__device__ __forceinline__ Real row_sum_of(Real x) {
    for (int step = 1; step < kLanesX; step *= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
template <int kLanesX, typename Real>
__device__ __forceinline__ Real row_max_of(Real x) {
    for (int step = 1; step < kLanesX; step *= 2) x = max(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

#endif
