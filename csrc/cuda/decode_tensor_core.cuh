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

template <typename Element_, typename Cache_, int kDim_, int kStages_>
struct TensorCoreDecode {
    using Element = Element_;
    using Cache = Cache_; // Element, or uint8_t: e4m3
    using Real = float;
    using M = Mma<Element>;
    static constexpr bool kIsFloat8 = sizeof(Cache) == 1;
    static constexpr int kDim = kDim_, kStages = kStages_, kKeys = kDim > 128 ? 32 : 64;
    static constexpr int kRows = kDim > 128 ? 8 : 16; // as many as folders have registers for
    static constexpr int kCopiers = 128, kAttenders = 128, kFolders = kDim > 64 ? 256 : 128; // threads
    static constexpr int kThreads = kCopiers + kAttenders + kFolders;
    static constexpr int kRegisters = 57 * 1024 / kThreads / 8 * 8; // a thread's: decode_merge's blocks fit beside
    static constexpr int kKeyWarps = kKeys / 16, kSlice = kDim / (kAttenders / 32 / kKeyWarps); // columns a warp makes
    static constexpr int kChunks = kRows * kDim / 4 / kFolders;

    struct Stage {
        SwizzledTile<Cache, kKeys, kDim> k, v;
    };
    using Queries = SwizzledTile<Element, 16, kDim>; // the rows of one mma: those from kRows on are nobody's
    struct Sums {
        alignas(16) float o[kKeyWarps][kRows][kDim + 8]; // rows apart from each other's banks
        float2 of_row[kKeyWarps][kRows];                 // m, l
    };

    // A thread copies one column of 16 bytes of every kRowsAtOnce-th key.
    struct Copier {
        using Tile = SwizzledTile<Cache, kKeys, kDim>;
        static constexpr int kRowsAtOnce = kCopiers / Tile::kColumns, kCopies = kKeys / kRowsAtOnce;
        int page[kCopies]; // of each key; of the first alone where a turn lies within a page

        __device__ __forceinline__ int row() const { return static_cast<int>(threadIdx.x) / Tile::kColumns; }
        __device__ __forceinline__ int column() const { return static_cast<int>(threadIdx.x) % Tile::kColumns; }

        // Reads the pages of a turn, one turn before they are needed.
        __device__ __forceinline__ void look_up(const fa_kvcache_args &args, const DecodePlan &plan,
                                                const Cursor<kKeys> &turn) {
            page[0] = turn.b;
            if (!args.page_table) return;
            const int32_t *table = args.page_table + turn.b * args.page_table_stride;
            const int token0 = turn.turn * kKeys;
            if (plan.turns_in_pages) {
                page[0] = token0 < turn.of.seq.len_k ? table[plan.page_size.quotient(token0)] : -1;
                return;
            }
#pragma unroll
            for (int n = 0; n < kCopies; ++n) {
                const int token = token0 + row() + n * kRowsAtOnce;
                page[n] = token < turn.of.seq.len_k ? table[plan.page_size.quotient(token)] : -1;
            }
        }

