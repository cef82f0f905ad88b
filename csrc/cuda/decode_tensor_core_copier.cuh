// What decoding on tensor cores reads, and how it comes to shared memory: keys, values, queries, new tokens.
#ifndef FA_DECODE_TENSOR_CORE_COPIER_CUH
#define FA_DECODE_TENSOR_CORE_COPIER_CUH

#include "cuda/decode_pages.cuh"
#include "cuda/decode_rows.cuh"
#include "cuda/mma_tile.cuh"

template <typename Cache, int kKeys, int kDim>
struct DecodeStage {
    SwizzledTile<Cache, kKeys, kDim> k, v;
};

template <typename Operand, int kRows, int kDim>
struct DecodeQueries {
    SwizzledTile<Operand, kRows, kDim> x;
    float unit[kRows]; // of float8 caches: what a row's products are times
};

// A thread copies one column of 16 bytes of every kRowsAtOnce-th key. T: TensorCoreDecode.
template <typename T>
class TensorCoreCopier {
    using Cache = typename T::Cache;
    using Element = typename T::Element;
    using Tile = decltype(T::Stage::k);
    using Turn = Cursor<T::kKeys>;
    static constexpr int kKeys = T::kKeys, kRows = T::kRows, kDim = T::kDim, kCopiers = T::kCopiers;
    static constexpr int kRowsAtOnce = kCopiers / Tile::kColumns, kCopies = kKeys / kRowsAtOnce;
    static_assert((kRowsAtOnce % 8 == 0 || Tile::kSwizzle == 7) && sizeof(typename T::Stage) == 2 * sizeof(Tile));
    // A lane looks up one of the keys that its warp copies in a turn, or the turn's first where all lie in a page.
    static constexpr int kRowsOfWarp = 32 / Tile::kColumns, kKeysOfWarp = kRowsOfWarp * kCopies;
    static_assert(kRowsOfWarp > 0 && kKeysOfWarp <= 32);
    int page, row_of_page, next_page, next_row_of_page; // of a cache with pages
    uint64_t policy;
    int row, column;             // of the thread's first copy
    const char *head_k, *head_v; // of the line; without pages where its next turn's first copy is from
    unsigned lo, k_span, v_span; // its tokens [lo, lo + span) are read, of columns beyond the width none

    // Where copy n of a tile goes, from where copy 0 does.
    static __device__ __forceinline__ uint32_t place(uint32_t first, int n) {
        return (first ^ n * kRowsAtOnce % 8 * 16) + n * kRowsAtOnce * Tile::kRowBytes;
    }

public:
    __device__ __forceinline__ explicit TensorCoreCopier(const DecodePlan &plan)
        : policy(l2_policy(plan.reads_once)), row(static_cast<int>(threadIdx.x) / Tile::kColumns),
          column(static_cast<int>(threadIdx.x) % Tile::kColumns) {
        keep(row), keep(column);
    }

    __device__ __forceinline__ void begin_line(const fa_kvcache_args &args, const DecodePlan &plan, const Turn &turn) {
        const auto head_of = [&](const fa_tensor &cache) {
            return static_cast<const char *>(cache.data) +
                   turn.head * cache.stride_h * static_cast<int>(sizeof(Cache)) + column * 16;
        };
        head_k = head_of(args.k_cache), head_v = head_of(args.v_cache);
        if constexpr (!T::kPaged) {
            head_k += offset(plan.k_strides, turn.b, turn.turn * kKeys + row);
            head_v += offset(plan.v_strides, turn.b, turn.turn * kKeys + row);
        }
        const unsigned span = max(turn.of.seq.len_k - turn.of.lo, 0);
        lo = turn.of.lo;
        k_span = column * Tile::kPerColumn < args.head_dim ? span : 0;
        v_span = column * Tile::kPerColumn < args.head_dim_v ? span : 0;
    }

    __device__ __forceinline__ void look_up(const fa_kvcache_args &args, const DecodePlan &plan, const Turn &turn) {
        const int nth = static_cast<int>(threadIdx.x) % 32 % kKeysOfWarp;
        const int key = (row & -kRowsOfWarp) + nth / kCopies + nth % kCopies * kRowsAtOnce;
        const int token = turn.turn * kKeys + (plan.turns_in_pages ? 0 : key);
        next_page = page_of(args, plan, turn.b, token, turn.of.seq.len_k);
        next_row_of_page = row_in_page(plan, token) + (plan.turns_in_pages ? row : 0);
    }

