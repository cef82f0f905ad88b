// Tiles of the forward on tensor cores: how rows and keys are shared among warps, and what stands in shared memory.
#ifndef FA_TENSOR_CORE_FORWARD_TILE_CUH
#define FA_TENSOR_CORE_FORWARD_TILE_CUH

#include "cuda/divisor.cuh"
#include "cuda/mma_float.cuh"
#include "cuda/mma_scores.cuh"

template <typename Element_, int kDim_, int kRowWarps_, int kColWarps_, int kMTiles_, int kBlockN_, int kStages_,
          bool kKeepsQ_, int kBlocksPerSm_>
struct ForwardTile {
    using Element = Element_;
    static constexpr int kDim = kDim_, kRowWarps = kRowWarps_, kColWarps = kColWarps_, kMTiles = kMTiles_;
    static constexpr int kBlockN = kBlockN_, kStages = kStages_, kBlocksPerSm = kBlocksPerSm_;
    static constexpr bool kKeepsQ = kKeepsQ_; // Q in registers
    static constexpr int kWarpRows = 16 * kMTiles, kBlockM = kRowWarps * kWarpRows;
    static constexpr int kThreads = 32 * kRowWarps * kColWarps;
    static constexpr int kWarpKeys = kBlockN / kColWarps, kWarpDim = kDim / kColWarps;
    struct Exchange { // between the warps of a row
        SwizzledTile<Element, kBlockM, kBlockN> p;
        float of_row[kColWarps][kBlockM]; // maxima of a turn, sums at the end
        int grew[kRowWarps][kColWarps];
    };
    using BiasTile = SwizzledTile<Element, kBlockM, kBlockN>; // behind Smem, where a bias is staged
    template <bool kModified>
    struct Smem {
        SwizzledTile<Element, kBlockM, kDim> q;                      // O at the end
        SwizzledTile<Element, kBlockN, kDim> k[kStages], v[kStages]; // this turn's and the next one's
        Where<kColWarps == 2, Exchange> exchange;
        fa_sequence seq; // kept here, as what follows, where they take no registers
        const char *head_k, *head_v;
        int row0, row_end, head; // of the block
        struct {
            Span some, all;
        } keys[kThreads / 32];
        Where<kModified, MmaScoreRule> rule;
        __device__ BiasTile &bias() { return *reinterpret_cast<BiasTile *>(this + 1); }
    };
};

// What the host knows: divisions are slow on the device.
struct ForwardPlan {
    // Of blocks: sections of heads, whose K and V fit the L2 cache, then rows, then heads. The last section may lack some.
    Divisor section, section_blocks; // heads, blocks
    Divisor heads_q, group;
    int m_blocks, heads; // of all sequences
    float keep;          // 1 / (1 - dropout_p)
    bool stages_bias;    // through shared memory
    MmaScorePlan scores;
};

#endif
