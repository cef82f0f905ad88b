// A turn of decoding on tensor cores (mma.sync): float16 or bfloat16 queries over a cache of their dtype or of float8.
//
// The rows of a line are the 16 of one mma. A key warp makes the scores of 16 keys of the turn and its own (m, l), O of its
// columns; the sums of all key warps meet in shared memory, where each thread folds its entries:
//
//   S = Q K^T of 16 keys | m, P = e^(S - m), l | O = P V -> shared | barrier | fold
//
// Keys of e4m3 are converted as they are read, exactly. Four columns of theirs lie in a word where an mma wants two of either
// half of 16: the inner axis of S is taken in the order of the words, in Q too, and O's columns come as the words' even and
// odd bytes.
#ifndef FA_DECODE_TENSOR_CORE_CUH
#define FA_DECODE_TENSOR_CORE_CUH

#include "cuda/decode.cuh"
#include "cuda/mma_tile.cuh"

// kStages: what shared memory holds of 64 or 32 turns.
template <typename Element_, typename Cache_, int kDim_, int kStages_>
struct TensorCoreDecode {
    using Element = Element_;
    using Cache = Cache_; // Element, or uint8_t: e4m3
    using Real = float;
    using M = Mma<Element>;
    static constexpr bool kIsFloat8 = sizeof(Cache) == 1;
    static constexpr int kDim = kDim_, kStages = kStages_, kRows = 16;
    static constexpr int kKeys = kDim > 128 ? 32 : 64, kThreads = kDim > 64 ? 256 : 128;
    static constexpr int kKeyWarps = kKeys / 16, kSlice = kDim / (kThreads / 32 / kKeyWarps); // columns of O a warp makes
    static constexpr int kChunks = kRows * kDim / 4 / kThreads;

    struct Stage {
        SwizzledTile<Cache, kKeys, kDim> k, v;
    };
    struct Smem {
        Stage stage[kStages];
        SwizzledTile<Element, kRows, kDim> q;
        alignas(16) float sums[kKeyWarps][kRows][kDim + 8]; // rows apart from each other's banks
        float2 of_row[kKeyWarps][kRows];                    // m, l
    };

    // A thread copies one column of 16 bytes of every kRowsAtOnce-th key.
    struct Copy {
        using Tile = SwizzledTile<Cache, kKeys, kDim>;
        static constexpr int kRowsAtOnce = kThreads / Tile::kColumns, kCopies = kKeys / kRowsAtOnce;
        int page[kCopies];

        __device__ __forceinline__ int row() const { return static_cast<int>(threadIdx.x) / Tile::kColumns; }
        __device__ __forceinline__ int column() const { return static_cast<int>(threadIdx.x) % Tile::kColumns; }

        // Reads the pages of a turn, one turn before they are needed.
        __device__ __forceinline__ void look_up(const fa_kvcache_args &args, const DecodePlan &plan,
                                                const Cursor<kKeys> &turn) {
            const int32_t *table = args.page_table ? args.page_table + turn.b * args.page_table_stride : nullptr;
#pragma unroll
            for (int n = 0; n < kCopies; ++n) {
                const int token = turn.turn * kKeys + row() + n * kRowsAtOnce;
                page[n] = table && token < turn.seq.len_k ? table[plan.page_size.quotient(token)] : turn.b;
            }
        }

        __device__ __forceinline__ void issue(Stage &stage, const fa_kvcache_args &args, const DecodePlan &plan,
                                              const Cursor<kKeys> &turn) const {
            const int head = turn.head(plan), token0 = turn.turn * kKeys + row();
            const int lo = static_cast<int>(fa_cached_keys(&args, &turn.seq, 0).lo);
            const int old_end = static_cast<int>(args.k.data ? fa_min(turn.seq.start, turn.seq.len_k) : turn.seq.len_k);
            const bool in_k = column() * Tile::kPerColumn < args.head_dim;
            const bool in_v = column() * Tile::kPerColumn < args.head_dim_v;
            const char *k = static_cast<const char *>(args.k_cache.data) + column() * 16;
            const char *v = static_cast<const char *>(args.v_cache.data) + column() * 16;
            int64_t at[kCopies];
            bool is_old[kCopies];
#pragma unroll
            for (int n = 0; n < kCopies; ++n) {
                const int token = token0 + n * kRowsAtOnce, nth = plan.page_size.quotient(token);
                is_old[n] = token >= lo && token < old_end && page[n] >= 0 && page[n] < args.pages;
                at[n] = token - nth * static_cast<int>(plan.page_size.value);
            }
            const auto copy_tile = [&](Tile &tile, const fa_tensor &cache, const char *from, bool in_row) {
                from += head * cache.stride_h * static_cast<int64_t>(sizeof(Cache));
#pragma unroll
                for (int n = 0; n < kCopies; ++n) {
                    const int64_t offset = page[n] * cache.stride_b + at[n] * cache.stride_l;
                    cp_async_16(tile.at(row() + n * kRowsAtOnce, column()),
                                from + offset * static_cast<int64_t>(sizeof(Cache)), is_old[n] && in_row);
                }
            };
            copy_tile(stage.k, args.k_cache, k, in_k);
            copy_tile(stage.v, args.v_cache, v, in_v);
            if (args.k.data && (turn.turn + 1) * kKeys > turn.seq.start) add_new_tokens(stage, args, turn, head, token0, plan);
        }

