// Decoding on tensor cores (mma.sync): float16 or bfloat16 queries over a cache of their dtype or of float8.
//
// Keys are the rows of a product and queries its columns, kRows = 8 or 16 of a line: S^T = K Q^T, O^T = V^T P^T. A key warp has
// kKeyTiles times 16 keys of a turn, with a running (m, l, O) of its own until the chunk ends; then the sums of all meet in
// shared memory:
//
//   S^T | m, P = e^(S - m), l | O^T += V^T P^T | next turn ... | at the chunk's end: (m, l, O) -> shared
//
// m need not be the largest score: it follows once that is 2^kSlack times as large, or more.
//
// Keys of e4m3 are converted to float16 as they are read, exactly. Four columns of theirs lie in a word where an mma wants two
// of either half of 16: the inner axis of S is taken in the order of the words, in Q too, and O comes as the words' even and
// odd bytes. Queries of bfloat16 become float16 for them, each row times a power of two: exactly, but for what is 2^38 times
// smaller than the row's largest.
#ifndef FA_DECODE_TENSOR_CORE_CUH
#define FA_DECODE_TENSOR_CORE_CUH

#include "cuda/decode.cuh"
#include "cuda/decode_tensor_core_copier.cuh"

template <typename Element_, typename Cache_, int kDim_, int kRows_, bool kPaged_>
struct TensorCoreDecode {
    using Element = Element_;
    using Cache = Cache_; // Element, or uint8_t: e4m3
    using Real = float;
    static constexpr bool kIsFloat8 = sizeof(Cache) == 1;
    using Operand = std::conditional_t<kIsFloat8, __half, Element>; // of products
    using M = Mma<Operand>;
    static constexpr int kDim = kDim_, kRows = kRows_;
    static constexpr int kKeys = 64 * 128 / kDim; // K and V of a turn: 16 KiB each, of float8 half
    static constexpr int kKeyWarps = kDim > 128 ? 2 : 4, kSlices = 4 / kKeyWarps, kSlice = kDim / kSlices; // of columns
    static constexpr int kCopiers = 128, kAttenders = 128, kThreads = kCopiers + kAttenders + kFolders;
    static constexpr bool kPaged = kPaged_, kLooksAhead = kPaged;
    static constexpr bool kLeavesRoom = kRows == 8;            // for a block of decode_merge beside
    static constexpr int kRegisters = kLeavesRoom ? 144 : 168; // a thread's; of decode_merge 72
    static constexpr int kKeyTiles = kKeys / 16 / kKeyWarps, kRowTiles = kRows / 8, kColTiles = kSlice / 16; // a warp's

    using Stage = DecodeStage<Cache, kKeys, kDim>;
    using Queries = DecodeQueries<Operand, kRows, kDim>;
    using Copier = TensorCoreCopier<TensorCoreDecode>;
    struct Sums {
        // By lane: columns g, g + 8, g + 16 ... of a slice lie together, rows apart from each other's banks.
        alignas(16) float o[kKeyWarps][kRows][kDim + 4];
        float2 of_row[kKeyWarps][kRows]; // m, l
    };

    // A lane 4 g + t has queries 2t and 2t + 1 of every 8, and of those keys g and g + 8 of 16.
    class Attender {
        float acc_o[kColTiles][kRowTiles][4];        // O^T
        float most[kRowTiles][2], sum[kRowTiles][2]; // m; l of this lane's keys
        int rows, all_lo, all_hi;                    // of the line; the keys that all rows see
        float unit;                                  // what a product is times in scores

        static __device__ __forceinline__ int warp() { return (static_cast<int>(threadIdx.x) - kCopiers) / 32; }
        static __device__ __forceinline__ int key_warp() { return warp() % kKeyWarps; }
        static __device__ __forceinline__ int slice() { return warp() / kKeyWarps % kSlices; }
        // Row g of eight of K or V: of float8 in an order in which the words that lanes read lie in different banks.
        static __device__ __forceinline__ int key_of(int g) { return kIsFloat8 ? g % 4 * 2 + g / 4 : g; }

    public:
        __device__ __forceinline__ void begin_line(const fa_kvcache_args &args, const DecodePlan &plan,
                                                   const Cursor<kKeys> &turn) {
            rows = turn.rows(plan, kRows);
            const int first = QueryRow(plan, turn.head, turn.row0(kRows)).i;
            const int last = QueryRow(plan, turn.head, turn.row0(kRows) + rows - 1).i;
            all_lo = static_cast<int>(fa_cached_keys(&args, &turn.of.seq, last).lo);
            all_hi = static_cast<int>(fa_cached_keys(&args, &turn.of.seq, first).hi);
            unit = static_cast<float>(args.softmax_scale) * descale_of(args.k_descale, turn.b, turn.head);
            if (!plan.is_modified) unit *= kLog2E;
        }

