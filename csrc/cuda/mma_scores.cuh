// From a warp's products to scores: masks, modifications and dropout on accumulators of the tensor cores.
//
// A thread holds kMTiles x kNTiles accumulators of 16 x 8, acc[i][j][2 half + e] = row 16 i + 8 half, column 8 j + e from
// the thread's first on. Rows are queries and columns keys; kTransposed: rows are keys and columns queries.
//
// Each step here meets all of a thread's entries, so that its instructions count. Scores therefore keep a unit, score =
// unit * acc, where the factors gather that the first sum or the exponential applies without an instruction of its own.
#ifndef FA_MMA_SCORES_CUH
#define FA_MMA_SCORES_CUH

#include "cuda/mma_tile.cuh"
#include "cuda/ptx/global.cuh"
#include "cuda/scores.cuh"

// tanh u = u (c0 + c1 u^2 + c2 u^4 + c3 u^6) within 2.4e-7 of itself where u^2 <= 0.2 (minimax). The cubic falls
// everywhere, and kCapNear makes it 0.5 at u^2 = 0.2: the exponent of what comes out tells whether u was near enough.
constexpr float kCap0 = 0.99999977f, kCap1 = -0.33329601f, kCap2 = 0.13238584f, kCap3 = -0.046116037f;
constexpr float kCapNear = 0.5329f, kCapNearer = 0.50015f; // of c0 + c1 u^2 alone: 0.5 at u^2 = 0.0009

// What modifies the scores of a head. A kernel keeps it in shared memory, where it takes no registers between its uses.
struct MmaScoreRule : ScoreRule<float> {
    float inner;   // the unit of products, or of those that went through the softcap
    float unit;    // of what modify_scores leaves; positive, so that the largest entry is the largest score
    float cap_in;  // softcap: score = softcap tanh(cap_in * product)
    float cap_out; // tanh in `inner`
    float cap[4];  // the cubic in the square of the product, times kCapNear
    uint32_t dropout_rest, dropout_either;   // of keep_masks
    alignas(16) uint32_t dropout_keys[4][4]; // of Philox's rounds, two each

