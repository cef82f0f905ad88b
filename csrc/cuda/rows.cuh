// Rows of a head in global memory, read and written 16 bytes at a time where they lie so.
#ifndef FA_ROWS_CUH
#define FA_ROWS_CUH

#include "cuda/device.cuh"

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

#endif
