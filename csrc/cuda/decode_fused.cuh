// A turn of decoding on CUDA cores: every dtype, head_dim, stride and alignment, in float32 or, for float64, in float64.
//
// The rows of a turn's K and V lie in shared memory as Real. The attenders go through a turn in three steps, which the scores
// in shared memory join:
//
//   scores    kSplit threads a key, each with every kSplit-th 16 bytes of its row: q.k of 8 rows; their sums go round in
//             shuffles, of which each halves the rows that a thread has  -> p
//   softmax   kRowLanes threads a row: scale, softcap, slope, masks | m | p = e^(s - m) | l  -> p, of_row
//   values    teams of kDim / 4 threads, four columns each: p V of kTeamRows rows and some of the keys -> o
//
//   wait kSumsEmpty (who reads o, and p) | p | barrier | p, of_row | barrier | o
//
// Teams that are not needed for rows share the keys of the others: `groups` of rows, kTeams / groups teams each, whose sums
// part_of adds. How many there are follows from the line's rows alone, and so do all bits.
//
// Copiers copy where the cache is of Real in aligned 16 bytes, and otherwise load and convert.
#ifndef FA_DECODE_FUSED_CUH
#define FA_DECODE_FUSED_CUH

#include "cuda/decode.cuh"

enum { kScoresThere = 4 }; // named barrier of the attenders alone: p is complete

// An element of a cache; uint8_t: e4m3.
template <typename Real, typename Cache>
__device__ __forceinline__ Real real_of(Cache x) {
    if constexpr (std::is_same_v<Cache, uint8_t>)
        return __half2float(__half(__nv_cvt_fp8_to_halfraw(x, __NV_E4M3)));
    else if constexpr (std::is_same_v<Cache, __half>)
        return __half2float(x);
    else if constexpr (std::is_same_v<Cache, __nv_bfloat16>)
        return __bfloat162float(x);
    else
        return x;
}

// x as a dtype holds it.
template <typename Real>
__device__ __forceinline__ Real rounded(Real x, fa_dtype dtype) {
    switch (dtype) {
    case FA_FLOAT16: return __half2float(__float2half_rn(static_cast<float>(x)));
    case FA_BFLOAT16: return __bfloat162float(__float2bfloat16_rn(static_cast<float>(x)));
    case FA_FLOAT8_E4M3: return e4m3_of(static_cast<float>(x));
    default: return x;
    }
}

// Whether a row's 16 bytes of Real may be copied as they are.
template <typename Real>
__device__ __forceinline__ bool has_vectors_of(const fa_tensor &t, fa_dtype dtype) {
    return fa_dtype_bytes(dtype) == sizeof(Real) &&
           (reinterpret_cast<uintptr_t>(t.data) |
            static_cast<uintptr_t>((t.stride_b | t.stride_h | t.stride_l) * static_cast<int64_t>(sizeof(Real)))) %
                   16 ==
               0;
}

// Sums of kCount values over kLanes neighbours. Lane n gets those of kCount / kLanes values, from n kCount / kLanes on; where
// there are more lanes than values, lanes / values neighbours get the same one.
template <int kCount, int kLanes, typename Real>
__device__ __forceinline__ void scatter_sums(Real (&x)[kCount], int lane) {
    int count = kCount;
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
        if (count == 1) {
            x[0] += __shfl_xor_sync(~0u, x[0], step);
            continue;
        }
        count /= 2;
        const bool is_upper = lane & step;
#pragma unroll
        for (int n = 0; n < kCount / 2; ++n) {
            if (n >= count) break;
            const Real kept = is_upper ? x[n + count] : x[n], sent = is_upper ? x[n] : x[n + count];
            x[n] = kept + __shfl_xor_sync(~0u, sent, step);
        }
    }
}

