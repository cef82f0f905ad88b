// From a warp's products to scores: masks, modifications and dropout on accumulators of the tensor cores.
//
// A thread holds kMTiles x kNTiles accumulators of 16 x 8, acc[i][j][2 half + e] = row 16 i + 8 half, column 8 j + e from
// the thread's first on. Rows are queries and columns keys; kTransposed: rows are keys and columns queries.
//
// Each step here meets all of a thread's entries, so that its instructions count. Scores therefore keep a unit, score =
// unit * acc, where the factors gather that the first sum or the exponential applies without an instruction of its own.
#ifndef FA_MMA_SCORES_CUH
#define FA_MMA_SCORES_CUH

#include <cmath>

#include "cuda/mma_tile.cuh"
#include "cuda/ptx/global.cuh"
#include "cuda/scores.cuh"

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
    kAnyFeature = 31, // and a softmax_scale that is not positive, a bias of any strides, d_alibi_slopes
};

// Whether a bias of 16 bits has rows made of 16 bytes, aligned: it goes through shared memory.
static inline bool has_whole_rows(const fa_bias &bias, fa_dtype dtype) {
    const int64_t strides = bias.stride_b | bias.stride_h | bias.stride_q;
    return bias.data && bias.dtype == dtype && fa_dtype_bytes(dtype) == 2 && bias.stride_k == 1 && strides % 8 == 0 &&
           reinterpret_cast<uintptr_t>(bias.data) % 16 == 0;
}

// The least that a kernel has to compile in.
static inline unsigned score_features(const fa_forward_args &args) {
    const unsigned features = (args.softcap > 0 ? kSoftcap : 0u) | (args.alibi_slopes.data ? kSlopes : 0u) |
                              (args.bias.data ? kBias : 0u) | (args.dropout_p > 0 ? kDropout : 0u);
    const bool are_many = features & (features - 1), has_any_bias = args.bias.data && !has_whole_rows(args.bias, args.dtype);
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
          drops(fa_dropout_threshold(args.dropout_p) != 0), dropout_offset(args.dropout_offset) {
        inner = static_cast<float>(args.softmax_scale);
        flips = inner <= 0;
        cap_in = caps ? inner * static_cast<float>(1 / args.softcap) : 0;
        cap_out = cap_in == 0 ? 0 : 1 / cap_in;
        const float square = cap_in * cap_in;
        const bool tiny = square < 1e-12f; // its cube would be subnormal
        cap_slope = -square;
        cap_near = cap_in == 0 ? INFINITY : (tiny ? kCapNearer : kCapNear) / std::fabs(cap_in);
        cap[0] = kCap0;
        cap[1] = kCap1 * square;
        cap[2] = tiny ? 0 : kCap2 * square * square;
        cap[3] = tiny ? 0 : kCap3 * square * square * square;
        unit = has_slopes || has_bias || flips ? 1.0f : inner;
        const uint32_t threshold = fa_dropout_threshold(args.dropout_p);
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

// Calls body(query, key, i, j, entry) for each entry, with its distance from the thread's first query and key.
template <bool kTransposed, int kMTiles, int kNTiles, typename Body>
__device__ __forceinline__ void each_entry(const Body &body) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
        for (int j = 0; j < kNTiles; ++j)
#pragma unroll
            for (int entry = 0; entry < 4; ++entry) {
                const int row = 16 * i + entry / 2 * 8, col = 8 * j + entry % 2;
                body(kTransposed ? col : row, kTransposed ? row : col, i, j, entry);
            }
}

// -inf where a query does not see a key.
template <bool kTransposed, int kMTiles, int kNTiles>
__device__ __forceinline__ void hide_scores(float (&acc)[kMTiles][kNTiles][4], const fa_forward_args &args,
                                            const fa_sequence &seq, int64_t query0, int64_t key0) {
    constexpr int kQueries = kTransposed ? 2 * kNTiles : 2 * kMTiles; // of a thread
#pragma unroll
    for (int n = 0; n < kQueries; ++n) {
        const int step = kTransposed ? n / 2 * 8 + n % 2 : 8 * n;
        const Span keys = span_of(args, seq, query0 + step, key0, false);
        each_entry<kTransposed, kMTiles, kNTiles>([&](int query, int key, int i, int j, int entry) {
            if (query == step && (key < keys.lo || key >= keys.hi)) acc[i][j][entry] = -infinity(0.0f);
        });
    }
}

// acc = cap_out tanh(cap_in acc): by the cubic where all of a warp's entries are near, under 6 instructions each with the
// test, else tanh = 1 - 2 / (1 + e^2u), which would cancel there.
template <typename Element, int kMTiles, int kNTiles>
__device__ __forceinline__ void cap_products(float (&acc)[kMTiles][kNTiles][4], const MmaScorePlan &plan) {
    const auto each = [&](const auto &body) {
        each_entry<false, kMTiles, kNTiles>([&](int, int, int i, int j, int entry) { body(acc[i][j][entry], entry); });
    };
    if (sizeof(Element) == 4) {
        each([&](float &x, int) { x = plan.cap_out * tanhf(plan.cap_in * x); });
        return;
    }
    const auto cubic = [&](float x) {
        const float square = x * x;
        const float rest = fmaf(square, fmaf(square, plan.cap[3], plan.cap[2]), plan.cap[1]);
        return x * fmaf(square, rest, plan.cap[0]);
    };
    float most[4] = {}; // four maxima wait less for each other than one
    each([&](float &x, int entry) { most[entry] = fmaxf(most[entry], fabsf(x)); });
    if (__all_sync(~0u, fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])) <= plan.cap_near)) {
        each([&](float &x, int) { x = cubic(x); });
    } else {
        each([&](float &x, int) {
            const float exp_2u = ex2_approx(fabsf(x) * (fabsf(plan.cap_in) * 2.88539008f));
            const float tanh = copysignf(fmaf(-2.0f, rcp_approx(exp_2u + 1), 1.0f), x * plan.cap_in);
            x = fabsf(x) <= plan.cap_near ? cubic(x) : tanh * plan.cap_out;
        });
    }
}

