// What decoding on CUDA cores reads, and how it comes to shared memory as Real: keys, values, queries, new tokens.
#ifndef FA_DECODE_FUSED_COPIER_CUH
#define FA_DECODE_FUSED_COPIER_CUH

#include "cuda/decode_pages.cuh"
#include "cuda/decode_rows.cuh"
#include "cuda/ptx/cp_async.cuh"

// x as a dtype holds it.
template <typename Real>
__device__ __forceinline__ Real rounded(Real x, fa_dtype dtype) {
    switch (dtype) {
    case FA_FLOAT16: return real_of<Real>(__float2half_rn(static_cast<float>(x)));
    case FA_BFLOAT16: return real_of<Real>(__float2bfloat16_rn(static_cast<float>(x)));
    case FA_FLOAT8_E4M3: return real_of<Real>(e4m3_of(static_cast<float>(x)));
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

// The pages of a thread's kCopies keys of a turn, or that of the turn, where all its keys lie in one; and rows in them.
template <int kCopies>
struct TurnPages {
    int of[kCopies], row[kCopies];

    // key(n): which of the turn's kKeys copy n is of.
    template <int kKeys, typename Key>
    __device__ __forceinline__ void look_up(const fa_kvcache_args &args, const DecodePlan &plan,
                                            const Cursor<kKeys> &turn, const Key &key) {
        const int token0 = turn.turn * kKeys, len_k = turn.of.seq.len_k;
        const auto look = [&](int n, int token) {
            row[n] = row_in_page(plan, token);
            of[n] = page_of(args, plan, turn.b, token, len_k);
        };
        if (plan.turns_in_pages) {
            look(0, token0);
            row[0] += key(0);
        } else {
#pragma unroll
            for (int n = 0; n < kCopies; ++n) look(n, token0 + key(n));
        }
    }
};

// A thread copies 16 bytes of a key at a time.
template <typename T>
class FusedCopier {
    using Real = typename T::Real;
    using Stage = typename T::Stage;
    using Turn = Cursor<T::kKeys>;
    static constexpr int kKeys = T::kKeys, kRows = T::kRows, kDim = T::kDim, kCopiers = T::kCopiers;
    static constexpr int kColumns = kDim / kVec<Real>, kCopies = kKeys * kColumns / kCopiers;
    static_assert(kCopies * kCopiers == kKeys * kColumns);

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
    static __device__ __forceinline__ int old_end(const fa_kvcache_args &args, const Turn &turn) {
        return args.k.data ? min(turn.of.seq.start, turn.of.seq.len_k) : turn.of.seq.len_k;
    }

public:
    __device__ __forceinline__ explicit FusedCopier(const DecodePlan &) {}
    __device__ __forceinline__ void begin_line(const fa_kvcache_args &, const DecodePlan &, const Turn &) {}

    __device__ __forceinline__ void copy(Stage &stage, const fa_kvcache_args &args, const DecodePlan &plan,
                                         const Turn &turn) const {
        if (has_vectors_of<Real>(args.k_cache, args.cache_dtype) &&
            has_vectors_of<Real>(args.v_cache, args.cache_dtype)) {
            TurnPages<kCopies> pages;
            pages.look_up(args, plan, turn, row);
            const int k_width = static_cast<int>(args.head_dim), v_width = static_cast<int>(args.head_dim_v);
            if (plan.turns_in_pages) {
                copy_tile<true>(stage.k, args.k_cache, k_width, args, turn, pages);
                copy_tile<true>(stage.v, args.v_cache, v_width, args, turn, pages);
            } else {
                copy_tile<false>(stage.k, args.k_cache, k_width, args, turn, pages);
                copy_tile<false>(stage.v, args.v_cache, v_width, args, turn, pages);
            }
        } else {
            convert_stage(stage, args, plan, turn);
        }
    }
    __device__ __forceinline__ void add_new_tokens(Stage &stage, const fa_kvcache_args &args, const DecodePlan &,
                                                   const Turn &turn) const {
        add_new(&stage, &args, turn);
    }

    // By the folders: the rows of a line, rotated, in q's dtype.
    static __device__ __forceinline__ void load(typename T::Queries &queries, const fa_kvcache_args &args,
                                                const DecodePlan &plan, const Turn &turn, int thread) {
        const bool copies = !args.rotary.cos && has_vectors_of<Real>(args.q, args.dtype);
        const int width = static_cast<int>(args.head_dim), count = turn.rows(plan, kRows) * kColumns;
#pragma unroll 1
        for (int n = thread; n < count; n += kFolders) {
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
            by_element<Real>(args.dtype, [&](auto of_type) {
                load_rotated<decltype(of_type)>(vec.x, args, args.q, at, col, width, true, turn.of.seq.start + of.i);
            });
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
                                              const fa_kvcache_args &args, const Turn &turn,
                                              const TurnPages<kCopies> &pages) const {
        const int token0 = turn.turn * kKeys, end = old_end(args, turn);
        const Real *head = static_cast<const Real *>(cache.data) + turn.head * cache.stride_h;
        if (kInPages) head += pages.of[0] * cache.stride_b + pages.row[0] * cache.stride_l;
#pragma unroll
        for (int n = 0; n < kCopies; ++n) {
            const int token = token0 + row(n), page = pages.of[kInPages ? 0 : n];
            if (token >= end && token < turn.of.seq.len_k) continue;
            const bool is_read = token >= turn.of.lo && token < end && page_exists(args, page);
            const int64_t at =
                kInPages ? (row(n) - row(0)) * cache.stride_l : page * cache.stride_b + pages.row[n] * cache.stride_l;
            cp_async_16_part(shared_address(&tile[row(n)][col(n)]), head + at + col(n),
                             is_read ? bytes_from(col(n), width) : 0);
        }
    }

    // Rows of any cache. Pages are looked up here: copies that wait need no register for them.
    __device__ __forceinline__ static void convert_stage(Stage &stage, const fa_kvcache_args &args,
                                                         const DecodePlan &plan, const Turn &turn) {
        const auto convert = [&](auto of_type) {
            using Cache = decltype(of_type);
            const int k_width = static_cast<int>(args.head_dim), v_width = static_cast<int>(args.head_dim_v);
            convert_tile<Cache>(stage.k, &args.k_cache, k_width, &args, &plan, turn);
            convert_tile<Cache>(stage.v, &args.v_cache, v_width, &args, &plan, turn);
        };
        by_element<Real>(args.cache_dtype, convert);
    }
    template <typename Cache>
    static __device__ __noinline__ void convert_tile(Real (&tile)[kKeys][kDim], const fa_tensor *cache, int width,
                                                     const fa_kvcache_args *args, const DecodePlan *plan,
                                                     const Turn turn) {
        struct alignas(sizeof(Cache) * kVec<Real>) Loaded {
            Cache x[kVec<Real>];
        };
        const int end = old_end(*args, turn);
        Loaded loaded[kCopies]; // all on their way before the first is waited for
#pragma unroll
        for (int n = 0; n < kCopies; ++n) {
            const int token = turn.turn * kKeys + row(n);
            const int page = token >= turn.of.lo ? page_of(*args, *plan, turn.b, token, end) : -1;
            const Cache *from = static_cast<const Cache *>(cache->data) + page * cache->stride_b +
                                turn.head * cache->stride_h + row_in_page(*plan, token) * cache->stride_l + col(n);
            const int count = page_exists(*args, page) ? width - col(n) : 0;
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
    static __device__ __noinline__ void add_new(Stage *stage, const fa_kvcache_args *args, const Turn turn) {
        const auto add = [&](Real(&tile)[kKeys][kDim], int n, int token, const fa_tensor &from, const fa_tensor &cache,
                             int64_t width, bool rotates, const fa_per_head &descale) {
            Vec<Real> vec;
            by_element<Real>(args->dtype, [&](auto of_type) {
                load_rotated<decltype(of_type)>(vec.x, *args, from,
                                                fa_row_offset(&from, turn.b, turn.head, token - turn.of.seq.start),
                                                col(n), static_cast<int>(width), rotates, token);
            });
            const float scale = descale_of(descale, turn.b, turn.head);
            const int64_t page = fa_page_of(args, turn.b, token);
            const int64_t at = fa_cache_offset(args, &cache, page, turn.head, token) + col(n);
#pragma unroll 1
            for (int c = 0; c < kVec<Real>; ++c) {
                const bool is_there = col(n) + c < width;
                const Real x = descale.data ? vec.x[c] / scale : vec.x[c];
                tile[row(n)][col(n) + c] = is_there && page >= 0 ? rounded(x, args->cache_dtype) : Real(0);
                if (turn.m_block == 0 && page >= 0 && is_there) store_cached(cache.data, args->cache_dtype, at + c, x);
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

#endif
