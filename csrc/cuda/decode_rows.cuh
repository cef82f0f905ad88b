// The ends of decoding: queries and new tokens come in, rotated by their positions; results go out.
#ifndef FA_DECODE_ROWS_CUH
#define FA_DECODE_ROWS_CUH

#include <cuda_fp8.h>

#include "cuda/decode_sum.cuh"
#include "cuda/rows.cuh"

// As stored.
__device__ __forceinline__ uint8_t e4m3_of(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

// An element of a tensor or a cache; uint8_t: e4m3.
template <typename Real, typename Element>
__device__ __forceinline__ Real real_of(Element x) {
    if constexpr (std::is_same_v<Element, uint8_t>)
        return __half2float(__half(__nv_cvt_fp8_to_halfraw(x, __NV_E4M3)));
    else if constexpr (std::is_same_v<Element, __half>)
        return __half2float(x);
    else if constexpr (std::is_same_v<Element, __nv_bfloat16>)
        return __bfloat162float(x);
    else
        return x;
}

// Calls f with an element of a dtype that Real is for.
template <typename Real, typename F>
__device__ __forceinline__ void by_element(fa_dtype dtype, const F &f) {
    if constexpr (sizeof(Real) == 8) {
        f(double());
    } else {
        switch (dtype) {
        case FA_FLOAT32: f(float()); break;
        case FA_FLOAT16: f(__half()); break;
        case FA_BFLOAT16: f(__nv_bfloat16()); break;
        default: f(uint8_t()); break;
        }
    }
}

template <typename Real>
__device__ __forceinline__ void store_cached(void *base, fa_dtype dtype, int64_t index, Real x) {
    if (dtype != FA_FLOAT8_E4M3) return store<Real>(base, dtype, index, x);
    static_cast<uint8_t *>(base)[index] = e4m3_of(static_cast<float>(x));
}

__device__ __forceinline__ float descale_of(const fa_per_head &t, int b, int h) {
    return t.data ? static_cast<const float *>(t.data)[b * t.stride_b + h * t.stride_h] : 1.0f;
}

// Neighbours, 0 from `count` on; at once where they lie so.
template <int kCount, typename Element>
__device__ __forceinline__ void load_run(Element (&x)[kCount], const Element *from, int count) {
    constexpr int kBytes = kCount * sizeof(Element), kAtOnce = kBytes < 16 ? kBytes : 16;
    struct alignas(kAtOnce) Words {
        Element x[kAtOnce / sizeof(Element)];
    };
    if (count >= kCount && reinterpret_cast<uintptr_t>(from) % kAtOnce == 0) {
#pragma unroll
        for (int n = 0; n < kBytes / kAtOnce; ++n) {
            const Words words = reinterpret_cast<const Words *>(from)[n];
#pragma unroll
            for (int c = 0; c < kAtOnce / sizeof(Element); ++c) x[n * (kAtOnce / sizeof(Element)) + c] = words.x[c];
        }
    } else {
#pragma unroll
        for (int c = 0; c < kCount; ++c) x[c] = c < count ? from[c] : Element(0.0f);
    }
}

// x = elements d0 to d0 + kCount of a row, 0 beyond its width; rotated, if `rotates`, as what stands at `position`. d0 is a
// multiple of kCount. All is asked for before any of it is waited for.
template <typename Element, int kCount, typename Real>
__device__ __forceinline__ void load_rotated(Real (&x)[kCount], const fa_kvcache_args &args, const fa_tensor &t,
                                             int64_t row_at, int d0, int width, bool rotates, int64_t position) {
    const Element *const row = static_cast<const Element *>(t.data) + row_at;
    const fa_rotary &rotary = args.rotary;
    const int dim = rotates && rotary.cos ? static_cast<int>(rotary.dim) : 0, half = dim / 2;
    Element own[kCount], other[kCount];
    load_run(own, row + d0, width - d0);
    if (d0 >= dim) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) x[c] = real_of<Real>(own[c]);
        return;
    }
    const int64_t at = fa_clamp(position, 0, rotary.positions - 1) * half;
    const auto rotate = [&](auto of_type) {
        using Table = decltype(of_type);
        const Table *const cosines = static_cast<const Table *>(rotary.cos) + at;
        const Table *const sines = static_cast<const Table *>(rotary.sin) + at;
        if (rotary.interleaved) {
            Table cosine[kCount / 2], sine[kCount / 2];
            load_run(cosine, cosines + d0 / 2, half - d0 / 2), load_run(sine, sines + d0 / 2, half - d0 / 2);
#pragma unroll
            for (int c = 0; c < kCount; c += 2) {
                const Real first = real_of<Real>(own[c]), second = real_of<Real>(own[c + 1]);
                x[c] = first, x[c + 1] = second;
                if (d0 + c >= dim) continue;
                const Real by = real_of<Real>(cosine[c / 2]), sin = real_of<Real>(sine[c / 2]);
                x[c] = fma_of(first, by, product(-second, sin));
                x[c + 1] = fma_of(second, by, product(first, sin));
            }
            return;
        }
        Table cosine[kCount], sine[kCount];
        if (half % kCount == 0) {
            const int pair = d0 < half ? d0 : d0 - half;
            load_run(other, row + (d0 < half ? d0 + half : pair), kCount);
            load_run(cosine, cosines + pair, kCount), load_run(sine, sines + pair, kCount);
        } else {
#pragma unroll
            for (int c = 0; c < kCount; ++c) {
                const int d = min(d0 + c, dim - 1), pair = d < half ? d : d - half;
                other[c] = row[d < half ? d + half : pair], cosine[c] = cosines[pair], sine[c] = sines[pair];
            }
        }
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
            x[c] = real_of<Real>(own[c]);
            if (d0 + c >= dim) continue;
            const Real partner = real_of<Real>(other[c]);
            x[c] = fma_of(x[c], real_of<Real>(cosine[c]),
                          product(d0 + c < half ? -partner : partner, real_of<Real>(sine[c])));
        }
    };
    if (rotary.dtype == FA_FLOAT32)
        rotate(float());
    else
        rotate(Element());
}