        __device__ __forceinline__ void begin_chunk() {
#pragma unroll
            for (int n = 0; n < kRowTiles; ++n) {
                most[n][0] = most[n][1] = -infinity(0.0f), sum[n][0] = sum[n][1] = 0;
#pragma unroll
                for (int m = 0; m < kColTiles; ++m)
#pragma unroll
                    for (int c = 0; c < 4; ++c) acc_o[m][n][c] = 0;
            }
        }

        __device__ __forceinline__ void attend(Stage &stage, Queries &queries, const fa_kvcache_args &args,
                                               const DecodePlan &plan, const Cursor<kKeys> &turn, int turn_at, Sums &) {
            const int of_warp = key_warp() * 16 * kKeyTiles, key0 = turn_at * kKeys + of_warp;
            Scores acc_s[kKeyTiles];
            make_scores(acc_s, stage, queries, of_warp);
            for_each(acc_s, [&](float &s, int n, int r, int) { s = product(s, unit_of(queries, n, r)); });
            if (__builtin_expect(plan.is_modified, 0)) modify(acc_s, args, plan, turn, key0);
            if (__builtin_expect(key0 < all_lo || key0 + 16 * kKeyTiles > all_hi, 0))
                mask(acc_s, args, plan, turn, key0);
            Values values[kLoadsAhead ? kKeyTiles : 1];
            if constexpr (kLoadsAhead)
#pragma unroll
                for (int k = 0; k < kKeyTiles; ++k) values[k].load(stage, of_warp + 16 * k, slice());
            follow_max(acc_s);
            typename M::B p[kKeyTiles][kRowTiles];
            make_p(p, acc_s);
#pragma unroll
            for (int k = 0; k < kKeyTiles; ++k) {
                if constexpr (!kLoadsAhead) values[0].load(stage, of_warp + 16 * k, slice());
                add_values(p[k], values[kLoadsAhead ? k : 0]);
            }
        }

        // To shared memory, for all attenders.
        __device__ __forceinline__ void end_chunk(Sums &sums) {
            const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
            for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int row = 8 * n + 2 * t + r;
#pragma unroll
                    for (int step = 4; step < 32; step *= 2) sum[n][r] += __shfl_xor_sync(~0u, sum[n][r], step);
                    if (row >= rows) continue;
                    if (g == 0 && slice() == 0) sums.of_row[key_warp()][row] = make_float2(most[n][r], sum[n][r]);
                    float *const to = &sums.o[key_warp()][row][slice() * kSlice + g * 2 * kColTiles];
#pragma unroll
                    for (int m = 0; m < kColTiles; m += 2)
                        *reinterpret_cast<float4 *>(to + 2 * m) =
                            make_float4(acc_o[m][n][r], acc_o[m][n][r + 2], acc_o[m + 1][n][r], acc_o[m + 1][n][r + 2]);
                }
        }

    private:
        static constexpr float kLog2E = 1.44269504f, kSlack = 8; // 2^8: float16 holds P
        static constexpr bool kLoadsAhead = kRowTiles == 1;      // V, before P is there: there are registers for it
        struct Scores {
            float x[kRowTiles][4];
        };

        // f(score, row tile, row 0 or 1 of this lane's two, key of the warp's).
        template <typename F>
        static __device__ __forceinline__ void for_each(Scores (&acc_s)[kKeyTiles], const F &f) {
            const int g = threadIdx.x % 32 / 4;
#pragma unroll
            for (int k = 0; k < kKeyTiles; ++k)
#pragma unroll
                for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
                    for (int c = 0; c < 4; ++c) f(acc_s[k].x[n][c], n, c % 2, 16 * k + c / 2 * 8 + key_of(g));
        }

        __device__ __forceinline__ float unit_of(const Queries &queries, int n, int r) const {
            if constexpr (kIsFloat8) return unit * queries.unit[8 * n + threadIdx.x % 4 * 2 + r];
            return unit;
        }
        // first: of the lane's rows, made where a score is rare, so that nothing of it is kept for where it is not.
        static __device__ __forceinline__ int first_row() {
            int row = static_cast<int>(threadIdx.x) % 4 * 2;
            keep(row);
            return row;
        }
        __device__ __forceinline__ QueryRow row_of(const DecodePlan &plan, const Cursor<kKeys> &turn, int first, int n,
                                                   int r) const {
            const int row = 8 * n + first + r;
            return QueryRow(plan, turn.head, turn.row0(kRows) + min(row, rows - 1));
        }

