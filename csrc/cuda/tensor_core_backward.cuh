// What the kernels of the backward on tensor cores share beside backward.cuh: the float32 sums that become dQ.
#ifndef FA_TENSOR_CORE_BACKWARD_CUH
#define FA_TENSOR_CORE_BACKWARD_CUH

#include "cuda/backward.cuh"
#include "cuda/mma_scores.cuh"

// dQ before it is scaled and rounded: blocks of queries, each in the order in which the accumulators of its warps lie. The
// blocks of keys that a block of queries sees add to it one after the other, from the first key on: turns counts those that have. No
// zeros are written first: the first one stores. With two chains every other block of keys adds to a sum of its own, and
// waits for the one before the last: where rows are unequally long, the last one is not far enough ahead.
enum { kMostChains = 2 };
struct QueryGradient {
    float *sums;    // [heads_q][blocks][chains][kBlockM kDim]
    int32_t *turns; // [heads_q][blocks][chains]
    int64_t blocks; // of a head: those of all sequences
    int chains;     // 1 or kMostChains
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