    __device__ MmaScoreRule(const fa_forward_args &args, const fa_sequence &seq, int64_t b, int64_t h)
        : ScoreRule<float>(args, seq, b, h) {
        const float scale = static_cast<float>(args.softmax_scale);
        cap_in = scale * softcap_inverse;
        const float square = cap_in * cap_in;
        const bool tiny = square < 1e-12f; // its cube would be subnormal
        const float near = tiny ? kCapNearer : kCapNear;
        cap_out = cap_in == 0 ? 0 : near / cap_in;
        cap[0] = near * kCap0;
        cap[1] = near * kCap1 * square;
        cap[2] = tiny ? 0 : near * kCap2 * square * square;
        cap[3] = tiny ? 0 : near * kCap3 * square * square * square;
        inner = softcap > 0 ? scale / near : scale;
        unit = slope != 0 || bias || inner <= 0 ? 1.0f : inner;
        dropout_rest = dropout_threshold > 0xFFFF ? 0 : (0x8000 - (dropout_threshold & 0x7FFF)) * 0x10001u;
        dropout_either = dropout_threshold < 0x8000 ? ~0u : 0;
        uint32_t key0 = static_cast<uint32_t>(dropout_seed), key1 = static_cast<uint32_t>(dropout_seed >> 32);
        for (int round = 0; round < 8; ++round) {
            dropout_keys[round / 2][round % 2 * 2] = key0, dropout_keys[round / 2][round % 2 * 2 + 1] = key1;
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

// Eight products, in `inner` after it: tanh's cubic where all are near, under 6 instructions an entry with the test, else
// tanh = 1 - 2 / (1 + e^2u), which would cancel there.
template <typename Element>
__device__ __forceinline__ void cap_products(float (&left)[4], float (&right)[4], const MmaScoreRule &rule) {
    constexpr uint32_t kHalf = 0x3F000000; // bits that the exponents of [0.5, 1] share; no smaller one has all of them
    const auto each = [&](const auto &body) {
#pragma unroll
        for (int entry = 0; entry < 8; ++entry) body(entry < 4 ? left[entry] : right[entry - 4], entry);
    };
    if (sizeof(Element) == 4) {
        each([&](float &x, int) { x = rule.cap_out * tanhf(rule.cap_in * x); });
        return;
    }
    float cubic[8];
    uint32_t bits = ~0u;
    each([&](float &x, int n) {
        const float square = x * x, rest = fmaf(square, fmaf(square, rule.cap[3], rule.cap[2]), rule.cap[1]);
        cubic[n] = fma_saturate(square, rest, rule.cap[0]);
        bits &= __float_as_uint(cubic[n]);
    });
    if ((bits & kHalf) == kHalf) {
        each([&](float &x, int n) { x *= cubic[n]; });
    } else {
        each([&](float &x, int n) {
            const float exp_2u = ex2_approx(fabsf(x) * (fabsf(rule.cap_in) * 2.88539008f));
            const float tanh = copysignf(fmaf(-2.0f, rcp_approx(exp_2u + 1), 1.0f), x * rule.cap_in);
            x = cubic[n] >= 0.5f ? x * cubic[n] : tanh * rule.cap_out;
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

// acc = the scores, in rule.unit, from products q.k. capped_slope(i, j, entry, slope) hears of the softcap's derivative.
// Where the bias is not staged it comes from global memory.
template <typename Element, bool kTransposed, typename Tile, int kMTiles, int kNTiles, typename Hear>
__device__ __forceinline__ void modify_scores(float (&acc)[kMTiles][kNTiles][4], const fa_forward_args &args,
                                              const fa_sequence &seq, const MmaScoreRule &rule, int64_t query0,
                                              int64_t key0, const Hear &capped_slope, const StagedBias<Tile> staged) {
    float inner = rule.inner;
    if (rule.softcap > 0) {
        const float square = rule.cap_out == 0 ? 0 : 1 / (rule.cap_out * rule.cap_out);
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
            for (int j = 0; j < kNTiles; j += 2) {
                cap_products<Element>(acc[i][j], acc[i][j + 1], rule);
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    const float x = acc[i][j + n / 4][n % 4];
                    capped_slope(i, j + n / 4, n % 4, fmaf(x * x, -square, 1.0f));
                }
            }
    }
    if (rule.slope != 0) {
        add_distance<kTransposed>(acc, inner, rule.slope, static_cast<float>(query0 + rule.offset - key0));
        inner = 1;
    }
    if (rule.bias) {
        const int64_t at = rule.bias_at + query0 * args.bias.stride_q + key0 * args.bias.stride_k;
        const int queries = static_cast<int>(fa_clamp(seq.len_q - query0, 0, 1 << 20)); // from query0 on
        const int keys = static_cast<int>(fa_clamp(seq.len_k - key0, 0, 1 << 20));
        if (staged.is_there)
            staged.template add_to<kTransposed>(acc, inner);
        else if (args.bias.dtype == FA_FLOAT32)
            add_bias<float, kTransposed>(acc, inner, args.bias, at, queries, keys);
        else
            add_bias<Element, kTransposed>(acc, inner, args.bias, at, queries, keys);
    } else if (inner <= 0) {
        each_entry<kTransposed, kMTiles, kNTiles>(
            [&](int, int, int i, int j, int entry) { acc[i][j][entry] *= inner; });
    }
}

// ---- dropout ----------------------------------------------------------------------------------------------------------
// A thread's eight entries of a 16 x 16 tile of scores, two accumulators side by side, are a group of philox.h; word n of
// its call holds the pair n = 2 (side) + half that from_scores packs into word n of an A. Transposed, they belong to two groups.

// Each half of word n: all its bits set where dropout keeps that entry of the pair n of the group that this thread holds in
// the tile that starts at (query0, key0), multiples of 16.
__device__ __forceinline__ void keep_masks(uint32_t (&words)[4], const MmaScoreRule &rule, int query0, int key0) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    words[0] = static_cast<uint32_t>(query0 / 2 + lane / 4); // fa_dropout_row_word(query0 + lane / 4)
    words[1] = static_cast<uint32_t>(key0 / 4 + lane % 4);   // fa_dropout_col_word(key0 + lane % 4 * 2)
    words[2] = rule.dropout_head, words[3] = rule.dropout_offset;
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; round += 2) {
        uint32_t keys[4];
        load_shared_4(keys, shared_address(rule.dropout_keys[round / 2]));
        fa_philox_round(words, keys[0], keys[1]);
        if (round + 1 < kPhiloxRounds) fa_philox_round(words, keys[2], keys[3]);
    }
    // field >= threshold: the carry out of 15 bits, and or or the 16th bit
    const uint32_t rest = rule.dropout_rest, either = rule.dropout_either;
#pragma unroll
    for (uint32_t &word : words) {
        const uint32_t carry = (word & 0x7FFF7FFF) + rest;
        word = sign_halves((word & carry) | (word & either) | (carry & either));
    }
}

// P = 0 where dropout takes it, in the A that from_scores made of the tile at (query0, key0).
template <typename A>
__device__ __forceinline__ void drop(A &p, const MmaScoreRule &rule, int query0, int key0) {
    uint32_t masks[4];
    keep_masks(masks, rule, query0, key0);
#pragma unroll
    for (int n = 0; n < 4; ++n) p.x[n] &= masks[n];
}

// The same for P in float32, before it is split.
__device__ __forceinline__ void drop(float (&left)[4], float (&right)[4], const MmaScoreRule &rule, int query0,
                                     int key0) {
    uint32_t masks[4];
    keep_masks(masks, rule, query0, key0);
#pragma unroll
    for (int entry = 0; entry < 8; ++entry)
        if (!(masks[entry / 2] & (entry % 2 ? 0x80000000 : 0x8000))) (entry < 4 ? left[entry] : right[entry - 4]) = 0;
}

// Transposed: which entries of kTiles tiles of 16 x 16 are kept, tile n at (query0 + 16 n, key0). Bit 16 e + 4 n + 2 half +
// side is entry 2 half + e of accumulator `side`. By all lanes of a warp.
template <int kTiles>
__device__ __forceinline__ uint32_t kept_transposed(const MmaScoreRule &rule, int query0, int key0) {
    static_assert(kTiles <= 4, "16 bits for each of two columns");
    uint32_t kept = 0; // of this thread's own groups: bit 16 (key % 2) + 4 n + 2 (key / 8) + query / 8
#pragma unroll
    for (int n = kTiles - 1; n >= 0; --n) {
        uint32_t masks[4];
        keep_masks(masks, rule, query0 + 16 * n, key0);
#pragma unroll
        for (int word = 3; word >= 0; --word) kept = (kept << 1 & 0xFFFEFFFE) | (masks[word] & 0x10001);
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