        // Softcap, slopes and the tree, and what base 2 wants.
        __device__ __forceinline__ void modify(Scores (&acc_s)[kKeyTiles], const fa_kvcache_args &args,
                                               const DecodePlan &plan, const Cursor<kKeys> &turn, int key0) const {
            const ScoreChanges<float> changes(args, turn);
            const int first = first_row();
            for_each(acc_s, [&](float &s, int n, int r, int key) {
                s = product(changes.of(s, row_of(plan, turn, first, n, r), key0 + key), kLog2E);
            });
        }

        __device__ __forceinline__ void mask(Scores (&acc_s)[kKeyTiles], const fa_kvcache_args &args,
                                             const DecodePlan &plan, const Cursor<kKeys> &turn, int key0) const {
            const int first = first_row();
            for_each(acc_s, [&](float &s, int n, int r, int key) {
                const fa_interval keys = fa_cached_keys(&args, &turn.of.seq, row_of(plan, turn, first, n, r).i);
                if (key0 + key < keys.lo || key0 + key >= keys.hi) s = -infinity(0.0f);
            });
        }

        // Where scores have grown by more than the slack, brings m, l and O to the largest so far.
        __device__ __forceinline__ void follow_max(Scores (&acc_s)[kKeyTiles]) {
            float now[kRowTiles][2];
            bool has_grown = false;
#pragma unroll
            for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    now[n][r] = -infinity(0.0f);
#pragma unroll
                    for (int k = 0; k < kKeyTiles; ++k)
                        now[n][r] = fmaxf(now[n][r], fmaxf(acc_s[k].x[n][r], acc_s[k].x[n][r + 2]));
#pragma unroll
                    for (int step = 4; step < 32; step *= 2)
                        now[n][r] = fmaxf(now[n][r], __shfl_xor_sync(~0u, now[n][r], step));
                    has_grown |= now[n][r] > most[n][r] + kSlack;
                }
            if (!__any_sync(~0u, has_grown)) return;
#pragma unroll
            for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    if (!(now[n][r] > most[n][r] + kSlack)) now[n][r] = most[n][r];
                    const float factor = ex2_approx(most[n][r] - shift_of(now[n][r]));
                    most[n][r] = now[n][r];
                    sum[n][r] *= factor;
#pragma unroll
                    for (int m = 0; m < kColTiles; ++m) acc_o[m][n][r] *= factor, acc_o[m][n][r + 2] *= factor;
                }
        }

        // P^T, as the second operand of a product.
        __device__ __forceinline__ void make_p(typename M::B (&p)[kKeyTiles][kRowTiles], Scores (&acc_s)[kKeyTiles]) {
#pragma unroll
            for (int n = 0; n < kRowTiles; ++n) {
                const float shift[2] = {shift_of(most[n][0]), shift_of(most[n][1])};
#pragma unroll
                for (int k = 0; k < kKeyTiles; ++k) {
                    float (&s)[4] = acc_s[k].x[n];
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        s[c] = ex2_approx(s[c] - shift[c % 2]);
                        sum[n][c % 2] += s[c];
                    }
                    p[k][n].x[0] = transpose_8x8(M::round_pair(s[0], s[1]));
                    p[k][n].x[1] = transpose_8x8(M::round_pair(s[2], s[3]));
                }
            }
        }

        // S^T of the warp's keys: in two chains, which join, where there are few.
        static __device__ __forceinline__ void make_scores(Scores (&acc_s)[kKeyTiles], Stage &stage, Queries &queries,
                                                           int key0) {
            constexpr int kChains = kKeyTiles * kRowTiles <= 2 ? 2 : 1;
            const int lane = threadIdx.x % 32;
            Scores acc[kChains][kKeyTiles] = {};
            const LanePlace place_q(queries.x, lane % 8, lane / 8);
#pragma unroll
            for (int d = 0; d < kDim; d += 32) {
                uint32_t q[kRowTiles][4]; // of 32 columns
#pragma unroll
                for (int n = 0; n < kRowTiles; ++n) ldmatrix_4(q[n], place_q.at(8 * n, d / 8));
#pragma unroll
                for (int k = 0; k < kKeyTiles; ++k) {
                    typename M::A keys[2];
                    load_keys(keys, stage, key0 + 16 * k, d);
#pragma unroll
                    for (int n = 0; n < kRowTiles; ++n) {
                        M::multiply(acc[0][k].x[n], keys[0], {{q[n][0], q[n][1]}});
                        M::multiply(acc[kChains - 1][k].x[n], keys[1], {{q[n][2], q[n][3]}});
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < kKeyTiles; ++k)
#pragma unroll
                for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        acc_s[k].x[n][c] = kChains == 2 ? acc[0][k].x[n][c] + acc[1][k].x[n][c] : acc[0][k].x[n][c];
        }

        // 32 columns of 16 keys.
        static __device__ __forceinline__ void load_keys(typename M::A (&keys)[2], Stage &stage, int key0, int d) {
            if constexpr (kIsFloat8) {
                const int lane = threadIdx.x % 32, column = d + lane % 4 * 8;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const auto *at = stage.k.at(key0 + 8 * half + key_of(lane / 4), column / 16);
                    const uint2 words = load_shared_2(shared_address(at) + column % 16);
                    keys[0].x[half] = halves_of(words.x), keys[0].x[half + 2] = halves_of(words.x >> 16);
                    keys[1].x[half] = halves_of(words.y), keys[1].x[half + 2] = halves_of(words.y >> 16);
                }
            } else {
                const auto place = M::place_a(stage.k, key0);
                M::load_a(keys[0], place, 0, d), M::load_a(keys[1], place, 0, d + 16);
            }
        }

        // V^T of 16 keys: of float8 as pairs of bytes, columns 2n and 2n + 1 of a key, of 32 columns at a time.
        struct Values {
            uint32_t x[kColTiles / (kIsFloat8 ? 2 : 1)][4];

            __device__ __forceinline__ void load(Stage &stage, int key0, int slice) {
                const int lane = threadIdx.x % 32;
                const auto place = [&] {
                    if constexpr (
                        kIsFloat8) // matrices of 8 keys and 16 bytes: either half of 32 columns, then of 16 keys
                        return LanePlace(stage.v, key0 + lane / 16 * 8 + key_of(lane % 8),
                                         slice * kSlice / 16 + lane / 8 % 2);
                    else
                        return M::place_a_transposed(stage.v, key0, slice * kSlice / 8);
                }();
#pragma unroll
                for (int m = 0; m < sizeof(x) / sizeof(x[0]); ++m) ldmatrix_4_transposed(x[m], place.at(0, 2 * m));
            }
            // Rows 16 m to 16 m + 15 of a product; of float8 the even, or the odd ones of 32.
            __device__ __forceinline__ typename M::A rows(int m) const {
                typename M::A a;
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    a.x[c] = kIsFloat8 ? halves_of(__byte_perm(x[m / 2][c], 0, m % 2 ? 0x31 : 0x20)) : x[m][c];
                return a;
            }
        };

        // O^T += V^T P^T of 16 keys.
        __device__ __forceinline__ void add_values(const typename M::B (&p)[kRowTiles], const Values &values) {
#pragma unroll
            for (int m = 0; m < kColTiles; ++m) {
                const typename M::A rows_of = values.rows(m);
#pragma unroll
                for (int n = 0; n < kRowTiles; ++n) M::multiply(acc_o[m][n], rows_of, p[n]);
            }
        }

        // Two e4m3 of a word's lower half.
        static __device__ __forceinline__ uint32_t halves_of(uint32_t pair) {
            const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
            return static_cast<uint32_t>(halves.y) << 16 | halves.x;
        }
    };

    // Columns of O, four at a time, as they lie in Sums: of float8 tiles are the even columns of 32, and the odd ones.
    static __device__ __forceinline__ int column(int quad, int c) {
        constexpr int kOfLane = kColTiles / 2, kOfSlice = 8 * kOfLane; // quads
        const int g = quad % kOfSlice / kOfLane, first = quad / kOfSlice * kSlice + quad % kOfLane * 32;
        return kIsFloat8 ? first + 2 * g + c / 2 + c % 2 * 16 : first + g + 8 * c;
    }

    // The sum of all key warps.
    static __device__ __forceinline__ Part<float> part_of(const Sums &sums, int row, int quad) {
        Part<float> part = Part<float>::empty();
        float2 of_row[kKeyWarps];
#pragma unroll
        for (int w = 0; w < kKeyWarps; ++w) {
            of_row[w] = sums.of_row[w][row];
            part.max = fmaxf(part.max, of_row[w].x);
        }
#pragma unroll
        for (int w = 0; w < kKeyWarps; ++w) {
            const float factor = ex2_approx(of_row[w].x - shift_of(part.max));
            const float4 o = *reinterpret_cast<const float4 *>(&sums.o[w][row][4 * quad]);
            part.sum = fma_of(of_row[w].y, factor, part.sum);
            part.o[0] = fma_of(o.x, factor, part.o[0]), part.o[1] = fma_of(o.y, factor, part.o[1]);
            part.o[2] = fma_of(o.z, factor, part.o[2]), part.o[3] = fma_of(o.w, factor, part.o[3]);
        }
        return part;
    }
};

#endif