    // The turn that was looked up last is the one to be copied.
    __device__ __forceinline__ void take_pages() { page = next_page, row_of_page = next_row_of_page; }

    // What is in the cache, and zeros.
    __device__ __forceinline__ void copy(typename T::Stage &stage, const fa_kvcache_args &args, const DecodePlan &plan,
                                         const Turn &turn) {
        if (turn.has_new_tokens(args))
            copy_old<true>(stage, args, plan, turn);
        else
            copy_old<false>(stage, args, plan, turn);
    }
    // A turn's new tokens, which come from k and v; the block that has their first rows stores them in the cache, too.
    static __device__ __forceinline__ void add_new_tokens(typename T::Stage &stage, const fa_kvcache_args &args,
                                                          const DecodePlan &plan, const Turn &turn) {
        const int start = turn.of.seq.start, token0 = turn.turn * kKeys, first = max(start, token0);
        constexpr int kPiece = 8, kOfRow = kDim / kPiece; // elements, pieces
        struct alignas(kPiece * sizeof(Cache)) Piece {
            Cache x[kPiece];
        };
        const int pieces = (min(turn.of.seq.len_k, token0 + kKeys) - first) * kOfRow; // of K, and of V
#pragma unroll 1
        for (int n = static_cast<int>(threadIdx.x); n < 2 * pieces; n += kCopiers) {
            const bool is_k = n < pieces;
            const int piece = is_k ? n : n - pieces, col = piece % kOfRow * kPiece, token = first + piece / kOfRow;
            const fa_tensor &from = is_k ? args.k : args.v, &cache = is_k ? args.k_cache : args.v_cache;
            const int width = static_cast<int>(is_k ? args.head_dim : args.head_dim_v);
            float x[kPiece];
            load_rotated<Element>(x, args, from, fa_row_offset(&from, turn.b, turn.head, token - start), col, width,
                                  is_k, token);
            const fa_per_head &descale = is_k ? args.k_descale : args.v_descale;
            const float scale = descale_of(descale, turn.b, turn.head);
            Piece stored;
#pragma unroll
            for (int c = 0; c < kPiece; ++c)
                store_cached<float>(stored.x, T::kIsFloat8 ? FA_FLOAT8_E4M3 : kDtype<Element>, c,
                                    descale.data ? x[c] / scale : x[c]);
            const int page = page_of(args, plan, turn.b, token, turn.of.seq.len_k);
            if (!page_exists(args, page)) stored = {};
            Tile &tile = is_k ? stage.k : stage.v;
            Cache *const to = reinterpret_cast<Cache *>(tile.at(token - token0, col / Tile::kPerColumn));
            *reinterpret_cast<Piece *>(to + col % Tile::kPerColumn) = stored;
            if (turn.m_block > 0 || !page_exists(args, page) || col >= width) continue;
            Cache *const head = static_cast<Cache *>(cache.data) + turn.head * cache.stride_h;
            *reinterpret_cast<Piece *>(head + page * cache.stride_b + row_in_page(plan, token) * cache.stride_l + col) =
                stored;
        }
    }