        __device__ __forceinline__ void copy(Stage &stage, const fa_kvcache_args &args, const DecodePlan &plan,
                                             const Cursor<kKeys> &turn) const {
            if (args.k.data && (turn.turn + 1) * kKeys > turn.of.seq.start)
                return copy_with_new(stage, args, plan, turn);
            const fa_tensor &k_cache = args.k_cache, &v_cache = args.v_cache;
            const int token0 = turn.turn * kKeys + row();
            const int old_end = turn.of.seq.len_k; // no token of the turn is new
            // Token token0 + n is read iff at + n < span, without signs.
            const int at = token0 - turn.of.lo;
            const unsigned span = max(old_end - turn.of.lo, 0);
            const unsigned k_span = column() * Tile::kPerColumn < args.head_dim ? span : 0;
            const unsigned v_span = column() * Tile::kPerColumn < args.head_dim_v ? span : 0;
            const auto base = [&](const fa_tensor &cache) {
                return static_cast<const char *>(cache.data) +
                       turn.head * cache.stride_h * static_cast<int>(sizeof(Cache)) + column() * 16;
            };
            const auto place = [](int page_of, int row_of, const CacheStrides &strides) { // from the base on
                return (static_cast<uint64_t>(static_cast<unsigned>(page_of)) * strides.page +
                        static_cast<uint64_t>(static_cast<unsigned>(row_of)) * strides.row) *
                       16;
            };
            const char *const k = base(k_cache), *const v = base(v_cache);
            const auto exists = [&](int page_of) {
                return static_cast<unsigned>(page_of) < static_cast<unsigned>(args.pages);
            };
            const auto row_in_page = [&](int token) {
                return token - plan.page_size.quotient(token) * static_cast<int>(plan.page_size.value);
            };
            if (plan.turns_in_pages) {
                const bool has_page = exists(page[0]);
                const int row_of = row_in_page(turn.turn * kKeys) + row();
                const auto copy_tile = [&](Tile &tile, const char *from, const CacheStrides &strides, unsigned of) {
                    from += place(page[0], row_of, strides);
                    const int64_t step = static_cast<int64_t>(strides.row) * kRowsAtOnce * 16;
#pragma unroll
                    for (int n = 0; n < kCopies; ++n, from += step)
                        cp_async_16(tile.at(row() + n * kRowsAtOnce, column()), from,
                                    static_cast<unsigned>(at + n * kRowsAtOnce) < (has_page ? of : 0));
                };
                copy_tile(stage.k, k, plan.k_strides, k_span);
                copy_tile(stage.v, v, plan.v_strides, v_span);
            } else {
#pragma unroll
                for (int n = 0; n < kCopies; ++n) {
                    const int r = row() + n * kRowsAtOnce, row_of = row_in_page(token0 + n * kRowsAtOnce);
                    const unsigned token = exists(page[n]) ? at + n * kRowsAtOnce : ~0u;
                    cp_async_16(stage.k.at(r, column()), k + place(page[n], row_of, plan.k_strides), token < k_span);
                    cp_async_16(stage.v.at(r, column()), v + place(page[n], row_of, plan.v_strides), token < v_span);
                }
            }
        }

        // A turn with new tokens, which come from k and v; the block that has their first rows stores them in the cache, too. The
        // rest of the turn is copied here, as no copy, not even of zeros, may come to a new token's place.
        static __device__ __forceinline__ void copy_with_new(Stage &stage, const fa_kvcache_args &args,
                                                             const DecodePlan &plan, const Cursor<kKeys> &turn) {
            const int start = turn.of.seq.start, len_k = turn.of.seq.len_k, token0 = turn.turn * kKeys;
            const auto page_of = [&](int token, int nth) {
                const int page = args.page_table ? args.page_table[turn.b * args.page_table_stride + nth] : turn.b;
                return static_cast<unsigned>(page) < static_cast<unsigned>(args.pages) ? page : -1;
            };
            const auto element = [&](const fa_tensor &cache, int page, int token, int nth) {
                const int row_of = token - nth * static_cast<int>(plan.page_size.value);
                return page * cache.stride_b + turn.head * cache.stride_h + row_of * cache.stride_l;
            };
#pragma unroll 1
            for (int n = static_cast<int>(threadIdx.x); n < 2 * kKeys * Tile::kColumns; n += kCopiers) {
                const bool is_k = n < kKeys * Tile::kColumns;
                const int r = n / Tile::kColumns % kKeys, column = n % Tile::kColumns, token = token0 + r;
                const int col = column * Tile::kPerColumn, nth = plan.page_size.quotient(token);
                const fa_tensor &cache = is_k ? args.k_cache : args.v_cache;
                const int width = static_cast<int>(is_k ? args.head_dim : args.head_dim_v);
                Cache *const to = reinterpret_cast<Cache *>((is_k ? stage.k : stage.v).at(r, column));
                const bool is_new = token >= start && token < len_k;
                const int page = token < len_k && token >= turn.of.lo ? page_of(token, nth) : -1;
                Cache *const cached =
                    static_cast<Cache *>(cache.data) + (page < 0 ? 0 : element(cache, page, token, nth) + col);
                if (!is_new) {
                    cp_async_16(to, cached, page >= 0 && col < width);
                    continue;
                }
                const fa_tensor &from = is_k ? args.k : args.v;
                const fa_per_head &descale = is_k ? args.k_descale : args.v_descale;
                float x[Tile::kPerColumn];
                load_rotated(x, args, from, fa_row_offset(&from, turn.b, turn.head, token - start), col, width, is_k,
                             token);
                alignas(16) Cache stored[Tile::kPerColumn];
                const float scale = descale_of(descale, turn.b, turn.head);
#pragma unroll
                for (int c = 0; c < Tile::kPerColumn; ++c)
                    store_cached<float>(stored, kIsFloat8 ? FA_FLOAT8_E4M3 : kDtype<Element>, c,
                                        descale.data ? x[c] / scale : x[c]);
                const uint4 words = *reinterpret_cast<const uint4 *>(stored);
                *reinterpret_cast<uint4 *>(to) = words;
                if (turn.m_block == 0 && page >= 0 && col < width) *reinterpret_cast<uint4 *>(cached) = words;
            }
        }

