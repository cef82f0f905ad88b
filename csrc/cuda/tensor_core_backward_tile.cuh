// Tiles of the backward on tensor cores: how keys and rows are shared among warps, what stands in shared memory, and the
// sums of dQ in global memory.
#ifndef FA_TENSOR_CORE_BACKWARD_TILE_CUH
#define FA_TENSOR_CORE_BACKWARD_TILE_CUH

#include "cuda/backward.cuh"
#include "cuda/mma_float.cuh"
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

template <typename Element_, int kDim_, int kKeyWarps_, int kHalves_, int kMTiles_, int kBlockM_, int kBlocksPerSm_>
struct BackwardTile {
    using Element = Element_;
    static constexpr int kDim = kDim_, kKeyWarps = kKeyWarps_, kHalves = kHalves_, kMTiles = kMTiles_;
    static constexpr int kBlockM = kBlockM_, kBlocksPerSm = kBlocksPerSm_;
    static constexpr bool kFloat = kDtype<Element> == FA_FLOAT32;
    static constexpr int kWarpKeys = 16 * kMTiles, kBlockN = kWarpKeys * kKeyWarps;
    static constexpr int kWarps = 2 * kKeyWarps * kHalves, kThreads = 32 * kWarps;
    static constexpr int kWarpQueries = kBlockM / kHalves, kWarpDim = kDim / kHalves;
    // Of dQ a warp makes 16 kQueryTiles rows and every kColumnWarps-th 16 columns; float32: kColumnTiles side by side.
    static constexpr int kQueryTiles = kBlockM % 32 == 0 && kDim / 16 % (kWarps * 32 / kBlockM) == 0 ? 2 : 1;
    static constexpr int kQueryWarps = kBlockM / (16 * kQueryTiles), kColumnWarps = kWarps / kQueryWarps;
    static constexpr int kColumnTiles = kDim / 16 / kColumnWarps; // of 16
    static_assert(kColumnTiles * 16 * kColumnWarps == kDim && kQueryWarps * kColumnWarps == kWarps);
    struct Fragments { // of P^T, or the slopes of the softcap, of a pair: as registers of the lanes
        std::conditional_t<kFloat, float4, uint4> x[kWarpQueries / 16][kMTiles][kFloat ? 2 : 1][32];
    };
    using BiasTile = SwizzledTile<Element, kBlockM, kBlockN % 32 ? 64 : kBlockN>; // tiles of 16 keys stage none
    // What a turn reads and adds to: made a turn ahead by one thread, from the turn before.
    struct alignas(16) Turn {
        const char *q, *d_o; // row m0
        const float *lse;
        int m0, sum0;        // sum0: the first of dQ' of these queries
        int sum, before;     // the one that these keys add to, after so many others
        int is_whole, inner; // all rows see all keys; turns until the next outer step
    };
    struct alignas(16) Step { // what a turn adds to a Turn
        int64_t q_bytes, d_o_bytes, lse;
        int m0, sum0;
    };
    struct alignas(16) Walk {
        int inner_turns;
        int whole_lo, whole_hi; // rows that see all keys
        int edge;               // row m0 sees keys from max(m0 + edge, 0) on
    };
    template <unsigned kFeatures>
    struct Smem {
        SwizzledTile<Element, kBlockN, kDim> k, v; // dK, dV at the end
        SwizzledTile<Element, kBlockM, kDim> q[2], d_o[2];
        SwizzledTile < Element, kBlockN, kFloat &&kBlockM<32 ? 32 : kBlockM> ds[2]; // dS^T
        Fragments p[kKeyWarps][kHalves];
        alignas(16) float lse[2][kBlockM], correction[2][kBlockM], delta[2][kBlockM];
        float far_lse[2][kFloat ? 1 : kBlockM]; // of 16-bit inputs where rows are far; lse is 0 there
        Turn turns[8];                          // of which five are in use
        Walk walk;
        Step steps[2];                                        // inner, outer
        Where<kFeatures != kProducts, MmaScoreRule[3]> rules; // of query heads: this turn's, the next one's
        Where<(kFeatures & kSoftcap) != 0, Fragments[kKeyWarps][kHalves]> cap; // slopes of the softcap
        Where<kFeatures == kBias, BiasTile> bias;                              // of a turn
        Where<kFeatures == kAnyFeature, double[2][kWarps]> slopes; // sums of dS and distances, of the last two heads
    };
};

// Of blocks: sections of heads, then keys, then heads. The device holds four blocks (or all) of each head of a section at a
// time, or more where fewer heads are to share the L2 cache: enough to share Q, dO and dQ' there. More would wait longer for each
// other, and with more sections the longest blocks of causal heads would start later.
struct BackwardOrder {
    unsigned section, n_blocks;
    int heads, heads_kv, group; // heads: those of keys, of all sequences; group: heads_q / heads_kv
    bool stores_d_bias;         // d_bias is dS: no axis is summed
};

#endif