        // The new tokens of a turn, from k and v; the block that has their first rows stores them in the cache, too.
        __device__ __noinline__ void add_new_tokens(Stage &stage, const fa_kvcache_args &args, const Cursor<kKeys> &turn,
                                                    int head, int token0, const DecodePlan &plan) const {
            const bool stores = turn.row0(plan, kRows) == 0;
            for (int n = 0; n < kCopies; ++n) {
                const int token = token0 + n * kRowsAtOnce;
                if (token < turn.seq.start || token >= turn.seq.len_k) continue;
                const int64_t i = token - turn.seq.start, col = column() * Tile::kPerColumn;
                const bool has_page = page[n] >= 0 && page[n] < args.pages;
                const auto add = [&](Tile &tile, const fa_tensor &from, const fa_tensor &cache, int64_t width,
                                     bool rotates, const fa_per_head &descale) {
                    float x[Tile::kPerColumn];
                    load_rotated(x, args, from, fa_row_offset(&from, turn.b, head, i), static_cast<int>(col),
                                 static_cast<int>(width), rotates, token);
                    const float scale = descale_of(descale, turn.b, head);
                    Cache *to = reinterpret_cast<Cache *>(tile.at(row() + n * kRowsAtOnce, column()));
                    const int64_t at = fa_row_offset(&cache, page[n], head, token % args.page_size) + col;
                    for (int c = 0; c < Tile::kPerColumn; ++c) {
                        store_cached<float>(to, args.cache_dtype, c, descale.data ? x[c] / scale : x[c]);
                        if (stores && has_page && col + c < width)
                            static_cast<Cache *>(cache.data)[at + c] = to[c];
                    }
                };
                add(stage.k, args.k, args.k_cache, args.head_dim, true, args.k_descale);
                add(stage.v, args.v, args.v_cache, args.head_dim_v, false, args.v_descale);
            }
        }
    };

    // Of this lane's rows g and g + 8: keys that they see, the query they are.
    int lo[2], hi[2], query[2];
    float slope[2], scale;
    typename M::A q[kDim <= 128 ? kDim / 16 : 1];

    __device__ __forceinline__ void load_queries(Smem &smem, const fa_kvcache_args &args, const DecodePlan &plan,
                                                 const Cursor<kKeys> &turn, const DecodeLine &line) {
        constexpr int kColumns = kDim / 8;
        for (int n = static_cast<int>(threadIdx.x); n < kRows * kColumns; n += kThreads) {
            const int row = n / kColumns, column = n % kColumns;
            uint4 words = make_uint4(0, 0, 0, 0);
            if (row < line.rows && column * 8 < args.head_dim) {
                const QueryRow of(plan, line.head, line.row0 + row);
                const int64_t at = fa_row_offset(&args.q, line.b, of.h, of.i);
                if (args.rotary.cos) {
                    float x[8];
                    load_rotated(x, args, args.q, at, column * 8, static_cast<int>(args.head_dim), true,
                                 turn.seq.start + of.i);
                    words = make_uint4(M::round_pair(x[0], x[1]), M::round_pair(x[2], x[3]), M::round_pair(x[4], x[5]),
                                       M::round_pair(x[6], x[7]));
                } else {
                    words = *reinterpret_cast<const uint4 *>(static_cast<const Element *>(args.q.data) + at + column * 8);
                }
            }
            *reinterpret_cast<uint4 *>(smem.q.at(row, column)) = words;
        }
    }