        // The rows of a line, rotated.
        __device__ __forceinline__ void load(Queries &queries, const fa_kvcache_args &args, const DecodePlan &plan,
                                             const Cursor<kKeys> &turn) const {
            constexpr int kColumns = kDim / 8;
#pragma unroll 1
            for (int n = static_cast<int>(threadIdx.x); n < kRows * kColumns; n += kCopiers) {
                const int row = n / kColumns, column = n % kColumns;
                const bool is_there = row < turn.rows(plan, kRows) && column * 8 < args.head_dim;
                const QueryRow of(plan, turn.head, turn.row0(kRows) + (is_there ? row : 0));
                const int64_t at = fa_row_offset(&args.q, turn.b, of.h, of.i);
                if (!args.rotary.cos) {
                    cp_async_16(queries.at(row, column), static_cast<const Element *>(args.q.data) + at + column * 8,
                                is_there);
                    continue;
                }
                float x[8] = {};
                if (is_there)
                    load_rotated(x, args, args.q, at, column * 8, static_cast<int>(args.head_dim), true,
                                 turn.of.seq.start + of.i);
                *reinterpret_cast<uint4 *>(queries.at(row, column)) =
                    make_uint4(M::round_pair(x[0], x[1]), M::round_pair(x[2], x[3]), M::round_pair(x[4], x[5]),
                               M::round_pair(x[6], x[7]));
            }
        }
    };

    struct Attender {
        int lo[2], hi[2], rows; // keys that this lane's rows g and g + 8 see; rows of the line
        float unit;             // what a product is times in scores

        __device__ __forceinline__ void begin_line(const fa_kvcache_args &args, const DecodePlan &plan,
                                                   const Cursor<kKeys> &turn) {
            rows = turn.rows(plan, kRows);
            const int lane = threadIdx.x % 32;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const fa_interval keys = fa_cached_keys(&args, &turn.of.seq, row_of(plan, turn, half).i);
                lo[half] = static_cast<int>(keys.lo);
                hi[half] = lane / 4 + 8 * half < rows ? static_cast<int>(keys.hi) : 0;
            }
            unit = static_cast<float>(args.softmax_scale) * descale_of(args.k_descale, turn.b, turn.head);
            if (!plan.is_modified) unit *= kLog2E;
        }

        __device__ __forceinline__ void attend(Stage &stage, Queries &queries, const fa_kvcache_args &args,
                                               const DecodePlan &plan, const Cursor<kKeys> &turn, Sums &sums,
                                               bool sums_are_read) const {
            const int warp = (static_cast<int>(threadIdx.x) - kCopiers) / 32, lane = threadIdx.x % 32;
            const int key_warp = warp % kKeyWarps, slice = warp / kKeyWarps;
            float acc_s[2][4];
            make_scores(acc_s, stage, queries, key_warp);
            const auto place = place_v(stage, key_warp, slice);

            const int key0 = turn.turn * kKeys + key_warp * 16 + lane % 4 * 2;
            float most[2] = {-infinity(0.0f), -infinity(0.0f)}, sum[2] = {};
            for_each(acc_s, [&](float &s, int half, int col) { s = product(s, unit); });
            if (plan.is_modified) modify(acc_s, args, plan, turn, key0);
            for_each(acc_s, [&](float &s, int half, int col) {
                if (key0 + col < lo[half] || key0 + col >= hi[half]) s = -infinity(0.0f);
                most[half] = fmaxf(most[half], s);
            });
#pragma unroll
            for (int half = 0; half < 2; ++half) most[half] = row_max_of<4>(most[half]);
            const float shift[2] = {Part<float>::shift_of(most[0]), Part<float>::shift_of(most[1])};
            for_each(acc_s, [&](float &s, int half, int) {
                s = ex2_approx(s - shift[half]);
                sum[half] += s;
            });
            typename M::A p[1];
            M::from_scores(p, acc_s[0], acc_s[1]);
#pragma unroll
            for (int half = 0; half < 2; ++half) sum[half] = row_sum_of<4>(sum[half]);
            if (!sums_are_read) barrier_wait(kSumsEmpty, kAttenders + kFolders);
            if (lane % 4 == 0 && slice == 0)
#pragma unroll
                for (int half = 0; half < kRows / 8; ++half)
                    sums.of_row[key_warp][lane / 4 + 8 * half] = make_float2(most[half], sum[half]);
            float *to = &sums.o[key_warp][0][slice * kSlice];
#pragma unroll
            for (int n = 0; n < kSlice; n += 64) {
                Values values;
                values.load(place, n);
                multiply_values(to + n, p[0], values);
            }
        }