template <typename Real_, int kDim_, int kRows_, int kStages_>
struct FusedDecode {
    using Real = Real_;
    static constexpr bool kIsDouble = sizeof(Real) == 8;
    static constexpr int kDim = kDim_, kRows = kRows_, kStages = kStages_;
    static constexpr int kKeys = 16 * 1024 / (kDim * sizeof(Real)); // K and V of a stage: 16 KiB each
    static constexpr int kCopiers = 128, kAttenders = kDim > 128 || kIsDouble ? 128 : 256; // threads
    static constexpr int kChunks = kIsDouble ? 1 : 2, kFolders = kRows * kDim / 4 / kChunks;
    static constexpr int kThreads = kCopiers + kAttenders + kFolders;
    // A thread's: with 512 threads of float32 blocks of decode_merge fit beside.
    static constexpr int kRegisters = (kThreads > 512 || kIsDouble ? 64 : 57) * 1024 / kThreads / 8 * 8;
    static constexpr int kQuads = kDim / 4, kTeams = kAttenders / kQuads; // of attenders, four columns each
    static constexpr int kLeastTeamRows = kRows / kTeams > 4 ? kRows / kTeams : 4;
    static constexpr int kTeamRows = kLeastTeamRows < kRows ? kLeastTeamRows : kRows;
    static_assert(kTeams * kTeamRows >= kRows && kKeys % (4 * kTeams) == 0);

    struct Stage {
        alignas(16) Real k[kKeys][kDim], v[kKeys][kDim];
    };
    struct Queries {
        alignas(16) Real x[kRows][kDim];
    };
    struct Sums {
        alignas(16) Real o[kTeams][kTeamRows][kDim];
        alignas(16) Real p[kRows][kKeys + kVec<Real>]; // scores, then e^(s - m); rows apart from each other's banks
        Real of_row[kRows][2];                         // m, l
        int groups;
    };

    // A thread copies 16 bytes of a key at a time.
    struct Copier {
        static constexpr int kColumns = kDim / kVec<Real>, kCopies = kKeys * kColumns / kCopiers;
        static_assert(kCopies * kCopiers == kKeys * kColumns);
        int page[kCopies]; // of each key; of the first alone where a turn lies within a page