// acc = inner * acc - slope * distance. Rows and columns are 8 apart: all entries of a diagonal share their distance, so
// that a 32 x 64 tile has 22 of them a thread.
template <bool kTransposed, int kMTiles, int kNTiles>
__device__ __forceinline__ void add_distance(float (&acc)[kMTiles][kNTiles][4], float inner, float slope,
                                             float distance0) {
#pragma unroll
    for (int diagonal = 1 - 2 * kMTiles; diagonal < kNTiles; ++diagonal)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float step = static_cast<float>(8 * diagonal + e); // columns less rows
            const float penalty = -slope * fabsf(distance0 + (kTransposed ? step : -step));
#pragma unroll
            for (int row = 0; row < 2 * kMTiles; ++row)
                if (diagonal + row >= 0 && diagonal + row < kNTiles) {
                    float &s = acc[row / 2][diagonal + row][row % 2 * 2 + e];
                    s = fmaf(s, inner, penalty);
                }
        }
}

// acc = inner * acc + bias, from global memory.
template <typename Bias, bool kTransposed, int kMTiles, int kNTiles>
__device__ __forceinline__ void add_bias(float (&acc)[kMTiles][kNTiles][4], float inner, const fa_bias &bias,
                                         int64_t first, int queries, int keys) {
    using Pair = std::conditional_t<sizeof(Bias) == 4, float2, uint32_t>;
    const Bias *at = static_cast<const Bias *>(bias.data) + first;
    const int64_t stride_q = bias.stride_q, stride_k = bias.stride_k;
    const bool pairs =
        !kTransposed && stride_k == 1 && stride_q % 2 == 0 && reinterpret_cast<uintptr_t>(at) % sizeof(Pair) == 0;
    if (pairs && queries > 16 * kMTiles - 8 && keys > 8 * kNTiles - 7) {
        constexpr int kBatch = kNTiles < 4 ? kNTiles : 4; // loads under way; more would not find registers
#pragma unroll
        for (int row = 0; row < 2 * kMTiles; ++row, at += 8 * stride_q)
#pragma unroll
            for (int j0 = 0; j0 < kNTiles; j0 += kBatch) {
                Pair pair[kBatch];
#pragma unroll
                for (int j = 0; j < kBatch; ++j) pair[j] = *reinterpret_cast<const Pair *>(at + 8 * (j0 + j));
#pragma unroll
                for (int j = 0; j < kBatch; ++j) {
                    float2 x;
                    if constexpr (sizeof(Bias) == 4)
                        x = pair[j];
                    else
                        x = unpack(pair[j], kDtype<Bias>);
                    float *s = &acc[row / 2][j0 + j][row % 2 * 2];
                    s[0] = fmaf(s[0], inner, x.x), s[1] = fmaf(s[1], inner, x.y);
                }
            }
        return;
    }
    using Bits = std::conditional_t<sizeof(Bias) == 4, uint32_t, uint16_t>;
    const int64_t stride_row = kTransposed ? stride_k : stride_q, stride_col = kTransposed ? stride_q : stride_k;
    const int rows = kTransposed ? keys : queries, cols = kTransposed ? queries : keys;
#pragma unroll
    for (int row = 0; row < 2 * kMTiles; ++row, at += 8 * stride_row) {
        const Bias *entry = at;
#pragma unroll
        for (int j = 0; j < kNTiles; ++j, entry += 8 * stride_col)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float &s = acc[row / 2][j][row % 2 * 2 + e];
                Bits bits = 0;
                if (8 * row < rows && 8 * j + e < cols)
                    bits = load_global(reinterpret_cast<const Bits *>(entry + e * stride_col));
                s = fmaf(s, inner, static_cast<float>(reinterpret_cast<const Bias &>(bits)));
            }
    }
}

