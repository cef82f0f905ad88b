// d_bias as tiles, each the sum of dS over the axes that bias broadcasts to.
#ifndef FA_BACKWARD_BIAS_CUH
#define FA_BACKWARD_BIAS_CUH

#include "cuda/backward.cuh"

struct BiasShape {
    int64_t sizes[4];         // of d_bias: 1 along the axes that are summed
    int64_t m_tiles, n_tiles; // of d_bias
    int64_t sums[4];          // of each of its tiles: batches, heads, tiles of rows, tiles of keys
    __host__ __device__ BiasShape(const fa_backward_args &args, int64_t tile_rows, int64_t tile_keys) {
        const fa_forward_args &forward = args.forward;
        const int64_t full[4] = {forward.batch, forward.heads_q, forward.seqlen_q, forward.seqlen_k};
        const int64_t strides[4] = {args.d_bias.stride_b, args.d_bias.stride_h, args.d_bias.stride_q,
                                    args.d_bias.stride_k};
        const int64_t tile[4] = {1, 1, tile_rows, tile_keys};
        for (int axis = 0; axis < 4; ++axis) {
            sizes[axis] = strides[axis] ? full[axis] : 1;
            sums[axis] = strides[axis] ? 1 : fa_ceil_div(full[axis], tile[axis]);
        }
        m_tiles = fa_ceil_div(sizes[2], tile_rows);
        n_tiles = fa_ceil_div(sizes[3], tile_keys);
    }
    // d_bias at an element of its own shape.
    __device__ void put(const fa_bias &t, int64_t element, double sum) const {
        const int64_t key = element % sizes[3], row = element / sizes[3] % sizes[2];
        const fa_place place = fa_place_of(element / sizes[3], sizes[1], sizes[2]);
        store(t.data, t.dtype, place.b * t.stride_b + place.head * t.stride_h + row * t.stride_q + key * t.stride_k,
              sum);
    }
    __host__ __device__ int64_t tiles() const { return sizes[0] * sizes[1] * m_tiles * n_tiles; }
    __host__ __device__ int64_t terms() const { return sums[0] * sums[1] * sums[2] * sums[3]; } // of a tile
    __host__ __device__ int64_t elements() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
};

#endif