    private:
        static constexpr float kLog2E = 1.44269504f;

        __device__ __forceinline__ QueryRow row_of(const DecodePlan &plan, const Cursor<kKeys> &turn, int half) const {
            const int row = static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half;
            return QueryRow(plan, turn.head, turn.row0(kRows) + min(row, rows - 1));
        }

        // Softcap, slopes and the tree, and what base 2 wants.
        __device__ __forceinline__ void modify(float (&acc_s)[2][4], const fa_kvcache_args &args,
                                               const DecodePlan &plan, const Cursor<kKeys> &turn, int key0) const {
            const QueryRow of[2] = {row_of(plan, turn, 0), row_of(plan, turn, 1)};
            const auto softcap = static_cast<float>(args.softcap);
            for_each(acc_s, [&](float &s, int half, int col) {
                const int key = key0 + col;
                if (args.softcap > 0) s = product(softcap, tanh_of(s / softcap));
                if (args.alibi_slopes.data)
                    s -= product(load_per_head<float>(args.alibi_slopes, turn.b, of[half].h),
                                 fabsf(static_cast<float>(turn.of.seq.start + of[half].i - key)));
                if (key < hi[half] && !fa_tree_shows(&args, &turn.of.seq, turn.b, of[half].i, key)) s = -infinity(0.0f);
                s = product(s, kLog2E);
            });
        }