// A warp's part of the bias in shared memory: from row0, key0 of a tile on, whose rows are queries; where it is there at all.
template <typename Tile>
struct StagedBias {
    bool is_there;
    Tile *tile;
    int row0, key0;

    // acc = inner * acc + bias.
    template <bool kTransposed, int kMTiles, int kNTiles>
    __device__ __forceinline__ void add_to(float (&acc)[kMTiles][kNTiles][4], float inner) const {
        if constexpr (sizeof(typename Tile::Element) == 2) { // as the dtype that is staged
            using M = Mma<typename Tile::Element>;
            const auto place =
                kTransposed ? M::place_a_transposed(*tile, row0, key0 / 8) : M::place_a(*tile, row0, key0 / 8);
#pragma unroll
            for (int i = 0; i < kMTiles; ++i)
#pragma unroll
                for (int j = 0; j < kNTiles; j += 2) {
                    typename M::A pairs;
                    if (kTransposed)
                        M::load_a_transposed(pairs, place, 16 * i, 8 * j);
                    else
                        M::load_a(pairs, place, 16 * i, 8 * j);
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        const float2 x = unpack(pairs.x[n], kDtype<typename Tile::Element>);
                        float *s = &acc[i][j + n / 2][n % 2 * 2];
                        s[0] = fmaf(s[0], inner, x.x), s[1] = fmaf(s[1], inner, x.y);
                    }
                }
        }
    }

    // Copies it by cp.async, where rows of the bias are made of 16 bytes, aligned: kRows queries, kKeys keys from the head's
    // (query, key) on, zeros from query_end and key_end on.
    template <int kRows, int kKeys>
    __device__ __forceinline__ void copy(const fa_bias &bias, int64_t head_at, int query, int query_end, int key,
                                         int key_end) const {
        constexpr int kAcross = kKeys < 32 ? kKeys / 8 : 4, kDown = 32 / kAcross; // of a warp: whole groups of 8 rows
        const int row = static_cast<int>(threadIdx.x) % 32 / kAcross, column = static_cast<int>(threadIdx.x) % kAcross;
        const LanePlace<Tile> place(*tile, row0 + row, key0 / 8 + column);
        const auto *from = static_cast<const typename Tile::Element *>(bias.data) + head_at +
                           (query + row) * bias.stride_q + key + 8 * column;
        int bytes[kKeys / 8 / kAcross];
#pragma unroll
        for (int j = 0; j < kKeys / 8; j += kAcross)
            bytes[j / kAcross] = 2 * min(max(key_end - key - 8 * (column + j), 0), 8);
#pragma unroll
        for (int i = 0; i < kRows; i += kDown, from += kDown * bias.stride_q)
#pragma unroll
            for (int j = 0; j < kKeys / 8; j += kAcross)
                cp_async_16_part(place.at(i, j), from + 8 * j, query + row + i < query_end ? bytes[j / kAcross] : 0);
    }
};

// acc = the scores, in plan.unit, from products q.k. capped_slope(i, j, entry, slope) hears of the softcap's derivative.
// Where the bias is not staged it comes from global memory.
template <unsigned kFeatures, typename Element, bool kTransposed, typename Tile, int kMTiles, int kNTiles, typename Hear>
__device__ __forceinline__ void modify_scores(float (&acc)[kMTiles][kNTiles][4], const fa_forward_args &args,
                                              const fa_sequence &seq, const MmaScorePlan &plan,
                                              const MmaScoreRule &rule, int64_t query0, int64_t key0,
                                              const Hear &capped_slope, const StagedBias<Tile> staged) {
    if (meets<kFeatures, kSoftcap>(plan.caps)) {
        cap_products<Element>(acc, plan);
        each_entry<kTransposed, kMTiles, kNTiles>([&](int, int, int i, int j, int entry) {
            const float x = acc[i][j][entry];
            capped_slope(i, j, entry, fmaf(x * x, plan.cap_slope, 1.0f));
        });
    }
    const bool has_slopes = meets<kFeatures, kSlopes>(plan.has_slopes), has_bias = meets<kFeatures, kBias>(plan.has_bias);
    if (has_slopes)
        add_distance<kTransposed>(acc, plan.inner, rule.slope, static_cast<float>(query0 + rule.offset - key0));
    const float inner = has_slopes ? 1.0f : plan.inner;
    if (has_bias && (kFeatures == kBias || staged.is_there)) {
        staged.template add_to<kTransposed>(acc, inner);
    } else if (kFeatures == kAnyFeature && has_bias) {
        const int64_t at = rule.bias_at + query0 * args.bias.stride_q + key0 * args.bias.stride_k;
        const int queries = static_cast<int>(fa_clamp(seq.len_q - query0, 0, 1 << 20)); // from query0 on
        const int keys = static_cast<int>(fa_clamp(seq.len_k - key0, 0, 1 << 20));
        if (args.bias.dtype == FA_FLOAT32)
            add_bias<float, kTransposed>(acc, inner, args.bias, at, queries, keys);
        else
            add_bias<Element, kTransposed>(acc, inner, args.bias, at, queries, keys);
    } else if (kFeatures == kAnyFeature && plan.flips && !has_slopes) {
        each_entry<kTransposed, kMTiles, kNTiles>(
            [&](int, int, int i, int j, int entry) { acc[i][j][entry] *= inner; });
    }
}