// A row of a line: query i of head h.
struct QueryRow {
    int i, h;
    __device__ __forceinline__ QueryRow(const DecodePlan &plan, int head, int row)
        : i(plan.group.quotient(row)), h((head - i) * static_cast<int>(plan.group.value) + row) {}
};

// What softcap, slopes and the tree make of a score: -inf where it is hidden.
template <typename Real>
struct ScoreChanges {
    const fa_kvcache_args &args;
    const fa_cached_sequence &seq;
    int b;
    template <int kKeys>
    __device__ __forceinline__ ScoreChanges(const fa_kvcache_args &args_, const Cursor<kKeys> &turn)
        : args(args_), seq(turn.of.seq), b(turn.b) {}

    __device__ __forceinline__ Real of(Real s, const QueryRow &row, int key) const {
        const Real softcap = static_cast<Real>(args.softcap);
        if (args.softcap > 0) s = product(softcap, tanh_of(s / softcap));
        if (args.alibi_slopes.data)
            s -= product(load_per_head<Real>(args.alibi_slopes, b, row.h),
                         static_cast<Real>(abs(seq.start + row.i - key)));
        return key < seq.len_k && !fa_tree_shows(&args, &seq, b, row.i, key) ? -infinity(Real()) : s;
    }
};

// A row's result: o = O / l, lse = m + ln l, with the sink; and what is known of it before the sum is.
template <typename Real>
struct RowResult {
    Real sink, descale; // sink: -inf without one
    int64_t lse_at;

    __device__ __forceinline__ RowResult(const fa_kvcache_args &args, int b, int head_kv, const QueryRow &row)
        : sink(args.sinks.data ? product(load_per_head<Real>(args.sinks, 0, row.h), Real(1.44269504088896340736))
                               : -infinity(Real())),
          descale(descale_of(args.v_descale, b, head_kv)), lse_at(fa_row_offset(&args.lse, b, row.h, row.i)) {}

    // Makes the sum's columns those of o, and stores lse if one of them is the row's first.
    template <int kColumns>
    __device__ __forceinline__ void finish(const fa_kvcache_args &args, Part<Real, kColumns> &part,
                                           bool has_first) const {
        if (sink != -infinity(Real())) part.fold({sink, 1, {}});
        const Real scale = part.sum == 0 ? Real(0) : descale / part.sum; // a NaN stays one
#pragma unroll
        for (int c = 0; c < kColumns; ++c) part.o[c] *= scale;
        if (args.lse.data && has_first)
            store(args.lse.data, args.dtype == FA_FLOAT64 ? FA_FLOAT64 : FA_FLOAT32, lse_at,
                  part.sum == 0 ? -infinity(Real()) : (part.max + log2_of(part.sum)) * Real(0.69314718055994530942));
    }
};

// ---- chunks that are told --------------------------------------------------------------------------------------------------

// Rows of kDim columns, then each row's m and l, and as many bytes again, so that the next one is aligned.
template <typename Real, int kDim>
struct ToldChunk {
    Real *rows, *max_and_sum;

    static __host__ __device__ __forceinline__ int64_t bytes(const DecodePlan &plan) {
        return plan.chunk_rows * (kDim + 4) * static_cast<int64_t>(sizeof(Real));
    }
    __device__ __forceinline__ ToldChunk(const DecodePlan &plan, int place, int chunk)
        : rows(reinterpret_cast<Real *>(static_cast<char *>(plan.told) + told_chunks_at(plan) +
                                        nth_told(plan, place, chunk) * bytes(plan))),
          max_and_sum(rows + plan.chunk_rows * kDim) {}

    // Four columns of a row; col(c): where column c is.
    template <typename Col>
    __device__ __forceinline__ void store_part(int row, int quad, const Col &col, const Part<Real> &part) const {
#pragma unroll
        for (int c = 0; c < 4; ++c) rows[row * kDim + col(c)] = part.o[c];
        if (quad == 0) max_and_sum[2 * row] = part.max, max_and_sum[2 * row + 1] = part.sum;
    }
};

#endif