        // The 16 scores of each row, of which a lane has four: f(score, row g or g + 8, column).
        template <typename F>
        static __device__ __forceinline__ void for_each(float (&acc_s)[2][4], const F &f) {
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) f(acc_s[j][c], c / 2, 8 * j + c % 2);
        }

        // 16 columns of Q; with float8, those of step d of the order above.
        static __device__ __forceinline__ void load_q(typename M::A &a, Queries &queries, int d) {
            if constexpr (kIsFloat8) {
                const int lane = threadIdx.x % 32, column = d / 2 * 32 + lane % 4 * 8 + d % 2 * 4;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint2 words =
                        load_shared_2(shared_address(queries.at(lane / 4 + 8 * half, column / 8)) + column % 8 * 2);
                    a.x[half] = words.x, a.x[half + 2] = words.y;
                }
            } else {
                M::load_a(a, M::place_a(queries), 0, d * 16);
            }
        }

        // Two e4m3 of a word's lower half as two Elements.
        static __device__ __forceinline__ uint32_t convert(uint32_t pair) {
            const __half2 halves(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
            if constexpr (kDtype<Element> == FA_FLOAT16) return reinterpret_cast<const uint32_t &>(halves);
            const float2 x = __half22float2(halves);
            return M::round_pair(x.x, x.y);
        }

        // S = Q K^T of 16 keys, in two chains that join.
        __device__ __forceinline__ void make_scores(float (&acc_s)[2][4], Stage &stage, Queries &queries,
                                                    int key_warp) const {
            const int lane = threadIdx.x % 32;
            float acc[2][2][4] = {};
            const auto place_k = [&] {
                if constexpr (kIsFloat8)
                    return 0;
                else
                    return M::place_b(stage.k, key_warp * 16);
            }();
#pragma unroll
            for (int d = 0; d < kDim / 16; d += 2) {
                typename M::A a[2];
                load_q(a[0], queries, d), load_q(a[1], queries, d + 1);
                typename M::B key[2][2]; // of each step: 8 keys, the next 8
                if constexpr (kIsFloat8) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const int column = d * 16 + lane % 4 * 8;
                        const auto *at = stage.k.at(key_warp * 16 + 8 * j + lane / 4, column / 16);
                        const uint2 words = load_shared_2(shared_address(at) + column % 16);
                        key[0][j] = {{convert(words.x), convert(words.x >> 16)}};
                        key[1][j] = {{convert(words.y), convert(words.y >> 16)}};
                    }
                } else {
                    M::load_b(key[0], place_k, d * 16, 0);
                    M::load_b(key[1], place_k, d * 16 + 16, 0);
                }
#pragma unroll
                for (int step = 0; step < 2; ++step)
#pragma unroll
                    for (int j = 0; j < 2; ++j) M::multiply(acc[step][j], a[step], key[step][j]);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) acc_s[j][c] = acc[0][j][c] + acc[1][j][c];
        }

        // Where a lane reads V of this warp's keys and columns.
        static __device__ __forceinline__ auto place_v(Stage &stage, int key_warp, int slice) {
            const int lane = threadIdx.x % 32;
            if constexpr (kIsFloat8) // columns of 16 bytes hold 16 elements, of which ldmatrix sees pairs
                return LanePlace(stage.v, key_warp * 16 + lane % 16, slice * kSlice / 16 + lane / 16);
            else
                return M::place_b_transposed(stage.v, key_warp * 16, slice * kSlice / 8);
        }

        // Operands of 64 columns, from column n on, as they lie in shared memory.
        struct Values {
            uint32_t words[kIsFloat8 ? 2 : 4][4];
            template <typename Place>
            __device__ __forceinline__ void load(const Place &place, int n) {
#pragma unroll
                for (int m = 0; m < (kIsFloat8 ? 2 : 4); ++m)
                    ldmatrix_4_transposed(words[m], place.at(0, kIsFloat8 ? n / 16 + 2 * m : n / 8 + 2 * m));
            }
        };

        // O of 16 keys and 64 columns, to shared memory: rows g and g + 8.
        __device__ __forceinline__ void multiply_values(float *sums, const typename M::A &p,
                                                        const Values &values) const {
            const int lane = threadIdx.x % 32, row = lane / 4;
            float acc[8][4] = {};
            if constexpr (kIsFloat8) {
                // Keys 0 - 7, 8 - 15 of 16 columns, of the next 16: even columns and odd ones.
                const auto pick = [&](uint32_t word, unsigned bytes) { return convert(__byte_perm(word, 0, bytes)); };
#pragma unroll
                for (int m = 0; m < 8; ++m) {
                    const uint32_t (&words)[4] = values.words[m / 4];
                    const uint32_t upper = words[m / 2 % 2 * 2], lower = words[m / 2 % 2 * 2 + 1];
                    const unsigned bytes = m % 2 ? 0x31 : 0x20;
                    M::multiply(acc[m], p, {{pick(upper, bytes), pick(lower, bytes)}});
                }
            } else {
#pragma unroll
                for (int m = 0; m < 8; ++m) {
                    const uint32_t (&words)[4] = values.words[m / 2];
                    M::multiply(acc[m], p, {{words[m % 2 * 2], words[m % 2 * 2 + 1]}});
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (row + 8 * half >= rows) continue;
                float *to = sums + (row + 8 * half) * (kDim + 8);
                if constexpr (kIsFloat8) {
#pragma unroll
                    for (int m = 0; m < 8; m += 2)
                        *reinterpret_cast<float4 *>(to + 8 * m + lane % 4 * 4) = make_float4(
                            acc[m][2 * half], acc[m + 1][2 * half], acc[m][2 * half + 1], acc[m + 1][2 * half + 1]);
                } else {
#pragma unroll
                    for (int m = 0; m < 8; ++m)
                        *reinterpret_cast<float2 *>(to + 8 * m + lane % 4 * 2) =
                            make_float2(acc[m][2 * half], acc[m][2 * half + 1]);
                }
            }
        }
    };

    // The sum of all key warps.
    static __device__ __forceinline__ Part<float> part_of(const Sums &sums, int row, int col) {
        Part<float> part = Part<float>::empty();
        float2 of_row[kKeyWarps];
#pragma unroll
        for (int w = 0; w < kKeyWarps; ++w) {
            of_row[w] = sums.of_row[w][row];
            part.max = fmaxf(part.max, of_row[w].x);
        }
#pragma unroll
        for (int w = 0; w < kKeyWarps; ++w) {
            const float factor = ex2_approx(of_row[w].x - Part<float>::shift_of(part.max));
            const float4 o = *reinterpret_cast<const float4 *>(&sums.o[w][row][col]);
            part.sum = fma_of(of_row[w].y, factor, part.sum);
            part.o[0] = fma_of(o.x, factor, part.o[0]), part.o[1] = fma_of(o.y, factor, part.o[1]);
            part.o[2] = fma_of(o.z, factor, part.o[2]), part.o[3] = fma_of(o.w, factor, part.o[3]);
        }
        return part;
    }
};

#endif