    __device__ __forceinline__ void take_queries(Smem &smem, const fa_kvcache_args &args, const DecodePlan &plan,
                                                 const Cursor<kKeys> &turn, const DecodeLine &line) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            const QueryRow of(plan, line.head, line.row0 + min(row, line.rows - 1));
            const fa_interval keys = fa_cached_keys(&args, &turn.seq, of.i);
            lo[half] = static_cast<int>(keys.lo), hi[half] = row < line.rows ? static_cast<int>(keys.hi) : 0;
            query[half] = of.i;
            slope[half] = args.alibi_slopes.data ? load_per_head<float>(args.alibi_slopes, line.b, of.h) : 0.0f;
        }
        scale = static_cast<float>(args.softmax_scale) * descale_of(args.k_descale, line.b, line.head);
        if constexpr (kDim <= 128)
#pragma unroll
            for (int d = 0; d < kDim / 16; ++d) load_q(q[d], smem, d);
    }

    // 16 columns of Q; with float8, those of step d of the order above.
    __device__ __forceinline__ void load_q(typename M::A &a, Smem &smem, int d) const {
        if constexpr (kIsFloat8) {
            const int lane = threadIdx.x % 32, column = d / 2 * 32 + lane % 4 * 8 + d % 2 * 4;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint2 words =
                    load_shared_2(shared_address(smem.q.at(lane / 4 + 8 * half, column / 8)) + column % 8 * 2);
                a.x[half] = words.x, a.x[half + 2] = words.y;
            }
        } else {
            M::load_a(a, M::place_a(smem.q), 0, d * 16);
        }
    }

    // Two e4m3 of a word's lower half as two Elements.
    static __device__ __forceinline__ uint32_t convert(uint32_t pair) {
        const __half2 halves(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
        if constexpr (kDtype<Element> == FA_FLOAT16) return reinterpret_cast<const uint32_t &>(halves);
        const float2 x = __half22float2(halves);
        return M::round_pair(x.x, x.y);
    }

    __device__ __forceinline__ void make_scores(float (&acc_s)[2][4], Smem &smem, Stage &stage, int key_warp) const {
        const int lane = threadIdx.x % 32;
        if constexpr (kIsFloat8) {
#pragma unroll
            for (int d = 0; d < kDim / 16; d += 2) {
                const int column = d * 16 + lane % 4 * 8;
                typename M::A a[2];
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    if constexpr (kDim <= 128)
                        a[step] = q[d + step];
                    else
                        load_q(a[step], smem, d + step);
                }
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const auto *at = stage.k.at(key_warp * 16 + 8 * j + lane / 4, column / 16);
                    const uint2 words = load_shared_2(shared_address(at) + column % 16);
                    const typename M::B low = {{convert(words.x), convert(words.x >> 16)}};
                    const typename M::B high = {{convert(words.y), convert(words.y >> 16)}};
                    M::multiply(acc_s[j], a[0], low);
                    M::multiply(acc_s[j], a[1], high);
                }
            }
        } else {
            const auto place_k = M::place_b(stage.k, key_warp * 16);
#pragma unroll
            for (int d = 0; d < kDim / 16; ++d) {
                typename M::B key[2];
                M::load_b(key, place_k, d * 16, 0);
                typename M::A a;
                if constexpr (kDim <= 128)
                    a = q[d];
                else
                    load_q(a, smem, d);
                M::multiply(acc_s[0], a, key[0]);
                M::multiply(acc_s[1], a, key[1]);
            }
        }
    }

    // O of 16 keys, to shared memory: rows g and g + 8 of a slice of columns.
    __device__ __forceinline__ void multiply_values(Smem &smem, Stage &stage, const typename M::A &p, int key_warp,
                                                    int slice, int rows) const {
        const int lane = threadIdx.x % 32, row = lane / 4;
        const auto store = [&](int half, int col, auto value) {
            if (row + 8 * half < rows)
                *reinterpret_cast<decltype(value) *>(&smem.sums[key_warp][row + 8 * half][slice * kSlice + col]) = value;
        };
        const auto place_v = [&] {
            if constexpr (kIsFloat8) // columns of 16 bytes hold 16 elements, of which ldmatrix sees pairs
                return LanePlace(stage.v, key_warp * 16 + lane % 16, slice * kSlice / 16 + lane / 16);
            else
                return M::place_b_transposed(stage.v, key_warp * 16, slice * kSlice / 8);
        }();
#pragma unroll
        for (int n = 0; n < kSlice; n += kIsFloat8 ? 32 : 16) {
            if constexpr (kIsFloat8) {
                uint32_t words[4]; // keys 0 - 7, 8 - 15 of 16 columns; of the next 16
                ldmatrix_4_transposed(words, place_v.at(0, n / 16));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    float even[4] = {}, odd[4] = {};
                    const auto pick = [&](uint32_t word, unsigned bytes) { return convert(__byte_perm(word, 0, bytes)); };
                    const uint32_t upper = words[2 * m], lower = words[2 * m + 1];
                    M::multiply(even, p, {{pick(upper, 0x20), pick(lower, 0x20)}});
                    M::multiply(odd, p, {{pick(upper, 0x31), pick(lower, 0x31)}});
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        store(half, n + 16 * m + lane % 4 * 4,
                              make_float4(even[2 * half], odd[2 * half], even[2 * half + 1], odd[2 * half + 1]));
                }
            } else {
                typename M::B value[2];
                M::load_b_transposed(value, place_v, 0, n);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    float acc[4] = {};
                    M::multiply(acc, p, value[m]);
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        store(half, n + 8 * m + lane % 4 * 2, make_float2(acc[2 * half], acc[2 * half + 1]));
                }
            }
        }
    }

    __device__ __forceinline__ void attend(Part<float> (&node)[kChunks], Smem &smem, Stage &stage,
                                           const fa_kvcache_args &args, const DecodePlan &, const Cursor<kKeys> &turn,
                                           const DecodeLine &line) const {
        constexpr float kLog2E = 1.44269504f;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, key_warp = warp % kKeyWarps, slice = warp / kKeyWarps;
        float acc_s[2][4] = {};
        make_scores(acc_s, smem, stage, key_warp);

        const int key0 = turn.turn * kKeys + key_warp * 16 + lane % 4 * 2;
        float most[2] = {-infinity(0.0f), -infinity(0.0f)}, sum[2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int half = c / 2, key = key0 + 8 * j + c % 2;
                float s = product(acc_s[j][c], scale);
                if (args.softcap > 0) s = product(args.softcap, tanh_of(s / static_cast<float>(args.softcap)));
                if (slope[half] != 0) s -= product(slope[half], fabsf(static_cast<float>(turn.seq.start + query[half] - key)));
                const bool is_seen = key >= lo[half] && key < hi[half] &&
                                     fa_tree_shows(&args, &turn.seq, line.b, query[half], key);
                acc_s[j][c] = is_seen ? product(s, kLog2E) : -infinity(0.0f);
                most[half] = fmaxf(most[half], acc_s[j][c]);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) most[half] = row_max_of<4>(most[half]);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                acc_s[j][c] = ex2_approx(acc_s[j][c] - Part<float>::shift_of(most[c / 2]));
                sum[c / 2] += acc_s[j][c];
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] = row_sum_of<4>(sum[half]);
            if (lane % 4 == 0 && slice == 0)
                smem.of_row[key_warp][lane / 4 + 8 * half] = make_float2(most[half], sum[half]);
        }
        typename M::A p[1];
        M::from_scores(p, acc_s[0], acc_s[1]);
        multiply_values(smem, stage, p[0], key_warp, slice, line.rows);
        __syncthreads(); // the sums of all warps are there

        constexpr int kQuads = kDim / 4;