// ---- dropout ----------------------------------------------------------------------------------------------------------
// A thread's eight entries of a 16 x 16 tile of scores, two accumulators side by side, are a group of philox.h; word n of
// its call holds the pair n = 2 (side) + half that from_scores packs into word n of an A. Transposed, they belong to two groups.

// Each half of word n of tile i: all its bits set where dropout keeps that entry of the pair n of the group that this thread
// holds in the tile that starts at (query0 + 16 i, key0), multiples of 16.
template <int kTiles>
__device__ __forceinline__ void keep_masks(uint32_t (&words)[kTiles][4], const MmaScorePlan &plan,
                                           const MmaScoreRule &rule, int query0, int key0) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        words[i][0] = static_cast<uint32_t>(query0 / 2 + 8 * i + lane / 4); // fa_dropout_row_word(query0 + lane / 4)
        words[i][1] = static_cast<uint32_t>(key0 / 4 + lane % 4);           // fa_dropout_col_word(key0 + lane % 4 * 2)
        words[i][2] = rule.dropout_head, words[i][3] = plan.dropout_offset;
    }
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint2 keys = *reinterpret_cast<const uint2 *>(rule.dropout_keys[round]);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) fa_philox_round(words[i], keys.x, keys.y); // each waits for its products
    }
    // field >= threshold: the carry out of 15 bits, and or or the 16th bit
    const uint32_t rest = plan.dropout_rest, either = plan.dropout_either;
#pragma unroll
    for (auto &of_tile : words)
#pragma unroll
        for (uint32_t &word : of_tile) {
            const uint32_t carry = (word & 0x7FFF7FFF) + rest;
            word = sign_halves((word & carry) | (word & either) | (carry & either));
        }
}

// Transposed: which entries of kTiles tiles of 16 x 16 are kept, tile n at (query0 + 16 n, key0). Bit 16 e + 4 n + 2 half +
// side is entry 2 half + e of accumulator `side`. By all lanes of a warp.
template <int kTiles>
__device__ __forceinline__ uint32_t kept_transposed(const MmaScorePlan &plan, const MmaScoreRule &rule, int query0,
                                                    int key0) {
    static_assert(kTiles == 1 || kTiles == 2 || kTiles == 4, "two tiles at a time, 16 bits for each of two columns");
    constexpr int kBeside = kTiles < 2 ? 1 : 2;
    uint32_t kept = 0; // of this thread's own groups: bit 16 (key % 2) + 4 n + 2 (key / 8) + query / 8
#pragma unroll
    for (int n = kTiles - kBeside; n >= 0; n -= kBeside) {
        uint32_t masks[kBeside][4];
        keep_masks(masks, plan, rule, query0 + 16 * n, key0);
#pragma unroll
        for (int word = 4 * kBeside - 1; word >= 0; --word)
            kept = (kept << 1 & 0xFFFEFFFE) | (masks[word / 4][word % 4] & 0x10001);
    }
    // Key g and queries 2t, 2t + 1 of this lane 4 g + t: rows 2t, 2t + 1 of the groups, in columns g / 2.
    const int lane = static_cast<int>(threadIdx.x) % 32, from = lane % 4 * 8 + lane / 8;
    const uint32_t even = __shfl_sync(~0u, kept, from), odd = __shfl_sync(~0u, kept, from + 4);
    return __byte_perm(even, odd, lane & 4 ? 0x7632 : 0x5410);
}

// All bits of each half set where the pair (entries 2 half, 2 half + 1 of accumulator `side` of tile n) is kept.
__device__ __forceinline__ uint32_t kept_pair(uint32_t kept, int n, int side, int half) {
    return sign_halves(kept << (15 - 4 * n - 2 * half - side));
}

#endif