        // Of copy n: the key's place in the turn, and the column that it begins with.
        static __device__ __forceinline__ int row(int n) {
            if constexpr (kColumns <= kCopiers)
                return static_cast<int>(threadIdx.x) / kColumns + n * (kCopiers / kColumns);
            else
                return n / (kColumns / kCopiers);
        }
        static __device__ __forceinline__ int col(int n) {
            if constexpr (kColumns <= kCopiers)
                return static_cast<int>(threadIdx.x) % kColumns * kVec<Real>;
            else
                return (static_cast<int>(threadIdx.x) + n % (kColumns / kCopiers) * kCopiers) * kVec<Real>;
        }
        // Bytes of a row that the 16 from a column on hold.
        static __device__ __forceinline__ int bytes_from(int col, int width) {
            return min(max((width - col) * static_cast<int>(sizeof(Real)), 0), 16);
        }
        // Tokens of the sequence that are read from the cache.
        static __device__ __forceinline__ int old_end(const fa_kvcache_args &args, const Cursor<kKeys> &turn) {
            return args.k.data ? min(turn.of.seq.start, turn.of.seq.len_k) : turn.of.seq.len_k;
        }
        static __device__ __forceinline__ int row_in_page(const DecodePlan &plan, int token) {
            return token - plan.page_size.quotient(token) * static_cast<int>(plan.page_size.value);
        }
        static __device__ __forceinline__ bool exists(const fa_kvcache_args &args, int page_of) {
            return static_cast<unsigned>(page_of) < static_cast<unsigned>(args.pages);
        }

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
                const int token = token0 + row(n);
                page[n] = token < turn.of.seq.len_k ? table[plan.page_size.quotient(token)] : -1;
            }
        }

        __device__ __forceinline__ void copy(Stage &stage, const fa_kvcache_args &args, const DecodePlan &plan,
                                             const Cursor<kKeys> &turn) const {
            if (has_vectors_of<Real>(args.k_cache, args.cache_dtype) &&
                has_vectors_of<Real>(args.v_cache, args.cache_dtype)) {
                if (plan.turns_in_pages) {
                    copy_tile<true>(stage.k, args.k_cache, static_cast<int>(args.head_dim), args, plan, turn);
                    copy_tile<true>(stage.v, args.v_cache, static_cast<int>(args.head_dim_v), args, plan, turn);
                } else {
                    copy_tile<false>(stage.k, args.k_cache, static_cast<int>(args.head_dim), args, plan, turn);
                    copy_tile<false>(stage.v, args.v_cache, static_cast<int>(args.head_dim_v), args, plan, turn);
                }
            } else {
                convert_stage(stage, args, plan, turn);
            }
            if (args.k.data && (turn.turn + 1) * kKeys > turn.of.seq.start) add_new_tokens(&stage, &args, turn);
        }

        // The rows of a line, rotated, in q's dtype.
        __device__ __forceinline__ void load(Queries &queries, const fa_kvcache_args &args, const DecodePlan &plan,
                                             const Cursor<kKeys> &turn) const {
            const bool copies = !args.rotary.cos && has_vectors_of<Real>(args.q, args.dtype);
            const int width = static_cast<int>(args.head_dim), count = turn.rows(plan, kRows) * kColumns;
#pragma unroll 1
            for (int n = static_cast<int>(threadIdx.x); n < count; n += kCopiers) {
                const int row = n / kColumns, col = n % kColumns * kVec<Real>;
                const QueryRow of(plan, turn.head, turn.row0(kRows) + row);
                const int64_t at = fa_row_offset(&args.q, turn.b, of.h, of.i);
                Real *to = &queries.x[row][col];
                if (copies) {
                    cp_async_16_part(shared_address(to), static_cast<const Real *>(args.q.data) + at + col,
                                     bytes_from(col, width));
                    continue;
                }
                Vec<Real> vec;
                load_rotated(vec.x, args, args.q, at, col, width, true, turn.of.seq.start + of.i);
#pragma unroll
                for (int c = 0; c < kVec<Real>; ++c) vec.x[c] = rounded(vec.x[c], args.dtype);
                *reinterpret_cast<Vec<Real> *>(to) = vec;
            }
        }

    private:
        // Rows of a cache of Real in aligned 16 bytes; zeros where there are none. New tokens are left to add_new_tokens: it
        // does not wait for copies, which might come after it.
        template <bool kInPages>
        __device__ __forceinline__ void copy_tile(Real (&tile)[kKeys][kDim], const fa_tensor &cache, int width,
                                                  const fa_kvcache_args &args, const DecodePlan &plan,
                                                  const Cursor<kKeys> &turn) const {
            const int token0 = turn.turn * kKeys, end = old_end(args, turn);
            const Real *head = static_cast<const Real *>(cache.data) + turn.head * cache.stride_h;
            if (kInPages) head += page[0] * cache.stride_b + row_in_page(plan, token0) * cache.stride_l;
#pragma unroll
            for (int n = 0; n < kCopies; ++n) {
                const int token = token0 + row(n), page_of = page[kInPages ? 0 : n];
                if (token >= end && token < turn.of.seq.len_k) continue;
                const bool is_read = token >= turn.of.lo && token < end && exists(args, page_of);
                const int64_t at = kInPages ? row(n) * cache.stride_l
                                            : page_of * cache.stride_b + row_in_page(plan, token) * cache.stride_l;
                cp_async_16_part(shared_address(&tile[row(n)][col(n)]), head + at + col(n),
                                 is_read ? bytes_from(col(n), width) : 0);
            }
        }

        // Rows of any cache. Pages are looked up here: copies that wait need no register for them.
        __device__ __forceinline__ static void convert_stage(Stage &stage, const fa_kvcache_args &args,
                                                             const DecodePlan &plan, const Cursor<kKeys> &turn) {
            const auto convert = [&](auto of_type) {
                using Cache = decltype(of_type);
                const int k_width = static_cast<int>(args.head_dim), v_width = static_cast<int>(args.head_dim_v);
                convert_tile<Cache>(stage.k, &args.k_cache, k_width, &args, &plan, turn);
                convert_tile<Cache>(stage.v, &args.v_cache, v_width, &args, &plan, turn);
            };
            if constexpr (kIsDouble) {
                convert(double());
            } else {
                switch (args.cache_dtype) {
                case FA_FLOAT32: convert(float()); break;
                case FA_FLOAT16: convert(__half()); break;
                case FA_BFLOAT16: convert(__nv_bfloat16()); break;
                default: convert(uint8_t()); break;
                }
            }
        }
        template <typename Cache>
        static __device__ __noinline__ void convert_tile(Real (&tile)[kKeys][kDim], const fa_tensor *cache, int width,
                                                         const fa_kvcache_args *args, const DecodePlan *plan,
                                                         const Cursor<kKeys> turn) {
            struct alignas(sizeof(Cache) * kVec<Real>) Loaded {
                Cache x[kVec<Real>];
            };
            const int end = old_end(*args, turn);
            Loaded loaded[kCopies]; // all on their way before the first is waited for
#pragma unroll
            for (int n = 0; n < kCopies; ++n) {
                const int token = turn.turn * kKeys + row(n);
                int page_of = -1;
                if (token >= turn.of.lo && token < end)
                    page_of = args->page_table
                                  ? args->page_table[turn.b * args->page_table_stride + plan->page_size.quotient(token)]
                                  : turn.b;
                const Cache *from = static_cast<const Cache *>(cache->data) + page_of * cache->stride_b +
                                    turn.head * cache->stride_h + row_in_page(*plan, token) * cache->stride_l + col(n);
                const int count = exists(*args, page_of) ? width - col(n) : 0;
                if (count >= kVec<Real> && reinterpret_cast<uintptr_t>(from) % sizeof(Loaded) == 0) {
                    loaded[n] = *reinterpret_cast<const Loaded *>(from);
                } else {
#pragma unroll
                    for (int c = 0; c < kVec<Real>; ++c) loaded[n].x[c] = c < count ? from[c] : Cache(0.0f);
                }
            }
#pragma unroll
            for (int n = 0; n < kCopies; ++n) {
                Vec<Real> vec;
#pragma unroll
                for (int c = 0; c < kVec<Real>; ++c) vec.x[c] = real_of<Real>(loaded[n].x[c]);
                *reinterpret_cast<Vec<Real> *>(&tile[row(n)][col(n)]) = vec;
            }
        }

        // The new tokens of a turn, from k and v, as the cache's dtype holds them; the block that has their first rows stores
        // them in the cache, too. Not inlined, and by value: what is rare takes no register from what is not. A thread writes
        // what it has copied.
        static __device__ __noinline__ void add_new_tokens(Stage *stage, const fa_kvcache_args *args,
                                                           const Cursor<kKeys> turn) {
            const auto add = [&](Real(&tile)[kKeys][kDim], int n, int token, const fa_tensor &from,
                                 const fa_tensor &cache, int64_t width, bool rotates, const fa_per_head &descale) {
                Vec<Real> vec;
                load_rotated(vec.x, *args, from, fa_row_offset(&from, turn.b, turn.head, token - turn.of.seq.start),
                             col(n), static_cast<int>(width), rotates, token);
                const float scale = descale_of(descale, turn.b, turn.head);
                const int64_t page = fa_page_of(args, turn.b, token);
                const int64_t at = fa_cache_offset(args, &cache, page, turn.head, token) + col(n);
#pragma unroll 1
                for (int c = 0; c < kVec<Real>; ++c) {
                    const bool is_there = col(n) + c < width;
                    const Real x = descale.data ? vec.x[c] / scale : vec.x[c];
                    tile[row(n)][col(n) + c] = is_there ? rounded(x, args->cache_dtype) : Real(0);
                    if (turn.m_block == 0 && page >= 0 && is_there)
                        store_cached(cache.data, args->cache_dtype, at + c, x);
                }
            };
#pragma unroll 1
            for (int n = 0; n < kCopies; ++n) {
                const int token = turn.turn * kKeys + row(n);
                if (token < turn.of.seq.start || token >= turn.of.seq.len_k) continue;
                add(stage->k, n, token, args->k, args->k_cache, args->head_dim, true, args->k_descale);
                add(stage->v, n, token, args->v, args->v_cache, args->head_dim_v, false, args->v_descale);
            }
        }
    };

    struct Attender {
        static constexpr int kSplit = kAttenders / kKeys;           // threads a key, neighbours
        static constexpr int kSteps = kDim / (kSplit * kVec<Real>); // 16 bytes of K a thread has
        static constexpr int kGroup = kRows < 8 ? kRows : 8;        // rows whose scores are made together
        static constexpr int kRowLanes = kKeys < 32 ? kKeys : 32;   // threads a row in softmax
        static constexpr int kOfLane = kKeys / kRowLanes;           // keys each
        static constexpr int kRowsAtOnce = kAttenders / kRowLanes;  // in softmax
        static constexpr int kPasses = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;
        static_assert(kSplit <= 32 && kSplit * kKeys == kAttenders && kSteps * kSplit * kVec<Real> == kDim);

        int lo[kPasses], hi[kPasses], rows; // keys that this thread's rows in softmax see; rows of the line
        Real unit;                          // what a product is times in scores

        static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x) - kCopiers; }
        static __device__ __forceinline__ int softmax_row(int pass) {
            return thread() / kRowLanes + pass * kRowsAtOnce;
        }

        __device__ __forceinline__ void begin_line(const fa_kvcache_args &args, const DecodePlan &plan,
                                                   const Cursor<kKeys> &turn) {
            rows = turn.rows(plan, kRows);
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                const fa_interval keys = fa_cached_keys(&args, &turn.of.seq, query_of(plan, turn, pass).i);
                lo[pass] = static_cast<int>(keys.lo), hi[pass] = static_cast<int>(keys.hi);
            }
            unit = static_cast<Real>(args.softmax_scale) * descale_of(args.k_descale, turn.b, turn.head);
            if (!plan.is_modified) unit *= kLog2E;
        }

        __device__ __forceinline__ void attend(Stage &stage, Queries &queries, const fa_kvcache_args &args,
                                               const DecodePlan &plan, const Cursor<kKeys> &turn, Sums &sums,
                                               bool sums_are_read) const {
#pragma unroll 1
            for (int row0 = 0; row0 < rows; row0 += kGroup) {
                // What this waits for before it writes p: o was read by folders, and p by all attenders, who come here, too.
                const bool waits = row0 == 0 && !sums_are_read;
                if (kGroup > 4 && rows - row0 <= 4)
                    make_scores < kGroup<4 ? kGroup : 4>(stage, queries, sums, row0, waits);
                else
                    make_scores<kGroup>(stage, queries, sums, row0, waits);
            }
            barrier_wait(kScoresThere, kAttenders);
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass)
                if (thread() / 32 * 32 / kRowLanes + pass * kRowsAtOnce < rows) // the warp has a row that is there
                    normalize(args, plan, turn, sums, pass);
            barrier_wait(kScoresThere, kAttenders);
            multiply_values(stage, sums);
        }

    private:
        static constexpr Real kLog2E = Real(1.44269504088896340736);

        // q.k of kCount rows from row0 on and this thread's key.
        template <int kCount>
        __device__ __forceinline__ void make_scores(const Stage &stage, const Queries &queries, Sums &sums, int row0,
                                                    bool waits) const {
            const int key = thread() / kSplit, own = thread() % kSplit;
            // Where kSplit threads read less than all banks, keys that are read together begin elsewhere.
            const int twist = kSplit < 8 ? key % (8 / kSplit) : 0;
            Real acc_s[kCount] = {};
#pragma unroll(kCount > 4 ? 1 : 2)
            for (int step = 0; step < kSteps; ++step) {
                const int col = ((step ^ twist) * kSplit + own) * kVec<Real>;
                const Vec<Real> k = vec_at(&stage.k[key][col]);
#pragma unroll
                for (int r = 0; r < kCount; ++r) {
                    const Vec<Real> q = vec_at(&queries.x[row0 + r][col]);
#pragma unroll
                    for (int c = 0; c < kVec<Real>; ++c) acc_s[r] = fma_of(q.x[c], k.x[c], acc_s[r]);
                }
            }
            scatter_sums<kCount, kSplit>(acc_s, own);
            if (waits) barrier_wait(kSumsEmpty, kAttenders + kFolders);
            constexpr int kOwnRows = kCount > kSplit ? kCount / kSplit : 1,
                          kAlike = kSplit > kCount ? kSplit / kCount : 1;
            if (own % kAlike == 0)
#pragma unroll
                for (int r = 0; r < kOwnRows; ++r) sums.p[row0 + own / kAlike * kOwnRows + r][key] = acc_s[r];
        }

        __device__ __forceinline__ QueryRow query_of(const DecodePlan &plan, const Cursor<kKeys> &turn,
                                                     int pass) const {
            return QueryRow(plan, turn.head, turn.row0(kRows) + min(softmax_row(pass), rows - 1));
        }

        // Softcap, slopes and the tree, and what base 2 wants.
        __device__ __forceinline__ Real modified(Real s, int key, bool is_visible, const fa_kvcache_args &args,
                                                 const DecodePlan &plan, const Cursor<kKeys> &turn, int pass) const {
            const QueryRow of = query_of(plan, turn, pass);
            const Real softcap = static_cast<Real>(args.softcap);
            if (args.softcap > 0) s = product(softcap, tanh_of(s / softcap));
            if (args.alibi_slopes.data)
                s -= product(load_per_head<Real>(args.alibi_slopes, turn.b, of.h),
                             static_cast<Real>(abs(turn.of.seq.start + of.i - key)));
            if (is_visible && !fa_tree_shows(&args, &turn.of.seq, turn.b, of.i, key)) return -infinity(Real());
            return product(s, kLog2E);
        }

        // A row's scores, e^(s - m) of them, m and l.
        __device__ __forceinline__ void normalize(const fa_kvcache_args &args, const DecodePlan &plan,
                                                  const Cursor<kKeys> &turn, Sums &sums, int pass) const {
            const bool is_there = softmax_row(pass) < rows;
            const int row = min(softmax_row(pass), rows - 1), lane = thread() % kRowLanes;
            Real score[kOfLane], most = -infinity(Real()), sum = 0;
#pragma unroll
            for (int e = 0; e < kOfLane; ++e) {
                const int key = turn.turn * kKeys + lane + e * kRowLanes;
                Real s = product(sums.p[row][lane + e * kRowLanes], unit);
                if (plan.is_modified) s = modified(s, key, key < hi[pass], args, plan, turn, pass);
                if (key < lo[pass] || key >= hi[pass]) s = -infinity(Real());
                score[e] = s;
                most = max(most, s); // of a NaN and a number the number
            }
            most = row_max_of<kRowLanes>(most);
            const Real shift = Part<Real>::shift_of(most);
#pragma unroll
            for (int e = 0; e < kOfLane; ++e) {
                const Real p = exp2_of(score[e] - shift);
                sum += p;
                if (is_there) sums.p[row][lane + e * kRowLanes] = p;
            }
            sum = row_sum_of<kRowLanes>(sum);
            if (is_there && lane == 0) sums.of_row[row][0] = most, sums.of_row[row][1] = sum;
        }

        // P V of this thread's team.
        __device__ __forceinline__ void multiply_values(const Stage &stage, Sums &sums) const {
            const int team = thread() / kQuads, col = thread() % kQuads * 4;
            int groups = 1;
            while (groups * kTeamRows < rows) groups *= 2;
            const int row0 = (team & (groups - 1)) * kTeamRows, keys = kKeys / kTeams * groups;
            if (thread() == 0) sums.groups = groups;
            if (row0 >= rows) return;
            Real acc_o[kTeamRows][4] = {};
            const int begin = (team & -groups) * (kKeys / kTeams);
#pragma unroll 1
            for (int key0 = begin; key0 < begin + keys; key0 += kVec<Real>) {
                Vec<Real> v[kVec<Real>][4 / kVec<Real>];
#pragma unroll
                for (int j = 0; j < kVec<Real>; ++j)
#pragma unroll
                    for (int n = 0; n < 4; n += kVec<Real>) v[j][n / kVec<Real>] = vec_at(&stage.v[key0 + j][col + n]);
#pragma unroll
                for (int r = 0; r < kTeamRows; ++r) {
                    const Vec<Real> p = vec_at(&sums.p[row0 + r][key0]); // of kVec keys
#pragma unroll
                    for (int j = 0; j < kVec<Real>; ++j)
#pragma unroll
                        for (int n = 0; n < 4; ++n)
                            acc_o[r][n] = fma_of(p.x[j], v[j][n / kVec<Real>].x[n % kVec<Real>], acc_o[r][n]);
                }
            }
#pragma unroll
            for (int r = 0; r < kTeamRows; ++r) {
                if (row0 + r >= rows) break;
#pragma unroll
                for (int n = 0; n < 4; n += kVec<Real>) {
                    Vec<Real> vec;
#pragma unroll
                    for (int c = 0; c < kVec<Real>; ++c) vec.x[c] = acc_o[r][n + c];
                    *reinterpret_cast<Vec<Real> *>(&sums.o[team][r][col + n]) = vec;
                }
            }
        }
    };

    // The sum of all teams that have the row.
    static __device__ __forceinline__ Part<Real> part_of(const Sums &sums, int row, int col) {
        Part<Real> part = {sums.of_row[row][0], sums.of_row[row][1], {}};
        const int groups = sums.groups;
#pragma unroll 2
        for (int team = row / kTeamRows; team < kTeams; team += groups)
#pragma unroll
            for (int n = 0; n < 4; n += kVec<Real>) {
                const Vec<Real> vec = vec_at(&sums.o[team][row % kTeamRows][col + n]);
#pragma unroll
                for (int c = 0; c < kVec<Real>; ++c) part.o[n + c] += vec.x[c];
            }
        return part;
    }
};

#endif