#pragma unroll
        for (int e = 0; e < kChunks; ++e) {
            const int row = static_cast<int>(threadIdx.x) / kQuads + e * (kThreads / kQuads);
            const int col = static_cast<int>(threadIdx.x) % kQuads * 4;
            node[e] = Part<float>::empty();
            if (row >= line.rows) continue;
            float2 of_row[kKeyWarps];
#pragma unroll
            for (int w = 0; w < kKeyWarps; ++w) {
                of_row[w] = smem.of_row[w][row];
                node[e].max = fmaxf(node[e].max, of_row[w].x);
            }
#pragma unroll
            for (int w = 0; w < kKeyWarps; ++w) {
                const float factor = ex2_approx(of_row[w].x - Part<float>::shift_of(node[e].max));
                const float4 o = *reinterpret_cast<const float4 *>(&smem.sums[w][row][col]);
                node[e].sum = fma_of(of_row[w].y, factor, node[e].sum);
                node[e].o[0] = fma_of(o.x, factor, node[e].o[0]), node[e].o[1] = fma_of(o.y, factor, node[e].o[1]);
                node[e].o[2] = fma_of(o.z, factor, node[e].o[2]), node[e].o[3] = fma_of(o.w, factor, node[e].o[3]);
            }
        }
    }
};

#endif
