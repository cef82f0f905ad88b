// What the kernels of the backward on tensor cores share beside backward.cuh: the float32 sums that become dQ.
#ifndef FA_TENSOR_CORE_BACKWARD_CUH
#define FA_TENSOR_CORE_BACKWARD_CUH

#include "cuda/backward.cuh"
#include "cuda/mma_scores.cuh"

// dQ before it is scaled and rounded: blocks of queries, each in the order in which the accumulators of its warps lie. A
// block's key blocks add to it one after the other, from the first key on: turns counts those that have. No zeros are written
// first: the first one stores.
struct QueryGradient {
    float *sums;    // [heads_q][blocks][kBlockM kDim]
    int32_t *turns; // [heads_q][blocks]
    int64_t blocks; // of a head: those of all sequences
};

// The first block of sequence b among those of a head: one block a sequence is added where sequences are packed, since
// each begins a block of its own.
template <int kBlockM>
__host__ __device__ __forceinline__ int64_t query_blocks(const fa_forward_args &args) {
    return args.cu_seqlens_q ? args.total_q / kBlockM + args.batch : args.batch * fa_ceil_div(args.seqlen_q, kBlockM);
}
template <int kBlockM>
__device__ __forceinline__ int64_t first_query_block(const fa_forward_args &args, const fa_sequence &seq, int64_t b) {
    return args.cu_seqlens_q ? seq.row_q / kBlockM + b : b * fa_ceil_div(args.seqlen_q, kBlockM);
}

#endif
