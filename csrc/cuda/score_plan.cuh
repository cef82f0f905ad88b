// What modifies scores on tensor cores: which kernel it takes, what the host knows of it, and what a head adds.
#ifndef FA_SCORE_PLAN_CUH
#define FA_SCORE_PLAN_CUH

#include <cmath>

#include "cuda/device.cuh"
#include "philox.h"

// tanh u = u (c0 + c1 u^2 + c2 u^4 + c3 u^6) within 2.4e-7 of itself where u^2 <= 0.2 (minimax).
constexpr float kCap0 = 0.99999977f, kCap1 = -0.33329601f, kCap2 = 0.13238584f, kCap3 = -0.046116037f;
constexpr float kCapNear = 0.447f, kCapNearer = 0.03f; // the latter where c0 + c1 u^2 has to do

// What a kernel compiles in, besides products. Most models have one of these, if any, and a kernel of few branches has
// registers to spare and fits the instruction cache: there are kernels of each alone, and one of all.
enum ScoreFeatures : unsigned {
    kProducts = 0,
    kSoftcap = 1,
    kSlopes = 2,
    kBias = 4, // alone: one that is staged through shared memory
    kDropout = 8,
    kAnyFeature =
        31, // all, and what has no bit: a softmax_scale that is not positive, a bias of any strides, d_alibi_slopes
};

// Whether a bias of 16 bits has rows made of 16 bytes, aligned: it goes through shared memory.
static inline bool has_whole_rows(const fa_bias &bias, fa_dtype dtype) {
    const int64_t strides = bias.stride_b | bias.stride_h | bias.stride_q;
    return bias.data && bias.dtype == dtype && fa_dtype_bytes(dtype) == 2 && bias.stride_k == 1 && strides % 8 == 0 &&
           reinterpret_cast<uintptr_t>(bias.data) % 16 == 0;
}

// The least that a kernel has to compile in. All but kAnyFeature take scores to grow with their products.
static inline unsigned score_features(const fa_forward_args &args) {
    const unsigned features = (args.softcap > 0 ? kSoftcap : 0u) | (args.alibi_slopes.data ? kSlopes : 0u) |
                              (args.bias.data ? kBias : 0u) | (args.dropout_p > 0 ? kDropout : 0u);
    const bool are_many = features & (features - 1),
               has_any_bias = args.bias.data && !has_whole_rows(args.bias, args.dtype);
    return are_many || has_any_bias || static_cast<float>(args.softmax_scale) <= 0 ? kAnyFeature : features;
}

// Whether a kernel of kFeatures meets one of them in a launch that has it or not.
template <unsigned kFeatures, unsigned kFeature>
__device__ __forceinline__ constexpr bool meets(bool has_it) {
    return (kFeatures & kFeature) && (kFeatures == kFeature || has_it);
}

// What modifies the scores of all heads: the host knows it. As a parameter of a kernel it takes no registers, and whether
// to do a step costs no wait for shared memory.
struct MmaScorePlan {
    bool caps, has_slopes, has_bias, drops;
    bool flips;      // softmax_scale is not positive: the largest product is not the largest score
    float unit;      // of what modify_scores leaves; positive, so that the largest entry is the largest score
    float inner;     // softmax_scale: of products, and of those that went through the softcap, too
    float cap_in;    // softcap: score = softcap tanh(cap_in * product) = inner * cap_out * tanh
    float cap_out;   // 1 / cap_in
    float cap_slope; // the derivative by the score before: 1 + cap_slope * (cap_out * tanh)^2
    float cap_near;  // the largest product that the cubic is for
    float cap[4];    // the cubic in the square of the product
    uint32_t dropout_offset, dropout_rest, dropout_either; // the latter two of keep_masks

    explicit MmaScorePlan(const fa_forward_args &args)
        : caps(args.softcap > 0), has_slopes(args.alibi_slopes.data), has_bias(args.bias.data),
          dropout_offset(args.dropout_offset) {
        inner = static_cast<float>(args.softmax_scale);
        flips = inner <= 0;
        cap_in = caps ? inner * static_cast<float>(1 / args.softcap) : 0;
        cap_out = cap_in == 0 ? 0 : 1 / cap_in;
        const float square = cap_in * cap_in;
        const bool tiny = square < 1e-12f; // its cube would be subnormal
        cap_slope = -square;
        cap[0] = kCap0;
        cap[1] = kCap1 * square;
        cap[2] = tiny ? 0 : kCap2 * square * square;
        cap[3] = tiny ? 0 : kCap3 * square * square * square;
        cap_near = cap_in == 0              ? INFINITY
                   : !std::isfinite(cap[3]) ? -1.0f // none: not even 0 times that
                                            : (tiny ? kCapNearer : kCapNear) / std::fabs(cap_in);
        unit = has_slopes || has_bias || flips ? 1.0f : inner;
        const uint32_t threshold = fa_dropout_threshold(args.dropout_p);
        drops = threshold != 0;
        dropout_rest = threshold > 0xFFFF ? 0 : (0x8000 - (threshold & 0x7FFF)) * 0x10001u;
        dropout_either = threshold < 0x8000 ? ~0u : 0;
    }
};

// The same of one head. A kernel keeps it in shared memory, where it takes no registers between its uses.
struct MmaScoreRule {
    int64_t bias_at; // index of bias (b, h, 0, 0)
    int offset;      // query i stands at key position i + offset
    float slope;
    uint32_t dropout_head;
    alignas(8) uint32_t dropout_keys[kPhiloxRounds][2];

    __device__ MmaScoreRule(const fa_forward_args &args, const fa_sequence &seq, int64_t b, int64_t h)
        : bias_at(b * args.bias.stride_b + h * args.bias.stride_h), offset(static_cast<int>(seq.len_k - seq.len_q)),
          slope(args.alibi_slopes.data ? load_per_head<float>(args.alibi_slopes, b, h) : 0.0f),
          dropout_head(static_cast<uint32_t>(b * args.heads_q + h)) {
        const uint64_t seed = args.dropout_p > 0 ? static_cast<uint64_t>(*args.dropout_seed) : 0;
        uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
        for (auto &keys : dropout_keys) {
            keys[0] = key0, keys[1] = key1;
            fa_philox_next_key(&key0, &key1);
        }
    }
};

#endif