    // By the folders: the rows of a line, rotated; zeros beyond them.
    static __device__ __forceinline__ void load(typename T::Queries &queries, const fa_kvcache_args &args,
                                                const DecodePlan &plan, const Turn &turn, int thread) {
        constexpr int kColumns = kDim / 8;
#pragma unroll 1
        for (int n = thread; n < kRows * kColumns; n += kFolders) {
            const int row = n / kColumns, column = n % kColumns;
            const bool is_there = row < turn.rows(plan, kRows) && column * 8 < args.head_dim;
            const QueryRow of(plan, turn.head, turn.row0(kRows) + (is_there ? row : 0));
            const int64_t at = fa_row_offset(&args.q, turn.b, of.h, of.i);
            if constexpr (!T::kIsFloat8) {
                if (!args.rotary.cos) {
                    cp_async_16(queries.x.at(row, column), static_cast<const Element *>(args.q.data) + at + column * 8,
                                is_there);
                    continue;
                }
            }
            float x[8] = {};
            if (is_there)
                load_rotated<Element>(x, args, args.q, at, column * 8, static_cast<int>(args.head_dim), true,
                                      turn.of.seq.start + of.i);
            if constexpr (T::kIsFloat8) scale_row(x, queries.unit[row]);
            uint32_t words[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) words[c] = T::M::round_pair(x[2 * c], x[2 * c + 1]);
            if constexpr (T::kIsFloat8) { // in the order in which words of keys hold them
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    *reinterpret_cast<uint32_t *>(queries.x.at(row, column / 4 * 4 + c) + column % 4 * 2) = words[c];
            } else {
                *reinterpret_cast<uint4 *>(queries.x.at(row, column)) =
                    make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }

private:
    // Of a row of a page, in bytes.
    static __device__ __forceinline__ uint64_t offset(const CacheStrides &strides, int page, int row) {
        return (static_cast<uint64_t>(static_cast<unsigned>(page)) * strides.page +
                static_cast<uint64_t>(static_cast<unsigned>(row)) * strides.row) *
               16;
    }

    // kHasNew: nothing is copied where a new token comes, it might come after that.
    template <bool kHasNew>
    __device__ __forceinline__ void copy_old(typename T::Stage &stage, const fa_kvcache_args &args,
                                             const DecodePlan &plan, const Turn &turn) {
        const int token0 = turn.turn * kKeys + row;
        // Copy n is of a token that is read iff at + n kRowsAtOnce < span, and of a new one alike: without signs.
        const unsigned at = token0 - lo, of_new = token0 - turn.of.seq.start;
        const unsigned new_span = turn.of.seq.len_k - turn.of.seq.start;
        const uint32_t to_k = shared_address(stage.k.at(row, column)), to_v = to_k + sizeof(Tile);
        const auto copy = [&](int n, const char *from_k, const char *from_v, unsigned of_k, unsigned of_v) {
            const unsigned token = at + n * kRowsAtOnce;
            if (kHasNew && of_new + n * kRowsAtOnce < new_span) return;
            cp_async_16(place(to_k, n), from_k, token < of_k, policy);
            cp_async_16(place(to_v, n), from_v, token < of_v, policy);
        };
        const auto copy_rows = [&](const char *&k, const char *&v, unsigned of_k, unsigned of_v) {
            const int64_t k_step = static_cast<int64_t>(plan.k_strides.row) * kRowsAtOnce * 16;
            const int64_t v_step = static_cast<int64_t>(plan.v_strides.row) * kRowsAtOnce * 16;
#pragma unroll
            for (int n = 0; n < kCopies; ++n, k += k_step, v += v_step) copy(n, k, v, of_k, of_v);
        };
        if constexpr (!T::kPaged) {
            copy_rows(head_k, head_v, k_span, v_span); // as far as the next turn's
        } else {
            const bool has_page = page_exists(args, page);
            const uint64_t offset_k = offset(plan.k_strides, page, row_of_page),
                           offset_v = offset(plan.v_strides, page, row_of_page);
            if (plan.turns_in_pages) {
                const char *k = head_k + offset_k, *v = head_v + offset_v;
                copy_rows(k, v, has_page ? k_span : 0, has_page ? v_span : 0);
                return;
            }
            const unsigned with_page = __ballot_sync(~0u, has_page);
#pragma unroll
            for (int n = 0; n < kCopies; ++n) {
                const int lane = row % kRowsOfWarp * kCopies + n; // that has looked it up
                const bool exists = with_page >> lane & 1;
                const char *k = head_k + __shfl_sync(~0u, offset_k, lane),
                           *v = head_v + __shfl_sync(~0u, offset_v, lane);
                copy(n, k, v, exists ? k_span : 0, exists ? v_span : 0);
            }
        }
    }

    // 8 of a row's elements as float16 can hold them, of bfloat16 too: times a power of two that brings the row's largest
    // below 2^15; all lanes of a row come here. unit: what undoes it.
    static __device__ __forceinline__ void scale_row(float (&x)[8], float &unit) {
        int exponent = 127 + 14; // of float32
        if constexpr (kDtype<Element> == FA_BFLOAT16) {
            float most = 0;
#pragma unroll
            for (int c = 0; c < 8; ++c) most = fmaxf(most, fabsf(x[c]));
            const int own = __float_as_int(row_max_of<kDim / 8>(most)) >> 23;
            if (own < 255) exponent = max(own, 15);
        }
        const float factor = __int_as_float((2 * 127 + 14 - exponent) << 23);
#pragma unroll
        for (int c = 0; c < 8; ++c) x[c] *= factor;
        unit = __int_as_float((exponent - 14) << 23);
    }
};

#endif
