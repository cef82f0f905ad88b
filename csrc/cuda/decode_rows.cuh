// The ends of decoding: queries and new tokens come in, rotated by their positions; results go out.
#ifndef FA_DECODE_ROWS_CUH
#define FA_DECODE_ROWS_CUH

#include <cuda_fp8.h>

#include "cuda/decode_tree.cuh"
#include "cuda/rows.cuh"

__device__ __forceinline__ float e4m3_of(float x) { // as stored
    const __nv_fp8_storage_t bits = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, __NV_E4M3)));
}

// One element of a cache.
template <typename Real>
__device__ __forceinline__ Real load_cached(const void *base, fa_dtype dtype, int64_t index) {
    if (dtype != FA_FLOAT8_E4M3) return load<Real>(base, dtype, index);
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(static_cast<const uint8_t *>(base)[index], __NV_E4M3)));
}
template <typename Real>
__device__ __forceinline__ void store_cached(void *base, fa_dtype dtype, int64_t index, Real x) {
    if (dtype != FA_FLOAT8_E4M3) return store<Real>(base, dtype, index, x);
    static_cast<uint8_t *>(base)[index] = __nv_cvt_float_to_fp8(static_cast<float>(x), __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ float descale_of(const fa_per_head &t, int b, int h) {
    return t.data ? static_cast<const float *>(t.data)[b * t.stride_b + h * t.stride_h] : 1.0f;
}

// x = elements d0 to d0 + kCount of a row, 0 beyond its width; rotated, if `rotates`, as what stands at `position`.
template <int kCount, typename Real>
__device__ __forceinline__ void load_rotated(Real (&x)[kCount], const fa_kvcache_args &args, const fa_tensor &t,
                                             int64_t row_at, int d0, int width, bool rotates, int64_t position) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) x[c] = d0 + c < width ? load<Real>(t.data, args.dtype, row_at + d0 + c) : Real(0);
    const fa_rotary &rotary = args.rotary;
    if (!rotates || !rotary.cos || d0 >= rotary.dim) return;
    const int dim = static_cast<int>(rotary.dim), half = dim / 2;
    const int64_t table_row = fa_clamp(position, 0, rotary.positions - 1) * half;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
        const int d = d0 + c;
        if (d >= dim) break;
        const bool is_second = rotary.interleaved ? d % 2 : d >= half;
        const int pair = rotary.interleaved ? d / 2 : is_second ? d - half : d;
        const int other = rotary.interleaved ? d ^ 1 : is_second ? d - half : d + half;
        const Real cosine = load<Real>(rotary.cos, rotary.dtype, table_row + pair);
        const Real sine = load<Real>(rotary.sin, rotary.dtype, table_row + pair);
        const Real partner = load<Real>(t.data, args.dtype, row_at + other);
        x[c] = fma_of(x[c], cosine, product(is_second ? partner : -partner, sine));
    }
}

// A row of a line: query i of head h.
struct QueryRow {
    int i, h;
    __device__ __forceinline__ QueryRow(const DecodePlan &plan, int head, int row)
        : i(plan.group.quotient(row)), h((head - i) * static_cast<int>(plan.group.value) + row) {}
};

// Some columns of a row's result, from col on: o = O / l, lse = m + ln l, with the sink.
template <typename Real, int kColumns>
__device__ __forceinline__ void store_result(const fa_kvcache_args &args, Part<Real, kColumns> part, int b, int head_kv,
                                             const QueryRow &row, int col) {
    constexpr Real kLog2E = Real(1.44269504088896340736), kLn2 = Real(0.69314718055994530942);
    if (args.sinks.data) {
        const Part<Real, kColumns> sink = {load_per_head<Real>(args.sinks, 0, row.h) * kLog2E, 1, {}};
        if (sink.max != -infinity(Real())) part.fold(sink);
    }
    const Real scale = part.sum == 0 ? Real(0) : descale_of(args.v_descale, b, head_kv) / part.sum; // a NaN stays one
    const int64_t at = fa_row_offset(&args.o, b, row.h, row.i) + col;
    const int width = static_cast<int>(args.head_dim_v);
    if (args.lse.data && col == 0)
        store(args.lse.data, args.dtype == FA_FLOAT64 ? FA_FLOAT64 : FA_FLOAT32,
              fa_row_offset(&args.lse, b, row.h, row.i),
              part.sum == 0 ? -infinity(Real()) : (part.max + log2_of(part.sum)) * kLn2);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) part.o[c] *= scale;
    if constexpr (kColumns == 4) {
        char *to = static_cast<char *>(args.o.data) + at * fa_dtype_bytes(args.dtype);
        if (fa_dtype_bytes(args.dtype) == 2 && col + 4 <= width && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
            *reinterpret_cast<uint2 *>(to) = make_uint2(pack(float(part.o[0]), float(part.o[1]), args.dtype),
                                                        pack(float(part.o[2]), float(part.o[3]), args.dtype));
            return;
        }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
        if (col + c < width) store(args.o.data, args.dtype, at + c, part.o[c]);
}

// ---- partial results -----------------------------------------------------------------------------------------------------

// Slot of a block: rows of kDim columns, then each row's m and l. A block tells of two lines at most: of the one that it
// begins within, in the first slots, and of the left end of the one that it ends within, in the last kLevels.
template <typename Real, int kDim>
struct Slot {
    Real *rows;
    __device__ __forceinline__ Slot(const DecodePlan &plan, int block, int nth)
        : rows(static_cast<Real *>(plan.partial) +
               (static_cast<int64_t>(block) * plan.slots + nth) * plan.slot_rows * (kDim + 4)) {}
    __device__ __forceinline__ void store_part(const DecodePlan &plan, int row, int col, const Part<Real> &part) const {
        Real *to = rows + row * kDim + col;
#pragma unroll
        for (int c = 0; c < 4; c += kVec<Real>) {
            Vec<Real> vec;
#pragma unroll
            for (int n = 0; n < kVec<Real>; ++n) vec.x[n] = part.o[c + n];
            *reinterpret_cast<Vec<Real> *>(to + c) = vec;
        }
        Real *max_and_sum = rows + plan.slot_rows * kDim + row * 4;
        if (col == 0) max_and_sum[0] = part.max, max_and_sum[1] = part.sum, max_and_sum[2] = max_and_sum[3] = 0;
    }
};
__device__ __forceinline__ int first_slot(const DecodePlan &plan, bool begins_within) {
    return begins_within ? 0 : plan.slots - kLevels;
}

#endif
